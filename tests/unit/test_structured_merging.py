"""Structured pruning with merging: removed neurons live on in similar ones, wherever a scale passes through."""

from __future__ import annotations

import copy
import itertools
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness import registry
from harness.errors import SpecError, Unsupported
from harness.tasks import models
from harness.tasks.classes import signature
from harness.testing.networks import reference
from methods.pruning.neuron_merging import NeuronMerging
from methods.pruning.structure import merging
from methods.pruning.structure.find import find
from methods.pruning.structure.links import find_links
from methods.pruning.structure.surgery import masked, remove
from methods.pruning.structured import Structured
from tests.unit.contexts import bare, images, refusal

EVENLY: dict[str, Any] = {"scope": "layer", "round_to": 1, "merge": True}
DEFAULTS: dict[str, Any] = {"threshold": 0.45, "cosine_weight": 0.85}


pytestmark = pytest.mark.usefixtures("one_thread")


def stack(*, normalised: bool, seed: int = 0, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Two convolutions, flattened into two linear layers; float64, normalisations that do something."""
    torch.manual_seed(seed)

    def norm(width: int) -> list[nn.Module]:
        return [nn.BatchNorm2d(width)] if normalised else []

    model = nn.Sequential(
        *(nn.Conv2d(1, 8, 3), *norm(8), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(8, 12, 2, bias=False), *norm(12), activation()),
        *(nn.Flatten(), nn.Linear(48, 20), nn.ReLU(), nn.Linear(20, 5)),
    )
    for module in model:
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(values, 0.5, 1.5)
    return model.double().eval()


def layers_of(model: nn.Sequential) -> list[tuple[Any, Any, int]]:
    """Each layer with the normalisation after it, and the columns that read one of its neurons; not the last one."""
    modules = list(model)
    found = [(m, n if isinstance(n, nn.BatchNorm2d) else None) for m, n in itertools.pairwise(modules)]
    parts = [(m, norm) for m, norm in found if isinstance(m, nn.Conv2d | nn.Linear)] + [(modules[-1], None)]
    return [
        (m, norm, following.weight.shape[1] // len(m.weight)) for (m, norm), (following, _) in itertools.pairwise(parts)
    ]


def with_copies(model: nn.Sequential) -> nn.Sequential:
    """Half of every layer's neurons become positive multiples of the other half, and little is read of them."""
    generator = torch.Generator().manual_seed(2)
    layers = layers_of(model)
    readers = [*(layer for layer, _, _ in layers[1:]), model[-1]]
    with torch.no_grad():
        for (layer, _, columns), reader in zip(layers, readers, strict=True):
            reader.weight[:, len(layer.weight) // 2 * columns :] *= 0.3
        for layer, norm, _ in layers:
            half = len(layer.weight) // 2
            s = torch.rand(half, dtype=torch.float64, generator=generator) * 0.3 + 0.1
            layer.weight[half:] = torch.einsum("n,n...->n...", s, layer.weight[:half])
            bias = torch.zeros(2 * half, dtype=torch.float64) if layer.bias is None else layer.bias
            if norm is None:
                bias[half:] = s * bias[:half]
                continue
            # Means in the filters' ratio, and shifts in that of the outputs: the offset that is left is 0.
            norm.running_mean[half:] = s * (norm.running_mean[:half] - bias[:half]) + bias[half:]
            slope = norm.weight / (norm.running_var + norm.eps).sqrt()
            norm.bias[half:] = s * slope[half:] / slope[:half] * norm.bias[:half]
    return model


@pytest.mark.parametrize("normalised", [False, True])
def test_multiples_of_other_neurons_are_removed_without_loss(normalised: bool) -> None:
    model = with_copies(stack(normalised=normalised))
    messages: list[str] = []
    given = bare(1, 8, 8, progress=lambda _, text: messages.append(text))
    x = torch.randn(16, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    merged = Structured(**EVENLY, ratio=0.5).compress(model, given)
    dropped = Structured(scope="layer", round_to=1, ratio=0.5).compress(model, given)
    with torch.no_grad():
        before = model(x)
        assert (merged(x) - before).abs().max() <= 1e-10
        assert (dropped(x) - before).abs().max() > 1e-3
    sizes = [4, 6, 10]
    assert [len(layer.weight) for layer, _, _ in layers_of(merged)] == sizes
    names = [link.producer for link in find_links(model)[0]]
    told = ", ".join(f"{name} {size} of {size}" for name, size in zip(names, sizes, strict=True))
    assert f"; merged: {told}" in messages[0]


def by_hand(
    model: nn.Sequential, kept: list[list[int]], threshold: float, cosine_weight: float
) -> tuple[list[np.ndarray[Any, Any]], int]:
    """The weights of all layers after merging and removing, one neuron at a time, and how many were merged."""
    layers = layers_of(model)
    weights = [layer.weight.detach().numpy() for layer, _, _ in layers] + [model[-1].weight.detach().numpy()]
    results = [weight.copy() for weight in weights]
    count = 0
    for index, ((layer, norm, columns), stays) in enumerate(zip(layers, kept, strict=True)):
        rows = weights[index].reshape(len(weights[index]), -1)
        bias = np.zeros(len(rows)) if layer.bias is None else layer.bias.detach().numpy()
        if norm is None and layer.bias is not None:
            rows = np.column_stack([rows, bias])
        outgoing, target = weights[index + 1], results[index + 1]
        for i in sorted(set(range(len(rows))) - set(stays)):
            cosines, scales, offsets = [], [], []
            for j in stays:
                ratio = np.linalg.norm(rows[i]) / np.linalg.norm(rows[j])
                cosines.append(rows[i] @ rows[j] / (np.linalg.norm(rows[i]) * np.linalg.norm(rows[j])))
                if norm is None:
                    scales.append(ratio)
                    offsets.append(0.0)
                    continue
                gamma, beta, mean, variance = (
                    values.detach().numpy() for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var)
                )
                a = gamma / np.sqrt(variance + norm.eps)
                # y_i = a_i (z_i + b_i - mean_i) + beta_i with z_i = ratio z_j, in terms of y_j.
                scales.append(ratio * a[i] / a[j])
                at_zero = -(beta[j] / a[j]) + mean[j] - bias[j]  # the z_j at which y_j is 0
                offsets.append(a[i] * (ratio * at_zero + bias[i] - mean[i]) + beta[i])
            scores = 1 - np.array(cosines)
            if norm is not None:
                errors = np.abs(offsets) / np.array(scales)
                errors = (errors - errors.min()) / (errors.max() - errors.min())
                scores = cosine_weight * scores + (1 - cosine_weight) * errors
            best = int(np.argmin(scores))
            if cosines[best] >= threshold:
                count += 1
                for c in range(columns):
                    target[:, stays[best] * columns + c] += scales[best] * outgoing[:, i * columns + c]
    for index, stays in enumerate(kept):
        columns = layers[index][2]
        results[index] = results[index][stays]
        results[index + 1] = results[index + 1][:, [j * columns + c for j in stays for c in range(columns)]]
    return results, count


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize(("threshold", "cosine_weight"), [(0.45, 0.85), (-1.0, 0.3), (0.2, 1.0)])
def test_it_merges_as_by_hand(normalised: bool, threshold: float, cosine_weight: float) -> None:
    model = stack(normalised=normalised, seed=3)
    method = Structured(**EVENLY, ratio=0.4, merge_threshold=threshold, merge_cosine_weight=cosine_weight)
    structure, plan = method.plan(model, bare(1, 8, 8))
    gone = structure.removed(plan.units)
    names = [link.producer for link in find_links(model)[0]]
    kept = [structure.kept(f"{name}.weight", 0, gone).tolist() for name in names]
    assert [len(stays) for stays in kept] == [5, 7, 12]
    expected, count = by_hand(model, kept, threshold, cosine_weight)
    assert count == 16 if threshold == -1 else 0 < count < 16
    smaller = method.compress(model, bare(1, 8, 8))
    found = [layer.weight.detach().numpy() for layer in smaller if isinstance(layer, nn.Conv2d | nn.Linear)]
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def lively_resnet() -> nn.Module:
    torch.manual_seed(0)
    model = models.create("resnet20", 0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(values, 0.5, 1.5)
    return model.double().eval()


@pytest.mark.parametrize("name", ["lenet5-caffe", "resnet20"])
def test_with_the_same_neurons_it_is_neuron_merging(name: str) -> None:
    model = lively_resnet() if name == "resnet20" else models.create(name, 0)
    method = NeuronMerging(ratio=0.4, criterion="geometric-median", threshold=0.1, cosine_weight=0.7)
    structure = find(model, signature((1, 28, 28), 10))
    layers = {layer.name: layer for layer in structure.layers}
    units = []
    for link in find_links(model)[0]:
        kept, _ = method._decompose(model, link)
        units += [unit for index, unit in enumerate(layers[link.producer].units) if index not in kept.tolist()]
    ready, _ = merging.merge(model, structure, units, threshold=0.1, cosine_weight=0.7)
    found = remove(ready, structure, units).state_dict()
    expected = method.compress(model, bare(1, 28, 28)).state_dict()
    assert list(found) == list(expected)
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


def test_the_shrunken_model_equals_the_masked_one() -> None:
    """Whatever goes, streams and readers included: merging and removing is merging and silencing."""
    model = lively_resnet()
    before = copy.deepcopy(model.state_dict())
    structure = find(model, signature((1, 28, 28), 10))
    chosen = random.Random(0)
    units = [unit for layer in structure.layers for unit in chosen.sample(layer.units, len(layer.units) // 2)]
    ready, layers = merging.merge(model, structure, units, threshold=0.1, cosine_weight=0.85)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert [part.layer for part in layers] == [f"stage{s}.{b}.conv1" for s in (1, 2, 3) for b in range(3)]
    assert all(part.removed in (8, 16, 32) and 0 < part.merged <= part.removed for part in layers)
    smaller = remove(ready, structure, units)
    x = torch.randn(3, 1, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found, expected = smaller(x), masked(ready, structure, units)(x)
        dropped = masked(model, structure, units)(x)
    scale = expected.abs().max()
    assert (found - expected).abs().max() < 1e-10 * scale
    assert (dropped - expected).abs().max() > 1e-3 * scale
    # Only readers of the merged layers were edited.
    changed = {name for name, value in ready.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"stage{s}.{b}.conv2.weight" for s in (1, 2, 3) for b in range(3)}


def test_layers_to_which_it_does_not_apply_are_just_smaller() -> None:
    """GELU after the second convolution: that one's neurons are dropped, the others' merged."""
    model = stack(normalised=False, activation=nn.GELU)
    messages: list[str] = []
    given = bare(1, 8, 8, progress=lambda _, text: messages.append(text))
    merged = Structured(**EVENLY, merge_threshold=-1).compress(model, given)
    dropped = Structured(scope="layer", round_to=1).compress(model, given)
    assert "; merged: 0 4 of 4, 6 10 of 10" in messages[0]
    assert "merged" not in messages[-1]
    same = {name for name, value in dropped.state_dict().items() if torch.equal(merged.state_dict()[name], value)}
    assert same == {"0.weight", "0.bias", "6.weight", "6.bias", "8.bias"}


def test_without_it_channels_are_dropped_to_the_byte() -> None:
    model = models.create("resnet20", 0).eval()
    structure, plan = Structured().plan(model, bare(1, 28, 28))
    dropped = remove(model, structure, plan.units).state_dict()
    default = Structured().compress(model, bare(1, 28, 28)).state_dict()
    merged = Structured(merge=True, merge_threshold=0.1).compress(model, bare(1, 28, 28)).state_dict()
    assert all(torch.equal(value, default[name]) for name, value in dropped.items())
    assert {name: value.shape for name, value in merged.items()} == {name: v.shape for name, v in dropped.items()}
    assert any(not torch.equal(value, merged[name]) for name, value in dropped.items())


def test_merging_keeps_more_of_what_was_learned() -> None:
    """A trained perceptron without fine-tuning: closer to its logits than by dropping the same neurons."""
    given = reference("perceptron")
    x = images(given, 360)
    changes = []
    for merge in (False, True):
        method = Structured(scope="layer", round_to=1, ratio=0.4, merge=merge)
        with torch.no_grad():
            smaller = method.compress(given.model, bare(1, 8, 8))
            changes.append(float((smaller(x) - given.model(x)).square().mean()))
    dropped, merged = changes
    assert merged < 0.8 * dropped


class Conditional(nn.Module):
    """Asks for the size of a batch, which a symbolic trace does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x))) if len(x) else x


@pytest.mark.parametrize(
    ("model", "shape", "reason"),
    [
        (models.create("vit-tiny", 0), (1, 28, 28), "(blocks.0.fc1: gelu follows, through which no scale passes; "),
        (
            models.create("mobilenet-tiny", 0),
            (1, 28, 28),
            "merge=true: no removed channel can be merged into another one; merge=false drops them all "
            "(blocks.6.pointwise: relu6 follows, through which no scale passes; "
            "conv1: blocks.0.depthwise is a grouped convolution; ",
        ),
        (
            nn.Sequential(nn.Linear(6, 32), nn.Sigmoid(), nn.Linear(32, 4)),
            (6,),
            "merge=true: no removed channel can be merged into another one; merge=false drops them all "
            "(0: Sigmoid follows, through which no scale passes)",
        ),
        (Conditional(), (4,), "merge=true: the forward pass cannot be traced symbolically (RuntimeError: "),
        (Conditional(), (4,), "merge=false does not trace"),
    ],
)
def test_unsupported_names_the_layers_and_the_remedy(model: nn.Module, shape: tuple[int, ...], reason: str) -> None:
    found = str(refusal(Structured(merge=True), model.eval(), bare(*shape)))
    assert reason in found
    with pytest.raises(Unsupported) as raised:
        Structured(merge=True).compress(model, bare(*shape))
    assert str(raised.value) == found
    assert refusal(Structured(), model, bare(*shape)) is None


def test_where_nothing_is_removed_there_is_nothing_to_merge() -> None:
    model = models.create("vit-tiny", 0).eval()
    method = Structured(merge=True, ratio=0.0)
    assert refusal(method, model, bare(1, 28, 28)) is None
    same = method.compress(model, bare(1, 28, 28)).state_dict()
    assert all(torch.equal(value, same[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"merge_threshold": 1.5}, r"merge_threshold: .*less than or equal to 1 \(got 1.5\)"),
        ({"merge_cosine_weight": -0.1}, "greater than or equal to 0"),
        ({"merged": True}, "Did you mean 'merge'"),
    ],
)
def test_bad_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        registry.create("method", "structured", values)
