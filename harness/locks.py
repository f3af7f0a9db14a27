"""Locks between processes: waits that end, and that say on whom they wait.

A lock is a ``flock`` of a file, which the kernel releases when its holder dies. Who has waited long asks more often, so
that nobody starves behind newcomers.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

_FIRST_PAUSE_S = 0.02
_SHORTEST_PAUSE_S = 0.001


class LockTimeout(Exception):
    """Another process held the lock for too long; the text names it."""


@contextlib.contextmanager
def hold(
    path: Path,
    timeout_s: float,
    *,
    shared: bool = False,
    create: bool = True,
    waiting: Callable[[str], None] | None = None,
) -> Iterator[None]:
    """Hold the lock of a file during the block.

    Parameters
    ----------
    path : Path
        The lock file. It stays where it is: whoever deleted it would let two processes in.
    timeout_s : float
        Seconds to wait for it.
    shared : bool
        Whether other shared holders may come in at the same time.
    create : bool
        Whether to make the file where it is missing.
    waiting : callable, optional
        Told once, before the first wait, who holds the lock.

    Raises
    ------
    LockTimeout
        If another process holds it for too long.
    OSError
        If the file cannot be opened, or is no regular file.
    """
    descriptor = _opened(path, create)
    try:
        _acquire(descriptor, path, timeout_s, fcntl.LOCK_SH if shared else fcntl.LOCK_EX, waiting)
        yield
    finally:
        os.close(descriptor)  # which releases it


def _opened(path: Path, create: bool) -> int:
    # A link or a pipe that somebody put in the lock's place must neither be followed nor block.
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | (os.O_CREAT if create else 0)
    try:
        descriptor = os.open(path, os.O_RDWR | flags, 0o666)
    except PermissionError:
        descriptor = os.open(path, os.O_RDONLY | (flags & ~os.O_CREAT))  # another user's file can be locked as well
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is not a regular file", str(path))
    return descriptor


def _acquire(
    descriptor: int, path: Path, timeout_s: float, operation: int, waiting: Callable[[str], None] | None
) -> None:
    began = time.monotonic()
    while True:
        try:
            fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            waited = time.monotonic() - began
        if waited >= timeout_s:
            raise LockTimeout(holder(path))
        if waiting is not None:
            waiting(holder(path))
            waiting = None
        time.sleep(min(max(_SHORTEST_PAUSE_S, _FIRST_PAUSE_S / (1 + waited)), timeout_s - waited))


def holder(path: Path) -> str:
    """Who holds the lock of a file: ``process 123 (python -m assay)``, as far as the system tells."""
    try:
        of_lock = path.stat()
        wanted = f"{os.major(of_lock.st_dev):02x}:{os.minor(of_lock.st_dev):02x}:{of_lock.st_ino}"
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return "another process"
    for line in lines:
        words = line.split()
        # "1: FLOCK ADVISORY WRITE 123 fe:00:456 0 EOF"; a line with "->" is one that waits.
        if len(words) == 8 and words[1] == "FLOCK" and words[5] == wanted and words[4].isdigit() and words[4] != "0":
            return f"process {words[4]}{_command(words[4])}"
    return "another process"


def _command(pid: str) -> str:
    try:
        text = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""
    return f" ({text[:80]})" if text else ""
