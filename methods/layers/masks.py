"""Masks: which weights are kept, and a training that holds the others at zero."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from harness.errors import Unsupported
from methods.layers.prunable import prunable_weights
from methods.layers.training import training

if TYPE_CHECKING:
    from harness.contracts import Context, Recipe, Step

Scope = Literal["global", "layer", "erk"]
Masks = dict[str, Tensor]
"""By layer name: a boolean tensor of the weight's shape, True where a weight is kept."""


def removals(weights: Mapping[str, Tensor], sparsity: float, scope: Literal["layer", "erk"]) -> dict[str, int]:
    """How many weights each layer loses.

    ``"layer"``: ``round(sparsity * n)`` of every layer's n. ``"erk"``: Erdős-Rényi-Kernel budgets (Evci et al. 2020,
    arXiv:1911.11134, §3 and appendix I): a layer's density is proportional to the sum of its weight's dimensions
    divided by their product, at most 1; ``round(sparsity * n)`` of all n weights are lost together. Kept counts are
    rounded by Webster's divisor method, so that a higher sparsity never gives a layer a weight back.

    Parameters
    ----------
    weights : mapping
        Weight tensors (out, in, ...) by layer name.
    sparsity : float
        Share of zeros, in [0, 1).
    scope : {"layer", "erk"}
        Which budgets.

    Returns
    -------
    dict
        Zeros by layer name.
    """
    sizes = {name: weight.numel() for name, weight in weights.items()}
    if scope == "layer":
        return {name: round(sparsity * size) for name, size in sizes.items()}
    kept = sum(sizes.values()) - round(sparsity * sum(sizes.values()))
    raw = {name: float(sum(weight.shape)) for name, weight in weights.items()}  # density * size, up to a factor
    dense: set[str] = set()
    while True:
        left = kept - sum(sizes[name] for name in dense)
        factor = left / max(sum(value for name, value in raw.items() if name not in dense), 1.0)
        over = {name for name in raw if name not in dense and factor * raw[name] > sizes[name]}
        if not over:
            break
        dense |= over
    counts = {name: sizes[name] if name in dense else round(factor * raw[name]) for name in raw}
    while (missing := kept - sum(counts.values())) > 0:
        counts[min((n for n in raw if counts[n] < sizes[n]), key=lambda n: (counts[n] + 0.5) / raw[n])] += 1
    for _ in range(-missing):
        counts[max((n for n in raw if counts[n] > 0), key=lambda n: (counts[n] - 0.5) / raw[n])] -= 1
    return {name: sizes[name] - counts[name] for name in sizes}


def keep_highest(scores: Mapping[str, Tensor], sparsity: float, scope: Scope) -> Masks:
    """Masks that drop the lowest scores; of equal ones the first goes first.

    Parameters
    ----------
    scores : mapping
        By layer name, shaped as the weights.
    sparsity : float
        Share of zeros, in [0, 1).
    scope : {"global", "layer", "erk"}
        Rank the weights of all layers together, or of each layer by itself with the budgets of :func:`removals`.

    Returns
    -------
    dict
        Masks; exactly ``round(sparsity * n)`` entries (of all layers together; with "layer", of each) are False.
    """
    if scope == "global":
        everything = torch.cat([score.detach().flatten().cpu() for score in scores.values()])
        kept = _without_lowest(everything, round(sparsity * everything.numel()))
        parts = torch.split(kept, [score.numel() for score in scores.values()])
        return {
            name: part.view_as(score).to(score.device)
            for (name, score), part in zip(scores.items(), parts, strict=True)
        }
    lost = removals(scores, sparsity, scope)
    return {name: _without_lowest(score.detach(), lost[name]) for name, score in scores.items()}


def _without_lowest(scores: Tensor, count: int) -> Tensor:
    """True everywhere but at the ``count`` lowest entries (the first of equal ones)."""
    kept = torch.ones(scores.numel(), dtype=torch.bool, device=scores.device)
    kept[scores.flatten().argsort(stable=True)[:count]] = False
    return kept.view_as(scores)


def random_masks(weights: Mapping[str, Tensor], sparsity: float, scope: Scope, seed: int) -> Masks:
    """Masks of that sparsity, drawn uniformly from ``seed``; see :func:`keep_highest`."""
    return keep_highest(random_scores(weights, seed), sparsity, scope)


def random_scores(weights: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Uniform scores of the weights' shapes, on the CPU."""
    draw = generator(seed, "masks")
    # In float32, a million draws hold thousands of equal pairs, and ties are not broken at random.
    return {name: torch.rand(weight.shape, generator=draw, dtype=torch.float64) for name, weight in weights.items()}


def generator(seed: int, purpose: str) -> torch.Generator:
    """A random generator whose draws are independent of those that other purposes take from the same seed."""
    state = int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8]) >> 1
    return torch.Generator().manual_seed(state)


def apply(weights: Mapping[str, Tensor], masks: Mapping[str, Tensor]) -> None:
    """Zero the weights that are not kept, in place."""
    with torch.no_grad():
        for name, mask in masks.items():
            weights[name].masked_fill_(~mask, 0.0)


def refuse_emptied(masks: Mapping[str, Tensor], setting: str, remedy: str = "lower it") -> None:
    """Check that every layer keeps a weight; ``setting`` is what the user wrote.

    Raises
    ------
    Unsupported
        Naming the first layer that would lose them all.
    """
    for name, mask in masks.items():
        if not mask.any():
            raise Unsupported(f"{setting} would zero all {mask.numel()} weights of layer {name!r}; {remedy}")


def refuse_unaffordable(weights: Mapping[str, Tensor], sparsity: float, scope: Literal["layer", "erk"]) -> None:
    """Check that no layer's budget of :func:`removals` is all its weights.

    Raises
    ------
    Unsupported
        Naming the first layer that would lose them all.
    """
    for name, lost in removals(weights, sparsity, scope).items():
        if lost == weights[name].numel():
            raise Unsupported(
                f"sparsity {sparsity:g} ({scope}) would zero all {lost} weights of layer {name!r}; lower it"
            )


def forget(optimizer: torch.optim.Optimizer, weight: Tensor, where: Tensor) -> None:
    """Zero what the optimizer remembers of the entries ``where`` (boolean, the weight's shape) of a parameter."""
    for value in optimizer.state.get(weight, {}).values():
        if isinstance(value, Tensor) and value.shape == weight.shape:
            value.masked_fill_(where, 0.0)


def shares(masks: Mapping[str, Tensor]) -> str:
    """The share of zeros by layer, for a progress message."""
    return "zero weights: " + ", ".join(f"{name} {1 - mask.double().mean().item():.1%}" for name, mask in masks.items())


@dataclass(frozen=True, kw_only=True)
class MaskedTraining:
    """A training in which pruned weights stay exactly zero, and so does what the optimizer remembers of them.

    The gradients of pruned weights are zeroed before the optimizer sees them: zero weights without gradient and without
    memory are moved neither by momentum nor by weight decay nor by Adam, and one pass over the gradient is all that it
    costs. Where the masks have changed, or a step's gradients were wanted as they are, the weights and every tensor of
    the optimizer's state that has a weight's shape (momentum, Adam's moments) are masked after the step: what grows
    again later has no memory of its past.

    Parameters
    ----------
    masks : dict
        By layer name; a layer that is not in it is trained densely. ``change`` may replace entries.
    change : callable, optional
        ``change(step, masks)`` after every optimizer step, before the masks are applied; returns True where it
        changed ``masks``.
    reads_gradients : callable, optional
        ``reads_gradients(index)``: whether ``change`` reads the gradients of pruned weights after step ``index``
        (from 0). By default after every step, where ``change`` is given.
    """

    masks: Masks
    change: Callable[[Step, Masks], bool] | None = None
    reads_gradients: Callable[[int], bool] | None = None

    def __call__(
        self,
        model: nn.Module,
        context: Context,
        recipe: Recipe,
    ) -> Mapping[str, float]:
        """Train ``model`` in place.

        Raises
        ------
        Unsupported
            If there is nothing to train on.
        """
        fit = training(context, "training with masks").fit
        weights = prunable_weights(model)
        hold = _Hold(weights, self.masks, self.change, self.reads_gradients)
        hooks = [
            weights[name].register_post_accumulate_grad_hook(hold.gradient_hook(name))  # type: ignore[no-untyped-call]
            for name in self.masks
            if weights[name].requires_grad
        ]
        apply(weights, self.masks)
        try:
            metrics = fit(model, recipe, after_step=hold.after_step)
        finally:
            for hook in hooks:
                hook.remove()
        # A product with zero keeps the sign of what was there, and NaN; -0.0 would be another byte pattern than 0.0.
        apply(weights, self.masks)
        return metrics


def finetune(model: nn.Module, kept: Masks, context: Context, epochs: int, lr_scale: float) -> nn.Module:
    """Fine-tune ``model`` in place with its zeros kept, where ``epochs`` is not 0, and return it.

    Raises
    ------
    Unsupported
        If there is nothing to train on.
    """
    if epochs:
        recipe = training(context, f"finetune_epochs={epochs}").recipe.finetune(epochs, lr_scale)
        MaskedTraining(masks=kept)(model, context, recipe)
    return model


class _Hold:
    """What keeps pruned weights at zero during one training."""

    def __init__(
        self,
        weights: Mapping[str, nn.Parameter],
        masks: Masks,
        change: Callable[[Step, Masks], bool] | None,
        reads_gradients: Callable[[int], bool] | None,
    ) -> None:
        self._weights = weights
        self._masks = masks
        self._change = change
        self._reads_gradients = reads_gradients or (lambda _: change is not None)
        self._factors: dict[str, Tensor] = {}
        self._index = 0
        self._without_gradient: set[str] = set()

    def gradient_hook(self, name: str) -> Callable[[Tensor], None]:
        """Masks the gradient of a layer's weight as soon as the backward pass has it."""

        def hook(weight: Tensor) -> None:
            if weight.grad is not None and not self._reads_gradients(self._index):
                weight.grad.mul_(self._factor(name))
                self._without_gradient.add(name)

        return hook

    def after_step(self, step: Step) -> None:
        changed = self._change is not None and self._change(step, self._masks)
        if changed:
            self._factors.clear()
        for name in self._masks:
            if changed or name not in self._without_gradient:
                weight, factor = self._weights[name], self._factor(name)
                weight.mul_(factor)
                for value in step.optimizer.state.get(weight, {}).values():
                    if isinstance(value, Tensor) and value.shape == weight.shape:
                        value.mul_(factor)
        self._without_gradient.clear()
        self._index = step.index + 1

    def _factor(self, name: str) -> Tensor:
        """The mask as numbers, laid out in memory as the weight is (channels last, during training)."""
        if name not in self._factors:
            layout = torch.empty_like(self._weights[name], requires_grad=False)
            self._factors[name] = layout.copy_(self._masks[name])
        return self._factors[name]
