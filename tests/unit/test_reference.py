"""What deployed outputs are compared with: real examples, the torch model's outputs, and those before quantization."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from harness import arrays, paths
from harness import reference as references
from harness.chain import Stored, Work
from harness.contracts import Batch, Port, Signature, Workload
from harness.errors import InputError, NotFinite
from harness.reference import examples, made_up, outputs_of, reference, source_of

SIGNATURE = Signature(inputs=(Port(name="x", shape=(3,)),), outputs=(Port(name="output", shape=(3,)),))


@dataclass(frozen=True)
class Rows:
    """Examples that count up, so that each is known by its value."""

    size: int
    claimed: int | None = None
    identity: str = "rows"
    width: int = 3

    def batches(self, size: int, *, seed: int | None = None, augment: bool = False) -> Any:
        x = torch.arange(self.size, dtype=torch.float32)[:, None].expand(-1, self.width)
        for part in torch.arange(self.size).split(size):
            yield Batch(inputs={"x": x[part]}, targets={"y": part})


@dataclass(frozen=True)
class Cell:
    measure: dict[str, Any] = field(default_factory=lambda: {"fidelity_examples": 50})
    task: dict[str, Any] = field(default_factory=lambda: {"name": "rows"})


@dataclass(frozen=True)
class Task:
    held_out: Any = None
    signature: Signature = SIGNATURE
    workload: Workload = field(default_factory=Workload)

    def test(self) -> Any:
        return self.held_out


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path))
    assert paths.home() == tmp_path


def work(data: Any = None, **task: Any) -> Any:
    return Work(
        cell=Cell(), task=Task(**task), hardware=None, data=data or {}, not_before=0, progress=lambda f, m: None
    )  # type: ignore[arg-type]


def stored(name: str) -> Stored:
    return Stored(name, Path(name), name)


def test_examples_come_from_validation_then_training_and_never_from_the_test_set() -> None:
    both = {"train": Rows(9), "validation": Rows(5)}
    assert source_of(both) == "validation"
    assert examples(SIGNATURE, Workload(), both, 4)["x"][:, 0].tolist() == [0, 1, 2, 3]
    assert source_of({"train": Rows(9)}) == "train"
    assert len(examples(SIGNATURE, Workload(), {"train": Rows(9)}, 50)["x"]) == 9
    assert source_of({}) == "random"


def test_made_up_inputs_obey_their_ports() -> None:
    signature = Signature(
        inputs=(
            Port(name="ids", shape=("tokens",), dtype="int64", values=7),
            Port(name="attention_mask", shape=("tokens",), dtype="int64"),
            Port(name="kind", shape=(2,), dtype="int32"),
            Port(name="x", shape=(3, "width")),
        ),
        outputs=SIGNATURE.outputs,
    )
    made = made_up(signature, Workload(sizes={"tokens": 20}), 5)
    assert made["ids"].shape == (5, 20)
    assert made["ids"].dtype == torch.int64
    assert 0 <= int(made["ids"].min()) <= int(made["ids"].max()) < 7
    assert torch.equal(made["attention_mask"], torch.ones(5, 20, dtype=torch.int64))
    assert torch.equal(made["kind"], torch.zeros(5, 2, dtype=torch.int32))
    assert made["x"].shape[:2] == (5, 3)
    assert torch.equal(made["x"], made_up(signature, Workload(sizes={"tokens": 20}), 5)["x"])


def test_both_references_are_kept_in_the_order_of_the_examples() -> None:
    folder, meta = reference(work({"validation": Rows(40)}), nn.Identity(), stored("a"), (nn.Linear(3, 3), stored("b")))
    (block,) = arrays.read(folder)
    assert meta["random"] is False
    assert meta["output_bytes"] == 12
    assert block.inputs["x"][:, 0].tolist() == list(range(40))
    assert np.array_equal(block.targets["torch/output"], block.inputs["x"])
    assert block.targets["float/output"].shape == (40, 3)


class Random(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Any) -> Any:
        if self.kind == "dropout":
            return nn.functional.dropout(x + 1, 0.5)
        if self.kind == "noise":
            return x + 0.1 * torch.randn_like(x)
        if self.kind == "counter":
            self.calls += 1
            return x + self.calls
        return nn.functional.dropout(x, 0.5, self.training)


@pytest.mark.parametrize(
    ("kind", "expected"), [("dropout", True), ("noise", True), ("counter", True), ("right", False)]
)
def test_a_model_that_is_random_in_evaluation_is_found(kind: str, expected: bool) -> None:
    before = torch.random.get_rng_state()
    _, meta = reference(work({"validation": Rows(8)}), Random(kind).train(), stored(kind), None)
    assert meta["random"] is expected
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_lone_last_example_is_never_passed_alone() -> None:
    sizes = []

    class Sizes(nn.Module):
        def forward(self, x: Any) -> Any:
            sizes.append(len(x))
            return x

    found = outputs_of(Sizes(), {"x": torch.ones(1, 3)}, SIGNATURE, 32)
    assert sizes == [32]
    assert found["output"].shape == (1, 3)


def test_outputs_that_are_not_finite_stop_everything() -> None:
    class Nan(nn.Module):
        def forward(self, x: Any) -> Any:
            return x / 0 * 0

    with pytest.raises(NotFinite, match="'output' holds NaN or infinity"):
        outputs_of(Nan(), {"x": torch.ones(2, 3)}, SIGNATURE, 2)


def test_the_test_set_is_stored_once_with_its_identity() -> None:
    folder, identity = references.test_set(work(held_out=Rows(300)))
    (block,) = arrays.read(folder)
    assert identity == "rows"
    assert block.targets["y"].tolist() == list(range(300))
    assert references.test_set(work(held_out=Rows(300)))[0] == folder


def test_a_split_that_breaks_its_word_is_refused() -> None:
    class Short(Rows):
        def batches(self, size: int, **more: Any) -> Any:
            return Rows(3).batches(size)

    with pytest.raises(InputError, match="3 examples; it said 5"):
        references.test_set(work(held_out=Short(5, identity="short")))
