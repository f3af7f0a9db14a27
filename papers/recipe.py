"""A paper's recipe, as data: ``recipe.toml`` in its folder, read.

::

    title = "..."
    cite = "bibtex"
    budget = "..."                   # how the full run is cut from the paper's, if it is: verdicts say "(cut budget)"

    [variants]                       # what `--set key=value` may change; the first value is the default
    dataset = ["fashion-mnist", "mnist"]

    [full]                           # `assay reproduce KEY`
    epochs = 16
    seeds = [0, 1, 2]

    [quick]                          # `assay reproduce KEY --quick`: the same keys; verdicts say "quick: ..."
    epochs = 1
    seeds = 0

    [[source]]                       # files that their user fetches; none is shipped
    name = "..."
    filename = "..."
    url = "..."
    sha256 = "..."

    [common]                         # what all specs have
    seed = "$seeds"

    [[spec]]                         # see harness.spec; one or more (a single one may be written [spec])
    task = {name = "$dataset/lenet-300-100", epochs = "$epochs"}

In the spec and in the claims the text "$name" stands for a value of the variants or of ``[full]``/``[quick]``, whatever
its type; inside a longer text it is written out.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any

from harness.errors import SpecError, UnknownName
from papers import claims, placeholders
from papers.claims import Claim


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
    specs : tuple of mapping
        What to run (see :mod:`harness.spec`), variants filled in.
    claims : tuple of Claim
        Figures and relations to compare.
    variants : mapping
        What may be set, with the allowed values, the default first.
    settings : mapping
        The values in force.
    budget : str or None
        How the full run is cut from the paper's; None where it is not.
    quick : bool
        Whether this is the quick run. A recipe of one length has none: its quick run is the full one.
    """

    key: str
    title: str
    cite: str
    sources: tuple[Source, ...]
    specs: tuple[Mapping[str, Any], ...]
    claims: tuple[Claim, ...]
    variants: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    budget: str | None = None
    quick: bool = False

    @property
    def command(self) -> str:
        """The command line that runs this."""
        changed = {
            name: self.settings[name] for name, values in self.variants.items() if self.settings[name] != values[0]
        }
        options = [*(f"--set {name}={value}" for name, value in changed.items()), *(["--quick"] if self.quick else [])]
        return " ".join(["assay reproduce", self.key, *options])


def names() -> list[str]:
    """The keys of all papers."""
    return sorted(item.name for item in resources.files("papers").iterdir() if (item / "recipe.toml").is_file())


def readme(key: str) -> str:
    """The paper's README.md."""
    return (folder(key) / "README.md").read_text(encoding="utf-8")


def load(key: str, settings: Mapping[str, Any] | Sequence[str] = (), *, quick: bool = False) -> Paper:
    """Read a paper's recipe and claims.

    Parameters
    ----------
    key : str
        See :func:`names`.
    settings : mapping or sequence of str, optional
        Values of the recipe's variants, as ``{"criterion": "l2"}`` or ``["criterion=l2"]``.
    quick : bool, optional
        Fill in the recipe's ``[quick]`` values and not the ``[full]`` ones.

    Raises
    ------
    UnknownName
        If there is no such paper.
    InputError
        If a setting or its value is not one of the recipe's variants.
    SpecError
        If a file of the paper is not valid.
    """
    here = folder(key)
    recipe, listed = _toml(here / "recipe.toml"), _toml(here / "claims.toml")
    try:
        variants = {name: tuple(values) for name, values in recipe.get("variants", {}).items()}
        chosen = placeholders.chosen(key, variants, settings)
        lengths = placeholders.lengths(key, recipe, quick)
        return Paper(
            key=key,
            title=recipe["title"],
            cite=recipe["cite"].strip(),
            sources=tuple(Source(**entry) for entry in recipe.get("source", [])),
            specs=tuple(
                {"name": key, **placeholders.filled({**recipe.get("common", {}), **spec}, {**chosen, **lengths})}
                for spec in (recipe["spec"] if isinstance(recipe["spec"], list) else [recipe["spec"]])
            ),
            claims=tuple(claims.read(entry, chosen, lengths) for entry in listed["claim"]),
            variants=variants,
            settings=chosen,
            budget=recipe.get("budget"),
            quick=quick and bool(lengths),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise SpecError(f"papers/{key}: recipe.toml or claims.toml is not valid: {error!r}") from error
    except SpecError as error:
        raise SpecError(f"papers/{key}: {error}") from None


def folder(key: str) -> Traversable:
    """The paper's folder.

    Raises
    ------
    UnknownName
        If there is no such paper.
    """
    if key not in names():
        raise UnknownName("paper", key, names())
    return resources.files("papers") / key


def _toml(file: Traversable) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, OSError) as error:
        raise SpecError(f"{file}: {error}") from error
