"""Names to classes, loaded when first used.

Each sibling package holds one table, ``TABLE: dict[str, Entry]``; other distributions add entries through the
entry points ``assay.tasks``, ``assay.methods`` and ``assay.hardware``, and a user may write ``module:Class`` where a
name
is expected. Reading a table imports no heavy package, so listing names takes milliseconds.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from harness.errors import InputError, SpecError, UnknownName, suggestion

Kind = Literal["task", "method", "hardware", "store", "storage"]

_TABLES: dict[str, str] = {
    "task": "harness.tasks",
    "method": "methods",
    "hardware": "hardware",
    "store": "results",
    "storage": "harness.storage",
}


@dataclass(frozen=True)
class Entry:
    """Where a registered name lives.

    Parameters
    ----------
    target : str
        ``"module:Class"``.
    summary : str
        One line for ``assay ls``.
    defaults : mapping
        Field values that this name sets (several names may share a class).
    family : str or None
        The parameter that the rest of ``name/rest`` sets: with family "model", ``torchvision/resnet18`` is
        ``torchvision`` with ``model="resnet18"``.
    """

    target: str
    summary: str
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    family: str | None = None


@functools.cache
def table(kind: Kind) -> Mapping[str, Entry]:
    """All registered names of a kind: the sibling's table and other distributions' entry points."""
    entries: dict[str, Entry] = dict(importlib.import_module(_TABLES[kind]).TABLE)
    group = {"task": "assay.tasks", "method": "assay.methods"}.get(kind, f"assay.{kind}")
    for point in importlib.metadata.entry_points(group=group):
        origin = point.dist.name if point.dist else "another distribution"
        entries.setdefault(point.name, Entry(point.value, f"from {origin}"))
    return entries


def entry(kind: Kind, name: str) -> Entry:
    """The entry of a name, or of a ``module:Class`` written in its place.

    Raises
    ------
    UnknownName
        If the name is neither registered nor of the form ``module:Class``.
    """
    known = table(kind)
    if name in known:
        return known[name]
    if ":" in name:
        return Entry(name, "the user's own")
    prefix, slash, rest = name.partition("/")
    if slash and rest and prefix in known and (family := known[prefix].family):
        return dataclasses.replace(known[prefix], defaults={**known[prefix].defaults, family: rest})
    if new := _renamed(kind, name):
        raise InputError(f"{kind.capitalize()} {name!r} is now called {new!r}.")
    raise UnknownName(kind, name, known)


def _renamed(kind: Kind, old: str) -> str | None:
    """What the sibling's table ``RENAMED`` has for a name, ``name.parameter`` or ``name.parameter=value``."""
    renamed: Mapping[str, str] = getattr(importlib.import_module(_TABLES[kind]), "RENAMED", {})
    return renamed.get(old)


def resolve(kind: Kind, name: str) -> Any:
    """Import and return what a name stands for.

    Raises
    ------
    UnknownName
        If the name is not registered.
    InputError
        If the module or the attribute cannot be imported.
    """
    target = entry(kind, name).target
    module_name, _, attribute = target.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the user's module may raise anything: report it as theirs
        raise InputError(
            f"{kind} {name!r}: importing {module_name!r} raised {type(error).__name__}: {error}"
        ) from error
    try:
        return getattr(module, attribute)
    except AttributeError:
        raise InputError(
            f"{kind} {name!r}: module {module_name!r} has no {attribute!r}. "
            f"{suggestion(attribute, [key for key in vars(module) if not key.startswith('_')])}"
        ) from None


def create(kind: Kind, name: str, parameters: Mapping[str, Any]) -> Any:
    """Build the object of a name with its parameters, refused with a clear error where they do not fit.

    Raises
    ------
    UnknownName, SpecError
        For a name, a parameter or a value that is not allowed.
    """
    from pydantic import TypeAdapter, ValidationError
    from pydantic.dataclasses import is_pydantic_dataclass

    found = resolve(kind, name)
    values = {**entry(kind, name).defaults, **parameters}
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        if isinstance(found, type):
            raise InputError(f"{kind} {name!r} must be a frozen dataclass; it is the class {found!r}.")
        return _call_factory(kind, name, found, values)
    allowed = [f.name for f in dataclasses.fields(found) if f.init]
    for key, value in values.items():
        if new := _renamed(kind, f"{name}.{key}"):
            raise SpecError(f"{kind} {name!r}: parameter {key!r} is now called {new}.")
        if new := _renamed(kind, f"{name}.{key}={value}"):
            raise SpecError(f"{kind} {name!r}: {key} {value!r} is now called {new!r}.")
        if key not in allowed:
            raise SpecError(f"{kind} {name!r} has no parameter {key!r}. {suggestion(key, allowed)}")
    try:
        return found(**values) if is_pydantic_dataclass(found) else TypeAdapter(found).validate_python(values)
    except ValidationError as error:
        raise SpecError(f"{kind} {name!r}: {explain(error)}") from None


def explain(error: Any) -> str:
    """One sentence per finding of a pydantic ``ValidationError``: the key, what is wrong, the value."""
    parts = []
    for item in error.errors():
        where = ".".join(str(step) for step in item["loc"] if not str(step).startswith("function-"))
        message = item["msg"].removeprefix("Value error, ")
        given = "" if item["type"] in ("missing", "value_error") else f" (got {item['input']!r})"
        parts.append(f"{where}: {message}{given}" if where else f"{message}{given}")
    return "; ".join(parts)


def _call_factory(kind: str, name: str, factory: Any, values: Mapping[str, Any]) -> Any:
    try:
        return factory(**values)
    except TypeError as error:
        raise SpecError(f"{kind} {name!r}: {error}") from None
