"""Where the ONNX artifact of a runtime lies, and how it is made."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import DataError, Unsupported, explanation

if TYPE_CHECKING:
    from torch import nn

    from harness.contracts import Signature, Tensors

NAME = "model.onnx"
FORWARD = ("forward",)


def build_onnx(
    model: nn.Module, signature: Signature, example: Tensors, folder: Path, phases: Sequence[str] = FORWARD
) -> Path:
    """Export ``model`` into ``folder``, or copy the ONNX file that it is.

    Returns
    -------
    Path
        The file, or the folder where weights lie beside it.
    """
    inner = folder / "onnx"
    inner.mkdir(parents=True, exist_ok=True)
    for old in inner.iterdir():
        old.unlink()
    given = file_of(model)
    if given is not None:
        if tuple(phases) != FORWARD:
            raise Unsupported(f"{given.name} is a file: only its forward pass is run, not {', '.join(phases)}.")
        copy_onnx(given, inner / NAME)
    elif tuple(phases) == FORWARD:
        from hardware.export import to_onnx

        to_onnx(model, signature, example, inner / NAME)
    else:
        from hardware.causal import to_onnx_decoder

        to_onnx_decoder(model, signature, example, inner / NAME)
    if len(list(inner.iterdir())) > 1:
        return inner
    single = (inner / NAME).rename(folder / NAME)
    inner.rmdir()
    return single


def file_of(model: nn.Module) -> Path | None:
    """The file that a model is, or None for a module."""
    artifact = getattr(model, "artifact", None)
    return artifact if isinstance(artifact, Path) else None


def copy_onnx(source: Path, target: Path) -> None:
    """Copy an ONNX file with the files in which it keeps its weights.

    Raises
    ------
    DataError
        If a file is missing or is no ONNX file, or its weights lie outside its own folder.
    """
    import onnx
    from onnx.external_data_helper import ExternalDataInfo, uses_external_data

    from hardware.stored import tensors

    try:
        model = onnx.load(source, load_external_data=False)
    except OSError as error:
        raise DataError(f"ONNX file {source}: {error.strerror}.") from error
    except Exception as error:  # protobuf's own error has no public base class
        raise DataError(f"{source} is not an ONNX file: {explanation(error)}") from error
    if not model.graph.node:
        raise DataError(f"{source} is not an ONNX file: it has no nodes.")
    shutil.copyfile(source, target)
    for place in sorted({ExternalDataInfo(t).location for _, t in tensors(model) if uses_external_data(t)}):
        beside = source.parent / place
        # A name such as ../../etc/passwd, or a link, would copy what is no part of the model.
        if place != beside.name or beside.is_symlink() or place == NAME:
            raise DataError(f"{source} keeps weights in {place!r}: only a plain file in its own folder is taken.")
        if not beside.is_file():
            raise DataError(f"{source} keeps weights in {place!r}, which is not beside it.")
        shutil.copyfile(beside, target.parent / place)


def onnx_file(artifact: Path) -> Path:
    """The ``.onnx`` file of an artifact.

    Raises
    ------
    DataError
        If there is none.
    """
    path = artifact / NAME if artifact.is_dir() else artifact
    if not path.is_file():
        raise DataError(f"Artifact {path} does not exist; build it again.")
    return path
