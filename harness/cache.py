"""Folders that are computed once, named by the hash of everything that went into them.

A folder appears by one rename when it is complete, so a killed process leaves only ``tmp-*`` folders.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from harness.errors import StoreError
from harness.executor import scratch_folder

META = "meta.json"


def remove_leftovers(root: Path, older_than_s: float = 86400.0) -> int:
    """Remove what killed processes left unfinished under the cache, and return how many folders that were.

    Only old ones: another machine that shares the disk may be at work on a young one.
    """
    count = 0
    for folder in root.glob("*/tmp-*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - folder.stat().st_mtime > older_than_s:
                shutil.rmtree(folder, ignore_errors=True)
                count += 1
    return count


def lookup(folder: Path, not_before: float = 0.0) -> dict[str, Any] | None:
    """The description of a complete folder, or None if it is not there or older than ``not_before`` (Unix time)."""
    try:
        meta = cast(dict[str, Any], json.loads((folder / META).read_text(encoding="utf-8")))
    except (OSError, json.JSONDecodeError):
        return None
    return meta if meta["created"] >= not_before else None


def obtain(
    folder: Path,
    fill: Callable[[Path], dict[str, Any]],
    not_before: float = 0.0,
    usable: Callable[[Path], bool] = Path.is_dir,
) -> tuple[dict[str, Any], bool]:
    """Return a folder's description, filling the folder first where it is not there.

    Parameters
    ----------
    folder : Path
        Its place; the parent is created.
    fill : callable
        ``fill(temporary_folder)`` writes the files and returns the description (JSON).
    not_before : float
        Fill again what is older than this Unix time.
    usable : callable
        ``usable(folder)``: False fills again what is there, such as a model that another machine has written.

    Returns
    -------
    (dict, bool)
        The description, and whether it was there already.

    Raises
    ------
    StoreError
        If the disk is full or cannot be written.
    """
    if (meta := lookup(folder, not_before)) and usable(folder):
        return meta, True
    try:
        with scratch_folder(folder.parent) as scratch:
            place = Path(scratch) / "content"
            place.mkdir()
            begin = time.perf_counter()
            meta = {**fill(place), "created": time.time(), "seconds": round(time.perf_counter() - begin, 3)}
            (place / META).write_text(json.dumps(meta), encoding="utf-8")
            if folder.exists():
                shutil.rmtree(folder)
            place.rename(folder)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise StoreError(
                f"Cannot write the cache {folder.parent}: {error.strerror}. "
                "Free space, or set ASSAY_HOME to another disk."
            ) from None
        raise
    return meta, False
