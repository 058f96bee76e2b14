# Everything a newcomer needs. `make setup` runs by itself where it is needed.
PYTHON ?= python3
BIN := .venv/bin

.DEFAULT_GOAL := help
.PHONY: help setup docs demo test lint format bench faults faults-short wheel sbom lock clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: .venv/ready  ## make .venv with everything

.venv/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("sumus needs Python 3.11 or newer; try make PYTHON=python3.11") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all,dev]'
	@touch $@

docs: .venv/ready  ## build the documentation as a site in build/site, with search, to be read from the disk
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -c docs -d build/doctrees . build/site
	@echo "open build/site/index.html"

demo: .venv/ready  ## train a watch-activity model across ten people, and show the result
	$(BIN)/sumus demo health

test: .venv/ready  ## the whole suite
	$(BIN)/python -m pytest -n auto --dist loadgroup

lint: .venv/ready  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: .venv/ready  ## put the style right
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/ready  ## measure: cost of rounds and populations, in one table
	$(BIN)/python -m benchmarks.cost

.PHONY: fuzz
fuzz: .venv/ready  ## every parser that reads from outside, for ten minutes each
	$(BIN)/python -m benchmarks.fuzz

faults: .venv/ready  ## kill servers at random and at every failpoint, hundreds of times, and audit what they promised
	$(BIN)/python -m benchmarks.kills

faults-short: .venv/ready  ## a sample of these, and the controls
	$(BIN)/python -m benchmarks.kills --short

wheel: .venv/ready  ## build the wheel of the last commit in dist/: the same commit gives the same bytes
	PYTHON=$(BIN)/python deploy/wheel.sh dist

sbom: .venv/ready  ## list what a deployment is made of, in dist/, as CycloneDX
	@mkdir -p dist
	$(BIN)/python -W ignore::UserWarning -m cyclonedx_py requirements deploy/requirements.txt --pyproject pyproject.toml \
	  --output-reproducible --validate --output-file dist/sumus.cdx.json

lock: .venv/ready  ## pin what a deployment is made of in deploy/requirements.txt, by hash
	@mkdir -p build
	$(BIN)/pip-compile --quiet --extra server --build-deps-for wheel --allow-unsafe --strip-extras --generate-hashes \
	  --no-annotate --no-header --constraint constraints.txt --output-file build/locked.txt pyproject.toml
	{ sed '/^[^#]/,$$d' deploy/requirements.txt; sed '/^#/d; /^--/d; /^$$/d' build/locked.txt; } > build/requirements.txt
	mv build/requirements.txt deploy/requirements.txt

clean:  ## remove what make made
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
