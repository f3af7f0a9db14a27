"""Files that commands write where the user says: whole or not at all, and never over somebody's results."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from harness.errors import InputError

_DATABASE = b"DUCK"
"""At byte 8 of every DuckDB file."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A stream whose content takes the place of ``path`` at the end of the block; after an error nothing has changed.

    Raises
    ------
    InputError
        If ``path`` is a database, a record file, a link, or no regular file.
    OSError
        If the disk refuses.
    """
    require_writable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as stream:
            if path.exists():
                os.fchmod(stream.fileno(), stat.S_IMODE(path.stat().st_mode))
            yield stream
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def require_writable(path: Path) -> None:
    """Refuse a place where writing would destroy results, or go elsewhere than the name says.

    Raises
    ------
    InputError
        Naming the place and what is there.
    """
    if ".records" in {part.suffix for part in (path.absolute(), *path.absolute().parents)} and path.suffix == ".json":
        raise InputError(f"{path} lies among record files, which are never written over: give another name.")
    try:
        about = path.lstat()
    except FileNotFoundError:
        return
    if stat.S_ISLNK(about.st_mode):
        raise InputError(f"{path} is a link to {path.readlink()}: give the name of the file itself.")
    if not stat.S_ISREG(about.st_mode):
        raise InputError(f"{path} is there and is no regular file: give another name.")
    with path.open("rb") as stream:
        beginning = stream.read(12)
    if beginning[8:] == _DATABASE or path.name.endswith((".duckdb", ".duckdb.wal", ".duckdb.lock", ".duckdb.bak")):
        raise InputError(f"{path} is a database, which would be lost: give another name.")
