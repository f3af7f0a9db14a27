"""What every registered method promises, as assertions on its result; and settings to try beside the defaults."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from harness.quantized import QuantizedConv2d, QuantizedLinear
from methods.weight_sharing import tied
from methods.weight_sharing.hashed_nets import HashedConv2d, HashedLinear

LAYERS = (nn.Linear, nn.Conv2d)
QUANTIZED = (QuantizedConv2d, QuantizedLinear)


def same(original: nn.Module, compressed: nn.Module, method: Any) -> None:
    for name, value in original.state_dict().items():
        assert torch.equal(compressed.state_dict()[name], value), name


def sparse(original: nn.Module, compressed: nn.Module, method: Any) -> None:
    weights = [m.weight for m in compressed.modules() if isinstance(m, LAYERS)]
    zeros, sizes = [int((w == 0).sum()) for w in weights], [w.numel() for w in weights]
    if method.scope == "layer":
        assert zeros == [round(method.sparsity * size) for size in sizes]
    else:
        assert sum(zeros) == round(method.sparsity * sum(sizes))
    assert sum(p.numel() for p in compressed.parameters()) == sum(p.numel() for p in original.parameters())


def smaller(original: nn.Module, compressed: nn.Module, method: Any) -> None:
    shrunk = 0
    for name, layer in original.named_modules():
        if isinstance(layer, LAYERS):
            rows, left = len(layer.weight), len(compressed.get_submodule(name).weight)
            assert left in (rows, round(rows * (1 - method.ratio))), name
            shrunk += left < rows
    assert shrunk > 0
    assert sum(p.numel() for p in compressed.parameters()) < sum(p.numel() for p in original.parameters())


def on_the_int8_grid(original: nn.Module, compressed: nn.Module, method: Any) -> None:
    layers = [m for m in compressed.modules() if isinstance(m, QUANTIZED)]
    assert len(layers) == sum(isinstance(m, LAYERS) for m in original.modules())
    for layer in layers:
        assert layer.weight.dtype == torch.int8
        assert layer.weight.abs().amax() <= 127
        assert layer.weight.unique().numel() > 16, "the grid is used"
        scale = layer.weight_scale.reshape(-1, *[1] * (layer.weight.ndim - 1))
        torch.testing.assert_close(layer.float_weight(), layer.weight.float() * scale, rtol=0, atol=0)


def zeros_and_sizes(model: nn.Module) -> tuple[list[int], list[int]]:
    weights = [m.weight for m in model.modules() if isinstance(m, LAYERS)]
    return [int((w == 0).sum()) for w in weights], [w.numel() for w in weights]


def trained_on(original: nn.Module, compressed: nn.Module, method: Any) -> None:
    assert zeros_and_sizes(original) == zeros_and_sizes(compressed)
    moved = [not torch.equal(v, compressed.state_dict()[n]) for n, v in original.state_dict().items() if v.ndim > 1]
    assert all(moved)


def below_threshold(original: nn.Module, compressed: nn.Module, method: Any) -> None:
    zeros, sizes = zeros_and_sizes(compressed)
    if method.sparsity is not None:
        assert zeros == [round(share * size) for share, size in zip(method.sparsity, sizes, strict=True)]
    elif method.rounds == 1:
        weights = [m.weight.detach().double() for m in original.modules() if isinstance(m, LAYERS)]
        assert zeros == [int((w.abs() < method.quality * w.std(correction=0)).sum()) for w in weights]
    else:
        assert all(0 < count < size for count, size in zip(zeros, sizes, strict=True))


def ticket(original: nn.Module, compressed: nn.Module, method: Any) -> None:
    zeros, sizes = zeros_and_sizes(compressed)
    if method.sparsity is not None:
        assert sum(zeros) == round(method.sparsity * sum(sizes))
    else:
        rates = [method.ratio] * (len(sizes) - 1) + [method.ratio / 2]
        assert zeros == [n - round(n * (1 - r) ** method.rounds) for n, r in zip(sizes, rates, strict=True)]


def sparsely_trained(original: nn.Module, compressed: nn.Module, method: Any) -> None:
    zeros, sizes = zeros_and_sizes(compressed)
    if getattr(method, "epsilon", None) is not None:
        neurons = [sum(m.weight.shape) for m in compressed.modules() if isinstance(m, LAYERS)]
        kept = [size - count for size, count in zip(sizes, zeros, strict=True)]
        assert kept == [min(n, round(method.epsilon * s)) for n, s in zip(sizes, neurons, strict=True)]
    elif getattr(method, "scope", "erk") == "layer":
        assert zeros == [round(method.sparsity * size) for size in sizes]
    else:
        assert sum(zeros) == round(method.sparsity * sum(sizes))


def sparse_at_initialisation(original: nn.Module, compressed: nn.Module, method: Any) -> None:
    weights = [m.weight for m in compressed.modules() if isinstance(m, LAYERS)]
    zeros, sizes = [int((w == 0).sum()) for w in weights], [w.numel() for w in weights]
    assert sum(zeros) == round(method.sparsity * sum(sizes))
    assert all(zero < size for zero, size in zip(zeros, sizes, strict=True)), "no layer is pruned away"


def n_of_m(original: nn.Module, compressed: nn.Module, method: Any) -> None:
    patterned = 0
    for layer in compressed.modules():
        if isinstance(layer, LAYERS) and layer.weight.shape[1] % method.m == 0:
            groups = layer.weight.flatten(2).transpose(1, 2) if layer.weight.ndim > 2 else layer.weight
            assert ((groups.reshape(-1, method.m) != 0).sum(1) == method.n).all()
            patterned += 1
    assert patterned >= 3


def sparse_rows(original: nn.Module, compressed: nn.Module, method: Any) -> None:
    if method.n is not None:
        n_of_m(original, compressed, method)
        return
    for name, layer in compressed.named_modules():
        if isinstance(layer, LAYERS):
            rows, before = layer.weight.flatten(1), original.get_submodule(name).weight.flatten(1)
            assert ((rows == 0).sum(1) == round(method.share * rows.shape[1])).all(), name
            if not method.finetune_epochs:
                assert torch.equal(rows, before * (rows != 0)), name


def sparse_layers(original: nn.Module, compressed: nn.Module, method: Any) -> None:
    if method.n is not None:
        n_of_m(original, compressed, method)
        return
    for name, layer in compressed.named_modules():
        if isinstance(layer, LAYERS):
            assert int((layer.weight == 0).sum()) == round(method.share * layer.weight.numel()), name


def clustered(original: nn.Module, compressed: nn.Module, method: Any) -> None:
    for layer in tied.layers(compressed):
        before, entries = original.get_parameter(layer.key), method.entries(layer.module)
        assert type(layer.module) in LAYERS
        assert torch.equal(layer.weight == 0, before == 0), layer.name
        for row in [layer.weight] if method.scope == "layer" else layer.weight:
            assert row[row != 0].unique().numel() == entries, layer.name
    assert sum(p.numel() for p in compressed.parameters()) == sum(p.numel() for p in original.parameters())


def hashed(original: nn.Module, compressed: nn.Module, method: Any) -> None:
    virtual = [m.weight for m in original.modules() if isinstance(m, LAYERS)]
    layers = [m for m in compressed.modules() if isinstance(m, HashedLinear | HashedConv2d)]
    assert [tuple(m.weight.shape) for m in layers] == [tuple(w.shape) for w in virtual]
    real = [max(1, round(w.numel() / method.compression)) for w in virtual]
    assert [m.real.numel() for m in layers] == real
    for layer in layers:
        assert set(layer.weight.abs().unique().tolist()) <= set(layer.real.abs().tolist())
    saved = sum(w.numel() for w in virtual) - sum(real)
    before, after = (sum(v.numel() for v in model.state_dict().values()) for model in (original, compressed))
    assert before - after == saved


def blocked(original: nn.Module, compressed: nn.Module, method: Any) -> None:
    changed = 0
    for layer in tied.layers(compressed):
        before = original.get_parameter(layer.key)
        if torch.equal(layer.weight, before):
            assert layer.name == "stem" or method.entries(layer) == 1
            continue
        changed += 1
        different = layer.weight.reshape(-1, method.width(layer)).unique(dim=0)
        assert 1 < len(different) <= method.entries(layer) <= max(method.centroids, method.linear_centroids or 0)
    assert changed >= 3


def channels_removed(original: nn.Module, compressed: nn.Module, method: Any) -> None:
    # Layers that make channels of their own in the two networks (conv2 and the stem make the residual stream).
    makers = [name for name in ("fc1", "fc2", "stem", "conv1") if hasattr(original, name)]
    before = sum(len(original.get_submodule(name).weight) for name in makers)
    left = [len(compressed.get_submodule(name).weight) for name in makers]
    if getattr(method, "target", "ratio") == "ratio":
        assert sum(left) <= round(before * (1 - method.ratio))
    assert sum(left) < before
    for name, count in zip(makers, left, strict=True):
        assert count == len(original.get_submodule(name).weight) or count % min(method.round_to, 8) == 0
    for module in compressed.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
        elif isinstance(module, nn.Linear):
            assert tuple(module.weight.shape) == (module.out_features, module.in_features)
    assert sum(p.numel() for p in compressed.parameters()) < sum(p.numel() for p in original.parameters())


EFFECTS: Mapping[str, Callable[[nn.Module, nn.Module, Any], None]] = {
    "baseline": same,
    "finetune": trained_on,
    "gradual": sparse,
    "threshold": below_threshold,
    "hashed-nets": hashed,
    "kmeans-sharing": clustered,
    "lottery-ticket": ticket,
    "magnitude": sparse,
    "network-slimming": channels_removed,
    "neuron-merging": smaller,
    "product-quantization": blocked,
    "structured": channels_removed,
    "ptq-int8": on_the_int8_grid,
    "random": sparse,
    "rigl": sparsely_trained,
    "set": sparsely_trained,
    "snip": sparse_at_initialisation,
    "grasp": sparse_at_initialisation,
    "synflow": sparse_at_initialisation,
    "n-m": n_of_m,
    "wanda": sparse_rows,
    "sparsegpt": sparse_layers,
}

VARIANTS: list[tuple[str, Mapping[str, Any]]] = [
    ("magnitude", {"sparsity": 0.8, "scope": "layer"}),
    ("magnitude", {"sparsity": 0.8, "finetune_epochs": 1}),
    ("neuron-merging", {"ratio": 0.3, "merge": False, "criterion": "geometric-median"}),
    ("neuron-merging", {"ratio": 0.7, "criterion": "l2"}),
    ("ptq-int8", {"range": "percentile"}),
    ("magnitude", {"sparsity": 0.9, "scope": "erk", "finetune_epochs": 1, "finetune_lr_scale": 0.5}),
    ("finetune", {"epochs": 2, "lr_scale": 1.0, "keep_zeros": False}),
    ("random", {"sparsity": 0.9, "scope": "erk", "finetune_epochs": 1}),
    ("threshold", {"quality": 0.7, "rounds": 2, "finetune_epochs": 1}),
    ("gradual", {"sparsity": 0.8, "scope": "global", "from_scratch": True}),
    ("gradual", {"sparsity": 0.9, "initial_sparsity": 0.3, "begin": 0.1, "end": 0.6, "frequency": 7, "epochs": 2}),
    ("lottery-ticket", {"sparsity": 0.5, "rewind_epoch": 1, "scope": "global"}),
    ("lottery-ticket", {"rounds": 2, "epochs": 1, "reinitialise": True}),
    ("set", {"epsilon": 3, "evolve_output": True, "epochs": 2}),
    ("rigl", {"sparsity": 0.8, "scope": "layer", "delta_t": 10, "epochs": 2}),
    ("snip", {"sparsity": 0.98, "epochs": 2, "examples": 50, "scope": "erk"}),
    ("grasp", {"sparsity": 0.8, "epochs": 1, "examples_per_class": 5}),
    ("synflow", {"sparsity": 0.98, "epochs": 1, "iterations": 20}),
    ("n-m", {"n": 1, "m": 8, "finetune_epochs": 1}),
    ("wanda", {"sparsity": 0.7, "examples": 64}),
    ("wanda", {"n": 2, "m": 4, "finetune_epochs": 1}),
    ("sparsegpt", {"sparsity": 0.9, "block": 16, "finetune_epochs": 1}),
    ("sparsegpt", {"n": 2, "m": 4}),
    ("kmeans-sharing", {"bits": 3, "scope": "channel", "init": "exact"}),
    ("kmeans-sharing", {"clusters": 6, "init": "density", "finetune_epochs": 1}),
    ("hashed-nets", {"compression": 3, "from_scratch": False, "finetune_epochs": 1}),
    ("product-quantization", {"centroids": 8, "large_block": True, "finetune_epochs": 1}),
    ("product-quantization", {"centroids": 16, "activation_aware": False, "quantize_first": True}),
    ("product-quantization", {"moments": "position", "layer_epochs": 1, "calibration": 64}),
    ("structured", {"ratio": 0.4, "scope": "layer", "criterion": "taylor", "round_to": 1}),
    (
        "structured",
        {"ratio": 0.5, "target": "macs", "criterion": "geometric-median", "round_to": 4, "finetune_epochs": 1},
    ),
    ("structured", {"ratio": 0.3, "target": "params", "criterion": "random", "round_to": 1}),
    ("network-slimming", {"ratio": 0.3, "from_scratch": True, "sparse_epochs": 2}),
    ("structured", {"target": "macs", "criterion": "taylor", "finetune_epochs": 1}),
    ("structured", {"scope": "layer", "criterion": "geometric-median"}),
    ("structured", {"merge": True, "merge_threshold": 0.1, "ratio": 0.4, "scope": "layer", "round_to": 1}),
    ("structured", {"target": "params", "criterion": "l2", "round_to": 1, "recalibrate": False}),
]
