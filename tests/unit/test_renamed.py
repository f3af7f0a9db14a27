"""Names of earlier versions are refused with the name that they have now."""

from __future__ import annotations

import dataclasses

import pytest

import methods
from harness import registry
from harness.errors import InputError, SpecError


def test_an_old_method_names_the_new_one() -> None:
    with pytest.raises(InputError, match=r"^Method 'han' is now called 'threshold'\.$"):
        registry.create("method", "han", {})


@pytest.mark.parametrize("old", [old for old in methods.RENAMED if "." in old])
def test_an_old_parameter_or_value_names_the_new_one(old: str) -> None:
    method, _, key = old.partition(".")
    key, _, value = key.partition("=")
    with pytest.raises(SpecError, match="is now called") as caught:
        registry.create("method", method, {key: value or 0.5})
    assert methods.RENAMED[old] in str(caught.value)
    fields = {field.name for field in dataclasses.fields(registry.resolve("method", method))}
    # A value that was renamed is allowed under its new name; a parameter that was renamed is gone.
    assert (key in fields) == bool(value)
    if value:
        assert getattr(registry.create("method", method, {key: methods.RENAMED[old]}), key) == methods.RENAMED[old]
    else:
        assert methods.RENAMED[old].split("'")[1] in fields


def test_no_old_name_is_in_use() -> None:
    assert not methods.RENAMED.keys() & methods.TABLE.keys()
    assert {new for old, new in methods.RENAMED.items() if "." not in old} <= methods.TABLE.keys()
