"""Runs a spec's cells one after another and hands each record to the store.

The parent process stays light: training and building happen in one long-lived worker, every measurement in a fresh
one. Cells
that the database already has are kept. Two sweeps on one machine take turns cell by cell, since timings taken at the
same time would disturb each other.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from harness import cache, environment, paths, registry
from harness.canonical import digest
from harness.contracts import Store, Task
from harness.errors import InputError, StoreError, Unavailable
from harness.executor import JobError, Worker
from harness.filters import Filter
from harness.measure.size import codec_source
from harness.prepare import code_hash
from harness.provenance import git_state, source_hash, versions
from harness.record import Record, new_run_id
from harness.spec import Cell, Spec, build, label

DEFAULT_TIMEOUT_S = 7200.0
_CORE_PACKAGES = ("assay-bench", "torch", "torchvision", "numpy", "onnx", "onnx-ir", "onnxscript", "zstandard")


@dataclass(frozen=True)
class Planned:
    """A cell with its identity.

    Parameters
    ----------
    cell : Cell
    cell_hash : str
        Hash of everything that goes into the result: the cell, code, data, package versions, machine.
    provenance : mapping
        Fields of :class:`harness.record.Record` that are known before the run.
    complete : bool
        False for a task that brings its weights (the user's own, torchvision's, a checkpoint): only the prepared model
        tells what is measured, and the final hash is made from it.
    """

    cell: Cell
    cell_hash: str
    provenance: Mapping[str, Any]
    complete: bool = True


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


def plan(spec: Spec, only: Filter | None = None) -> list[Planned]:
    """The spec's cells with their identities.

    Sources are hashed anew, so that edits between two sweeps of one process are seen.

    Raises
    ------
    InputError
        For anything in the spec that cannot be run, or data that is damaged.
    """
    source_hash.cache_clear()
    spec_hash = spec.hash()
    commit, dirty = git_state()
    machine = environment.machine()
    planned = []
    tasks: dict[str, tuple[str | None, bool]] = {}
    for cell in spec.cells():
        if only and not only.accepts(cell.row()):
            continue
        hardware = build("hardware", cell.hardware)
        packages = versions([*_CORE_PACKAGES, *hardware.packages])
        hashes = {
            "task_hash": code_hash("task", cell.task),
            "method_hash": digest([code_hash("method", step) for step in cell.chain]),
            "hardware_hash": code_hash("hardware", cell.hardware),
        }
        name = digest(cell.task)
        if name not in tasks:
            tasks[name] = _known_data(cell)
        data, complete = tasks[name]
        identity = {
            "cell": cell.to_json(),
            **hashes,
            "core": source_hash("harness.measure.run", "harness.prepare", "harness.training"),
            "storage": codec_source(),
            "data": data,
            "packages": packages,
            "machine": machine["machine_id"],
        }
        provenance = {
            **hashes,
            "spec_name": spec.name,
            "spec_hash": spec_hash,
            "git_commit": commit,
            "git_dirty": dirty,
            "packages": packages,
            "machine": machine,
            "dataset_hash": data,
        }
        planned.append(Planned(cell, digest(identity), provenance, complete))
    if not planned:
        raise InputError(
            f"No cell of {spec.name!r} is left to run: --only accepts none. See `assay run {spec.name} --dry-run`."
        )
    return planned


def _known_data(cell: Cell) -> tuple[str | None, bool]:
    """Hash of the cell's data set as far as it is known before the run, and whether the cell's identity is complete."""
    # A user's own task runs the user's code: that happens in the worker only.
    if ":" in cell.task["name"]:
        return None, False
    task: Task = build("task", cell.task)
    if task.recipe() is None:
        return None, False
    try:
        return task.dataset_hash(), True
    except Unavailable:
        return None, False


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
    forge = _Forge(_users_packages(planned))

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
                with _turn(lambda report=report: report("waiting", 0.0, "another sweep is measuring", None)):  # type: ignore[misc]
                    report("start", 0.0, label(item.cell.chain), None)
                    # Another sweep may have run this very cell while we waited.
                    row = finished(item.cell_hash) if item.complete else None
                    outcome = row or _run_cell(item, forge, began, timeout, report, finished)
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
        forge.close()
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
    names = [item.cell.task["name"] for item in planned]
    names += [step["name"] for item in planned for step in item.cell.chain]
    return sorted({name.partition(":")[0].partition(".")[0] for name in names if ":" in name})


class _Forge:
    """The long-lived worker that trains, compresses and builds; started anew after a crash."""

    def __init__(self, trusted: Sequence[str]) -> None:
        self.trusted = trusted
        self._worker: Worker | None = None

    def run(self, job: Mapping[str, Any], timeout: float, progress: Callable[[float, str], None]) -> dict[str, Any]:
        if self._worker is None or not self._worker.alive:
            self.close()
            self._worker = Worker(environment.cores(), self.trusted, patient=True)
        return self._worker.run(job, timeout=timeout, progress=progress)

    def close(self) -> None:
        if self._worker is not None:
            self._worker.__exit__()
            self._worker = None


def _run_cell(
    item: Planned,
    forge: _Forge,
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
        task=cell.task["name"],
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
        prepared = forge.run(
            {"op": "prepare", "cell": cell.to_json(), "not_before": not_before},
            timeout,
            lambda fraction, message: report("progress", 0.5 * fraction, message, None),
        )
        # What was built is known and true, even if it does not run.
        record = replace(record, **prepared["record"])
        if not item.complete:
            record = replace(record, cell_hash=digest([item.cell_hash, prepared["identity"]]))
            if row := finished(record.cell_hash):
                return row
        return _measure(record, cell, forge, prepared, timeout, report)
    except JobError as error:
        return _ended(record, error.status, error.reason, error.traceback)
    except KeyboardInterrupt:
        return _ended(record, "interrupted", "stopped by the user (Ctrl-C or SIGTERM)", None)


def _measure(
    record: Record, cell: Cell, forge: _Forge, prepared: Mapping[str, Any], timeout: float, report: Report
) -> Record:
    with Worker(cell.threads, [*forge.trusted, *prepared["trusted"]]) as worker:
        measured = worker.run(
            {
                "op": "measure",
                "hardware": cell.hardware,
                "threads": cell.threads,
                "batch_size": cell.batch_size,
                "measure": cell.measure,
                "energy": cell.energy,
                **{key: prepared[key] for key in ("artifact", "reference", "reference_data", "test")},
            },
            timeout=timeout,
            progress=lambda fraction, message: report("progress", 0.5 + 0.5 * fraction, message, None),
        )
    reasons = {**record.reasons, **measured.pop("reasons")}
    effective = measured.pop("effective") | ({"scheme": prepared["scheme"]} if prepared["scheme"] else {})
    if why := effective.get("precision_reason"):
        measured["warnings"].append(f"precision {measured['precision']}: {why}")
    return replace(record, **measured, effective=effective, reasons=reasons)


def _ended(record: Record, status: Any, reason: str, traceback: str | None) -> Record:
    missing = [name for name in ("latency_ns", "predictions", "load_ms", "fidelity") if not getattr(record, name)]
    return replace(
        record,
        status=status,
        reason=reason,
        traceback=traceback,
        reasons={**record.reasons, **dict.fromkeys(missing, f"{status}: {reason}")},
    )


def _without_name(item: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in item.items() if key != "name"}


@contextmanager
def _turn(waiting: Callable[[], None]) -> Iterator[None]:
    """Hold this user's measuring lock on this machine: one cell at a time, whatever the database or ``ASSAY_HOME``."""
    from filelock import FileLock, Timeout

    user = os.getuid() if hasattr(os, "getuid") else "user"
    lock = FileLock(Path(tempfile.gettempdir()) / f"assay-measuring-{user}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        waiting()
        lock.acquire(poll_interval=0.1)
    try:
        yield
    finally:
        lock.release()


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
