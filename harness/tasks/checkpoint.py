"""Weights from somebody else's file: found by its hash, read without trusting it, put into a model."""

from __future__ import annotations

import contextlib
import io
import pickletools
import stat
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from harness.canonical import file_sha256
from harness.errors import DataError, explanation
from harness.paths import home
from harness.text import shown

if TYPE_CHECKING:
    from torch import Tensor, nn

MAX_BYTES = 1 << 36
"""Of a file that is hashed: a sparse file can claim a terabyte and would be read for an hour."""
_NOT_PLAIN = "cannot be read as a checkpoint of plain tensors"
_SPARE_BYTES = 64 << 20
_TIMES_THE_MODEL = 8
"""A checkpoint may hold more than the weights: two moments of Adam, an average of the weights, all in float64."""
_MAX_OPCODES = 2_000_000
_LEGACY_PICKLES = 5
"""That a file of before torch 1.6 begins with: a magic number, a version, the system, the content, the storages."""
_GLOBALS = ("collections", "torch", "torch._utils", "torch.serialization", "torch.storage", "torch.nn.parameter")
"""Modules from which a checkpoint of plain tensors names something; torch decides which names it takes from them."""


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
        about = path.stat()
        size = about.st_size
        if not stat.S_ISREG(about.st_mode) or size > MAX_BYTES:
            raise DataError(f"{path}: {size:,} bytes; a regular file of at most {MAX_BYTES:,} is expected. {remedy}")
        found = file_sha256(path)
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
    own = sum(tensor.nbytes for tensor in model.state_dict().values())
    try:
        _check_size(path, _TIMES_THE_MODEL * own + _SPARE_BYTES)
        verify(path, sha256, "Delete it and fetch it again.")
        _check_before_reading(path, _TIMES_THE_MODEL * own + _SPARE_BYTES)
        with warnings.catch_warnings():
            # Of an unusual pickle protocol: what the restricted reader cannot read, it refuses by itself.
            warnings.filterwarnings("ignore", message="Detected pickle protocol", category=UserWarning)
            content = torch.load(path, map_location="cpu", weights_only=True)
    except DataError:
        raise
    except Exception as error:  # a forged file makes the reader raise anything, MemoryError included
        raise DataError(f"{path}: {_NOT_PLAIN}: {explanation(error)}") from error
    state = _state_dict(content, path)
    model.load_state_dict(_fitted(state, model.state_dict(), path))


def _check_size(path: Path, most: int) -> None:
    if path.stat().st_size > most:
        raise DataError(f"{path}: {path.stat().st_size:,} bytes; this model's weights allow {most:,}")


def _check_before_reading(path: Path, most: int) -> None:
    """Refuse what would take the reader's memory or stack: nothing has been unpacked or built yet.

    Raises
    ------
    DataError
        With the size that the file declares, or what its pickle asks for.
    """
    if not zipfile.is_zipfile(path):
        with path.open("rb") as stream, contextlib.suppress(ValueError):  # what is no pickle, torch refuses
            for _ in range(_LEGACY_PICKLES):
                _check_pickle(path, stream)
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        declared = sum(entry.file_size for entry in entries)
        if declared > most or len(entries) > 1_000_000:
            raise DataError(
                f"{path}: {len(entries):,} entries unpack to {declared:,} bytes; this model's weights allow {most:,}"
            )
        for entry in entries:
            if entry.filename.endswith("data.pkl"):
                _check_pickle(path, io.BytesIO(archive.read(entry)))


def _check_pickle(path: Path, stream: BinaryIO) -> None:
    """Refuse a pickle that names anything but tensors and containers, such as a bytearray of any size."""
    for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
        if number > _MAX_OPCODES:
            raise DataError(f"{path}: its table of contents has more than {_MAX_OPCODES:,} steps")
        if opcode.name == "STACK_GLOBAL":
            raise DataError(f"{path}: {_NOT_PLAIN}: torch does not write pickles of protocol 4")
        if opcode.name == "GLOBAL" and str(argument).partition(" ")[0] not in _GLOBALS:
            raise DataError(f"{path}: {_NOT_PLAIN}: it names {shown(argument)}")


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
