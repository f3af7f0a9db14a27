"""Product quantization: blocks, output error, sequence, empty clusters, codebooks that are fine-tuned."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness import modelfile
from harness.errors import Unsupported
from harness.testing.networks import reference
from methods.pruning.magnitude import Magnitude
from methods.weight_sharing import product_quantization, tied
from methods.weight_sharing.product_quantization import ProductQuantization
from methods.weight_sharing.tied import Layer
from tests.unit.contexts import images, labelled, refusal

pytestmark = pytest.mark.usefixtures("one_thread")


def one(module: nn.Module) -> Layer:
    (found,) = tied.layers(module)
    return found


def blocks(weight: torch.Tensor, width: int) -> torch.Tensor:
    return weight.detach().reshape(-1, width)


@pytest.mark.parametrize(
    ("module", "settings", "width", "entries"),
    [
        (nn.Conv2d(16, 64, 3), {}, 9, 256),
        (nn.Conv2d(16, 64, 3), {"large_block": True}, 18, 128),
        (nn.Conv2d(15, 64, 3), {"large_block": True}, 9, 128),  # 15 channels are not pairs; 960 blocks / 4 = 240
        (nn.Conv2d(64, 64, 1), {}, 4, 256),
        (nn.Conv2d(64, 64, 1), {"large_block": True}, 8, 128),
        (nn.Conv2d(8, 8, 3, groups=8), {}, 9, 2),
        (nn.Linear(784, 300), {}, 4, 256),
        (nn.Linear(784, 300), {"linear_centroids": 2048}, 4, 2048),
        (nn.Linear(10, 10), {}, 2, 8),  # 4 does not divide 10
        (nn.Linear(4, 4), {}, 4, 1),
    ],
)
def test_blocks_and_codebook_sizes(module: nn.Module, settings: dict[str, Any], width: int, entries: int) -> None:
    method = ProductQuantization(**settings)
    assert method.width(one(module)) == width
    assert method.entries(one(module)) == entries


@pytest.mark.parametrize(
    "settings", [{}, {"large_block": True}, {"activation_aware": False}, {"moments": "position"}], ids=str
)
@pytest.mark.parametrize("name", ["perceptron", "residual"])
def test_layers_hold_at_most_their_codebook(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    given = reference(name)
    method = ProductQuantization(centroids=16, calibration=64, **settings)
    quantized = method.compress(given.model, given.context(scratch=tmp_path))
    for layer in tied.layers(quantized):
        original = given.model.get_parameter(layer.key)
        if layer.name == "stem":
            assert torch.equal(layer.weight, original), "the first k x k convolution stays"
            continue
        different = len(blocks(layer.weight, method.width(layer)).unique(dim=0))
        assert different == method.entries(layer), layer.name
        assert not torch.equal(layer.weight, original)
    first = ProductQuantization(centroids=16, calibration=64, quantize_first=True)
    stem = first.compress(given.model, given.context(scratch=tmp_path)).get_submodule(tied.layers(given.model)[0].name)
    assert len(blocks(one(stem).weight, first.width(one(stem))).unique(dim=0)) == first.entries(one(stem))


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(12, 5), (7, 3, 12)),
        (nn.Conv2d(4, 6, 3, padding=1, stride=2), (7, 4, 9, 9)),
        (nn.Conv2d(4, 8, 3, padding="same", dilation=2, groups=2, padding_mode="circular"), (3, 4, 8, 8)),
        (nn.Conv2d(8, 6, 1), (3, 8, 5, 5)),
    ],
)
def test_blocks_of_inputs_are_what_blocks_of_weights_meet(module: nn.Module, shape: tuple[int, ...]) -> None:
    """Summed over a row's blocks, input blocks times weight blocks are the layer's outputs."""
    torch.manual_seed(0)
    layer, x = one(module), torch.randn(*shape)
    width = ProductQuantization().width(layer)
    weight = layer.weight.detach()
    groups = getattr(module, "groups", 1)
    inputs = product_quantization._blocks(module, x, width)
    per_row = weight[0].numel() // width
    inputs = inputs.reshape(-1, groups, per_row, width)
    rows = weight.reshape(groups, len(weight) // groups, per_row, width)
    found = torch.einsum("pgbw,gobw->pgo", inputs, rows).reshape(-1, len(weight))
    expected = module(x) if groups else None
    assert expected is not None
    bias = module.bias
    assert isinstance(bias, torch.Tensor)
    expected = (expected.movedim(1, -1) if x.ndim == 4 else expected).reshape(-1, len(weight)) - bias
    torch.testing.assert_close(found, expected.detach(), rtol=1e-4, atol=1e-4)


def test_the_second_moments_are_those_of_the_inputs(tmp_path: Path) -> None:
    given = reference("perceptron")
    method = ProductQuantization(calibration=50)
    layer = tied.layers(given.model)[0]
    found = method._second_moments(given.model, layer, 4, given.context(scratch=tmp_path))
    batches = [x for x, _ in itertools.islice(labelled(given, 32, "train", seed=0), 2)]
    x = torch.cat(batches)[:50].flatten(1).reshape(-1, 4).double()
    torch.testing.assert_close(found, (x.T @ x / len(x))[None])


def test_clusters_are_optimal_in_the_output_metric_for_few_blocks() -> None:
    """Against all partitions of 7 blocks into 2, in float64: the minimum of sum (b - c)' G (b - c)."""
    generator = torch.Generator().manual_seed(3)
    layer = one(nn.Linear(4, 7, bias=False))
    half = torch.randn(4, 4, generator=generator, dtype=torch.float64) * torch.tensor([3.0, 1.0, 0.1, 0.0])
    metric = half.T @ half  # of rank 3
    points = layer.weight.detach().double()

    def cost(assigned: tuple[int, ...]) -> float:
        total = 0.0
        for entry in set(assigned):
            own = points[torch.tensor([a == entry for a in assigned])]
            rest = own - own.mean(0)
            total += float((rest @ metric * rest).sum())
        return total

    best = min(cost(assigned) for assigned in itertools.product((0, 1), repeat=7))
    scale = float((points @ metric * points).sum())

    class Two(ProductQuantization):
        def entries(self, layer: Layer) -> int:
            return 2

    # Lloyd's algorithm finds a local optimum: the best of several starts is the global one.
    errors = [Two()._quantize(layer, metric[None], generator.manual_seed(seed))[1] for seed in range(20)]
    assert min(errors) * scale == pytest.approx(best, rel=1e-5)
    assert min(errors) * scale >= best * (1 - 1e-5)


@pytest.mark.parametrize("moments", ["pooled", "position"])
def test_awareness_lowers_the_error_that_it_is_about(moments: Any, tmp_path: Path) -> None:
    """In float64 and on inputs that were not sampled: what a block does to its own inputs."""
    given = reference("perceptron")
    layer = tied.layers(given.model)[0]
    x = torch.cat([x for x, _ in labelled(given, 200)]).flatten(1).double()
    inputs = x.view(-1, 16, 4)
    errors, plain = {}, {}
    for aware in (True, False):
        method = ProductQuantization(centroids=32, activation_aware=aware, moments=moments)
        weight = method.compress(given.model, given.context(scratch=tmp_path)).get_parameter(layer.key)
        rest = (weight - layer.weight).detach().double().view(-1, 16, 4)
        if moments == "pooled":
            errors[aware] = float(torch.einsum("npd,obd->npob", inputs[:100], rest).square().mean())
        else:
            errors[aware] = float(torch.einsum("npd,opd->nop", inputs, rest).square().mean())
        plain[aware] = float(rest.square().mean())
    assert errors[True] < 0.97 * errors[False]
    assert plain[True] > plain[False], "at the cost of the error of the weights"


@pytest.mark.parametrize("groups", [1, 2])
def test_a_position_has_its_own_metric(groups: int) -> None:
    """Assignments, entries and errors against loops over blocks, in float64."""
    torch.manual_seed(0)
    module = nn.Conv2d(4, 6, 3, groups=groups)
    half = torch.randn(4, 9, 9, dtype=torch.float64)
    metric = half.transpose(1, 2) @ half  # for the four input channels
    problem = product_quantization._Problem(module.weight.detach(), metric, groups)
    per_row = 4 // groups
    metrics = [metric[(row // (6 // groups)) * per_row + column] for row in range(6) for column in range(per_row)]
    centres = torch.randn(3, 9, dtype=torch.float64) * 0.2
    costs = torch.stack(
        [torch.stack([(b - c) @ g @ (b - c) for c in centres]) for b, g in zip(problem.blocks, metrics, strict=True)]
    )
    index = problem.nearest(centres)
    assert index.tolist() == costs.argmin(1).tolist()
    torch.testing.assert_close(problem.error(centres, index), costs.amin(1))
    torch.testing.assert_close(
        problem.energy(), sum((b @ g @ b for b, g in zip(problem.blocks, metrics, strict=True)), torch.zeros(()))
    )
    index = torch.arange(len(problem.blocks)) % 3
    for entry, centre in enumerate(problem.centres(index, 3)):
        own = [(b, g) for b, g, i in zip(problem.blocks, metrics, index.tolist(), strict=True) if i == entry]
        expected = torch.linalg.solve(sum(g for _, g in own), sum(g @ b for b, g in own))
        torch.testing.assert_close(centre, expected, rtol=1e-6, atol=1e-8)


def test_later_layers_see_the_quantized_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = reference("perceptron")
    seen: dict[str, nn.Module] = {}
    real = ProductQuantization._second_moments

    def spy(self: ProductQuantization, network: nn.Module, layer: Layer, *rest: Any) -> torch.Tensor:
        seen[layer.name] = copy.deepcopy(network)
        return real(self, network, layer, *rest)

    monkeypatch.setattr(ProductQuantization, "_second_moments", spy)
    quantized = ProductQuantization(centroids=8, calibration=64).compress(given.model, given.context(scratch=tmp_path))
    for now, name in enumerate(("fc1", "fc2", "fc3")):
        for other, key in enumerate(("fc1.weight", "fc2.weight", "fc3.weight")):
            source = quantized if other < now else given.model
            assert torch.equal(seen[name].get_parameter(key), source.get_parameter(key))


def test_a_pruned_layer_has_its_zero_block_and_no_empty_entry(tmp_path: Path) -> None:
    given = reference("perceptron")
    pruned = Magnitude(sparsity=0.9).compress(given.model, given.context(scratch=tmp_path))
    method = ProductQuantization(centroids=64, activation_aware=False)
    quantized = method.compress(pruned, given.context(scratch=tmp_path))
    for layer in tied.layers(quantized):
        width = method.width(layer)
        before = blocks(pruned.get_parameter(layer.key), width).unique(dim=0)
        after = blocks(layer.weight, width).unique(dim=0)
        assert len(after) <= min(method.entries(layer), len(before))
    assert torch.isfinite(quantized(images(given, 5))).all()


def test_empty_clusters_are_filled() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(200, 3, generator=generator, dtype=torch.float64)
    starts = torch.cat([points[:2], torch.full((6, 3), 1e6, dtype=torch.float64)])
    problem = product_quantization._Problem(points, torch.eye(3, dtype=torch.float64)[None], 1)
    index = product_quantization._cluster(problem, starts, 50, generator)
    assert index.unique().numel() == 8


def test_fine_tuning_moves_codebooks_only(tmp_path: Path) -> None:
    given = reference("residual")
    settings: dict[str, Any] = {"centroids": 8, "calibration": 64}
    plain = ProductQuantization(**settings).compress(given.model, given.context(scratch=tmp_path))
    tuned = ProductQuantization(**settings, finetune_epochs=2).compress(given.model, given.context(scratch=tmp_path))
    method = ProductQuantization(**settings)
    quantized = {layer.key: layer for layer in tied.layers(plain) if layer.name != "stem"}
    for key, value in tuned.named_parameters():
        before = plain.get_parameter(key)
        assert value.requires_grad
        if key not in quantized:
            assert torch.equal(value, before), "biases, normalisation and the first layer stay"
            continue
        width = method.width(quantized[key])
        pairs = torch.cat([blocks(before, width), blocks(value, width)], 1).unique(dim=0)
        assert len(pairs) == len(blocks(value, width).unique(dim=0)) == len(blocks(before, width).unique(dim=0))
        assert not torch.equal(value, before)
    assert not torch.equal(tuned.get_buffer("bn1.running_mean"), plain.get_buffer("bn1.running_mean"))

    x = images(given, 300)

    def divergence(model: nn.Module) -> float:
        with torch.no_grad():
            expected, found = given.model(x).log_softmax(1), model.eval()(x).log_softmax(1)
        return float((expected.exp() * (expected - found)).sum(1).mean())

    assert divergence(tuned) < divergence(plain)


def test_layer_by_layer_tuning_helps_the_later_layers(tmp_path: Path) -> None:
    given = reference("perceptron")
    x = images(given, 300)
    expected = given.model(x).log_softmax(1).detach()

    def divergence(**settings: Any) -> float:
        method = ProductQuantization(centroids=4, calibration=64, **settings)
        found = method.compress(given.model, given.context(scratch=tmp_path)).eval()(x).log_softmax(1).detach()
        return float((expected.exp() * (expected - found)).sum(1).mean())

    assert divergence(layer_epochs=2) < divergence()


def test_the_model_survives_its_file(tmp_path: Path) -> None:
    given = reference("residual")
    method = ProductQuantization(centroids=8, calibration=64, finetune_epochs=1)
    quantized = method.compress(given.model, given.context(scratch=tmp_path))
    again = modelfile.load(modelfile.save(quantized, tmp_path / "model"))
    torch.testing.assert_close(again(images(given, 3)), quantized(images(given, 3)), rtol=0, atol=0)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, kdim=8, vdim=8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.inner(x.reshape(len(x), 4, 16))
        out: torch.Tensor = self.attention(x, x[..., :8], x[..., :8])[0]
        return out


class Idle(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(64, 16)
        self.idle = nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.used(x.flatten(1))
        return out


@pytest.mark.parametrize(
    ("model", "settings", "changes", "reason"),
    [
        (nn.ReLU(), {}, {}, "no convolution or linear layer"),
        (nn.Conv1d(16, 16, 3), {}, {}, "layer 'model' is a Conv1d"),
        (nn.Linear(4, 4), {}, {}, "8 blocks.*layer 'model' has 4"),
        (Attending(), {}, {}, "attention.out_proj. are not known .attention with separate.*activation_aware=False"),
        (Idle(), {}, {}, "layer 'idle' are not known .the model does not call it.; use activation_aware=False"),
        (None, {}, {"data": {}}, "activation_aware=True needs"),
        (None, {"finetune_epochs": 1}, {"training": None}, "finetune_epochs=1 needs"),
        (None, {"layer_epochs": 3}, {"recipe": None}, "layer_epochs=3 needs"),
    ],
)
def test_what_cannot_be_quantized_is_refused(
    model: nn.Module | None, settings: dict[str, Any], changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    given = reference("perceptron")
    with pytest.raises(Unsupported, match=reason):
        ProductQuantization(**settings).compress(model or given.model, given.context(scratch=tmp_path, **changes))


def test_no_data_is_needed_without_activations(tmp_path: Path) -> None:
    given = reference("perceptron")
    nothing = given.context(scratch=tmp_path, data={}, training=None)
    method = ProductQuantization(activation_aware=False)
    assert refusal(method, given.model, nothing) is None
    assert refusal(method, Attending(), nothing) is None
    assert not torch.equal(method.compress(given.model, nothing).get_parameter("fc1.weight"), given.model.fc1.weight)
