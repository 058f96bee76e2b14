"""The targets, one module for each parser."""

import importlib

from benchmarks.fuzz.target import Target

NAMES = (
    "tensors",
    "reports",
    "messages",
    "signatures",
    "bundles",
    "plans",
    "hops",
    "links",
    "csv",
    "json",
    "npy",
    "npz",
    "line_protocol",
    "gzip",
    "zip",
    "pictures",
    "mqtt",
    "virtual",
)


def load(name: str) -> Target:
    """Import a target by its name."""
    target: Target = importlib.import_module(f"{__name__}.{name}").TARGET
    assert target.name == name
    return target
