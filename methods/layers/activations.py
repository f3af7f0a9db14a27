"""What flows into each layer of a network, also while the layers before it are changed."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.calling import call, evaluating
from harness.errors import NotFinite
from methods.layers.attention import written_out
from methods.layers.inputs import made_up
from methods.layers.prunable import PROJECTIONS, Attention, holder, prunable_weights

if TYPE_CHECKING:
    from harness.contracts import Context, Signature, Tensors

Layer = nn.Linear | nn.Conv1d | nn.Conv2d
"""Layers whose inputs can be collected."""

_UNFOLDED = 1 << 24
"""Values of unfolded input that are held at once (64 MiB in float32)."""


def visit(
    model: nn.Module,
    inputs: Tensors,
    signature: Signature,
    treat: Callable[[str, Layer, Tensor], None],
    passed: Callable[[str, str], object] = lambda name, reason: None,
) -> None:
    """Run ``model`` once and hand every layer's input to ``treat`` before the layer computes.

    ``treat`` may change the layer's weight in place: the layers after it then see what the changed one puts out. A
    layer or a tied weight that is used several times is treated at its first use. The model runs in evaluation mode,
    without gradients, and its mode is restored.

    Parameters
    ----------
    model : nn.Module
        Run on all of ``inputs`` at once.
    inputs : Tensors
        One batch.
    signature : Signature
        How the model is called.
    treat, passed : callable
        See :func:`walk`.

    Raises
    ------
    NotFinite
        If an input of a layer holds NaN or infinity.
    """
    done: set[str] = set()

    def see(name: str, layer: Layer, value: Tensor) -> None:
        if name in done:
            return
        done.add(name)
        if not bool(torch.isfinite(value).all()):
            raise NotFinite(f"The input of layer {name!r} holds NaN or infinity on the calibration examples.")
        treat(name, layer, value)

    with walk(model, see, passed) as running:
        call(running, inputs, signature)


@contextlib.contextmanager
def walk(
    model: nn.Module,
    see: Callable[[str, Layer, Tensor], None],
    passed: Callable[[str, str], object] = lambda name, reason: None,
) -> Iterator[nn.Module]:
    """Show ``see`` every input of every layer while the model runs, in evaluation mode and without gradients.

    Attention modules run in a form that calls their projections as layers (:func:`written_out`). The input projections
    of ``nn.MultiheadAttention`` come as a linear layer that holds the module's own weight.

    Parameters
    ----------
    model : nn.Module
        Its mode is restored.
    see : callable
        ``see(name, layer, input)`` before the layer computes, named as in
        :func:`methods.layers.prunable.prunable_weights`.
    passed : callable, optional
        ``passed(name, reason)`` for a weight of attention that is used with inputs that are not one layer's.

    Yields
    ------
    nn.Module
        What is to be called.
    """
    names = {id(weight): name for name, weight in prunable_weights(model).items()}

    def before(module: nn.Module, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        value = args[0] if args else keywords.get("input")
        if isinstance(module, Layer) and isinstance(value, Tensor):
            see(names[id(module.weight)], module, value)

    def attending(module: nn.Module, args: tuple[Any, ...], keywords: Mapping[str, Any]) -> None:
        inputs = projection_inputs(args, keywords)
        for kind in PROJECTIONS:
            weight = getattr(module, kind, None)
            if weight is None or id(weight) not in names:
                continue
            if (value := inputs.get(kind)) is None:
                passed(names[id(weight)], "its queries, keys and values come from different inputs")
            else:
                see(names[id(weight)], projection(weight), value)

    with written_out(model) as running, evaluating(running), contextlib.ExitStack() as hooks:
        for module in running.modules():
            hook = attending if isinstance(module, Attention) else before
            if hook is attending or (isinstance(module, Layer) and id(module.weight) in names):
                hooks.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield running


def projection_inputs(args: tuple[Any, ...], keywords: Mapping[str, Any]) -> dict[str, Tensor]:
    """What attention's input projections multiply in a call, by the parameter's name.

    Parameters
    ----------
    args, keywords
        The call's: query, key and value.

    Returns
    -------
    dict
        Without "in_proj_weight" where the three are not one tensor.
    """
    query, key, value = (
        args[place] if place < len(args) else keywords[name] for place, name in enumerate(("query", "key", "value"))
    )
    found = {"q_proj_weight": query, "k_proj_weight": key, "v_proj_weight": value}
    if query is key and key is value:
        found["in_proj_weight"] = query
    return found


def projection(weight: nn.Parameter) -> nn.Linear:
    """A linear layer without bias whose weight is this parameter itself."""
    # On the meta device, whose initialisation takes no memory and draws no random numbers.
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = weight
    return layer


def untouched(model: nn.Module, context: Context) -> dict[str, str]:
    """Why :func:`visit` does not come to some of the prunable layers, by name.

    Found by running a copy of the model on made-up inputs.
    """
    seen: set[str] = set()
    passed: dict[str, str] = {}
    subject = copy.deepcopy(model)
    inputs = made_up(subject, context.signature, 2, split=context.data.get("train"))
    visit(subject, inputs, context.signature, lambda name, layer, x: seen.add(name), passed.setdefault)
    reasons: dict[str, str] = {}
    for name in prunable_weights(model):
        if name in seen:
            continue
        module = holder(model, name)
        above = holder(model, name.rpartition(".")[0])
        if name in passed:
            reasons[name] = passed[name]
        elif not isinstance(module, Layer | Attention):
            reasons[name] = f"inputs of a {type(module).__name__} are not collected"
        elif isinstance(above, nn.MultiheadAttention) and not isinstance(module, Attention):
            reasons[name] = "attention with separate projections or added keys does not call it"
        else:
            reasons[name] = "the model does not call it"
    return reasons


def columns(layer: Layer, x: Tensor) -> Iterator[Tensor]:
    """What a layer's weights multiply, in matrix form, some examples at a time.

    Parameters
    ----------
    layer : nn.Linear, nn.Conv1d or nn.Conv2d
        Gives kernel, stride, padding, dilation and groups.
    x : Tensor
        The layer's input.

    Yields
    ------
    Tensor, shape (groups, k, positions)
        The layer computes ``matrix(layer) @ columns`` per group (1 in a linear layer). k runs over kernel positions,
        then input channels (channels last), as in :func:`matrix`.
    """
    if isinstance(layer, nn.Linear):
        flat = x.reshape(-1, x.shape[-1])
        for part in torch.split(flat, max(1, _UNFOLDED // flat.shape[1])):
            yield part.T[None]
        return
    x = batched(layer, x)
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    kernel, stride, dilation = _plane(layer.kernel_size), _plane(layer.stride), _plane(layer.dilation)
    if isinstance(layer, nn.Conv1d):
        x = x[:, :, None]
    positions = 1
    for size, width, step, gap in zip(x.shape[2:], kernel, stride, dilation, strict=True):
        positions *= (size - gap * (width - 1) - 1) // step + 1
    area = kernel[0] * kernel[1]
    for part in torch.split(x, max(1, _UNFOLDED // max(1, x.shape[1] * area * positions))):
        unfolded = F.unfold(part, kernel, dilation=dilation, stride=stride)
        grouped = unfolded.reshape(len(part), layer.groups, -1, area, unfolded.shape[-1])
        # (examples, groups, channels, kernel, positions) -> (groups, kernel, channels, examples, positions)
        yield grouped.permute(1, 3, 2, 0, 4).reshape(layer.groups, grouped.shape[2] * area, -1)


def batched(layer: Layer, x: Tensor) -> Tensor:
    """A layer's input with an axis of examples first, which convolutions and linear layers can do without."""
    return x[None] if x.ndim < (2 if isinstance(layer, nn.Linear) else layer.weight.ndim) else x


def matrix(layer: Layer, weight: Tensor) -> Tensor:
    """A weight (or scores, or a mask, of its shape) as (groups, out / groups, k), k as in :func:`columns`."""
    if isinstance(layer, nn.Linear):
        return weight[None]
    return weight.flatten(2).transpose(1, 2).reshape(layer.groups, len(weight) // layer.groups, -1)


def unmatrix(layer: Layer, values: Tensor) -> Tensor:
    """The inverse of :func:`matrix`."""
    if isinstance(layer, nn.Linear):
        return values[0]
    out, inputs, *kernel = layer.weight.shape
    return values.reshape(out, -1, inputs).transpose(1, 2).reshape(out, inputs, *kernel)


def _plane(sizes: tuple[int, ...]) -> tuple[int, int]:
    """A one-dimensional kernel as a two-dimensional one of height 1."""
    return (1, sizes[0]) if len(sizes) == 1 else (sizes[0], sizes[1])
