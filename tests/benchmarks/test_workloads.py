"""The workloads are those of the tables, the same in every environment, and their variants differ."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import workloads
from benchmarks.workloads import WORKLOADS, Workload, named, variant

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "parameters", "examples", "fewest", "most", "steps", "gflop"),
    [
        ("w1", 1_690_046, 8_712, 20, 282, 486, 632.0),
        ("w2", 36_358, 10_601, 14, 159, 1_154, 1.55),
        ("w3", 565_712, 2_648, 15, 152, 188, 117.8),
    ],
)
def test_sizes_are_those_of_the_tables(
    name: str, parameters: int, examples: int, fewest: int, most: int, steps: int, gflop: float
) -> None:
    workload = named(name)
    assert workload.parameters == parameters
    assert (workload.sizes.sum(), workload.sizes.min(), workload.sizes.max()) == (examples, fewest, most)
    assert workload.steps == steps
    assert workload.flops / 1e9 == pytest.approx(gflop, rel=0.003)


@pytest.mark.parametrize("name", [*WORKLOADS, "w1/3", "w2/3", "w3/3"])
def test_a_module_begins_with_the_weights_that_everyone_gets(name: str) -> None:
    workload = named(name)
    weights, state = workload.initial(), workload.module().state_dict()
    assert list(weights) == list(state)
    for leaf, array in weights.items():
        np.testing.assert_array_equal(state[leaf].numpy(), array)
    inputs, targets = workload.only(1).examples()[0]
    scores = workload.module()(torch.from_numpy(inputs[:3]))
    assert scores.shape[:-1] == targets[:3].shape
    assert targets.max() < scores.shape[-1]


@pytest.mark.parametrize("name", ["w1", "w2", "w3/1"])
def test_the_first_clients_are_the_same_however_many_there_are(name: str) -> None:
    few, more = (named(name).only(clients).examples() for clients in (2, 4))
    assert (len(few), len(more)) == (2, 4)
    for one, other in zip(few, more, strict=False):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])


def test_double_is_the_same_numbers_in_float64() -> None:
    workload = named("w2").only(2)
    single, double = workload.examples(), workload.examples(double=True)
    assert (single[0][0].dtype, double[0][0].dtype) == (np.float32, np.float64)
    np.testing.assert_array_equal(single[1][0], double[1][0])
    assert next(workload.module(double=True).parameters()).dtype == torch.float64


@pytest.mark.parametrize("name", WORKLOADS)
def test_variants_differ_and_are_reproducible(name: str) -> None:
    drawn = [variant(name, seed) for seed in range(8)]
    assert drawn == [variant(name, seed) for seed in range(8)]
    assert len({one.shape for one in drawn} | {WORKLOADS[name].shape}) == 9
    assert all((one.sizes == WORKLOADS[name].sizes).all() for one in drawn)
    assert drawn[5] == named(f"{name}/5")


def test_variants_reach_every_depth_and_stay_in_their_ranges() -> None:
    pictures, activities, sentences = ([variant(name, seed) for seed in range(40)] for name in ("w1", "w2", "w3"))
    assert {one.kernel for one in pictures} == {3, 5}
    assert {len(one.dense) for one in pictures} == {1, 2}
    assert {len(one.dense) for one in activities} == {1, 2, 3}
    assert all(32 <= width <= 128 for one in activities for width in one.dense)
    assert all(96 <= one.hidden <= 192 and 1000 <= one.vocabulary <= 3000 for one in sentences)


def test_flops_are_what_torch_counts() -> None:
    for name in ("w1/1", "w2/1"):
        workload = named(name).only(1)
        assert workload.flops == _counted(workload)


def _counted(workload: Workload) -> int:
    from torch.utils.flop_counter import FlopCounterMode

    inputs = torch.from_numpy(workload.examples()[0][0])
    module = workload.module()
    with FlopCounterMode(display=False) as counter:
        module(inputs).sum().backward()
    return counter.get_total_flops()


def test_an_unknown_workload_is_named() -> None:
    with pytest.raises(ValueError, match="no workload 'w9': one of w1, w2, w3"):
        named("w9")


def test_batches_visit_everything_once_in_order() -> None:
    rows = np.arange(23)
    assert [len(rows[batch]) for batch in workloads.batches(23, 10)] == [10, 10, 3]
    np.testing.assert_array_equal(np.concatenate([rows[batch] for batch in workloads.batches(23, 10)]), rows)


def test_what_peers_import_brings_neither_torch_nor_sumus() -> None:
    code = (
        "import sys, benchmarks.workloads, benchmarks.lockstep, benchmarks.peers.asked as asked\n"
        "workload = asked.workload_of(asked.parser('').parse_args(['w3/2', '--clients', '1']))\n"
        "workload.examples(), workload.initial()\n"
        "print([name for name in ('torch', 'sumus') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
