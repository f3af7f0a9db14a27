"""An ONNX file as a model: deployed as it is; it runs in ONNX Runtime where outputs are compared."""

from __future__ import annotations

import importlib
import importlib.util
import tempfile
from dataclasses import dataclass
from pathlib import Path

from harness.contracts import Signature
from harness.errors import DataError
from harness.files import read_regular
from harness.tasks.sources import Made

_LIMIT = 8 << 30
INSTALL = 'onnx is not installed: pip install "assay-bench[onnxruntime]".'


@dataclass(frozen=True)
class OnnxSource:
    """An ONNX file, with the files beside it in which it keeps its weights."""

    path: str

    def __post_init__(self) -> None:
        """Refuse a path where there is no file, before anything runs."""
        if not Path(self.path).expanduser().is_file():
            raise DataError(f"ONNX file {self.path}: there is no such file in {Path.cwd()}.")

    def unavailable(self) -> str | None:
        """The install line where onnx is missing, or None."""
        return None if importlib.util.find_spec("onnx") else INSTALL

    def recipe(self) -> None:
        """None: it comes trained."""
        return

    def make(self, seed: int) -> Made:  # noqa: ARG002 - the weights are those of the file
        """The file with its signature."""
        from harness.tasks.sources.onnx_file import NAME, OnnxFile

        path = Path(self.path).expanduser()
        # The runtimes' package knows the format; the core reaches it by name.
        signature: Signature = importlib.import_module("hardware.onnx_signature").read_signature(path)
        with tempfile.TemporaryDirectory() as scratch:
            importlib.import_module("hardware.artifacts").copy_onnx(path, Path(scratch) / NAME)
            files = {file.name: read_regular(file, _LIMIT) for file in sorted(Path(scratch).iterdir())}
        return Made(
            model=OnnxFile(files, signature),
            signature=signature,
            inputs=signature.inputs,
            notes=("The model is an ONNX file: the outputs that it is compared with are ONNX Runtime's.",),
        )
