"""The only writer: a record becomes a file first, then rows of the database, in one transaction.

A process killed at any moment leaves whole files, whole transactions and at most a temporary file; :meth:`Store.sync`
takes up what has a file but no row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.errors import StoreError
from harness.record import new_run_id
from results import database, records
from results.ingest import insert
from results.records import Stored

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
        self._add([records.checked("record", record)])

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
            created_at = claim.get("created_at") or _now()
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
        StoreError
            If a file is damaged (the others are taken up first), or the database refuses.
        """
        records.remove_leftovers(self.folder)
        paths = {path.stem: path for path in records.files(self.folder)}
        if not paths and not self.path.exists():
            return 0
        taken, damaged = 0, []
        with database.writing(self.path, self.timeout_s) as connection:
            known = _known(connection)
            missing = [path for stem, path in paths.items() if stem not in known]
            for start in range(0, len(missing), _BATCH):
                batch = []
                for path in missing[start : start + _BATCH]:
                    try:
                        batch.append(records.read(path))
                    except StoreError as error:
                        damaged.append(str(error))
                taken += _take_up(connection, batch, {})
        if damaged:
            raise StoreError("\n".join(damaged))
        return taken

    def finished(self, cell_hashes: Sequence[str]) -> Mapping[str, Mapping[str, Any]]:
        """The newest row of ``runs`` per cell hash that needs no new run (ok or unsupported).

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
            SELECT * FROM runs WHERE run_id IN (
                SELECT run_id FROM records
                WHERE cell_hash IN (SELECT unnest(?)) AND status IN ('ok', 'unsupported')
                QUALIFY row_number() OVER (PARTITION BY cell_hash ORDER BY created_at DESC, run_id DESC) = 1
            )"""
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
        for path in self.folder.glob(f"*/{run_id}.json"):
            return dict(records.read(path).value)
        raise StoreError(f"{self.folder}: no record file of run {run_id!r}. `assay db check` tells what is missing.")

    def _add(self, batch: Sequence[Stored]) -> None:
        for stored in batch:
            records.write(self.folder, stored)
        with database.writing(self.path, self.timeout_s) as connection:
            ids = [stored.id for stored in batch]
            _take_up(connection, batch, _known(connection, ids))


def _known(connection: Any, ids: Sequence[str] | None = None) -> dict[str, str]:
    """Id to sha256 of what the database holds (of those ids)."""
    where = "" if ids is None else "WHERE id IN (SELECT unnest($ids))"
    query = f"""SELECT id, sha256 FROM (
        SELECT run_id AS id, record_sha256 AS sha256 FROM records UNION ALL SELECT entry_id, record_sha256 FROM claims
    ) {where}"""  # noqa: S608  (nothing of the user's is in it)
    return dict(connection.execute(query, {} if ids is None else {"ids": list(ids)}).fetchall())


def _take_up(connection: Any, batch: Sequence[Stored], known: Mapping[str, str]) -> int:
    """Insert what is new of a batch in one transaction; return how many."""
    for stored in batch:
        if known.get(stored.id, stored.sha256) != stored.sha256:
            raise StoreError(
                f"{stored.kind} {stored.id} is in the database with another content; records never change."
            )
    new = [stored for stored in batch if stored.id not in known]
    if new:
        connection.begin()
        try:
            insert(connection, new)
        except BaseException:
            connection.rollback()
            raise
        connection.commit()
    return len(new)


def _now() -> str:
    from datetime import UTC, datetime

    return datetime.now(UTC).isoformat()
