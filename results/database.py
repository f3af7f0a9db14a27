"""Opening the database file: short-lived connections, patience with other processes, and errors that say what to do.

DuckDB lets one process write or many read. Writers take turns through a lock file beside the database; whoever meets
another process's lock tries again for a while before giving up.
"""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.errors import DatabaseBusy, InputError, StoreError
from results import schema

TIMEOUT_VARIABLE = "ASSAY_DB_TIMEOUT"
_DEFAULT_TIMEOUT_S = 30.0


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
    connection = _open(db, read_only=True, timeout_s=timeout_s)
    try:
        _check_version(connection, db)
    except BaseException:
        connection.close()
        raise
    return connection


@contextlib.contextmanager
def writing(db: Path, timeout_s: float | None = None) -> Iterator[Any]:
    """The writer's connection, under the lock file; a missing database is created, whole or not at all.

    Raises
    ------
    DatabaseBusy, StoreError
        If it is held by another process for too long, or the file or the disk refuses.
    """
    import duckdb

    with locked(db, timeout_s):
        if not db.exists():
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
    import filelock

    limit = timeout() if timeout_s is None else timeout_s
    lock = filelock.FileLock(f"{db}.lock", timeout=limit)
    try:
        db.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        raise DatabaseBusy(
            f"{db}: another Assay process has been writing for more than {limit:g} s ({db}.lock is held). "
            f"Try again when it is done, or set {TIMEOUT_VARIABLE}."
        ) from None
    except (OSError, NotImplementedError) as error:
        raise StoreError(
            f"{db.parent}: cannot be written: {_reason(error)}. Choose another place with --db."
        ) from error
    try:
        yield
    finally:
        lock.release()


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
        connection = duckdb.connect(str(fresh))
        try:
            schema.create(connection)
        finally:
            connection.close()
        fresh.replace(db)
    except (duckdb.Error, OSError) as error:
        raise StoreError(
            f"{db}: the database cannot be created: {_reason(error)}. Choose another place with --db."
        ) from error


def discard(db: Path) -> None:
    """Remove a database file and its write-ahead log, if they are there."""
    db.unlink(missing_ok=True)
    wal(db).unlink(missing_ok=True)


def wal(db: Path) -> Path:
    """DuckDB's write-ahead log of a database file."""
    return db.with_name(f"{db.name}.wal")


def _open(db: Path, *, read_only: bool, timeout_s: float | None) -> Any:
    import duckdb

    limit = timeout() if timeout_s is None else timeout_s
    deadline, pause = time.monotonic() + limit, 0.005
    while True:
        try:
            connection = duckdb.connect(str(db), read_only=read_only)
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
    except duckdb.CatalogException:
        raise StoreError(
            f"{db} is a DuckDB database, but not one of Assay's: choose another place with --db."
        ) from None
    versions = ", ".join(str(version) for (version,) in found) or "none"
    if found != [(schema.VERSION,)]:
        raise StoreError(
            f"{db} has schema version {versions}; this Assay reads version {schema.VERSION}. "
            f"`assay db rebuild --db {db}` makes it anew from the record files."
        )


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".!")


def _reason(error: BaseException) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else _first_line(error)
