"""Every registered task keeps the contract."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from harness import registry, tasks
from harness.testing import check_task

PARAMETERS: Mapping[str, Mapping[str, Any]] = {"torchvision": {"architecture": "squeezenet1_1"}}


def test_every_registered_task_keeps_the_contract(task_name: str) -> None:
    coverage = check_task(task_name, PARAMETERS.get(task_name))
    if coverage.ran:
        assert "model" in coverage.ran
    else:
        assert coverage.skipped["this machine"]


def test_no_task_is_left_out() -> None:
    assert {"digits-cnn", "fashion-mnist/lenet-300-100", "torchvision"} <= set(tasks.TABLE)
    assert set(tasks.TABLE) <= set(registry.table("task"))


def test_the_embedded_task_is_checked_whole() -> None:
    assert check_task("digits-cnn").ran == ("model", "data", "test")
