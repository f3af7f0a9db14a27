"""The only writer: a record becomes a file first, then rows of the database, in one transaction.

A process killed at any moment leaves whole files, whole transactions and at most a temporary file; :meth:`Store.sync`
takes up what has a file but no row. A file that is no record is named and set aside: it never keeps the others out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from harness.errors import StoreError
from harness.record import new_run_id
from results import comparisons, database, limits, records
from results.ingest import insert
from results.records import DamagedRecord, Stored

LOG = logging.getLogger("assay")
"""Where it is said what was left out or set aside; on standard error unless somebody configures it."""

_BATCH = 50
"""Files in one transaction of :meth:`Store.sync`: bounds memory (about 1 MB a run of 10,000 predictions)."""


class Store:
    """Keeps runs and claims in ``path`` and in the record files beside it.

    Connections last for one call, so that other processes can read and write in between.

    Parameters
    ----------
    path : Path
        The database; ``assay.duckdb`` keeps its record files in ``assay.records/``.
    timeout_s : float, optional
        Seconds to wait for a database held by another process. Default: ``ASSAY_DB_TIMEOUT``, or 30.
    """

    def __init__(self, path: Path, timeout_s: float | None = None) -> None:
        self.path = Path(path).absolute()
        self.timeout_s = timeout_s

    @property
    def folder(self) -> Path:
        """The folder of the record files."""
        return records.folder_of(self.path)

    def add(self, record: Mapping[str, Any]) -> None:
        """Write the record's file durably, then take it up into the database. Adding the same again is harmless.

        Raises
        ------
        StoreError
            If the record is not one, its id exists with another content, or the file or the disk refuses.
        DatabaseBusy
            If another process holds the database for too long; the record file is safe, :meth:`sync` takes it up.
        """
        self._add([records.checked("record", limits.fitted(record))])

    def add_claims(self, paper: str, claims: Iterable[Mapping[str, Any]]) -> list[str]:
        """Keep checked claims of a paper.

        Parameters
        ----------
        paper : str
            Key of the recipe.
        claims : iterable of mapping
            ``id``, ``verdict`` (one of :data:`results.records.VERDICTS`) and, where known, ``claimed``, ``measured``,
            ``tolerance``, ``reason``, ``run_ids``; other fields are kept in ``details``.

        Returns
        -------
        list of str
            Their ``entry_id`` in order.

        Raises
        ------
        StoreError
            As :meth:`add`.
        """
        stored = []
        for claim in claims:
            entry_id = claim.get("entry_id") or f"claim-{new_run_id()}"
            created_at = claim.get("created_at") or datetime.now(UTC).isoformat()
            value = {**claim, "paper": paper, "entry_id": entry_id, "created_at": created_at}
            stored.append(records.checked("claim", value))
        self._add(stored)
        return [item.id for item in stored]

    def sync(self) -> int:
        """Take up record files that are not in the database yet, and remove what killed writers left.

        Returns
        -------
        int
            How many were taken up.

        Raises
        ------
        DatabaseBusy, StoreError
            If the database is held by another process for too long, or the database or the folder refuses. Single bad
            files are no reason: what is no record is set aside as ``*.damaged``, what cannot be read stays where it is,
            and both are named in a warning (:data:`LOG`).
        """
        paths = list(records.files(self.folder))
        if not paths and not self.path.exists():
            return 0
        with database.writing(self.path, self.timeout_s) as connection:
            records.remove_leftovers(self.folder)
            known = known_ids(connection)
            missing, taken, here = unknown(paths, known), 0, records.arrivals(self.folder)
            for start in range(0, len(missing), _BATCH):
                batch = [stored for path in missing[start : start + _BATCH] if (stored := readable(path)) is not None]
                records.note_arrivals(self.folder, (s.id for s in batch if s.origin is None and s.id not in here))
                taken += take_up(connection, batch, {}, compare=False)
            if missing:
                with _transaction(connection):
                    comparisons.bring_up_to_date(connection)
        return taken

    def finished(self, cell_hashes: Sequence[str]) -> Mapping[str, Mapping[str, Any]]:
        """The newest own run per cell hash that needs no new one (ok or unsupported), as a row of ``records``.

        The newest is the one that came last, whatever its own clock said. Records that were merged answer nothing:
        anybody can write one under a cell hash that is known.

        Parameters
        ----------
        cell_hashes : sequence of str
            Those asked for; one without such a row is left out of the answer.

        Raises
        ------
        DatabaseBusy, StoreError
            If the database is held by another process for too long, or cannot be read.
        """
        from results.queries import rows

        if not cell_hashes or not self.path.exists():
            return {}
        newest = """
            SELECT run_id, cell_hash, created_at, status, reason, task, method, hardware, seed, batch_size, threads,
                precision
            FROM records
            WHERE cell_hash IN (SELECT unnest(?)) AND status IN ('ok', 'unsupported') AND origin IS NULL
            QUALIFY row_number() OVER (
                PARTITION BY cell_hash ORDER BY arrived_at DESC, created_at DESC, run_id DESC
            ) = 1"""
        with database.reading(self.path, self.timeout_s) as connection:
            found = rows(connection, newest, [list(cell_hashes)])
        return {row["cell_hash"]: row for row in found}

    def record(self, run_id: str) -> dict[str, Any]:
        """The stored record of a run, from its file.

        Raises
        ------
        StoreError
            If there is no such file, or it is damaged.
        """
        if path := records.find(self.folder, run_id):
            return dict(records.read(path).value)
        raise StoreError(f"{self.folder}: no record file of run {run_id!r}. `assay db check` tells what is missing.")

    def _add(self, batch: Sequence[Stored]) -> None:
        for stored in batch:
            records.write(self.folder, stored)
        records.note_arrivals(self.folder, (stored.id for stored in batch))
        with database.writing(self.path, self.timeout_s) as connection:
            take_up(connection, batch, known_ids(connection, [stored.id for stored in batch]))


def unknown(paths: Sequence[Path], known: Mapping[str, str]) -> list[Path]:
    """The files that the database does not know; of several with one id at most one, and the others are set aside."""
    by_id: dict[str, list[Path]] = {}
    for path in paths:
        by_id.setdefault(path.stem, []).append(path)
    kept = []
    for name, same in by_id.items():
        if len(same) > 1:
            same = _one_of(same, known.get(name))
        if name not in known:
            kept += same
    return kept


def _one_of(paths: Sequence[Path], sha256: str | None) -> list[Path]:
    """The file of an id that occurs more than once: the one that the database knows, else the first."""
    found = [(path, stored) for path in paths if (stored := readable(path)) is not None]
    if found and all(stored.sha256 != sha256 for _, stored in found):
        sha256 = found[0][1].sha256
    for path, stored in found:
        if stored.sha256 != sha256:
            LOG.warning("Set aside as %s: %s is there with another content.", records.set_aside(path), stored.id)
    return [path for path, stored in found if stored.sha256 == sha256][:1]


def readable(path: Path) -> Stored | None:
    """A file's record; None, with a warning, for one that is damaged (it is set aside) or cannot be read (it stays)."""
    try:
        return records.read(path)
    except DamagedRecord as error:
        LOG.warning("%s Set aside as %s.", error, records.set_aside(path))
    except StoreError as error:
        LOG.warning("%s It is left out.", error)
    return None


def known_ids(connection: Any, ids: Sequence[str] | None = None) -> dict[str, str]:
    """Id to sha256 of what the database holds (of those ids)."""
    where = "" if ids is None else "WHERE id IN (SELECT unnest($ids))"
    query = f"""SELECT id, sha256 FROM (
        SELECT run_id AS id, record_sha256 AS sha256 FROM records UNION ALL SELECT entry_id, record_sha256 FROM claims
    ) {where}"""  # noqa: S608  (nothing of the user's is in it)
    return dict(connection.execute(query, {} if ids is None else {"ids": list(ids)}).fetchall())


def take_up(connection: Any, batch: Sequence[Stored], known: Mapping[str, str], *, compare: bool = True) -> int:
    """Insert what is new of a batch in one transaction; return how many.

    ``compare`` as in :func:`results.ingest.insert`.
    """
    for stored in batch:
        if known.get(stored.id, stored.sha256) != stored.sha256:
            raise StoreError(
                f"{stored.kind} {stored.id} is in the database with another content; records never change."
            )
    new = [stored for stored in batch if stored.id not in known]
    if new:
        with _transaction(connection):
            insert_in_order(connection, new, compare=compare)
    return len(new)


@contextlib.contextmanager
def _transaction(connection: Any) -> Iterator[None]:
    connection.begin()
    try:
        yield
    except BaseException:
        connection.rollback()
        raise
    connection.commit()


def insert_in_order(connection: Any, batch: Sequence[Stored], *, compare: bool = True) -> None:
    """Insert records and claims in the order in which they came; the caller holds the transaction.

    A clock that was ahead for a while would make its records the newest for good: what comes after them counts as
    later, whatever it says itself.
    """
    ((last,),) = connection.execute("SELECT max(arrived_at) FROM records WHERE origin IS NULL").fetchall()
    ordered = []
    for stored in batch:
        if stored.kind == "record" and stored.origin is None:
            last = stored.arrived_at if last is None else max(stored.arrived_at, last + timedelta(microseconds=1))
            ordered.append(dataclasses.replace(stored, arrived_at=last))
        else:
            ordered.append(stored)
    insert(connection, ordered, compare=compare)
