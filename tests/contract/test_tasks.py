"""Every registered task keeps the contract."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness import registry, tasks
from harness.testing import check_task

PARAMETERS: Mapping[str, Mapping[str, Any]] = {
    "torchvision": {"architecture": "squeezenet1_1"},
    "pair": {"source": "digits-cnn", "dataset": "digits"},
    "smollm2-135m": {"windows": 1, "length": 48, "prompt": 8},
    "minilm-eras": {"test_passages": 24},
}


def test_every_registered_task_keeps_the_contract(task_name: str) -> None:
    coverage = check_task(task_name, PARAMETERS.get(task_name))
    if coverage.ran:
        assert "model" in coverage.ran
    else:
        assert coverage.skipped["this machine"]


def test_no_task_is_left_out() -> None:
    named = {"digits-cnn", "fashion-mnist/lenet-300-100", "torchvision", "minilm-eras", "smollm2-135m", "pair"}
    assert named <= set(tasks.TABLE)
    assert set(tasks.TABLE) <= set(registry.table("task"))


def test_the_embedded_task_is_checked_whole() -> None:
    assert check_task("digits-cnn").ran == ("model", "data", "test")
