"""One way to write a value down, so that equal values have equal hashes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def dumps(value: Any) -> str:
    """Canonical JSON: sorted keys, no spaces, UTF-8; NaN and infinity are refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def digest(value: Any) -> str:
    """Sha256 (hex) of the canonical JSON of ``value``."""
    return hashlib.sha256(dumps(value).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Sha256 (hex) of a file's bytes; of a folder, of its files' relative names and hashes in order."""
    if path.is_dir():
        parts = sorted((str(p.relative_to(path)), file_sha256(p)) for p in path.rglob("*") if p.is_file())
        return digest(parts)
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
