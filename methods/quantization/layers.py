"""Quantization layer by layer, for forward passes that cannot be traced: every layer rounds its own input.

That is all that a transformer needs, whose linear layers read and return float; a convolutional network is slower this
way, since what convolutions return goes through float.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from harness.calling import call, evaluating
from harness.contracts import Batch, Scheme, Signature
from harness.errors import Unsupported
from harness.quantized import ActivationQuantizer, QuantizedConv2d, QuantizedInput, QuantizedLinear


def quantizable(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Layers that have an integer form, by name, and why others with a product have none."""
    found: dict[str, nn.Module] = {}
    kept: dict[str, str] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.conv._ConvNd | nn.Linear | nn.RNNBase | nn.MultiheadAttention):
            if type(module) not in (nn.Conv2d, nn.Linear):
                kept[name] = f"no integer form of {type(module).__name__}"
            elif isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
                kept[name] = f"padding_mode={module.padding_mode!r}"
            elif module._forward_hooks or module._forward_pre_hooks:
                kept[name] = "it has hooks, which run around its product"
            elif name:
                found[name] = module
    return found, kept


def inputs(
    model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterator[Batch], signature: Signature
) -> Iterator[tuple[str, Tensor]]:
    """What flows into the layers, batch by batch, by name."""
    seen: list[tuple[str, Tensor]] = []
    names = {id(module): name for name, module in layers.items()}

    def look(module: nn.Module, args: tuple[Tensor, ...], keywords: Mapping[str, Tensor]) -> None:
        seen.append((names[id(module)], args[0] if args else keywords["input"]))

    for batch in batches:
        seen.clear()
        hooks = [module.register_forward_pre_hook(look, with_kwargs=True) for module in layers.values()]
        try:
            with evaluating(model):
                call(model, batch.inputs, signature)
        finally:
            for hook in hooks:
                hook.remove()
        yield from seen


def refuse_random(model: nn.Module, batch: Batch, signature: Signature) -> None:
    """Check that a model gives the same outputs twice.

    Raises
    ------
    Unsupported
        If it does not: it draws random numbers in evaluation.
    """
    with evaluating(model), torch.random.fork_rng(devices=[]):
        first, second = (call(model, batch.inputs, signature) for _ in range(2))
    for name, value in first.items():
        if not torch.allclose(value, second[name], rtol=1e-4, atol=1e-6, equal_nan=True):
            raise Unsupported(
                f"the forward pass draws random numbers in evaluation (the output {name!r} differs between two calls), "
                "so that there is no one function to quantize"
            )


def exchange(model: nn.Module, ranges: Mapping[str, tuple[float, float]], scheme: Scheme) -> None:
    """Put integer layers, each with its input's quantizer, in place of the float ones, wherever these stand.

    Parameters
    ----------
    model : nn.Module
        Changed in place.
    ranges : mapping
        Observed (low, high) of the inputs, by the layer's name.
    scheme : Scheme
        What the target wants.
    """
    made: dict[int, QuantizedInput] = {}
    for name, ends in ranges.items():
        layer, quantizer = model.get_submodule(name), ActivationQuantizer.of_range(*ends, scheme)
        integer = QuantizedConv2d if isinstance(layer, nn.Conv2d) else QuantizedLinear
        made[id(layer)] = QuantizedInput(quantizer, integer(layer, quantizer.scale, scheme))  # type: ignore[arg-type]
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in made:
            model.set_submodule(name, made[id(module)])
