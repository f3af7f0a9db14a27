"""The table of claims: for a terminal, and in a paper's README.md."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from harness.errors import InputError
from papers import Paper, figures, folder
from papers.verdicts import Verdict

HEADER = ("claim", "paper", "where", "measured", "verdict")

BEGIN, END = "<!-- results -->", "<!-- /results -->"
"""The lines of a README.md between which its table stands."""


def cells(item: Verdict) -> tuple[str, str, str, str, str]:
    """One claim as the texts of :data:`HEADER`."""
    return (
        item.id,
        _claimed(item),
        item.table or "–",
        measured(item),
        item.verdict or "measured; nothing claimed",
    )


def measured(item: Verdict) -> str:
    """Mean, half-width of the 95 % interval, unit and number of seeds: ``89.71 ± 0.12 % (n=5)``."""
    if item.measured is None:
        return "–"
    relation = item.kind == "relation"
    text = figures.written(item.metric, item.measured, signed=relation)
    if item.low is not None and item.high is not None:
        text += f" ± {figures.written(item.metric, (item.high - item.low) / 2)}"
    text += f"{figures.unit(item.metric, relation)} (n={item.n})"
    if item.better is None or item.than is None:
        return text
    sides = " against ".join(figures.written(item.metric, side) for side in (item.better, item.than))
    return f"{text}: {sides}{figures.unit(item.metric)}"


def _claimed(item: Verdict) -> str:
    parts = []
    if item.claimed is not None:
        relation = item.kind == "relation"
        parts.append(figures.written(item.metric, item.claimed, signed=relation) + figures.unit(item.metric, relation))
    if item.paper:
        parts.append(item.paper)
    text = "; ".join(parts) or "–"
    return f"{text} ({item.note})" if item.note else text


def markdown(verdicts: Sequence[Verdict], lines: Sequence[str]) -> str:
    """A Markdown table of the verdicts, and lines of provenance below it."""
    rows = [HEADER, *map(cells, verdicts)]
    text = [f"| {' | '.join(_escaped(cell) for cell in row)} |" for row in rows]
    return "\n".join([text[0], "|---" * len(HEADER) + "|", *text[1:], "", *lines])


def _escaped(cell: str) -> str:
    return cell.replace("|", "\\|").replace("\n", " ")


def writable_readme(paper: Paper) -> Path:
    """The paper's README.md in this checkout, after checking that its table can be replaced.

    Raises
    ------
    InputError
        For a quick run, and where the file cannot be written or does not say where its table stands.
    """
    if paper.quick:
        raise InputError(f"{paper.key}: README.md holds the full run's table. Leave out --quick or --write-readme.")
    path = Path(str(folder(paper.key))) / "README.md"
    try:
        with path.open("r+", encoding="utf-8") as file:
            text = file.read()
    except OSError as error:
        raise InputError(
            f"{path} cannot be written ({error.strerror or error}). Run --write-readme from a checkout of Assay of "
            "which you may change the files."
        ) from None
    _parts(text, path)
    return path


def write(path: Path, table: str) -> None:
    """Replace what stands between :data:`BEGIN` and :data:`END`.

    Raises
    ------
    InputError
        If the two lines are not there.
    """
    before, after = _parts(path.read_text(encoding="utf-8"), path)
    path.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")


def _parts(text: str, path: Path) -> tuple[str, str]:
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise InputError(f"{path}: has no table to replace: write the lines {BEGIN} and {END} where it shall stand.")
    return before, after
