"""Inputs of every type arrive as they are: no integer becomes a float that does not tell it from its neighbour."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness.errors import InputError
from tests.cases.given import Given, answered, deployed, labelled

IDS = torch.randint(0, 50, (40, 5), generator=torch.Generator().manual_seed(1))
CLASSES = torch.arange(40) % 4


class Table(nn.Module):
    def __init__(self, bag: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.EmbeddingBag(997, 8) if bag else nn.Embedding(997, 8)
        self.head = nn.Linear(8, 4)


class Bag(Table):
    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.table(x))


class Offsets(Table):
    def forward(self, x: torch.Tensor) -> Any:
        offsets = torch.arange(x.shape[0]) * x.shape[1]
        return self.head(self.table(x.reshape(-1), offsets))


class Hashed(Table):
    def forward(self, x: torch.Tensor) -> Any:
        return self.head(self.table(torch.remainder(x, 997)).mean(1))


class Masked(Table):
    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> Any:
        found = torch.where(mask[..., None], self.table(x), torch.zeros(()))
        return self.head(found.sum(1) / mask.sum(1, keepdim=True).clamp(min=1))


class Image(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(torch.relu(self.conv(x.float() / 255)).mean((2, 3)))


class Times(nn.Module):
    """Seconds since 1970, which float32 rounds to two minutes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(3, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head((x - 1.7e9).float())


class Casting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.head(x.to(self.head.weight.dtype))


class Both(Table):
    def forward(self, ids: torch.Tensor, image: torch.Tensor) -> Any:
        return self.head(self.table(ids).mean(1)) + nn.functional.linear(image.flatten(1), self.head.weight[:, :3])


def far(n: int = 40) -> torch.Tensor:
    return torch.randint(-(2**40), 2**40, (n, 3), generator=torch.Generator().manual_seed(2))


KEPT: dict[str, Any] = {
    "bags": (lambda: answered(Bag(bag=True), IDS), "int64"),
    "bags by offsets": (lambda: answered(Offsets(bag=True), IDS), "int64"),
    "int32": (lambda: answered(Hashed(), IDS.int()), "int32"),
    "beyond 2**24": (lambda: answered(Hashed(), far()), "int64"),
    "masks": (lambda: answered(Masked(), IDS, IDS % 3 > 0), "int64 bool"),
    "uint8 images": (lambda: answered(Image(), torch.randint(0, 256, (40, 3, 8, 8), dtype=torch.uint8)), "uint8"),
    "doubles that matter": (lambda: answered(Times(), 1.7e9 + 3 * torch.randn(40, 3).double()), "float64"),
    "doubles that do not": (lambda: answered(Casting(), torch.randn(40, 6).double()), "float32"),
    "halves": (lambda: answered(Casting(), torch.randn(40, 6).half()), "float32"),
}


@pytest.mark.parametrize("kind", KEPT)
def test_inputs_reach_the_runtime_as_the_model_needs_them(kind: str, tmp_path: Path) -> None:
    make, dtypes = KEPT[kind]
    task = make()
    assert " ".join(port.dtype for port in task.signature.inputs) == dtypes
    assert deployed(task, tmp_path)[0] < 1e-5


@pytest.mark.parametrize("dtype", ["uint8", "int64", "bool", "uint16"])
def test_what_a_model_takes_as_floats_only_becomes_floats_and_that_is_said(dtype: str, tmp_path: Path) -> None:
    x = torch.randint(0, 2, (40, 6)).to(getattr(torch, dtype))
    task = labelled(nn.Linear(6, 4), x, CLASSES)
    assert task.signature.inputs[0].dtype == "float32"
    assert "Inputs 'input' are integers and become float32" in task.said()
    assert deployed(task, tmp_path)[0] < 1e-5


def test_only_the_input_that_has_to_becomes_floats() -> None:
    image = torch.randint(0, 256, (40, 3), dtype=torch.uint8)
    task = Given((Both(), {"test": [(IDS, image, CLASSES)]}))
    assert [port.dtype for port in task.signature.inputs] == ["int64", "float32"]
    assert "Inputs 'image' are integers" in task.said()


def test_integers_that_floats_do_not_tell_apart_are_refused_with_the_type() -> None:
    with pytest.raises(InputError, match=r"called with input \(6,\) int64 the model raised"):
        _ = labelled(nn.Linear(6, 4), torch.randint(0, 2**30, (40, 6)), CLASSES).signature


class Idiom(Image):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.register_buffer("ones", torch.ones(8, dtype=torch.bfloat16))
        self.register_buffer("ramp", torch.linspace(0.5, 1, 8), persistent=False)

    def forward(self, x: torch.Tensor) -> Any:
        x = x.to(next(self.parameters()).dtype)
        h = torch.relu(self.conv(x)).mean((2, 3)) * self.ones * self.ramp
        if self.kind == "cosine":
            return 10 * nn.functional.linear(nn.functional.normalize(h), nn.functional.normalize(self.head.weight))
        if self.kind == "norm of the convolution":
            h = h / self.conv.weight.norm()
        return self.head(h) + 0.01 * self.conv.weight.abs().sum()


@pytest.mark.parametrize("kind", ["cosine", "norm of the convolution", "sum"])
def test_a_quantized_layer_s_weight_is_what_a_forward_pass_reads(kind: str, tmp_path: Path) -> None:
    from tests.cases.given import compressed

    task = answered(Idiom(kind), torch.randn(40, 3, 8, 8))
    assert "float32 (and bfloat16); it is converted to float32" in task.said()
    quantized, _ = compressed(task, "ptq-int8")
    original, x = task.model(0), next(iter(task.test().batches(40))).inputs["x"]
    with torch.no_grad():
        assert (quantized(x) - original(x)).abs().max() < 0.05 * original(x).abs().max()
    difference, effective = deployed(task, tmp_path, quantized)
    assert difference < 1e-2 * float(original(x).detach().abs().max())
    assert effective["precision"] == "int8"


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float64"])
def test_models_in_other_floats_are_converted_and_that_is_said(kind: str, tmp_path: Path) -> None:
    x = torch.randn(40, 6)
    task = labelled(Casting().to(getattr(torch, kind)), x.to(getattr(torch, kind)), CLASSES)
    assert f"The model came in {kind}; it is converted to float32." in task.said()
    assert task.signature.outputs[0].dtype == "float32"
    assert deployed(task, tmp_path)[0] < 1e-5
