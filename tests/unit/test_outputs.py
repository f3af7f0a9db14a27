"""Scores of deployed outputs, and the warnings that follow from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import entropy

from harness import arrays, metrics
from harness.contracts import Port, Signature, Workload
from harness.errors import InputError, NotFinite
from harness.measure.outputs import Scores, answer, scored
from harness.measure.run import output_warnings, query_inputs, runtime_warnings
from tests.unit.fake_hardware import Constant


def entry(name: str, outputs: Any, against: Any) -> dict[str, Any]:
    scores = Scores(metrics.create(name), {"name": name}, "validation", "torch", None)
    scores.add({"output": outputs}, {"output": against})
    return scores.entry()


def test_fidelity_agrees_with_scipy() -> None:
    generator = np.random.default_rng(0)
    reference = generator.normal(size=(50, 10)).astype(np.float32)
    outputs = reference + generator.normal(scale=0.5, size=reference.shape).astype(np.float32)
    p, q = softmax(reference.astype(np.float64), axis=1), softmax(outputs.astype(np.float64), axis=1)
    assert entry("mean-kl", outputs, reference)["value"] == pytest.approx(entropy(p, q, axis=1).mean(), rel=1e-9)
    largest = np.abs(reference.astype(np.float64) - outputs.astype(np.float64)).max()
    assert entry("max-abs", outputs, reference)["value"] == largest
    top1 = entry("top1-agreement", outputs, reference)["value"]
    assert top1 == (p.argmax(1) == q.argmax(1)).mean()
    assert 0 < top1 < 1


def test_equal_outputs_are_faithful_even_where_the_softmax_saturates() -> None:
    logits = np.array([[1000.0, 0.0], [-1000.0, 3.0]], np.float32)
    assert [entry(name, logits, logits)["value"] for name in ("max-abs", "top1-agreement", "mean-kl")] == [
        0.0,
        1.0,
        0.0,
    ]


def test_nan_is_refused_with_a_count() -> None:
    with pytest.raises(NotFinite, match="3 of 3 examples"):
        answer(Constant("nan"), {"input": np.zeros((3, 1), np.float32)})


def test_short_batches_are_filled_and_the_fillers_dropped() -> None:
    seen: list[int] = []

    class Counts(Constant):
        def bind(self, inputs: Any) -> None:
            seen.append(len(inputs["input"]))
            super().bind(inputs)

    assert len(answer(Counts("ok"), {"input": np.zeros((3, 1))}, size=8)["output"]) == 3
    assert seen == [8]


def test_an_artifact_is_loaded_once_for_each_shape(tmp_path: Any) -> None:
    batches = [
        ({"input": np.ones((n, width), np.float32)}, {"y": np.arange(n)}) for n, width in ((5, 2), (3, 2), (2, 4))
    ]
    arrays.write(tmp_path, batches)
    loads, taken = [], []

    def load(inputs: Any) -> Constant:
        loads.append(inputs["input"].shape)
        return Constant("ok")

    scored(
        load,
        arrays.read(tmp_path),
        4,
        lambda outputs, targets: taken.append((len(outputs["output"]), targets["y"].tolist())),
    )
    assert loads == [(4, 2), (4, 4)]
    assert taken == [(4, [0, 1, 2, 3]), (4, [4, 0, 1, 2]), (2, [0, 1])]


@dataclass(frozen=True)
class Wrong:
    """A metric that leaves too few parts."""

    name: ClassVar[str] = "wrong"
    unit: ClassVar[str] = ""
    better: ClassVar[str] = "lower"
    parts: ClassVar[tuple[str, ...]] = ("a", "b")
    proportion: ClassVar[bool] = False

    def score(self, outputs: Any, against: Any) -> Any:
        return np.zeros(len(outputs["output"]))

    def value(self, scores: Any) -> Any:
        return 0.0


def test_a_metric_that_breaks_its_word_is_named() -> None:
    scores: Any = Scores(Wrong(), {"name": "wrong"}, "test", "targets", None)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"'wrong' returned scores of shape \(3,\); \(3, 2\)"):
        scores.add({"output": np.zeros((3, 1))}, {})


def test_queries_have_the_workloads_sizes() -> None:
    signature = Signature(
        inputs=(Port(name="ids", shape=("tokens",), dtype="int64"), Port(name="x", shape=(2,))),
        outputs=(Port(name="output", shape=(2,)),),
    )
    inputs = {"ids": np.arange(6).reshape(2, 3), "x": np.ones((2, 2))}
    query = query_inputs(inputs, signature, Workload(sizes={"tokens": 5}), 3)
    assert query["ids"].tolist() == [[0, 1, 2, 0, 1], [3, 4, 5, 3, 4], [0, 1, 2, 0, 1]]
    assert query["x"].shape == (3, 2)
    assert query_inputs(inputs, signature, Workload(sizes={"tokens": 2}), 1)["ids"].tolist() == [[0, 1]]
    assert query_inputs(inputs, signature, Workload(), 1)["ids"].tolist() == [[0, 1, 2]]


def found(against: str, metric: str, value: float) -> dict[str, Any]:
    return {"against": against, "metric": metric, "value": value, "n": 256, "data": "validation"}


def test_whose_doing_a_difference_is_stands_in_the_warning() -> None:
    runtime = output_warnings([found("torch", "top1-agreement", 0.5)], {"precision": "int8"})
    assert len(runtime) == 1
    assert "the runtime's or the export's" in runtime[0]
    quantization = output_warnings([found("float", "top1-agreement", 0.5)], {"precision": "int8"})
    assert len(quantization) == 1
    assert "quantization did to the model" in quantization[0]
    assert not output_warnings([found("targets", "accuracy", 0.1)], {"precision": "f32"})


def test_outputs_that_differ_without_changing_the_class_are_warned_of() -> None:
    agreeing = found("torch", "top1-agreement", 1.0)
    assert "12.0 dB" in output_warnings([agreeing, found("torch", "sqnr", 12.0)], {"precision": "f32"})[0]
    assert not output_warnings([agreeing, found("torch", "sqnr", 12.0)], {"precision": "int8"})
    assert not output_warnings([agreeing, found("torch", "sqnr", 120.0)], {"precision": "f32"})


def test_what_the_runtime_does_otherwise_is_warned_of() -> None:
    assert not runtime_warnings({"threads": 1, "precision": "f32"}, 1)
    assert "reports 2" in runtime_warnings({"threads": 2, "precision": "f32"}, 1)[0]
    assert "Only 40%" in runtime_warnings({"threads": 1, "precision": "int8", "mac_share": {"int8": 0.4}}, 1)[0]
