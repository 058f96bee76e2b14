"""Columns: the same values as an array, or a refusal that says which row."""

import datetime
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pytest

from sumus.columns import array_of, ids_of, numbers_of, stacked

BIG = 2**53 + 1


@pytest.mark.parametrize(
    ("values", "wanted"),
    [
        ([1, 2.5], np.array([1.0, 2.5])),
        ([[1, 2], [3, 4]], np.array([[1, 2], [3, 4]])),
        (["a", "b"], np.array(["a", "b"])),
        ([BIG, BIG + 1], np.array([BIG, BIG + 1])),
        ([True, False], np.array([True, False])),
        ([np.arange(3), np.arange(3)], np.array([[0, 1, 2]] * 2)),
        (np.ma.masked_array([1, 2], mask=[False, False]), np.array([1, 2])),
        (pd.Series([1, 2]), np.array([1, 2])),
        (pd.DataFrame({"a": [1, 2], "b": [0.5, 1.5]}), np.array([[1, 0.5], [2, 1.5]])),
    ],
)
def test_an_array_holds_what_the_column_holds(values: Any, wanted: np.ndarray) -> None:
    found = array_of(values)
    np.testing.assert_array_equal(found, wanted)
    assert found.dtype == wanted.dtype


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (["a", 1], r"row 1 is a whole number \(1\), but row 0 is text \('a'\)"),
        ([1, "2"], r"row 0 is a whole number \(1\), but row 1 is text"),
        ([0.5, "2"], "row 0 is a number with a fraction"),
        ([b"a", "a"], "row 0 is bytes"),
        ([[1, 2], ["a", 3]], r"row 1: row 1 is a whole number \(3\)"),
        ([[1, 2], ["a", "b"]], "row 1 is text .*, but row 0 is a number"),
        ([[1, 2], [3]], r"row 1 has shape \(1,\), but row 0 has shape \(2,\)"),
        ([BIG, 0.5], f"row 0 is {BIG}, which float64 cannot hold .it would become {BIG - 1}"),
        ([[1.5, 2.5], [0, BIG]], f"row 1: |row 1, entry 1 is {BIG}, which float64 cannot hold"),
        ([np.array([2**63], np.uint64), np.array([-1])], None),
        ([np.array([2**63 + 1], np.uint64), np.array([-1])], "which float64 cannot hold"),
        (["a\0", "b"], "row 0 is a text that ends with a zero byte"),
        (np.ma.masked_array([[1, 2], [3, 4]], mask=[[0, 0], [1, 0]]), "row 1, column 0 is masked"),
        ([np.ma.masked_array([1, 2], mask=[0, 1]), np.arange(2)], "row 0: row 1 is masked"),
        (pd.DataFrame({"id": [1, BIG], "x": [0.5, 1.5]}), f"column 'id', row 1 is {BIG}, which float64 cannot hold"),
    ],
)
def test_what_a_conversion_would_change_is_refused_by_row(values: Any, said: str | None) -> None:
    if said is None:
        array_of(values)
        return
    with pytest.raises(ValueError, match=said):
        array_of(values)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.array(["1", "2"]), r"row 0 holds text \('1'\), which is not a number"),
        (np.array([b"1"]), "row 0 holds bytes"),
        ([1.0, None], "row 1 holds nothing"),
        (pd.Series([True, None], dtype="boolean"), "row 1 holds nothing"),
        (np.array([[1, 2], [3, "x"]], object), "row 1, column 1 holds text"),
        ([Decimal("0.1")], "row 0 holds a Decimal"),
        ([datetime.date(2026, 1, 1)], "row 0 holds a date"),
        (np.array(["2026-01-01"], "M8[D]"), "row 0 holds a datetime64"),
        ([2**64, 1], "objects"),
    ],
)
def test_what_is_no_number_is_refused_by_row_and_column(values: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        numbers_of(values)


def test_columns_that_become_an_axis_are_of_one_kind() -> None:
    whole, real, text = np.array([1, 2]), np.array([0.5, 1.5]), np.array(["1", "2"])
    assert stacked([whole, real], -1).tolist() == [[1, 0.5], [2, 1.5]]
    with pytest.raises(ValueError, match="column 'b' is text .*, but column 'a' is a number"):
        stacked([whole, text], -1, ["column 'a'", "column 'b'"])
    with pytest.raises(ValueError, match=f"row 0, entry 0 is {BIG}"):
        stacked([np.array([BIG, 2]), real], -1)


@pytest.mark.parametrize(
    "by",
    [
        ["ann", "bob", "ann"],
        [b"ann", b"bob"],
        [2**70, 2**70 + 1],
        [BIG, BIG - 1],
        [("ward", 1), ("ward", 2)],
        ["a\0", "a"],
        [1.5, 2.5],
        [datetime.date(2026, 1, 1), datetime.date(2026, 1, 2)],
    ],
)
def test_ids_stay_who_they_are(by: list[Any]) -> None:
    assert list(ids_of(by)) == by
    assert list(ids_of(np.array(by, object) if not isinstance(by[0], tuple) else by)) == by


@pytest.mark.parametrize(
    ("by", "said"),
    [
        ([1, "1"], r"example 1 is text, '1', but example 0 is a whole number, 1"),
        (["1", 1], "example 1 is a whole number, 1"),
        ([1, True], "example 1 is a truth value"),
        ([1, 1.0], "example 1 is a number with a fraction"),
        (["a", b"a"], "example 1 is bytes"),
        ([1, 2**60, 0.5], "example 2 is a number with a fraction"),
        ([1.0, 2.0**53], "several whole numbers may have been rounded to a float"),
        (np.array([1.0, 2.0**24], np.float32), "a float of that size"),
        (pd.Series([BIG, None]), "a float of that size|no client for example 1"),
        (pd.Series(["a", pd.NA]), "no client for example 1"),
        (pd.Series([1, pd.NA], dtype="Int64"), "no client for example 1"),
        ([pd.Timestamp(0), pd.NaT], "no client for example 1"),
        (np.array(["2026-01-01", "NaT"], "M8[D]"), "no client for example 1"),
        (np.ma.masked_array(["a", "b"], mask=[0, 1]), "row 1 is masked"),
    ],
)
def test_ids_that_may_merge_two_people_are_refused(by: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ids_of(by)
