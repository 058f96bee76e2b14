"""docs/migrate.md's recipes: each with one model in this process, in two, on devices and resumed, and in at most ten lines."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import sumus

FOLDER = Path(__file__).parents[1] / "examples" / "own_loops"
NEEDED = {
    "plain": (),
    "scikit": ("sklearn",),
    "trainer": ("transformers", "accelerate"),
    "lightning_loop": ("lightning",),
}
LEARNED = {"plain": 0.85, "scikit": 0.85}
MOST_LINES = 10


def experiment_of(name: str, monkeypatch: pytest.MonkeyPatch) -> sumus.Experiment:
    """The experiment of a file, as the command line loads it."""
    for package in NEEDED[name]:
        pytest.importorskip(package, reason=f"{package} is not installed: docs/migrate.md says how to install it")
    spec = importlib.util.spec_from_file_location(f"sumus_file_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module.experiment


def test_the_list_of_recipes_is_whole() -> None:
    assert {path.stem for path in FOLDER.glob("*.py")} == set(NEEDED)


@pytest.mark.parametrize("name", NEEDED)
def test_at_most_ten_lines_are_not_the_users_own(name: str) -> None:
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    own, mark, ours = text.partition("# ── sumus ──\n")
    assert mark
    assert "sumus" not in own.partition('"""\n')[2].partition('"""')[2]
    lines = [line for line in ours.splitlines() if line.strip()]
    assert len(lines) <= MOST_LINES, lines


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NEEDED)
def test_a_recipe_gives_one_model_wherever_it_runs(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = experiment_of(name, monkeypatch)
    experiment = replace(whole, rounds=2, plan=replace(whole.plan, min_contributors=2), evaluate=sumus.Evaluation())
    alone = sumus.run(experiment, compute=sumus.Compute(workers=1))
    models = {
        "two processes": sumus.run(experiment, compute=sumus.Compute(workers=2)),
        "devices": sumus.run(experiment, compute=sumus.Compute(through="wire")),
    }
    sumus.run(replace(experiment, rounds=1), out=str(tmp_path))
    models["resumed"] = sumus.run(experiment, out=str(tmp_path))
    assert {where: history.model_sha256 for where, history in models.items()} == dict.fromkeys(
        models, alone.model_sha256
    )


@pytest.mark.parametrize("name", LEARNED)
def test_a_recipe_learns(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sumus.run(experiment_of(name, monkeypatch)).metrics["accuracy"] > LEARNED[name]
