"""What a run is called: by the kernels that multiply, whatever they are fused into and however weights are stored."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hardware.onnxruntime_cpu import OnnxRuntime
from hardware.openvino_cpu import OpenVino
from hardware.torch_cpu import Torch
from harness.contracts import Hardware, Port, Scheme, Signature
from harness.quantized import ActivationQuantizer, QuantizedLinear

onnx = pytest.importorskip("onnx")

from onnx.reference import ReferenceEvaluator  # noqa: E402  (after the check that onnx is there)

RUNTIMES: dict[str, Hardware] = {"torch": Torch(), "onnxruntime": OnnxRuntime(), "openvino": OpenVino()}


@pytest.fixture(params=RUNTIMES)
def runtime(request: pytest.FixtureRequest) -> Hardware:
    return available(RUNTIMES[request.param])


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASSAY_TRUSTED_MODULES", "tests")


def available(hardware: Hardware) -> Hardware:
    if reason := hardware.unavailable():
        pytest.skip(reason)
    return hardware


def signature(*shape: int, dtype: str = "float32") -> Signature:
    return Signature(
        inputs=(Port(name="x", shape=shape, dtype=dtype),), outputs=(Port(name="y", shape=(), dtype=dtype),)
    )


def effective(hardware: Hardware, model: nn.Module, x: Tensor, folder: Path) -> Any:
    said = signature(*x.shape[1:], dtype=str(x.dtype).removeprefix("torch."))
    artifact = hardware.build(model.eval(), said, {"x": x}, folder)
    return hardware.load(artifact, signature=said, inputs={"x": x.numpy()}, threads=1).effective


class Recurrent(nn.Module):
    """An LSTM or GRU of two layers, then a Linear, in float or quantized."""

    def __init__(self, kind: type[nn.RNNBase], head: nn.Module) -> None:
        super().__init__()
        self.layers = kind(8, 32, num_layers=2, batch_first=True)  # type: ignore[arg-type, call-arg]
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.layers(x)[0][:, -1])
        return y


def quantized(linear: nn.Linear, low: float = -1.0, high: float = 1.0) -> nn.Module:
    grid = ActivationQuantizer.of_range(low, high, Scheme())
    return nn.Sequential(grid, QuantizedLinear(linear, grid.scale, Scheme()))


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3)])
def test_recurrent_kernels_are_counted(runtime: Hardware, kind: type[nn.RNNBase], gates: int, tmp_path: Path) -> None:
    found = effective(runtime, Recurrent(kind, quantized(nn.Linear(32, 5))), torch.randn(2, 12, 8), tmp_path)
    assert found["precision"] == "f32"
    layers, head = 12 * gates * 32 * (8 + 32 + 32 + 32), 32 * 5
    if not isinstance(runtime, Torch):  # its integers are simulated
        assert found["mac_share"] == {
            "f32": pytest.approx(layers / (layers + head), abs=1e-5),
            "int8": pytest.approx(head / (layers + head), abs=1e-5),
        }
        assert found["precision_reason"].startswith("the model is quantized, but only 0% of the multiply-accumulates")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_a_model_is_not_said_to_be_in_f32_when_it_is_not(runtime: Hardware, dtype: torch.dtype, tmp_path: Path) -> None:
    if dtype == torch.float64 and isinstance(runtime, OpenVino):
        pytest.skip("refused; see test_hardware_ports")
    found = effective(runtime, nn.Linear(32, 8).to(dtype), torch.randn(2, 32).to(dtype), tmp_path)
    name = {torch.float16: "f16", torch.float64: "f64"}[dtype]
    assert found["precision"] in (name, "f32")
    assert "model is in f32" not in found.get("precision_reason", "")
    if isinstance(runtime, OnnxRuntime) and dtype == torch.float16:
        assert found["precision_reason"].startswith("the model is in f16, but only 0%")


class Half(nn.Module):
    """A layer that takes float32 and computes in bfloat16."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x.bfloat16())
        return y


def test_torch_names_bfloat16(tmp_path: Path) -> None:
    model, x = Half(nn.Linear(32, 8)).bfloat16(), torch.randn(2, 32)
    artifact = Torch().build(model, signature(32), {"x": x}, tmp_path)
    deployed = Torch().load(artifact, signature=signature(32), inputs={"x": x.numpy()}, threads=1)
    deployed.bind({"x": x.numpy()})
    deployed()
    got = deployed.fetch()["y"]
    assert got.dtype == np.float32  # NumPy has no bfloat16
    with torch.no_grad():
        assert np.array_equal(got, model(x).float().numpy())
    assert deployed.effective["precision"] == "bf16"
    assert "precision_reason" not in deployed.effective


def test_openvino_s_fused_perceptrons_have_a_precision(tmp_path: Path) -> None:
    hardware = available(OpenVino())
    torch.manual_seed(0)
    first, second = nn.Linear(64, 16), nn.Linear(16, 10)
    x = torch.randn(2, 64)
    plain = effective(hardware, nn.Sequential(first, nn.ReLU(), second), x, tmp_path)
    assert plain["kernels"] == {"Subgraph:f32": 1}  # nothing to see but one kernel
    assert (plain["precision"], plain["mac_share"]) == ("f32", {"f32": 1.0})
    integer = nn.Sequential(quantized(first, -3, 3), nn.ReLU(), quantized(second, 0, 3))
    found = effective(hardware, integer, x, tmp_path)
    assert (found["precision"], found["mac_share"]) == ("int8", {"int8": 1.0})


def weights_only(path: Path, bits: int) -> Path:
    """y = x W with W (64, 32) in 4 bits and blocks of 32, or in 8 bits per channel, dequantized before the product."""
    helper, kinds = onnx.helper, onnx.TensorProto
    draw = np.random.default_rng(0)
    values = draw.integers(-8, 8, (64, 32)).astype(np.int8)
    if bits == 4:
        flat = values.reshape(-1).astype(np.uint8) & 15
        tensor = helper.make_tensor("q", kinds.INT4, (64, 32), (flat[::2] | flat[1::2] << 4).tobytes(), raw=True)
        scale, attributes = draw.random((2, 32)).astype(np.float32), {"axis": 0, "block_size": 32}
    else:
        tensor = onnx.numpy_helper.from_array(values, "q")
        scale, attributes = draw.random(32).astype(np.float32), {"axis": 1}
    graph = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", ["q", "scale"], ["w"], **attributes),
            helper.make_node("MatMul", ["x", "w"], ["y"]),
        ],
        "weights",
        [helper.make_tensor_value_info("x", kinds.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("y", kinds.FLOAT, ["batch", 32])],
        [tensor, onnx.numpy_helper.from_array(scale, "scale")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("hardware", "activations", "key", "value"),
    [
        (OnnxRuntime(), 8, "accuracy_level", 4),
        (OnnxRuntime(accuracy_level=0), 32, "accuracy_level", 0),
        (OpenVino(), 8, "dynamic_quantization_group_size", 32),
        (OpenVino(dynamic_quantization=0), 32, "dynamic_quantization_group_size", 0),
        (OpenVino(precision="bf16"), 16, "inference_precision_hint", "bf16"),
    ],
    ids=["onnxruntime-4", "onnxruntime-0", "openvino-32", "openvino-0", "openvino-bf16"],
)
def test_weights_in_few_bits_are_named_with_their_activations(
    hardware: Hardware, activations: int, key: str, value: Any, bits: int, tmp_path: Path
) -> None:
    available(hardware)
    x = np.random.default_rng(1).random((2, 64)).astype(np.float32)
    deployed = hardware.load(
        weights_only(tmp_path / "m.onnx", bits), signature=signature(64), inputs={"x": x}, threads=1
    )
    found = deployed.effective
    if activations == 16 and found[key] != value:
        pytest.skip("this CPU has no bfloat16")
    assert found["precision"] == f"w{bits}a{activations}"
    assert found["mac_share"] == {f"w{bits}a{activations}": 1.0}
    assert found[key] == value
    assert "precision_reason" not in found
    # The name tells what the numbers show: activations of 8 bits leave an error, those of 32 none.
    deployed.bind({"x": x})
    deployed()
    exact: Any = ReferenceEvaluator(str(tmp_path / "m.onnx")).run(None, {"x": x})
    error = np.abs(deployed.fetch()["y"] - exact[0]).max() / np.abs(exact[0]).max()
    assert error < 1e-5 if activations == 32 else 1e-4 < error < 2e-2


def test_openvino_s_settings_are_asked_for_and_read_back(tmp_path: Path) -> None:
    hardware = available(OpenVino(kv_cache="f16", dynamic_quantization=64))
    found = effective(hardware, nn.Linear(8, 4), torch.randn(2, 8), tmp_path)
    assert found["kv_cache_precision"] == "f16"
    assert found["dynamic_quantization_group_size"] == 64
    default = effective(OpenVino(), nn.Linear(8, 4), torch.randn(2, 8), tmp_path)
    assert default["inference_precision_hint"] == default["kv_cache_precision"] == "f32"


def loop(path: Path, rounds: int) -> Path:
    """x (n, 8) by V (8, 4), then ``rounds`` times by W (4, 4)."""
    helper, kinds, tensor = onnx.helper, onnx.TensorProto, onnx.numpy_helper.from_array

    def value(name: str, kind: int, *axes: int | str) -> Any:
        return helper.make_tensor_value_info(name, kind, list(axes))

    body = helper.make_graph(
        [helper.make_node("MatMul", ["h", "W"], ["next"]), helper.make_node("Identity", ["on"], ["still_on"])],
        "body",
        [value("i", kinds.INT64), value("on", kinds.BOOL), value("h", kinds.FLOAT, "batch", 4)],
        [value("still_on", kinds.BOOL), value("next", kinds.FLOAT, "batch", 4)],
    )
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "V"], ["h0"]),
            helper.make_node("Loop", ["rounds", "on0", "h0"], ["y"], body=body),
        ],
        "loop",
        [value("x", kinds.FLOAT, "batch", 8)],
        [value("y", kinds.FLOAT, "batch", 4)],
        [
            tensor(np.full((4, 4), 0.1, np.float32), "W"),
            tensor(np.ones((8, 4), np.float32), "V"),
            tensor(np.array(rounds), "rounds"),
            tensor(np.array(True), "on0"),
        ],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path


@pytest.mark.parametrize("hardware", [OnnxRuntime(), OpenVino(), OpenVino(precision="bf16")])
def test_products_in_a_loop_count_as_often_as_they_run(hardware: Hardware, tmp_path: Path) -> None:
    available(hardware)
    x = np.ones((2, 8), np.float32)
    found = hardware.load(loop(tmp_path / "m.onnx", 5), signature=signature(8), inputs={"x": x}, threads=1).effective
    if isinstance(hardware, OnnxRuntime):
        assert found["kernels"]["MatMul:f32"] == 6
    asked = found.get("inference_precision_hint", "f32")
    assert found["precision"] == asked
    assert found["mac_share"] == {asked: 1.0}
    if asked == "f32":
        assert "precision_reason" not in found
