"""Tensors as bytes: what shares memory goes on sharing it, and strides are kept where no memory is wasted by it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from harness.errors import DataError

ALIGNMENT = 64
DATA_TYPES = {str(kind).removeprefix("torch."): kind for kind in vars(torch).values() if isinstance(kind, torch.dtype)}
_KINDS = (Tensor, nn.Parameter, nn.Buffer)


class TensorWriter:
    """Collects tensors while a model is described, and lays out their bytes."""

    def __init__(self) -> None:
        self._tensors: list[Tensor] = []
        self._places: list[str] = []
        self._index: dict[int, int] = {}

    def add(self, tensor: Tensor, where: str) -> int:
        """The number of a tensor in the file."""
        if id(tensor) not in self._index:
            if reason := _why_not(tensor):
                raise DataError(f"The model cannot be saved: {where} {reason}.")
            self._index[id(tensor)] = len(self._tensors)
            self._tensors.append(tensor)
            self._places.append(where)
        return self._index[id(tensor)]

    def finish(self) -> tuple[list[Any], list[list[int]], list[memoryview]]:
        """Descriptions of the tensors, [offset, bytes] of the storages, and the bytes, padded."""
        groups: dict[tuple[str, int], list[int]] = {}
        for number, tensor in enumerate(self._tensors):
            key = (str(tensor.device), tensor.untyped_storage()._cdata)
            groups.setdefault(key, []).append(number)
        described: list[Any] = [None] * len(self._tensors)
        storages: list[list[int]] = []
        chunks: list[memoryview] = []
        offset = 0
        for members in groups.values():
            raw, views = self._group(members)
            for number, (stride, start) in zip(members, views, strict=True):
                described[number] = self._describe(number, stride, len(storages), start)
            padding = -offset % ALIGNMENT
            storages.append([offset + padding, len(raw)])
            chunks += [memoryview(bytes(padding)), raw]
            offset += padding + len(raw)
        return described, storages, chunks

    def _describe(self, number: int, stride: list[int], storage: int, start: int) -> dict[str, Any]:
        tensor = self._tensors[number]
        attributes = [[name, value] for name, value in sorted(vars(tensor).items())]
        for name, value in attributes:
            if not (value is None or type(value) in (bool, int, str)):
                place = self._places[number]
                raise DataError(
                    f"The model cannot be saved: {place}.{name} is a {type(value).__name__}; a tensor's own "
                    "attributes may be numbers and text only."
                )
        return {
            "parameter": isinstance(tensor, nn.Parameter),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "stride": stride,
            "storage": storage,
            "start": start,
            "requires_grad": tensor.requires_grad,
            "attributes": attributes,
        }

    def _group(self, members: list[int]) -> tuple[memoryview, list[tuple[list[int], int]]]:
        """The bytes of one storage, as far as its tensors reach, and each tensor's strides and start in it."""
        tensors = [self._tensors[number].detach() for number in members]
        first = tensors[0]
        if len(tensors) == 1:
            if first.numel() == 0 or first.is_conj() or first.is_neg() or _span(first) > first.numel():
                first = first.resolve_conj().resolve_neg().contiguous()
            return _bytes(first), [(list(first.stride()), 0)]
        if any(tensor.dtype != first.dtype or tensor.is_conj() or tensor.is_neg() for tensor in tensors):
            places = " and ".join(self._places[number] for number in members[:2])
            raise DataError(f"The model cannot be saved: {places} read the same memory as different types.")
        begin = min(int(tensor.storage_offset()) for tensor in tensors)
        end = max(int(tensor.storage_offset()) + _span(tensor) for tensor in tensors)
        # What lies between them belongs to nobody, and would make equal models unequal files.
        shared = torch.zeros(end - begin, dtype=first.dtype)
        starts = [int(tensor.storage_offset()) - begin for tensor in tensors]
        for tensor, start in zip(tensors, starts, strict=True):
            if tensor.numel():
                line = tensor.as_strided((_span(tensor),), (1,), tensor.storage_offset())
                _covered(shared, tensor, start).copy_(_covered(line.cpu(), tensor, 0))
        return _bytes(shared), [(list(tensor.stride()), start) for tensor, start in zip(tensors, starts, strict=True)]


def _why_not(tensor: Tensor) -> str | None:
    kind = type(tensor)
    if isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer):
        return "has no shape yet (a lazy layer): call the model once before it is used here"
    if kind not in _KINDS:
        return f"is a {kind.__module__}.{kind.__qualname__}, which is not a plain tensor"
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.is_meta or tensor.is_nested:
        return f"is a tensor on {tensor.device} with type {tensor.dtype} and layout {tensor.layout}"
    if tensor._backward_hooks or getattr(tensor, "_post_accumulate_grad_hooks", None):
        return "has a hook, which is a function"
    return None


def _span(tensor: Tensor) -> int:
    """How many elements lie between a tensor's first and last, both counted."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))


def _covered(line: Tensor, like: Tensor, start: int) -> Tensor:
    """The elements of ``line`` that ``like`` reaches; those that it reaches more than once, once."""
    shape = [1 if step == 0 else size for size, step in zip(like.shape, like.stride(), strict=True)]
    return line.as_strided(shape, like.stride(), start)


def _bytes(tensor: Tensor) -> memoryview:
    span = _span(tensor)
    if span == 0:
        return memoryview(b"")
    line = tensor.as_strided((span,), (1,), tensor.storage_offset()).cpu()
    return line.view(torch.uint8).numpy().data.cast("B")


class TensorReader:
    """Makes the tensors of a file; their memory is the file's content, which is not copied.

    Parameters
    ----------
    described : list
        The tensors' descriptions.
    storages : list
        [offset, bytes] of each storage.
    content : memoryview
        The bytes; writable.
    """

    def __init__(self, described: list[Any], storages: list[Any], content: memoryview) -> None:
        self._described = [_checked(item, storages, len(content)) for item in described]
        self._storages = storages
        self._content = content
        self._lines: dict[int, Tensor] = {}
        self._made: dict[int, Tensor] = {}

    def get(self, number: int) -> Tensor:
        """The tensor of this number, the same one each time."""
        if number not in self._made:
            self._made[number] = self._make(self._described[_index(number, len(self._described))])
        return self._made[number]

    def _make(self, item: Mapping[str, Any]) -> Tensor:
        storage = item["storage"]
        if storage not in self._lines:
            offset, size = self._storages[storage]
            self._lines[storage] = (
                torch.frombuffer(self._content, dtype=torch.uint8, count=size, offset=offset)
                if size
                else torch.empty(0, dtype=torch.uint8)
            )
        line = self._lines[storage].view(DATA_TYPES[item["dtype"]])
        view = line.as_strided(item["shape"], item["stride"], item["start"]).detach()
        requires_grad = item["requires_grad"]
        tensor = nn.Parameter(view, requires_grad) if item["parameter"] else view.requires_grad_(requires_grad)
        vars(tensor).update(item["attributes"])
        return tensor


def _checked(item: Any, storages: list[Any], available: int) -> Mapping[str, Any]:
    shape, stride, start = item["shape"], item["stride"], item["start"]
    offset, size = storages[_index(item["storage"], len(storages))]
    if any(type(value) is not int or value < 0 for value in (*shape, *stride, start, offset, size)):
        raise DataError("A tensor of the model file has a size that is no size.")
    if len(shape) != len(stride) or offset % ALIGNMENT or offset + size > available:
        raise DataError("A tensor of the model file does not lie in it.")
    reach = start + 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if math.prod(shape) else 0
    if reach * DATA_TYPES[item["dtype"]].itemsize > size:
        raise DataError("A tensor of the model file reaches beyond its storage.")
    if type(item["parameter"]) is not bool or type(item["requires_grad"]) is not bool:
        raise DataError("A tensor of the model file is neither a parameter nor none.")
    for name, value in item["attributes"]:
        # An attribute of the instance hides a method of the class.
        if hasattr(Tensor, name) or not (value is None or type(value) in (bool, int, str)):
            raise DataError(f"A tensor of the model file has the attribute {name!r}, which is not plain data.")
    return dict(item)


def _index(number: Any, count: int) -> int:
    if type(number) is not int or not 0 <= number < count:
        raise DataError("The model file names a part that it does not hold.")
    return number
