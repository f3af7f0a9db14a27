"""Published results to measure again: each folder here is one paper, as data.

A folder holds ``recipe.toml`` (title, citation, files to fetch, and a spec in the usual grammar), ``claims.toml`` (the
figures the paper prints and which runs each one is about) and ``README.md``.

``recipe.toml``::

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

``claims.toml``, a figure of the paper::

    [[claim]]
    id = "magnitude/0.5"
    claimed = 88.40                  # in the unit of the metric
    tolerance = 0.01                 # in the same unit; ends included
    metric = "accuracy"              # the default; "error", or a numeric column of the view `runs` (results.metrics)
    stage = 1                        # for a chain: the figure after its first step (sizes and counts only)
    given = {dataset = "mnist"}      # under other settings the figure is measured, and nothing is claimed
    select = {chain = [{name = "magnitude", sparsity = 0.5}]}
    stand_in = false                 # true: other data or model than the paper's; never a verdict on the paper's figure
    table = "Table 1"                # where the paper prints it
    note = "second-hand"             # printed beside the paper's figure

``select`` names columns of the view ``runs``; under "chain" stands a list of steps and under "task_config" a table, of
which the given keys have to agree. The figure is the mean over the selected runs, one a seed, with a 95 % t-interval.
``stand_in`` may be a table of settings, ``{dataset = "fashion-mnist"}``: then it is one under these.

A relation between two sets of runs, paired by seed::

    [[claim]]
    kind = "relation"
    id = "pruned is no worse than dense"
    metric = "error"
    better = {chain = [{name = "threshold"}]}
    than = {chain = [{name = "finetune"}]}
    margin = 0.3                     # points by which `better` may fall short (negative: by which it must exceed)
    paper = "1.64 -> 1.59 % error"   # the paper's own words
    claimed = 0.05                   # the paper's own difference, if it is one number; shown, not judged

The difference counts in the metric's good direction: positive where ``better`` is better. It "holds" where the lower
end of its interval is at least ``-margin``, "does not hold" where the upper end is below that, and is "inconclusive"
between; with one seed the difference itself decides, and the word says so.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from importlib.resources.abc import Traversable
from typing import Any, Literal

from harness.errors import SpecError, UnknownName
from papers import placeholders


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
    """A figure that the paper prints, or a relation that it states.

    Parameters
    ----------
    id : str
        Unique in the paper.
    kind : {"value", "relation"}
        Which of the two.
    claimed : float or None
        In the unit of the metric (percent for accuracies); None where the paper, or this variant of it, states no
        figure. Of a relation: the paper's difference, where it is one number.
    tolerance : float
        Of a value: largest absolute difference that counts as reproduced, in the same unit.
    metric : str
        "error", or a metric of :mod:`results.metrics`.
    stage : int or None
        The chain's step, from 1, after which a size or count is taken; None for the deployed model.
    select : mapping
        Of a value: which runs it is about.
    better, than : mapping
        Of a relation: the two sets of runs.
    margin : float
        Of a relation: points by which ``better`` may fall short.
    stand_in : bool
        Whether other data or another model than the paper's is measured.
    paper, table, note : str or None
        The claim in the paper's words, where it is printed, and what a reader must know about the figure.

    Raises
    ------
    SpecError
        If what its kind needs is missing, or what it has no use for is given.
    """

    id: str
    kind: Literal["value", "relation"] = "value"
    claimed: float | None = None
    tolerance: float = 0.0
    metric: str = "accuracy"
    stage: int | None = None
    select: Mapping[str, Any] = field(default_factory=dict)
    better: Mapping[str, Any] = field(default_factory=dict)
    than: Mapping[str, Any] = field(default_factory=dict)
    margin: float = 0.0
    stand_in: bool = False
    paper: str | None = None
    table: str | None = None
    note: str | None = None

    def __post_init__(self) -> None:
        needed = {"value": ("select",), "relation": ("better", "than")}
        if self.kind not in needed:
            raise SpecError(f"claim {self.id!r}: kind must be 'value' or 'relation' (got {self.kind!r})")
        foreign = {"value": ("better", "than", "margin"), "relation": ("select", "tolerance")}[self.kind]
        for name in needed[self.kind]:
            if not getattr(self, name):
                raise SpecError(f"claim {self.id!r}: a {self.kind} needs {name!r}.")
        for name in foreign:
            if getattr(self, name):
                raise SpecError(f"claim {self.id!r}: a {self.kind} has no {name!r}.")


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
            claims=tuple(_claim(entry, chosen, lengths) for entry in listed["claim"]),
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


def _claim(entry: Mapping[str, Any], chosen: Mapping[str, Any], lengths: Mapping[str, Any]) -> Claim:
    from papers import figures

    values = {
        name: placeholders.filled(value, {**chosen, **lengths})
        for name, value in entry.items()
        if name not in ("given", "stand_in")
    }
    stand_in = entry.get("stand_in", False)
    if isinstance(stand_in, Mapping):
        stand_in = _in_force(stand_in, chosen)
    if not _in_force(entry.get("given", {}), chosen):
        values["claimed"] = None
    claim = Claim(**values, stand_in=stand_in)
    figures.check(claim)
    return claim


def _in_force(wanted: Mapping[str, Any], chosen: Mapping[str, Any]) -> bool:
    return all(chosen[name] == value for name, value in wanted.items())
