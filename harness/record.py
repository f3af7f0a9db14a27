"""The record of one cell: everything that was asked, done and measured, raw values first.

A record is a JSON object written once to ``<run_id>.json`` and never changed. Ratios, percentiles and intervals are not
in it: they are computed when it is taken up into the database. A value that was not measured is None, and ``reasons``
says why under the same name.

Records of an older format are read through :func:`upgrade`; their files stay as they are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

from harness.canonical import dumps

SCHEMA_VERSION = 2
"""Version of the record format."""

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
    original_sha256 : str or None
        Of the stored model before compression: runs are compared only where it is equal.
    signature : mapping or None
        :class:`harness.contracts.Signature` as a dictionary.
    workload : mapping or None
        :class:`harness.contracts.Workload` as a dictionary: what one timed query is.
    scores : sequence of mapping
        What the deployed outputs are worth, one entry a metric and comparison: ``metric`` (the name that is shown),
        ``config`` (its registered name and parameters), ``unit``, ``better``, ``proportion``, ``data`` ("test",
        "validation", "train" or "random"), ``against`` ("targets"; "torch", the model's own outputs in torch; "float",
        those of the model before it was quantized), ``split_sha256`` (of the examples), ``n``, ``parts`` (part name to
        one number an example; empty where only the value is kept) and ``value``. The first entry against targets is
        the task's metric.
    latency : mapping
        Phase name to the nanoseconds of every timed call at ``batch_size``, in order: ``{"forward": [...]}``.
    layers : sequence of mapping
        What happened to each layer: ``name``, ``kind``, ``shape``, ``parameters``, ``nonzero``, ``bits``, ``rank``,
        ``error_mean``, ``error_max`` (absolute difference of the weights to the original's), ``sqnr_db``; None where a
        value is not defined.
    random_in_evaluation : bool or None
        Whether two calls of the torch model on equal inputs gave different outputs: its scores are not compared.
    notes : sequence of str
        What was inferred or changed on the way (the loss, a dtype, a parametrization), one sentence each.
    warmup_queries : int or None
        Untimed queries before the timed ones.
    load_ms, first_ms : float or None
        Loading the artifact; the first inference after it.
    peak_rss_bytes : int or None
        High-water mark of the measuring process, runtime and one batch included.
    energy : sequence of mapping
        :class:`harness.contracts.EnergyReading` as dictionaries, plus ``grid_g_per_kwh``.
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
    original_sha256: str | None = None
    signature: Mapping[str, Any] | None = None
    workload: Mapping[str, Any] | None = None
    scores: Sequence[Mapping[str, Any]] = ()
    latency: Mapping[str, Sequence[int]] = field(default_factory=dict)
    layers: Sequence[Mapping[str, Any]] = ()
    random_in_evaluation: bool | None = None
    notes: Sequence[str] = ()
    warmup_queries: int | None = None
    load_ms: float | None = None
    first_ms: float | None = None
    peak_rss_bytes: int | None = None
    energy: Sequence[Mapping[str, Any]] = ()
    stages: Sequence[Mapping[str, Any]] = ()
    reasons: Mapping[str, str] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    schema: int = SCHEMA_VERSION

    def to_json(self) -> dict[str, Any]:
        """The record as the JSON object that is stored."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Record:
        """The record of a stored JSON object, of this format or an older one."""
        return cls(**upgrade(value))


def new_run_id(now: datetime | None = None) -> str:
    """A fresh id: UTC time to the microsecond and 40 random bits."""
    moment = now or datetime.now(UTC)
    return f"{moment:%Y%m%dT%H%M%S%f}-{secrets.token_hex(5)}"


_OLD_FIDELITY = (
    ("max-abs", "max_abs", "", "lower"),
    ("top1-agreement", "top1", "%", "higher"),
    ("mean-kl", "mean_kl", "nats", "lower"),
)


def upgrade(value: Mapping[str, Any]) -> dict[str, Any]:
    """A stored record in this format; one of this format is returned as it is.

    Format 1 knew one output, classes, top-1 accuracy and one phase. Its test examples were known by their labels, so
    the identity of its split is the hash of the labels.
    """
    new = dict(value)
    if new.get("schema", 1) >= SCHEMA_VERSION:
        return new
    labels, predictions = new.pop("labels", None), new.pop("predictions", None)
    n, correct = new.pop("n_examples", None), new.pop("n_correct", None)
    fidelity = new.pop("fidelity", None)
    scores: list[dict[str, Any]] = []
    if n:
        pairs = list(zip(labels or (), predictions or (), strict=True))
        parts = {"correct": [int(a == b) for a, b in pairs], "label": labels, "predicted": predictions} if pairs else {}
        scores.append(
            _score("accuracy", "%", "higher", True, "test", "targets")
            | {
                "split_sha256": f"labels:{hashlib.sha256(dumps(labels).encode()).hexdigest()}" if labels else None,
                "n": n,
                "parts": parts,
                "value": correct / n,
            }
        )
    for metric, key, unit, better in _OLD_FIDELITY if fidelity else ():
        scores.append(
            _score(metric, unit, better, False, fidelity.get("data", "validation"), "torch")
            | {"split_sha256": None, "n": fidelity.get("n"), "parts": {}, "value": fidelity.get(key)}
        )
    samples = new.pop("latency_ns", None) or ()
    new |= {"scores": scores, "latency": {"forward": list(samples)} if samples else {}, "schema": SCHEMA_VERSION}
    return new


def _score(metric: str, unit: str, better: str, proportion: bool, data: str, against: str) -> dict[str, Any]:
    return {
        "metric": metric,
        "config": {"name": metric},
        "unit": unit,
        "better": better,
        "proportion": proportion,
        "data": data,
        "against": against,
    }
