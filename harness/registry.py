"""Names to classes, loaded when first used.

Each package of :data:`KINDS` holds one table, ``TABLE: dict[str, Entry]``; other distributions add entries through the
entry points ``assay.tasks``, ``assay.methods``, ``assay.hardware`` and so on, and a user may write ``module:Class``
where a name is expected (:mod:`harness.usercode`). Reading a table imports no heavy package, so listing names takes
milliseconds. What a name stands for is checked to be a class of its kind before anything of it is called.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from harness import usercode
from harness.errors import InputError, SpecError, UnknownName, suggestion
from harness.text import shown

Kind = Literal["task", "method", "hardware", "metric", "store", "storage"]


@dataclass(frozen=True)
class _KindOfName:
    """Where the names of a kind are listed, and what a class of that kind must have."""

    package: str
    group: str
    members: tuple[str, ...]


KINDS: Mapping[str, _KindOfName] = {
    "task": _KindOfName("harness.tasks", "assay.tasks", ("model", "data", "test")),
    "method": _KindOfName("methods", "assay.methods", ("compress",)),
    "hardware": _KindOfName("hardware", "assay.hardware", ("unavailable", "build", "load")),
    "metric": _KindOfName("harness.metrics", "assay.metrics", ("score", "value")),
    "store": _KindOfName("results", "assay.store", ()),
    "storage": _KindOfName("harness.storage", "assay.storage", ("encode", "decode")),
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
    """All registered names of a kind: the package's table and other distributions' entry points.

    Raises
    ------
    InputError
        If a file of the user's stands where Python finds Assay's own package first.
    """
    about = KINDS[kind]
    _check_ours(about.package)
    entries: dict[str, Entry] = dict(importlib.import_module(about.package).TABLE)
    for point in importlib.metadata.entry_points(group=about.group):
        origin = point.dist.name if point.dist else "another distribution"
        entries.setdefault(point.name, Entry(point.value, f"from {origin}"))
    return entries


def _check_ours(package: str) -> None:
    """Refuse a user's ``methods.py`` that hides Assay's own, before it is imported: a script's folder comes first."""
    spec = importlib.util.find_spec(package)
    file = Path(spec.origin if spec and spec.origin else "(no file)")
    if not file.is_relative_to(Path(__file__).parents[1]):
        raise InputError(
            f"Python finds {package!r} in {file}, which hides Assay's own package of that name. "
            "Start Python with -P, use the command assay, or rename the file."
        )


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
    if is_users(kind, name):
        return Entry(name, "the user's own")
    prefix, slash, rest = name.partition("/")
    if slash and rest and prefix in known and (family := known[prefix].family):
        return dataclasses.replace(known[prefix], defaults={**known[prefix].defaults, family: rest})
    if new := _renamed(kind, name):
        raise InputError(f"{kind.capitalize()} {name!r} is now called {new!r}.")
    raise UnknownName(kind, name, known)


def _renamed(kind: Kind, old: str) -> str | None:
    """What the package's table ``RENAMED`` has for a name, ``name.parameter`` or ``name.parameter=value``."""
    renamed: Mapping[str, str] = getattr(importlib.import_module(KINDS[kind].package), "RENAMED", {})
    return renamed.get(old)


def is_users(kind: Kind, name: str) -> bool:
    """Whether a name is a ``module:name`` that the user wrote, and no registered one."""
    return ":" in name and name not in table(kind)


def resolve(kind: Kind, name: str) -> Any:
    """Import and return what a name stands for; nothing of it is called.

    Raises
    ------
    UnknownName
        If the name is not registered.
    InputError
        If the module or the attribute cannot be imported.
    """
    target = entry(kind, name).target
    if is_users(kind, name):
        return usercode.find(target, kind)
    module_name, _, attribute = target.partition(":")
    with usercode.blamed(f"{kind} {name!r}: importing {module_name!r}"):
        module = importlib.import_module(module_name)
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
        For a name that stands for no class of this kind, and for a parameter or a value that is not allowed.
    """
    from pydantic import TypeAdapter, ValidationError
    from pydantic.dataclasses import is_pydantic_dataclass

    target = resolve(kind, name)
    check_kind(kind, name, target)
    values = {**entry(kind, name).defaults, **parameters}
    allowed = [f.name for f in dataclasses.fields(target) if f.init]
    for key, value in values.items():
        if new := _renamed(kind, f"{name}.{key}"):
            raise SpecError(f"{kind} {name!r}: parameter {shown(key)} is now called {new}.")
        if isinstance(value, str) and (new := _renamed(kind, f"{name}.{key}={value}")):
            raise SpecError(f"{kind} {name!r}: {key} {shown(value)} is now called {new!r}.")
        if key not in allowed:
            raise SpecError(f"{kind} {name!r} has no parameter {shown(key)}. {suggestion(str(key), allowed)}")
    try:
        # A class that is the user's checks its values with code of its own.
        with usercode.blamed(f"{kind} {name!r}: making it of {shown(dict(parameters))}"):
            try:
                if is_pydantic_dataclass(target):
                    return target(**values)
                return TypeAdapter(target).validate_python(values)
            except ValidationError as error:
                raise SpecError(f"{kind} {name!r}: {explain(error)}") from None
    except SpecError:
        raise
    except InputError as error:
        raise SpecError(str(error)) from error.__cause__


def check_kind(kind: Kind, name: str, target: Any) -> None:
    """Check that what a name stands for is a class of this kind: a frozen dataclass with the kind's methods.

    Nothing is called: a name in a spec must not be a way to call any function of any module.

    Raises
    ------
    SpecError
        Saying what it is, and what is expected.
    """
    members = KINDS[kind].members
    which, wanted = f"{kind} {shown(name)}", f"a frozen dataclass with {', '.join(members)} is expected"
    if not isinstance(target, type):
        raise SpecError(f"{which} is no {kind} but {_described(target)}; {wanted}.")
    missing = [member for member in members if not callable(getattr(target, member, None))]
    if missing:
        raise SpecError(f"{which} is no {kind}: the class has no {missing[0]}; {wanted}.")
    if not (dataclasses.is_dataclass(target) and getattr(target, "__dataclass_params__").frozen):  # noqa: B009
        raise SpecError(f"{which} must be a frozen dataclass: write @dataclass(frozen=True) above the class.")


def _described(target: Any) -> str:
    is_function = callable(target) and hasattr(target, "__qualname__")
    return f"the function {target.__qualname__}" if is_function else shown(target)


def explain(error: Any) -> str:
    """One sentence per finding of a pydantic ``ValidationError``: the key, what is wrong, the value."""
    parts = []
    for item in error.errors():
        where = ".".join(str(step) for step in item["loc"] if not str(step).startswith("function-"))
        message = item["msg"].removeprefix("Value error, ")
        given = "" if item["type"] in ("missing", "value_error") else f" (got {shown(item['input'])})"
        parts.append(f"{where}: {message}{given}" if where else f"{message}{given}")
    return "; ".join(parts)
