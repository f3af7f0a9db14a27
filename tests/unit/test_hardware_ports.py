"""Named inputs and outputs on the three runtimes: several of them, every type kept, axes that vary."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hardware import ports
from hardware.onnxruntime_cpu import OnnxRuntime
from hardware.openvino_cpu import OpenVino
from hardware.torch_cpu import Torch
from harness.contracts import Hardware, Port, Signature
from harness.errors import DataError, InputError, Unsupported

RUNTIMES: dict[str, Hardware] = {"torch": Torch(), "onnxruntime": OnnxRuntime(), "openvino": OpenVino()}


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


class Split(nn.Module):
    """Ids, a mask and a scale in; a tuple with a hole out."""

    def forward(self, ids: Tensor, mask: Tensor, scale: Tensor) -> tuple[Tensor, Tensor, None, Tensor]:
        return ids + 1, (ids % 1000) * mask, None, scale * 2


SPLIT = Signature(
    inputs=(
        Port(name="ids", shape=("tokens",), dtype="int64"),
        Port(name="mask", shape=("tokens",), dtype="bool"),
        Port(name="scale", shape=(), dtype="float16"),
    ),
    outputs=(
        Port(name="next", shape=("tokens",), dtype="int64"),
        Port(name="rest", shape=("tokens",), dtype="int64"),
        Port(name="scale", shape=(), dtype="float16"),
    ),
)


def inputs_of(n: int, tokens: int, low: int = 0, high: int = 2**24) -> dict[str, Any]:
    draw = np.random.default_rng(tokens)
    return {
        "ids": draw.integers(low, high, (n, tokens)),
        "mask": draw.random((n, tokens)) > 0.5,
        "scale": draw.random(n).astype(np.float16),
    }


def tensors(arrays: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(value) for name, value in arrays.items()}


def test_every_type_arrives_unchanged_at_every_size(
    runtime: Hardware, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ASSAY_TRUSTED_MODULES", "tests")
    artifact = runtime.build(Split(), SPLIT, tensors(inputs_of(2, 3)), tmp_path)
    large = {} if isinstance(runtime, OpenVino) else {"low": 2**40, "high": 2**41}  # far above what floats hold
    for n, tokens in ((1, 1), (3, 5)):
        inputs = inputs_of(n, tokens, **large)
        deployed = runtime.load(artifact, signature=SPLIT, inputs=inputs, threads=1)
        deployed.bind(inputs)
        deployed()
        got = deployed.fetch()
        assert list(got) == ["next", "rest", "scale"]
        assert np.array_equal(got["next"], inputs["ids"] + 1)
        assert np.array_equal(got["rest"], inputs["ids"] % 1000 * inputs["mask"])
        assert np.array_equal(got["scale"], inputs["scale"] * 2)
        for port in SPLIT.outputs:
            assert got[port.name].dtype == port.dtype
        for wrong in (
            inputs | {"ids": inputs["ids"].astype(np.int32)},
            inputs | {"mask": inputs["mask"][:, :-1]},
            {name: value for name, value in inputs.items() if name != "scale"},
        ):
            with pytest.raises(InputError):
                deployed.bind(wrong)
            with pytest.raises(InputError):
                runtime.load(artifact, signature=SPLIT, inputs=wrong, threads=1)
        with pytest.raises(InputError, match="decode"):
            deployed("decode")
        deployed.close()


def test_openvino_refuses_what_it_would_change(tmp_path: Path) -> None:
    hardware = OpenVino()
    if reason := hardware.unavailable():
        pytest.skip(reason)
    artifact = hardware.build(Split(), SPLIT, tensors(inputs_of(2, 3)), tmp_path)
    inputs = inputs_of(2, 3)
    deployed = hardware.load(artifact, signature=SPLIT, inputs=inputs, threads=1)
    inputs["ids"][1, 1] = 2**24
    deployed.bind(inputs)
    inputs["ids"][1, 1] = 2**24 + 1  # its remainder by 1000 would be that of 2**24
    with pytest.raises(Unsupported, match=r"exact up to 2\*\*24.*int64 input 'ids' holds 16777217"):
        deployed.bind(inputs)
    port = Port(name="x", shape=(3,), dtype="float64")
    signature = Signature(inputs=(port,), outputs=(Port(name="y", shape=(3,), dtype="float64"),))
    artifact = hardware.build(nn.ReLU(), signature, {"x": torch.zeros(2, 3).double()}, tmp_path)
    with pytest.raises(Unsupported, match=r"'x' does not take float64"):
        hardware.load(artifact, signature=signature, inputs={"x": np.zeros((2, 3))}, threads=1)


def test_what_no_kernel_takes_is_unsupported_and_not_damage(tmp_path: Path) -> None:
    hardware = OnnxRuntime()
    if reason := hardware.unavailable():
        pytest.skip(reason)
    port = Port(name="x", shape=(3, 4, 4), dtype="float64")
    signature = Signature(inputs=(port,), outputs=(Port(name="y", shape=(2, 2, 2), dtype="float64"),))
    artifact = hardware.build(nn.Conv2d(3, 2, 3).double(), signature, {"x": torch.zeros(2, 3, 4, 4).double()}, tmp_path)
    with pytest.raises(Unsupported, match="Could not find an implementation for Conv"):
        hardware.load(artifact, signature=signature, inputs={"x": np.zeros((1, 3, 4, 4))}, threads=1)


def test_an_operation_that_openvino_does_not_know_is_unsupported_with_its_reason(tmp_path: Path) -> None:
    hardware = OpenVino()
    if reason := hardware.unavailable():
        pytest.skip(reason)

    class AlwaysDropping(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(x, 0.5, training=True)

    signature = Signature(inputs=(Port(name="x", shape=(3,)),), outputs=(Port(name="y", shape=(3,)),))
    artifact = hardware.build(AlwaysDropping(), signature, {"x": torch.zeros(2, 3)}, tmp_path)
    with pytest.raises(
        Unsupported, match=r"OpConversionFailure: Dropout.*: Training mode is not supported for Dropout"
    ):
        hardware.load(artifact, signature=signature, inputs={"x": np.zeros((2, 3), np.float32)}, threads=1)


def test_a_fixed_batch_is_the_only_one_that_is_taken(runtime: Hardware, tmp_path: Path) -> None:
    shape = Port(name="x", shape=(4,))
    signature = Signature(inputs=(shape,), outputs=(Port(name="y", shape=(2,)),), batch=1)
    torch.manual_seed(0)
    model = nn.Linear(4, 2).eval()
    artifact = runtime.build(model, signature, {"x": torch.zeros(1, 4)}, tmp_path)
    x = np.ones((1, 4), np.float32)
    deployed = runtime.load(artifact, signature=signature, inputs={"x": x}, threads=1)
    deployed.bind({"x": x})
    deployed()
    with torch.no_grad():
        assert deployed.fetch()["y"] == pytest.approx(model(torch.ones(1, 4)).numpy(), abs=1e-5)
    with pytest.raises(InputError, match=r"shape \(1, 4\) as 'x'; got \(2, 4\)"):
        runtime.load(artifact, signature=signature, inputs={"x": np.ones((2, 4), np.float32)}, threads=1)


def test_names_or_places_tell_which_input_is_which() -> None:
    wanted = (Port(name="a", shape=()), Port(name="b", shape=()))
    assert ports.matched(wanted, ["b", "c", "a"], "input") == ["a", "b"]
    assert ports.matched(wanted, ["a", "a_"], "input") == ["a", "a_"]
    with pytest.raises(DataError, match="has the inputs a; the signature says a, b"):
        ports.matched(wanted, ["a"], "input")


def test_axes_have_exported_names_that_are_identifiers_and_differ() -> None:
    port = Port(name="x", shape=("batch", "a-b", "a.b", "class", "2d", 7))
    names = ports.axis_names(Signature(inputs=(port,), outputs=()))
    assert all(name.isidentifier() and name != "batch" for name in names.values())
    assert len(set(names.values())) == 5
    sizes = ports.axis_sizes(Signature(inputs=(port,), outputs=()), {"x": np.zeros((9, 1, 2, 3, 4, 5, 7))})
    assert sizes == {"batch": 9, names["batch"]: 1, names["a-b"]: 2, names["a.b"]: 3, names["class"]: 4, names["2d"]: 5}


class Branch(nn.Module):
    """Another function for fewer than four tokens, and a table of 32 positions."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(9, 8), nn.Parameter(torch.randn(32, 8))

    def forward(self, ids: Tensor) -> Tensor:
        found: Tensor = self.embedding(ids) + self.positions[: ids.shape[1]]
        return found if ids.shape[1] < 4 else found * 2


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_sizes_for_which_the_export_does_not_hold_are_refused(name: str, tmp_path: Path) -> None:
    hardware = RUNTIMES[name]
    if reason := hardware.unavailable():
        pytest.skip(reason)
    ids = Port(name="ids", shape=("tokens",), dtype="int64", values=9)
    signature = Signature(inputs=(ids,), outputs=(Port(name="y", shape=("tokens", 8)),))
    model = Branch().eval()
    artifact = hardware.build(model, signature, {"ids": torch.zeros(2, 6, dtype=torch.long)}, tmp_path)
    for tokens in (4, 32):
        inputs = {"ids": np.random.default_rng(0).integers(0, 9, (1, tokens))}
        deployed = hardware.load(artifact, signature=signature, inputs=inputs, threads=1)
        deployed.bind(inputs)
        deployed()
        with torch.no_grad():
            assert deployed.fetch()["y"] == pytest.approx(model(torch.from_numpy(inputs["ids"])).numpy(), abs=1e-5)
    for tokens in (3, 33):
        with pytest.raises(InputError, match=f"'tokens' has size {tokens}; the model was exported for 4 to 32"):
            hardware.load(artifact, signature=signature, inputs={"ids": np.zeros((1, tokens), np.int64)}, threads=1)
