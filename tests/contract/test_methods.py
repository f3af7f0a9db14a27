"""Every registered method on every reference network keeps the contract and its promise, or says why not."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import pytest

import methods
from harness import registry
from harness.testing import check_method
from harness.testing.networks import NAMES

_NO_BATCH_NORM = 'criterion "bn-gamma": no channel that could be removed passes a batch normalisation'

GAPS: Mapping[tuple[str, str], str] = {
    ("network-slimming", "perceptron"): _NO_BATCH_NORM,
    ("network-slimming", "tokens"): _NO_BATCH_NORM,
    (
        "snip",
        "tokens",
    ): "sparsity 0.9 (global) would zero all 1024 weights of layer 'attention.query'; lower it or use scope=\"erk\"",
}
"""Pairs of method and network that do not go together, with the reason: a gap that closes, or another, fails."""

SHORT: Mapping[str, Mapping[str, Any]] = {
    "lottery-ticket": {"rounds": 1, "epochs": 1},
    **{name: {"epochs": 1, "sparsity": 0.8} for name in ("gradual", "set", "rigl")},
    **{name: {"epochs": 1} for name in ("grasp", "synflow", "snip", "hashed-nets")},
}
"""Short trainings for methods that train: defaults run in the nightly sweep."""

STRUCTURAL = ("baseline", "hashed-nets", "neuron-merging", "structured", "ptq-int8")
"""Methods after which a network has other layers; all others leave the baseline's, with other numbers in them."""

VARIANTS: list[tuple[str, Mapping[str, Any]]] = [
    ("magnitude", {"sparsity": 0.8, "scope": "layer"}),
    ("magnitude", {"sparsity": 0.8, "finetune_epochs": 1}),
    ("neuron-merging", {"ratio": 0.3, "merge": False, "criterion": "geometric-median"}),
    ("neuron-merging", {"ratio": 0.7, "criterion": "l2"}),
    ("ptq-int8", {"range": "percentile"}),
    ("ptq-int8", {"activation": "s8", "activation_symmetric": True, "weight_per_channel": False}),
    ("ptq-int8", {"quantized_bias": False}),
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
    ("snip", {"sparsity": 0.9, "epochs": 2, "examples": 50, "scope": "erk"}),
    ("grasp", {"sparsity": 0.8, "epochs": 1, "examples_per_class": 5}),
    ("synflow", {"sparsity": 0.95, "epochs": 1, "iterations": 20}),
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
    ("structured", {"target": "macs", "criterion": "geometric-median", "round_to": 4, "finetune_epochs": 1}),
    ("structured", {"ratio": 0.3, "target": "params", "criterion": "random", "round_to": 1}),
    ("network-slimming", {"ratio": 0.3, "from_scratch": True, "sparse_epochs": 2}),
    ("structured", {"target": "macs", "criterion": "taylor", "finetune_epochs": 1}),
    ("structured", {"scope": "layer", "criterion": "geometric-median"}),
    ("structured", {"merge": True, "merge_threshold": 0.1, "ratio": 0.4, "scope": "layer", "round_to": 1}),
    ("structured", {"target": "params", "criterion": "l2", "round_to": 1, "recalibrate": False}),
]
"""Other settings than the defaults."""

SAMPLE = random.Random(8).sample([(*variant, network) for variant in VARIANTS for network in NAMES], 16)
"""Settings and networks that every run tries; the nightly one tries them all."""


@pytest.mark.parametrize("network", NAMES)
def test_every_method_keeps_the_contract_on_every_network(method_name: str, network: str) -> None:
    deploy = method_name in STRUCTURAL
    coverage = check_method(method_name, SHORT.get(method_name), networks=[network], deploy=deploy)
    gaps = {pair: reason for pair, reason in GAPS.items() if pair == (method_name, network)}
    assert {(method_name, name): reason for name, reason in coverage.skipped.items()} == gaps


@pytest.mark.nightly
@pytest.mark.parametrize("network", NAMES)
def test_with_its_defaults_too_and_on_every_runtime(method_name: str, network: str) -> None:
    coverage = check_method(method_name, networks=[network])
    assert bool(coverage.skipped) == ((method_name, network) in GAPS)


@pytest.mark.parametrize(("name", "parameters", "network"), SAMPLE, ids=str)
def test_other_settings_keep_it_too(name: str, parameters: Mapping[str, Any], network: str) -> None:
    check_method(name, parameters, networks=[network], deploy=False)


@pytest.mark.nightly
@pytest.mark.parametrize("network", NAMES)
@pytest.mark.parametrize(("name", "parameters"), VARIANTS, ids=str)
def test_all_other_settings_keep_it_too(name: str, parameters: Mapping[str, Any], network: str) -> None:
    check_method(name, parameters, networks=[network], deploy=False)


def test_no_method_is_left_out() -> None:
    assert set(methods.TABLE) <= set(registry.table("method"))
    assert len(methods.TABLE) >= 22
    assert {name for name, _ in VARIANTS} >= set(methods.TABLE) - {"baseline"}


def test_every_method_makes_a_promise() -> None:
    without = [name for name in methods.TABLE if not hasattr(registry.resolve("method", name), "promises")]
    assert without == []
