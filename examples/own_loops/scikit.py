"""scikit-learn's `partial_fit` on handwritten digits, and the lines that make a federation of it.

The model that travels is a linear layer: its weight and bias are the classifier's `coef_` and `intercept_`.
"""

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import SGDClassifier
from torch import nn

PIXELS, LABELS = load_digits(return_X_y=True)


def net():
    return nn.Linear(64, 10)


def person(number):
    return PIXELS[number::20].astype("float32") / 16, LABELS[number::20]


def fit(coef, intercept, pixels, labels):
    classifier = SGDClassifier(loss="log_loss", learning_rate="constant", eta0=0.05)
    classifier.coef_, classifier.intercept_ = coef, intercept
    for _ in range(3):
        classifier.partial_fit(pixels, labels, classes=np.arange(10))
    return classifier


# ── sumus ──
import sumus  # noqa: E402


def train(state, examples):
    start = [state[name].numpy() for name in ("weight", "bias")]
    classifier = fit(*start, *(part.numpy() for part in examples))
    return {"weight": classifier.coef_, "bias": classifier.intercept_}, len(examples[1]), {}


task = sumus.Task(net, sumus.losses.cross_entropy, {"accuracy": sumus.metrics.accuracy}, name="scikit")
plan = sumus.Plan(task, sumus.fedavg(sumus.client(train)), sumus.Pacing(cohort=5))
unseen = sumus.Evaluation(unseen=sumus.Population([19], load=person))
experiment = sumus.Experiment(plan, sumus.Population(range(19), load=person), rounds=15, evaluate=unseen)
