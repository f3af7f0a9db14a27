"""Every packaged recipe: it expands, fully and quickly, and each of its claims is about runs that it makes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

import papers
from harness.errors import SpecError
from harness.spec import Cell, Spec
from papers import Paper, placeholders, tables, verdicts

KEYS = papers.names()


def _cells(paper: Paper) -> list[Cell]:
    return [cell for spec in paper.specs for cell in Spec.from_mapping(spec).cells()]


def _rows(paper: Paper) -> list[dict[str, Any]]:
    return [
        {
            **cell.row(),
            "chain": json.dumps(cell.chain),
            "task_config": json.dumps(dict(cell.task)),
            "run_id": str(index),
        }
        for index, cell in enumerate(_cells(paper))
    ]


def _variants(key: str) -> Iterator[Mapping[str, Any]]:
    yield {}
    yield from ({name: value} for name, values in papers.load(key).variants.items() for value in values)


def test_the_papers_are_those_that_the_readme_may_name() -> None:
    assert {"neuron-merging-2020", "han-2015", "deep-compression-2016", "set-2018"} <= set(KEYS)
    assert len(KEYS) >= 13


@pytest.mark.parametrize("quick", [False, True], ids=["full", "quick"])
@pytest.mark.parametrize("key", KEYS)
def test_every_claim_is_about_runs_of_its_recipe(key: str, quick: bool) -> None:
    for variant in _variants(key):
        paper = papers.load(key, variant, quick=quick)
        rows = _rows(paper)
        assert len({claim.id for claim in paper.claims}) == len(paper.claims)
        for claim in paper.claims:
            for select in filter(None, (claim.select, claim.better, claim.than)):
                found = [row for row in rows if verdicts.matches(select, row)]
                assert found, f"{claim.id}: {select}"
                # One run a seed of that task, as configured: a mean over anything else would be of different things.
                seeds = {row["seed"] for row in rows if row["task_config"] == found[0]["task_config"]}
                assert len({row["task_config"] for row in found}) == 1, f"{claim.id}: {select}"
                assert sorted(row["seed"] for row in found) == sorted(seeds), f"{claim.id}: {select}"


@pytest.mark.parametrize("key", KEYS)
def test_a_quick_run_is_short(key: str) -> None:
    full, quick = papers.load(key), papers.load(key, quick=True)
    if not quick.quick:  # a recipe of one length
        assert quick == full
        return
    assert {row["seed"] for row in _rows(quick)} == {0}
    assert len({row["seed"] for row in _rows(full)}) >= 3
    assert max(cell.task["train_examples"] for cell in _cells(quick)) <= 2000


@pytest.mark.parametrize("key", KEYS)
def test_measuring_is_short_and_meters_are_off(key: str) -> None:
    for cell in _cells(papers.load(key)):
        assert cell.measure["min_queries"] <= 100
        assert cell.measure["max_seconds"] <= 2
        assert not cell.energy["enabled"]


@pytest.mark.parametrize("key", KEYS)
def test_every_folder_is_complete(key: str) -> None:
    paper, text = papers.load(key), papers.readme(key)
    assert re.match(r"@\w+\{\w+,\n", paper.cite)
    assert text.startswith(f"# {paper.title}\n")
    assert f"assay reproduce {key}\n" in text
    assert text.count(tables.BEGIN) == text.count(tables.END) == 1
    assert not paper.budget or "budget is cut" in text


@pytest.mark.parametrize("key", KEYS)
def test_second_hand_figures_are_marked_and_stand_ins_are_where_the_data_differ(key: str) -> None:
    for variant in _variants(key):
        paper = papers.load(key, variant)
        if paper.settings.get("dataset") == "fashion-mnist":
            assert all(claim.stand_in for claim in paper.claims if claim.claimed is not None)
        for claim in paper.claims:
            if claim.note == "second-hand":
                assert claim.stand_in
                assert claim.table is None


# ---- the grammar ----


def test_a_placeholder_takes_its_values_type_and_is_written_out_inside_a_text() -> None:
    values = {"seeds": [0, 1], "n": 3, "nn": 7, "lr": 0.5}
    given = {"seed": "$seeds", "task": {"epochs": "$n"}, "id": "after $n of $nn", "list": ["$lr", "x"]}
    assert placeholders.filled(given, values) == {
        "seed": [0, 1],
        "task": {"epochs": 3},
        "id": "after 3 of 7",
        "list": [0.5, "x"],
    }
    with pytest.raises(SpecError, match=r"\$epoch has no value. .*epochs"):
        placeholders.filled("$epoch", {"epochs": 3})


def test_full_and_quick_have_the_same_keys() -> None:
    recipe = {"full": {"epochs": 9}, "quick": {"epochs": 1}, "variants": {"dataset": ["a"]}}
    assert placeholders.lengths("p", recipe, False) == {"epochs": 9}
    assert placeholders.lengths("p", recipe, True) == {"epochs": 1}
    assert placeholders.lengths("p", {}, True) == {}
    with pytest.raises(SpecError, match="'epochs' stands in only one"):
        placeholders.lengths("p", {"full": {"epochs": 9}}, True)
    with pytest.raises(SpecError, match="'epochs' is a variant"):
        placeholders.lengths("p", {**recipe, "variants": {"epochs": [1]}}, True)


def test_the_command_says_what_was_set() -> None:
    assert papers.load("han-2015").command == "assay reproduce han-2015"
    quick = papers.load("han-2015", ["dataset=mnist"], quick=True)
    assert quick.command == "assay reproduce han-2015 --set dataset=mnist --quick"
