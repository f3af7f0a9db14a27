"""Running a recipe of several specs: one sweep for who watches, all runs for its claims, kept or not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from harness.errors import SpecError
from harness.runner import Event
from harness.spec import Spec
from papers import Claim, Paper, reproduction
from papers.reproduction import reproduce

MAGNITUDE = {"name": "magnitude", "sparsity": [0.5, 0.9]}
SPECS = (
    {"task": "digits-cnn", "method": "baseline", "seed": [0, 1]},
    {"task": "digits-cnn", "method": MAGNITUDE, "seed": [0, 1]},
)
CLAIMS = (
    Claim(id="value", claimed=90.0, tolerance=1.0, select={"chain": [{"name": "baseline"}]}),
    Claim(
        id="relation",
        kind="relation",
        better={"chain": [{"name": "baseline"}]},
        than={"chain": [{"name": "magnitude", "sparsity": 0.9}]},
    ),
)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A sweep that runs nothing: the baseline gets 90 % of the images right, pruned networks 0.9 - sparsity / 10."""
    rows: dict[str, dict[str, Any]] = {}
    kept: list[tuple[str, list[dict[str, Any]]]] = []
    state = SimpleNamespace(rows=rows, kept=kept, stop_in=None, swept=0)

    def sweep(spec: Spec, *, db: Path, rerun: bool, watch: Callable[[Event], None]) -> SimpleNamespace:
        run_ids = {}
        for index, cell in enumerate(spec.cells()):
            watch(Event("done", index, len(spec.cells()), cell))
            run_id = f"{state.swept}-{index}"
            rows[run_id] = {
                **cell.row(),
                "run_id": run_id,
                "chain": list(cell.chain),
                "status": "ok",
                "accuracy": 0.9 - cell.chain[0].get("sparsity", 0) / 10,
            }
            run_ids[run_id] = run_id
        state.swept += 1
        return SimpleNamespace(run_ids=run_ids, interrupted=state.stop_in == state.swept)

    def chosen(db: Path, run_ids: Sequence[str]) -> list[dict[str, Any]]:
        return [rows[run_id] for run_id in run_ids]

    def add_claims(key: str, claims: list[dict[str, Any]]) -> None:
        kept.append((key, claims))

    monkeypatch.setattr(reproduction, "sweep", sweep)
    monkeypatch.setattr(reproduction, "_rows", chosen)
    monkeypatch.setattr(reproduction, "origin", lambda paper, rows, db: None)
    monkeypatch.setattr(reproduction, "open_store", lambda db: SimpleNamespace(add_claims=add_claims))
    return state


def paper(**given: Any) -> Paper:
    return Paper(**{"key": "p", "title": "", "cite": "", "sources": (), "specs": SPECS, "claims": CLAIMS, **given})


def test_several_specs_are_one_sweep_to_who_watches(fakes: SimpleNamespace, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    reproduce(paper(), db=tmp_path / "x", watch=lambda event: seen.append((event.index, event.total)))
    assert seen == [(index, 6) for index in range(6)]


def test_claims_see_the_runs_of_all_specs_and_are_kept(fakes: SimpleNamespace, tmp_path: Path) -> None:
    report = reproduce(paper(), db=tmp_path / "x")
    assert [item.verdict for item in report.verdicts] == ["reproduced", "holds"]
    assert report.verdicts[1].measured == pytest.approx(9.0)
    assert report.exit_code == 0
    ((key, claims),) = fakes.kept
    assert (key, [item["id"] for item in claims]) == ("p", ["value", "relation"])
    assert claims[1]["budget"] is None


def test_a_quick_run_is_not_kept(fakes: SimpleNamespace, tmp_path: Path) -> None:
    report = reproduce(paper(quick=True), db=tmp_path / "x")
    assert [item.verdict for item in report.verdicts] == ["quick: reproduced", "quick: holds"]
    assert not fakes.kept


def test_an_interrupted_run_goes_no_further_and_is_not_kept(fakes: SimpleNamespace, tmp_path: Path) -> None:
    fakes.stop_in = 1
    report = reproduce(paper(), db=tmp_path / "x")
    assert (fakes.swept, report.interrupted, report.exit_code) == (1, True, 130)
    assert report.verdicts[1].verdict == "not run (no run matches 'than')"
    assert not fakes.kept


def test_all_specs_are_checked_before_the_first_is_run(fakes: SimpleNamespace, tmp_path: Path) -> None:
    bad = {"task": "digits-cnn", "method": {"name": "magnitude", "sparsity": 2.0}}
    with pytest.raises(SpecError, match=r"papers/p/recipe.toml: method: .*sparsity"):
        reproduce(paper(specs=(*SPECS, bad)), db=tmp_path / "x")
    assert fakes.swept == 0
