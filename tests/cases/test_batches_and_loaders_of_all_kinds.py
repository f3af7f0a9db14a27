"""Loaders as people have them, lone examples, and models that are random in evaluation."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from harness.contracts import Recipe
from harness.errors import InputError, Unsupported
from harness.prepare import _check_single
from harness.reference import _probe
from harness.training import SGDTrainer
from tests.cases.given import PARTS, Given, drawn, labelled

X, Y = torch.randn(33, 6, generator=torch.Generator().manual_seed(3)), torch.arange(33) % 4


class Noisy(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.kind, self.body, self.drop, self.head = kind, nn.Linear(6, 32), nn.Dropout(0.5), nn.Linear(32, 4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> Any:
        h = self.body(x)
        q = h[:, None]
        forms = {
            "none": lambda: h,
            "dropout": lambda: F.dropout(h, 0.1),
            "alpha": lambda: F.alpha_dropout(h, 0.3, training=True),
            "rrelu": lambda: F.rrelu(h, training=True),
            "bernoulli": lambda: h * torch.bernoulli(torch.full_like(h, 0.7)),
            "gumbel": lambda: F.gumbel_softmax(h, hard=True),
            "attention": lambda: F.scaled_dot_product_attention(q, q, q, dropout_p=0.3)[:, 0],
            "permutation": lambda: h[:, torch.randperm(32)],
            "normal": lambda: torch.normal(h, 1e-3),
            "numpy": lambda: h + torch.from_numpy(np.random.randn(32)).float(),
            "training inside": lambda: self.drop.train()(h),
            "skipped layers": lambda: h * (torch.rand(len(h), 1) > 0.1),
            "counting": lambda: h + self.calls.add_(1),
        }
        return self.head(forms[self.kind]())


NOISE = ["dropout", "alpha", "rrelu", "bernoulli", "gumbel", "attention", "permutation", "normal", "numpy"]


@pytest.mark.parametrize("kind", [*NOISE, "training inside", "skipped layers", "counting", "none"])
def test_a_model_that_is_random_in_evaluation_is_found_out(kind: str) -> None:
    task = labelled(Noisy(kind), X, Y)
    found = _probe(task.model(0), {"x": X}, task.signature)
    assert found["random"] is (kind != "none")
    assert not found["mixing"]


def normed(n: int, width: int = 8) -> Given:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, 4))
    recipe = Recipe(epochs=2, batch_size=32, lr=0.05)
    return Given({"model": model, "data": {"train": [(X[:n], Y[:n])], "test": [(X, Y)]}, "recipe": recipe})


@pytest.mark.parametrize(("n", "notes"), [(33, 1), (32, 0), (31, 0)])
def test_a_last_batch_of_one_example_joins_the_one_before_it(n: int, notes: int) -> None:
    task, said = normed(n), []
    recipe = task.recipe()
    assert recipe is not None
    trainer = SGDTrainer(
        data=task.data(), signature=task.signature, loss=task.loss, metrics=task.metrics, seed=0, say=said.append
    )
    found = trainer(task.model(0), recipe)
    assert np.isfinite(found["train_loss"])
    assert len(said) == notes
    assert all("it joins the batch before it" in sentence for sentence in said)


class Squeezing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(torch.relu(self.conv(x)).mean((2, 3), keepdim=True).squeeze())


def lone_norm() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Flatten(2), nn.AdaptiveAvgPool1d(1), nn.Flatten(),
        nn.BatchNorm1d(8, track_running_stats=False), nn.Linear(8, 4),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Squeezing, "At batch size 1 .* use a batch_size that"),
        (lone_norm, r"At batch size 1 .*\(4: BatchNorm.*Set batch_size = 2"),
    ],
)
def test_a_lone_example_that_a_model_cannot_take_is_refused_with_the_batch_size(model: Any, message: str) -> None:
    torch.manual_seed(0)
    made = model()
    task = drawn(made, 3, 8, 8)
    assert task.signature.batch is None
    with pytest.raises(Unsupported, match=message):
        _check_single(task.model(0), {task.signature.inputs[0].name: torch.randn(1, 3, 8, 8)}, task.signature)


class Records(Dataset[Any]):
    """Examples as mappings, as Hugging Face's collators give them."""

    def __len__(self) -> int:
        return len(Y)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input": X[index], "labels": int(Y[index]), "idx": index}


class Stream(IterableDataset[Any]):
    """As many as there are, which nobody knows before."""

    def __iter__(self) -> Iterator[Any]:
        yield from zip(X, Y, strict=True)


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return itertools.cycle(zip(X, Y, strict=True))


class Reloaded:
    """An object with only ``__iter__``, whose order is drawn anew in each pass."""

    def __iter__(self) -> Iterator[Any]:
        order = torch.randperm(len(Y))
        return ((X[part], Y[part]) for part in order.split(8))


def collated(examples: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "input": torch.stack([example["input"] for example in examples]),
        "labels": torch.tensor([example["labels"] for example in examples]),
    }


PAIRS = TensorDataset(X, Y)
LOADERS: dict[str, Any] = {
    "mappings": (lambda: DataLoader(Records(), 8), 33),
    "own collate": (lambda: DataLoader(Records(), 8, collate_fn=collated), 33),
    "no length": (lambda: DataLoader(Stream(), 8), 33),
    "last one dropped": (lambda: DataLoader(PAIRS, 8, drop_last=True), 32),
    "workers": (lambda: DataLoader(PAIRS, 8, num_workers=1), 33),
    "shuffled": (lambda: DataLoader(PAIRS, 8, shuffle=True), 33),
    "anew": (Reloaded, 33),
    "data set": (lambda: PAIRS, 33),
    "arrays": (lambda: (X.numpy(), Y.numpy()), 33),
    "generator": (lambda: ((X[i : i + 8], Y[i : i + 8]) for i in range(0, 33, 8)), 33),
    "read-only memory": (lambda: [(np.broadcast_to(X[0].numpy(), (33, 6)), Y.numpy())], 33),
    "big-endian": (lambda: [(X.numpy().astype(">f4"), Y.numpy().astype(">i8"))], 33),
    "negative strides": (lambda: [(X.numpy()[::-1], Y.numpy()[::-1])], 33),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_loaders_of_every_form_are_read_in_one_order(kind: str) -> None:
    make, size = LOADERS[kind]
    task = Given((nn.Linear(6, 4), {"test": make()}))
    test = task.test()
    assert test.size == size
    assert task.metrics[0].name == "accuracy"
    passes = [torch.cat([batch.inputs["input"] for batch in test.batches(5)]) for _ in range(2)]
    assert passes[0].shape == (size, 6)
    assert torch.equal(*passes)


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (lambda: DataLoader(Endless(), 8), "has no length and did not end after .*islice"),
        (lambda: itertools.cycle([(X, Y)]), "did not end"),
        (list, "the loader 'test' has no examples"),
        (lambda: [(X, Y), (X[:, :5], Y)], "must have one shape"),
        (lambda: [(torch.complex(X, X), Y)], "is complex"),
        (lambda: [(X.to_sparse(), Y)], "dense tensor"),
        (lambda: [(X, Y[:5])], "first axis of every input and target"),
        (lambda: [(X, None)], "target 'label' is no array of numbers"),
        (lambda: [(np.array(["a"] * 33), Y)], "no array of numbers"),
        (lambda: 5, "cannot be iterated over"),
        (lambda: DataLoader(PAIRS, 8, collate_fn=lambda examples: examples[0][0][0]), "first axis of every input"),
    ],
)
def test_other_loaders_are_refused_by_name(loader: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASSAY_LOADER_EXAMPLES", "2000")
    with pytest.raises(InputError, match=message):
        _ = Given((nn.Linear(6, 4), {"test": loader()})).test().size


def test_parts_that_nobody_gave_are_not_there(tmp_path: Path) -> None:
    task = Given((nn.Linear(6, 4), {part: [(X, Y)] for part in PARTS if part != "test"}))
    assert set(task.data()) == {"train", "validation"}
    assert task.dataset_hash() is None
