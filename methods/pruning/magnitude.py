"""Magnitude pruning: the smallest weights become zero."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from harness.errors import Unsupported

if TYPE_CHECKING:
    from harness.contracts import Context

_PRUNABLE = (
    nn.Linear,
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
)


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Magnitude:
    """Zero the weights of smallest absolute value, optionally fine-tune with the zeros kept.

    The weights of all convolutions and linear layers are pruned, the first and the last included; biases,
    normalisation parameters, embeddings and ``nn.MultiheadAttention``'s packed projections are not. Exactly
    ``round(sparsity * n)`` of ``n`` weights are zero; of equal magnitudes the one that comes first goes first.

    Source: Han et al., "Learning both Weights and Connections for Efficient Neural Networks", NeurIPS 2015, §3
    (prune by magnitude, retrain what is left at a tenth of the learning rate). Their threshold is a multiple of each
    layer's standard deviation; here the share of zeros is given instead.

    ::

        @inproceedings{han2015learning,
          title     = {Learning both Weights and Connections for Efficient Neural Networks},
          author    = {Han, Song and Pool, Jeff and Tran, John and Dally, William J.},
          booktitle = {Advances in Neural Information Processing Systems},
          year      = {2015}
        }

    Parameters
    ----------
    sparsity : float
        Share of zero weights, in [0, 1).
    scope : {"global", "layer"}
        Rank the weights of all layers together, or of each layer by itself.
    finetune_epochs : int
        Epochs of fine-tuning after pruning, with ``recipe.finetune``; the zeros stay zero.
    """

    uses_scheme: ClassVar[bool] = False

    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.5
    scope: Literal["global", "layer"] = "global"
    finetune_epochs: Annotated[int, Field(ge=0)] = 0

    def unsupported(self, model: nn.Module, context: Context) -> str | None:
        """A reason: no such layer, a layer that would lose every weight, or nothing to fine-tune on."""
        if not (weights := prunable_weights(model)):
            return "the model has no convolution or linear layer whose weights could be pruned"
        for name, kept in self._masks(weights).items():
            if not kept.any():
                return (
                    f"sparsity {self.sparsity:g} ({self.scope}) would zero all {kept.numel()} weights "
                    f"of layer {name!r}; " + ('lower it or use scope="layer"' if self.scope == "global" else "lower it")
                )
        if self.finetune_epochs and (context.trainer is None or context.recipe is None):
            return f"finetune_epochs={self.finetune_epochs} needs a task with training data and a training recipe"
        return None

    def compress(self, model: nn.Module, context: Context) -> nn.Module:
        """Return a copy of ``model`` with the smallest weights zero.

        Raises
        ------
        Unsupported
            See :meth:`unsupported`.
        """
        if reason := self.unsupported(model, context):
            raise Unsupported(reason)
        pruned = copy.deepcopy(model)
        weights = prunable_weights(pruned)
        masks = self._masks(weights)
        _apply(weights, masks)
        context.progress(0.0, "zero weights: " + ", ".join(_share(name, kept) for name, kept in masks.items()))
        if self.finetune_epochs:
            self._finetune(pruned, weights, masks, context)
        return pruned

    def _masks(self, weights: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        """Boolean masks, True where a weight is kept, by layer name."""
        if self.scope == "layer":
            return {name: _largest(weight.detach().abs(), self.sparsity) for name, weight in weights.items()}
        magnitudes = torch.cat([weight.detach().abs().flatten().cpu() for weight in weights.values()])
        parts = torch.split(_largest(magnitudes, self.sparsity), [weight.numel() for weight in weights.values()])
        return {
            name: part.view_as(weight).to(weight.device)
            for (name, weight), part in zip(weights.items(), parts, strict=True)
        }

    def _finetune(
        self, model: nn.Module, weights: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor], context: Context
    ) -> None:
        if context.trainer is None or context.recipe is None:
            raise Unsupported("fine-tuning needs a task with training data and a training recipe")
        # Masked gradients keep the optimizer's momentum at zero for pruned weights; masks after each step make the
        # zeros exact whatever else the optimizer does (weight decay, a warm start of its state).
        hooks = [
            weight.register_hook(masks[name].to(weight.dtype).mul)  # type: ignore[no-untyped-call]
            for name, weight in weights.items()
        ]
        try:
            context.trainer(
                model, context.recipe.finetune(self.finetune_epochs), after_step=lambda _: _apply(weights, masks)
            )
        finally:
            for hook in hooks:
                hook.remove()
        _apply(weights, masks)


def prunable_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Weights of convolutions and linear layers by layer name, each tensor once (tied weights)."""
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if isinstance(module, _PRUNABLE) and weight is not None and id(weight) not in seen:
            seen.add(id(weight))
            found[name or "model"] = weight
    return found


def _largest(magnitudes: Tensor, sparsity: float) -> Tensor:
    """True everywhere but at the ``round(sparsity * n)`` smallest entries (the first of equal ones)."""
    kept = torch.ones(magnitudes.numel(), dtype=torch.bool, device=magnitudes.device)
    order = magnitudes.flatten().argsort(stable=True)
    kept[order[: round(sparsity * magnitudes.numel())]] = False
    return kept.view_as(magnitudes)


def _apply(weights: Mapping[str, nn.Parameter], masks: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, weight in weights.items():
            weight.masked_fill_(~masks[name], 0.0)


def _share(name: str, kept: Tensor) -> str:
    return f"{name} {1 - kept.double().mean().item():.1%}"
