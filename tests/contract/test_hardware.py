"""Every registered runtime keeps the contract."""

from __future__ import annotations

import hardware
from harness import registry
from harness.testing import check_hardware
from harness.testing.networks import NAMES


def test_every_registered_runtime_keeps_the_contract(hardware_name: str) -> None:
    coverage = check_hardware(hardware_name)
    if coverage.skipped:
        # Where the runtime is not installed, the reason has to say how to get it.
        assert "pip install" in coverage.skipped["this machine"]
    else:
        assert coverage.ran == NAMES


def test_no_runtime_is_left_out() -> None:
    assert {"torch", "onnxruntime", "openvino"} <= set(hardware.TABLE) <= set(registry.table("hardware"))
    assert registry.create("hardware", "torch", {}).unavailable() is None
