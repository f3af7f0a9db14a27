"""Records of format 1 are read in format 2, and nothing is lost on the way."""

from __future__ import annotations

import hashlib

from harness.canonical import dumps
from harness.record import SCHEMA_VERSION, upgrade

OLD = {
    "run_id": "a",
    "labels": [0, 1, 2, 1],
    "predictions": [0, 1, 1, 1],
    "n_examples": 4,
    "n_correct": 3,
    "latency_ns": [5, 6, 7],
    "fidelity": {"max_abs": 0.25, "top1": 1.0, "mean_kl": 0.01, "n": 256, "data": "train"},
    "schema": 1,
    "warnings": ["kept"],
}


def test_an_old_record_says_the_same_in_the_new_form():
    new = upgrade(OLD)
    assert new["schema"] == SCHEMA_VERSION
    assert not {"labels", "predictions", "n_examples", "n_correct", "latency_ns", "fidelity"} & set(new)
    assert new["latency"] == {"forward": [5, 6, 7]}
    assert new["warnings"] == ["kept"]
    accuracy, *fidelity = new["scores"]
    assert (accuracy["metric"], accuracy["against"], accuracy["data"], accuracy["n"]) == (
        "accuracy",
        "targets",
        "test",
        4,
    )
    assert accuracy["value"] == 0.75
    assert accuracy["parts"] == {"correct": [1, 1, 0, 1], "label": [0, 1, 2, 1], "predicted": [0, 1, 1, 1]}
    assert accuracy["split_sha256"] == "labels:" + hashlib.sha256(dumps([0, 1, 2, 1]).encode()).hexdigest()
    assert {score["metric"]: score["value"] for score in fidelity} == {
        "max-abs": 0.25,
        "top1-agreement": 1.0,
        "mean-kl": 0.01,
    }
    assert all(score["against"] == "torch" and score["data"] == "train" and score["n"] == 256 for score in fidelity)


def test_a_record_that_measured_nothing_stays_so():
    new = upgrade({"run_id": "a", "labels": None, "n_examples": None, "latency_ns": [], "fidelity": None})
    assert new["scores"] == []
    assert new["latency"] == {}


def test_a_record_of_this_format_is_left_alone_and_upgrading_is_pure():
    before = dict(OLD)
    once = upgrade(OLD)
    assert before == OLD
    assert upgrade(once) == once
