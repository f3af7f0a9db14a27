"""What training minimises, and what can be inferred from outputs and targets where nobody said.

A loss is a frozen dataclass that is called with named outputs and named targets; see :class:`harness.contracts.Loss`.
Labels are checked as the metrics check them, since an index out of range ends some devices' programs without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from harness.errors import InputError
from harness.metrics.reading import labels, pick
from harness.metrics.tokens import check_tokens, shifted

if TYPE_CHECKING:
    from torch import Tensor

    from harness.contracts import Loss, Metric, Tensors

_IGNORED = -100
_IGNORE = "the loss {}(ignore={{ignore}}) and metric = {{{{name = {}, ignore = {{ignore}}}}}}"


@dataclass(frozen=True, kw_only=True)
class _Chosen:
    """A loss of one output.

    Parameters
    ----------
    output, target : str or None
        Their names; the first where None.
    """

    output: str | None = None
    target: str | None = None

    def pair(self, outputs: Tensors, targets: Tensors) -> tuple[Tensor, Tensor]:
        """The output and the target."""
        who = type(self).__name__
        output, target = pick(outputs, self.output, "output", who), pick(targets, self.target, "target", who)
        if not output.is_floating_point():
            raise InputError(f"{who}: the output is {output.dtype}; a floating-point type is expected.")
        return output, target


@dataclass(frozen=True, kw_only=True)
class CrossEntropy(_Chosen):
    """Mean cross-entropy in nats of scores (n, classes) or (n, classes, height, width) against labels.

    Parameters
    ----------
    ignore : tuple of int
        Labels that mean "no label"; any other must be a class.
    output, target : str or None
        Their names; the first where None.
    """

    ignore: tuple[int, ...] = ()

    def __call__(self, outputs: Tensors, targets: Tensors, label_smoothing: float = 0.0) -> Tensor:
        """See :class:`harness.contracts.Loss`."""
        scores, target = self.pair(outputs, targets)
        if scores.ndim < 2 or scores.shape[1] < 2:
            raise InputError(
                f"CrossEntropy: outputs have shape {tuple(scores.shape)}; two or more scores an example are expected, "
                "(n, classes). For one logit use BinaryCrossEntropy, for values MeanSquaredError."
            )
        shape = (len(scores), *scores.shape[2:])
        metric = f'"mean-iou", classes = {scores.shape[1]}' if scores.ndim == 4 else '"accuracy"'
        label = _labels(
            target, shape, scores.shape[1], self.ignore, "CrossEntropy", _IGNORE.format("CrossEntropy", metric)
        )
        return _cross_entropy(scores, label, label_smoothing)


@dataclass(frozen=True, kw_only=True)
class BinaryCrossEntropy(_Chosen):
    """Mean binary cross-entropy in nats of logits against targets of the same shape, from 0 to 1; (n,) is (n, 1).

    Parameters
    ----------
    ignore : tuple of int
        Targets that mean "no label".
    output, target : str or None
        Their names; the first where None.
    """

    ignore: tuple[int, ...] = ()

    def __call__(self, outputs: Tensors, targets: Tensors, label_smoothing: float = 0.0) -> Tensor:
        """See :class:`harness.contracts.Loss`."""
        import torch
        from torch.nn import functional as F

        who = "BinaryCrossEntropy"
        logits, target = self.pair(outputs, targets)
        wanted = _shaped(target, logits, who)
        if not wanted.is_floating_point():
            wanted = _labels(wanted, tuple(logits.shape), 2, self.ignore, who, _IGNORE.format(who, '"accuracy"'))
        ignored = torch.tensor((_IGNORED, *self.ignore) if self.ignore else (), device=wanted.device)
        counts = torch.isin(wanted, ignored, invert=True)
        if not bool(counts.any()):
            return logits.sum() * 0.0  # the mean of nothing would be NaN, and end the training
        logits, wanted = logits[counts], wanted[counts].to(logits.dtype)
        if not bool(((wanted >= 0) & (wanted <= 1)).all()):
            raise InputError(
                f"{who}: targets lie between {float(wanted.min()):g} and {float(wanted.max()):g}; 0 to 1 is expected. "
                "For classes use CrossEntropy and one output a class, for values MeanSquaredError."
            )
        return F.binary_cross_entropy_with_logits(logits, wanted * (1 - label_smoothing) + label_smoothing / 2)


@dataclass(frozen=True, kw_only=True)
class MeanSquaredError(_Chosen):
    """Mean squared error of outputs against targets of the same shape; (n,) is (n, 1)."""

    def __call__(self, outputs: Tensors, targets: Tensors, label_smoothing: float = 0.0) -> Tensor:
        """See :class:`harness.contracts.Loss`."""
        from torch.nn import functional as F

        if label_smoothing:
            raise InputError(
                f"MeanSquaredError has no label smoothing; the recipe asks for {label_smoothing}: "
                "set label_smoothing = 0."
            )
        output, target = self.pair(outputs, targets)
        return F.mse_loss(output, _shaped(target, output, "MeanSquaredError").to(output.dtype))


@dataclass(frozen=True, kw_only=True)
class TokenCrossEntropy(_Chosen):
    """Mean cross-entropy in nats of a token, scores (n, tokens, vocabulary) against token ids (n, tokens).

    Parameters
    ----------
    shift : bool
        True: targets are the input's ids, and the scores at position t are held against the token at t + 1, as in
        transformers. False: targets are the next tokens already, or labels of the tokens themselves. As
        :class:`harness.metrics.tokens.Perplexity` has it.
    ignore : tuple of int
        Targets that do not count, such as padding.
    output, target : str or None
        Their names; the first where None.
    """

    shift: bool = True
    ignore: tuple[int, ...] = (_IGNORED,)

    def __call__(self, outputs: Tensors, targets: Tensors, label_smoothing: float = 0.0) -> Tensor:
        """See :class:`harness.contracts.Loss`."""
        who = "TokenCrossEntropy"
        scores, target = self.pair(outputs, targets)
        check_tokens(scores, target, self.shift, who)
        remedy = _IGNORE.format(who, '"perplexity"')
        label = _labels(target, tuple(target.shape), scores.shape[2], self.ignore, who, remedy)
        scores, label = shifted(scores, label, self.shift)
        return _cross_entropy(scores.flatten(0, 1), label.flatten(), label_smoothing)


@dataclass(frozen=True, kw_only=True)
class Inferred:
    """What a task is about, as far as its outputs and targets say.

    Parameters
    ----------
    loss : Loss
    metrics : tuple of Metric
        Against targets; the first is the one that tables show.
    fidelity : tuple of Metric
        Against the torch model's outputs.
    notes : tuple of str
        What was inferred, one sentence each.
    """

    loss: Loss
    metrics: tuple[Metric, ...]
    fidelity: tuple[Metric, ...]
    notes: tuple[str, ...]


VALUE_FIDELITY = ("max-abs", "sqnr")
"""Metrics of outputs against torch's, whatever the outputs are."""
CLASS_FIDELITY = (*VALUE_FIDELITY, "top1-agreement", "mean-kl")
"""The same where the outputs are scores of classes."""

_REMEDY = "Say what they mean: give a loss and metrics beside the model."


def infer(outputs: Tensors, targets: Tensors, like: Metric | None = None) -> Inferred:
    """Loss and metrics of some examples' first output and first target.

    ====================================  ============================  =======================================
    outputs                               targets                       inferred
    ====================================  ============================  =======================================
    (n, classes)                          classes (n,) or (n, 1)        cross-entropy, accuracy
    (n,) or (n, 1)                        0 and 1, (n,) or (n, 1)       binary cross-entropy, accuracy
    (n, tokens, vocabulary)               integers (n, tokens)          next token's cross-entropy, perplexity
    (n, classes, height, width)           classes (n, height, width)    cross-entropy, mean IoU
    (n, channels, height, width)          floats of the same shape      mean squared error, PSNR, RMSE
    any                                   floats of the same shape      mean squared error, RMSE
    ====================================  ============================  =======================================

    Parameters
    ----------
    outputs, targets : Tensors
        Of as many examples as are at hand: 0 and 1 are told from other values by what occurs.
    like : Metric or None
        A metric that was given: the loss reads the same output and target, ignores the same labels and shifts alike.

    Raises
    ------
    InputError
        If they fit none of these, or labels are not right.
    """
    who = "The loss"
    names = {kind: getattr(like, kind, None) for kind in ("output", "target")}
    target = pick(targets, names["target"], "target", who)
    if names["output"] is None and len(outputs) > 1:
        names["output"] = _meant(outputs, target, like)
    output = pick(outputs, names["output"], "output", who)
    name, target_name = names["output"] or next(iter(outputs)), names["target"] or next(iter(targets))
    ignore, shift = tuple(getattr(like, "ignore", ())), bool(getattr(like, "shift", True))
    if not output.is_floating_point():
        raise InputError(f"The output {name!r} is {output.dtype}, so no loss can be inferred. {_REMEDY}")
    found = _of_labels(output, target, ignore, shift) or _of_values(output, target)
    if found is None:
        raise InputError(
            f"No loss can be inferred of outputs {name!r} {tuple(output.shape)} and targets {target_name!r} "
            f"{tuple(target.shape)}, {str(target.dtype).removeprefix('torch.')}. Allowed: classes (n,) for outputs (n, "
            "classes); 0 and 1 for one output; token ids (n, tokens) for (n, tokens, vocabulary); classes (n, height, "
            f"width) for (n, classes, height, width); floats of the outputs' shape. {_REMEDY}"
        )
    loss, metrics, fidelity, why = found
    loss = replace(loss, **names)
    loss({name: output.detach()}, {target_name: target})  # refuses labels that are not right
    others = [
        f"{kind} {', '.join(other for other in values if other != used)}"
        for kind, values, used in (("output", outputs, name), ("target", targets, target_name))
        if len(values) > 1
    ]
    notes: tuple[str, ...] = (
        f"Inferred from {name!r} {tuple(output.shape)} and {target_name!r} {tuple(target.shape)}: {why}.",
    )
    if others:
        notes += (f"Not scored: {'; '.join(others)}.",)
    return Inferred(
        loss=loss,
        metrics=_create(names, *metrics),
        fidelity=_create({"output": names["output"]}, *fidelity),
        notes=notes,
    )


_Found = tuple[Any, tuple[Any, ...], tuple[str, ...], str]
_SCORES = ("logits", "scores", "predictions", "prediction", "pred", "out")
"""Names under which models give what is scored."""


def _meant(outputs: Tensors, target: Tensor, like: Metric | None) -> str | None:
    """Which of several outputs the targets are about; None: the first.

    Raises
    ------
    InputError
        If that is open: features beside scores would be scored without a word.
    """
    import torch

    first = next(iter(outputs))
    counted = target[~torch.isin(target, torch.tensor(getattr(like, "ignore", ()), dtype=target.dtype))]
    classes = 0 if target.is_floating_point() or not counted.numel() else int(counted.max()) + 1
    fitting = [name for name, output in outputs.items() if _fits(output, target, classes)]
    named = [name for name in fitting if name.rpartition(".")[2].lower() in _SCORES]
    # Scores have as many columns as there are classes; where some classes were not seen, it shows in no output.
    exact = [name for name in fitting if classes and _width(outputs[name]) == classes]
    best = named or exact or fitting
    alike = len({outputs[name].shape for name in best}) == 1
    if not best or (first in best and (named or exact or alike)):
        return None
    if alike and like is None:
        return best[0]
    shapes = ", ".join(f"{name!r} {tuple(outputs[name].shape)}" for name in fitting)
    raise InputError(
        f"The model has several outputs that the targets may be about: {shapes}. Say which by a metric, such as "
        f'metrics = [{{"name": "accuracy", "output": "{best[0]}"}}], or return only one.'
    )


def _fits(output: Tensor, target: Tensor, classes: int) -> bool:
    """Whether targets may be about an output, by its shape and the largest label."""
    if target.is_floating_point():
        return _without_one(target) == _without_one(output)
    n = len(output)
    if output.ndim <= 2:
        shaped = target.ndim == 1 or tuple(target.shape) == (n, 1)
    else:
        shaped = tuple(target.shape) == ((n, output.shape[1]) if output.ndim == 3 else (n, *output.shape[2:]))
    return shaped and classes <= _width(output)


def _width(output: Tensor) -> int:
    """Classes that an output has scores of; one logit is of two."""
    if output.ndim < 2 or (output.ndim == 2 and output.shape[1] == 1):
        return 2
    return output.shape[2 if output.ndim == 3 else 1]


def _of_labels(output: Tensor, target: Tensor, ignore: tuple[int, ...], shift: bool) -> _Found | None:
    """Loss, metrics, fidelity and reason, where the targets are labels."""
    n, whole = len(output), not target.is_floating_point()
    flat = target.ndim == 1 or tuple(target.shape) == (n, 1)
    accuracy = {"name": "accuracy", "ignore": list(ignore)}
    if flat and (output.ndim == 1 or tuple(output.shape) == (n, 1)):
        if not whole and not _is_binary(target, ignore):
            return None
        why = "one logit of two classes, binary cross-entropy, accuracy"
        return BinaryCrossEntropy(ignore=ignore), (accuracy,), CLASS_FIDELITY, why
    # One-hot labels are taken for labels, so that they are refused with the remedy, and are not values.
    if output.ndim == 2 and (flat or (target.shape == output.shape and (whole or _is_one_hot(target)))):
        why = f"{output.shape[1]} classes, cross-entropy, accuracy"
        return CrossEntropy(ignore=ignore), (accuracy,), CLASS_FIDELITY, why
    if output.ndim == 3 and whole and target.shape == output.shape[:2]:
        ignore = ignore or (_IGNORED,)
        metric = {"name": "perplexity", "shift": shift, "ignore": list(ignore)}
        why = "the next token, cross-entropy, perplexity, " + (
            "scores at t held against the token at t + 1; where targets are next tokens already, or labels of the "
            'tokens, give metric = {name = "perplexity", shift = false}'
            if shift
            else "scores at t held against the target at t"
        )
        return TokenCrossEntropy(ignore=ignore, shift=shift), (metric,), CLASS_FIDELITY, why
    if output.ndim == 4 and output.shape[1] > 1 and whole and target.shape == (n, *output.shape[2:]):
        metric = {"name": "mean-iou", "classes": output.shape[1], "ignore": list(ignore)}
        why = f"{output.shape[1]} classes of pixels, cross-entropy, mean IoU"
        return CrossEntropy(ignore=ignore), (metric,), CLASS_FIDELITY, why
    return None


def _of_values(output: Tensor, target: Tensor) -> _Found | None:
    """The same where they are values."""
    if not target.is_floating_point() or _without_one(target) != _without_one(output):
        return None
    if output.ndim == 2 and output.shape[1] > 1 and set(target.flatten().tolist()) == {0.0, 1.0}:
        raise InputError(
            f"The targets of {output.shape[1]} outputs are 0 and 1 as floats: they may be several labels an example or "
            "values. For labels give the loss BinaryCrossEntropy() and a metric beside the model, for values "
            "MeanSquaredError() and rmse."
        )
    if output.ndim != 4:
        return MeanSquaredError(), ("rmse",), VALUE_FIDELITY, "values, mean squared error, RMSE"
    low, high = float(target.min()), float(target.max())
    if low < -1 or high > 255 or (low < 0 and high > 1):
        return MeanSquaredError(), ("rmse",), VALUE_FIDELITY, "images of no usual range, mean squared error, RMSE"
    span = 2.0 if low < 0 else 1.0 if high <= 1 else 255.0
    psnr = {"name": "psnr", "range": span}
    why = f"images, mean squared error, PSNR for a range of {span:g} (targets lie between {low:g} and {high:g})"
    return MeanSquaredError(), (psnr, "rmse"), VALUE_FIDELITY, why


def _is_binary(target: Tensor, ignore: tuple[int, ...]) -> bool:
    """Whether floats of one output are classes 0 and 1, and not values; refused where they may be either."""
    found = set(target.flatten().tolist()) - set(ignore)
    if found in ({0.0}, {1.0}):
        raise InputError(
            f"One output, and all {len(target)} targets looked at are {found.pop():g} as floats: they may be classes "
            f"or values. Give classes as int64. {_REMEDY}"
        )
    return found == {0.0, 1.0}


def _is_one_hot(target: Tensor) -> bool:
    return bool(((target == 0) | (target == 1)).all() and (target.sum(dim=1) == 1).all())


def _without_one(tensor: Tensor) -> tuple[int, ...]:
    shape = tuple(tensor.shape)
    return shape[:-1] if len(shape) == 2 and shape[1] == 1 else shape


def _shaped(target: Tensor, output: Tensor, who: str) -> Tensor:
    """The target in the output's shape; broadcasting would compare every example with every other."""
    if _without_one(target) != _without_one(output):
        raise InputError(
            f"{who}: outputs have shape {tuple(output.shape)} and targets {tuple(target.shape)}; "
            "equal shapes are expected."
        )
    return target.reshape(output.shape)


def _labels(
    target: Tensor, shape: tuple[int, ...], classes: int, ignore: tuple[int, ...], who: str, remedy: str
) -> Tensor:
    """The labels as int64, checked; ignored ones are -100."""
    import numpy as np
    import torch

    values = target.detach().cpu()
    array = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    label, counts = labels(array, shape, classes, ignore, who, remedy)
    return torch.from_numpy(np.where(counts, label, _IGNORED)).to(target.device)


def _cross_entropy(scores: Tensor, label: Tensor, label_smoothing: float) -> Tensor:
    from torch.nn import functional as F

    if not bool((label != _IGNORED).any()):
        return scores.sum() * 0.0  # the mean of nothing would be NaN, and end the training
    return F.cross_entropy(scores, label, ignore_index=_IGNORED, label_smoothing=label_smoothing)


def _create(chosen: Mapping[str, Any], *items: Any) -> tuple[Metric, ...]:
    from harness import metrics

    return tuple(
        metrics.create({"name": item, **chosen} if isinstance(item, str) else {**item, **chosen}) for item in items
    )
