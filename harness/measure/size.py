"""Size of what is deployed: bytes on disk, and compressed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness.canonical import file_sha256


def weigh(artifact: Path) -> dict[str, Any]:
    """Weigh a file, or a folder's files together.

    Parameters
    ----------
    artifact : Path
        What the runtime loads.

    Returns
    -------
    dict
        ``sha256``, ``size_bytes`` (sum of file lengths, not of disk blocks), ``zstd_bytes`` (each file by zstd
        level 19, one thread), ``files`` (relative names), ``format`` (suffix).
    """
    import zstandard

    files = sorted(path for path in artifact.rglob("*") if path.is_file()) if artifact.is_dir() else [artifact]
    compressor = zstandard.ZstdCompressor(level=19)
    return {
        "sha256": file_sha256(artifact),
        "size_bytes": sum(path.stat().st_size for path in files),
        "zstd_bytes": sum(len(compressor.compress(path.read_bytes())) for path in files),
        "files": [str(path.relative_to(artifact)) if artifact.is_dir() else path.name for path in files],
        "format": artifact.suffix.removeprefix(".") or "folder",
    }
