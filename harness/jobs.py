"""What the processes tell one another: jobs and their results, as frozen dataclasses that travel as JSON.

A job's class says which function does it, in a worker, and what that returns: :mod:`harness.executor` and
:mod:`harness.worker` know no more than that. The function is called as ``function(job, progress)``.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar, cast

from harness.contracts import JSON, Signature, Workload
from harness.spec import Cell, Item

__all__ = [
    "Deployment",
    "Item",
    "Job",
    "MeasureJob",
    "Measured",
    "PrepareJob",
    "Prepared",
    "Progress",
    "from_json",
    "to_json",
]

Result = TypeVar("Result")


class Progress(Protocol):
    """What a job reports while it runs."""

    def __call__(self, fraction: float, message: str) -> None:
        """Say how much of the job is done, in 0..1, and what is being done."""
        ...

    def step(self, name: str) -> None:
        """Begin a step, such as "training the baseline": the timeout counts from here, and names it."""
        ...


class Job(Generic[Result]):
    """Base of all jobs: a frozen dataclass with these class variables.

    Attributes
    ----------
    function : str
        ``"module:function"`` that does the job in the worker.
    result : type
        The dataclass that the function returns.
    title : str
        The job's first (or only) step, for the message of a timeout: "preparing the model".
    """

    function: ClassVar[str]
    result: ClassVar[type[Any]]
    title: ClassVar[str]


@dataclass(frozen=True, kw_only=True)
class Deployment:
    """What was built, and what it is compared with.

    Parameters
    ----------
    artifact : Path
    signature : Signature
    workload : Workload
    reference : Path
        Folder of the examples and the torch model's outputs.
    reference_data : str
        From which split they are: "validation", "train" or "random".
    test : Path or None
        Folder of the test set; None where there is none.
    test_sha256 : str or None
    eval_batch : int
        Batch size of the passes for scores.
    metrics, fidelity : tuple of mapping
        Configurations of the metrics against the targets, and against the torch model's outputs.
    quantized : bool
        Whether the torch model is quantized, so that its outputs before that are there too.
    random : bool
        Whether the torch model gives other outputs each time, so that a difference says nothing.
    """

    artifact: Path
    signature: Signature
    workload: Workload
    reference: Path
    reference_data: str
    test: Path | None
    test_sha256: str | None
    eval_batch: int
    metrics: tuple[Mapping[str, JSON], ...]
    fidelity: tuple[Mapping[str, JSON], ...]
    quantized: bool
    random: bool = False


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """What :class:`PrepareJob` comes to.

    Parameters
    ----------
    record : mapping
        Fields of :class:`harness.record.Record`.
    deployment : Deployment
    trusted : tuple of str
        Packages whose classes the stored model names.
    identity : tuple
        What was found about the model and its data, as parts of the cell's identity.
    """

    record: Mapping[str, JSON]
    deployment: Deployment
    trusted: tuple[str, ...]
    identity: tuple[JSON, ...]


@dataclass(frozen=True, kw_only=True)
class PrepareJob(Job[Prepared]):
    """Train, compress and build one cell.

    Parameters
    ----------
    cell : Cell
    not_before : float
        Unix time: older chain steps and artifacts are computed again; baselines are kept.
    """

    function: ClassVar[str] = "harness.prepare:prepare"
    result: ClassVar[type[Any]] = Prepared
    title: ClassVar[str] = "preparing the model"
    cell: Cell
    not_before: float


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What :class:`MeasureJob` comes to; see the fields of the same names of :class:`harness.record.Record`."""

    scores: tuple[Mapping[str, JSON], ...]
    effective: Mapping[str, JSON]
    precision: str | None
    latency: Mapping[str, JSON]
    warmup_queries: int
    load_ms: float
    first_ms: float
    peak_rss_bytes: int | None
    energy: tuple[Mapping[str, JSON], ...]
    reasons: Mapping[str, str]
    warnings: tuple[str, ...]
    conditions: Mapping[str, JSON]


@dataclass(frozen=True, kw_only=True)
class MeasureJob(Job[Measured]):
    """Load one artifact and weigh it.

    Parameters
    ----------
    hardware : Item
    threads, batch_size : int
    measure, energy : mapping
        Settings of the spec.
    deployment : Deployment
    """

    function: ClassVar[str] = "harness.measure.run:measure"
    result: ClassVar[type[Any]] = Measured
    title: ClassVar[str] = "measuring"
    hardware: Item
    threads: int
    batch_size: int
    measure: Mapping[str, JSON]
    energy: Mapping[str, JSON]
    deployment: Deployment


Value = TypeVar("Value")


def to_json(value: Any) -> JSON:
    """A dataclass as plain JSON values, whatever dataclasses, mappings, sequences and paths it holds."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def from_json(kind: type[Value], value: JSON) -> Value:
    """The dataclass of :func:`to_json`'s value, its fields checked against their types.

    Raises
    ------
    pydantic.ValidationError
        Naming the field that does not fit.
    """
    return cast(Value, _adapter(cast(Any, kind)).validate_python(value))


@functools.cache
def _adapter(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)
