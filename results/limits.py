"""What a record or a claim may hold: one table of types, ranges and lengths, asked before a byte is written or read in.

Records come from other machines and from other people. Whatever passes here can be written into every table, be shown
by every command and be computed with, so that one bad record never stands in the way of the others.
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, NotRequired

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    TypeAdapter,
    ValidationError,
    with_config,
)
from typing_extensions import TypedDict

from harness.record import STATUSES
from results.columns import COLUMNS

VERDICTS = ("reproduced", "not reproduced", "stand-in", "holds", "does not hold", "inconclusive", "not run")

MAX_BYTES = 1 << 27
"""Of a record file: a million examples with four numbers each fit in."""
_MAX_DEPTH = 24
_MAX_NODES = 200_000
_MAX_TEXT = 20_000
_MAX_TRACEBACK = 200_000
_MAX_LIST = 1 << 24
_INT53 = 1 << 53
"""Integers up to here are exact as floating point numbers, and no sum of them overflows the database's integers."""
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,199}")
_MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,6})?(Z|[+-]\d\d:\d\d)?")
_EARLIEST, _LATEST = datetime(1970, 1, 2, tzinfo=UTC), datetime(2200, 1, 1, tzinfo=UTC)
_ODD = re.compile("[\0\ud800-\udfff]")


def moment(text: str) -> datetime:
    """An ISO 8601 time in UTC; one without an offset is UTC already."""
    value = datetime.fromisoformat(text)
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


# ---------------------------------------------------------------------------------------------------------------------
# The kinds of values


def _text(value: str) -> str:
    if _ODD.search(value):
        raise ValueError("NUL and lone surrogates cannot be stored as text")
    return value


def _tree(value: Any) -> Any:
    """JSON of any form, within bounds; a walk without recursion, since the depth is what is asked."""
    nodes, level, depth = 0, [value], 0
    while level:
        depth += 1
        nodes += len(level)
        if depth > _MAX_DEPTH or nodes > _MAX_NODES:
            raise ValueError(f"at most {_MAX_DEPTH} levels and {_MAX_NODES:,} values are allowed")
        deeper: list[Any] = []
        for item in level:
            if isinstance(item, Mapping):
                if any(not isinstance(key, str) for key in item):
                    raise ValueError("every key must be text")
                deeper += [*item.keys(), *item.values()]
            elif isinstance(item, list | tuple):
                deeper += item
            elif isinstance(item, str):
                if len(_text(item)) > _MAX_TEXT:
                    raise ValueError(f"text of {len(item):,} characters, at most {_MAX_TEXT:,} are allowed")
            elif isinstance(item, int) and not -(1 << 63) <= item < 1 << 63:
                raise ValueError("an integer of more than 64 bits")
            elif isinstance(item, float) and item - item != 0:
                raise ValueError("a number that is not finite")
        level = deeper
    return value


def _exact(value: Any) -> Any:
    if isinstance(value, int) and abs(value) > _INT53:
        raise ValueError("is no floating point number exactly")
    return value


def _all_exact(values: Any) -> Any:
    for value in values if isinstance(values, list) else ():
        _exact(value)
    return values


def _identifier(value: str) -> str:
    if not _ID.fullmatch(value):
        raise ValueError("must be letters, digits, '-', '_' and '.', as it names a file")
    return value


def _created(value: str) -> str:
    try:
        inside = _MOMENT.fullmatch(value) and _EARLIEST <= moment(value) < _LATEST
    except (ValueError, OverflowError):
        inside = False
    if not inside:
        raise ValueError("is not an ISO 8601 time (2026-01-31T12:00:00+00:00) between 1970 and 2200")
    return value


def _phase(value: list[Any]) -> list[Any]:
    name, calls = value
    if not isinstance(name, str) or not _text(name) or type(calls) is not int or not 1 <= calls <= 10**6:
        raise ValueError("is not a phase's name and how often it is called")
    return value


def _status(value: str) -> str:
    if value not in STATUSES:
        raise ValueError(f"is not one of {', '.join(STATUSES)}")
    return value


def _verdict(value: str) -> str:
    if value.partition(" (")[0] not in VERDICTS:
        raise ValueError(f"is not one of {', '.join(VERDICTS)} (with a reason in parentheses)")
    return value


_Strict = Strict()
_AnyText = Annotated[str, _Strict, Field(max_length=_MAX_TEXT), AfterValidator(_text)]
_Traceback = Annotated[str, _Strict, Field(max_length=_MAX_TRACEBACK), AfterValidator(_text)]
_Name = Annotated[str, _Strict, Field(min_length=1, max_length=4_000), AfterValidator(_text)]
_Id = Annotated[str, _Strict, AfterValidator(_identifier)]
_Created = Annotated[str, _Strict, AfterValidator(_created)]
_Flag = Annotated[bool, _Strict]
_Count = Annotated[int, _Strict, Field(ge=0, le=_INT53)]
_Size = Annotated[int, _Strict, Field(ge=1, le=1 << 31)]
_Class = Annotated[int, _Strict, Field(ge=-_INT53, le=_INT53)]
_Phase = Annotated[list[Any], _Strict, Field(min_length=2, max_length=2), AfterValidator(_phase)]
_Nanoseconds = Annotated[int, _Strict, Field(ge=0, le=10**16)]
_Float = Annotated[float, _Strict, Field(ge=-1e300, le=1e300, allow_inf_nan=False)]
_Number = Annotated[_Float, BeforeValidator(_exact)]
_Amount = Annotated[float, _Strict, Field(ge=0, le=1e18, allow_inf_nan=False), BeforeValidator(_exact)]
_Object = Annotated[dict[str, Any], _Strict, AfterValidator(_tree)]
_Texts = Annotated[list[_AnyText], _Strict, Field(max_length=10_000)]
_TextByName = Annotated[dict[_AnyText, _AnyText], _Strict, Field(max_length=10_000)]
_Samples = Annotated[list[_Nanoseconds], _Strict, Field(max_length=_MAX_LIST)]
_Classes = Annotated[list[_Class], _Strict, Field(max_length=_MAX_LIST)]
_Numbers = Annotated[list[_Float | None], _Strict, Field(max_length=_MAX_LIST), BeforeValidator(_all_exact)]

_closed = with_config(ConfigDict(extra="forbid"))
_open = with_config(ConfigDict(extra="allow"))


@_open
class _Step(TypedDict):
    name: _Name


@_closed
class _Reading(TypedDict):
    method: _Name
    domain: _Name
    gross_j: _Amount
    window_s: _Amount
    inferences: _Count
    idle_w: NotRequired[_Amount | None]
    inputs: NotRequired[_Object | None]
    grid_g_per_kwh: NotRequired[_Amount | None]


@_closed
class _Artifact(TypedDict):
    sha256: _Name
    size_bytes: NotRequired[_Count | None]
    zstd_bytes: NotRequired[_Count | None]
    format: NotRequired[_AnyText | None]
    files: NotRequired[_Texts | None]


@_open
class _Weights(TypedDict):
    plain_bytes: NotRequired[_Count | None]
    container_bytes: NotRequired[_Count | None]
    shannon_bytes: NotRequired[_Count | None]
    zstd_bytes: NotRequired[_Count | None]
    xz_bytes: NotRequired[_Count | None]
    gzip_bytes: NotRequired[_Count | None]


@_open
class _Machine(TypedDict):
    machine_id: NotRequired[_Name | None]
    hostname: NotRequired[_AnyText | None]
    cpu_model: NotRequired[_AnyText | None]
    governor: NotRequired[_AnyText | None]
    os: NotRequired[_AnyText | None]
    cores: NotRequired[_Size | None]
    memory_bytes: NotRequired[_Count | None]
    isa: NotRequired[_Texts | None]


@_open
class _Fidelity(TypedDict):
    max_abs: NotRequired[_Amount | None]
    top1: NotRequired[_Number | None]
    mean_kl: NotRequired[_Number | None]
    n: NotRequired[_Count | None]
    data: NotRequired[_AnyText | None]


@_open
class _Layer(TypedDict):
    name: _AnyText
    kind: NotRequired[_AnyText | None]
    shape: NotRequired[list[_Count] | None]
    parameters: NotRequired[_Count | None]
    nonzero: NotRequired[_Count | None]
    bits: NotRequired[_Amount | None]
    rank: NotRequired[_Count | None]
    error_mean: NotRequired[_Amount | None]
    error_max: NotRequired[_Amount | None]
    sqnr_db: NotRequired[_Number | None]


@_open
class _Score(TypedDict):
    metric: _Name
    config: Annotated[_Step, AfterValidator(_tree)]
    unit: _AnyText
    better: Literal["higher", "lower"]
    proportion: _Flag
    data: _Name
    against: _Name
    split_sha256: NotRequired[_AnyText | None]
    n: NotRequired[_Count | None]
    parts: dict[_Name, _Numbers]
    value: NotRequired[_Number | None]


@_open
class _Workload(TypedDict):
    phases: NotRequired[Annotated[list[_Phase], _Strict, Field(max_length=100)]]
    sizes: NotRequired[Annotated[dict[_Name, _Size], _Strict, Field(max_length=100)]]
    unit: NotRequired[_Name]


# ---------------------------------------------------------------------------------------------------------------------
# The table

_FIELDS: dict[str, Any] = {"BIGINT": _Count, "DOUBLE": _Amount, "VARCHAR": _AnyText}
"""What a field that is stored as it is measured may be, by the type of its column."""
_REQUIRED: dict[str, Any] = {
    "run_id": _Id,
    "created_at": _Created,
    "status": Annotated[_AnyText, AfterValidator(_status)],
    "task": _Name,
    "method": _Name,
    "hardware": _Name,
    "task_config": _Object,
    "chain": Annotated[list[_Step], _Strict, Field(min_length=1, max_length=1000), AfterValidator(_tree)],
    "hardware_config": _Object,
    "seed": Annotated[int, _Strict, Field(ge=0, lt=1 << 63)],
    "batch_size": _Size,
    "threads": Annotated[int, _Strict, Field(ge=1, le=1 << 20)],
    "settings": _Object,
    **dict.fromkeys(("spec_name", "spec_hash", "cell_hash", "task_hash", "method_hash", "hardware_hash"), _Name),
}
_COMMON: dict[str, Any] = {
    "dataset_hash": _AnyText | None,
    "reason": _AnyText | None,
    "traceback": _Traceback | None,
    "git_commit": _AnyText | None,
    "git_dirty": _Flag | None,
    "packages": _TextByName | None,
    "machine": Annotated[_Machine, AfterValidator(_tree)] | None,
    "conditions": _Object | None,
    "effective": _Object | None,
    "artifact": _Artifact | None,
    "weights": Annotated[_Weights, AfterValidator(_tree)] | None,
    "warmup_queries": _Count | None,
    **{column.name: _FIELDS[column.field] | None for column in COLUMNS if column.field},
    "energy": Annotated[list[_Reading], _Strict, Field(max_length=1000)] | None,
    "stages": Annotated[list[_Step], _Strict, Field(max_length=1000), AfterValidator(_tree)] | None,
    "reasons": _TextByName | None,
    "warnings": _Texts | None,
    "schema": _Size,
}
_RECORD: dict[int, dict[str, Any]] = {
    1: {
        "n_examples": _Count | None,
        "n_correct": _Count | None,
        "labels": _Classes | None,
        "predictions": _Classes | None,
        "latency_ns": _Samples | None,
        "fidelity": Annotated[_Fidelity, AfterValidator(_tree)] | None,
    },
    2: {
        "original_sha256": _AnyText | None,
        "signature": _Object | None,
        "workload": Annotated[_Workload, AfterValidator(_tree)] | None,
        "scores": Annotated[list[_Score], _Strict, Field(max_length=1000)] | None,
        "latency": Annotated[dict[_Name, _Samples], _Strict, Field(max_length=100)] | None,
        "layers": Annotated[list[_Layer], _Strict, Field(max_length=20_000), AfterValidator(_tree)] | None,
        "random_in_evaluation": _Flag | None,
        "notes": _Texts | None,
    },
}
"""What each version of the record format has besides the common fields."""
_CLAIM_REQUIRED: dict[str, Any] = {
    "entry_id": _Id,
    "created_at": _Created,
    "paper": _Name,
    "id": _Name,
    "verdict": Annotated[_AnyText, AfterValidator(_verdict)],
}
_CLAIM: dict[str, Any] = {
    **dict.fromkeys(("claimed", "measured", "tolerance"), _Number | None),
    "reason": _AnyText | None,
    "run_ids": Annotated[list[_AnyText], _Strict, Field(max_length=100_000)],
    "details": _Object | None,
}


# ---------------------------------------------------------------------------------------------------------------------
# Asking it


def record_problem(record: Mapping[str, Any]) -> str | None:
    """What is wrong with a record in its own format's version, or None."""
    version = record.get("schema", 1)
    if type(version) is not int or version not in _RECORD:
        return f"record format {version!r}; formats {', '.join(map(str, _RECORD))} are known."
    adapters = _adapters("record", version)
    if unknown := sorted(set(record) - set(adapters)):
        return f"unknown fields {', '.join(unknown)[:200]}."
    if problem := _fields_problem(record, adapters, _REQUIRED):
        return problem
    if version == 1:
        return _time_problem({"forward": record.get("latency_ns") or ()}, {}) or _answers_problem(record)
    calls = dict((record.get("workload") or {}).get("phases") or ())
    return _time_problem(record.get("latency") or {}, calls) or _scores_problem(record.get("scores") or ())


def claim_problem(claim: Mapping[str, Any]) -> str | None:
    """What is wrong with a claim, or None; fields that nobody knows are kept, within bounds."""
    adapters = _adapters("claim", 1)
    if problem := _fields_problem(claim, adapters, _CLAIM_REQUIRED):
        return problem
    try:
        _tree({name: value for name, value in claim.items() if name not in adapters})
    except ValueError as error:
        return f"its other fields: {error}."
    return None


def fitted(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of our own whose free texts are within bounds: a measurement is not lost for an endless message."""
    new = dict(record)
    for name, most in (("reason", _MAX_TEXT), ("traceback", _MAX_TRACEBACK)):
        if isinstance(new.get(name), str):
            new[name] = shortened(new[name], most)
    for name in ("warnings", "notes"):
        if isinstance(new.get(name), list | tuple):
            new[name] = [shortened(text, _MAX_TEXT) if isinstance(text, str) else text for text in new[name]]
    if isinstance(reasons := new.get("reasons"), Mapping):
        new["reasons"] = {
            key: shortened(text, _MAX_TEXT) if isinstance(text, str) else text for key, text in reasons.items()
        }
    return new


def shortened(text: str, most: int) -> str:
    """A text that can be stored, of at most so many characters: its beginning and its end."""
    text = _ODD.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    if len(text) <= most:
        return text
    note = f" ... ({len(text):,} characters in all) ... "
    half = (most - len(note)) // 2
    return text[:half] + note + text[-half:]


@functools.cache
def _adapters(kind: str, version: int) -> dict[str, TypeAdapter[Any]]:
    known = {**_REQUIRED, **_COMMON, **_RECORD[version]} if kind == "record" else {**_CLAIM_REQUIRED, **_CLAIM}
    return {name: TypeAdapter(bounds) for name, bounds in known.items()}


def _fields_problem(
    value: Mapping[str, Any], adapters: Mapping[str, TypeAdapter[Any]], required: Mapping[str, Any]
) -> str | None:
    if missing := [name for name in required if value.get(name) is None]:
        return f"fields {', '.join(missing)} are missing."
    for name, adapter in adapters.items():
        if name not in value:
            continue
        try:
            adapter.validate_python(value[name])
        except ValidationError as error:
            return _explained(name, error)
    return None


def _explained(name: str, error: ValidationError) -> str:
    # Of a union with None, the last error is about None.
    first = error.errors(include_url=False)[0]
    place = name + "".join(f"[{part!r}]" for part in first["loc"] if part not in ("[key]",))[:200]
    shown = repr(first["input"])
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    if first["type"] == "value_error":
        return f"{place} {shown} {first['ctx']['error']}."
    return f"{place} {shown}: {first['msg'][:1].lower()}{first['msg'][1:]}."


def _time_problem(latency: Mapping[str, Sequence[int]], calls: Mapping[str, int]) -> str | None:
    """Whether the times of a phase add up to something that the database can hold."""
    for phase, samples in latency.items():
        if sum(samples) * calls.get(phase, 1) > 4 * 10**18:
            return f"phase {phase!r}: its calls would take more than a century."
    return None


def _answers_problem(record: Mapping[str, Any]) -> str | None:
    """Whether labels, predictions and counts of format 1 agree."""
    labels, predictions = record.get("labels"), record.get("predictions")
    n, correct = record.get("n_examples"), record.get("n_correct")
    if (labels is None) != (predictions is None):
        return "labels and predictions must both be there, or neither."
    if (n is None) != (correct is None):
        return "n_examples and n_correct must both be there, or neither."
    if n is not None and correct is not None and correct > n:
        return f"n_correct = {correct} of n_examples = {n}."
    if labels is not None and predictions is not None:
        right = sum(map(operator.eq, labels, predictions))
        if not len(labels) == len(predictions) == n:
            return f"{len(labels)} labels, {len(predictions)} predictions and n_examples = {n} do not agree."
        if right != correct:
            return f"n_correct = {correct}, but {right} predictions are right."
    return None


def _scores_problem(scores: Sequence[Mapping[str, Any]]) -> str | None:
    """Whether each score agrees with its own parts."""
    for score in scores:
        metric, n, value, parts = score["metric"], score.get("n"), score.get("value"), score["parts"]
        if lengths := {len(part) for part in parts.values()} - {n}:
            return f"score {metric!r}: n = {n}, but a part has {min(lengths)} values."
        if not score["proportion"] or value is None:
            continue
        if not 0 <= value <= 1:
            return f"score {metric!r}: the value {value} is no proportion."
        if "correct" not in parts or not n:
            continue
        right = parts["correct"]
        if set(right) - {0, 1}:
            return f"score {metric!r}: the part 'correct' holds something else than 0 and 1."
        if abs(sum(right) / n - value) > 1e-9:
            return f"score {metric!r}: the value is {value}, but {sum(right):g} of {n} are right."
    return None


def is_id(text: str) -> bool:
    """Whether a text can be the id of a record, and so the name of its file."""
    return _ID.fullmatch(text) is not None


VERSIONS = tuple(_RECORD)
"""Of the record format."""


def names(version: int) -> set[str]:
    """The fields of a version of the record format."""
    return {*_REQUIRED, *_COMMON, *_RECORD[version]}
