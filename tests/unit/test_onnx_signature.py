"""ONNX files as they come: what they take and give, what they weigh, and that they are deployed unchanged."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")

from onnx.reference import ReferenceEvaluator  # noqa: E402  (after the check that onnx is there)

from hardware import onnx_signature, stored  # noqa: E402
from hardware.export import to_onnx  # noqa: E402
from hardware.onnxruntime_cpu import OnnxRuntime  # noqa: E402
from hardware.openvino_cpu import OpenVino  # noqa: E402
from hardware.torch_cpu import Torch  # noqa: E402
from harness.contracts import Hardware, Port, Scheme, Signature  # noqa: E402
from harness.errors import DataError, Unsupported  # noqa: E402
from harness.measure import counts  # noqa: E402
from harness.quantized import ActivationQuantizer, QuantizedConv2d, QuantizedLinear  # noqa: E402

helper, kinds, to_tensor = onnx.helper, onnx.TensorProto, onnx.numpy_helper.from_array


def save(
    path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], tensors: dict[str, Any], **options: Any
) -> Path:
    stored_tensors = [to_tensor(np.asarray(value), name) for name, value in tensors.items()]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, stored_tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path, **options)
    return path


def value(name: str, kind: int, *axes: int | str | None) -> Any:
    return helper.make_tensor_value_info(name, kind, list(axes))


def tokens(path: Path, **options: Any) -> Path:
    """Ids and a mask in; the table, given as an input too, in a Constant as Paddle does; scores out."""
    draw = np.random.default_rng(0)
    weight = draw.normal(size=(4, 3)).astype(np.float32)
    weight[0] = 0
    table = draw.normal(size=(50, 4)).astype(np.float32)
    nodes = [
        helper.make_node("Constant", [], ["table"], value=to_tensor(table)),
        helper.make_node("Cast", ["ids"], ["ids64"], to=kinds.INT64),
        helper.make_node("Gather", ["table", "ids64"], ["rows"]),
        helper.make_node("MatMul", ["rows", "weight"], ["products"]),
        helper.make_node("Add", ["products", "bias"], ["sums"]),
        helper.make_node("Mul", ["sums", "half"], ["halves"]),
        helper.make_node("ReduceSum", ["halves", "axes"], ["scores"], keepdims=0),
        helper.make_node("Identity", ["attention_mask"], ["mask"]),
    ]
    return save(
        path,
        nodes,
        [
            value("ids", kinds.INT32, "N", "T"),
            value("weight", kinds.FLOAT, 4, 3),
            value("attention_mask", kinds.INT64, "N", "?"),
        ],
        [value("scores", kinds.FLOAT, "N", 3), value("mask", kinds.INT64, "N", None)],
        {
            "weight": weight,
            "bias": np.ones(3, np.float32),
            "half": np.full(1, 0.5, np.float32),
            "axes": np.ones(1, np.int64),
        },
        **options,
    )


def test_names_types_and_axes_are_read(tmp_path: Path) -> None:
    assert onnx_signature.read_signature(tokens(tmp_path / "m.onnx")) == Signature(
        inputs=(
            Port(name="ids", shape=("T",), dtype="int32", values=50),
            Port(name="attention_mask", shape=("attention_mask[1]",), dtype="int64", values=2),
        ),
        outputs=(Port(name="scores", shape=(3,)), Port(name="mask", shape=("mask[1]",), dtype="int64")),
    )


def test_parameters_and_products_are_counted_wherever_weights_lie(tmp_path: Path) -> None:
    path = tokens(tmp_path / "m.onnx")
    assert onnx_signature.parameters(path) == (50 * 4 + 4 * 3 + 3, 50 * 4 + 4 * 3 + 3 - 3)
    assert onnx_signature.macs(path, {"T": 7, "attention_mask[1]": 7}) == 7 * 4 * 3
    with pytest.raises(Unsupported, match="needs the size of the axis 'T' of 'ids'"):
        onnx_signature.macs(path)
    assert stored.precision(path) == "f32"


def test_a_fixed_first_axis_is_the_batch_size(tmp_path: Path) -> None:
    weight = {"w": np.ones((4, 3), np.float32)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"])]
    path = save(tmp_path / "m.onnx", nodes, [value("x", kinds.FLOAT, 6, 4)], [value("y", kinds.FLOAT, 6, 3)], weight)
    assert onnx_signature.read_signature(path).batch == 6
    assert onnx_signature.macs(path) == 12
    path = save(tmp_path / "v.onnx", nodes, [value("x", kinds.FLOAT, -1, 4)], [value("y", kinds.FLOAT, -1, 3)], weight)
    assert onnx_signature.read_signature(path).batch is None


@pytest.mark.parametrize(
    ("inputs", "said"),
    [
        ([("x", kinds.FLOAT, ("N", 4)), ("rate", kinds.INT64, ())], "input 'rate' must be .* int64 with 0 axes"),
        ([("x", kinds.STRING, ("N", 4))], "input 'x' must be .* it is string"),
        ([("x", kinds.FLOAT, (2, 4)), ("z", kinds.FLOAT, (3, 4))], "sizes differ .*'x': 2, 'z': 3"),
        ([("x", kinds.FLOAT, ("N", 4)), ("state", kinds.FLOAT, (2, "N"))], "axis 'N' .* inner axis of 'state'"),
    ],
)
def test_inputs_without_examples_are_refused(inputs: list[Any], said: str, tmp_path: Path) -> None:
    made = [value(name, kind, *axes) for name, kind, axes in inputs]
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name, _, _ in inputs]
    outputs = [value(f"{name}_out", kind, *axes) for name, kind, axes in inputs]
    with pytest.raises(Unsupported, match=said):
        onnx_signature.read_signature(save(tmp_path / "m.onnx", nodes, made, outputs, {}))


def quantized() -> nn.Module:
    torch.manual_seed(0)
    scheme = Scheme()
    grids = [ActivationQuantizer.of_range(-3, 3, scheme) for _ in range(2)]
    conv, linear = nn.Conv2d(3, 8, 3), nn.Linear(8 * 36, 10)
    with torch.no_grad():
        conv.weight[0] = 0
    return nn.Sequential(
        grids[0],
        QuantizedConv2d(conv, grids[0].scale, scheme),
        nn.Flatten(),
        grids[1],
        QuantizedLinear(linear, grids[1].scale, scheme),
    ).eval()


IMAGES = Signature(inputs=(Port(name="input", shape=(3, 8, 8)),), outputs=(Port(name="output", shape=(10,)),))


def test_a_file_counts_as_its_module_does(tmp_path: Path) -> None:
    example = {"input": torch.zeros(2, 3, 8, 8)}
    model = quantized()
    path = to_onnx(model, IMAGES, example, tmp_path / "m.onnx")
    assert onnx_signature.read_signature(path) == IMAGES
    assert onnx_signature.parameters(path) == counts.parameters(model)
    assert onnx_signature.macs(path) == counts.macs(model, example, IMAGES)
    assert stored.precision(path) == "w8"

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.head = nn.LSTM(8, 32, 2, batch_first=True), nn.Linear(32, 5)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.head(self.layers(x)[0][:, -1])
            return y

    said = Signature(inputs=(Port(name="x", shape=(12, 8)),), outputs=(Port(name="y", shape=(5,)),))
    path = to_onnx(Last().eval(), said, {"x": torch.zeros(2, 12, 8)}, tmp_path / "r.onnx")
    if OnnxRuntime().unavailable() is None:  # shapes inside do not follow from the file
        assert onnx_signature.macs(path) == 159_904


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_weights_are_unpacked_to_count(bits: int, tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    weights = draw.integers(0, 2**bits, (5, 2, 32)).astype(np.uint8)  # 5 columns, 40 of 64 rows used
    points = draw.integers(0, 2**bits, (5, 2)).astype(np.uint8)

    def packed(fields: Any) -> Any:
        return fields if bits == 8 else fields[..., ::2] | fields[..., 1::2] << 4

    node = helper.make_node(
        "MatMulNBits", ["x", "w", "scales", "zeros"], ["y"], domain="com.microsoft", K=40, N=5, bits=bits, block_size=32
    )
    path = save(
        tmp_path / "m.onnx",
        [node],
        [value("x", kinds.FLOAT, "N", 40)],
        [value("y", kinds.FLOAT, "N", 5)],
        {"w": packed(weights), "scales": np.ones((5, 2), np.float32), "zeros": packed(points)},
    )
    nonzero = int((weights != points[..., None]).reshape(5, -1)[:, :40].sum())
    assert onnx_signature.parameters(path) == (200, nonzero)
    assert stored.precision(path) == f"w{bits}"


class GivenFile(nn.Module):
    """What a task hands over where its model is a file."""

    def __init__(self, artifact: Path) -> None:
        super().__init__()
        self.artifact = artifact


@pytest.mark.parametrize("hardware", [OnnxRuntime(), OpenVino()], ids=["onnxruntime", "openvino"])
@pytest.mark.parametrize("beside", [False, True])
def test_a_file_is_deployed_as_it_is(hardware: Hardware, beside: bool, tmp_path: Path) -> None:
    if reason := hardware.unavailable():
        pytest.skip(reason)
    options = {"save_as_external_data": True, "location": "weights.bin", "size_threshold": 80} if beside else {}
    path = tokens(tmp_path / "given.onnx", **options)
    signature = onnx_signature.read_signature(path)
    artifact = hardware.build(GivenFile(path), signature, {}, tmp_path / "built")
    copy = artifact / "model.onnx" if beside else artifact
    assert copy.read_bytes() == path.read_bytes()
    if beside:
        assert (artifact / "weights.bin").read_bytes() == (tmp_path / "weights.bin").read_bytes()
    inputs: dict[str, Any] = {
        "ids": np.array([[3, 4, 5], [6, 7, 49]], np.int32),
        "attention_mask": np.ones((2, 3), np.int64),
    }
    deployed = hardware.load(artifact, signature=signature, inputs=inputs, threads=1)
    deployed.bind(inputs)
    deployed()
    expected: Any = ReferenceEvaluator(str(path)).run(["scores"], inputs)
    got = deployed.fetch()
    assert got["scores"] == pytest.approx(expected[0], abs=1e-5)
    assert np.array_equal(got["mask"], inputs["attention_mask"])


def test_files_that_are_not_what_they_say_are_refused(tmp_path: Path) -> None:
    hardware = OnnxRuntime()
    signature = Signature(inputs=(), outputs=())
    (tmp_path / "bad.onnx").write_bytes(b"nonsense" * 9)
    for name, said in (("bad.onnx", "not an ONNX file"), ("absent.onnx", "No such file")):
        with pytest.raises(DataError, match=said):
            hardware.build(GivenFile(tmp_path / name), signature, {}, tmp_path / "built")
        with pytest.raises(DataError, match=said):
            onnx_signature.read_signature(tmp_path / name)
    path = tokens(tmp_path / "m.onnx", save_as_external_data=True, location="weights.bin", size_threshold=80)
    (tmp_path / "secret").write_text("secret")
    model = onnx.load(path, load_external_data=False)
    for place, said in (("../secret", "plain file in its own folder"), ("/etc/passwd", "plain file"), ("gone", "gone")):
        for tensor in model.graph.initializer:
            for item in tensor.external_data:
                if item.key == "location":
                    item.value = place
        path.write_bytes(model.SerializeToString())
        with pytest.raises(DataError, match=said):
            hardware.build(GivenFile(path), signature, {}, tmp_path / "built")
    with pytest.raises(Unsupported, match=r"m\.onnx is an ONNX file, which PyTorch does not run"):
        Torch().build(GivenFile(path), signature, {}, tmp_path / "built")
    with pytest.raises(Unsupported, match="only its forward pass is run, not prefill, decode"):
        hardware.build(GivenFile(path), signature, {}, tmp_path / "built", ("prefill", "decode"))


def test_reading_a_file_needs_no_torch() -> None:
    code = "import sys, hardware.onnx_signature; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
