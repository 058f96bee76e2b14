"""Mutations without a fuzzer: the same ones each time, for a test that takes seconds."""

import random
from collections.abc import Iterator, Sequence

from benchmarks.fuzz.target import Target

_LONGEST = 8192


def mutated(target: Target, count: int, seed: int = 0) -> Iterator[bytes]:
    """Yield `count` inputs, each made of one or two inputs of a target's corpus by one to four changes."""
    dice = random.Random(f"{target.name} {seed}")
    corpus = [data for data in target.corpus().values() if len(data) <= _LONGEST]
    for _ in range(count):
        data = bytearray(dice.choice(corpus))
        for _ in range(dice.randint(1, 4)):
            _change(data, dice, corpus, target.words)
        yield bytes(data[:_LONGEST])


def _change(data: bytearray, dice: random.Random, corpus: Sequence[bytes], words: Sequence[bytes]) -> None:
    at = dice.randint(0, len(data))
    until = min(len(data), at + dice.choice((0, 1, 1, 2, 4, 8, 64)))
    match dice.randrange(6):
        case 0:
            data[at:until] = dice.randbytes(until - at)
        case 1:
            del data[at:until]
        case 2:
            data[at:at] = data[at:until] * dice.choice((1, 2, 50))
        case 3:
            other = dice.choice(corpus)
            begin = dice.randint(0, len(other))
            data[at:until] = other[begin : begin + dice.choice((1, 8, 64, 512))]
        case 4:
            data[at:until] = dice.choice([*words, b"\0", b"\xff" * 8, b"-1", b"1e308"])
        case _:
            if at < len(data):
                data[at] ^= 1 << dice.randrange(8)
