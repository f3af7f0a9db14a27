"""The shared ONNX export: one function, the same bytes, integers stored as integers, clear refusals."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

from onnx.reference import ReferenceEvaluator  # noqa: E402  (after the check that onnx is there)

from hardware import export  # noqa: E402
from hardware.export import OPSET  # noqa: E402
from harness.contracts import Port, Scheme, Signature  # noqa: E402
from harness.errors import ExportError  # noqa: E402
from harness.quantized import ActivationQuantizer, QuantizedConv2d, QuantizedLinear  # noqa: E402


def of(*shape: int | str, outputs: int = 1, batch: int | None = None) -> Signature:
    """A signature of one float input and some outputs; an output's own shape is not looked at."""
    names = ("output", *(f"output{place}" for place in range(1, outputs)))
    return Signature(
        inputs=(Port(name="input", shape=shape),),
        outputs=tuple(Port(name=name, shape=()) for name in names),
        batch=batch,
    )


def to_onnx(model: nn.Module, x: Tensor, path: Path) -> Path:
    return export.to_onnx(model, of(*x.shape[1:]), {"input": x}, path)


class Quantized(nn.Module):
    """Two quantizers with the same grid, a convolution, a Linear on three axes and one on two."""

    def __init__(self, scheme: Scheme) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before = ActivationQuantizer.of_range(-1.0, 3.0, scheme)
        self.between = ActivationQuantizer.of_range(-1.0, 3.0, scheme)
        self.after = ActivationQuantizer.of_range(-1.0, 3.0, scheme)
        self.conv = QuantizedConv2d(nn.Conv2d(2, 4, 3), self.before.scale, scheme)
        self.inner = QuantizedLinear(nn.Linear(4, 4), self.between.scale, scheme)
        self.last = QuantizedLinear(nn.Linear(4, 3), self.after.scale, scheme)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.between(self.conv(self.before(x))).flatten(2).transpose(1, 2)
        y: Tensor = self.last(self.after(self.inner(tokens).mean(1)))
        return y


SYMMETRIC = Scheme(activation="s8", activation_symmetric=True, quantized_bias=False)


@pytest.mark.parametrize("scheme", [Scheme(), SYMMETRIC], ids=["u8", "s8"])
def test_the_file_holds_integers_and_computes_the_quantized_function(scheme: Scheme, tmp_path: Path) -> None:
    model = Quantized(scheme).eval()
    proto = onnx.load(to_onnx(model, torch.zeros(2, 2, 6, 6), tmp_path / "m.onnx"))
    assert proto.opset_import[0].version == OPSET
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    producers = {name: node for node in proto.graph.node for name in node.output}
    weights = [producers[node.input[1]] for node in proto.graph.node if node.op_type in ("Conv", "Gemm", "MatMul")]
    assert [node.op_type for node in weights] == ["DequantizeLinear"] * 3
    for node in weights:
        assert stored[node.input[0]].data_type == onnx.TensorProto.INT8
        assert not onnx.numpy_helper.to_array(stored[node.input[2]]).any()
    biases = [t for t in stored.values() if t.data_type == onnx.TensorProto.INT32]
    assert len(biases) == (3 if scheme.quantized_bias else 0)
    # No grid belongs to two quantizers, although these are equal.
    quantizers = [node for node in proto.graph.node if node.op_type == "QuantizeLinear"]
    assert len(quantizers) == 3
    assert len({name for node in quantizers for name in node.input[1:]}) == 6
    x = np.random.default_rng(0).normal(size=(5, 2, 6, 6)).astype(np.float32)
    (got,) = ReferenceEvaluator(proto).run(None, {"input": x})
    assert got == pytest.approx(model(torch.from_numpy(x)).detach().numpy(), abs=1e-5)


def test_bytes_depend_on_the_model_alone(tmp_path: Path) -> None:
    code = """
import sys, torch
from pathlib import Path
from typing import Any
from harness.contracts import Port, Signature
from harness.tasks.models import create
from hardware.export import to_onnx
signature = Signature(inputs=(Port(name="input", shape=(1, 8, 8)),), outputs=(Port(name="output", shape=(10,)),))
to_onnx(create("digits-cnn", 0), signature, {"input": torch.zeros(2, 1, 8, 8)}, Path(sys.argv[1]))
"""
    root = Path(__file__).parents[2]
    script = tmp_path / "elsewhere.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(root)!r})\n" + "\n" * 7 + code)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "a.onnx")],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout + done.stderr == ""  # the exporter's console noise
    from harness.tasks.models import create

    model = create("digits-cnn", 0)
    for _ in range(2):
        to_onnx(model, torch.ones(3, 1, 8, 8), tmp_path / "b.onnx")
        content = (tmp_path / "b.onnx").read_bytes()
        assert content == (tmp_path / "a.onnx").read_bytes()
    assert str(tmp_path).encode() not in content
    assert b"harness" not in content


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout(), nn.BatchNorm1d(3).eval()).train(True)
    model[2].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    to_onnx(model, torch.randn(2, 3), tmp_path / "m.onnx")
    assert [module.training for module in model] == [True, True, False]
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert torch.backends.mha.get_fastpath_enabled()


def test_attention_is_written_as_its_parts(tmp_path: Path) -> None:
    model = nn.TransformerEncoderLayer(16, 2, dim_feedforward=8, batch_first=True).eval()
    proto = onnx.load(to_onnx(model, torch.zeros(2, 5, 16), tmp_path / "m.onnx"))
    x = torch.randn(3, 5, 16)
    (got,) = ReferenceEvaluator(proto).run(None, {"input": x.numpy()})
    with torch.no_grad():
        assert got == pytest.approx(model(x).numpy(), abs=1e-4)


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Eigenvalues(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        real: Tensor = torch.linalg.eigvals(x).real
        return real


class Raising(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ArithmeticError("no such thing\nsecond line")


class OneBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, 16)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (Branching, r"Branching cannot be exported: .*data-dependent.*\(at test_export\.py:\d+: return x if x\.sum"),
        (Eigenvalues, r"Eigenvalues cannot be written as ONNX: .*aten\.linalg_eig"),
        (Raising, r"ArithmeticError: no such thing \(at test_export\.py:\d+"),
        (OneBatch, r"OneBatch cannot be exported: .*Constraints violated \(batch\)!.*code specialized it"),
    ],
)
def test_refusals_name_the_cause(
    make: Callable[[], nn.Module], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ExportError, match=said) as raised:
        to_onnx(make(), torch.randn(2, 4, 4), tmp_path / "m.onnx")
    assert "\n" not in str(raised.value)
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "m.onnx").exists()


class Tokens(nn.Module):
    """Token ids and a mask to named outputs, one of which is in bfloat16; limited to 32 positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.positions = nn.Parameter(torch.randn(32, 8))
        self.norm = nn.LayerNorm(8)

    def forward(self, mask: Tensor, ids: Tensor) -> dict[str, Tensor]:
        hidden = self.norm(self.embedding(ids) + self.positions[: ids.shape[1]]) * mask.unsqueeze(-1)
        return {"hidden": hidden, "pooled": hidden.sum(1).bfloat16(), "left out": ids}


TOKENS = Signature(
    inputs=(
        Port(name="ids", shape=("a-token",), dtype="int64", values=50),
        Port(name="mask", shape=("a-token",), dtype="bool"),
    ),
    outputs=(Port(name="pooled", shape=(8,)), Port(name="hidden", shape=("a-token", 8))),
)


def tokens(n: int, length: int) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(length)
    ids = torch.randint(0, 50, (n, length), generator=draw)
    return {"ids": ids, "mask": torch.rand(n, length, generator=draw) > 0.3}


def test_inputs_and_outputs_keep_names_order_and_types_and_named_axes_vary(tmp_path: Path) -> None:
    model = Tokens().eval()
    # A single example of a single token does not make these sizes constants.
    proto = onnx.load(export.to_onnx(model, TOKENS, tokens(1, 1), tmp_path / "m.onnx"))
    described = {
        value.name: (
            value.type.tensor_type.elem_type,
            [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim],
        )
        for value in (*proto.graph.input, *proto.graph.output)
    }
    kinds = onnx.TensorProto
    assert described == {
        "ids": (kinds.INT64, ["batch", "a_token"]),
        "mask": (kinds.BOOL, ["batch", "a_token"]),
        "pooled": (kinds.FLOAT, ["batch", 8]),
        "hidden": (kinds.FLOAT, ["batch", "a_token", 8]),
    }
    inputs = tokens(3, 7)
    feeds = {name: value.numpy() for name, value in inputs.items()}
    got: Any = ReferenceEvaluator(proto).run(["hidden"], feeds)
    with torch.no_grad():
        assert got[0] == pytest.approx(model(**inputs)["hidden"].numpy(), abs=1e-5)


def test_a_fixed_batch_size_is_written_and_the_example_is_brought_to_it(tmp_path: Path) -> None:
    signature = of(4, 4, batch=2)
    proto = onnx.load(export.to_onnx(OneBatch(), signature, {"input": torch.randn(1, 4, 4)}, tmp_path / "m.onnx"))
    assert [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim] == [2, 4, 4]


class Odd(nn.Module):
    """Names that ONNX or Python would trip over."""

    def __init__(self) -> None:
        super().__init__()
        self.input = nn.Parameter(torch.ones(3))
        self.parts = nn.ModuleDict({name: nn.Linear(3, 3) for name in ("1x1", "conv-a", "class", "q'uo\"te", "a\\b")})

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for part in self.parts.values():
            x = part(x + self.input)
        return x.relu(), x


@pytest.mark.parametrize(("given", "made"), [("relu", "linear"), ("same", "same"), ("input", "parts.1x1.weight")])
def test_names_that_clash_are_kept_apart(given: str, made: str, tmp_path: Path) -> None:
    signature = Signature(
        inputs=(Port(name=given, shape=(3,)),), outputs=(Port(name=made, shape=(3,)), Port(name="", shape=(3,)))
    )
    model, x = Odd().eval(), torch.randn(4, 3)
    proto = onnx.load(export.to_onnx(model, signature, {given: x}, tmp_path / "m.onnx"))
    (source,) = proto.graph.input
    got = ReferenceEvaluator(proto).run(None, {source.name: x.numpy()})
    with torch.no_grad():
        for array, expected in zip(got, model(x), strict=True):
            assert array == pytest.approx(expected.numpy(), abs=1e-5)


def test_numpy_in_the_forward_pass_is_traced(tmp_path: Path) -> None:
    class Through(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(torch.from_numpy(np.tanh(x.detach().numpy())))
            return y

    model, x = Through().eval(), torch.randn(4, 3)
    (got,) = ReferenceEvaluator(onnx.load(to_onnx(model, x, tmp_path / "m.onnx"))).run(None, {"input": x.numpy()})
    with torch.no_grad():
        assert got == pytest.approx(model(x).numpy(), abs=1e-5)
