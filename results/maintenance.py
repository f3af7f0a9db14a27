"""Looking after the files: rebuild the database, export and merge records, check everything against everything."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from harness.errors import DatabaseBusy, InputError, StoreError
from results import comparisons, database, ingest, limits, output, records, schema
from results.records import DamagedRecord, Staging, Stored
from results.store import insert_in_order, known_ids, unknown

_BATCH = 50
_MAX_FILES = 1_000_000
_NAMED = 5
"""Bad files that one message names."""


@dataclass(frozen=True)
class Rebuilt:
    """What :func:`rebuild` did.

    Parameters
    ----------
    records, claims : int
        Taken up from files.
    damaged : tuple of Path
        Files that could not be read, renamed to ``*.damaged``.
    kept_aside : Path or None
        The database as it was before.
    unreadable : tuple of Path
        Files that this Assay cannot read (a later format, another user's); they stay where they are.
    """

    records: int
    claims: int
    damaged: tuple[Path, ...]
    kept_aside: Path | None
    unreadable: tuple[Path, ...] = ()


def rebuild(db: Path | str, *, force: bool = False) -> Rebuilt:
    """Make the database anew from its record files, and put it in the old one's place in one step.

    Parameters
    ----------
    db : path
        The database; it may be corrupt, of another schema version, or missing.
    force : bool
        Go on although the old database holds runs that have no file (they stay in the ``.bak`` file only), or files
        cannot be read (they are left out and stay where they are).

    Raises
    ------
    InputError
        If there is neither a database nor a record file.
    DatabaseBusy, StoreError
        If the database is in use, would lose runs, a file cannot be read, or the disk refuses.
    """
    db = Path(db).absolute()
    folder = records.folder_of(db)
    if not db.exists() and not folder.exists():
        raise InputError(f"No database at {db} and no record files in {folder}: nothing to rebuild.")
    with database.locked(db):
        records.remove_leftovers(folder)
        paths = list(records.files(folder))
        if not force and (lost := _only_in_database(db, {path.stem for path in paths})):
            raise StoreError(
                f"{db} holds {len(lost)} runs or claims without a record file in {folder} (first: {lost[0]}): "
                "a rebuild would drop them. Bring the files back with `assay db merge`, or give --force; the old "
                "database is kept as .bak."
            )
        if not force and not paths and db.exists():
            _require_ours(db, folder)
        order = records.arrivals(folder)
        # Those from before the order was kept come first, by their names, which begin with their times.
        paths = sorted(unknown(paths, {}), key=lambda path: (order.get(path.stem, -1), path.stem))
        fresh = db.with_name(f".{db.name}.rebuild")
        database.discard(fresh)
        damaged: list[Path] = []
        unreadable: dict[Path, str] = {}
        try:
            counts = _fill(fresh, _readable(paths, damaged, unreadable))
            if unreadable and not force:
                raise StoreError(
                    f"{len(unreadable)} record files cannot be read, and a rebuild would drop their runs: "
                    f"{_some(list(unreadable.values()))} Upgrade Assay or get the right to read them; with --force "
                    "they are left out and stay where they are. The old database is unharmed."
                )
            aside = _keep_aside(db)
            database.put_in_place(fresh, db)
        except OSError as error:
            raise StoreError(
                f"{db}: the rebuild failed: {error.strerror or error}. The old database is unharmed."
            ) from error
        finally:
            database.discard(fresh)
        renamed = [records.set_aside(path) for path in damaged]
    return Rebuilt(*counts, tuple(renamed), aside, tuple(unreadable))


def _require_ours(db: Path, folder: Path) -> None:
    """Refuse to put an empty database in the place of a file that is not Assay's."""
    try:
        with database.reading(db):
            return
    except DatabaseBusy:
        raise
    except StoreError as error:
        raise StoreError(
            f"{error} There are no record files in {folder}: a rebuild would leave nothing. If that is what you want, "
            "give --force."
        ) from error


def _some(texts: Sequence[str]) -> str:
    more = f" ... and {len(texts) - _NAMED} more." if len(texts) > _NAMED else ""
    return " ".join(texts[:_NAMED]) + more


def _only_in_database(db: Path, stems: set[str]) -> list[str]:
    """Ids that an old database holds and no file does; a database that cannot be read has none to offer."""
    if not db.exists():
        return []
    try:
        with database.reading(db) as connection:
            found = connection.execute("SELECT run_id FROM records UNION ALL SELECT entry_id FROM claims").fetchall()
    except DatabaseBusy:
        raise
    except StoreError:
        return []
    return sorted({name for (name,) in found} - stems)


def _readable(paths: Iterable[Path], damaged: list[Path], unreadable: dict[Path, str]) -> Iterator[Stored]:
    for path in paths:
        try:
            yield records.read(path)
        except DamagedRecord:
            damaged.append(path)
        except StoreError as error:
            unreadable[path] = str(error)


def _fill(fresh: Path, stored: Iterable[Stored]) -> tuple[int, int]:
    import duckdb

    counts = {"record": 0, "claim": 0}
    try:
        connection = duckdb.connect(str(fresh), config=database.CONFIG)
        try:
            schema.create(connection)
            for batch in _batches(stored):
                connection.begin()
                insert_in_order(connection, batch, compare=False)
                connection.commit()
                for item in batch:
                    counts[item.kind] += 1
            connection.begin()
            comparisons.bring_up_to_date(connection)
            connection.commit()
            database.finish(connection, fresh)
        finally:
            connection.close()
    except duckdb.Error as error:
        raise StoreError(f"{fresh.parent}: the rebuild failed: {error}. The old database is unharmed.") from error
    return counts["record"], counts["claim"]


def _batches(stored: Iterable[Stored]) -> Iterator[list[Stored]]:
    batch: list[Stored] = []
    for item in stored:
        batch.append(item)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _keep_aside(db: Path) -> Path | None:
    """Keep the old database as ``.bak`` beside its place, which stays occupied until the new one is renamed into it."""
    if not db.exists():
        database.wal(db).unlink(missing_ok=True)
        return None
    aside = db.with_name(f"{db.name}.bak")
    database.discard(aside)
    try:
        os.link(db, aside)
    except OSError:  # a file system without hard links
        shutil.copy2(db, aside)
    # The old log must not be replayed onto the new file; were we killed here, `Store.sync` would take up its runs.
    if database.wal(db).exists():
        database.wal(db).rename(database.wal(aside))
    return aside


def export(db: Path | str, folder: Path | str) -> dict[str, int]:
    """Write every table and view as Parquet, the record files, and a README of the schema.

    Parameters
    ----------
    db : path
        The database.
    folder : path
        A new or empty folder, or one that an earlier export made (it is brought up to date).

    Returns
    -------
    dict of str to int
        Rows per table, and ``"files"``.

    Raises
    ------
    InputError
        If there is no database, or the folder holds other things.
    DatabaseBusy, StoreError
        If the database or the disk refuses.
    """
    import pyarrow.parquet as parquet

    db, folder = Path(db).absolute(), Path(folder).absolute()
    counts: dict[str, int] = {}
    with database.reading(db) as connection:
        try:
            if folder.exists() and any(folder.iterdir()) and not (folder / "schema_version.parquet").exists():
                raise InputError(f"{folder} is not empty and not an earlier export: give a new folder.")
            folder.mkdir(parents=True, exist_ok=True)
            for name in schema.documented():
                found = connection.sql(f"SELECT * FROM {name}").to_arrow_table()  # noqa: S608  (ours)
                with output.replacing(folder / f"{name}.parquet") as stream:
                    parquet.write_table(found, stream, compression="zstd")
                counts[name] = found.num_rows
            counts["files"] = 0
            for path in records.files(records.folder_of(db)):
                records.write(folder / "records", records.read(path))
                counts["files"] += 1
            with output.replacing(folder / "README.md") as stream:
                stream.write(schema.readme().encode())
        except OSError as error:
            raise StoreError(f"{folder}: cannot be written: {error.strerror or error}.") from error
    return counts


def merge(db: Path | str, source: Path | str) -> int:
    """Take up record files of another place or machine; any order and any number of times give the same result.

    What comes in is marked with where it came from, and never answers a cell of this machine. Everything is checked
    before the first byte is written, and it comes in all at once or not at all.

    Parameters
    ----------
    db : path
        The database that grows; it is created where missing.
    source : path
        A folder of record files (an export, or an ``*.records`` folder), or a database that has its folder beside it.

    Returns
    -------
    int
        How many were new.

    Raises
    ------
    InputError
        If the source has no record files, one is damaged, or one has an id that is here with another content;
        then nothing was changed.
    DatabaseBusy, StoreError
        If the database or the disk refuses.
    """
    import duckdb

    db, source = Path(db).absolute(), Path(source).absolute()
    folder, target = source if source.is_dir() else records.folder_of(source), records.folder_of(db)
    paths = _sources(folder)
    if not paths:
        raise InputError(
            f"{source}: no record files in {folder}. Give an export folder, or a database with its *.records folder."
        )
    with database.locked(db):
        records.remove_leftovers(target)
        # The database is asked first: one that refuses must not be found out about after the files are written.
        known = _known_in(db)
        here = {path.stem: path for path in records.files(target)}
        with Staging(target, str(source)) as staging:
            fresh = _staged(paths, staging, here, known)
            if not fresh:
                return 0
            with database.writing(db, have_lock=True) as connection:
                connection.begin()
                try:
                    for batch in _batches(map(staging.read, fresh)):
                        insert_in_order(connection, batch, compare=False)
                    comparisons.bring_up_to_date(connection)
                    staging.commit()
                except BaseException:
                    connection.rollback()
                    raise
                try:
                    connection.commit()
                except duckdb.Error:
                    staging.undo()
                    raise
    return len(fresh)


def _sources(folder: Path) -> list[Path]:
    """The files of a source that end in ``.json``, in any depth."""
    found: list[Path] = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(place, name) for name in sorted(names) if name.endswith(".json") and not name.startswith(".")]
        if len(found) > _MAX_FILES:
            raise InputError(f"{folder}: more than {_MAX_FILES:,} files; merge it in parts.")
    return found


def _known_in(db: Path) -> dict[str, str]:
    if not os.path.lexists(db):
        return {}
    with database.reading(db) as connection:
        return known_ids(connection)


def _staged(paths: Sequence[Path], staging: Staging, here: Mapping[str, Path], known: Mapping[str, str]) -> list[str]:
    """Check every file of a source, and write those that are new beside the others; return their ids.

    Raises
    ------
    InputError
        Naming what is wrong; nothing may be merged then.
    """
    seen: dict[str, str] = {}
    fresh: list[str] = []
    problems: list[str] = []
    for path in paths:
        try:
            stored = records.parse(records.content(path), path)
            problem = _arrival_problem(stored, here, known, seen)
        except StoreError as error:
            problems.append(str(error))
            continue
        if problem:
            problems.append(f"{path}: {problem}.")
        elif stored.id not in seen and stored.id not in here and not problems:
            staging.add(stored)
            fresh.append(stored.id)
        seen[stored.id] = stored.sha256
    if problems:
        count = f"{len(problems)} of {len(paths)} files: " if len(problems) > 1 else ""
        raise InputError(f"{count}{_some(problems)} Nothing was merged.")
    return fresh


def _arrival_problem(
    stored: Stored, here: Mapping[str, Path], known: Mapping[str, str], seen: Mapping[str, str]
) -> str | None:
    if stored.id in seen and seen[stored.id] != stored.sha256:
        return f"{stored.id} occurs twice with different content"
    if stored.id in here:
        if records.read(here[stored.id]).sha256 != stored.sha256:
            return f"{stored.id} is here with another content"
    elif known.get(stored.id, stored.sha256) != stored.sha256:
        return f"{stored.id} is in the database with another content"
    if not limits.moment(str(stored.value["created_at"])) <= datetime.now(UTC) + timedelta(days=1):
        return f"created_at {stored.value['created_at']} lies in the future: one of the two clocks is wrong"
    return None


def check(db: Path | str) -> list[str]:
    """Compare files, hashes and rows with one another.

    Returns
    -------
    list of str
        One sentence a problem, with its remedy; empty if all is well.

    Raises
    ------
    InputError
        If there is no database.
    DatabaseBusy, StoreError
        If it is held by another process for too long, or cannot be read.
    """
    import duckdb

    db = Path(db).absolute()
    problems: list[str] = []
    with database.reading(db) as connection:
        try:
            rows = known_ids(connection)
            for path in records.files(records.folder_of(db)):
                known = rows.pop(path.stem, None)
                try:
                    stored = records.read(path)
                except StoreError as error:
                    problems.append(str(error))
                    continue
                if known is None:
                    problems.append(
                        f"{path} is not in the database: the next `assay run` or `assay db rebuild` takes it up."
                    )
                elif known != stored.sha256:
                    problems.append(
                        f"{stored.id}: the database has another content than {path}. `assay db rebuild` restores it."
                    )
                else:
                    problems += _row_problems(connection, stored)
            problems += [f"{name} is in the database, but its record file is missing." for name in sorted(rows)]
            problems += _reference_problems(connection)
        except duckdb.Error as error:
            first = str(error).partition("\n")[0]
            problems.append(f"{db} cannot be read through: {first}. `assay db rebuild` makes it anew.")
    return problems


def _row_problems(connection: Any, stored: Stored) -> list[str]:
    """Where the rows of one record differ from what its file gives."""
    if stored.kind == "claim":
        expected, table, key = ingest.claim_row(stored), "claims", "entry_id"
    else:
        expected, table, key = ingest.record_row(stored), "records", "run_id"
    # The order of arrival is not in the file.
    names = [name for name in expected if name != "arrived_at"]
    select = f"SELECT {', '.join(names)} FROM {table} WHERE {key} = ?"  # noqa: S608  (names are ours)
    (found,) = connection.execute(select, [stored.id]).fetchall()
    problems = [name for name, value in zip(names, found, strict=True) if value != expected[name]]
    if stored.kind == "record":
        problems += _sample_problems(connection, stored)
    return [f"{stored.id}: {name} differs from the record file. `assay db rebuild` restores it." for name in problems]


def _sample_problems(connection: Any, stored: Stored) -> list[str]:
    """The tables whose rows of one record differ from what its file gives."""
    problems = []
    timed = connection.execute(
        "SELECT phase, list(ns ORDER BY i), list(i ORDER BY i) FROM latency_samples WHERE run_id = ? GROUP BY phase",
        [stored.id],
    ).fetchall()
    wanted = {phase: list(ns) for phase, ns in ingest.latency_samples(stored).items() if ns}
    if {phase: ns for phase, ns, _ in timed} != wanted or any(i != list(range(len(ns))) for _, ns, i in timed):
        problems.append("latency_samples")
    for name, expected in ingest.measured_rows(stored).items():
        columns = list(expected[0]) if expected else ["run_id"]
        order = "".join(f", {key}" for key in ("i", "part") if key in columns)
        query = f"SELECT {', '.join(columns)} FROM {name} WHERE run_id = ? ORDER BY run_id{order}"  # noqa: S608  (ours)
        found = [dict(zip(columns, row, strict=True)) for row in connection.execute(query, [stored.id]).fetchall()]
        if found != sorted(expected, key=lambda row: (row.get("i", 0), row.get("part", ""))):
            problems.append(name)
    return problems


def _reference_problems(connection: Any) -> list[str]:
    problems = []
    # Every table that has a run's rows, whatever the schema will have.
    of_runs = [name for name in schema.tables() if "run_id" in schema.documented()[name].columns and name != "records"]
    for table in of_runs:
        query = f"SELECT DISTINCT run_id FROM {table} ANTI JOIN records USING (run_id)"  # noqa: S608  (ours)
        problems += [
            f"{table}: rows of {name}, which is not in records." for (name,) in connection.execute(query).fetchall()
        ]
    queries = {
        "machine {0} of a record is not in machines.": """
            SELECT DISTINCT machine_id FROM records ANTI JOIN machines USING (machine_id) WHERE machine_id IS NOT NULL
        """,
        "claim {0} rests on run {1}, which is not in records.": """
            SELECT entry_id, run_id FROM (SELECT entry_id, unnest(run_ids) AS run_id FROM claims)
            ANTI JOIN records USING (run_id)
        """,
        "artifact {0} is recorded with different sizes.": """
            SELECT sha256 FROM artifacts GROUP BY sha256 HAVING count(DISTINCT size_bytes) > 1
        """,
    }
    for text, query in queries.items():
        problems += [text.format(*row) for row in connection.execute(query).fetchall()]
    return problems
