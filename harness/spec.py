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
import itertools
import json
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from harness import registry
from harness.canonical import digest
from harness.errors import InputError, SpecError, suggestion

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
    """

    min_queries: _Positive = 700
    min_seconds: _Seconds = 1.0
    max_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 20.0
    warmup_queries: _Count = 10
    warmup_seconds: _Seconds = 0.2
    eval_batch: _Positive = 100
    fidelity_examples: _Positive = 256


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


Item = str | Mapping[str, Any]


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
    def method(self) -> str:
        """The chain's names, joined."""
        return " > ".join(step["name"] for step in self.chain)

    def to_json(self) -> dict[str, Any]:
        """The cell as plain JSON values."""
        value = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return cast(dict[str, Any], json.loads(json.dumps(value)))

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Cell:
        """The cell of :meth:`to_json`'s value."""
        return cls(**{**value, "chain": tuple(value["chain"])})

    def row(self) -> dict[str, Any]:
        """The cell's coordinates under the names of the ``runs`` columns, for display and ``--only``."""
        return {
            "task": self.task["name"],
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
    """What to run; see the module's text for the grammar. Validated by :meth:`cells`.

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

    task: Item | Sequence[Item]
    method: Item | Sequence[Item] = "baseline"
    hardware: Item | Sequence[Item] = "torch"
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
                raise SpecError(f"{source}: unknown key {key!r}. {suggestion(key, allowed)}")
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
        elif path.is_file():
            try:
                text, source = path.read_text(encoding="utf-8"), name
            except (OSError, UnicodeDecodeError) as error:
                raise SpecError(f"{name}: cannot be read as text: {error}") from None
        else:
            raise SpecError(f"No spec {name!r}: neither a file nor a packaged spec. {suggestion(name, packaged())}")
        try:
            value = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise SpecError(f"{source}: not valid TOML: {error}") from None
        value.setdefault("name", path.stem)
        return cls.from_mapping(value, source)

    def cells(self) -> list[Cell]:
        """Expand and check everything that can be checked without running.

        Returns
        -------
        list of Cell
            Without duplicates. The methods vary fastest: what is compared with one another (equal task, seed, hardware,
            threads and batch size) runs within seconds, so that a machine's slow drift is not taken for a speed-up.

        Raises
        ------
        SpecError, UnknownName
            Naming file, key, value and what is allowed.
        """
        for key in ("name", "description"):
            if not isinstance(getattr(self, key), str):
                raise SpecError(f"{self.source}: {key}: must be text (got {getattr(self, key)!r})")
        measure = self._settings(MeasureSettings, "measure")
        if measure["max_seconds"] < measure["min_seconds"]:
            raise SpecError(
                f"{self.source}: measure.max_seconds ({measure['max_seconds']}) is below "
                f"measure.min_seconds ({measure['min_seconds']})."
            )
        energy = self._settings(EnergySettings, "energy")
        axes = (
            self._items("task"),
            self._integers("seed", minimum=0),
            self._items("hardware"),
            self._integers("threads", minimum=1),
            self._integers("batch_size", minimum=1),
            self._chains(),
        )
        found: dict[str, Cell] = {}
        for task, seed, hardware, threads, batch_size, chain in itertools.product(*axes):
            cell = Cell(
                task=task,
                chain=chain,
                hardware=hardware,
                seed=seed,
                batch_size=batch_size,
                threads=threads,
                measure=measure,
                energy=energy,
            )
            found.setdefault(digest(cell.to_json()), cell)
        return list(found.values())

    def hash(self) -> str:
        """Sha256 of the resolved cells: two specs that ask for the same have the same hash."""
        return digest(sorted(digest(cell.to_json()) for cell in self.cells()))

    def _settings(self, kind: type[Any], key: str) -> dict[str, Any]:
        given = getattr(self, key)
        allowed = [f.name for f in dataclasses.fields(kind)]
        if not isinstance(given, Mapping):
            raise SpecError(f"{self.source}: [{key}] must be a table of {', '.join(allowed)} (got {given!r})")
        for name in given:
            if name not in allowed:
                raise SpecError(f"{self.source}: [{key}] has no key {name!r}. {suggestion(name, allowed)}")
        try:
            return dataclasses.asdict(kind(**given))
        except ValidationError as error:
            raise SpecError(f"{self.source}: {key}.{registry.explain(error)}") from None

    def _integers(self, key: str, minimum: int) -> list[int]:
        given = getattr(self, key)
        values = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else [given]
        if not values:
            raise SpecError(f"{self.source}: {key}: the list is empty; give at least one integer >= {minimum}.")
        for value in values:
            if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value < 2**31:
                raise SpecError(f"{self.source}: {key}: must be an integer >= {minimum} (got {value!r})")
        return values

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
                        f"{self.source}: {where}: {extra[0]!r} beside 'chain': parameters belong to the chain's steps."
                    )
                if isinstance(item["chain"], str | Mapping):
                    raise SpecError(f"{self.source}: {where}.chain: must be a list of methods (got {item['chain']!r})")
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
        if not isinstance(item, Mapping) or not isinstance(item.get("name"), str):
            raise SpecError(
                f"{self.source}: {where}: must be a name or a table with a 'name' (got {item!r}). "
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
    raise SpecError(f"{source}: {key}: the list is empty, or no list; give at least one name (got {value!r}).")


def build(kind: registry.Kind, item: Mapping[str, Any]) -> Any:
    """The task, method or hardware object of a resolved item."""
    given = {key: value for key, value in item.items() if key != "name"}
    if kind == "task":
        from harness import tasks

        return tasks.create(item["name"], given)
    return registry.create(kind, item["name"], given)


def parameters(built: Any) -> dict[str, Any]:
    """The parameters of a task, method or hardware object as plain JSON values."""
    if resolved := getattr(built, "resolved_parameters", None):
        return cast(dict[str, Any], _plain(resolved()))
    value = {f.name: getattr(built, f.name) for f in dataclasses.fields(built) if f.init}
    return cast(dict[str, Any], _plain(value))


def _plain(value: Any) -> Any:
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        raise SpecError(
            f"a parameter is no number, text, boolean, list or table, or is not finite (got {value!r})"
        ) from None


def packaged() -> dict[str, Any]:
    """Packaged specs: name to readable resource."""
    folder = resources.files("harness") / "specs"
    return {
        item.name.removesuffix(".toml"): item
        for item in sorted(folder.iterdir(), key=lambda item: item.name)
        if item.name.endswith(".toml")
    }
