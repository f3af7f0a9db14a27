"""Claims judged: values and relations, one seed and several."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
from scipy import stats

import papers
from harness.errors import SpecError, UnknownName
from papers import Claim, figures, verdicts
from papers.spread import spread

KEY = "neuron-merging-2020"


def claim(**given: Any) -> Claim:
    values: dict[str, Any] = {"id": "a", "claimed": 88.40, "tolerance": 0.01, "select": {"task": "t"}}
    return Claim(**{**values, **given})


def row(accuracy: float | None = 0.884, **given: Any) -> Mapping[str, Any]:
    return {"run_id": "r", "task": "t", "status": "ok", "reason": None, "accuracy": accuracy, **given}


@pytest.mark.parametrize(
    ("accuracy", "verdict"),
    [
        (0.8840, "reproduced"),
        (0.8841, "reproduced"),
        (0.8839, "reproduced"),
        (0.88411, "not reproduced"),
        (0.8838, "not reproduced"),
    ],
)
def test_the_tolerance_is_in_points_and_includes_its_ends(accuracy: float, verdict: str) -> None:
    (found,) = verdicts.judge([claim()], [row(accuracy)])
    assert (found.verdict, found.measured) == (verdict, pytest.approx(100 * accuracy))


def test_a_stand_in_is_never_a_verdict_on_the_papers_figure() -> None:
    for accuracy in (0.884, 0.1):
        (found,) = verdicts.judge([claim(stand_in=True)], [row(accuracy)])
        assert found.verdict == "stand-in"
        assert found.measured == pytest.approx(100 * accuracy)


def test_a_measurement_without_a_claim_has_no_verdict() -> None:
    (found,) = verdicts.judge([claim(claimed=None)], [row(0.5)])
    assert (found.claimed, found.measured, found.verdict) == (None, 50.0, None)


def test_seeds_are_averaged() -> None:
    (found,) = verdicts.judge([claim()], [row(0.88, run_id="1"), row(0.888, run_id="2"), row(0.1, task="other")])
    assert found.measured == pytest.approx(88.4)
    assert found.run_ids == ("1", "2")


@pytest.mark.parametrize(
    ("rows", "verdict"),
    [
        ([], "not run (no run matches)"),
        ([row(None, status="failed", reason="out of memory")], "not run (failed: out of memory)"),
        ([row(), row(None, status="timeout", reason="60 s")], "not run (timeout: 60 s)"),
        ([row(None)], "not run (accuracy was not measured)"),
    ],
)
def test_what_was_not_measured_is_not_judged(rows: list[Mapping[str, Any]], verdict: str) -> None:
    for judged in (claim(), claim(stand_in=True), claim(claimed=None)):
        (found,) = verdicts.judge([judged], rows)
        assert (found.verdict, found.measured) == (verdict, None)


def test_nothing_runs_without_the_source() -> None:
    (found,) = verdicts.judge([claim()], [], not_run="offline")
    assert found.verdict == "not run (offline)"


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        ([{"name": "p", "ratio": 0.5}], True),
        ([{"name": "p", "ratio": 0.6}], False),
        ([{"name": "p", "merge": False}], True),
        ([{"name": "p", "merge": True}], False),
        ([{"name": "p", "merge": 0}], False),
        ([{"name": "p", "absent": 1}], False),
        ([{"name": "p"}, {"name": "q"}], False),
        ([], False),
    ],
)
def test_a_chain_is_selected_by_the_given_parameters(wanted: list[dict[str, Any]], expected: bool) -> None:
    steps = [{"name": "p", "ratio": 0.5, "merge": False}]
    for chain in (steps, json.dumps(steps)):
        assert verdicts.matches({"chain": wanted}, row(chain=chain)) is expected


def test_the_report_has_the_stated_shape() -> None:
    made = papers.load(KEY)
    report = json.loads(json.dumps(verdicts.report(made, verdicts.judge(made.claims, []))))
    assert set(report) == {"paper", "settings", "quick", "budget", "claims"}
    assert report["paper"] == KEY
    for entry in report["claims"]:
        assert list(entry)[:6] == ["id", "claimed", "measured", "tolerance", "verdict", "run_ids"]


# ---- metrics ----


@pytest.mark.parametrize(
    ("metric", "column", "stored", "shown"),
    [
        ("accuracy", "accuracy", 0.9841, 98.41),
        ("error", "accuracy", 0.9841, 1.59),
        ("pruning_rate", "pruning_rate", 0.92, 92.0),
        ("container_compression_ratio", "container_compression_ratio", 40.25, 40.25),
        ("container_bytes", "container_bytes", 27_000, 27.0),
        ("params_nonzero", "params_nonzero", 22_186, 22_186.0),
    ],
)
def test_a_metric_is_a_column_in_the_unit_that_readers_are_shown(
    metric: str, column: str, stored: float, shown: float
) -> None:
    (found,) = verdicts.judge([claim(metric=metric, claimed=shown)], [row(**{"accuracy": None, column: stored})])
    assert found.measured == pytest.approx(shown, abs=1e-9)
    assert found.verdict == "reproduced"


def test_the_figure_after_a_stage_is_that_stages_own() -> None:
    stages = [
        {"name": "train", "params_nonzero": 1000, "plain_bytes": 4000, "container_bytes": 3600},
        {"name": "threshold", "params_nonzero": 100, "plain_bytes": 4000, "container_bytes": 400},
        {"name": "kmeans-sharing", "params_nonzero": 100, "plain_bytes": 4000, "container_bytes": 100},
    ]
    measured = {"stages": json.dumps(stages), "container_bytes": 100, "container_compression_ratio": 40.0}
    for stage, ratio in ((0, 4000 / 3600), (1, 10.0), (2, 40.0)):
        made = claim(metric="container_compression_ratio", stage=stage, claimed=None)
        (found,) = verdicts.judge([made], [row(**measured)])
        assert found.measured == pytest.approx(ratio)
    (found,) = verdicts.judge([claim(metric="params_nonzero", stage=1, claimed=100)], [row(**measured)])
    assert found.verdict == "reproduced"
    (found,) = verdicts.judge([claim(metric="params_nonzero", stage=3)], [row(**measured)])
    assert found.verdict == "not run (params_nonzero was not measured after stage 3)"


def test_a_missing_figure_gives_its_recorded_reason() -> None:
    reasons = json.dumps({"macs_ratio": "no baseline"})
    (found,) = verdicts.judge([claim(metric="macs_ratio")], [row(macs_ratio=None, reasons=reasons)])
    assert found.verdict == "not run (macs_ratio was not measured: no baseline)"


def test_claims_that_no_run_could_answer_are_refused() -> None:
    with pytest.raises(UnknownName, match="accuracy"):
        figures.check(claim(metric="acuracy"))
    with pytest.raises(SpecError, match=r"stage 1.*params_nonzero"):
        figures.check(claim(metric="accuracy", stage=1))
    for given, message in (
        ({"kind": "figure"}, "'value' or 'relation'"),
        ({"kind": "relation", "better": {"task": "t"}, "select": {}, "tolerance": 0.0}, "needs 'than'"),
        ({"kind": "relation", "better": {"task": "t"}, "than": {"task": "u"}, "tolerance": 0.0}, "no 'select'"),
        ({"margin": 0.3}, "a value has no 'margin'"),
        ({"select": {}}, "a value needs 'select'"),
    ):
        with pytest.raises(SpecError, match=message):
            claim(**given)


# ---- several seeds ----


def test_the_interval_is_students() -> None:
    values = [89.6, 89.9, 89.4, 89.8, 90.1]
    found = spread(values)
    low, high = stats.t.interval(0.95, len(values) - 1, loc=sum(values) / 5, scale=stats.sem(values))
    assert (found.mean, found.n) == (pytest.approx(89.76), 5)
    assert found.sd == pytest.approx(stats.tstd(values))
    assert (found.low, found.high) == (pytest.approx(low), pytest.approx(high))
    assert spread([1.5]).low is None
    assert spread([0.1, 0.1, 0.1]).half == pytest.approx(0.0, abs=1e-9)


def test_a_value_comes_with_its_interval() -> None:
    rows = [row(accuracy, run_id=str(seed), seed=seed) for seed, accuracy in enumerate((0.88, 0.884, 0.888))]
    (found,) = verdicts.judge([claim()], rows)
    expected = stats.t.ppf(0.975, 2) * 0.4 / math.sqrt(3)
    assert (found.n, found.sd, found.measured) == (3, pytest.approx(0.4), pytest.approx(88.4))
    assert found.low is not None
    assert found.high is not None
    assert (found.high - found.low) / 2 == pytest.approx(expected)
    (one,) = verdicts.judge([claim()], rows[1:2])
    assert (one.n, one.sd, one.low, one.high) == (1, None, None, None)


# ---- relations ----


def relation(**given: Any) -> Claim:
    values: dict[str, Any] = {"id": "r", "kind": "relation", "better": {"task": "b"}, "than": {"task": "t"}}
    return Claim(**{**values, **given})


def sides(better: list[float | None], than: list[float | None], metric: str = "accuracy") -> list[Mapping[str, Any]]:
    return [
        {**row(None), "run_id": f"{task}{seed}", "task": task, "seed": seed, metric: value}
        for task, values in (("b", better), ("t", than))
        for seed, value in enumerate(values)
        if value is not None
    ]


@pytest.mark.parametrize(
    ("differences", "margin", "verdict"),
    [
        ([1.0, 1.1, 0.9], 0.0, "holds"),
        ([-0.1, -0.1, -0.1], 0.1, "holds"),  # the lower end lies on the margin
        ([-1.0, -1.1, -0.9], 0.0, "does not hold"),
        ([-0.5, 0.5, 0.1], 0.0, "inconclusive"),
        ([0.5, 0.6, 0.55], -0.3, "holds"),  # a negative margin must be exceeded
        ([0.1, 0.2, 0.15], -0.3, "does not hold"),
        ([0.0], 0.0, "holds (one seed)"),
        ([-0.3], 0.3, "holds (one seed)"),
        ([-0.31], 0.3, "does not hold (one seed)"),
    ],
)
def test_a_relation_is_judged_by_its_interval(differences: list[float], margin: float, verdict: str) -> None:
    than = [0.9 - seed / 100 for seed, _ in enumerate(differences)]
    better = [base + difference / 100 for base, difference in zip(than, differences, strict=True)]
    (found,) = verdicts.judge([relation(margin=margin)], sides(better, than))
    assert found.verdict == verdict
    assert found.measured == pytest.approx(sum(differences) / len(differences), abs=1e-9)
    assert found.better is not None
    assert found.than is not None
    assert found.better - found.than == pytest.approx(found.measured)
    assert found.n == len(differences)


def test_pairing_removes_what_the_seeds_share() -> None:
    # Seeds differ by ten points, the two sides of each by one: unpaired, nothing could be said.
    (found,) = verdicts.judge([relation()], sides([0.81, 0.91, 0.71], [0.80, 0.90, 0.70]))
    assert (found.verdict, found.measured, found.sd) == ("holds", pytest.approx(1.0), pytest.approx(0.0, abs=1e-9))


def test_only_common_seeds_are_paired() -> None:
    (found,) = verdicts.judge([relation()], sides([0.9, None, 0.9], [0.8, 0.1, 0.8]))
    assert (found.n, found.measured) == (2, pytest.approx(10.0))
    (none,) = verdicts.judge([relation()], sides([0.9, None], [None, 0.8]))
    assert none.verdict == "not run (the two sides have no seed in common)"


@pytest.mark.parametrize(
    ("metric", "better", "than", "shown"),
    [("error", 0.984, 0.983, 0.1), ("container_bytes", 27_000, 30_000, 3.0), ("macs_ratio", 2.0, 1.5, 0.5)],
)
def test_better_is_positive_whichever_way_the_metric_goes(
    metric: str, better: float, than: float, shown: float
) -> None:
    column = "accuracy" if metric == "error" else metric
    for one, other, sign in ((better, than, 1), (than, better, -1)):
        (found,) = verdicts.judge([relation(metric=metric)], sides([one], [other], column))
        assert found.measured == pytest.approx(sign * shown)
        assert found.verdict == ("holds (one seed)" if sign > 0 else "does not hold (one seed)")


def test_a_relation_without_one_of_its_sides_is_not_run() -> None:
    (found,) = verdicts.judge([relation()], sides([0.9], []))
    assert found.verdict == "not run (no run matches 'than')"
    failed = {**row(None), "task": "t", "seed": 0, "status": "failed", "reason": "out of memory"}
    (found,) = verdicts.judge([relation()], [*sides([0.9], []), failed])
    assert found.verdict == "not run (failed: out of memory)"


# ---- words ----


@pytest.mark.parametrize(
    ("made", "options", "verdict"),
    [
        (relation(stand_in=True), {}, "holds (one seed, stand-in)"),
        (relation(stand_in=True), {"cut_budget": True}, "holds (one seed, stand-in, cut budget)"),
        (relation(), {"cut_budget": True}, "holds (one seed, cut budget)"),
        (relation(), {"quick": True, "cut_budget": True}, "quick: holds (one seed)"),
        (claim(select={"task": "b"}, claimed=90.0), {"cut_budget": True}, "reproduced (cut budget)"),
        (claim(select={"task": "b"}, claimed=80.0), {"quick": True}, "quick: not reproduced"),
        (claim(select={"task": "b"}, stand_in=True), {"quick": True}, "quick: stand-in"),
        (claim(select={"task": "b"}, claimed=None), {"quick": True, "cut_budget": True}, None),
        (claim(select={"task": "none"}), {"quick": True}, "not run (no run matches)"),
    ],
)
def test_what_takes_from_a_verdict_stands_beside_it(made: Claim, options: dict[str, bool], verdict: str | None) -> None:
    (found,) = verdicts.judge([made], sides([0.9], [0.8]), **options)
    assert found.verdict == verdict
    assert not found.failed


def test_only_the_papers_own_claim_at_its_own_budget_fails() -> None:
    rows = sides([0.8, 0.8], [0.9, 0.9])
    for made in (relation(), claim(select={"task": "b"}, claimed=90.0)):
        assert verdicts.judge([made], rows)[0].failed
        assert not verdicts.judge([made], rows, cut_budget=True)[0].failed
        assert not verdicts.judge([made], rows, quick=True)[0].failed
    assert verdicts.judge([relation()], rows[:1] + rows[2:3])[0].failed  # one seed
    assert not verdicts.judge([relation(stand_in=True)], rows)[0].failed


def test_a_task_is_selected_by_the_given_parameters() -> None:
    config = {"epochs": 2, "training": {"lr": 0.1}}
    for given in (config, json.dumps(config)):
        assert verdicts.matches({"task_config": {"epochs": 2}}, row(task_config=given))
        assert not verdicts.matches({"task_config": {"epochs": 3}}, row(task_config=given))
        assert not verdicts.matches({"task_config": {"seed": 2}}, row(task_config=given))


# ---- claims about any metric ----


def test_a_claim_may_be_about_the_tasks_own_metric() -> None:
    about = claim(metric="perplexity", claimed=29.41, tolerance=0.05)
    figures.check(about)
    (found,) = verdicts.judge([about], [row(None, metric="perplexity", score=29.43)])
    assert (found.verdict, found.measured, found.unit) == ("reproduced", 29.43, "")
    assert figures.written("perplexity", 29.431) == "29.43"
    other = row(None, metric="mae", score=1.0, reasons="{}")
    (found,) = verdicts.judge([about], [other])
    assert found.verdict == "not run (perplexity was not measured: the task's metric is mae)"


def test_a_relation_counts_in_the_metrics_good_direction() -> None:
    better, than = {"chain": [{"name": "a"}]}, {"chain": [{"name": "b"}]}
    about = Claim(id="r", kind="relation", metric="perplexity", better=better, than=than)
    rows = [
        {**row(None, metric="perplexity", score=score), "seed": 0, "chain": [{"name": name}]}
        for name, score in (("a", 20.0), ("b", 25.0))
    ]
    (found,) = verdicts.judge([about], rows)
    assert (found.measured, found.verdict) == (5.0, "holds (one seed)")
    assert figures.metric("accuracy@5").unit == "%"
    with pytest.raises(UnknownName, match="Did you mean 'perplexity'"):
        figures.metric("perplexty")
