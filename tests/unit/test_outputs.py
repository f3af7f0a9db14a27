from __future__ import annotations

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import entropy

from harness.errors import NotFinite
from harness.measure.outputs import answer, fidelity
from tests.unit.fake_hardware import Constant


def test_fidelity_agrees_with_scipy() -> None:
    generator = np.random.default_rng(0)
    reference = generator.normal(size=(50, 10)).astype(np.float32)
    outputs = reference + generator.normal(scale=0.5, size=reference.shape).astype(np.float32)
    got = fidelity(outputs, reference)
    p, q = softmax(reference.astype(np.float64), axis=1), softmax(outputs.astype(np.float64), axis=1)
    assert got["mean_kl"] == pytest.approx(entropy(p, q, axis=1).mean(), rel=1e-9)
    assert got["max_abs"] == np.abs(reference.astype(np.float64) - outputs.astype(np.float64)).max()
    assert got["top1"] == (p.argmax(1) == q.argmax(1)).mean()
    assert 0 < got["top1"] < 1


def test_equal_outputs_are_faithful_even_where_the_softmax_saturates() -> None:
    logits = np.array([[1000.0, 0.0], [-1000.0, 3.0]], np.float32)
    assert fidelity(logits, logits) == {"max_abs": 0.0, "top1": 1.0, "mean_kl": 0.0, "n": 2}


def test_nan_is_refused_with_a_count() -> None:
    with pytest.raises(NotFinite, match="3 of 3 examples"):
        answer(Constant("nan"), np.zeros((3, 1), np.float32))
