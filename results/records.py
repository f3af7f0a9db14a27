"""Record files: one immutable JSON file a run or a checked claim, beside the database.

``assay.duckdb`` has its files in ``assay.records/<yyyy-mm>/<id>.json``: ``{"sha256": ..., "record": {...}}`` (or
``"claim"``) where the hash is that of the value's canonical JSON. Plain JSON, so that a stranger needs nothing but a
text editor; about 50 kB a run with 10,000 predictions.

What `assay db merge` brought lies in a folder of its own, ``assay.records/merged-<time>-<random>/``, whose ``.origin``
says where from: such records are shown and compared, and never taken for runs of this place. ``arrivals.txt`` holds the
ids of our own records in the order in which they were written, since a clock can be wrong.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NoReturn

from harness.canonical import digest, dumps
from harness.errors import DataError, StoreError
from harness.files import read_regular
from harness.record import SCHEMA_VERSION, upgrade
from results import limits
from results.limits import VERDICTS as VERDICTS
from results.limits import moment as moment

Kind = Literal["record", "claim"]
_KINDS: tuple[Kind, ...] = ("record", "claim")
_MERGED = "merged-"
_STAGING = ".merging-"
_ORIGIN = ".origin"
_ARRIVALS = "arrivals.txt"


class DamagedRecord(StoreError):
    """A file whose content is no record: unlike one that merely cannot be read here and now, it can be set aside."""


@dataclass(frozen=True)
class Stored:
    """A verified file's content.

    Parameters
    ----------
    kind : {"record", "claim"}
    id : str
        ``run_id`` or ``entry_id``; also the file's stem.
    sha256 : str
        Of the canonical JSON of the value as it was written.
    value : mapping
        The record in the present format, or the claim.
    written : mapping
        The record or claim as it stands in its file, maybe in an older format.
    origin : str or None
        What it was merged from, and when; None if it was measured here.
    arrived_at : datetime
        By which the newest is found: ``created_at``, or a moment after the own record that came before it, where the
        clock says otherwise (see :func:`results.store.insert_in_order`). In UTC.
    """

    kind: Kind
    id: str
    sha256: str
    value: Mapping[str, Any]
    written: Mapping[str, Any]
    origin: str | None
    arrived_at: datetime


# ---------------------------------------------------------------------------------------------------------------------
# Where files are


def folder_of(db: Path) -> Path:
    """The folder of a database's record files."""
    return db.with_name(f"{db.stem}.records")


def files(folder: Path) -> Iterator[Path]:
    """The record files of a folder, in order of their names; temporary files are left out.

    Raises
    ------
    StoreError
        If the folder cannot be listed.
    """
    try:
        for place in sorted(folder.iterdir()) if folder.exists() else ():
            if place.is_dir() and not place.name.startswith("."):
                yield from sorted(p for p in place.iterdir() if p.suffix == ".json" and not p.name.startswith("."))
    except OSError as error:
        raise StoreError(f"{error.filename}: cannot be listed: {error.strerror}.") from error


def find(folder: Path, record_id: str) -> Path | None:
    """The file of a record id, wherever in the folder it lies."""
    if limits.is_id(record_id) and folder.is_dir():
        for place in sorted(folder.iterdir()):
            path = place / f"{record_id}.json"
            if not place.name.startswith(".") and os.path.lexists(path):
                return path
    return None


def origin_of(path: Path) -> str | None:
    """What a file of a records folder was merged from, and when; None if it is of this place."""
    place = path.parent
    if not place.name.startswith(_MERGED):
        return None
    try:
        value = json.loads(read_regular(place / _ORIGIN, 1 << 16))
        return _origin(str(value["source"]), moment(str(value["merged_at"])))
    except (DataError, ValueError, KeyError, TypeError, RecursionError):
        return place.name  # the folder's name alone says that it was merged


def _origin(source: str, merged_at: datetime) -> str:
    return f"{limits.shortened(source, 4000)}, merged {merged_at:%Y-%m-%d %H:%M:%S} UTC"


def path_of(folder: Path, stored: Stored) -> Path:
    """Where a record of our own belongs in a records folder."""
    return folder / f"{moment(stored.value['created_at']):%Y-%m}" / f"{stored.id}.json"


# ---------------------------------------------------------------------------------------------------------------------
# Checking and reading


def checked(kind: Kind, value: Mapping[str, Any]) -> Stored:
    """Check a record or a claim and give it its hash.

    Raises
    ------
    StoreError
        Naming the field that is missing, unknown, out of bounds or not finite.
    """
    what = f"{kind} {value.get('run_id' if kind == 'record' else 'entry_id')!r}"[:300]
    try:
        text = dumps(value)
        text.encode()
        plain = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        field = next((key for key, item in value.items() if not _serializable(item)), "?")
        raise DamagedRecord(
            f"{what}: field {field!r} cannot be stored as JSON: {error}. Missing values are null."
        ) from None
    version = plain.get("schema", 1) if kind == "record" else 1
    if type(version) is int and version > SCHEMA_VERSION:
        # Not a DamagedRecord: a later Assay reads it.
        raise StoreError(f"{what}: record format {version}; this Assay knows format {SCHEMA_VERSION}: upgrade it.")
    problem = limits.record_problem(plain) if kind == "record" else limits.claim_problem(plain)
    if problem:
        raise DamagedRecord(f"{what}: {problem}")
    current = upgrade(plain) if kind == "record" else plain
    name = plain["run_id" if kind == "record" else "entry_id"]
    return Stored(kind, name, digest(plain), current, plain, None, moment(plain["created_at"]))


def read(path: Path) -> Stored:
    """Read and verify one file of a records folder.

    Raises
    ------
    DamagedRecord
        If it is truncated, was changed, or is no record file.
    StoreError
        If it cannot be read here: another user's, or of a later format.
    """
    return dataclasses.replace(parse(content(path), path), origin=origin_of(path))


def content(path: Path) -> bytes:
    """The bytes of a record file; pipes, devices and endless files are refused without being read.

    Raises
    ------
    DamagedRecord
        If it is no regular file, or far too large.
    StoreError
        If it cannot be read.
    """
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise DamagedRecord(f"{path}: not a regular file. {_REMEDY}")
        if about.st_size > limits.MAX_BYTES:
            raise DamagedRecord(
                f"{path}: {about.st_size:,} bytes; a record has at most {limits.MAX_BYTES:,}. {_REMEDY}"
            )
        return read_regular(path, limits.MAX_BYTES)
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}.") from error
    except DataError as error:
        raise StoreError(str(error)) from error


def parse(data: bytes, path: Path) -> Stored:
    """Verify the bytes of one file; ``path`` gives its id.

    Raises
    ------
    DamagedRecord
        If they are truncated, were changed, or are no record.
    StoreError
        If they are of a later format.
    """
    try:
        wrapper = json.loads(data.decode("utf-8"), object_pairs_hook=_once, parse_constant=_not_finite)
    except (ValueError, RecursionError) as error:
        raise DamagedRecord(f"{path}: truncated or not JSON ({error}). {_REMEDY}") from None
    kind = next((k for k in _KINDS if isinstance(wrapper, dict) and isinstance(wrapper.get(k), dict)), None)
    if kind is None:
        raise DamagedRecord(f"{path}: not a record file: it has neither 'record' nor 'claim'. {_REMEDY}")
    try:
        stored = checked(kind, wrapper[kind])
    except StoreError as error:
        raise type(error)(f"{path}: {error}") from None
    if stored.sha256 != wrapper.get("sha256"):
        raise DamagedRecord(f"{path}: its content does not have the sha256 that it states: it was changed. {_REMEDY}")
    if stored.id != path.stem:
        raise DamagedRecord(f"{path}: holds {stored.id!r}: it was renamed. Give it its name back.")
    return stored


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return found


def _not_finite(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


_REMEDY = "Restore it from a copy (`assay db export` makes them), or set it aside with `assay db rebuild`."


def _serializable(value: Any) -> bool:
    try:
        dumps(value).encode()
    except (TypeError, ValueError, RecursionError):
        return False
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write(folder: Path, stored: Stored) -> Path:
    """Write one file durably: temporary name, fsync, rename, fsync of the folder. Writing the same twice is harmless.

    Raises
    ------
    StoreError
        If the disk refuses, or the id exists with another content.
    """
    path = path_of(folder, stored)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if there := find(folder, stored.id):
            if read(there).sha256 != stored.sha256:
                raise StoreError(f"{there}: exists with another content; records never change, so nothing was written.")
            return there
        temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp")
        _write_temporary(temporary, path, _wrapped(stored))
        for directory in (path.parent, folder):
            fsync_folder(directory)
    except OSError as error:
        raise StoreError(
            f"{path}: the record cannot be written: {error.strerror or error}. Nothing stored before is harmed: "
            "make room or choose a writable place with --db, and run again."
        ) from error
    return path


def _wrapped(stored: Stored) -> bytes:
    return (dumps({"sha256": stored.sha256, stored.kind: stored.written}) + "\n").encode()


def _write_temporary(temporary: Path, path: Path, data: bytes) -> None:
    """Write under a lock, by which :func:`remove_leftovers` knows that the writer lives, then rename."""
    while True:
        with temporary.open("wb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            if os.fstat(stream.fileno()).st_nlink == 0:
                continue  # it was cleaned away between opening and locking
            try:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
                temporary.replace(path)
            except BaseException:
                with contextlib.suppress(OSError):
                    temporary.unlink()
                raise
            return


class Staging:
    """Files that come in together or not at all: written beside the others, then renamed in one step.

    The caller holds the database's lock.

    Parameters
    ----------
    folder : Path
        The records folder.
    source : str
        Where they come from.
    """

    def __init__(self, folder: Path, source: str) -> None:
        self.source, self.merged_at = source, datetime.now(UTC)
        name = f"{self.merged_at:%Y%m%dT%H%M%S}-{secrets.token_hex(4)}"
        self._folder = folder
        self._made = not folder.exists()
        self._place, self._final = folder / f"{_STAGING}{name}", folder / f"{_MERGED}{name}"

    def __enter__(self) -> Staging:
        try:
            self._place.mkdir(parents=True)
            about = {"source": self.source, "merged_at": self.merged_at.isoformat()}
            self._add(_ORIGIN, json.dumps(about).encode())
        except OSError as error:
            self.__exit__()
            raise self._refused(error) from error
        return self

    def add(self, stored: Stored) -> None:
        """Write one file; nobody sees it yet.

        Raises
        ------
        StoreError
            If the disk refuses.
        """
        try:
            self._add(f"{stored.id}.json", _wrapped(stored))
        except OSError as error:
            raise self._refused(error) from error

    def read(self, record_id: str) -> Stored:
        """A record that was added, as it will be found after :meth:`commit`."""
        stored = read(self._place / f"{record_id}.json")
        return dataclasses.replace(stored, origin=_origin(self.source, self.merged_at))

    def commit(self) -> None:
        """Let everybody see all of them.

        Raises
        ------
        StoreError
            If the disk refuses.
        """
        try:
            fsync_folder(self._place)
            self._place.rename(self._final)
            fsync_folder(self._folder)
        except OSError as error:
            raise self._refused(error) from error

    def undo(self) -> None:
        """Take back what :meth:`commit` did."""
        with contextlib.suppress(OSError):
            self._final.rename(self._place)

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._place, ignore_errors=True)
        if self._made:
            with contextlib.suppress(OSError):
                self._folder.rmdir()  # refused where something is in it

    def _add(self, name: str, data: bytes) -> None:
        with (self._place / name).open("xb") as stream:
            stream.write(data)
            stream.flush()
            os.fsync(stream.fileno())

    def _refused(self, error: OSError) -> StoreError:
        return StoreError(f"{self._folder}: cannot be written: {error.strerror or error}. Nothing was merged.")


def set_aside(path: Path) -> Path:
    """Rename a file that is no record to ``*.damaged``, so that it stands in nobody's way; return its new place.

    Where it cannot be renamed, it stays.
    """
    for number in range(1, 1000):
        target = path.with_name(f"{path.name}.damaged" + (f".{number}" if number > 1 else ""))
        if not os.path.lexists(target):
            with contextlib.suppress(OSError):
                return path.rename(target)
            break
    return path


def remove_leftovers(folder: Path) -> int:
    """Remove temporary files and unfinished merges whose writers are gone; return how many.

    The caller holds the database's lock, so that no merge is at work.
    """
    removed = 0
    for path in folder.glob("*/.*.tmp"):
        with contextlib.suppress(OSError), path.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its writer lives
            path.unlink()
            removed += 1
    for place in folder.glob(f"{_STAGING}*"):
        shutil.rmtree(place, ignore_errors=True)
        removed += 1
    return removed


def note_arrivals(folder: Path, ids: Iterable[str]) -> None:
    """Keep the order in which our own records came, for a rebuild.

    A disk that refuses costs only this order: where it is not known, the records' own times stand in for it.
    """
    lines = "".join(f"{name}\n" for name in ids).encode()
    with contextlib.suppress(OSError):
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(folder / _ARRIVALS, flags, 0o666)
        try:
            os.write(descriptor, lines)
        finally:
            os.close(descriptor)


def arrivals(folder: Path) -> dict[str, int]:
    """Id to place in the order of arrival, of the records whose place is known."""
    try:
        lines = read_regular(folder / _ARRIVALS, 1 << 30).decode(errors="replace").splitlines()
    except DataError:
        return {}
    return {name: number for number, name in enumerate(dict.fromkeys(lines))}


def fsync_folder(folder: Path) -> None:
    """Make a rename within a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
