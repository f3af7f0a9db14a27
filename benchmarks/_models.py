"""The model that the comparisons run: an untrained ResNet-20 (weights do not change dense timings)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness.spec import build


def export_resnet20(folder: Path, hardware: Any) -> tuple[Path, Any]:
    """Build ResNet-20 for a runtime; returns the artifact and one example, shape (1, 1, 28, 28)."""
    task = build("task", {"name": "fashion-mnist/resnet20"})
    model = task.model(seed=0).eval()
    artifact = hardware.build(model, torch.zeros(2, *task.input_shape), folder)
    example = np.random.default_rng(0).normal(size=(1, *task.input_shape)).astype(np.float32)
    return artifact, example
