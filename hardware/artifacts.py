"""Where the ONNX artifact of a runtime lies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from harness.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor, nn

NAME = "model.onnx"


def build_onnx(model: nn.Module, example: Tensor, folder: Path) -> Path:
    """Export ``model`` into ``folder``; return the file, or the folder where over 2 GB of weights lie beside it."""
    from hardware.export import to_onnx

    inner = folder / "onnx"
    inner.mkdir(parents=True, exist_ok=True)
    for old in inner.iterdir():
        old.unlink()
    path = to_onnx(model, example, inner / NAME)
    if len(list(inner.iterdir())) > 1:
        return inner
    single = path.rename(folder / NAME)
    inner.rmdir()
    return single


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
