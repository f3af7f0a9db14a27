"""What a task is about, as a number: one metric an object; :data:`TABLE` is the only list of them.

A metric is a frozen dataclass whose fields are its parameters; see :class:`harness.contracts.Metric`. It leaves some
numbers for every example, and makes one figure of any set of examples, so that intervals and paired tests
(:mod:`harness.stats`) are the same for all. Nothing heavy is imported here, and torch by none of them: the process that
measures has none.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from harness.registry import Entry

if TYPE_CHECKING:
    from harness.contracts import Metric

TABLE: dict[str, Entry] = {
    "accuracy": Entry("harness.metrics.classes:Accuracy", "share of examples whose class is right"),
    "accuracy@5": Entry("harness.metrics.classes:Accuracy", "share whose class is among the first five", {"k": 5}),
    "f1": Entry("harness.metrics.classes:F1", "mean F1 of the classes"),
    "f1@binary": Entry("harness.metrics.classes:F1", "F1 of class 1 of two", {"average": "binary"}),
    "matthews": Entry("harness.metrics.classes:Matthews", "Matthews' correlation of classes"),
    "average-precision": Entry("harness.metrics.classes:AveragePrecision", "area under precision and recall"),
    "mean-iou": Entry("harness.metrics.classes:MeanIoU", "overlap of segments, mean of the classes"),
    "perplexity": Entry("harness.metrics.tokens:Perplexity", "exp of the mean loss of a token"),
    "rmse": Entry("harness.metrics.values:RMSE", "root of the mean squared error"),
    "mae": Entry("harness.metrics.values:MAE", "mean absolute error"),
    "r2": Entry("harness.metrics.values:R2", "share of the variance that is explained"),
    "psnr": Entry("harness.metrics.values:PSNR", "peak signal-to-noise ratio of images"),
    "pearson": Entry("harness.metrics.values:Pearson", "linear correlation"),
    "spearman": Entry("harness.metrics.values:Spearman", "correlation of ranks"),
    "max-abs": Entry("harness.metrics.fidelity:MaxAbs", "largest difference of outputs to a reference's"),
    "sqnr": Entry("harness.metrics.fidelity:SQNR", "signal to noise of outputs against a reference's"),
    "top1-agreement": Entry("harness.metrics.fidelity:Top1Agreement", "share with the reference's top class"),
    "mean-kl": Entry("harness.metrics.fidelity:MeanKL", "divergence of the reference's probabilities"),
}


def create(item: str | Mapping[str, Any]) -> Metric:
    """The metric of a registered name or ``module:Class``, or of a mapping of "name" and parameters.

    Raises
    ------
    UnknownName, SpecError
        For a name, a parameter or a value that is not allowed, and for a class that is no metric.
    """
    from harness import registry
    from harness.metrics.check import check

    parameters = {"name": item} if isinstance(item, str) else dict(item)
    name = parameters.pop("name", None)
    if not isinstance(name, str):
        from harness.errors import SpecError
        from harness.text import shown

        raise SpecError(f'A metric is a name or {{name = "accuracy", …}}, not {shown(item)}.')
    metric: Metric = registry.create("metric", name, parameters)
    check(metric, f"metric {name!r}")
    return metric


def checked(metric: Metric, where: str) -> Metric:
    """A metric that is an object already, such as one that the user's function returned, if it can be made again.

    The process that measures makes it anew of its :func:`config`.

    Raises
    ------
    SpecError
        If it is no metric, or its fields do not say all that it is.
    """
    from harness import registry
    from harness.errors import AssayError, SpecError, explanation
    from harness.metrics.check import check

    kind = type(metric)
    registry.check_kind("metric", f"{kind.__module__}:{kind.__qualname__}", kind)
    check(metric, f"{where}: metric {kind.__qualname__!r}")
    try:
        again = create(config(metric))
    except AssayError as error:
        raise SpecError(
            f"{where}: metric {kind.__qualname__!r} cannot be made again where it is measured: {explanation(error)} "
            "Write the class into a module of its own, with fields of numbers and texts."
        ) from error
    if again != metric:
        raise SpecError(
            f"{where}: metric {metric!r} is {again!r} when it is made again: its fields must say all of it."
        )
    return metric


def config(metric: Metric) -> dict[str, Any]:
    """What :func:`create` makes this metric of: its name and its parameters, as JSON values."""
    from harness import registry

    kind = type(metric)
    target = f"{kind.__module__}:{kind.__qualname__}"
    names = (name for name, entry in registry.table("metric").items() if entry.target == target)
    found: dict[str, Any] = {"name": next(names, target)}
    for field in dataclasses.fields(metric):  # type: ignore[arg-type]  # checked: a metric is a dataclass
        value = getattr(metric, field.name)
        # An output or target that nobody chose is left out, and so are not among the parameters of every record.
        if field.init and not (value is None and field.default is None):
            found[field.name] = list(value) if isinstance(value, tuple) else value
    return found
