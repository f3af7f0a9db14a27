"""Where a model comes from: one file a kind of source, and :data:`TABLE` is the only list of them.

A source is a frozen dataclass of the text that names the model; importing this table brings in nothing heavy.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from harness.contracts import Port, Recipe, Signature
from harness.errors import InputError, UnknownName
from harness.text import shown

if TYPE_CHECKING:
    from torch import nn

TABLE: Mapping[str, tuple[str, str]] = {
    "torchvision/": ("harness.tasks.sources.torchvision:Torchvision", "torchvision/NAME, pretrained on ImageNet"),
    "timm/": ("harness.tasks.sources.timm:Timm", "timm/NAME, with the weights of the hub's cache"),
    "transformers/": (
        "harness.tasks.sources.transformers:Transformers",
        "transformers/FOLDER, or a model of the hub's cache",
    ),
    ".onnx": ("harness.tasks.sources.onnx:OnnxSource", "an ONNX file, deployed as it is"),
    ".pt2": ("harness.tasks.sources.program:Program", "a program of torch.export"),
    ":": ("harness.tasks.sources.own:Own", "module:function, the user's own"),
    "": ("harness.tasks.sources.networks:Network", "a built-in network"),
}
"""By what the text begins with, ends with or contains: class, and one line about it."""


@dataclass(frozen=True, kw_only=True)
class Made:
    """A model from a source.

    Parameters
    ----------
    model : nn.Module
        As the source gives it.
    untrained : str
        Why a score of it would mean nothing, such as random weights; "" where it is trained, or will be.
    signature : Signature or None
        Where the source knows it.
    inputs : tuple of Port
        Inputs that the source knows, for examples where there are no data.
    longest : int or None
        The longest text that the model takes, in tokens.
    transform : callable or None
        From a PIL image to an input.
    tokenizer : object or None
        From texts to inputs.
    given : mapping
        More of :class:`harness.tasks.given.Given`: "data", "loss", "metrics", "workload", ...
    notes : tuple of str
        What has to be said.
    """

    model: nn.Module
    untrained: str = ""
    signature: Signature | None = None
    inputs: tuple[Port, ...] = ()
    longest: int | None = None
    transform: Callable[[Any], Any] | None = None
    tokenizer: Any = None
    given: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Source(Protocol):
    """Makes a model of a text."""

    def unavailable(self) -> str | None:
        """Why the model cannot be had here, with the remedy, or None."""
        ...

    def recipe(self) -> Recipe | None:
        """How the model is trained from scratch; None where it comes trained. Light: no model is made."""
        ...

    def make(self, seed: int) -> Made:
        """The model; ``seed`` counts where its weights are random."""
        ...


def find(text: str) -> Source:
    """The source that a text names.

    Raises
    ------
    InputError
        If it is none of the forms, or the source refuses it.
    """
    name = text.strip()
    for key, (target, _) in TABLE.items():
        if key.endswith("/") and name.startswith(key) and len(name) > len(key):
            return _make(target, name.removeprefix(key))
        if key.startswith(".") and name.lower().endswith(key):
            return _make(target, name)
        if key == ":" and ":" in name:
            return _make(target, name)
    if (Path(name).expanduser() / "config.json").is_file() or _holds_gguf(name):
        return _make(TABLE["transformers/"][0], name)
    from harness.tasks import models

    if name in models.MODELS:
        return _make(TABLE[""][0], name)
    if "/" in name:
        forms = "; ".join(line for _, line in TABLE.values())
        raise InputError(f"The model {shown(text)} is not known, and there is no such folder. Allowed: {forms}.")
    raise UnknownName("model", name, [*models.MODELS, "torchvision/NAME", "timm/NAME", "module:function", "FILE.onnx"])


def _holds_gguf(name: str) -> bool:
    folder = Path(name).expanduser()
    return folder.is_dir() and any(folder.glob("*.gguf"))


def _make(target: str, text: str) -> Source:
    module, _, name = target.partition(":")
    kind = getattr(importlib.import_module(module), name)
    source: Source = kind(**{dataclasses.fields(kind)[0].name: text})
    return source
