"""The key of this machine and user, with which model files are marked, and the mark itself.

A hash that lies beside a file proves nothing: whoever changes the file changes the hash. A keyed hash (HMAC-SHA256,
RFC 2104) can only be made by a process that can read the key, which never leaves the machine. A cache folder that was
copied from elsewhere therefore holds no model that is loaded here.

Equal models have equal files on one machine, as the key does not change between runs; on two machines they differ in
the 32 bytes of the mark.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import secrets
import stat
from collections.abc import Iterable
from pathlib import Path

from harness.errors import DataError, StoreError

KEY_VARIABLE = "ASSAY_KEY_FILE"
KEY_BYTES = 32
MARK_BYTES = hashlib.sha256().digest_size


def key_file() -> Path:
    """``$ASSAY_KEY_FILE``, or ``assay/key`` in the user's state folder (``$XDG_STATE_HOME``, ``~/.local/state``)."""
    if named := os.environ.get(KEY_VARIABLE):
        return Path(named).absolute()
    state = Path(os.environ.get("XDG_STATE_HOME") or "")
    # The XDG specification has relative paths ignored.
    return (state if state.is_absolute() else Path.home() / ".local" / "state") / "assay" / "key"


def read_key() -> bytes | None:
    """The key, or None where none was made yet.

    Raises
    ------
    DataError
        If the file is not a key, or others may read or replace it.
    """
    path = key_file()
    try:
        # Without waiting and without following a link: a FIFO would wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"The key file {path} cannot be read: {error.strerror}.{_remedy()}") from error
    with os.fdopen(descriptor, "rb") as stream:
        status = os.fstat(stream.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"The key file {path} is not a regular file.{_remedy()}")
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
            raise DataError(
                f"The key file {path} belongs to or is open to others (mode {stat.S_IMODE(status.st_mode):04o}); it "
                f"must be this user's with mode 0600. If nobody else has read it: chmod 600 {path}."
            )
        text = stream.read(2 * KEY_BYTES + 2).strip()
    try:
        key = bytes.fromhex(text.decode("ascii"))
    except ValueError:
        key = b""
    if len(key) != KEY_BYTES:
        raise DataError(
            f"The key file {path} does not hold a key ({KEY_BYTES} bytes in hexadecimal). Delete it: a new one is "
            "made, and cached models are made again."
        )
    return key


def make_key() -> bytes:
    """The key; made, with mode 0600, where there is none.

    Raises
    ------
    StoreError
        If it cannot be written.
    """
    if key := read_key():
        return key
    path = key_file()
    fresh = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor = os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(secrets.token_bytes(KEY_BYTES).hex().encode() + b"\n")
                stream.flush()
                os.fsync(stream.fileno())
            # A link, not a rename: of two processes that make the first key, both must end with the same one.
            with contextlib.suppress(FileExistsError):
                path.hardlink_to(fresh)
        finally:
            fresh.unlink(missing_ok=True)
    except OSError as error:
        raise StoreError(
            f"The key that marks this machine's model files cannot be written to {path}: {error.strerror}.{_remedy()}"
        ) from error
    key = read_key()
    if key is None:
        raise StoreError(f"The key file {path} vanished while it was made.{_remedy()}")
    return key


def mark(key: bytes, parts: Iterable[bytes | memoryview]) -> bytes:
    """HMAC-SHA256 of the parts, one after the other."""
    code = hmac.new(key, digestmod=hashlib.sha256)
    for part in parts:
        code.update(part)
    return code.digest()


def is_marked(key: bytes, found: bytes, parts: Iterable[bytes | memoryview]) -> bool:
    """Whether ``found`` is the mark of the parts; takes the same time wherever they differ."""
    return hmac.compare_digest(found, mark(key, parts))


def _remedy() -> str:
    return f" Name a file in a folder that you can write in the environment variable {KEY_VARIABLE}."
