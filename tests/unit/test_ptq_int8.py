"""ptq-int8: where quantizers go, what they hold, and what the runtimes make of it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, fx, nn
from torch.nn import functional as F

from hardware.artifacts import build_onnx
from hardware.onnxruntime_cpu import OnnxRuntime
from hardware.openvino_cpu import OpenVino
from harness import modelfile
from harness.contracts import Context, Hardware, Scheme
from harness.errors import NotFinite, Unsupported
from harness.quantized import ActivationQuantizer, QuantizedConv2d, QuantizedInput, QuantizedLinear
from harness.tasks.classes import signature
from harness.tasks.digits import Digits
from harness.tasks.models import create
from harness.testing.hardware import answer
from harness.testing.networks import SHAPE
from methods.quantization.graph import plan, trace
from methods.quantization.ptq_int8 import PtqInt8
from methods.quantization.ranges import BINS, percentile_range
from tests.unit.contexts import bare, refusal, split


def context(inputs: Tensor | None, tmp_path: Path, seed: int = 0, **changes: Any) -> Context:
    shape, data = ((4,), {}) if inputs is None else (inputs.shape[1:], {"train": split(inputs)})
    return bare(*shape, data=data, seed=seed, scratch=tmp_path, **changes)


def noise(n: int, *shape: int) -> Tensor:
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(7))


def lively(model: nn.Module) -> nn.Module:
    """Normalisation statistics as of a trained network, so that folding them is a real change."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            module.running_mean.normal_(0, 0.2, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model.eval()


@pytest.fixture(scope="module")
def digits() -> tuple[nn.Module, Tensor, Tensor]:
    """The digits network after a few epochs, its training inputs, and its test inputs."""
    task = Digits()
    model = task.model(0)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for epoch in range(2):
        for batch in task.data()["train"].batches(32, seed=epoch):
            optimizer.zero_grad()
            F.cross_entropy(model(batch.inputs["input"]), batch.targets["label"]).backward()
            optimizer.step()
    inputs, tests = (
        next(iter(part.batches(part.size))).inputs["input"] for part in (task.data()["train"], task.test())
    )
    return model.eval(), inputs, tests


def test_weights_lie_on_the_integer_grid_of_the_folded_layer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4)
    model = lively(nn.Sequential(conv, norm, nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)))
    x = noise(64, 2, 6, 6)
    result = PtqInt8().compress(model, context(x, tmp_path))
    layer = result.get_submodule("0")
    assert isinstance(layer, QuantizedConv2d)
    gain = norm.weight.double() / torch.sqrt(norm.running_var.double() + norm.eps)  # type: ignore[union-attr]
    weight = conv.weight.double() * gain[:, None, None, None]
    bias = norm.bias.double() - norm.running_mean.double() * gain  # type: ignore[union-attr]
    scale = weight.abs().flatten(1).amax(1) / 127
    assert torch.allclose(layer.weight_scale.double(), scale, rtol=1e-6)
    assert (layer.stored_weight.double() - weight / scale[:, None, None, None]).abs().max() <= 0.5001
    assert layer.stored_weight.min() >= -127
    # The input's range is the data's, widened to hold zero; its zero is exact.
    quantizer = first(result)
    assert isinstance(quantizer, ActivationQuantizer)
    assert quantizer.scale.item() == pytest.approx((x.max() - x.min()).item() / 255, rel=1e-6)
    assert quantizer(torch.zeros(1)).item() == 0
    assert layer.stored_bias is not None
    step = scale * quantizer.scale.double()
    assert (layer.stored_bias.double() - bias / step).abs().max() <= 0.501
    assert not [m for m in result.modules() if isinstance(m, nn.BatchNorm2d)]


def first(model: nn.Module) -> nn.Module:
    return next(m for m in model.modules() if isinstance(m, ActivationQuantizer))


def test_the_model_given_is_untouched_and_the_result_repeatable(tmp_path: Path) -> None:
    model = lively(create("resnet20", 0)).train()
    before = copy.deepcopy(model.state_dict())
    x = noise(40, 1, 28, 28)
    one = PtqInt8(calibration_examples=32).compress(model, context(x, tmp_path))
    two = PtqInt8(calibration_examples=32).compress(model, context(x, tmp_path))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert model.training
    assert not one.training
    state = two.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in one.state_dict().items())
    other = PtqInt8(calibration_examples=8).compress(model, context(x, tmp_path)).state_dict()
    assert any(not torch.equal(value, other[name]) for name, value in one.state_dict().items())


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.a = nn.Conv2d(4, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 4, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)  # one module, called three times
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(36, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        y = self.b(self.relu(self.a(x)))
        y += x
        logits: Tensor = self.fc(self.pool(self.relu(y)).flatten(1))
        return logits


def test_one_quantizer_a_value_at_its_source(tmp_path: Path) -> None:
    result = PtqInt8().compress(Residual().eval(), context(noise(16, 1, 6, 6), tmp_path))
    assert isinstance(result, fx.GraphModule)
    calls = [str(n.target) for n in result.graph.nodes if n.op == "call_module" and "quantizer" in str(n.target)]
    # input; stem after ReLU; a after ReLU; b; sum after ReLU, repeated after the pooling and the flattening
    assert len(set(calls)) == 5
    assert len(calls) == 7
    assert len(set(calls[-3:])) == 1
    last = next(n for n in result.graph.nodes if n.op == "output").args[0]
    assert last.target == "fc"  # the logits stay float
    # The residual addition reads quantized values on both sides.
    addition = next(n for n in result.graph.nodes if n.op == "call_function")
    assert all("quantizer" in str(arg.target) for arg in addition.args)
    for node in result.graph.nodes:
        if node.op == "call_module" and "quantizer" not in str(node.target):
            layer = result.get_submodule(str(node.target))
            if isinstance(layer, QuantizedConv2d | QuantizedLinear):
                grid = result.get_submodule(str(node.args[0].target))
                assert isinstance(grid, ActivationQuantizer)
                assert torch.equal(layer.bias_scale, grid.scale * layer.weight_scale)
    # After a ReLU the range starts at zero, so that the ReLU costs nothing in integers.
    assert [int(result.get_submodule(calls[i]).zero_point) for i in (1, 2, 4)] == [0, 0, 0]


def test_a_float_residual_stream_stays_float() -> None:
    steps = plan(trace(create("vit-tiny", 0)))
    additions = [n for n in steps.observed if "add" in n.name]
    assert additions == []
    assert len(steps.layers) == 1 + 4 * 4 + 1
    assert set(steps.kept_float.values()) == {"a product that is not a Conv2d or Linear module"}
    assert len(steps.kept_float) == 4  # one attention in each block


def test_layers_called_twice_and_other_layers_are_left_and_named(tmp_path: Path) -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.twice = nn.Linear(4, 4)
            self.once = nn.Linear(4, 4)
            self.wide = nn.Conv1d(1, 1, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.wide(self.once(self.twice(self.twice(x)))[:, None])[:, 0]
            return y

    model = Odd().eval()
    x = noise(16, 4)
    result = PtqInt8().compress(model, context(x, tmp_path))
    assert isinstance(result, fx.GraphModule)
    assert result.meta["kept_float"] == {
        "twice": "called 2 times, with inputs of different ranges",
        "wide": "no integer form of Conv1d",
    }
    assert isinstance(result.once, QuantizedLinear)
    assert type(result.twice) is nn.Linear
    assert (result(x) - model(x)).abs().max() < 0.1


@pytest.mark.parametrize("name", ["lenet-300-100", "mobilenet-tiny", "convnext-tiny-ish", "vit-tiny", "resnet20"])
def test_every_family_stays_close_to_its_float_model(name: str, tmp_path: Path) -> None:
    model = lively(create(name, 0))
    x = noise(64, 1, 28, 28)
    result = PtqInt8().compress(model, context(x, tmp_path))
    with torch.no_grad():
        exact, rounded = model(x), result(x)
    error = ((exact - rounded).square().mean() / exact.var()).item()
    assert 0 < error < 0.02  # a signal-to-noise ratio of more than 17 dB
    left = [m for m in result.modules() if type(m) in (nn.Conv2d, nn.Linear)]
    assert left == []


def test_percentiles_clip_outliers_that_extremes_follow(tmp_path: Path) -> None:
    x = noise(100, 50)
    x[3, 3] = 1000.0
    model = nn.Sequential(nn.Linear(50, 5)).eval()
    widest = first(PtqInt8().compress(model, context(x, tmp_path)))
    clipped = first(PtqInt8(range="percentile", percentile=99.9).compress(model, context(x, tmp_path)))
    everything = first(PtqInt8(range="percentile", percentile=100).compress(model, context(x, tmp_path)))
    assert widest.scale.item() * 255 > 1000  # type: ignore[union-attr,operator]
    assert clipped.scale.item() * 255 < 10  # type: ignore[union-attr,operator]
    assert everything.scale.item() == pytest.approx(widest.scale.item(), rel=1e-6)  # type: ignore[union-attr,operator]


def test_a_histogram_s_percentile_is_numpy_s_to_a_bin() -> None:
    values = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    low, high = float(values.min()), float(values.max())
    counts = torch.histc(torch.from_numpy(values), BINS, low, high).double()
    for p in (90.0, 99.0, 99.9):
        got = percentile_range(counts, low, high, p)
        assert got == pytest.approx(np.percentile(values, [100 - p, p]), abs=3 * (high - low) / BINS)
    assert percentile_range(counts, low, high, 100.0) == pytest.approx((low, high))
    assert percentile_range(torch.zeros(BINS), 2.0, 2.0, 99.0) == (2.0, 2.0)


def test_the_target_s_scheme_is_followed(tmp_path: Path) -> None:
    scheme = Scheme(activation="s8", activation_symmetric=True, weight_per_channel=False, quantized_bias=False)
    result = PtqInt8().targeting(scheme).compress(Residual().eval(), context(noise(16, 1, 6, 6), tmp_path))
    for module in result.modules():
        if isinstance(module, ActivationQuantizer):
            assert module.zero_point.dtype == torch.int8
            assert int(module.zero_point) == 0
        elif isinstance(module, QuantizedConv2d | QuantizedLinear):
            assert module.weight_scale.ndim == 0
            assert module.stored_bias is not None
            assert module.stored_bias.dtype == torch.float32


def test_what_cannot_be_quantized_has_a_reason(tmp_path: Path) -> None:
    method, x = PtqInt8(), noise(8, 4)
    fine = nn.Sequential(nn.Linear(4, 4))
    assert refusal(method, fine, context(x, tmp_path)) is None
    no_data = refusal(method, fine, context(None, tmp_path))
    assert no_data is not None
    assert "calibration needs a task with training data" in no_data
    empty = refusal(method, nn.ReLU(), context(x, tmp_path))
    assert empty is not None
    assert "no Conv2d or Linear" in empty
    twice = refusal(method, method.compress(fine, context(x, tmp_path)), context(x, tmp_path))
    assert twice == "the model is quantized already"
    with pytest.raises(Unsupported, match="training data"):
        method.compress(fine, context(None, tmp_path))
    x[2, 1] = float("nan")
    with pytest.raises(NotFinite, match="NaN"):
        method.compress(fine, context(x, tmp_path))


class Untraceable(nn.Module):
    """Control flow that depends on the input, a layer called twice, one never called, and attention of torch."""

    def __init__(self, random: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv1d(4, 8, 1)
        self.twice = nn.Linear(8, 8)
        self.alias = self.twice
        self.idle = nn.Linear(8, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.fc = nn.Linear(8, 3)
        self.random = random

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x).transpose(1, 2).to(self.twice.weight.dtype)
        x = torch.relu(self.twice(x)) if x.sum() > 0 else self.twice(x)
        x = self.attention(x, x, x)[0] + self.alias(2 * x)
        out: Tensor = self.fc(F.dropout(x.mean(1), 0.5, self.random))
        return out


@pytest.mark.parametrize("kind", ["min-max", "percentile"])
def test_what_cannot_be_traced_is_quantized_layer_by_layer_and_said(kind: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x, said, messages = Untraceable().eval(), noise(80, 4, 6), [], []
    given = context(x, tmp_path, warn=said.append, progress=lambda _, text: messages.append(text))
    result = PtqInt8(range=kind, percentile=100).compress(model, given)
    assert type(result) is Untraceable
    assert result.twice is result.alias
    layers = {name for name, module in result.named_modules() if isinstance(module, QuantizedInput)}
    assert layers == {"twice", "fc"}
    with torch.no_grad():
        exact, rounded = model(x), result(x)
        assert 0 < (exact - rounded).abs().max() < 0.1 * exact.std()
        assert torch.equal(modelfile.load(modelfile.save(result, tmp_path / "m"), allow=("tests",))(x), rounded)
    assert "Untraceable at test_ptq_int8.py" in said[-1]
    assert "x.sum() > 0" in said[-1]
    for kept in ("conv: no integer form of Conv1d", "attention: no integer form", "idle: the model does not call it"):
        assert kept in messages[-1]
    assert "idle.weight" in said[0]


def test_random_numbers_are_found_without_a_trace(tmp_path: Path) -> None:
    reason = refusal(PtqInt8(), Untraceable(random=True).eval(), context(noise(80, 4, 6), tmp_path))
    assert reason is not None
    assert "draws random numbers in evaluation (the output 'output' differs between two calls)" in reason


def test_a_weight_that_stays_in_float_elsewhere_is_said(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(20, 8)
            self.out = nn.Linear(8, 20, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            found: Tensor = self.out(self.embed(ids).mean(1))
            return found

    said: list[str] = []
    given = context(torch.randint(20, (40, 5)), tmp_path, warn=said.append)
    PtqInt8().compress(Tied().eval(), given)
    (text,) = said
    assert text.startswith("embed shares its weight with a layer that is quantized")


class Normless(nn.Module):
    """Batch normalisations without scale and shift, and without running statistics where they are not tracked."""

    def __init__(self, track: bool) -> None:
        super().__init__()
        self.a, self.na = nn.Conv2d(3, 16, 3, bias=False), nn.BatchNorm2d(16, affine=False, track_running_stats=track)
        self.c, self.nc = nn.Linear(16, 24), nn.BatchNorm1d(24, affine=False, track_running_stats=track)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.na(self.a(x))).amax((2, 3))
        out: Tensor = self.head(torch.relu(self.nc(self.c(x))))
        return out


@pytest.mark.parametrize("track", [True, False])
def test_batch_norm_without_scale_or_statistics(track: bool, tmp_path: Path) -> None:
    model, x = Normless(track), noise(200, 3, 8, 8)
    for norm in (model.na, model.nc):
        if track:
            norm.running_mean.normal_(0, 0.2)
            norm.running_var.uniform_(0.5, 1.5)
    model.eval()
    result = PtqInt8().compress(model, context(x, tmp_path))
    with torch.no_grad():
        exact, rounded = model(x[:64]), result(x[:64])
    assert (exact - rounded).abs().max() < 0.1 * exact.std()
    # Without running statistics the batch's own are what the model computes with: nothing to fold.
    left = [module for module in result.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    assert len(left) == (0 if track else 2)


class Named(nn.Module):
    """Parts whose names Python cannot write."""

    def __init__(self) -> None:
        super().__init__()
        for name, part in {"1x1": nn.Conv2d(2, 4, 1), "conv-a": nn.Conv2d(4, 4, 1), "conv_a_": nn.Identity()}.items():
            self.add_module(name, part)
        self.add_module("class", nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        parts = self._modules
        x = parts["conv_a_"](parts["conv-a"](torch.relu(parts["1x1"](x))))
        out: Tensor = getattr(self, "class")(x.mean((2, 3)))
        return out


def test_parts_of_any_name_are_quantized_and_survive_their_file(tmp_path: Path) -> None:
    model, x = Named().eval(), noise(50, 2, 5, 5)
    result = PtqInt8().compress(model, context(x, tmp_path))
    names = {name for name, m in result.named_modules() if isinstance(m, QuantizedConv2d | QuantizedLinear)}
    assert names == {"1x1", "conv_a_", "class_"}
    again = modelfile.load(modelfile.save(result, tmp_path / "model"))
    with torch.no_grad():
        assert torch.equal(again(x), result(x))
        assert (model(x) - result(x)).abs().max() < 0.1 * model(x).std()


class Random(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)
        self.drop = nn.Dropout(0.5)
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.a(self.drop(x)))
        if self.kind == "dropout":
            x = F.dropout(x, 0.5)
        elif self.kind == "told":
            x = F.dropout(x, 0.5, training=self.training)
        elif self.kind == "nothing":
            x = F.dropout(x, 0.0)
        elif self.kind == "noise":
            x = x + torch.randn_like(x)
        else:
            x = x + torch.randn(16)
        out: Tensor = self.b(x)
        return out


@pytest.mark.parametrize("kind", ["dropout", "noise", "constant"])
def test_a_forward_pass_that_draws_is_refused_and_not_made_another(kind: str, tmp_path: Path) -> None:
    model = Random(kind).eval()
    before = torch.get_rng_state()
    reason = refusal(PtqInt8(), model, context(noise(32, 8), tmp_path))
    assert reason is not None
    assert reason.startswith("the forward pass draws random numbers in evaluation")
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("kind", ["told", "nothing"])
def test_dropout_that_draws_nothing_is_dropped(kind: str, tmp_path: Path) -> None:
    model, x = Random(kind).eval(), noise(64, 8)
    result = PtqInt8().compress(model, context(x, tmp_path))
    with torch.no_grad():
        assert (model(x) - result(x)).abs().max() < 0.1 * model(x).std()


class Reads(nn.Module):
    """Forward passes that read a layer's weight: its type, its values, a product of their own with it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(3, 16, 3, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "dtype":
            x = x.to(self.conv.weight.dtype)
        elif self.kind == "type_as":
            x = x.type_as(self.conv.weight)
        elif self.kind == "norm":
            x = x / (self.head.weight.norm() + self.head.bias.abs().sum())
        elif self.kind == "folded":
            x = x * self.conv.weight.abs().mean()
        x = torch.relu(self.norm(self.conv(x))).mean((2, 3))
        if self.kind == "cosine":
            return F.normalize(x) @ F.normalize(self.head.weight).t()
        out: Tensor = self.head(x)
        return out


@pytest.mark.parametrize("kind", ["dtype", "type_as", "norm", "folded", "cosine"])
@pytest.mark.parametrize("quantized_bias", [True, False])
def test_a_weight_that_the_forward_pass_reads_stays_what_it_is(kind: str, quantized_bias: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = lively(Reads(kind)), noise(100, 3, 8, 8)
    result = PtqInt8(quantized_bias=quantized_bias).compress(model, context(x, tmp_path))
    again = modelfile.load(modelfile.save(result, tmp_path / "model"))
    with torch.no_grad():
        exact, rounded = model(x), result(x)
        assert (exact - rounded).abs().max() < 0.1 * exact.std()
        assert torch.equal(again(x), rounded)
    layers = {name for name, m in result.named_modules() if isinstance(m, QuantizedConv2d | QuantizedLinear)}
    assert layers == ({"conv"} if kind == "cosine" else {"conv", "head"})


def test_layers_with_hooks_stay_float_and_are_named(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    model[0].register_forward_hook(lambda module, args, out: 2 * out)
    said: list[str] = []
    result = PtqInt8().compress(model, context(noise(32, 8), tmp_path, warn=said.append))
    assert isinstance(result, fx.GraphModule)
    assert result.meta["kept_float"] == {"0": "it has hooks, which run around its product"}
    assert said[0].startswith("reaches 33.3% of the model's weights; 0.weight (Linear, 64 weights)")


@pytest.mark.parametrize(
    "bad", [{"percentile": 50}, {"percentile": 100.1}, {"range": "mean"}, {"calibration_examples": 0}, {"bits": 4}]
)
def test_impossible_parameters_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        PtqInt8(**bad)  # type: ignore[arg-type]


@pytest.mark.parametrize("hardware", [OnnxRuntime(), OpenVino()], ids=["onnxruntime", "openvino"])
def test_digits_in_integers_agree_with_the_quantized_module(
    hardware: Hardware, digits: tuple[nn.Module, Tensor, Tensor], tmp_path: Path
) -> None:
    if reason := hardware.unavailable():
        pytest.skip(reason)
    model, inputs, tests = digits
    result = PtqInt8().targeting(hardware.scheme).compress(model, context(inputs, tmp_path))
    taken, example, given = signature(SHAPE, 10), {"input": inputs[:2]}, {"input": tests.numpy()}
    floats = hardware.build(model, taken, example, tmp_path / "f32")
    artifact = hardware.build(result, taken, example, tmp_path / "int8")
    deployed = hardware.load(artifact, signature=taken, inputs=given, threads=1)
    got = answer(deployed, given)["output"]
    with torch.no_grad():
        simulated, exact = result(tests).numpy(), model(tests).numpy()
    assert deployed.effective["precision"] == "int8"
    # Kernels may round a tie the other way: a step or two of the last grid.
    assert np.abs(got - simulated).max() <= 0.05 * np.abs(simulated).max()
    assert (got.argmax(1) == simulated.argmax(1)).mean() >= 0.99
    assert (got.argmax(1) == exact.argmax(1)).mean() >= 0.98
    weights = sum(p.numel() for p in model.parameters() if p.ndim > 1)
    assert floats.stat().st_size - artifact.stat().st_size > 2.6 * weights
    assert floats.stat().st_size / artifact.stat().st_size > 3


RESNET_KERNELS = {
    "onnxruntime": (OnnxRuntime(), {"QLinearConv:int8": 21, "QLinearAdd:u8": 9, "QGemm:int8": 1}),
    "openvino": (OpenVino(), {"Convolution:int8": 21, "FullyConnected:int8": 1}),
}


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Hardware], tuple[nn.Module, Path]]:
    """The quantized ResNet-20 and its artifact, made once for each scheme."""

    @functools.cache
    def made(scheme: Scheme, build: Callable[..., Path]) -> tuple[nn.Module, Path]:
        folder, x = tmp_path_factory.mktemp("resnet20"), noise(32, 1, 28, 28)
        result = PtqInt8().targeting(scheme).compress(lively(create("resnet20", 0)), context(x, folder))
        return result, build(result, signature((1, 28, 28), 10), {"input": x[:2]}, folder)

    return lambda hardware: made(hardware.scheme, build_onnx)


@pytest.mark.parametrize("name", RESNET_KERNELS)
def test_every_convolution_of_resnet20_runs_in_integers(
    name: str, resnet: Callable[[Hardware], tuple[nn.Module, Path]]
) -> None:
    hardware, wanted = RESNET_KERNELS[name]
    if reason := hardware.unavailable():
        pytest.skip(reason)
    x = noise(32, 1, 28, 28)
    result, artifact = resnet(hardware)
    given = {"input": x[:8].numpy()}
    deployed = hardware.load(artifact, signature=signature((1, 28, 28), 10), inputs=given, threads=1)
    assert wanted.items() <= deployed.effective["kernels"].items()
    assert deployed.effective["mac_share"] == {"int8": 1.0}
    with torch.no_grad():
        expected = result(x[:8]).numpy()
    assert np.abs(answer(deployed, given)["output"] - expected).max() <= 0.1 * expected.std()
