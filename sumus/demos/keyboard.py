"""Which word comes next? Authors who each keep their own text; five of them are never seen in training.

sumus demo keyboard
"""

import re
from collections import Counter

import numpy as np
import torch
from torch import nn

import sumus
from sumus.demos import sources
from sumus.metrics import IGNORED
from sumus.types import Array

VOCABULARY = 3000
UNKNOWN = 0
WORDS_A_ROW = 20
AUTHORS_NEVER_SEEN = ("lincoln", "hoover", "kennedy", "reagan", "obama")
PUBLIC_AUTHORS = ("washington", "polk", "cleveland-22", "taft", "truman", "clinton")


class NextWord(nn.Module):
    """An LSTM over words whose output layer shares the embedding's weights: 0.4 million parameters. (B, time) words →
    (B, time, words) scores.
    """

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 96)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.lstm = nn.LSTM(96, 128, batch_first=True)
        self.down = nn.Linear(128, 96)
        self.out = nn.Linear(96, VOCABULARY)
        self.out.weight = self.embedding.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        return self.out(self.down(self.lstm(self.embedding(words))[0]))


def words_of(text: str) -> list[str]:
    """Split a text into words in lower case, and the characters that end sentences."""
    return re.findall(r"[a-z']+|[.?!]", text.lower())


class Tokenizer:
    """Preparation on the device: turns a person's text into rows of word numbers, and the words that follow."""

    def __init__(self, public_texts: list[str]) -> None:
        counts = Counter(word for text in public_texts for word in words_of(text))
        self.words = ["<other>", *(word for word, _ in counts.most_common(VOCABULARY - 1))]
        self._number = {word: number for number, word in enumerate(self.words)}

    def __call__(self, texts: Array, ignored: Array) -> tuple[Array, Array]:
        """Return rows (n, time) of word numbers, and the next word for each. A next word outside the vocabulary is not
        a target.
        """
        numbers = np.array([self._number.get(word, UNKNOWN) for text in texts for word in words_of(str(text))])
        rows = (len(numbers) - 1) // WORDS_A_ROW
        inputs, following = numbers[: rows * WORDS_A_ROW], numbers[1 : rows * WORDS_A_ROW + 1]
        targets = np.where(following == UNKNOWN, IGNORED, following)
        return inputs.reshape(rows, WORDS_A_ROW), targets.reshape(rows, WORDS_A_ROW)


def experiment() -> sumus.Experiment:
    """FedAdam over authors. The vocabulary comes from the public texts of authors who do not take part."""
    texts = sources.speeches()
    authors = sumus.Population(
        [author for author in texts if author not in PUBLIC_AUTHORS],
        lambda author: (np.array([texts[author]]), np.zeros(1)),
    )
    task = sumus.Task(
        model=NextWord,
        loss=sumus.losses.cross_entropy,
        metrics={"top1": sumus.metrics.accuracy, "top3": sumus.metrics.top_k_accuracy(3)},
        prepare=Tokenizer([texts[author] for author in PUBLIC_AUTHORS]),
        name="next-word",
    )
    algorithm = sumus.fedavg(
        client=sumus.sgd(lr=1.0, steps=20, batch_size=16, clip_norm=1.0),
        update=sumus.clip_by_global_norm(5.0),
        server=sumus.optimizers.adam(lr=0.01, bias_correction=True, tau=1e-4),
        weight="uniform",
    )
    return sumus.Experiment(
        plan=sumus.Plan(task, algorithm, sumus.Pacing(cohort=10)),
        population=authors.without(AUTHORS_NEVER_SEEN),
        rounds=60,
        evaluate=sumus.Evaluation(unseen=authors.subset(AUTHORS_NEVER_SEEN), every=10),
    )
