"""Weights from somebody else's file: found by its hash, read without trusting it, put into a model."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.canonical import file_sha256
from harness.errors import DataError
from harness.paths import home

if TYPE_CHECKING:
    from torch import Tensor, nn


def stored(sha256: str) -> Path:
    """Where a file with this content is kept: ``$ASSAY_HOME/downloads/<sha256>`` (it need not be there)."""
    return home() / "downloads" / sha256


def missing(sha256: str) -> str | None:
    """A reason why the file with this content is not here, with the remedy, or None."""
    if stored(sha256).is_file():
        return None
    return (
        f"no checkpoint with sha256 {sha256}: expected at {stored(sha256)}. Put the file there under that name; "
        "`assay reproduce` does so for a paper's files"
    )


def verify(path: Path, sha256: str, remedy: str) -> None:
    """Check a file's content.

    Raises
    ------
    DataError
        If the file cannot be read or has another sha256, naming both and the ``remedy``.
    """
    try:
        found = file_sha256(path)
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error}). {remedy}") from error
    if found != sha256:
        raise DataError(
            f"{path}: not the expected file (truncated or changed?): sha256 {sha256} expected, {found} found in "
            f"{size} bytes. {remedy}"
        )


def load_state(sha256: str, model: nn.Module) -> None:
    """Load the weights of the stored checkpoint ``sha256`` into ``model``, in place.

    The file is read with ``torch.load(weights_only=True)``, which runs no code of the file; files of before torch 1.6
    are fine. The state dict may lie in it under "state_dict", "model" or "model_state_dict", with or without a
    "module." prefix. Where its names are not the model's, tensors are matched in order; every shape has to agree.

    Parameters
    ----------
    sha256 : str
        Of the file, hex.
    model : nn.Module
        Receives the weights.

    Raises
    ------
    DataError
        If the file is missing, has another content, is not a checkpoint, or does not fit the model.
    """
    import torch

    path = stored(sha256)
    if reason := missing(sha256):
        raise DataError(reason)
    verify(path, sha256, "Delete it and fetch it again.")
    try:
        with warnings.catch_warnings():
            # Of an unusual pickle protocol: what the restricted reader cannot read, it refuses by itself.
            warnings.filterwarnings("ignore", message="Detected pickle protocol", category=UserWarning)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError) as error:
        raise DataError(f"{path}: cannot be read as a checkpoint of plain tensors: {error}") from error
    state = _state_dict(content, path)
    model.load_state_dict(_fitted(state, model.state_dict(), path))


def _state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    import torch

    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if (
        not isinstance(content, Mapping)
        or not content
        or not all(isinstance(v, torch.Tensor) for v in content.values())
    ):
        raise DataError(
            f"{path}: holds no state dict (a mapping of names to tensors, at the top or under 'state_dict')"
        )
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def _fitted(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The checkpoint's tensors under the model's names."""
    names = list(wanted) if set(state) == set(wanted) else list(state)
    for theirs, ours in zip(names, wanted, strict=False):
        if state[theirs].shape != wanted[ours].shape:
            raise DataError(
                f"{path}: does not fit the model: {theirs!r} has shape {tuple(state[theirs].shape)}, "
                f"the model's {ours!r} has {tuple(wanted[ours].shape)}"
            )
    if len(names) != len(wanted):
        raise DataError(
            f"{path}: does not fit the model: {len(state)} tensors ({', '.join(state)}) for the model's "
            f"{len(wanted)} ({', '.join(wanted)})"
        )
    return {ours: state[theirs] for theirs, ours in zip(names, wanted, strict=True)}
