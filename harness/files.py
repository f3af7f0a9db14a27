"""Reading of files that somebody else names: regular files only, and never more than is expected."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from harness.errors import DataError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def read_regular(path: Path, limit: int) -> bytes:
    """The content of a regular file, opened without blocking.

    Opening a named pipe would otherwise wait until somebody writes into it.

    Parameters
    ----------
    path : Path
        Symbolic links are followed.
    limit : int
        Bytes that the file may have.

    Raises
    ------
    DataError
        If it is missing, unreadable, no regular file or larger than the limit; the message names it.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:  # a NUL in the path is a ValueError
        raise DataError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}.") from None
    about = os.fstat(descriptor)
    if not stat.S_ISREG(about.st_mode):
        os.close(descriptor)
        kind = _KINDS.get(stat.S_IFMT(about.st_mode), "something else")
        raise DataError(f"{path} is {kind}; a regular file is expected.")
    with os.fdopen(descriptor, "rb") as stream:
        # Files of /proc have the size 0 and a content: what is read counts, not what the system says.
        content = stream.read(limit + 1)
    if len(content) > limit:
        raise DataError(f"{path} is larger than {limit:,} bytes, the most that is read of such a file.")
    return content
