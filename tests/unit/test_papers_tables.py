"""The table of a reproduction: what stands in it, where it comes from, and where it is written."""

from __future__ import annotations

import dataclasses
import io
import json
import stat
from pathlib import Path
from typing import Any

import pytest

import papers
from harness.errors import InputError
from papers import Claim, Paper, origin, tables, verdicts
from papers.reproduction import Reproduction, kept
from papers.verdicts import Verdict


def paper(**given: Any) -> Paper:
    values: dict[str, Any] = {
        "key": "p",
        "title": "On [Things]",
        "cite": "@x",
        "sources": (),
        "specs": (),
        "claims": (),
    }
    return Paper(**{**values, **given})


def verdict(**given: Any) -> Verdict:
    values: dict[str, Any] = {"id": "a", "claimed": 88.4, "measured": 88.41, "tolerance": 0.1, "verdict": "reproduced"}
    return Verdict(**{**values, "n": 1, **given})


@pytest.mark.parametrize(
    ("item", "text"),
    [
        (verdict(), "88.41 % (n=1)"),
        (verdict(measured=89.71, n=5, low=89.59, high=89.83), "89.71 ± 0.12 % (n=5)"),
        (verdict(metric="container_compression_ratio", measured=40.04), "40.0× (n=1)"),
        (verdict(metric="container_compression_ratio", measured=4.036), "4.04× (n=1)"),
        (verdict(metric="params_nonzero", measured=22186.0), "22,186 (n=1)"),
        (verdict(metric="container_bytes", measured=27.13), "27.1 kB (n=1)"),
        (verdict(measured=None), "–"),
        (
            verdict(kind="relation", metric="error", measured=0.1, n=3, low=-0.1, high=0.3, better=1.6, than=1.7),
            "+0.10 ± 0.20 points (n=3): 1.60 against 1.70 %",
        ),
    ],
)
def test_a_figure_is_written_with_interval_unit_and_n(item: Verdict, text: str) -> None:
    assert tables.measured(item) == text


def test_the_papers_side_shows_words_figure_and_note() -> None:
    item = verdict(paper="12x", note="second-hand", table="Table 1")
    assert tables.cells(item) == ("a", "88.40 %; 12x (second-hand)", "Table 1", "88.41 % (n=1)", "reproduced")
    bare = verdict(claimed=None, verdict=None)
    assert tables.cells(bare) == ("a", "–", "–", "88.41 % (n=1)", "measured; nothing claimed")
    difference = verdict(kind="relation", claimed=0.4, measured=0.1)
    assert tables.cells(difference)[1] == "+0.40 points"


def test_markdown_has_one_row_a_claim_and_survives_a_bar() -> None:
    text = tables.markdown([verdict(id="x|y"), verdict(id="z")], ["one line"])
    lines = text.splitlines()
    assert lines[0] == "| claim | paper | where | measured | verdict |"
    assert lines[2].startswith("| x\\|y | 88.40 % |")
    assert [line.count("|") - line.count("\\|") for line in lines[:4]] == [6, 6, 6, 6]
    assert lines[4:] == ["", "one line"]


# ---- README.md ----


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "README.md").write_text(f"# P\n\nbefore\n\n{tables.BEGIN}\nold\n{tables.END}\n\nafter\n")
    monkeypatch.setattr(tables, "folder", lambda key: tmp_path)
    return tmp_path


def test_only_the_table_of_a_readme_is_replaced_and_twice_is_once(checkout: Path) -> None:
    path = tables.writable_readme(paper())
    for _ in range(2):
        tables.write(path, "| new |")
        assert path.read_text() == f"# P\n\nbefore\n\n{tables.BEGIN}\n| new |\n{tables.END}\n\nafter\n"


def test_a_readme_that_cannot_be_written_is_refused_before_the_work(checkout: Path) -> None:
    path = checkout / "README.md"
    with pytest.raises(InputError, match="Leave out --quick"):
        tables.writable_readme(paper(quick=True))
    path.write_text(f"{tables.END} {tables.BEGIN}")
    with pytest.raises(InputError, match="has no table to replace"):
        tables.writable_readme(paper())
    path.unlink()
    with pytest.raises(InputError, match=r"cannot be written \(No such file"):
        tables.writable_readme(paper())
    path.mkdir(mode=stat.S_IRWXU)
    with pytest.raises(InputError, match="Run --write-readme from a checkout"):
        tables.writable_readme(paper())


# ---- provenance ----


def run(index: int, **given: Any) -> dict[str, Any]:
    values: dict[str, Any] = {
        "run_id": str(index),
        "created_at": f"2026-01-0{index}T00:00:00+00:00",
        "git_commit": "0123456789abcdef",
        "git_dirty": False,
        "machine_id": "m",
        "threads": 1,
        "task": "t",
        "task_config": "{}",
        "seed": 0,
        "chain": '[{"name": "baseline"}]',
        "stages": "[]",
    }
    return {**values, **given}


def stages(*seconds: float) -> str:
    return json.dumps([{"name": "x", "seconds": value, "cached": index < 1} for index, value in enumerate(seconds)])


def test_the_origin_names_command_machine_date_commit_and_work(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = {"cpu_model": "Some CPU", "cores": 2}
    monkeypatch.setattr("results.queries.full", lambda db, run_id: {"machine": machine})
    two = json.dumps([{"name": "threshold"}, {"name": "kmeans-sharing"}])
    rows = [
        run(1, stages=stages(100, 0)),
        run(2, stages=stages(100, 30), chain='[{"name": "threshold"}]'),
        run(3, stages=stages(100, 30, 20), chain=two, git_dirty=True),
        run(4, stages=stages(90, 0), seed=1),
    ]
    found = origin.origin(paper(), rows, Path("unused"))
    assert found.compute_s == pytest.approx(100 + 30 + 20 + 90)
    assert found.date == "2026-01-04"
    assert found.commit == "0123456789, 0123456789+changes"
    assert found.line() == (
        "`assay reproduce p` · Some CPU, 2 cores, timed on 1 thread · newest run 2026-01-04 · "
        "commit 0123456789, 0123456789+changes · 4 min of training and compression"
    )


# ---- the whole report ----


def reproduction(items: list[Verdict], **given: Any) -> Reproduction:
    return Reproduction(paper=paper(**given), verdicts=items)


RELATION = verdict(id="r", kind="relation", claimed=None, measured=0.4, verdict="holds")


@pytest.mark.parametrize(
    ("items", "given", "code"),
    [
        ([verdict(), RELATION], {}, 0),
        ([verdict(verdict="not reproduced")], {}, 1),
        ([verdict(verdict="not reproduced (cut budget)")], {"budget": "less"}, 0),
        ([dataclasses.replace(RELATION, verdict="does not hold")], {}, 1),
        ([dataclasses.replace(RELATION, verdict="does not hold (stand-in)")], {}, 0),
        ([dataclasses.replace(RELATION, verdict="inconclusive")], {}, 0),
        ([verdict(measured=None, verdict="not run (failed: x)")], {}, 1),
        ([verdict(measured=None, claimed=None, verdict="not run (failed: x)")], {"quick": True}, 1),
        ([verdict(verdict="quick: not reproduced")], {"quick": True}, 0),
    ],
)
def test_the_exit_code_is_1_where_a_claim_failed_or_did_not_run(
    items: list[Verdict], given: dict[str, Any], code: int
) -> None:
    assert reproduction(items, **given).exit_code == code
    assert dataclasses.replace(reproduction(items, **given), interrupted=True).exit_code == 130


def test_the_summary_counts_what_each_kind_came_to() -> None:
    made = papers.load("neuron-merging-2020")
    rows = [
        {"run_id": "r", "status": "ok", "accuracy": claim.claimed / 100, "chain": claim.select["chain"]}
        for claim in made.claims
        if claim.claimed
    ]
    judged = Reproduction(paper=made, verdicts=verdicts.judge(made.claims, rows))
    assert judged.summary() == "9 of 9 claims reproduced within 0.01 points."
    mixed = [
        verdict(stand_in=True, verdict="stand-in (cut budget)"),
        dataclasses.replace(RELATION, verdict="holds (one seed)"),
        dataclasses.replace(RELATION, verdict="does not hold"),
        dataclasses.replace(RELATION, verdict="inconclusive"),
        dataclasses.replace(RELATION, measured=None, verdict="not run (x)"),
    ]
    assert reproduction(mixed, budget="10 of 99 epochs.").summary() == (
        "1 figures of a stand-in (no verdict); 4 relations: holds 1, does not hold 1, inconclusive 1, not run 1; "
        "1 of all not run. Cut budget: 10 of 99 epochs."
    )
    quick = [dataclasses.replace(RELATION, verdict="quick: holds (one seed)")]
    assert reproduction(quick, quick=True).summary() == (
        "1 relations: holds 1. This was a quick run: no verdict on the paper."
    )


def test_the_terminal_shows_the_same_columns_and_takes_no_text_for_markup() -> None:
    from rich.console import Console

    console = Console(width=160, record=True, file=io.StringIO())
    item = verdict(id="[bold]a", paper="[1] says")
    console.print(reproduction([item]).table())
    text = console.export_text()
    for part in ("On [Things]", "[bold]a", "[1] says", *tables.HEADER, "88.41 % (n=1)"):
        assert part in text


@pytest.mark.parametrize("word", ["reproduced", "not reproduced", "stand-in", "holds", "does not hold", "inconclusive"])
@pytest.mark.parametrize("notes", ["", " (one seed, stand-in, cut budget)"])
def test_every_word_of_a_full_run_can_be_kept(word: str, notes: str, tmp_path: Path) -> None:
    from results import queries
    from results.store import Store

    store = Store(tmp_path / "assay.duckdb")
    item = dataclasses.replace(RELATION, verdict=f"{word}{notes}", low=0.1, high=0.7, n=3)
    store.add_claims("p", [kept(paper(budget="less"), item, None)])
    (row,) = queries.query(store.path, "SELECT verdict, measured, details FROM claims")
    assert (row["verdict"], row["measured"]) == (f"{word}{notes}", 0.4)
    details = json.loads(row["details"])
    assert (details["low"], details["high"], details["n"], details["budget"]) == (0.1, 0.7, 3, "less")


def test_json_has_everything() -> None:
    claims = (Claim(id="a", claimed=1.0, select={"task": "t"}),)
    made = paper(claims=claims, settings={"dataset": "mnist"}, budget="less")
    report = Reproduction(paper=made, verdicts=verdicts.judge(claims, []))
    value = json.loads(json.dumps(report.to_json()))
    assert set(value) == {"paper", "settings", "quick", "budget", "claims", "origin"}
    assert value["settings"] == {"dataset": "mnist"}
    assert value["origin"] is None
