"""What torch wraps around a model, taken off; what it computes anew in each call, made constant.

Masks of ``torch.nn.utils.prune`` and parametrizations compute the same weight in every evaluation. As constants they
can be stored, compressed and exported, and the model's outputs stay the same.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune
from torch.nn.utils.spectral_norm import SpectralNorm, remove_spectral_norm
from torch.nn.utils.weight_norm import WeightNorm, remove_weight_norm

from harness.errors import InputError
from harness.modelfile import exported

_WRAPPERS = {
    "OptimizedModule": ("_orig_mod", "was compiled with torch.compile; it is measured as it was before"),
    "DataParallel": ("module", "was wrapped in DataParallel; the module inside is taken"),
    "DistributedDataParallel": ("module", "was wrapped in DistributedDataParallel; the module inside is taken"),
}


def bake(model: nn.Module) -> tuple[nn.Module, list[str]]:
    """Make a model plain, without a change of its outputs in evaluation.

    Parameters
    ----------
    model : nn.Module
        Changed in place where the result is not another module. Weights that a mask or a parametrization shares with
        another layer stop being shared.

    Returns
    -------
    (nn.Module, list of str)
        The plain model, and one sentence for everything that was baked in or taken off.

    Raises
    ------
    InputError
        If the model is TorchScript, or a parametrization is random in evaluation.
    """
    said: list[str] = []
    model = _unwrap(model, said)
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise InputError(
                f"{_place(name)} is TorchScript ({type(module).__name__}), which can be run but neither changed nor "
                "stored as data. Give the nn.Module that it was made from."
            )
    for name, module in list(model.named_modules()):
        _bake_pruning(model, module, name, said)
        _bake_hooks(module, name, said)
        _bake_parametrizations(module, name, said)
    return model, said


def _unwrap(model: nn.Module, said: list[str]) -> nn.Module:
    model = _unwrap_one(model, "", said)
    seen: set[nn.Module] = set()
    waiting = [("", model)]
    while waiting:
        prefix, module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        if getattr(module, "_compiled_call_impl", None) is not None:
            module._compiled_call_impl = None
            said.append(f"{_place(prefix)} was compiled with torch.compile; it is measured as it was before.")
        for key, child in list(module._modules.items()):
            if child is not None and not isinstance(module, torch.jit.ScriptModule):
                name = f"{prefix}.{key}" if prefix else key
                module._modules[key] = plain = _unwrap_one(child, name, said)
                waiting.append((name, plain))
    return model


def _unwrap_one(module: nn.Module, name: str, said: list[str]) -> nn.Module:
    while True:
        kind = type(module)
        if kind.__name__ in _WRAPPERS and kind.__module__.startswith("torch."):
            attribute, sentence = _WRAPPERS[kind.__name__]
            module = getattr(module, attribute)
            said.append(f"{_place(name)} {sentence}.")
        elif exported.is_exported(module):
            module = exported.settle(module)  # type: ignore[arg-type]  # is_exported says that it is a graph module
            said.append(f"{_place(name)} comes from torch.export; its guards became a check of the inputs' shapes.")
        else:
            return module


def _bake_pruning(model: nn.Module, module: nn.Module, name: str, said: list[str]) -> None:
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, prune.BasePruningMethod):
            tensor = hook._tensor_name
            _unshare(model, module, f"{tensor}_orig")
            prune.remove(module, tensor)  # type: ignore[no-untyped-call]
            said.append(
                f"{_weight(name, tensor)} was pruned with torch.nn.utils.prune; its mask is multiplied into it."
            )


def _bake_hooks(module: nn.Module, name: str, said: list[str]) -> None:
    """Weight and spectral normalisation in their older form, as hooks."""
    for hook in list(module._forward_pre_hooks.values()):
        if isinstance(hook, WeightNorm):
            remove_weight_norm(module, hook.name)
            said.append(f"{_weight(name, hook.name)} had weight normalisation; it is computed once.")
        elif isinstance(hook, SpectralNorm):
            remove_spectral_norm(module, hook.name)
            said.append(f"{_weight(name, hook.name)} had spectral normalisation; it is computed once.")


def _bake_parametrizations(module: nn.Module, name: str, said: list[str]) -> None:
    if not parametrize.is_parametrized(module):
        return
    parametrizations: Any = module.parametrizations
    for tensor in list(parametrizations):
        chain = parametrizations[tensor]
        kinds = ", ".join(type(step).__name__.strip("_") for step in chain)
        training = [(part, part.training) for part in chain.modules()]
        chain.eval()
        try:
            with torch.no_grad():
                once, again = getattr(module, tensor).clone(), getattr(module, tensor)
        finally:
            for part, flag in training:
                part.training = flag
        if not torch.equal(once, again):
            raise InputError(
                f"{_weight(name, tensor)} is computed by {kinds}, which is random in evaluation, so that it stands for "
                "no one model. Remove the parametrization with torch.nn.utils.parametrize.remove_parametrizations."
            )
        _replace_parametrization(module, tensor, once)
        said.append(f"{_weight(name, tensor)} was parametrized ({kinds}); it is computed once.")


def _replace_parametrization(module: nn.Module, tensor: str, value: Tensor) -> None:
    parametrizations: Any = module.parametrizations
    chain = parametrizations[tensor]
    originals = list(chain.parameters(recurse=False))
    trained = any(parameter.requires_grad for parameter in originals)
    # torch writes the result into the original's memory, which another layer may use, and only where there is one.
    for key in [key for key in chain._parameters if key.startswith("original")]:
        chain._parameters[key] = nn.Parameter(chain._parameters[key].detach().clone())
    parametrize.remove_parametrizations(module, tensor, leave_parametrized=True)
    module._buffers.pop(tensor, None)
    module._parameters.pop(tensor, None)
    if originals:
        setattr(module, tensor, nn.Parameter(value, requires_grad=trained))
    else:
        module.register_buffer(tensor, value)


def _unshare(model: nn.Module, module: nn.Module, key: str) -> None:
    parameter = module._parameters.get(key)
    if parameter is not None and _uses(model)[id(parameter)] > 1:
        module._parameters[key] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)


def _uses(model: nn.Module) -> Counter[int]:
    def each() -> Iterator[int]:
        for module in model.modules():
            yield from (id(parameter) for parameter in module._parameters.values() if parameter is not None)

    return Counter(each())


def _place(name: str) -> str:
    return name or "The model"


def _weight(name: str, tensor: str) -> str:
    return f"{name}.{tensor}" if name else tensor
