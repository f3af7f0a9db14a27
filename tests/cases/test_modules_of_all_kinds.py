"""Models as users build them: kept whole through file, compression and runtime, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from harness.errors import DataError, InputError
from tests.cases.given import compressed, deployed, drawn


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> Any:
        return self.b(torch.relu(self.a(x)))


class OwnCall(Base):
    def __call__(self, x: torch.Tensor) -> Any:
        return 3 * super().__call__(x)


class Tied(Base):
    """An encoder whose weight is the decoder's, transposed."""

    def forward(self, x: torch.Tensor) -> Any:
        return self.b(self.a(F.linear(torch.relu(self.a(x)), self.a.weight.t())))


class Cached(Base):
    """Keeps a tensor that it makes when it first sees a shape."""

    ramp: Any = None

    def forward(self, x: torch.Tensor) -> Any:
        if self.ramp is None or self.ramp.shape != x.shape[1:]:
            self.ramp = torch.linspace(0, 1, x.shape[-1])
        return super().forward(x + self.ramp)


class Stepping(Base):
    """A number that training changes."""

    steps = 0

    def forward(self, x: torch.Tensor) -> Any:
        if self.training:
            self.steps += 1
        return super().forward(x)


class Odd(nn.Module):
    """Names that are no identifiers of Python, and one that is a keyword."""

    NAMES = ("1x1", "conv-a", "class", "it's", '"q"', "a b", "größe", "two\nlines")

    def __init__(self) -> None:
        super().__init__()
        for name in self.NAMES:
            self.add_module(name, nn.Linear(6, 6))
        self.head = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> Any:
        for name in self.NAMES:
            x = torch.relu(self._modules[name](x))  # type: ignore[misc]
        return self.head(x)


def pruned() -> nn.Module:
    model = Base()
    prune.l1_unstructured(model.a, "weight", 0.5)
    prune.random_unstructured(model.a, "weight", 0.2)
    prune.ln_structured(model.b, "weight", 0.25, n=2, dim=1)
    return model


def exported() -> nn.Module:
    dim = torch.export.Dim("n")
    return torch.export.export(Base(), (torch.randn(2, 6),), dynamic_shapes=({0: dim},)).module()


def shared() -> nn.Module:
    layer = nn.Linear(6, 6)
    return nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(6, 4))


def strided() -> nn.Module:
    model = Base()
    model.a.weight = nn.Parameter(torch.randn(6, 8).t())
    model.b.weight = nn.Parameter(torch.randn(4, 1).expand(4, 8))
    return model


def frozen() -> nn.Module:
    model = Base()
    with torch.inference_mode():
        model.a.weight = nn.Parameter(torch.randn(8, 6))
    return model


KEPT: dict[str, Any] = {
    "own call": OwnCall,
    "tied": Tied,
    "cached": Cached,
    "stepping": Stepping,
    "odd names": Odd,
    "pruned with torch": pruned,
    "exported": exported,
    "shared": shared,
    "strided": strided,
    "inference tensor": frozen,
    "compiled": lambda: torch.compile(Base(), backend="eager"),
    "data parallel": lambda: nn.DataParallel(Base()),
    "lazy": lambda: nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d(), nn.ReLU(), nn.LazyLinear(4)),
    "traced by fx": lambda: torch.fx.symbolic_trace(Base()),
}


@pytest.mark.parametrize("kind", KEPT)
def test_a_model_computes_the_same_as_a_file_and_on_a_runtime(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = KEPT[kind]()
    task = drawn(made, 6) if kind != "exported" else _unchanged(made)
    model, x = task.model(0), next(iter(task.test().batches(8))).inputs[task.signature.inputs[0].name]
    with torch.no_grad():
        assert torch.allclose(model(x), made(x), atol=1e-6)
    assert deployed(task, tmp_path)[0] < 1e-5


def _unchanged(made: nn.Module) -> Any:
    """An exported module refuses ``eval()``."""
    from tests.cases.given import labelled

    return labelled(made, torch.randn(40, 6), torch.arange(40) % 4)


@pytest.mark.parametrize("kind", ["odd names", "pruned with torch", "traced by fx", "data parallel", "own call"])
def test_a_quantized_model_computes_nearly_the_same(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = drawn(KEPT[kind](), 6)
    quantized, _ = compressed(task, "ptq-int8")
    x = next(iter(task.test().batches(8))).inputs[task.signature.inputs[0].name]
    original = task.model(0)
    with torch.no_grad():
        assert (quantized(x) - original(x)).abs().max() < 0.1 * original(x).abs().max()
    assert deployed(task, tmp_path, quantized)[1]["precision"] == "int8"


def test_a_graph_that_would_leave_out_a_call_of_its_own_is_not_made() -> None:
    assert "OwnCall has a __call__ of its own" in compressed(drawn(OwnCall(), 6), "ptq-int8")[1]


def hooked() -> nn.Module:
    model = Base()
    model.a.register_forward_hook(lambda module, inputs, output: 2 * output)
    return model


class Holding(Base):
    def __init__(self) -> None:
        super().__init__()
        self.inner = lambda x: 2 * x

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(self.inner(x))


def with_local_class() -> nn.Module:
    class Local(nn.Linear):
        pass

    return nn.Sequential(Local(6, 4))


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (hooked, r"a\._forward_hooks holds a hook"),
        (with_local_class, "needs the class .*Local"),
        (Holding, r"inner.*lambda"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_name(make: Any, name: str, tmp_path: Path) -> None:
    task = drawn(make(), 6)
    with pytest.raises(DataError, match=name):
        deployed(task, tmp_path)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated")
def test_torchscript_is_refused_by_name() -> None:
    with pytest.raises(InputError, match="TorchScript"):
        _ = _unchanged(torch.jit.trace(Base(), torch.randn(2, 6))).signature
