"""Runs a spec's cells one after another and hands each record to the store.

The parent process stays light: training and building happen in one long-lived worker, every measurement in a fresh
one. Cells that the database already has are kept. Two sweeps on one machine take turns cell by cell, since timings
taken at the same time would disturb each other.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from harness import cache, environment, locks, paths, registry, usercode
from harness.canonical import digest
from harness.contracts import Store
from harness.errors import InputError, StoreError
from harness.executor import JobError, Worker
from harness.filters import Filter
from harness.jobs import Item, MeasureJob, Prepared, PrepareJob
from harness.planning import Planned as Planned
from harness.planning import plan as plan
from harness.record import Record, new_run_id
from harness.spec import Cell, Spec, label, users_targets

DEFAULT_TIMEOUT_S = 7200.0


@dataclass(frozen=True)
class Event:
    """What a watcher of a sweep is told.

    Parameters
    ----------
    kind : {"start", "progress", "done", "kept", "waiting"}
    index, total : int
        The cell's place in the sweep.
    cell : Cell
    fraction : float
        Of this cell.
    message : str
    record : Record or None
        With "done".
    """

    kind: Literal["start", "progress", "done", "kept", "waiting"]
    index: int
    total: int
    cell: Cell
    fraction: float = 0.0
    message: str = ""
    record: Record | None = None


@dataclass(frozen=True)
class Outcome:
    """What a sweep came to.

    Parameters
    ----------
    planned : sequence of Planned
        All cells that were asked for.
    records : sequence of Record
        Those that ran now.
    kept : mapping
        Cell hash to the ``runs`` row of cells that needed no run.
    run_ids : mapping
        Planned cell hash to the run that answers it, new or kept.
    interrupted : bool
        Stopped by Ctrl-C or SIGTERM; the same command goes on from here.
    """

    planned: Sequence[Planned]
    records: Sequence[Record]
    kept: Mapping[str, Mapping[str, Any]]
    run_ids: Mapping[str, str]
    interrupted: bool = False

    @property
    def exit_code(self) -> int:
        """0 if no cell failed, 1 if some did, 130 if interrupted."""
        if self.interrupted:
            return 130
        return int(any(record.status in ("failed", "timeout") for record in self.records))


def open_store(db: Path | None = None) -> Store:
    """The store of a database file (default :func:`harness.paths.default_db`)."""
    store: Store = registry.resolve("store", "duckdb")(db or paths.default_db())
    return store


def _ignore(event: Event) -> None:
    """Nobody watches."""


def sweep(
    spec: Spec,
    *,
    db: Path | None = None,
    only: Filter | None = None,
    rerun: bool = False,
    timeout: float = DEFAULT_TIMEOUT_S,
    watch: Callable[[Event], None] = _ignore,
) -> Outcome:
    """Run all cells of a spec that the database does not have yet.

    Parameters
    ----------
    spec : Spec
    db : Path or None
        The database; default :func:`harness.paths.default_db`.
    only : Filter or None
        Run only the cells that it accepts.
    rerun : bool
        Compress, build and measure again what is there already (a second record per cell). Trained baselines are kept.
    timeout : float
        Seconds that preparing a cell, and measuring it, may each take.
    watch : callable
        Receives every :class:`Event`.

    Raises
    ------
    InputError, StoreError
        Before anything has run, or when the store can no longer take records.
    """
    planned = plan(spec, only)
    for folder in {paths.home(), (db or paths.default_db()).absolute().parent}:
        _check_writable(folder)
    store = open_store(db)
    store.sync()
    cache.remove_leftovers(paths.cache())
    began = time.time() if rerun else 0.0
    kept = {} if rerun else dict(store.finished([item.cell_hash for item in planned if item.complete]))
    run_ids = {cell_hash: str(row["run_id"]) for cell_hash, row in kept.items()}
    records: list[Record] = []
    preparing = PrepareWorker(_users_packages(planned))

    def finished(cell_hash: str) -> Mapping[str, Any] | None:
        return None if rerun else store.finished([cell_hash]).get(cell_hash)

    interrupted = False
    try:
        with _signals_as_interrupt():
            for index, item in enumerate(planned):
                report = _reporter(watch, index, len(planned), item.cell)
                if item.cell_hash in kept:
                    report("kept", 1.0, "already in the database", None)
                    continue
                with measuring_lock(functools.partial(_tell_waiting, report), timeout):
                    report("start", 0.0, label(item.cell.chain), None)
                    # Another sweep may have run this very cell while we waited.
                    row = finished(item.cell_hash) if item.complete else None
                    outcome = row or _run_cell(item, preparing, began, timeout, report, finished)
                    if isinstance(outcome, Record):
                        store.add(outcome.to_json())
                if isinstance(outcome, Record):
                    records.append(outcome)
                    run_ids[item.cell_hash] = outcome.run_id
                    report("done", 1.0, outcome.reason or "", outcome)
                    interrupted = outcome.status == "interrupted"
                else:
                    kept[item.cell_hash] = outcome
                    run_ids[item.cell_hash] = str(outcome["run_id"])
                    report("kept", 1.0, "already in the database", None)
                if interrupted:
                    break
    except KeyboardInterrupt:
        interrupted = True
    finally:
        preparing.close()
    return Outcome(planned, records, kept, run_ids, interrupted)


def _check_writable(folder: Path) -> None:
    """Refuse before the work what would be refused after it.

    Raises
    ------
    StoreError
        If no file can be made in the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(b"x" * 4096)
            probe.flush()
    except OSError as error:
        raise StoreError(
            f"{folder} cannot be written: {error.strerror}. "
            "Make room there, or choose another place with ASSAY_HOME and --db."
        ) from None


Report = Callable[[Any, float, str, Record | None], None]


def _reporter(watch: Callable[[Event], None], index: int, total: int, cell: Cell) -> Report:
    def report(kind: Any, fraction: float, message: str, record: Record | None) -> None:
        watch(Event(kind, index, total, cell, fraction, message, record))

    return report


def _users_packages(planned: Sequence[Planned]) -> list[str]:
    """Top-level packages of what the spec names as ``module:name``: the user asked for their code to run."""
    names: set[str] = set()
    for item in planned:
        for table in (item.cell.task, item.cell.hardware, *item.cell.chain):
            names |= set(users_targets(table))
    return sorted(map(usercode.package, names))


class PrepareWorker:
    """The long-lived process that trains, compresses and builds; started anew after a crash."""

    def __init__(self, trusted: Sequence[str]) -> None:
        self.trusted = trusted
        self._worker: Worker | None = None

    def run(self, job: PrepareJob, timeout: float, progress: Callable[[float, str], None]) -> Prepared:
        """Prepare one cell; see :func:`harness.prepare.prepare`."""
        if self._worker is None or not self._worker.alive:
            self.close()
            self._worker = Worker(environment.cores(), self.trusted, passive_wait=True)
        return self._worker.run(job, timeout=timeout, progress=progress)

    def close(self) -> None:
        """End the process."""
        if self._worker is not None:
            self._worker.__exit__()
            self._worker = None


def _run_cell(
    item: Planned,
    preparing: PrepareWorker,
    not_before: float,
    timeout: float,
    report: Report,
    finished: Callable[[str], Mapping[str, Any] | None],
) -> Record | Mapping[str, Any]:
    """Prepare and measure a cell.

    Where the prepared model shows that this cell was measured before, its row of ``runs`` is returned instead.
    """
    cell = item.cell
    record = Record(
        run_id=new_run_id(),
        created_at=datetime.now(UTC).isoformat(),
        status="ok",
        task=cell.task_name,
        method=cell.method,
        hardware=cell.hardware["name"],
        task_config=_without_name(cell.task),
        chain=cell.chain,
        hardware_config=_without_name(cell.hardware),
        seed=cell.seed,
        batch_size=cell.batch_size,
        threads=cell.threads,
        settings={"measure": cell.measure, "energy": cell.energy},
        cell_hash=item.cell_hash,
        **item.provenance,
    )
    try:
        prepared = preparing.run(
            PrepareJob(cell=cell, not_before=not_before),
            timeout,
            lambda fraction, message: report("progress", 0.5 * fraction, message, None),
        )
        # What was built is known and true, even if it does not run.
        record = replace(record, **prepared.record)
        if not item.complete:
            record = replace(record, cell_hash=digest([item.cell_hash, prepared.identity]))
            if row := finished(record.cell_hash):
                return row
        return _measure(record, cell, preparing, prepared, timeout, report)
    except JobError as error:
        return _ended(record, error.status, error.reason, error.traceback)
    except KeyboardInterrupt:
        return _ended(record, "interrupted", "stopped by the user (Ctrl-C or SIGTERM)", None)


def _measure(
    record: Record,
    cell: Cell,
    preparing: PrepareWorker,
    prepared: Prepared,
    timeout: float,
    report: Report,
) -> Record:
    job = MeasureJob(
        hardware=Item.of(cell.hardware),
        threads=cell.threads,
        batch_size=cell.batch_size,
        measure=cell.measure,
        energy=cell.energy,
        deployment=prepared.deployment,
    )
    with Worker(cell.threads, [*preparing.trusted, *prepared.trusted]) as worker:
        measured = worker.run(
            job,
            timeout=timeout,
            progress=lambda fraction, message: report("progress", 0.5 + 0.5 * fraction, message, None),
        )
    warnings = [*record.warnings, *measured.warnings]
    if why := measured.effective.get("precision_reason"):
        warnings.append(f"precision {measured.precision}: {why}")
    if record.random_in_evaluation:
        warnings.append(
            "The model is random in evaluation: two calls on equal inputs give different outputs, so its scores are "
            "not compared. Dropout that ignores evaluation mode (F.dropout without training=self.training), noise that "
            "forward adds and counters that it keeps do that."
        )
    fields = {field.name: getattr(measured, field.name) for field in dataclasses.fields(measured)}
    return replace(record, **fields | {"reasons": {**record.reasons, **measured.reasons}, "warnings": warnings})


def _ended(record: Record, status: Any, reason: str, traceback: str | None) -> Record:
    missing = [name for name in ("latency", "scores", "load_ms") if not getattr(record, name)]
    return replace(
        record,
        status=status,
        reason=reason,
        traceback=traceback,
        reasons={**record.reasons, **dict.fromkeys(missing, f"{status}: {reason}")},
    )


def _without_name(item: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in item.items() if key != "name"}


def _tell_waiting(report: Report, holder: str) -> None:
    report("waiting", 0.0, f"{holder} is measuring", None)


@contextmanager
def measuring_lock(waiting: Callable[[str], None], timeout: float) -> Iterator[None]:
    """Hold this user's measuring lock on this machine: one cell at a time, whatever the database or ``ASSAY_HOME``.

    Parameters
    ----------
    waiting : callable
        Told once who holds it, before the first wait.
    timeout : float
        Of a step, in seconds. A cell takes two steps, so that whoever holds the lock for longer than twice this has no
        cell to measure.

    Raises
    ------
    StoreError
        If another process holds it for longer, or the lock file cannot be opened.
    """
    user = os.getuid() if hasattr(os, "getuid") else "user"
    path = Path(tempfile.gettempdir()) / f"assay-measuring-{user}.lock"
    with ExitStack() as held:
        try:
            held.enter_context(locks.hold(path, 2 * timeout, waiting=waiting))
        except locks.LockTimeout as error:
            raise StoreError(
                f"{error} has held the measuring lock {path} for more than {2 * timeout:g} s. "
                "End it, or wait for longer with --timeout."
            ) from None
        except OSError as error:
            raise StoreError(
                f"The measuring lock {path} cannot be opened: {error.strerror}. Remove it, or set TMPDIR to a folder "
                "of your own."
            ) from None
        yield


@contextmanager
def _signals_as_interrupt() -> Iterator[None]:
    """SIGTERM ends a sweep as Ctrl-C does: with an ``interrupted`` record and no orphans."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def run(spec: Spec, *, db: Path | None = None, rerun: bool = False, timeout: float = DEFAULT_TIMEOUT_S) -> Record:
    """Run a spec of exactly one cell and return its record.

    Parameters
    ----------
    spec : Spec
    db : Path or None
        The database; default :func:`harness.paths.default_db`.
    rerun : bool
        Measure again even if the database has this cell.
    timeout : float
        Seconds that preparing and measuring may each take.

    Returns
    -------
    Record
        Of this run; of the earlier one where the cell was there already.

    Raises
    ------
    InputError
        If the spec has more than one cell (see :func:`sweep`), or cannot be run.

    Examples
    --------
    >>> import harness
    >>> record = harness.run(harness.Spec(task="digits-cnn"))  # doctest: +SKIP
    >>> record.status  # doctest: +SKIP
    'ok'
    """
    count = len(spec.cells())
    if count != 1:
        raise InputError(f"This spec has {count} cells and run() takes one. Use harness.sweep(spec) for a grid.")
    outcome = sweep(spec, db=db, rerun=rerun, timeout=timeout)
    if outcome.records:
        return outcome.records[0]
    if outcome.interrupted:
        raise KeyboardInterrupt
    (row,) = outcome.kept.values()
    return Record.from_json(open_store(db).record(row["run_id"]))
