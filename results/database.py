"""Opening the database file: short-lived connections, patience with other processes, and errors that say what to do.

DuckDB lets one process write or many read. Writers take turns through a lock file beside the database; readers pass
through the same lock before they open it, so that they come after a writer that waits and never keep it out for good.
Whoever meets another process's lock tries again for a while before giving up.

A database file may be somebody else's. No SQL that lies in it can reach other files, and its views are not used: each
reading connection makes Assay's own.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness import locks
from harness.errors import DatabaseBusy, InputError, StoreError
from results import records, schema

TIMEOUT_VARIABLE = "ASSAY_DB_TIMEOUT"
_DEFAULT_TIMEOUT_S = 30.0
_BEHIND_WRITERS_S = 5.0
"""How long a reader stands behind writers before it tries its luck: one of them may itself wait for a reader."""
CONFIG = {"enable_external_access": "false"}
"""Of every connection: neither the SQL of a query nor that of a file reaches other files or the network."""


def timeout() -> float:
    """Seconds to wait for another process: ``ASSAY_DB_TIMEOUT``, by default 30.

    Raises
    ------
    InputError
        If the variable is not a number of seconds.
    """
    text = os.environ.get(TIMEOUT_VARIABLE, "")
    if not text:
        return _DEFAULT_TIMEOUT_S
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise InputError(f"{TIMEOUT_VARIABLE}={text!r}: must be a number of seconds, 0 or more.")
    return seconds


@contextlib.contextmanager
def reading(db: Path, timeout_s: float | None = None) -> Iterator[Any]:
    """A read-only connection, closed at the end of the block.

    Raises
    ------
    InputError
        If there is no such file.
    DatabaseBusy, StoreError
        If it is held by another process for too long, or cannot be read.
    """
    import duckdb

    connection = connect(db, timeout_s)
    try:
        yield connection
    except duckdb.Error as error:
        raise StoreError(f"{db} cannot be read: {_first_line(error)}. {REMEDY.format(db=db)}") from error
    finally:
        connection.close()


def connect(db: Path, timeout_s: float | None = None) -> Any:
    """Open the database read-only; the caller closes it, soon: a reader keeps writers out.

    Raises
    ------
    InputError
        If there is no such file.
    DatabaseBusy, StoreError
        If it is held by another process for too long, or cannot be read.
    """
    if not db.exists():
        raise InputError(f"No database at {db}: run `assay run quickstart` first, or give --db.")
    import duckdb

    connection = _open(db, read_only=True, timeout_s=timeout_s)
    try:
        _check_version(connection, db)
        schema.shadow_views(connection)
    except duckdb.Error as error:
        connection.close()
        raise StoreError(f"{db} cannot be read: {_first_line(error)}. {REMEDY.format(db=db)}") from error
    except BaseException:
        connection.close()
        raise
    return connection


@contextlib.contextmanager
def writing(db: Path, timeout_s: float | None = None, *, have_lock: bool = False) -> Iterator[Any]:
    """The writer's connection, under the lock file; a missing database is created, whole or not at all.

    Parameters
    ----------
    db : Path
        The database.
    timeout_s : float, optional
        Seconds to wait for other processes.
    have_lock : bool
        Whether the caller is inside :func:`locked`.

    Raises
    ------
    DatabaseBusy, StoreError
        If it is held by another process for too long, or the file or the disk refuses.
    """
    import duckdb

    with contextlib.nullcontext() if have_lock else locked(db, timeout_s):
        if not os.path.lexists(db):
            create(db)
        connection = _open(db, read_only=False, timeout_s=timeout_s)
        try:
            _check_version(connection, db)
            schema.refresh_views(connection)
            yield connection
        except duckdb.Error as error:
            raise StoreError(f"{db}: {_first_line(error)}. {REMEDY.format(db=db)}") from error
        finally:
            with contextlib.suppress(duckdb.Error):  # closing checkpoints; what is in the log already is safe
                connection.close()


REMEDY = (
    "No record is lost: every run has its own file beside the database. Make room if the disk is full, then "
    "`assay db rebuild --db {db}` makes the database anew from the files."
)


@contextlib.contextmanager
def locked(db: Path, timeout_s: float | None = None) -> Iterator[None]:
    """Hold ``<db>.lock``, by which writers take turns.

    Raises
    ------
    DatabaseBusy, StoreError
        If another writer holds it for too long, or the folder cannot be written.
    """
    limit = timeout() if timeout_s is None else timeout_s
    try:
        db.parent.mkdir(parents=True, exist_ok=True)
        held = contextlib.ExitStack()
        held.enter_context(locks.hold(_lock_file(db), limit))
    except locks.LockTimeout as error:
        raise DatabaseBusy(
            f"{db}: {error} has been writing for more than {limit:g} s ({_lock_file(db)} is held). "
            f"Try again when it is done, or set {TIMEOUT_VARIABLE}."
        ) from None
    except OSError as error:
        raise StoreError(
            f"{db.parent}: cannot be written: {_reason(error)}. Choose another place with --db."
        ) from error
    with held:
        yield


def _lock_file(db: Path) -> Path:
    return db.with_name(f"{db.name}.lock")


def create(db: Path) -> None:
    """Make an empty database at ``db``; the caller holds the lock.

    It is built under another name and renamed, because a process killed while DuckDB writes the first block would
    leave a file that DuckDB no longer opens.

    Raises
    ------
    StoreError
        If the disk refuses.
    """
    import duckdb

    fresh = db.with_name(f".{db.name}.new")
    try:
        discard(fresh)
        connection = duckdb.connect(str(fresh), config=CONFIG)
        try:
            schema.create(connection)
            finish(connection, fresh)
        finally:
            connection.close()
        put_in_place(fresh, db)
    except (duckdb.Error, OSError) as error:
        discard(fresh)
        raise StoreError(
            f"{db}: the database cannot be created: {_reason(error)}. Choose another place with --db."
        ) from error


def finish(connection: Any, fresh: Path) -> None:
    """Bring everything of a new database into its file, and check that a stranger finds it there.

    A disk that is full may refuse the last blocks only, and leave them in a log beside the file: without this, a rename
    would then put an empty file in the old one's place.

    Raises
    ------
    duckdb.Error, OSError
        If the disk refuses.
    """
    import duckdb

    counts = _counts(connection)
    connection.execute("CHECKPOINT")
    connection.close()
    if wal(fresh).exists() and wal(fresh).stat().st_size:
        raise duckdb.IOException("the new database was not written completely: is the disk full?")
    wal(fresh).unlink(missing_ok=True)
    descriptor = os.open(fresh, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    again = duckdb.connect(str(fresh), read_only=True, config=CONFIG)
    try:
        if _counts(again) != counts:
            raise duckdb.IOException("the new database does not hold what was written into it: is the disk full?")
    finally:
        again.close()


def _counts(connection: Any) -> list[int]:
    names = schema.tables()
    return [connection.execute(f"SELECT count(*) FROM {name}").fetchall()[0][0] for name in names]  # noqa: S608  (ours)


def put_in_place(fresh: Path, db: Path) -> None:
    """Rename a finished database into its place, durably."""
    fresh.replace(db)
    records.fsync_folder(db.parent)


def discard(db: Path) -> None:
    """Remove a database file and its write-ahead log, if they are there."""
    db.unlink(missing_ok=True)
    wal(db).unlink(missing_ok=True)


def wal(db: Path) -> Path:
    """DuckDB's write-ahead log of a database file."""
    return db.with_name(f"{db.name}.wal")


def _open(db: Path, *, read_only: bool, timeout_s: float | None) -> Any:
    import duckdb

    _require_regular(db)
    limit = timeout() if timeout_s is None else timeout_s
    deadline, pause = time.monotonic() + limit, 0.005
    while True:
        try:
            with _behind_writers(db, min(_BEHIND_WRITERS_S, limit / 2)) if read_only else contextlib.nullcontext():
                connection = duckdb.connect(str(db), read_only=read_only, config=CONFIG)
            connection.execute("SET TimeZone = 'UTC'")
            return connection
        except duckdb.Error as error:
            holder = _holder(str(error))
            if holder is None:
                raise StoreError(f"{db} cannot be opened: {_first_line(error)}. {REMEDY.format(db=db)}") from error
            if time.monotonic() >= deadline:
                raise DatabaseBusy(
                    f"{db} is held by {holder} (waited {limit:g} s). Close it there and repeat the command; "
                    "runs that were measured meanwhile are safe in their record files. "
                    f"{TIMEOUT_VARIABLE} sets the wait."
                ) from None
        time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
        pause = min(pause * 1.5, 0.25)


@contextlib.contextmanager
def _behind_writers(db: Path, patience_s: float) -> Iterator[None]:
    """Open after the writer whose turn it is; where there is no lock file, nobody writes by our rules."""
    with contextlib.ExitStack() as held:
        with contextlib.suppress(locks.LockTimeout, OSError):
            held.enter_context(locks.hold(_lock_file(db), patience_s, shared=True, create=False))
        yield


def _require_regular(db: Path) -> None:
    """DuckDB would wait for somebody to write into a named pipe."""
    try:
        about = db.stat()
    except OSError as error:
        raise StoreError(f"{db} cannot be opened: {error.strerror}. Choose another database with --db.") from error
    if not stat.S_ISREG(about.st_mode):
        raise StoreError(f"{db} is not a regular file: choose another database with --db.")


def _holder(message: str) -> str | None:
    """Who holds the file, from DuckDB's message, or None where it is another error."""
    if "different configuration" in message:
        return f"this process itself (PID {os.getpid()}, a connection that is still open)"
    if "Could not set lock" not in message:
        return None
    found = re.search(r"Conflicting lock is held in (.+?) \(PID (\d+)\)", message)
    return f"process {found[2]} ({found[1]})" if found else "another process"


def _check_version(connection: Any, db: Path) -> None:
    import duckdb

    try:
        found = connection.execute("SELECT version FROM schema_version").fetchall()
    except (duckdb.CatalogException, duckdb.BinderException):
        raise StoreError(
            f"{db} is a DuckDB database, but not one of Assay's: choose another place with --db."
        ) from None
    versions = ", ".join(str(version) for (version,) in found) or "none"
    if found == [(schema.VERSION,)]:
        return
    remedy = f"`assay db rebuild --db {db}` makes it anew from the record files."
    if len(found) == 1 and isinstance(found[0][0], int) and found[0][0] > schema.VERSION:
        remedy = "A later Assay wrote it: upgrade, or choose another database with --db."
    raise StoreError(f"{db} has schema version {versions}; this Assay reads version {schema.VERSION}. {remedy}")


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".!")


def _reason(error: BaseException) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else _first_line(error)
