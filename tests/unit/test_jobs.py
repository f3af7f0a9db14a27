from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from harness.contracts import Port, Signature, Workload
from harness.jobs import Deployment, Item, MeasureJob, PrepareJob, from_json, to_json
from harness.spec import Spec

SIGNATURE = Signature(
    inputs=(Port(name="x", shape=(3, "width")), Port(name="ids", shape=("tokens",), dtype="int64", values=30)),
    outputs=(Port(name="y", shape=()),),
)
DEPLOYMENT = Deployment(
    artifact=Path("/cache/model.onnx"),
    signature=SIGNATURE,
    workload=Workload(phases=(("prefill", 1), ("decode", 63)), sizes={"tokens": 128}, unit="token"),
    reference=Path("/cache/reference"),
    reference_data="validation",
    test=None,
    test_sha256=None,
    eval_batch=100,
    metrics=({"name": "accuracy", "k": 1},),
    fidelity=(),
    quantized=False,
)


def test_jobs_survive_json() -> None:
    (cell,) = Spec(task="digits-cnn", method={"name": "magnitude", "sparsity": 0.5}).cells()
    measure = MeasureJob(
        hardware=Item("torch", {}),
        threads=1,
        batch_size=2,
        measure=cell.measure,
        energy=cell.energy,
        deployment=DEPLOYMENT,
    )
    for job in (PrepareJob(cell=cell, not_before=1.5), measure):
        text = json.dumps(to_json(job))
        assert to_json(from_json(type(job), json.loads(text))) == to_json(job)
    again = from_json(MeasureJob, json.loads(json.dumps(to_json(measure))))
    assert again == measure
    assert again.deployment.signature == SIGNATURE


def test_a_field_of_another_type_is_named() -> None:
    with pytest.raises(ValidationError, match="eval_batch"):
        from_json(Deployment, {**to_json(DEPLOYMENT), "eval_batch": "many"})
    with pytest.raises(ValidationError, match="artifact"):
        from_json(Deployment, {key: value for key, value in to_json(DEPLOYMENT).items() if key != "artifact"})
