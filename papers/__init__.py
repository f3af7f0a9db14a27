"""Published results to measure again: each folder here is one paper, as data.

A folder holds ``recipe.toml`` (title, citation, files to fetch, and a spec in the usual grammar), ``claims.toml`` (the
figures the paper prints and which run each one is about) and ``README.md``.

``recipe.toml``::

    title = "..."
    cite = "bibtex"

    [variants]                       # what `--set key=value` may change; the first value is the default
    criterion = ["l1-norm", "l2-norm"]

    [[source]]                       # files that their user fetches; none is shipped
    name = "..."
    filename = "..."
    url = "..."
    sha256 = "..."

    [spec]                           # see harness.spec; the text "$criterion" stands for the variant's value
    task = ...

``claims.toml``::

    [[claim]]
    id = "$criterion/prune/0.5"
    claimed = 88.40                  # percent
    tolerance = 0.01                 # points
    given = {criterion = "l1-norm"}  # under another variant the figure is measured, and nothing is claimed
    select = {chain = [{name = "neuron-merging", ratio = 0.5}]}
    stand_in = false                 # true: other data or model than the paper's; never a verdict on the paper's figure
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

from harness.errors import InputError, SpecError, UnknownName, suggestion


@dataclass(frozen=True, kw_only=True)
class Source:
    """A file that a paper's reproduction needs.

    Parameters
    ----------
    name : str
        What it is.
    filename : str
        Its name, looked for in the folders of ``ASSAY_DATA``.
    url : str
        Where it is fetched from otherwise.
    sha256 : str
        Of its content, hex.
    licence : str or None
        As stated by its publisher.
    """

    name: str
    filename: str
    url: str
    sha256: str
    licence: str | None = None


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A figure that the paper prints.

    Parameters
    ----------
    id : str
        Unique in the paper.
    claimed : float or None
        Percent; None where the paper (or this variant of it) states no figure.
    tolerance : float
        Largest absolute difference that counts as reproduced, in percent points.
    select : mapping
        Which runs it is about: columns of the view ``runs`` and, under "chain", a list of steps of which the given
        keys have to agree.
    stand_in : bool
        Whether other data or another model than the paper's is measured.
    """

    id: str
    claimed: float | None
    tolerance: float
    select: Mapping[str, Any]
    stand_in: bool = False


@dataclass(frozen=True, kw_only=True)
class Paper:
    """One paper: what to fetch, what to run, what it claims.

    Parameters
    ----------
    key : str
        Its folder's name.
    title, cite : str
        Title and BibTeX.
    sources : tuple of Source
        Files to fetch first.
    spec : mapping
        A spec (see :mod:`harness.spec`), variants filled in.
    claims : tuple of Claim
        Figures to compare.
    variants : mapping
        What may be set, with the allowed values, the default first.
    settings : mapping
        The values in force.
    """

    key: str
    title: str
    cite: str
    sources: tuple[Source, ...]
    spec: Mapping[str, Any]
    claims: tuple[Claim, ...]
    variants: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


def names() -> list[str]:
    """The keys of all papers."""
    return sorted(item.name for item in resources.files("papers").iterdir() if (item / "recipe.toml").is_file())


def readme(key: str) -> str:
    """The paper's README.md."""
    return (_folder(key) / "README.md").read_text(encoding="utf-8")


def load(key: str, settings: Mapping[str, Any] | Sequence[str] = ()) -> Paper:
    """Read a paper's recipe and claims.

    Parameters
    ----------
    key : str
        See :func:`names`.
    settings : mapping or sequence of str, optional
        Values of the recipe's variants, as ``{"criterion": "l2-norm"}`` or ``["criterion=l2-norm"]``.

    Raises
    ------
    UnknownName
        If there is no such paper.
    InputError
        If a setting or its value is not one of the recipe's variants.
    SpecError
        If a file of the paper is not valid.
    """
    folder = _folder(key)
    recipe, listed = _toml(folder / "recipe.toml"), _toml(folder / "claims.toml")
    try:
        variants = {name: tuple(values) for name, values in recipe.get("variants", {}).items()}
        chosen = _chosen(key, variants, settings)
        return Paper(
            key=key,
            title=recipe["title"],
            cite=recipe["cite"].strip(),
            sources=tuple(Source(**entry) for entry in recipe.get("source", [])),
            spec={"name": key, **_filled(recipe["spec"], chosen)},
            claims=tuple(_claim(entry, chosen) for entry in listed["claim"]),
            variants=variants,
            settings=chosen,
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise SpecError(f"papers/{key}: recipe.toml or claims.toml is not valid: {error!r}") from error


def _folder(key: str) -> Traversable:
    if key not in names():
        raise UnknownName("paper", key, names())
    return resources.files("papers") / key


def _toml(file: Traversable) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, OSError) as error:
        raise SpecError(f"{file}: {error}") from error


def _chosen(
    key: str, variants: Mapping[str, tuple[Any, ...]], settings: Mapping[str, Any] | Sequence[str]
) -> dict[str, Any]:
    chosen = {name: values[0] for name, values in variants.items()}
    pairs = settings.items() if isinstance(settings, Mapping) else [_pair(key, text) for text in settings]
    for name, value in pairs:
        if name not in variants:
            raise InputError(f"Paper {key!r} has no setting {name!r}. {suggestion(name, variants)}")
        choices = {str(choice): choice for choice in variants[name]}
        if str(value) not in choices:
            raise InputError(f"Paper {key!r}: {name}={value} is not allowed. {suggestion(str(value), choices)}")
        chosen[name] = choices[str(value)]
    return chosen


def _pair(key: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"Paper {key!r}: a setting is written NAME=VALUE (got {text!r}).")
    return name.strip(), value.strip()


def _claim(entry: Mapping[str, Any], chosen: Mapping[str, Any]) -> Claim:
    holds = all(chosen[name] == value for name, value in entry.get("given", {}).items())
    values = {name: _filled(value, chosen) for name, value in entry.items() if name != "given"}
    return Claim(**{**values, "claimed": values["claimed"] if holds else None})


def _filled(value: Any, chosen: Mapping[str, Any]) -> Any:
    """``value`` with every "$name" replaced; a text that is nothing else takes the setting's own type."""
    if isinstance(value, Mapping):
        return {key: _filled(item, chosen) for key, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, chosen) for item in value]
    if isinstance(value, str):
        for name, setting in chosen.items():
            if value == f"${name}":
                return setting
            value = value.replace(f"${name}", str(setting))
    return value
