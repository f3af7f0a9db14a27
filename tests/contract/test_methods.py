"""Every registered method keeps the contract, and does what it promises."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

import methods
from harness import registry
from harness.testing import check_method
from tests.contract.effects import EFFECTS, VARIANTS

TREATS: Mapping[str, tuple[str, ...]] = {"network-slimming": ("residual",)}
"""Methods that need what one of the two reference networks has not (batch normalisation), with those they treat."""


def test_every_registered_method_keeps_the_contract(method_name: str) -> None:
    coverage = check_method(method_name, effect=EFFECTS[method_name]).require()
    assert coverage.ran == TREATS.get(method_name, ("perceptron", "residual"))


@pytest.mark.parametrize(("name", "parameters"), VARIANTS, ids=str)
def test_other_settings_keep_it_too(name: str, parameters: Mapping[str, Any]) -> None:
    coverage = check_method(name, parameters, effect=EFFECTS[name], deploy=False).require()
    assert coverage.ran == TREATS.get(name, ("perceptron", "residual"))
    assert set(coverage.skipped) == {"perceptron", "residual"} - set(coverage.ran)


def test_no_method_is_left_out() -> None:
    assert set(EFFECTS) == set(methods.TABLE)
    assert set(methods.TABLE) <= set(registry.table("method"))
    assert len(methods.TABLE) >= 22
