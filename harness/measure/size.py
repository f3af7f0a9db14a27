"""Size of what is deployed, and of the model's weights: bytes on disk, plain and compressed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.canonical import file_sha256
from harness.provenance import source_hash
from harness.registry import create, entry

if TYPE_CHECKING:
    from torch import nn

    from harness.contracts import Storage

CODEC = "container"
"""The registered storage format that weights are weighed in."""


def codec_source() -> str:
    """Source hash of the storage format: its version is part of what a size means."""
    return source_hash(entry("storage", CODEC).target.partition(":")[0])


WEIGHTS = ("plain_bytes", "container_bytes", "shannon_bytes", "zstd_bytes", "xz_bytes", "gzip_bytes")
"""What :func:`weigh_weights` returns."""


def weigh(artifact: Path, compress_below: int = 2**63) -> dict[str, Any]:
    """Weigh a file, or a folder's files together.

    Parameters
    ----------
    artifact : Path
        What the runtime loads.
    compress_below : int
        A larger artifact is not compressed, which would take minutes: its ``zstd_bytes`` is None.

    Returns
    -------
    dict
        ``sha256``, ``size_bytes`` (sum of file lengths, not of disk blocks), ``zstd_bytes`` (each file by zstd
        level 19, one thread), ``files`` (relative names), ``format`` (suffix).
    """
    import zstandard

    files = sorted(path for path in artifact.rglob("*") if path.is_file()) if artifact.is_dir() else [artifact]
    compressor = zstandard.ZstdCompressor(level=19)
    size = sum(path.stat().st_size for path in files)
    small = size <= compress_below
    return {
        "sha256": file_sha256(artifact),
        "size_bytes": size,
        "zstd_bytes": sum(len(compressor.compress(path.read_bytes())) for path in files) if small else None,
        "files": [str(path.relative_to(artifact)) if artifact.is_dir() else path.name for path in files],
        "format": artifact.suffix.removeprefix(".") or "folder",
    }


def plain_bytes(model: nn.Module) -> int:
    """Bytes of the state dict's raw tensors."""
    return sum(value.numel() * value.element_size() for value in model.state_dict().values())


def weigh_weights(model: nn.Module, folder: Path) -> dict[str, int | None]:
    """Weigh a model's state dict as a real file of compressed weights, and check that the file gives it back.

    What a runtime loads is mostly dense float32, whatever was pruned or shared; this is what would be shipped.

    Parameters
    ----------
    model : nn.Module
        Its state dict (parameters and persistent buffers) is what is weighed; code and graph are not.
    folder : Path
        Where the file ``weights.assay`` is written.

    Returns
    -------
    dict
        Bytes: ``plain_bytes`` (raw tensors), ``container_bytes`` (length of the file: codebooks, tables and headers
        included), ``shannon_bytes`` (entropy bound of the representation chosen), ``zstd_bytes`` (level 19),
        ``xz_bytes`` (preset 9) and ``gzip_bytes`` (level 9) of the raw tensors, None for large ones.

    Raises
    ------
    InputError
        If the decoded file differs from the state dict in a single bit.
    """
    import torch

    from harness.errors import InputError

    codec: Storage = create("storage", CODEC, {})
    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    path = folder / "weights.assay"
    data = codec.encode(state)
    path.write_bytes(data)
    decoded = codec.decode(path.read_bytes())
    for name, value in state.items():
        found = decoded.get(name)
        # Compared as bytes: NaN is equal to itself there, and -0.0 differs from 0.0.
        if (
            found is None
            or (found.dtype, found.shape) != (value.dtype, value.shape)
            or not torch.equal(found.reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8))
        ):
            raise InputError(f"The storage format {CODEC!r} does not give tensor {name!r} back; report this.")
    sizes = codec.sizes(state, data)
    return {**{key: sizes[key] for key in WEIGHTS}, "container_bytes": path.stat().st_size}
