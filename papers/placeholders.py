"""The ``$name`` of a recipe: values that a user may set, and those that a full and a quick run differ in."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from harness.errors import InputError, SpecError, suggestion

_NAME = re.compile(r"\$([A-Za-z_][A-Za-z0-9_]*)")


def lengths(key: str, recipe: Mapping[str, Any], quick: bool) -> dict[str, Any]:
    """The values of the recipe's table ``[quick]`` or ``[full]``; none where the recipe has one length only.

    Parameters
    ----------
    key : str
        The paper's, for error messages.
    recipe : mapping
        Parsed ``recipe.toml``.
    quick : bool
        Which of the two.

    Raises
    ------
    SpecError
        If the tables have different keys, or a key is a variant's.
    """
    full, short = recipe.get("full", {}), recipe.get("quick", {})
    if odd := set(full) ^ set(short):
        raise SpecError(f"papers/{key}/recipe.toml: {sorted(odd)[0]!r} stands in only one of [full] and [quick].")
    if both := set(full) & set(recipe.get("variants", {})):
        raise SpecError(f"papers/{key}/recipe.toml: {sorted(both)[0]!r} is a variant and a key of [full] too.")
    return dict(short if quick else full)


def chosen(
    key: str, variants: Mapping[str, tuple[Any, ...]], settings: Mapping[str, Any] | Sequence[str]
) -> dict[str, Any]:
    """The variants' values: the first of each, or what ``settings`` says.

    Raises
    ------
    InputError
        If a setting or its value is not one of the variants.
    """
    values = {name: allowed[0] for name, allowed in variants.items()}
    pairs = settings.items() if isinstance(settings, Mapping) else [_pair(key, text) for text in settings]
    for name, value in pairs:
        if name not in variants:
            raise InputError(f"Paper {key!r} has no setting {name!r}. {suggestion(name, variants)}")
        choices = {str(choice): choice for choice in variants[name]}
        if str(value) not in choices:
            raise InputError(f"Paper {key!r}: {name}={value} is not allowed. {suggestion(str(value), choices)}")
        values[name] = choices[str(value)]
    return values


def _pair(key: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"Paper {key!r}: a setting is written NAME=VALUE (got {text!r}).")
    return name.strip(), value.strip()


def filled(value: Any, values: Mapping[str, Any]) -> Any:
    """``value`` with every "$name" replaced; a text that is nothing else takes the value's own type.

    Raises
    ------
    SpecError
        For a name that has no value.
    """
    if isinstance(value, Mapping):
        return {key: filled(item, values) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, values) for item in value]
    if not isinstance(value, str):
        return value
    if (whole := _NAME.fullmatch(value)) and whole[1] in values:
        return values[whole[1]]
    return _NAME.sub(lambda found: _text(found[1], value, values), value)


def _text(name: str, text: str, values: Mapping[str, Any]) -> str:
    if name not in values:
        raise SpecError(f"{text!r}: ${name} has no value. {suggestion(name, values)}")
    return str(values[name])
