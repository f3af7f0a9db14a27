"""The three runtimes: the same outputs as torch, settings read back, integer kernels proven, and cheap calls."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hardware.onnxruntime_cpu import OnnxRuntime
from hardware.openvino_cpu import OpenVino
from hardware.torch_cpu import Torch
from harness.contracts import Deployed, Hardware, Port, Scheme, Signature
from harness.errors import DataError, InputError
from harness.quantized import ActivationQuantizer, QuantizedConv2d, QuantizedLinear

RUNTIMES: dict[str, Hardware] = {"torch": Torch(), "onnxruntime": OnnxRuntime(), "openvino": OpenVino()}
SHAPE = (3, 8, 8)
SIGNATURE = Signature(inputs=(Port(name="input", shape=SHAPE),), outputs=(Port(name="output", shape=(10,)),))


@pytest.fixture(params=RUNTIMES)
def runtime(request: pytest.FixtureRequest) -> Hardware:
    hardware = RUNTIMES[request.param]
    if reason := hardware.unavailable():
        pytest.skip(reason)
    return hardware


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 10)).eval()


def quantized(scheme: Scheme) -> nn.Module:
    model = plain()
    grids = [ActivationQuantizer.of_range(*ends, scheme) for ends in ((-3.0, 3.0), (0.0, 3.0), (-3.0, 3.0))]
    return nn.Sequential(
        grids[0],
        QuantizedConv2d(model[0], grids[0].scale, scheme),  # type: ignore[index]
        nn.ReLU(),
        grids[1],
        QuantizedConv2d(model[2], grids[1].scale, scheme),  # type: ignore[index]
        grids[2],
        nn.Flatten(),
        QuantizedLinear(model[4], grids[2].scale, scheme),  # type: ignore[index]
    ).eval()


def build(hardware: Hardware, model: nn.Module, folder: Path) -> Path:
    return hardware.build(model, SIGNATURE, {"input": batch(2)}, folder)


def load(hardware: Hardware, artifact: Path, n: int = 1, threads: int = 1) -> Any:
    return hardware.load(artifact, signature=SIGNATURE, inputs={"input": batch(n).numpy()}, threads=threads)


def batch(n: int) -> torch.Tensor:
    return torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(n))


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Each runtime's artifact of the float and of the quantized model."""
    made = {}
    for name, hardware in RUNTIMES.items():
        if hardware.unavailable() is None:
            for kind, model in (("f32", plain()), ("int8", quantized(hardware.scheme))):
                made[name, kind] = build(hardware, model, tmp_path_factory.mktemp(f"{name}-{kind}"))
    return made


def name_of(runtime: Hardware) -> str:
    return next(name for name, hardware in RUNTIMES.items() if hardware is runtime)


@pytest.mark.parametrize("n", [1, 5])
@pytest.mark.parametrize("kind", ["f32", "int8"])
def test_outputs_are_torch_s_at_any_batch_size(
    runtime: Hardware, artifacts: dict[tuple[str, str], Path], kind: str, n: int
) -> None:
    model = plain() if kind == "f32" else quantized(runtime.scheme)
    deployed = load(runtime, artifacts[name_of(runtime), kind], n)
    assert isinstance(runtime, Hardware)
    for seed in (n, n + 10):  # a second batch through the same binding
        x = torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(seed))
        deployed.bind({"input": x.numpy()})
        deployed()
        deployed.synchronize()
        with torch.no_grad():
            expected = model(x).numpy()
        got = deployed.fetch()["output"]
        assert got.shape == (n, 10)
        tolerance = 1e-5 if kind == "f32" else 0.02  # a step of a grid, through one layer
        assert np.abs(got - expected).max() <= tolerance
        kept = got.copy()
    deployed.bind({"input": np.zeros((n, *SHAPE), np.float32)})
    deployed()
    assert np.array_equal(got, kept)  # fetch gave a copy
    deployed.close()


@pytest.mark.parametrize("threads", [1, 2])
def test_settings_are_read_back(runtime: Hardware, artifacts: dict[tuple[str, str], Path], threads: int) -> None:
    deployed = load(runtime, artifacts[name_of(runtime), "f32"], 2, threads)
    effective = deployed.effective
    assert effective["threads"] == min(threads, os.cpu_count() or 1)
    assert effective["streams"] == 1
    assert "cpu" in effective["provider"].lower()
    assert effective["precision"] == "f32"
    assert effective["mac_share"] == {"f32": 1.0}
    assert "precision_reason" not in effective


INTEGER_KERNELS = {
    "onnxruntime": {"QLinearConv:int8": 2, "QGemm:int8": 1},
    "openvino": {"Convolution:int8": 2, "FullyConnected:int8": 1},
}


@pytest.mark.parametrize("name", INTEGER_KERNELS)
def test_a_quantized_model_runs_integer_kernels(name: str, artifacts: dict[tuple[str, str], Path]) -> None:
    if (name, "int8") not in artifacts:
        pytest.skip(str(RUNTIMES[name].unavailable()))
    deployed = load(RUNTIMES[name], artifacts[name, "int8"])
    effective = deployed.effective
    assert effective["precision"] == "int8"
    assert effective["mac_share"] == {"int8": 1.0}
    assert INTEGER_KERNELS[name].items() <= effective["kernels"].items()


def test_torch_says_that_it_simulates(artifacts: dict[tuple[str, str], Path]) -> None:
    effective = load(Torch(), artifacts["torch", "int8"]).effective
    assert effective["precision"] == "f32"
    assert effective["precision_reason"].startswith("simulated")
    assert effective["kernels"]["convolution:f32"] == 2


def test_integers_without_integer_kernels_are_found_out(tmp_path: Path) -> None:
    hardware = OnnxRuntime()
    if reason := hardware.unavailable():
        pytest.skip(reason)
    # A bias at another scale than s_x s_w is one of the things that silently cost ONNX Runtime its integer kernels.
    model = quantized(hardware.scheme)
    for layer in model.modules():
        if isinstance(layer, QuantizedConv2d | QuantizedLinear) and layer.bias_scale is not None:
            layer.bias_scale *= 1.5
    effective = load(hardware, build(hardware, model, tmp_path)).effective
    assert effective["precision"] == "f32"
    assert effective["mac_share"]["f32"] > 0.9
    assert effective["precision_reason"].startswith("the model is quantized, but only ")
    assert effective["precision_reason"].endswith("2 x Conv:f32")


def test_openvino_runs_bf16_only_when_asked(artifacts: dict[tuple[str, str], Path]) -> None:
    if ("openvino", "f32") not in artifacts:
        pytest.skip(str(OpenVino().unavailable()))
    deployed = load(OpenVino(precision="bf16"), artifacts["openvino", "f32"])
    effective = deployed.effective
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    if "avx512_bf16" in flags or "amx_bf16" in flags:
        assert effective["precision"] == "bf16"
        assert effective["inference_precision_hint"] == "bf16"
    else:
        assert "bf16 was asked for" in effective["precision_reason"]


def test_damaged_artifacts_and_wrong_shapes_are_clear_errors(
    runtime: Hardware, artifacts: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    artifact = artifacts[name_of(runtime), "f32"]
    cut = tmp_path / artifact.name
    content = artifact.read_bytes()
    for damaged in (content[: len(content) // 2], b"", b"nonsense" * 20):
        cut.write_bytes(damaged)
        with pytest.raises(DataError):
            load(runtime, cut)
    with pytest.raises(DataError):
        load(runtime, tmp_path / "absent.onnx")
    deployed = load(runtime, artifact)
    with pytest.raises(InputError, match=r"\(2, 3, 8, 8\)"):
        deployed.bind({"input": np.zeros((2, *SHAPE), np.float32)})


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_wrong_input_shapes_are_refused_when_loading(name: str, artifacts: dict[tuple[str, str], Path]) -> None:
    if (name, "f32") not in artifacts:
        pytest.skip(str(RUNTIMES[name].unavailable()))
    for wrong in ((4, 8, 8), (3, 8)):
        other = Signature(inputs=(Port(name="input", shape=wrong),), outputs=SIGNATURE.outputs)
        with pytest.raises(InputError, match="takes inputs of shape"):
            RUNTIMES[name].load(
                artifacts[name, "f32"], signature=other, inputs={"input": np.zeros((1, *wrong), np.float32)}, threads=1
            )


def test_runtimes_load_without_torch_and_leave_the_home_folder_alone(
    artifacts: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    targets = {"onnxruntime": ("onnxruntime_cpu", "OnnxRuntime"), "openvino": ("openvino_cpu", "OpenVino")}
    for name, (module, kind) in targets.items():
        if (name, "int8") not in artifacts:
            continue
        code = f"""
import sys
from pathlib import Path
import numpy as np
from hardware.{module} import {kind}
from harness.contracts import Port, Signature
signature = Signature(inputs=(Port(name="input", shape=(3, 8, 8)),), outputs=(Port(name="output", shape=(10,)),))
inputs = {{"input": np.ones((1, 3, 8, 8), np.float32)}}
hardware = {kind}()
assert hardware.unavailable() is None
deployed = hardware.load(Path({str(artifacts[name, "int8"])!r}), signature=signature, inputs=inputs, threads=1)
deployed.bind(inputs)
deployed()
assert deployed.fetch()["output"].shape == (1, 10)
assert deployed.effective["precision"] == "int8"
assert not [m for m in sys.modules if m == "torch" or m.startswith("torch.")]
"""
        home = tmp_path / name
        home.mkdir()
        environment = {**os.environ, "HOME": str(home), "PYTHONPATH": str(Path(__file__).parents[2])}
        environment.pop("ORT_DISABLE_TELEMETRY", None)
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, cwd=home, capture_output=True, text=True, timeout=120
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        assert list(home.rglob("*")) == []


def bare(deployed: Any) -> Any:
    """The runtime's own call, with everything looked up beforehand."""
    if hasattr(deployed, "_session"):
        session, binding = deployed._session, deployed._binding
        return lambda: session.run_with_iobinding(binding)
    request = deployed._request
    return lambda: request.infer(share_outputs=True)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_the_wrapper_costs_next_to_nothing(name: str, artifacts: dict[tuple[str, str], Path]) -> None:
    if (name, "f32") not in artifacts:
        pytest.skip(str(RUNTIMES[name].unavailable()))
    deployed: Deployed = load(RUNTIMES[name], artifacts[name, "f32"])
    own = bare(deployed)
    extra = []
    for _ in range(1500):
        start = time.perf_counter_ns()
        own()
        middle = time.perf_counter_ns()
        deployed()
        deployed.synchronize()
        extra.append((time.perf_counter_ns() - middle) - (middle - start))
    assert statistics.median(extra) <= 5_000
