"""Structured pruning on every built-in network and on ten of torchvision: is it the same function, and is it faster?

For each network, with random weights: half of the multiply-accumulates are removed (``structured``, target "macs"),
and the outputs of the shrunken model are compared with those of the masked one
(:func:`methods.pruning.structure.surgery.masked`: zeroed parameters; layer normalisations over the channels that stay).
Both models are exported, and the latency of dense and pruned is measured in ONNX Runtime and OpenVINO, in alternating
blocks of random order, one thread, batch 1. The speed-up is the median over the pairs of blocks.

Measured on a 2-core x86 server CPU with AVX-512 that other work shared (ratios hold, milliseconds drift), images of
64x64 for torchvision's networks; "error" is the largest difference between shrunken and masked outputs, relative to the
largest output. Smallest block medians, dense -> pruned, and the median ratio of paired blocks::

    network                error MACs left  ONNX Runtime, ms          OpenVINO, ms
    digits-cnn           0.0e+00     50.0%  0.013 -> 0.011 (1.09x)    0.021 -> 0.019 (1.11x)
    lenet-300-100        1.4e-07     48.2%  0.017 -> 0.010 (1.67x)    0.023 -> 0.015 (1.51x)
    lenet5-caffe         2.7e-07     49.9%  0.105 -> 0.055 (1.94x)    0.106 -> 0.072 (1.51x)
    resnet20             1.7e-07     48.4%  0.494 -> 0.338 (1.56x)    0.619 -> 0.298 (1.77x)
    mobilenet-tiny       1.3e-07     49.2%  0.110 -> 0.068 (1.64x)    0.114 -> 0.068 (1.73x)
    convnext-tiny-ish    2.8e-07     49.7%  0.293 -> 0.209 (1.45x)    0.280 -> 0.180 (1.57x)
    vit-tiny             2.5e-07     49.5%  0.368 -> 0.290 (1.24x)    0.249 -> 0.190 (1.17x)
    resnet18             4.5e-07     50.0%  5.460 -> 1.943 (2.69x)    6.138 -> 2.166 (2.83x)
    resnext50_32x4d      4.5e-07     49.9%  12.615 -> 7.507 (1.69x)   39.370 -> 23.989 (1.70x)
    densenet121          2.7e-07     50.0%  15.035 -> 8.675 (1.73x)   8.442 -> 8.368 (1.50x)
    mobilenet_v3_small   3.6e-07     50.0%  0.780 -> 0.496 (1.56x)    0.690 -> 0.478 (1.56x)
    efficientnet_b0      4.4e-07     50.0%  1.989 -> 1.235 (1.46x)    1.836 -> 1.107 (1.60x)
    convnext_tiny        4.7e-07     50.0%  15.746 -> 8.700 (1.85x)   15.979 -> 9.205 (1.70x)
    vit_b_16             6.1e-07     50.0%  48.107 -> 24.993 (1.94x)  96.775 -> 50.022 (1.94x)
    swin_t               7.7e-07     50.0%  65.539 -> 43.567 (1.46x)  72.165 -> 40.019 (1.74x)
    shufflenet_v2_x1_0   2.3e-07     49.9%  1.172 -> 0.509 (2.52x)    1.227 -> 0.614 (2.31x)
    regnet_y_400mf       4.1e-07     50.0%  11.543 -> 9.562 (1.12x)   10.728 -> 6.164 (1.64x)
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from torch import nn

from harness import environment
from harness.contracts import Context
from harness.losses import CrossEntropy
from harness.measure.latency import time_queries
from harness.spec import build
from harness.tasks import models
from harness.tasks.classes import signature
from methods.pruning.structure.surgery import masked, remove
from methods.pruning.structured import Structured

VISION = (
    "resnet18",
    "resnext50_32x4d",
    "densenet121",
    "mobilenet_v3_small",
    "efficientnet_b0",
    "convnext_tiny",
    "vit_b_16",
    "swin_t",
    "shufflenet_v2_x1_0",
    "regnet_y_400mf",
)
BUILT_IN = (
    "digits-cnn",
    "lenet-300-100",
    "lenet5-caffe",
    "resnet20",
    "mobilenet-tiny",
    "convnext-tiny-ish",
    "vit-tiny",
)
BLOCKS = 10


def lively(model: nn.Module) -> nn.Module:
    """Random weights, scales, shifts and statistics: as initialised, some networks answer zero to everything."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if not value.is_floating_point():
                continue
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("running_var"):
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
            elif value.ndim > 1 and not name.endswith(("layer_scale", "scale", "position", "class_token", "embedding")):
                value.copy_(noise * math.sqrt(2 / value[0].numel()))
            elif name.endswith("weight"):
                value.copy_(1 + 0.3 * noise)
            else:
                value.copy_(0.3 * noise)
    return model.eval()


def network(name: str, size: int) -> tuple[nn.Module, tuple[int, ...]]:
    if name in BUILT_IN:
        return models.create(name, 0), (1, 8, 8) if name == "digits-cnn" else (1, 28, 28)
    options = {"image_size": size} if name == "vit_b_16" else {}
    with torch.random.fork_rng(devices=[]):
        return getattr(torchvision.models, name)(**options), (3, size, size)


def latencies(variants: dict[str, nn.Module], runtime: str, x: np.ndarray) -> tuple[dict[str, float], float, float]:
    """Smallest block median in ms by variant, median ratio of the first to the second, largest relative error."""
    hardware = build("hardware", {"name": runtime})
    deployed: dict[str, Any] = {}
    error = 0.0
    said = signature(x.shape[1:], 1)  # how many classes there are is not looked at
    (port,) = said.inputs
    with tempfile.TemporaryDirectory() as folder:
        for name, model in variants.items():
            place = Path(folder) / name
            place.mkdir()
            artifact = hardware.build(model, said, {port.name: torch.zeros(2, *x.shape[1:])}, place)
            deployed[name] = hardware.load(artifact, signature=said, inputs={port.name: x}, threads=1)
            deployed[name].bind({port.name: x})
            deployed[name]()
            deployed[name].synchronize()
            with torch.no_grad():
                expected = model(torch.from_numpy(x)).numpy()
            error = max(
                error, float(np.abs(deployed[name].fetch()["output"] - expected).max() / np.abs(expected).max())
            )

        def block(name: str) -> float:
            run = deployed[name]
            timing = time_queries(run, run.synchronize, min_queries=10, min_seconds=0.05, max_seconds=60)
            return statistics.median(timing.latency_ns["forward"]) / 1e6

        times: dict[str, list[float]] = {name: [] for name in deployed}
        for name in deployed:  # warm-up, not kept
            block(name)
        for _ in range(BLOCKS):
            for name in random.sample(list(deployed), 2):
                times[name].append(block(name))
        for run in deployed.values():
            run.close()
    ratio = statistics.median(a / b for a, b in zip(*times.values(), strict=True))
    return {name: min(values) for name, values in times.items()}, ratio, error


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("networks", nargs="*", default=[*BUILT_IN, *VISION], help="names; all if none is given")
    parser.add_argument("--size", type=int, default=64, help="height and width of torchvision's images")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of multiply-accumulates to remove")
    parser.add_argument("--no-latency", action="store_true", help="only the equality")
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("network | found in s | relative error | MACs left | ORT ms | OV ms | deployed error", flush=True)
    worst = 0.0
    for name in options.networks:
        model, shape = network(name, options.size)
        lively(model)
        context = Context(
            signature=signature(shape, 1),
            loss=CrossEntropy(),
            original=lambda model=model: model,
            seed=0,
            scratch=Path(),
        )
        begin = time.perf_counter()
        structure, plan = Structured(target="macs", ratio=options.ratio).plan(model, context)
        smaller = remove(model, structure, plan.units)
        seconds = time.perf_counter() - begin
        x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            found, expected = smaller(x), masked(model, structure, plan.units)(x)
        error = float((found - expected).abs().max() / expected.abs().max())
        worst = max(worst, error)
        cells = [name, f"{seconds:.1f}", f"{error:.1e}", f"{1 - plan.macs:.1%}"]
        if not options.no_latency:
            deployed_error = 0.0
            for runtime in ("onnxruntime", "openvino"):
                fastest, ratio, difference = latencies(
                    {"dense": model, "pruned": smaller}, runtime, x[:1].contiguous().numpy()
                )
                deployed_error = max(deployed_error, difference)
                cells.append(f"{fastest['dense']:.3f} -> {fastest['pruned']:.3f} ({ratio:.2f}x)")
            cells.append(f"{deployed_error:.1e}")
        print(" | ".join(cells), flush=True)
    print(f"largest relative error of a shrunken model: {worst:.1e} (allowed 1e-4)")
    print(environment.machine()["cpu_model"], environment.conditions())
    if worst > 1e-4:
        raise SystemExit("a shrunken model is not the masked one")


if __name__ == "__main__":
    main()
