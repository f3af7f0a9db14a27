"""Attention modules whose heads can be removed: the inner width is not tied to the width of what they read.

``nn.MultiheadAttention`` and torchvision's ``ShiftedWindowAttention`` derive the width of a head from that of their
input, so that neither can lose heads while the residual stream keeps its channels, nor the other way round. The modules
here compute the same function of the same parameters (equal names and shapes), with the width of a head fixed instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness.calling import plain_attention


class HeadAttention(nn.Module):
    """``nn.MultiheadAttention``'s function: multi-head attention (Vaswani et al. 2017, §3.2.2), projections packed.

    Parameters
    ----------
    width : int
        Channels of the inputs and of the output.
    heads : int
        Attention heads.
    head_width : int
        Channels of one head; ``heads * head_width`` need not be ``width``.
    bias : bool
        Whether the projections have biases.
    dropout : float
        Of the attention weights, in training.
    batch_first : bool
        Inputs are (n, tokens, width) instead of (tokens, n, width).
    """

    # torch's transformer layers ask for this before they take their fused path, which reads the weights directly.
    _qkv_same_embed_dim = False

    def __init__(
        self,
        width: int,
        heads: int,
        head_width: int,
        *,
        bias: bool = True,
        dropout: float = 0.0,
        batch_first: bool = True,
    ) -> None:
        super().__init__()
        self.head_width = head_width
        self.dropout = dropout
        self.batch_first = batch_first
        self.in_proj_weight = nn.Parameter(torch.empty(3 * heads * head_width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * heads * head_width)) if bias else None
        self.out_proj = nn.Linear(heads * head_width, width, bias=bias)
        nn.init.xavier_uniform_(self.in_proj_weight)

    @property
    def num_heads(self) -> int:
        """Heads that are left."""
        return len(self.in_proj_weight) // (3 * self.head_width)

    @classmethod
    def of(cls, original: nn.MultiheadAttention) -> HeadAttention:
        """The same attention, sharing the parameters of ``original``."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made.head_width = original.embed_dim // original.num_heads
        made.dropout = original.dropout
        made.batch_first = original.batch_first
        made.in_proj_weight = original.in_proj_weight
        made.in_proj_bias = original.in_proj_bias
        projection = original.out_proj
        # On the meta device, whose initialisation draws no random numbers.
        made.out_proj = nn.Linear(1, 1, bias=False, device="meta")
        made.out_proj.weight = projection.weight
        made.out_proj.bias = projection.bias
        made.out_proj.in_features = made.out_proj.out_features = original.embed_dim
        return made.train(original.training)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,  # noqa: ARG002 (a hint beside attn_mask, as in nn.MultiheadAttention)
    ) -> tuple[Tensor, Tensor | None]:
        """Output of the query's shape, and the attention weights (averaged over heads) where they are needed."""
        batched = query.ndim == 3
        if not batched:
            query, key, value = (part.unsqueeze(0) for part in (query, key, value))
        elif not self.batch_first:
            query, key, value = (part.transpose(0, 1) for part in (query, key, value))
        q, k, v = self._projected(query, key, value)
        mask = self._mask(attn_mask, key_padding_mask, q)
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = (q * self.head_width**-0.5) @ k.transpose(-2, -1)
            shares = torch.softmax(scores if mask is None else scores + mask, dim=-1)
            y = F.dropout(shares, dropout) @ v if dropout else shares @ v
            weights = shares.mean(1) if average_attn_weights else shares
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        out: Tensor = self.out_proj(y.transpose(1, 2).flatten(2))
        if not batched:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return (out if self.batch_first else out.transpose(0, 1)), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, each (n, heads, tokens, head_width)."""
        if key is query and value is query:
            packed = F.linear(query, self.in_proj_weight, self.in_proj_bias)
            parts = _split(packed, 2, 3, -1, self.head_width).permute(2, 0, 3, 1, 4)
            return parts[0], parts[1], parts[2]
        biases = self.in_proj_bias.chunk(3) if self.in_proj_bias is not None else (None, None, None)
        projected = [
            _split(F.linear(part, weight, bias), 2, -1, self.head_width).transpose(1, 2)
            for part, weight, bias in zip((query, key, value), self.in_proj_weight.chunk(3), biases, strict=True)
        ]
        return projected[0], projected[1], projected[2]

    def _mask(self, attention: Tensor | None, padding: Tensor | None, like: Tensor) -> Tensor | None:
        """One additive mask, broadcastable to (n, heads, queries, keys), or None."""
        parts = []
        if attention is not None:
            part = _additive(attention, like)
            parts.append(_split(part, 0, -1, self.num_heads) if part.ndim == 3 else part)
        if padding is not None:
            parts.append(
                _additive(padding, like)[..., None, None, :] if padding.ndim == 2 else _additive(padding, like)
            )
        return sum(parts[1:], start=parts[0]) if parts else None


def _split(x: Tensor, axis: int, *sizes: int) -> Tensor:
    """One axis as several."""
    made: Tensor = x.unflatten(axis, sizes)  # type: ignore[no-untyped-call]  # torch leaves it untyped
    return made


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype is not torch.bool:
        return mask.to(like.dtype)
    return torch.zeros(mask.shape, dtype=like.dtype, device=like.device).masked_fill(mask, float("-inf"))


class WindowAttention(nn.Module):
    """Attention within shifted windows, with a bias by relative position (Liu et al. 2021, arXiv:2103.14030, §3.2).

    The function of torchvision's ``ShiftedWindowAttention``, whose parameters it has; :meth:`of` makes it from one.
    """

    window_size: list[int]
    shift_size: list[int]
    head_width: int
    attention_dropout: float
    dropout: float
    qkv: nn.Linear
    proj: nn.Linear
    relative_position_bias_table: nn.Parameter
    relative_position_index: Tensor

    @classmethod
    def of(cls, original: Any) -> WindowAttention:
        """The same attention, sharing the parameters of ``original``."""
        made = cls()
        made.window_size, made.shift_size = list(original.window_size), list(original.shift_size)
        made.head_width = original.qkv.in_features // original.num_heads
        made.attention_dropout, made.dropout = original.attention_dropout, original.dropout
        made.qkv, made.proj = original.qkv, original.proj
        made.relative_position_bias_table = original.relative_position_bias_table
        made.register_buffer("relative_position_index", original.relative_position_index)
        return made.train(original.training)

    @property
    def num_heads(self) -> int:
        """Heads that are left."""
        return int(self.relative_position_bias_table.shape[1])

    def forward(self, x: Tensor) -> Tensor:
        """Features of the same shape (n, h, w, channels)."""
        _, height, width, _ = x.shape
        rows, columns = self.window_size
        x = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
        down, across = x.shape[1] // rows, x.shape[2] // columns
        # One window alone has nothing to be shifted against.
        shift = [0 if count == 1 else size for count, size in zip((down, across), self.shift_size, strict=True)]
        if any(shift):
            x = torch.roll(x, (-shift[0], -shift[1]), (1, 2))
        tokens = _split(_split(x, 2, across, columns), 1, down, rows).transpose(2, 3).flatten(1, 2)
        y = self._attend(tokens.flatten(2, 3), self._regions(x, shift) if any(shift) else None)
        y = F.dropout(self.proj(y), self.dropout, self.training)
        y = _split(_split(y, 2, rows, columns), 1, down, across).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        if any(shift):
            y = torch.roll(y, (shift[0], shift[1]), (1, 2))
        return y[:, :height, :width].contiguous()

    def _attend(self, windows: Tensor, apart: Tensor | None) -> Tensor:
        """Attention in each window: (n, windows, tokens, channels) to (n, windows, tokens, heads * head_width)."""
        parts = _split(self.qkv(windows), 3, 3, -1, self.head_width).permute(3, 0, 1, 4, 2, 5)
        scores = (parts[0] * self.head_width**-0.5) @ parts[1].transpose(-2, -1)
        size = windows.shape[2]
        bias = _split(self.relative_position_bias_table[self.relative_position_index], 0, size, size)
        scores = scores + bias.permute(2, 0, 1)
        if apart is not None:
            scores = scores + apart[:, None]
        shares = F.dropout(torch.softmax(scores, dim=-1), self.attention_dropout, self.training)
        return (shares @ parts[2]).transpose(2, 3).flatten(3)

    def _regions(self, x: Tensor, shift: list[int]) -> Tensor:
        """-100 between tokens of a window that were not neighbours before the shift: (windows, tokens, tokens)."""
        labels = []
        for size, window, moved in zip(x.shape[1:3], self.window_size, shift, strict=True):
            position = torch.arange(size, device=x.device)
            # Without a shift along an axis its windows' last positions are one region all the same.
            labels.append((position >= size - window).to(x.dtype) + (position >= size - moved).to(x.dtype))
        region = labels[0][:, None] * 3 + labels[1][None, :]
        rows, columns = self.window_size
        region = _split(_split(region, 1, -1, columns), 0, -1, rows).transpose(1, 2).flatten(0, 1).flatten(1)
        return (region[:, :, None] != region[:, None, :]).to(x.dtype) * -100.0


def explicit(model: nn.Module) -> dict[str, nn.Module]:
    """Exchange every attention module for its form above, in place; a model that is one itself stays.

    Returns
    -------
    dict
        The modules that were exchanged, by name.
    """
    originals: dict[str, nn.Module] = {}
    for name, module in list(model.named_modules()):
        made = _exchanged(module)
        if made is not None and name:
            originals[name] = module
            model.set_submodule(name, made)
    return originals


@contextmanager
def written_out(model: nn.Module) -> Iterator[nn.Module]:
    """:func:`explicit` for a while, at every place of a module that stands at several, and no fused inference path.

    torch's transformer layers and ``nn.MultiheadAttention`` have such a path, which reads weights of layers without
    calling them. Yields what is to be run: ``model``, or its form above where it is such a module itself. Afterwards
    the modules that were there before are back.
    """
    made = {id(module): _exchanged(module) for module in model.modules()}
    places = [(name, module) for name, module in model.named_modules(remove_duplicate=False) if made[id(module)]]
    try:
        for name, module in places:
            if name:
                model.set_submodule(name, made[id(module)])  # type: ignore[arg-type]  # places has no None
        with plain_attention():
            yield made[id(model)] or model
    finally:
        for name, module in places:
            if name:
                model.set_submodule(name, module)


def exchangeable(module: nn.Module) -> bool:
    """Whether :func:`explicit` has another form for an attention module.

    It has none for ``nn.MultiheadAttention`` with separate projections or added keys, nor for classes derived from it.
    """
    return _exchanged(module) is not None


def _exchanged(module: nn.Module) -> nn.Module | None:
    kind = type(module)
    if isinstance(module, nn.MultiheadAttention) and kind is nn.MultiheadAttention:
        plain = module._qkv_same_embed_dim and module.bias_k is None and not module.add_zero_attn
        return HeadAttention.of(module) if plain else None
    # By name, because torchvision is an optional dependency.
    if (kind.__module__, kind.__name__) == ("torchvision.models.swin_transformer", "ShiftedWindowAttention"):
        return WindowAttention.of(module)
    return None
