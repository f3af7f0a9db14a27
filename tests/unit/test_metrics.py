"""Every metric against scikit-learn, SciPy or torch, on random and degenerate examples; labels that do not fit."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from harness import metrics
from harness.contracts import Metric
from harness.errors import InputError, NotFinite, SpecError, UnknownName

Array = np.ndarray[Any, Any]


def measured(item: str | Mapping[str, Any], output: Any, target: Any) -> float:
    metric = metrics.create(item)
    scores = metric.score({"output": np.asarray(output)}, {"target": np.asarray(target)})
    assert scores.dtype == np.float64
    assert scores.shape == (len(np.asarray(output)), len(metric.parts))
    return float(metric.value(scores))


def logits(seed: int, n: int, classes: int) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, classes, n)
    # Rounded, so that equal scores occur; the label's own score is raised, so that some are right.
    scores = np.round(rng.normal(size=(n, classes)) + 1.5 * np.eye(classes)[label], 1)
    return scores.astype(np.float32), label


SIZES = pytest.mark.parametrize(("seed", "n", "classes"), [(0, 500, 7), (1, 300, 2), (2, 1, 3), (3, 5, 11), (4, 2, 2)])


def test_every_name_makes_a_metric_that_its_config_makes_again() -> None:
    for name in metrics.TABLE:
        metric = metrics.create(name)
        assert isinstance(metric, Metric)
        assert metric.name == name
        config = metrics.config(metric)
        assert metrics.create(config) == metric
        assert config["name"] in metrics.TABLE
    assert metrics.config(metrics.create("accuracy@5")) == {"name": "accuracy", "k": 5, "ignore": []}
    assert metrics.create({"name": "rmse", "output": "depth"}).name == "rmse[depth]"
    assert metrics.create({"name": "accuracy", "k": 3, "target": "fine"}).name == "accuracy@3[fine]"


@SIZES
@pytest.mark.parametrize("k", [1, 2, 3])
def test_accuracy_is_scikit_learns(seed: int, n: int, classes: int, k: int) -> None:
    scores, label = logits(seed, n, classes)
    if k > classes:
        with pytest.raises(InputError, match="must not exceed"):
            measured({"name": "accuracy", "k": k}, scores, label)
        return
    # Equal scores: the first counts as higher, as argmax has it. So the k first of a stable sort.
    first = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    expected = (first == label[:, None]).any(axis=1).mean()
    assert measured({"name": "accuracy", "k": k}, scores, label) == pytest.approx(expected, abs=1e-15)
    if k == 1:
        assert expected == pytest.approx(sk.accuracy_score(label, scores.argmax(1)), abs=1e-15)
    clear = scores + np.random.default_rng(seed).random(scores.shape) * 1e-3
    if classes > max(2, k):
        top = sk.top_k_accuracy_score(label, clear, k=k, labels=range(classes))
        assert measured({"name": "accuracy", "k": k}, clear, label) == pytest.approx(top, abs=1e-15)


def test_accuracy_leaves_whether_right_label_and_prediction() -> None:
    metric = metrics.create({"name": "accuracy", "ignore": [-1]})
    output = np.array([[0.0, 1, 0], [2, 1, 0], [0, 0, 1]])
    scores = metric.score({"y": output}, {"label": np.array([1, 2, -1])})
    assert scores[:2].tolist() == [[1, 1, 1], [0, 2, 0]]
    assert np.isnan(scores[2]).all()
    assert metric.value(scores) == 0.5
    assert math.isnan(metric.value(scores[2:]))
    assert math.isnan(metric.value(scores[:0]))


@SIZES
def test_f1_and_matthews_are_scikit_learns(seed: int, n: int, classes: int) -> None:
    scores, label = logits(seed, n, classes)
    guess = scores.argmax(1)
    assert measured("f1", scores, label) == pytest.approx(sk.f1_score(label, guess, average="macro"), abs=1e-12)
    expected = sk.matthews_corrcoef(label, guess) if len(set(label)) > 1 else math.nan
    assert measured("matthews", scores, label) == pytest.approx(expected, abs=1e-12, nan_ok=True)
    if classes == 2:
        found = measured("f1@binary", scores, label)
        assert found == pytest.approx(sk.f1_score(label, guess, zero_division=math.nan), abs=1e-12, nan_ok=True)


def test_one_class_only() -> None:
    ones, zeros = np.tile([0.0, 1.0], (6, 1)), np.tile([1.0, 0.0], (6, 1))
    mixed = np.array([0, 1, 0, 1, 1, 0])
    assert measured("matthews", ones, mixed) == 0.0 == sk.matthews_corrcoef(mixed, np.ones(6))
    assert math.isnan(measured("matthews", ones, np.ones(6, int)))
    assert math.isnan(measured("f1@binary", zeros, np.zeros(6, int)))
    assert measured("f1@binary", zeros, mixed) == 0.0
    assert measured("f1", zeros, np.zeros(6, int)) == 1.0
    assert math.isnan(measured("average-precision", zeros, np.zeros(6, int)))
    assert measured("average-precision", zeros, np.ones(6, int)) == 1.0


@pytest.mark.parametrize(("seed", "n"), [(0, 400), (1, 7), (2, 2), (3, 50)])
@pytest.mark.parametrize("digits", [1, 7])
def test_average_precision_is_scikit_learns(seed: int, n: int, digits: int) -> None:
    rng = np.random.default_rng(seed)
    label = np.concatenate([[1], rng.integers(0, 2, n - 1)])
    score = np.round(rng.normal(size=n) + label, digits)
    expected = sk.average_precision_score(label, score)
    assert measured("average-precision", score, label) == pytest.approx(expected, abs=1e-12)
    two = np.stack([-score, score], axis=1)
    assert measured("average-precision", two, label.astype(bool)) == pytest.approx(expected, abs=1e-12)


def test_mean_iou_is_scikit_learns_over_the_whole_set() -> None:
    rng = np.random.default_rng(0)
    scores, label = rng.normal(size=(6, 5, 8, 9)), rng.integers(0, 4, (6, 8, 9))
    scores[:, 4] -= 9  # neither labelled nor predicted: it does not count
    label[0, :2] = 255
    valid = label != 255
    expected = sk.jaccard_score(label[valid], scores.argmax(1)[valid], average="macro")
    item = {"name": "mean-iou", "classes": 5, "ignore": [255]}
    assert measured(item, scores, label) == pytest.approx(expected, abs=1e-12)
    assert measured(item, scores, label[..., None]) == pytest.approx(expected, abs=1e-12)
    with pytest.raises(InputError, match=r"Set classes = 5\."):
        measured("mean-iou", scores, label)
    with pytest.raises(InputError, match=r'name = "mean-iou", ignore = \[255\]'):
        measured({"name": "mean-iou", "classes": 5}, scores, label)


@pytest.mark.parametrize("shift", [True, False])
def test_perplexity_is_torchs(shift: bool) -> None:
    rng = np.random.default_rng(0)
    scores = (30 * rng.normal(size=(5, 9, 17)) + 1e4).astype(np.float32)
    target = rng.integers(0, 17, (5, 9))
    target[1, 4:] = -100
    target[3] = -100
    a, b = torch.tensor(scores).double(), torch.tensor(target)
    if shift:
        a, b = a[:, :-1], b[:, 1:]
    expected = torch.nn.functional.cross_entropy(a.flatten(0, 1), b.flatten()).exp().item()
    assert measured({"name": "perplexity", "shift": shift}, scores, target) == pytest.approx(expected, rel=1e-12)
    kept = metrics.create({"name": "perplexity", "shift": shift}).score({"x": scores}, {"y": target})
    assert np.isnan(kept[3]).all()
    assert kept[[0, 1], 1].tolist() == ([8, 3] if shift else [9, 4])


def test_perplexity_in_blocks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, target = np.random.default_rng(0).normal(size=(2, 50, 7)), np.random.default_rng(1).integers(0, 7, (2, 50))
    whole = measured("perplexity", scores, target)
    monkeypatch.setattr("harness.metrics.tokens._BLOCK", 20)
    assert measured("perplexity", scores, target) == pytest.approx(whole, rel=1e-14)


def test_perplexity_refuses_other_shapes_and_ids() -> None:
    scores = np.zeros((2, 3, 5))
    with pytest.raises(InputError, match=r"\(n, tokens, vocabulary\)"):
        measured("perplexity", scores, np.zeros((2, 2), int))
    with pytest.raises(InputError, match="no next token"):
        measured("perplexity", scores[:, :1], np.zeros((2, 1), int))
    with pytest.raises(InputError, match=r"ignore = \[-1\]"):
        measured("perplexity", scores, np.full((2, 3), -1))
    with pytest.raises(InputError, match=r"labels hold 9 .* 0 to 4"):
        measured("perplexity", scores, np.full((2, 3), 9))
    with pytest.raises(NotFinite):
        measured("perplexity", np.full((2, 3, 5), np.nan), np.zeros((2, 3), int))


@given(seed=st.integers(0, 10_000), n=st.integers(1, 40), digits=st.integers(0, 6), offset=st.sampled_from([0.0, 1e6]))
@settings(max_examples=60, deadline=None)
def test_metrics_of_values_are_scipys_and_scikit_learns(seed: int, n: int, digits: int, offset: float) -> None:
    rng = np.random.default_rng(seed)
    target = np.round(rng.normal(size=n), digits) + offset
    output = np.round(target + rng.normal(size=n), digits)
    assert measured("rmse", output, target) == pytest.approx(sk.root_mean_squared_error(target, output), rel=1e-9)
    assert measured("mae", output, target[:, None]) == pytest.approx(sk.mean_absolute_error(target, output), rel=1e-9)
    varied = np.ptp(target) > 0
    r2 = sk.r2_score(target, output) if varied and n > 1 else math.nan
    assert measured("r2", output[:, None], target) == pytest.approx(r2, rel=1e-7, abs=1e-7, nan_ok=True)
    both = varied and np.ptp(output) > 0
    pearson = stats.pearsonr(output, target).statistic if both else math.nan
    assert measured("pearson", output, target) == pytest.approx(pearson, abs=1e-7, nan_ok=True)
    spearman = stats.spearmanr(output, target).statistic if both else math.nan
    assert measured("spearman", output, target) == pytest.approx(spearman, abs=1e-12, nan_ok=True)


def test_several_values_an_example() -> None:
    rng = np.random.default_rng(0)
    output, target = rng.normal(size=(20, 3, 4)), rng.normal(size=(20, 3, 4))
    assert measured("rmse", output, target) == pytest.approx(np.sqrt(((output - target) ** 2).mean()))
    assert measured("mae", output, target) == pytest.approx(np.abs(output - target).mean())
    for name in ("r2", "pearson", "spearman"):
        with pytest.raises(InputError, match="12 values; one is expected"):
            measured(name, output, target)


def test_psnr_is_the_mean_of_the_images() -> None:
    rng = np.random.default_rng(0)
    target = rng.random((3, 1, 8, 8)).astype(np.float32)
    output = target + rng.normal(size=target.shape).astype(np.float32) * np.array([0.1, 0.2, 0.4])[:, None, None, None]
    each = [
        10 * math.log10(255**2 / sk.mean_squared_error(a.ravel(), b.ravel()))
        for a, b in zip(output, target, strict=True)
    ]
    assert measured({"name": "psnr", "range": 255}, output, target) == pytest.approx(np.mean(each), rel=1e-6)
    assert measured("psnr", target, target) == math.inf


def test_a_column_is_not_broadcast_against_a_row() -> None:
    with pytest.raises(InputError, match="equal shapes"):
        measured("rmse", np.zeros((4, 2)), np.zeros(4))
    assert measured("rmse", np.arange(4.0), np.arange(4.0)[:, None]) == 0.0
    with pytest.raises(InputError, match="holds NaN or infinity for 1 of 2"):
        measured("rmse", np.zeros(2), np.array([np.nan, 0]))
    with pytest.raises(InputError, match="numbers are expected"):
        measured("rmse", np.zeros(2), np.array(["a", "b"]))
    # Bytes are numbers, and do not wrap around.
    assert measured("mae", np.zeros(2, np.uint8), np.full(2, 255, np.uint8)) == 255


@pytest.mark.parametrize("shape", [(50, 10), (20, 6, 8), (5, 3, 4, 4), (30, 1), (30,)])
def test_fidelity_is_torchs(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    reference = rng.normal(size=shape).astype(np.float32) * 3
    output = (reference + 0.3 * rng.normal(size=shape)).astype(np.float32)
    a, b = torch.tensor(reference).double(), torch.tensor(output).double()
    if a.ndim == 1 or shape[1:] == (1,):
        a, b = (torch.stack([torch.zeros(30).double(), x.flatten()], 1) for x in (a, b))
    if a.ndim == 4:
        a, b = a.movedim(1, -1), b.movedim(1, -1)
    kl = torch.nn.functional.kl_div(b.log_softmax(-1), a.log_softmax(-1), reduction="none", log_target=True)

    def found(name: str) -> float:
        metric = metrics.create(name)
        return float(metric.value(metric.score({"y": output}, {"y": reference})))

    assert found("mean-kl") == pytest.approx(kl.sum(-1).mean().item(), rel=1e-9)
    assert found("top1-agreement") == pytest.approx((a.argmax(-1) == b.argmax(-1)).double().mean().item())
    assert found("max-abs") == pytest.approx((a - b).abs().max().item(), rel=1e-12)
    noise = ((output.astype(float) - reference) ** 2).sum()
    assert found("sqnr") == pytest.approx(10 * math.log10((reference.astype(float) ** 2).sum() / noise), rel=1e-9)


def test_fidelity_of_equal_outputs() -> None:
    outputs = {"a": np.random.default_rng(0).normal(size=(9, 4)), "b": np.ones((9, 2))}
    values = {}
    for name in ("max-abs", "sqnr", "top1-agreement", "mean-kl"):
        metric = metrics.create(name)
        values[name] = float(metric.value(metric.score(outputs, outputs)))
    assert values == {"max-abs": 0.0, "sqnr": math.inf, "top1-agreement": 1.0, "mean-kl": 0.0}
    other = metrics.create({"name": "max-abs", "output": "b"})
    assert other.value(other.score(outputs, {"a": outputs["a"], "b": np.zeros((9, 2))})) == 1.0
    with pytest.raises(InputError, match="no reference 'c'"):
        metrics.create({"name": "max-abs", "target": "c"}).score(outputs, outputs)
    with pytest.raises(InputError, match="equal shapes"):
        metrics.create("max-abs").score(outputs, {"a": np.zeros((9, 1))})


def by_hand(metric: Metric, scores: Array) -> Array:
    return np.array([float(metric.value(rows)) for rows in scores])


@pytest.mark.parametrize("name", [name for name in metrics.TABLE if name != "mean-iou"])
def test_value_takes_leading_axes_and_weights_are_repetitions(name: str) -> None:
    metric: Any = metrics.create(name)
    rng = np.random.default_rng(0)
    scores = np.round(rng.random((30, len(metric.parts))) * 3) + (0 if "label" in metric.parts else 1)
    if metric.proportion:
        scores[:, 0] = scores[:, 0] > 1
    if name == "average-precision":
        scores[:, 0] = scores[:, 0] > 1
    index = rng.integers(0, 30, (8, 30))
    expected = by_hand(metric, scores[index])
    np.testing.assert_allclose(metric.value(scores[index]), expected, rtol=1e-12)
    np.testing.assert_allclose(metric.value(scores[index].reshape(2, 4, 30, -1)), expected.reshape(2, 4), rtol=1e-12)
    weights = np.stack([np.bincount(row, minlength=30) for row in index]).astype(float)
    np.testing.assert_allclose(metric.weighted(scores)(weights), expected, rtol=1e-10)


LABELS = {
    "shifted": ([1, 2, 3, 4], r"labels hold 4 for 1 of 4; integers from 0 to 3 .* subtract 1"),
    "unknown": ([0, -1, 255, 1], r'metric = \{name = "accuracy", ignore = \[-1, 255\]\}'),
    "far": ([0, 9, -1, 2], r"labels hold -1, 9 .* 0 to 3 .* output for every class"),
    "one hot": (np.eye(4, dtype=int), r"one-hot.* labels.argmax\(1\)"),
    "one hot bool": (np.eye(4, dtype=bool), r"one-hot.* labels.argmax\(1\)"),
    "float": ([0.0, 1.0, 2.0, 3.0], r"float64 \(0.0, 1.0, 2.0, 3.0\).* int64"),
    "nan": ([np.nan, 1.0, 0.0, 0.0], "int64"),
    "bool": ([True, False, True, True], "True and False, and the model has 4 outputs"),
    "text": (["a", "b", "c", "a"], r"\('a', 'b', 'c'\).* 0 to 3 .* Map the names"),
    "objects": (np.array(["a", 1, None, 2.0], dtype=object), "Map the names"),
    "short": ([0, 1, 2], r"labels have shape \(3,\); \(4,\) is expected"),
    "wide": (np.zeros((4, 2), int), r"labels have shape \(4, 2\)"),
    "complex": (np.zeros(4, complex), "complex128"),
    "huge": (np.array([0, 1, 2, 2**63 + 1], dtype=np.uint64), "9223372036854775809"),
}


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.parametrize("name", ["accuracy", "f1", "matthews"])
def test_labels_that_do_not_fit_are_refused_with_the_remedy(kind: str, name: str) -> None:
    given, message = LABELS[kind]
    with pytest.raises(InputError, match=message.replace('"accuracy"', f'"{name}"')):
        measured(name, np.eye(4, dtype=np.float32), given)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int16, np.int32, np.int64, np.uint64])
def test_labels_of_any_integer_type_and_columns_are_taken(dtype: Any) -> None:
    assert measured("accuracy", np.eye(4), np.arange(4, dtype=dtype)) == 1.0
    assert measured("accuracy", np.eye(4), np.arange(4, dtype=dtype)[:, None]) == 1.0


@pytest.mark.parametrize(
    "output", [np.array([1.0, -1, 2, -2]), np.array([[1.0], [-1], [2], [-2]]), np.eye(2)[[1, 0, 1, 0]]]
)
@pytest.mark.parametrize("dtype", [bool, np.int64, np.float32, np.uint8])
def test_two_classes_take_booleans_and_floats(output: Array, dtype: Any) -> None:
    label = np.array([1, 0, 0, 0]).astype(dtype)
    assert measured("accuracy", output, label) == 0.75
    assert measured("f1@binary", output, label) == pytest.approx(2 / 3)
    assert measured("accuracy", output, label[:, None]) == 0.75
    with pytest.raises(InputError, match="count from 1"):
        measured("accuracy", output, np.array([1, 2, 1, 2]))
    with pytest.raises(InputError, match="float64"):
        measured("accuracy", output, np.array([0.0, 0.5, 1.0, 0.0]))


def test_outputs_that_no_class_can_be_read_of() -> None:
    with pytest.raises(InputError, match=r"one score a class, \(n, classes\)"):
        measured("accuracy", np.zeros((4, 3, 2)), np.zeros(4, int))
    with pytest.raises(NotFinite, match="1 of 4 examples"):
        measured("accuracy", np.where(np.eye(4)[0] == 1, np.nan, 0.0)[:, None], np.zeros(4, int))
    with pytest.raises(InputError, match="two are expected, or one logit"):
        measured("average-precision", np.zeros((4, 3)), np.zeros(4, int))
    with pytest.raises(InputError, match='use average = "macro"'):
        measured("f1@binary", np.zeros((4, 3)), np.zeros(4, int))
    metric = metrics.create({"name": "accuracy", "output": "b"})
    with pytest.raises(InputError, match=r"no output .b.\. Allowed: a"):
        metric.score({"a": np.eye(2)}, {"y": np.arange(2)})
    with pytest.raises(InputError, match="there is no target"):
        metrics.create("accuracy").score({"a": np.eye(2)}, {})


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    name = "metric_of_a_user"

    def write(text: str) -> str:
        sys.modules.pop(name, None)
        (tmp_path / f"{name}.py").write_text("from dataclasses import dataclass\nimport numpy as np\n" + text)
        return f"{name}:Mine"

    monkeypatch.syspath_prepend(tmp_path)
    yield write
    sys.modules.pop(name, None)


MINE = """
@dataclass(frozen=True)
class Mine:
    power: float = 2.0
    name = "mine"
    unit = ""
    better = "lower"
    parts = ("error",)
    proportion = False

    def score(self, outputs, against):
        return np.abs(outputs["y"] - against["t"])[:, None] ** self.power

    def value(self, scores):
        return scores[..., 0].mean(axis=-1)
"""


def test_the_users_own_metric(module: Any) -> None:
    metric = metrics.create({"name": module(MINE), "power": 1})
    assert metrics.config(metric) == {"name": "metric_of_a_user:Mine", "power": 1.0}
    assert metrics.create(metrics.config(metric)) == metric
    assert metric.value(metric.score({"y": np.zeros(3)}, {"t": np.arange(3.0)})) == 1.0


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("@dataclass(frozen=True)", "@dataclass", "must be a frozen dataclass"),
        ("def value", "def figure", "the class has no value"),
        ('better = "lower"', 'better = "less"', 'better must be "higher" or "lower"; it is \'less\''),
        ('parts = ("error",)', 'parts = "error"', "parts must be a tuple of texts"),
        ('parts = ("error",)', 'parts = ("a", "a")', "different names"),
        ('unit = ""', "", "the class has no 'unit'"),
        ('name = "mine"', "name = None", "name must be a text"),
        ("proportion = False", "proportion = 0", "proportion must be True or False"),
        (".mean(axis=-1)", ".mean()", r"must have shape \(2,\), one figure for each leading index; it has \(\)"),
        (".mean(axis=-1)", ".median()", "raised AttributeError"),
        ('parts = ("error",)', "parts = property(lambda self: 1 / 0)", "reading 'parts' raised ZeroDivisionError"),
    ],
)
def test_a_class_that_is_no_metric_is_refused(module: Any, old: str, new: str, message: str) -> None:
    assert old in MINE
    with pytest.raises(SpecError, match=message):
        metrics.create(module(MINE.replace(old, new)))


def test_wrong_names_and_parameters_are_refused() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'accuracy'"):
        metrics.create("acuracy")
    with pytest.raises(SpecError, match="no parameter 'K'"):
        metrics.create({"name": "accuracy", "K": 5})
    with pytest.raises(SpecError, match="greater than or equal to 1"):
        metrics.create({"name": "accuracy", "k": 0})
    with pytest.raises(SpecError, match="A metric is a name or"):
        metrics.create({"k": 5})


def test_no_metric_needs_torch() -> None:
    import subprocess

    code = (
        "import sys\nfrom harness import metrics\n"
        "for name in metrics.TABLE: metrics.create(name)\n"
        "assert 'torch' not in sys.modules and 'scipy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_object_is_checked_and_must_be_made_of_its_fields(module: Any) -> None:
    metric = metrics.create({"name": module(MINE), "power": 3})
    assert metrics.checked(metric, "Task") is metric
    assert metrics.checked(metrics.create("accuracy@5"), "Task").name == "accuracy@5"
    local = type("Local", (type(metric),), {"__module__": __name__})(2.0)
    with pytest.raises(SpecError, match="cannot be made again where it is measured"):
        metrics.checked(local, "Task")
    unequal = MINE.replace("@dataclass(frozen=True)", "@dataclass(frozen=True, eq=False)")
    hidden = metrics.create(module(unequal))
    with pytest.raises(SpecError, match="its fields must say all of it"):
        metrics.checked(hidden, "Task")


@dataclass(frozen=True)
class Unused:
    """A dataclass without a metric's members."""


def test_a_dataclass_without_the_members_is_refused() -> None:
    with pytest.raises(SpecError, match="is no metric"):
        metrics.create(f"{__name__}:Unused")
