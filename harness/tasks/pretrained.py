"""Torchvision's models with their pretrained weights, or with random weights that still give lively outputs."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pickle
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.errors import DataError, InputError, suggestion

if TYPE_CHECKING:
    import torch
    from torch import nn

TIMEOUT_S = 15
"""Seconds without an answer after which a download is given up."""


def _enum(architecture: str, weights: str | None) -> Any:
    """Torchvision's entry of the weights; the default one where ``weights`` is None, or None if a model has none.

    Raises
    ------
    InputError
        If the model or its weights have no such name.
    """
    from torchvision import models

    known = models.list_models(module=models)
    if architecture not in known:
        raise InputError(f"torchvision has no classification model {architecture!r}. {suggestion(architecture, known)}")
    table = models.get_model_weights(architecture)
    if weights is None:
        return next(iter(table), None) and table["DEFAULT"]
    if weights not in table.__members__:
        raise InputError(
            f"torchvision/{architecture} has no weights {weights!r}. {suggestion(weights, table.__members__)}"
        )
    return table[weights]


def transform(architecture: str, weights: str | None) -> Any:
    """The weights' own preprocessing: PIL image to float32 (3, side, side)."""
    return _enum(architecture, weights).transforms()


def resolution(architecture: str, weights: str | None) -> int:
    """Side of the square images, in pixels."""
    entry = _enum(architecture, weights)
    return int(entry.transforms().crop_size[0]) if entry is not None else 224


@functools.cache
def missing(architecture: str, weights: str) -> str | None:
    """Why the weights cannot be had, or None if they lie in torch's hub cache, after one download where need be.

    Raises
    ------
    DataError
        If the file in the cache is not the one its name promises.
    """
    import torch

    entry = _enum(architecture, weights)
    path = Path(torch.hub.get_dir()) / "checkpoints" / entry.url.rsplit("/", 1)[-1]
    if not path.exists():
        try:
            _download(entry.url, path)
        except (OSError, RuntimeError) as error:
            return (
                f"{path.name} is not in {path.parent} and its download failed ({error}). "
                f"Fetch {entry.url} by other means and put it there."
            )
    _check(path)
    return None


def _download(url: str, path: Path) -> None:
    import torch
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    timeout = socket.getdefaulttimeout()
    try:
        with FileLock(path.with_suffix(".lock")):
            if not path.exists():
                socket.setdefaulttimeout(TIMEOUT_S)  # torch sets none: a silent network would hang the run
                torch.hub.download_url_to_file(url, str(path), _prefix(path), progress=False)
    finally:
        socket.setdefaulttimeout(timeout)


def _prefix(path: Path) -> str | None:
    """The first hex digits of the sha256, which torchvision puts into the file's name."""
    found = re.search(r"-([0-9a-f]{8,})\.", path.name)
    return found[1] if found else None


def _check(path: Path) -> None:
    prefix = _prefix(path)
    if prefix is None:
        return
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if not found.startswith(prefix):
        raise DataError(
            f"{path} is truncated or altered: its sha256 is {found}, not {prefix}... Delete it and run again."
        )


def trained(architecture: str, weights: str) -> nn.Module:
    """The pretrained model in eval mode; its file is read as data, never unpickled.

    Raises
    ------
    DataError
        If the file holds something other than tensors.
    """
    from torchvision import models

    entry = _enum(architecture, weights)
    try:
        with weights_only():
            model: nn.Module = models.get_model(architecture, weights=entry, progress=False)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"The weights of torchvision/{architecture} are not a file of plain tensors: {error}"
        ) from error
    return model.eval()


@contextlib.contextmanager
def weights_only() -> Iterator[None]:
    """Torchvision loads with ``weights_only=False``; this variable of torch's overrules it."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def outline(architecture: str) -> nn.Module:
    """The model's layers without weights: only their kinds count."""
    import torch
    from torchvision import models

    with torch.device("meta"):
        model: nn.Module = models.get_model(architecture, weights=None)
    return model


def random(architecture: str, seed: int, input_shape: tuple[int, ...]) -> nn.Module:
    """The model with random weights from ``seed``, in eval mode; its outputs have a standard deviation of about 1."""
    import torch
    from torchvision import models

    options: dict[str, Any] = {}
    if architecture in ("googlenet", "inception_v3"):
        options = {"aux_logits": False, "init_weights": False}  # extra heads are for training only
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model: nn.Module = models.get_model(architecture, weights=None, **options)
        return _drawn(model, input_shape)


def lively(model: nn.Module, seed: int, input_shape: tuple[int, ...]) -> nn.Module:
    """A model of images with weights drawn from ``seed``; see :func:`random`."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return _drawn(model, input_shape)


def _drawn(model: nn.Module, input_shape: tuple[int, ...]) -> nn.Module:
    """Draw the weights of a model anew, in place, from the global random state.

    Many an initialisation makes outputs that are almost zero (MobileNet) or zero (a transformer's head), which would
    make any comparison of outputs pass. Layers are drawn anew (He et al. 2015), batch statistics are taken from random
    inputs, and the last layer is scaled.
    """
    import torch
    from torch import nn

    model.eval()
    last: nn.Module | None = None
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
            last = module
    examples = torch.randn(4, *input_shape)
    with torch.no_grad():
        _calibrate(model, examples)
        deviation = float(model(examples).std())
        if isinstance(last, nn.Conv2d | nn.Linear) and deviation > 0:
            last.weight.div_(deviation)
    return model


def _calibrate(model: nn.Module, examples: torch.Tensor) -> None:
    """Set the running statistics of batch normalisation to those of ``examples``."""
    from torch import nn

    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    if not norms:
        return
    momenta = [module.momentum for module in norms]
    for module in norms:
        module.reset_running_stats()
        module.momentum = None  # the plain average, not the moving one
        module.train()
    model(examples)
    for module, momentum in zip(norms, momenta, strict=True):
        module.momentum = momentum
        module.eval()
