"""Inputs that are described in words, for models without data: ``image=1x3x224x224:float32``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from harness.contracts import DTYPES, Port
from harness.errors import InputError, suggestion
from harness.text import shown

_FORM = re.compile(r"(?:(?P<name>[^=\s]+)=)?(?P<shape>\d+(?:x\d+)*)(?::(?P<dtype>\w+))?(?:<(?P<values>\d+))?")
_REMEDY = (
    "Write NAME=1x3x224x224:float32 (the first number is the batch; NAME and the type may be left out), several with "
    "commas between; integers with the number of their values: ids=1x128:int64<30522."
)


def parse(given: Any, names: Sequence[str], where: str) -> tuple[Port, ...]:
    """Ports of a description.

    Parameters
    ----------
    given : str or mapping
        As one text, or a description by input name.
    names : sequence of str
        The model's inputs in order, for descriptions without a name.
    where : str
        For messages.

    Raises
    ------
    InputError
        If it is not understood.
    """
    if isinstance(given, Mapping):
        texts = [f"{name}={text}" for name, text in given.items()]
    elif isinstance(given, str) and given.strip():
        texts = given.replace(",", " ").split()
    else:
        raise InputError(f"{where}: the input {shown(given)} is not understood. {_REMEDY}")
    ports = []
    for place, text in enumerate(texts):
        found = _FORM.fullmatch(text)
        if found is None:
            raise InputError(f"{where}: the input {shown(text)} is not understood. {_REMEDY}")
        sizes = tuple(int(size) for size in found["shape"].split("x"))
        dtype = found["dtype"] or "float32"
        if dtype not in DTYPES:
            raise InputError(f"{where}: inputs of type {dtype!r} are not known. {suggestion(dtype, DTYPES)}")
        if not all(sizes):
            raise InputError(f"{where}: the input {shown(text)} has an empty axis. {_REMEDY}")
        default = names[place] if place < len(names) else "input" if not place else f"input{place}"
        values = int(found["values"]) if found["values"] else None
        ports.append(Port(name=found["name"] or default, shape=sizes[1:], dtype=dtype, values=values))
    return tuple(ports)
