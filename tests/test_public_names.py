"""The public names are a list that someone chose."""

import pytest

import sumus


@pytest.mark.parametrize("name", sumus.__all__)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(sumus, name) is getattr(sumus, name)


def test_the_list_is_short_sorted_and_without_repetition() -> None:
    assert len(sumus.__all__) <= 105  # options that belong together are values with a name
    assert list(sumus.__all__) == sorted(set(sumus.__all__))
    assert not [name for name in sumus.__all__ if name.startswith("_")]


def test_dir_shows_the_list_and_nothing_else() -> None:
    assert dir(sumus) == sumus.__all__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'sumus' has no attribute 'fedavgg'"):
        sumus.fedavgg  # pyright: ignore[reportAttributeAccessIssue]
