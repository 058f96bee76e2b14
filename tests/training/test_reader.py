"""Kept examples: the newest, whole, in a fixed room."""

import torch

from sumus.training.examples import _Kept


def pair(number: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((rows, 3), float(number)), torch.full((rows,), number)


def test_what_is_kept_comes_back_as_it_was_or_not_at_all() -> None:
    kept = _Kept(4096, torch.device("cpu"))
    draw = torch.Generator().manual_seed(0)
    for number in range(500):
        rows = int(torch.randint(1, 60, (), generator=draw))
        kept.put(number, pair(number, rows))
        for other in range(max(0, number - 40), number + 1):
            found = kept.get(other)
            if found is not None:
                assert (found[0] == other).all()
                assert (found[1] == other).all()
                assert len(found[0]) == len(found[1])
        assert kept.get(number) is not None


def test_a_copy_may_be_changed_without_changing_what_is_kept() -> None:
    kept = _Kept(4096, torch.device("cpu"))
    kept.put("a", pair(1, 4))
    first = kept.get("a")
    assert first is not None
    first[0].zero_()
    again = kept.get("a")
    assert again is not None
    assert (again[0] == 1).all()


def test_what_is_larger_than_the_room_is_not_kept() -> None:
    kept = _Kept(256, torch.device("cpu"))
    kept.put("small", pair(1, 2))
    kept.put("large", pair(2, 100))
    assert kept.get("large") is None
    assert kept.get("small") is not None
