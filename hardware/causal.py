"""Causal language models of transformers with their key-value cache: how they are called, and their export."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from hardware.decoding import IDS, KEPT, LOGITS, MASK, POSITIONS, check_signature, past_names, present_names
from hardware.ports import BATCH
from harness.calling import evaluating, plain_attention
from harness.errors import Unsupported, explanation

if TYPE_CHECKING:
    from harness.contracts import Signature, Tensors

NEW, PAST, TOTAL, KEPT_AXIS = "new_tokens", "past_tokens", "all_tokens", "kept_tokens"


@dataclass(frozen=True)
class Interface:
    """What a model's ``forward`` takes beside ids and a mask.

    Parameters
    ----------
    cache : str
        Its name for the cache.
    positions, keeps : bool
        Whether it takes positions, and the places whose scores are wanted.
    """

    cache: str
    positions: bool
    keeps: bool

    @classmethod
    def of(cls, model: nn.Module) -> Interface:
        """Read in the signature of ``forward``.

        Raises
        ------
        Unsupported
            If it takes no cache.
        """
        taken = inspect.signature(model.forward).parameters
        cache = next((name for name in ("cache", "past_key_values") if name in taken), None)
        if cache is None or "use_cache" not in taken or not hasattr(model, "config"):
            raise Unsupported(
                f"Prefill and decode need a causal language model of transformers; the forward of "
                f"{type(model).__name__} takes no key-value cache."
            )
        return cls(cache=cache, positions=POSITIONS in taken, keeps=KEPT in taken)

    def call(self, model: nn.Module, ids: Tensor, mask: Tensor, positions: Tensor, kept: Tensor, cache: Any) -> Tensor:
        """The scores; the cache grows."""
        extra: dict[str, Any] = {self.cache: cache}
        if self.positions:
            extra[POSITIONS] = positions
        if self.keeps:
            extra[KEPT] = kept
        logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=True, return_dict=True, **extra).logits
        return logits


def empty_cache() -> Any:
    """A cache that grows.

    Raises
    ------
    Unsupported
        If transformers is not here.
    """
    try:
        from transformers import DynamicCache
    except ImportError as error:
        raise Unsupported(f"Prefill and decode need transformers: {error}.") from error
    return DynamicCache()


class Decoder(nn.Module):
    """A model that takes and gives its cache as tensors; see :mod:`hardware.decoding`."""

    def __init__(self, model: nn.Module, interface: Interface) -> None:
        super().__init__()
        self.model = model
        self.interface = interface

    def forward(self, values: list[Tensor]) -> tuple[Tensor, ...]:
        """Scores, then keys and values of every layer."""
        rest = list(values)
        ids, mask = rest.pop(0), rest.pop(0)
        positions = rest.pop(0) if self.interface.positions else ids
        kept = rest.pop(0) if self.interface.keeps else ids
        cache = empty_cache()
        for layer, (key, value) in enumerate(zip(rest[::2], rest[1::2], strict=True)):
            cache.update(key, value, layer)
        logits = self.interface.call(self.model, ids, mask, positions, kept, cache)
        if logits.dtype == torch.bfloat16:
            logits = logits.float()
        return (logits, *(tensor for layer in cache.layers for tensor in (layer.keys, layer.values)))


def to_onnx_decoder(model: nn.Module, signature: Signature, example: Tensors, path: Path) -> Path:
    """Write a causal language model as one ONNX file for prefill and decode; see :mod:`hardware.decoding`.

    Raises
    ------
    Unsupported
        If the model has no cache of the usual kind.
    ExportError
        If the model cannot be exported.
    """
    from hardware.export import write

    check_signature(signature)
    interface = Interface.of(model)
    ids = example[IDS][:1].long().repeat(2, 8)[:, :8]
    with evaluating(model), plain_attention(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            mask, positions, cache = torch.ones_like(ids[:, :5]), torch.arange(5).repeat(2, 1), empty_cache()
            interface.call(model, ids[:, :5], mask, positions, torch.arange(5), cache)
            past = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
        except (AttributeError, TypeError) as error:
            raise Unsupported(
                f"{type(model).__name__} does not keep keys and values of every layer: {explanation(error)}"
            ) from error
    if any(tensor.ndim != 4 or tensor.shape[2] != 5 for tensor in past):
        raise Unsupported(f"{type(model).__name__} keeps another cache than keys and values of all tokens.")
    inputs: list[tuple[str, Tensor, dict[int, str]]] = [
        (IDS, ids[:, 5:], {0: BATCH, 1: NEW}),
        (MASK, torch.ones_like(ids), {0: BATCH, 1: TOTAL}),
    ]
    if interface.positions:
        inputs.append((POSITIONS, torch.arange(5, 8).repeat(2, 1), {0: BATCH, 1: NEW}))
    if interface.keeps:
        inputs.append((KEPT, torch.tensor([0, 2]), {0: KEPT_AXIS}))
    layers = len(past) // 2
    inputs += [(name, value, {0: BATCH, 2: PAST}) for name, value in zip(past_names(layers), past, strict=True)]
    names, values, axes = zip(*inputs, strict=True)
    return write(
        Decoder(model, interface), values, axes, ([*names], [LOGITS, *present_names(layers)]), path,
        type(model).__name__, related=True,
    )  # fmt: skip
