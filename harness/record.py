"""The record of one cell: everything that was asked, done and measured, raw values first.

A record is a JSON object written once to ``<run_id>.json`` and never changed. Ratios, percentiles and intervals are not
in it: they are computed from it (``results/schema.sql``). A value that was not measured is None, and ``reasons`` says
why
under the same name.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

SCHEMA_VERSION = 1

Status = Literal["ok", "unsupported", "unavailable", "failed", "timeout", "interrupted"]
STATUSES: tuple[Status, ...] = ("ok", "unsupported", "unavailable", "failed", "timeout", "interrupted")


@dataclass(frozen=True, kw_only=True)
class Record:
    """One run of one cell. Times are UTC; sizes are bytes; fields ending in ``_hash``/``sha256`` are hex sha256.

    Parameters
    ----------
    run_id : str
        Sortable by creation time, unique.
    created_at : str
        ISO 8601, UTC.
    status : str
        One of :data:`STATUSES`.
    reason : str or None
        Why the status is not "ok", in one or two sentences.
    traceback : str or None
        Of an exception that nobody expected.
    task, method, hardware : str
        Registered names; ``method`` joins a chain's names with " > ".
    task_config, hardware_config : mapping
        Resolved parameters, defaults included.
    chain : sequence of mapping
        One ``{"name": ..., **parameters}`` per step; the baseline is ``[{"name": "baseline"}]``.
    seed, batch_size, threads : int
        The rest of the cell's coordinates.
    settings : mapping
        The resolved ``measure`` and ``energy`` settings.
    spec_name, spec_hash : str
        The spec that asked for it: its name, and the hash of its resolved form.
    cell_hash : str
        Identity of the cell: everything that goes into its result, sources, package versions and machine included.
    task_hash, method_hash, hardware_hash : str
        Of the source code (docstrings and comments excluded) with parameters.
    dataset_hash : str or None
        Of the decompressed data.
    git_commit, git_dirty
        Of Assay's checkout; None where it is not one.
    packages : mapping
        Distribution name to version.
    machine : mapping
        ``machine_id``, ``hostname``, ``cpu_model``, ``isa`` (list), ``cores``, ``memory_bytes``,
        ``governor``, ``os``, ``gpus`` (list).
    conditions : mapping
        What varies on one machine: ``load_average_1m`` before and after, ``clock_mhz``.
    effective : mapping
        What the runtime said of itself (see :class:`harness.contracts.Deployed`), and ``scheme``, the
        quantization scheme used.
    precision : str or None
        ``effective["precision"]``.
    artifact : mapping or None
        ``sha256``, ``size_bytes`` (as deployed), ``zstd_bytes`` (level 19), ``files`` (relative names), ``format``.
    weights : mapping or None
        Of the compressed model's state dict, in bytes: ``plain_bytes``, ``container_bytes``, ``shannon_bytes``,
        ``zstd_bytes``, ``xz_bytes``, ``gzip_bytes`` (see :func:`harness.measure.size.weigh_weights`).
    params_original, params_total, params_nonzero : int or None
        Parameters before compression; after it; of those, not zero.
    macs : int or None
        Multiply-accumulates of one example (not FLOPs, which are twice as many).
    n_examples, n_correct : int or None
        Of the test set.
    labels, predictions : sequence of int, or None
        By example id 0..n-1.
    latency_ns : sequence of int
        Every timed query at ``batch_size``, in order.
    warmup_queries : int or None
        Untimed queries before them.
    load_ms, first_ms : float or None
        Loading the artifact; the first inference after it.
    peak_rss_bytes : int or None
        High-water mark of the measuring process, runtime and one batch included.
    energy : sequence of mapping
        :class:`harness.contracts.EnergyReading` as dictionaries, plus ``grid_g_per_kwh``.
    fidelity : mapping or None
        ``max_abs``, ``top1``, ``mean_kl``, ``n``: deployed outputs against the torch model's on validation examples
        (random inputs where a task has no data: ``data`` says which).
    stages : sequence of mapping
        What the baseline and each chain step reported: ``name``, ``seconds``, ``cached``, ``params_nonzero``, and the
        bytes of ``weights``.
    reasons : mapping
        Column name to why it is NULL.
    warnings : sequence of str
        What may have spoilt a number, with the remedy.
    """

    run_id: str
    created_at: str
    status: Status
    task: str
    method: str
    hardware: str
    task_config: Mapping[str, Any]
    chain: Sequence[Mapping[str, Any]]
    hardware_config: Mapping[str, Any]
    seed: int
    batch_size: int
    threads: int
    settings: Mapping[str, Any]
    spec_name: str
    spec_hash: str
    cell_hash: str
    task_hash: str
    method_hash: str
    hardware_hash: str
    dataset_hash: str | None = None
    reason: str | None = None
    traceback: str | None = None
    git_commit: str | None = None
    git_dirty: bool | None = None
    packages: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, Any] = field(default_factory=dict)
    conditions: Mapping[str, Any] = field(default_factory=dict)
    effective: Mapping[str, Any] = field(default_factory=dict)
    precision: str | None = None
    artifact: Mapping[str, Any] | None = None
    weights: Mapping[str, int | None] | None = None
    params_original: int | None = None
    params_total: int | None = None
    params_nonzero: int | None = None
    macs: int | None = None
    n_examples: int | None = None
    n_correct: int | None = None
    labels: Sequence[int] | None = None
    predictions: Sequence[int] | None = None
    latency_ns: Sequence[int] = ()
    warmup_queries: int | None = None
    load_ms: float | None = None
    first_ms: float | None = None
    peak_rss_bytes: int | None = None
    energy: Sequence[Mapping[str, Any]] = ()
    fidelity: Mapping[str, Any] | None = None
    stages: Sequence[Mapping[str, Any]] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    schema: int = SCHEMA_VERSION

    def to_json(self) -> dict[str, Any]:
        """The record as the JSON object that is stored."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Record:
        """The record of a stored JSON object."""
        return cls(**value)


def new_run_id(now: datetime | None = None) -> str:
    """A fresh id: UTC time to the microsecond and 40 random bits."""
    moment = now or datetime.now(UTC)
    return f"{moment:%Y%m%dT%H%M%S%f}-{secrets.token_hex(5)}"
