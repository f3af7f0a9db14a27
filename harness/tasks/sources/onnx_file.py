"""The module that an ONNX file is."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from harness import paths, registry
from harness.contracts import Signature
from harness.errors import Unavailable

NAME = "model.onnx"


class OnnxFile(nn.Module):
    """The bytes of an ONNX file, so that it can be stored, hashed and copied like any model.

    Parameters
    ----------
    files : mapping of str to bytes
        ``model.onnx``, and files with weights.
    signature : Signature
        What it takes and gives.
    """

    def __init__(self, files: dict[str, bytes], signature: Signature) -> None:
        import torch

        super().__init__()
        self.names = list(files)
        for place, content in enumerate(files.values()):
            self.register_buffer(f"file{place}", torch.frombuffer(bytearray(content), dtype=torch.uint8))
        self.ports = [_plain(signature.inputs), _plain(signature.outputs)]
        self.only_batch = signature.batch

    @property
    def artifact(self) -> Path:
        """The ONNX file on disk, in the cache."""
        contents = [self.get_buffer(f"file{place}").numpy().tobytes() for place in range(len(self.names))]
        key = hashlib.sha256(b"".join(hashlib.sha256(content).digest() for content in contents)).hexdigest()
        folder = paths.cache("onnx", key)
        for name, content in zip(self.names, contents, strict=True):
            target = folder / Path(name).name  # never outside the folder, whatever a file says
            if not target.is_file() or target.stat().st_size != len(content):
                folder.mkdir(parents=True, exist_ok=True)
                temporary = target.with_name(f".{target.name}.{id(self)}")
                temporary.write_bytes(content)
                temporary.replace(target)
        return folder / NAME

    @property
    def signature(self) -> Signature:
        """What it takes and gives."""
        inputs, outputs = self.ports
        return Signature.from_json({"inputs": inputs, "outputs": outputs, "batch": self.only_batch})

    def forward(self, *inputs: Tensor) -> dict[str, Tensor]:
        """Outputs by name of inputs in the file's order."""
        import torch

        signature = self.signature
        arrays = {
            port.name: value.detach().contiguous().numpy() for port, value in zip(signature.inputs, inputs, strict=True)
        }
        shapes = tuple((name, value.shape, str(value.dtype)) for name, value in arrays.items())
        deployed = _loaded(self.artifact, signature, shapes)
        deployed.bind(arrays)
        deployed()
        deployed.synchronize()
        found = deployed.fetch()
        return {port.name: torch.from_numpy(found[port.name]) for port in signature.outputs}


def _plain(ports: tuple[Any, ...]) -> list[dict[str, Any]]:
    return [
        {"name": port.name, "shape": list(port.shape), "dtype": port.dtype, "values": port.values} for port in ports
    ]


@functools.lru_cache(maxsize=4)
def _loaded(path: Path, signature: Signature, shapes: tuple[tuple[str, tuple[int, ...], str], ...]) -> Any:
    import numpy as np

    runtime = registry.create("hardware", "onnxruntime", {})
    if reason := runtime.unavailable():
        raise Unavailable(f"An ONNX file's outputs are compared with ONNX Runtime's. {reason}")
    example = {name: np.zeros(shape, dtype) for name, shape, dtype in shapes}
    return runtime.load(path, signature=signature, inputs=example, threads=1)
