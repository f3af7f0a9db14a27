"""A spec says which cells to run: every field is one value or a list, and lists expand to a grid.

::

    name = "small"
    task = "digits-cnn"
    method = ["baseline", {name = "magnitude", sparsity = [0.5, 0.9]}, {chain = ["magnitude", "ptq-int8"]}]
    hardware = ["torch", {name = "openvino", precision = ["f32", "bf16"]}]
    seed = 0
    batch_size = [1, 32]
    threads = 1

    [measure]
    min_seconds = 1.0

    [energy]
    enabled = true

An item is a name, or a table with ``name`` and the parameters of what it names; a list as a parameter's value
expands too (a list of lists passes lists). ``{chain = [...]}`` applies methods one after the other. The keys are
the columns of the view ``runs``.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import math
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from harness import registry
from harness.canonical import digest
from harness.errors import DataError, InputError, SpecError, suggestion
from harness.files import read_regular
from harness.text import SHOWN, cut, shown

MAX_CELLS = 100_000
MAX_CELLS_VARIABLE = "ASSAY_MAX_CELLS"
_MAX_BYTES = 1 << 20
# Deeper tables than any spec has; a parser's time grows with the square of the depth.
_MAX_DEPTH = 32
_TOO_LARGE = "an integer has more than 64 bits"
_INTEGERS = range(-(2**63), 2**63)
# Strings and comments of TOML, as its parser reads them.
_TEXT = re.compile(
    r'"""(?:\\.|[^\\])*?"{3,5}|' r"'''.*?'{3,5}|" r'"(?:\\.|[^"\\\n])*"|' r"'[^'\n]*'|#[^\n]*", re.DOTALL
)
_STRICT = ConfigDict(extra="forbid", strict=True)
_Positive = Annotated[int, Field(gt=0)]
_Count = Annotated[int, Field(ge=0)]
_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class MeasureSettings:
    """How latency, accuracy and fidelity are measured.

    Parameters
    ----------
    min_queries : int
        Timed queries at least (unless ``max_seconds`` is reached); 662 are needed for p99.
    min_seconds, max_seconds : float
        Time of the timed loop, at least and at most, in seconds.
    warmup_queries : int
    warmup_seconds : float
        Untimed queries first: both are met.
    eval_batch : int
        Batch size of the accuracy and fidelity passes.
    fidelity_examples : int
        Validation examples on which the deployed outputs are compared with the torch model's.
    weigh_below : int
        Bytes. Larger weights and artifacts are not compressed for the sake of their compressed sizes, which take
        minutes: those are NULL, with that as the reason.
    """

    min_queries: _Positive = 700
    min_seconds: _Seconds = 1.0
    max_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 20.0
    warmup_queries: _Count = 10
    warmup_seconds: _Seconds = 0.2
    eval_batch: _Positive = 100
    fidelity_examples: _Positive = 256
    weigh_below: _Positive = 2**28


@dataclass(frozen=True, kw_only=True, config=_STRICT)
class EnergySettings:
    """Whether and how energy is accounted.

    Parameters
    ----------
    enabled : bool
        False stores no energy, with that as the reason.
    watts_per_core : float
        Of the stated model, used only where no counter is readable: energy = CPU seconds x watts_per_core.
        The default is 350 W TDP / 56 cores of an Intel Xeon Platinum 8480+ (a data-sheet figure, not a measurement).
    grid_g_per_kwh : float
        Carbon intensity of electricity in g CO2e per kWh. Default: world average of 2023, Ember, Global
        Electricity Review 2024.
    """

    enabled: bool = True
    watts_per_core: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 6.25
    grid_g_per_kwh: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 480.0


Choice = str | Mapping[str, Any]
"""What a spec writes for a task, a method or hardware: a name, or a table of the name and parameters."""


@dataclasses.dataclass(frozen=True)
class Item:
    """A task, a method or hardware by name, with its parameters: what :func:`build` makes the object of.

    Parameters
    ----------
    name : str
        Registered, or ``module:name``.
    parameters : mapping
        JSON values.
    """

    name: str
    parameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, item: Mapping[str, Any]) -> Item:
        """The item of a cell's table, in which the name stands beside the parameters."""
        return cls(item["name"], {key: value for key, value in item.items() if key != "name"})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One point of the grid: parameters resolved, defaults included."""

    task: Mapping[str, Any]
    chain: tuple[Mapping[str, Any], ...]
    hardware: Mapping[str, Any]
    seed: int
    batch_size: int
    threads: int
    measure: Mapping[str, Any]
    energy: Mapping[str, Any]

    @property
    def task_name(self) -> str:
        """What the task is called in records and tables: its name; of a model with data, these two."""
        if self.task["name"] != "pair":
            return str(self.task["name"])
        return " on ".join(str(self.task[key]) for key in ("model", "data") if key in self.task)

    @property
    def method(self) -> str:
        """The chain's names, joined."""
        return " > ".join(step["name"] for step in self.chain)

    def to_json(self) -> dict[str, Any]:
        """The cell as plain JSON values."""
        return cast(dict[str, Any], json.loads(json.dumps(self._values())))

    def _values(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Cell:
        """The cell of :meth:`to_json`'s value."""
        return cls(**{**value, "chain": tuple(value["chain"])})

    def row(self) -> dict[str, Any]:
        """The cell's coordinates under the names of the ``runs`` columns, for display and ``--only``."""
        return {
            "task": self.task_name,
            "method": self.method,
            "config": label(self.chain),
            "hardware": self.hardware["name"],
            **{f"hardware.{key}": value for key, value in self.hardware.items() if key != "name"},
            "seed": self.seed,
            "batch_size": self.batch_size,
            "threads": self.threads,
        }


def label(chain: Sequence[Mapping[str, Any]]) -> str:
    """The chain with its parameters, short enough for a progress line."""
    return " > ".join(
        step["name"] + "".join(f" {key}={value}" for key, value in step.items() if key != "name") for step in chain
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """What to run; see the module's text for the grammar. Validated by :meth:`cells`, once.

    Parameters
    ----------
    task, method, hardware : item or list of items
        Names, or tables of name and parameters.
    seed, batch_size, threads : int or list of int
    measure, energy : mapping
        Fields of :class:`MeasureSettings` and :class:`EnergySettings`.
    name, description : str
        Shown by ``assay ls specs`` and kept in every record.
    source : str
        The file it came from, for error messages.
    """

    task: Choice | Sequence[Choice]
    method: Choice | Sequence[Choice] = "baseline"
    hardware: Choice | Sequence[Choice] = "torch"
    seed: int | Sequence[int] = 0
    batch_size: int | Sequence[int] = 1
    threads: int | Sequence[int] = 1
    measure: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    energy: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    name: str = "unnamed"
    description: str = ""
    source: str = "spec"

    @classmethod
    def from_mapping(cls, value: Mapping[str, Any], source: str = "spec") -> Spec:
        """A spec from parsed TOML.

        Raises
        ------
        SpecError
            For an unknown or missing key.
        """
        allowed = [f.name for f in dataclasses.fields(cls) if f.name != "source"]
        for key in value:
            if key not in allowed:
                raise SpecError(f"{source}: unknown key {shown(key)}. {suggestion(str(key), allowed)}")
        if "task" not in value:
            raise SpecError(f"{source}: the key 'task' is missing: name at least one task (assay ls tasks).")
        return cls(**value, source=source)

    @classmethod
    def load(cls, path_or_name: str | Path) -> Spec:
        """Read a TOML file, or a packaged spec by its name (``assay ls specs``).

        Raises
        ------
        SpecError
            If there is no such file or name, or it is not TOML.
        """
        name, path = str(path_or_name), Path(path_or_name)
        if name in packaged():
            text, source = packaged()[name].read_text(encoding="utf-8"), f"{name} (packaged)"
        elif os.path.lexists(path):
            try:
                text, source = read_regular(path, _MAX_BYTES).decode(), name
            except DataError as error:
                raise SpecError(str(error)) from None
            except UnicodeDecodeError as error:
                raise SpecError(f"{name}: cannot be read as text: {error}") from None
        else:
            raise SpecError(
                f"No spec {shown(name)}: neither a file nor a packaged spec. {suggestion(name, packaged())}"
            )
        value = _parse(text, source)
        value.setdefault("name", path.stem)
        return cls.from_mapping(value, source)

    def cells(self) -> list[Cell]:
        """Expand and check everything that can be checked without running.

        Returns
        -------
        list of Cell
            Without duplicates, and at most 100,000 (``ASSAY_MAX_CELLS``). The methods vary fastest: what is compared
            with one another (equal task, seed, hardware, threads and batch size) runs within seconds, so that a
            machine's slow drift is not taken for a speed-up.

        Raises
        ------
        SpecError, UnknownName
            Naming file, key, value and what is allowed.
        """
        return list(self._cells)

    @functools.cached_property
    def _cells(self) -> tuple[Cell, ...]:
        self._check_values()
        measure = self._settings(MeasureSettings, "measure")
        if measure["max_seconds"] < measure["min_seconds"]:
            raise SpecError(
                f"{self.source}: measure.max_seconds ({measure['max_seconds']}) is below "
                f"measure.min_seconds ({measure['min_seconds']})."
            )
        energy = self._settings(EnergySettings, "energy")
        self._check_size()
        # Equal cells come from equal values on an axis: dropping those is enough, and axes are short.
        axes = (
            _distinct(self._items("task")),
            _distinct(self._integers("seed", minimum=0)),
            _distinct(self._items("hardware")),
            _distinct(self._integers("threads", minimum=1)),
            _distinct(self._integers("batch_size", minimum=1)),
            _distinct(self._chains()),
        )
        return tuple(
            Cell(
                task=task,
                chain=chain,
                hardware=hardware,
                seed=seed,
                batch_size=batch_size,
                threads=threads,
                measure=measure,
                energy=energy,
            )
            for task, seed, hardware, threads, batch_size, chain in itertools.product(*axes)
        )

    def hash(self) -> str:
        """Sha256 of the resolved cells: two specs that ask for the same have the same hash."""
        return digest(sorted(digest(cell._values()) for cell in self._cells))

    def _check_values(self) -> None:
        for key in ("name", "description"):
            if not isinstance(getattr(self, key), str):
                raise SpecError(f"{self.source}: {key}: must be text (got {shown(getattr(self, key))})")
        for field in dataclasses.fields(self):
            if problem := _problem(getattr(self, field.name)):
                raise SpecError(f"{self.source}: {field.name}: {problem}")

    def _check_size(self) -> None:
        """Count the grid before it is expanded: a short spec can ask for more cells than memory holds."""
        sizes = {key: len(_several(getattr(self, key))) for key in ("seed", "threads", "batch_size")}
        sizes |= {
            key: sum(_combinations(item) for item in _several(getattr(self, key)))
            for key in ("task", "hardware", "method")
        }
        limit, count = _max_cells(), math.prod(max(1, size) for size in sizes.values())
        if count > limit:
            factors = " x ".join(f"{key} {_amount(size)}" for key, size in sizes.items() if size > 1)
            raise SpecError(
                f"{self.source}: the grid has {_amount(count)} cells ({factors}); at most {limit:,} are allowed. "
                f"Split the spec, or set {MAX_CELLS_VARIABLE}."
            )

    def _settings(self, kind: type[Any], key: str) -> dict[str, Any]:
        given = getattr(self, key)
        allowed = [f.name for f in dataclasses.fields(kind)]
        if not isinstance(given, Mapping):
            raise SpecError(f"{self.source}: [{key}] must be a table of {', '.join(allowed)} (got {shown(given)})")
        for name in given:
            if name not in allowed:
                raise SpecError(f"{self.source}: [{key}] has no key {shown(name)}. {suggestion(str(name), allowed)}")
        try:
            return dataclasses.asdict(kind(**given))
        except ValidationError as error:
            raise SpecError(f"{self.source}: {key}.{registry.explain(error)}") from None

    def _integers(self, key: str, minimum: int) -> list[int]:
        values = _several(getattr(self, key))
        if not values:
            raise SpecError(f"{self.source}: {key}: the list is empty; give at least one integer >= {minimum}.")
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value < 2**31:
                raise SpecError(f"{self.source}: {key}: must be an integer >= {minimum} (got {shown(value)})")
        return list(values)

    def _items(self, key: registry.Kind) -> list[dict[str, Any]]:
        return [
            resolved
            for where, item in _listed(self.source, getattr(self, key), key)
            for resolved in self._resolve(key, item, where)
        ]

    def _chains(self) -> list[tuple[dict[str, Any], ...]]:
        chains: list[tuple[dict[str, Any], ...]] = []
        for where, item in _listed(self.source, self.method, "method"):
            if isinstance(item, Mapping) and "chain" in item:
                extra = [key for key in item if key != "chain"]
                if extra:
                    raise SpecError(
                        f"{self.source}: {where}: {shown(extra[0])} beside 'chain': "
                        "parameters belong to the chain's steps."
                    )
                if isinstance(item["chain"], str | Mapping):
                    raise SpecError(
                        f"{self.source}: {where}.chain: must be a list of methods (got {shown(item['chain'])})"
                    )
                steps = [
                    list(self._resolve("method", step, at))
                    for at, step in _listed(self.source, item["chain"], f"{where}.chain")
                ]
                chains += itertools.product(*steps)
            else:
                chains += [(resolved,) for resolved in self._resolve("method", item, where)]
        return chains

    def _resolve(self, kind: registry.Kind, item: Any, where: str) -> Iterator[dict[str, Any]]:
        if isinstance(item, str):
            item = {"name": item}
        if kind == "task" and isinstance(item, Mapping) and "model" in item and "name" not in item:
            item = {"name": "pair", **item}
        if not isinstance(item, Mapping) or not isinstance(item.get("name"), str):
            raise SpecError(
                f"{self.source}: {where}: must be a name or a table with a 'name' (got {shown(item)}). "
                f"Allowed names: {', '.join(sorted(registry.table(kind)))}."
            )
        name = item["name"]
        axes = [
            [(key, choice) for choice in (value if isinstance(value, list) else [value])]
            for key, value in item.items()
            if key != "name"
        ]
        for axis, key in zip(axes, [key for key in item if key != "name"], strict=True):
            if not axis:
                raise SpecError(f"{self.source}: {where}.{key}: the list is empty; give at least one value.")
        for choice in itertools.product(*axes):
            try:
                built = build(kind, {"name": name, **dict(choice)})
                yield {"name": name, **parameters(built)}
            except InputError as error:
                raise SpecError(f"{self.source}: {where}: {error}") from None


def _listed(source: str, value: Any, key: str) -> list[tuple[str, Any]]:
    if isinstance(value, str | Mapping):
        return [(key, value)]
    if isinstance(value, Sequence) and value:
        return [(f"{key}[{index}]", item) for index, item in enumerate(value)]
    raise SpecError(f"{source}: {key}: the list is empty, or no list; give at least one name (got {shown(value)}).")


def users_targets(item: Mapping[str, Any]) -> list[str]:
    """What a task's, method's or hardware's table names as ``module:name``: the user asked for that code to run."""
    named = [str(item.get(key, "")) for key in ("name", "model", "data")]
    return [text for text in named if ":" in text and not Path(text).exists()]


def is_assembled(task: Mapping[str, Any]) -> bool:
    """Whether only making a task tells what it is: a user's function, or a model and data that a spec put together."""
    return task["name"] == "pair" or bool(users_targets(task))


def build(kind: registry.Kind, item: Item | Mapping[str, Any]) -> Any:
    """The task, method or hardware object of a resolved item, or of a cell's table with the key "name"."""
    named = item if isinstance(item, Item) else Item.of(item)
    if kind == "task":
        from harness import tasks

        return tasks.create(named.name, named.parameters)
    return registry.create(kind, named.name, named.parameters)


def parameters(built: Any) -> dict[str, Any]:
    """The parameters of a task, method or hardware object as plain JSON values."""
    # Only of Assay's own classes: reading a spec calls nothing of the user's.
    if type(built).__module__.startswith("harness.") and (resolved := getattr(built, "resolved_parameters", None)):
        return cast(dict[str, Any], _plain(resolved()))
    value = {f.name: getattr(built, f.name) for f in dataclasses.fields(built) if f.init}
    return cast(dict[str, Any], _plain(value))


def _plain(value: Any) -> Any:
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        raise SpecError(
            f"a parameter is no number, text, boolean, list or table, or is not finite (got {shown(value)})"
        ) from None


def _parse(text: str, source: str) -> dict[str, Any]:
    """The text as TOML, in a time that does not grow with its nesting.

    Raises
    ------
    SpecError
        If it is not valid, or holds what no spec needs: tables too deep, or integers beyond 64 bits.
    """
    # The parser's time grows with the square of a dotted key's length.
    keys = re.split(r"[\n=\[\],{}]", _TEXT.sub("_", text))
    problem = f"a key has more than {_MAX_DEPTH} parts" if any(key.count(".") > _MAX_DEPTH for key in keys) else None
    value: dict[str, Any] = {}
    if problem is None:
        try:
            value = tomllib.loads(text)
            problem = _problem(value)
        except RecursionError:
            problem = f"it is nested deeper than {_MAX_DEPTH} levels"
        except tomllib.TOMLDecodeError as error:
            problem = cut(str(error), SHOWN)
        except ValueError:  # Python refuses to read thousands of digits
            problem = _TOO_LARGE
    if problem:
        raise SpecError(f"{source}: not valid TOML: {problem}")
    return value


def _problem(value: Any) -> str | None:
    """Why a value cannot stand in a spec, or None. Nothing here recurses: the value may be nested without end."""
    waiting = [(value, 0)]
    while waiting:
        item, depth = waiting.pop()
        if depth > _MAX_DEPTH:
            return f"it is nested deeper than {_MAX_DEPTH} levels"
        if isinstance(item, Mapping):
            waiting += [(part, depth + 1) for pair in item.items() for part in pair]
        elif isinstance(item, list | tuple):
            waiting += [(part, depth + 1) for part in item]
        elif isinstance(item, int) and item not in _INTEGERS:
            return _TOO_LARGE
        elif isinstance(item, str) and not _is_unicode(item):
            return f"the text {shown(item)} is no valid Unicode"
    return None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair has no place in a record
        return False
    return True


def _several(value: Any) -> Sequence[Any]:
    return value if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _combinations(item: Any) -> int:
    """Into how many an item expands; what is no item counts as one, and is refused later."""
    if not isinstance(item, Mapping):
        return 1
    if "chain" in item:
        return math.prod(_combinations(step) for step in _several(item["chain"]))
    # An empty list is refused later: here it must not hide the size of the others.
    return math.prod(max(1, len(value)) for key, value in item.items() if key != "name" and isinstance(value, list))


def _amount(number: int) -> str:
    return f"{number:,}" if number < 10**15 else "more than 10^15"


def _max_cells() -> int:
    given = os.environ.get(MAX_CELLS_VARIABLE, str(MAX_CELLS))
    if not given.isdecimal() or not 0 < len(given) <= 12 or int(given) == 0:
        raise InputError(f"{MAX_CELLS_VARIABLE} must be a positive integer (got {shown(given)}).")
    return int(given)


def _distinct(values: Sequence[Any]) -> list[Any]:
    return list({digest(value): value for value in values}.values())


def packaged() -> dict[str, Any]:
    """Packaged specs: name to readable resource."""
    folder = resources.files("harness") / "specs"
    return {
        item.name.removesuffix(".toml"): item
        for item in sorted(folder.iterdir(), key=lambda item: item.name)
        if item.name.endswith(".toml")
    }
