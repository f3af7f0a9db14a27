"""SynFlow: prune the untrained network without data, conserving synaptic flow, then train what is left."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import nn
from torch.overrides import TorchFunctionMode

from harness.calling import call
from methods.layers import masks, promises
from methods.layers.attention import explicit
from methods.layers.inputs import made_up
from methods.layers.masks import Masks
from methods.layers.prunable import prunable_weights
from methods.pruning.at_initialisation import finite, start, train

if TYPE_CHECKING:
    from torch import Tensor

    from harness.contracts import Context, Signature, Tensors

_PASSED_ON = frozenset(
    {
        "relu", "relu_", "relu6", "hardtanh", "hardtanh_", "leaky_relu", "leaky_relu_", "prelu", "rrelu", "elu", "elu_",
        "selu", "selu_", "celu", "gelu", "silu", "mish", "hardswish", "softplus", "softsign", "tanh", "tanh_",
        "tanhshrink", "batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm", "local_response_norm"
    }
)  # fmt: skip
"""Names of the activations and normalisations that the scored network does without."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class SynFlow:
    """Remove, in many small steps, the connections that carry least synaptic flow, then train from there.

    The flow is the summed output ``R`` of the network with all weights replaced by their absolute values, on one input
    of ones; a weight's score is ``dR/d|w| * |w|``. Scores are summed to the same total in every layer of a network
    with ReLUs, and computed anew ``iterations`` times while the density falls exponentially to its goal, so no layer is
    pruned away before all others are (their theorem 3). No data are used. Computed in float64, for the products of many
    layers.

    The network that is scored is the paper's ``R``, a product of weights: normalisations and activations pass their
    input on, vectors that scale (a normalisation's, ConvNeXt's layer scale) are one and biases zero. For ReLU and for
    BatchNorm at initialisation in evaluation mode, as in the authors' code, that is so anyway (but for BatchNorm's
    epsilon, and biases, whose absolute values they add); others would saturate at flows this large. So would a softmax,
    which the paper does not treat: attention's shares are here in proportion to the products of queries and keys, not
    to their exponentials, and their sum, which they are divided by, counts as a constant. Queries, keys and values of a
    layer then carry the same flow. Gates stay. The weights trained afterwards keep sign and value.

    The network is the task's own as its training begins (``Training.fresh``), with the task's initialisation. Of the
    trained model given only the structure is used.

    Source: Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic flow",
    NeurIPS 2020, §5-6 and algorithm 1.

    ::

        @inproceedings{tanaka2020pruning,
          title     = {Pruning neural networks without any data by iteratively conserving synaptic flow},
          author    = {Tanaka, Hidenori and Kunin, Daniel and Yamins, Daniel L. K. and Ganguli, Surya},
          booktitle = {Advances in Neural Information Processing Systems},
          year      = {2020}
        }

    Parameters
    ----------
    sparsity : float
        Share of zero weights, in [0, 1), of all layers together.
    iterations : int
        Rounds of scoring and pruning: after round k of n the density is ``(1 - sparsity) ** (k / n)``.
    epochs : int, optional
        Of the training after pruning, instead of the recipe's; 0 leaves the network untrained.
    """

    sparsity: Annotated[float, Field(ge=0, lt=1)] = 0.9
    iterations: Annotated[int, Field(gt=0)] = 100
    epochs: Annotated[int, Field(ge=0)] | None = None

    def compress(self, model: nn.Module, context: Context) -> nn.Module:
        """Return the task's network, pruned at initialisation and trained.

        Raises
        ------
        Unsupported
            If there is no such layer, no network to train from scratch, or a layer would lose every weight.
        NotFinite
            If the flow overflows float64, or training diverges.
        """
        network, recipe = start(model, context, self.epochs)
        kept = prune(network, context, self.sparsity, self.iterations)
        masks.refuse_emptied(kept, f"sparsity {self.sparsity:g}")
        return train(network, kept, context, recipe)

    def promises(self, original: nn.Module, compressed: nn.Module) -> Iterator[str]:
        """Exactly the share of zeros that was asked for, and no layer without a weight."""
        yield from promises.same_parameters(original, compressed)
        yield from promises.sparsity(compressed, self.sparsity, "global")
        yield from promises.no_layer_is_empty(compressed)


def prune(network: nn.Module, context: Context, sparsity: float, iterations: int) -> Masks:
    """Masks by iterated synaptic flow (the paper's algorithm 1).

    Parameters
    ----------
    network : nn.Module
        Left untouched.
    context : Context
        Gives the signature.
    sparsity : float
        Share of zeros, in [0, 1).
    iterations : int
        Rounds.

    Returns
    -------
    dict
        Masks with exactly ``round(sparsity * n)`` False entries.

    Raises
    ------
    NotFinite
        If the flow overflows.
    """
    linear = linearized(network)
    inputs = ones(linear, context)
    weights = prunable_weights(linear)
    kept: Masks = {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}

    def ranked() -> dict[str, Tensor]:
        # What is gone ranks below what is left but dead, so that nothing comes back.
        scores = flow(linear, inputs, context.signature)
        return {name: score.masked_fill(~kept[name], -1.0) for name, score in scores.items()}

    for number in range(1, iterations):
        scores = ranked()
        everything = torch.cat([score.flatten() for score in scores.values()])
        gone = round((1.0 - (1.0 - sparsity) ** (number / iterations)) * everything.numel())
        # The lowest score that stays. Of equal ones all stay, and the last round counts exactly: a selection takes a
        # third of the time of sorting.
        threshold = everything.kthvalue(min(gone + 1, everything.numel())).values
        kept = {name: score >= threshold for name, score in scores.items()}
        masks.apply(weights, kept)
    return masks.keep_highest(ranked(), sparsity, "global")


def linearized(network: nn.Module) -> nn.Module:
    """A float64 copy in evaluation mode: absolute values, scales of one, no biases."""
    linear = copy.deepcopy(network).double().eval()
    explicit(linear)  # so that the softmax of attention is seen
    pruned = {id(weight) for weight in prunable_weights(linear).values()}
    with torch.no_grad():
        for name, parameter in linear.named_parameters():
            parameter.abs_()
            # "in_proj_bias" is that of attention.
            if name.rpartition(".")[2].endswith("bias"):
                parameter.zero_()
            elif id(parameter) not in pruned and max(parameter.shape, default=1) == parameter.numel():
                parameter.fill_(1.0)
    return linear


class _PassOn(TorchFunctionMode):
    """Replaces activations and normalisations, called as modules or as functions, by their input, softmax by shares."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, keywords = getattr(func, "__name__", ""), kwargs or {}
        if name in _PASSED_ON:
            return args[0] if args else keywords["input"]
        if name == "softmax":
            dim = args[1] if len(args) > 1 else keywords.get("dim")
            return shares(args[0] if args else keywords["input"], -1 if dim is None else dim)
        if name == "scaled_dot_product_attention":
            return _attention(*args, **keywords)
        return func(*args, **keywords)


def shares(x: Tensor, dim: int) -> Tensor:
    """``x`` divided by its sum, which is held constant; equal shares where that is 0, as after a softmax.

    Parameters
    ----------
    x : Tensor
        What a softmax would be given; negative entries (masked ones) count as 0.
    dim : int
        The softmax's.
    """
    x = x.clamp(min=0)
    total = x.detach().sum(dim, keepdim=True)
    return x / total.masked_fill(total == 0, 1.0) + (total == 0) / x.shape[dim]


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,  # noqa: ARG001 (the network is in evaluation mode)
    is_causal: bool = False,
    scale: float | None = None,  # noqa: ARG001 (shares do not depend on it)
    enable_gqa: bool = False,
) -> Tensor:
    """``scaled_dot_product_attention`` with :func:`shares`."""
    if enable_gqa:
        key, value = (part.repeat_interleave(query.shape[-3] // part.shape[-3], -3) for part in (key, value))
    products = query @ key.transpose(-2, -1)
    if is_causal:
        products = products.tril()
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        products = products.masked_fill(~attn_mask, 0.0)
    elif attn_mask is not None:
        products = products + attn_mask
    return shares(products, -1) @ value


def ones(linear: nn.Module, context: Context) -> Tensors:
    """One input of ones; integers, which index or mask, as :func:`methods.layers.inputs.made_up` has them."""
    inputs = made_up(linear, context.signature, 1, split=context.data.get("train"))
    return {name: torch.ones_like(x) if x.is_floating_point() else x for name, x in inputs.items()}


def flow(linear: nn.Module, inputs: Tensors, signature: Signature) -> dict[str, Tensor]:
    """``|dR/dw * w|`` of every prunable weight, R the sum of the outputs on one input of ones.

    Parameters
    ----------
    linear : nn.Module
        From :func:`linearized`.
    inputs : Tensors
        One example.
    signature : Signature
        How it is called.

    Raises
    ------
    NotFinite
        If a score is NaN or infinite.
    """
    weights = prunable_weights(linear)
    with torch.enable_grad(), _PassOn():
        outputs = call(linear, inputs, signature).values()
        total = torch.stack([output.sum() for output in outputs if output.is_floating_point()]).sum()
        gradients = torch.autograd.grad(total, list(weights.values()), materialize_grads=True)
    scores = {
        name: (gradient * weight.detach()).abs()
        for (name, weight), gradient in zip(weights.items(), gradients, strict=True)
    }
    finite(scores, "synflow")
    return scores
