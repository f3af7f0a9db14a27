"""Record files: one immutable JSON file a run or a checked claim, beside the database.

``assay.duckdb`` has its files in ``assay.records/<yyyy-mm>/<id>.json``: ``{"sha256": ..., "record": {...}}`` (or
``"claim"``) where the hash is that of the value's canonical JSON. Plain JSON, so that a stranger needs nothing but a
text editor; about 50 kB a run with 10,000 predictions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from harness.canonical import digest, dumps
from harness.errors import StoreError
from harness.record import SCHEMA_VERSION, STATUSES, Record

VERDICTS = ("reproduced", "not reproduced", "stand-in", "holds", "does not hold", "inconclusive", "not run")
Kind = Literal["record", "claim"]
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")
_NEEDED = tuple(
    f.name
    for f in dataclasses.fields(Record)
    if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
)


@dataclass(frozen=True)
class Stored:
    """A verified file's content.

    Parameters
    ----------
    kind : {"record", "claim"}
    id : str
        ``run_id`` or ``entry_id``; also the file's stem.
    sha256 : str
        Of the value's canonical JSON.
    value : mapping
        The record, or the claim.
    """

    kind: Kind
    id: str
    sha256: str
    value: Mapping[str, Any]


def folder_of(db: Path) -> Path:
    """The folder of a database's record files."""
    return db.with_name(f"{db.stem}.records")


def files(folder: Path) -> Iterator[Path]:
    """The record files of a folder, in order of their names; temporary files are left out."""
    for path in sorted(folder.glob("*/*.json")):
        if not path.name.startswith("."):
            yield path


def checked(kind: Kind, value: Mapping[str, Any]) -> Stored:
    """Check a record or a claim and give it its hash.

    Raises
    ------
    StoreError
        Naming the field that is missing, unknown, of the wrong length or not finite.
    """
    what = f"{kind} {value.get('run_id' if kind == 'record' else 'entry_id')!r}"
    try:
        text = dumps(value)
    except (TypeError, ValueError) as error:
        field = next((key for key, item in value.items() if not _serializable(item)), "?")
        raise StoreError(
            f"{what}: field {field!r} cannot be stored as JSON: {error}. Missing values are null."
        ) from None
    plain = json.loads(text)
    problem = _record_problem(plain) if kind == "record" else _claim_problem(plain)
    if problem:
        raise StoreError(f"{what}: {problem}")
    return Stored(kind, plain["run_id" if kind == "record" else "entry_id"], digest(plain), plain)


def read(path: Path) -> Stored:
    """Read and verify one file.

    Raises
    ------
    StoreError
        If it is truncated, was changed, or is no record file.
    """
    try:
        wrapper = json.loads(path.read_bytes())
    except OSError as error:
        raise StoreError(f"{path}: cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise StoreError(f"{path}: truncated or not JSON ({error}). {_REMEDY}") from None
    kinds: tuple[Kind, ...] = ("record", "claim")
    kind = next((k for k in kinds if isinstance(wrapper, dict) and isinstance(wrapper.get(k), dict)), None)
    if kind is None:
        raise StoreError(f"{path}: not a record file: it has neither 'record' nor 'claim'. {_REMEDY}")
    stored = checked(kind, wrapper[kind])
    if stored.sha256 != wrapper.get("sha256"):
        raise StoreError(f"{path}: its content does not have the sha256 that it states: it was changed. {_REMEDY}")
    if stored.id != path.stem:
        raise StoreError(f"{path}: holds {stored.id!r}: it was renamed. Give it its name back.")
    return stored


_REMEDY = "Restore it from a copy (`assay db export` makes them), or set it aside with `assay db rebuild`."


def path_of(folder: Path, stored: Stored) -> Path:
    """Where a record belongs in a records folder."""
    return folder / f"{moment(stored.value['created_at']):%Y-%m}" / f"{stored.id}.json"


def moment(text: str) -> datetime:
    """An ISO 8601 time in UTC; one without an offset is UTC already."""
    value = datetime.fromisoformat(text)
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


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
        if path.exists():
            if read(path).sha256 != stored.sha256:
                raise StoreError(f"{path}: exists with another content; records never change, so nothing was written.")
            return path
        temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp")
        _write_temporary(temporary, path, dumps({"sha256": stored.sha256, stored.kind: stored.value}) + "\n")
        for directory in (path.parent, folder):
            _fsync_folder(directory)
    except OSError as error:
        raise StoreError(
            f"{path}: the record cannot be written: {error.strerror or error}. Nothing stored before is harmed: "
            "make room or choose a writable place with --db, and run again."
        ) from error
    return path


def _write_temporary(temporary: Path, path: Path, text: str) -> None:
    """Write under a lock, by which :func:`remove_leftovers` knows that the writer lives, then rename."""
    while True:
        with temporary.open("w", encoding="utf-8") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX)
            if os.fstat(stream.fileno()).st_nlink == 0:
                continue  # it was cleaned away between opening and locking
            try:
                stream.write(text)
                stream.flush()
                os.fsync(stream.fileno())
                temporary.replace(path)
            except BaseException:
                with contextlib.suppress(OSError):
                    temporary.unlink()
                raise
            return


def remove_leftovers(folder: Path) -> int:
    """Remove temporary files whose writers are gone; return how many."""
    removed = 0
    for path in folder.glob("*/.*.tmp"):
        with contextlib.suppress(OSError), path.open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)  # BlockingIOError: its writer lives
            path.unlink()
            removed += 1
    return removed


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _serializable(value: Any) -> bool:
    try:
        dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def _record_problem(record: Mapping[str, Any]) -> str | None:
    known = {f.name for f in dataclasses.fields(Record)}
    if record.get("schema", SCHEMA_VERSION) != SCHEMA_VERSION:
        return f"record format {record['schema']!r}; this Assay knows format {SCHEMA_VERSION}: upgrade it."
    if unknown := sorted(set(record) - known):
        return f"unknown fields {', '.join(unknown)}."
    if missing := [name for name in _NEEDED if record.get(name) is None]:
        return f"fields {', '.join(missing)} are missing."
    if problem := _identity_problem(record, "run_id"):
        return problem
    if record["status"] not in STATUSES:
        return f"status {record['status']!r} is not one of {', '.join(STATUSES)}."
    labels, predictions, n = record.get("labels"), record.get("predictions"), record.get("n_examples")
    if (labels is None) != (predictions is None):
        return "labels and predictions must both be there, or neither."
    if labels is not None and predictions is not None:
        right = sum(a == b for a, b in zip(labels, predictions, strict=False))
        if not len(labels) == len(predictions) == n:
            return f"{len(labels)} labels, {len(predictions)} predictions and n_examples = {n} do not agree."
        if right != record.get("n_correct"):
            return f"n_correct = {record.get('n_correct')}, but {right} predictions are right."
    return None


def _claim_problem(claim: Mapping[str, Any]) -> str | None:
    if missing := [name for name in ("entry_id", "created_at", "paper", "id", "verdict") if claim.get(name) is None]:
        return f"fields {', '.join(missing)} are missing."
    if str(claim["verdict"]).partition(" (")[0] not in VERDICTS:
        return f"verdict {claim['verdict']!r} is not one of {', '.join(VERDICTS)} (with a reason in parentheses)."
    if not isinstance(claim.get("run_ids", []), list):
        return "run_ids must be a list."
    return _identity_problem(claim, "entry_id")


def _identity_problem(value: Mapping[str, Any], key: str) -> str | None:
    if not isinstance(value[key], str) or not _ID.fullmatch(value[key]):
        return f"{key} {value[key]!r} must be letters, digits, '-', '_' and '.', as it names a file."
    try:
        moment(value["created_at"])
    except (TypeError, ValueError):
        return f"created_at {value['created_at']!r} is not an ISO 8601 time."
    return None
