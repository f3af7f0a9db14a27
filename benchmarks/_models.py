"""The model that the comparisons run: an untrained ResNet-20 (weights do not change dense timings)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.contracts import Signature
from harness.spec import build


def export_resnet20(folder: Path, hardware: Any) -> tuple[Path, Signature, dict[str, Any]]:
    """Build ResNet-20 for a runtime; returns the artifact, its signature and one example of shape (1, 1, 28, 28)."""
    task = build("task", {"name": "fashion-mnist/resnet20"})
    signature = task.signature
    (port,) = signature.inputs
    example = {port.name: np.random.default_rng(0).normal(size=(1, *port.shape)).astype(np.float32)}
    two = {port.name: torch.zeros(2, *port.shape)}
    return hardware.build(task.model(seed=0).eval(), signature, two, folder), signature, example
