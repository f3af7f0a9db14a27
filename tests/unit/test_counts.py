"""Multiply-accumulates and parameters, against counts by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.contracts import Port, Signature
from harness.measure import counts


def macs(model: nn.Module, x: Tensor) -> int:
    said = Signature(inputs=(Port(name="x", shape=tuple(x.shape[1:])),), outputs=(Port(name="y", shape=()),))
    return counts.macs(model, {"x": x}, said)


def test_a_convolution_and_a_linear_layer_by_hand() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 25, 10)).train()
    assert macs(model, torch.zeros(2, 3, 5, 5)) == 8 * 3 * 9 * 25 + 8 * 25 * 10
    assert model.training
    with torch.no_grad():
        model[0].weight[0] = 0  # type: ignore[operator]
    assert counts.parameters(model) == (8 * 27 + 8 + 2000 + 10, 8 * 27 + 8 + 2000 + 10 - 27)


def test_attention_counts_all_its_products_in_eval_mode() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(16, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            mixed: Tensor = self.attention(x, x, x, need_weights=False)[0]
            return mixed

    tokens, width = 7, 16
    before = torch.backends.mha.get_fastpath_enabled()
    projections, products = 4 * tokens * width * width, 2 * tokens * tokens * width
    assert macs(Block(), torch.zeros(2, tokens, width)) == projections + products
    assert torch.backends.mha.get_fastpath_enabled() == before


@pytest.mark.parametrize(("kind", "gates"), [(nn.RNN, 1), (nn.GRU, 3), (nn.LSTM, 4)])
@pytest.mark.parametrize("directions", [1, 2])
def test_recurrent_layers_by_hand(kind: type[nn.RNNBase], gates: int, directions: int) -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = kind(8, 32, num_layers=2, batch_first=True, bidirectional=directions == 2)  # type: ignore[arg-type, call-arg]
            self.head = nn.Linear(32 * directions, 5)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.layers(x)[0][:, -1])
            return y

    each = 12 * gates * 32 * directions * ((8 + 32) + (32 * directions + 32))
    assert macs(Last(), torch.zeros(3, 12, 8)) == each + 32 * directions * 5
    if kind is nn.LSTM and directions == 1:
        assert each + 160 == 159_904


class Queries(nn.Module):
    """Products that are easily missed: an expanded parameter into a module, bilinear, transposed, by einsum."""

    def __init__(self, part: str) -> None:
        super().__init__()
        self.part = part
        self.query = nn.Parameter(torch.randn(1, 4, 6))
        self.linear, self.bilinear = nn.Linear(6, 5), nn.Bilinear(6, 6, 3)
        self.transposed = nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2)

    def forward(self, x: Tensor) -> Tensor:  # (n, 4, 6)
        result: Tensor
        if self.part == "expanded":
            result = self.linear(self.query.expand(len(x), -1, -1)) + x.sum()
        elif self.part == "bilinear":
            result = self.bilinear(x[:, 0], x[:, 1])
        elif self.part == "transposed":
            result = self.transposed(x)
        elif self.part == "attention":
            result = F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None, :, :3])
        else:
            result = torch.einsum("nij,nkj->nik", x, x)
        return result


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("expanded", 4 * 6 * 5),
        ("bilinear", 3 * 6 * 6),
        ("transposed", 6 * 4 * 3 * 3),  # every input times (6 / 2 groups) outputs times the kernel
        ("attention", 4 * 4 * (6 + 3)),
        ("einsum", 4 * 4 * 6),
    ],
)
def test_products_that_are_easily_missed(part: str, expected: int) -> None:
    assert macs(Queries(part), torch.randn(2, 4, 6)) == expected


def test_several_inputs_of_several_types_are_given_by_name() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.linear = nn.Embedding(10, 8), nn.Linear(8, 3)

        def forward(self, mask: Tensor, ids: Tensor) -> dict[str, Tensor]:
            return {"y": self.linear(self.embedding(ids)) * mask[..., None]}

    ports = (Port(name="ids", shape=("n",), dtype="int64"), Port(name="mask", shape=("n",), dtype="bool"))
    said = Signature(inputs=ports, outputs=(Port(name="y", shape=("n", 3)),))
    inputs = {"ids": torch.zeros(2, 7, dtype=torch.long), "mask": torch.ones(2, 7, dtype=torch.bool)}
    assert counts.macs(Tokens(), inputs, said) == 7 * 8 * 3


def test_a_model_that_is_a_file_is_counted_from_its_graph(tmp_path):
    from hardware.onnxruntime_cpu import OnnxRuntime
    from harness.contracts import Port
    from harness.measure import counts
    from harness.tasks import sources

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(1), nn.Linear(8 * 36, 5))
    with torch.no_grad():
        model[3].weight[:, :100] = 0
    signature = Signature(inputs=(Port(name="x", shape=(3, 8, 8)),), outputs=(Port(name="output", shape=(5,)),))
    example = {"x": torch.randn(2, 3, 8, 8)}
    path = OnnxRuntime().build(model.eval(), signature, example, tmp_path)
    file = sources.find(str(path)).make(0).model
    assert counts.file_of(file) is not None
    assert counts.parameters(file) == counts.parameters(model)
    assert counts.macs(file, example, signature) == counts.macs(model, example, signature) > 0
    assert counts.file_of(model) is None
