"""Claims of a paper, as data: ``claims.toml`` in its folder, read.

A figure that the paper prints::

    [[claim]]
    id = "magnitude/0.5"
    claimed = 88.40                  # in the unit of the metric
    tolerance = 0.01                 # in the same unit; ends included
    metric = "accuracy"              # the default; "error", a column of `runs`, or the task's own metric: "perplexity"
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

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from harness.errors import SpecError
from papers import placeholders


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
        "error", a numeric column of ``runs`` (:mod:`results.columns`), or a metric (``assay ls metrics``) that is the
        task's.
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


def read(entry: Mapping[str, Any], chosen: Mapping[str, Any], lengths: Mapping[str, Any]) -> Claim:
    """The claim of a table of ``claims.toml``, under the settings and the length of run that are chosen.

    Raises
    ------
    UnknownName, SpecError
        If no run could have its figure.
    """
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
