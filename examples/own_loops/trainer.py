"""Hugging Face's `Trainer` on a small BERT, and the lines that make a federation of it.

It needs `pip install transformers accelerate`. The model is made here, and nothing is downloaded.
"""

import tempfile

import numpy as np
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

WIDTHS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}


def net():
    return BertForSequenceClassification(BertConfig(vocab_size=20, max_position_embeddings=8, num_labels=2, **WIDTHS))


def person(number):
    words = np.random.default_rng(number).integers(1, 20, size=(40, 8))
    return words, (words[:, 0] > 9).astype("int64")


def fit(model, rows, seed):
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            num_train_epochs=2,
            per_device_train_batch_size=8,
            learning_rate=5e-3,
            seed=seed,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        return Trainer(model, arguments, train_dataset=rows).train().training_loss


# ── sumus ──
import sumus  # noqa: E402


def train(state, examples, about):
    model = net()
    model.load_state_dict(state)
    rows = [{"input_ids": words, "labels": label} for words, label in zip(*examples, strict=True)]
    loss = fit(model, rows, about.seed)
    return model.state_dict(), len(rows), {"loss": loss}


task = sumus.Task(net, lambda out, labels: sumus.losses.cross_entropy(out.logits, labels), name="trainer")
plan = sumus.Plan(task, sumus.fedavg(sumus.client(train)), sumus.Pacing(cohort=3))
experiment = sumus.Experiment(plan, sumus.Population(range(6), load=person), rounds=2)
