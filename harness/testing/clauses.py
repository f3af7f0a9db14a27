"""The few things that all contract checks share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from harness import registry
from harness.canonical import digest
from harness.errors import SpecError

if TYPE_CHECKING:
    from torch import nn


@dataclasses.dataclass(frozen=True, kw_only=True)
class Coverage:
    """On what a contract was checked.

    Parameters
    ----------
    name : str
        The registered name.
    ran : tuple of str
        Models, or aspects, on which everything was checked.
    skipped : mapping
        Where it did not apply, with the reason it gave.
    """

    name: str
    ran: tuple[str, ...]
    skipped: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def require(self) -> Coverage:
        """Return itself; AssertionError if the contract was checked nowhere."""
        require(self.ran, f"{self.name}: skipped everywhere: {dict(self.skipped)}")
        return self


def require(holds: object, clause: str) -> None:
    """Raise AssertionError with ``clause`` unless it holds, also under ``python -O``, which drops assert statements."""
    if not holds:
        raise AssertionError(clause)


def created(kind: registry.Kind, name: str, parameters: Mapping[str, Any] | None) -> Any:
    """The object of a name, once its class keeps what all registered classes have to keep."""
    found = registry.resolve(kind, name)
    require(isinstance(found, type), f"{name}: is a class")
    require(dataclasses.is_dataclass(found), f"{name}: is a dataclass")
    require(vars(found)["__dataclass_params__"].frozen, f"{name}: is frozen")
    summary = (found.__doc__ or "").strip()
    require(summary and not summary.startswith(f"{found.__name__}("), f"{name}: has a docstring")
    given = {**registry.entry(kind, name).defaults, **(parameters or {})}
    for field in dataclasses.fields(found):
        has_default = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        require(has_default or not field.init or field.name in given, f"{name}: parameter {field.name!r} has a default")
    try:
        registry.create(kind, name, {"no_such_parameter_exists": 1, **(parameters or {})})
    except SpecError:
        pass
    else:
        raise AssertionError(f"{name}: refuses a parameter that it does not have")
    built = registry.create(kind, name, parameters or {})
    values = {field.name: getattr(built, field.name) for field in dataclasses.fields(built) if field.init}
    digest(values)  # the record keeps the parameters as JSON
    require(registry.create(kind, name, values) == built, f"{name}: its parameters make it again")
    return built


def state(model: nn.Module) -> dict[str, bytes]:
    """The bytes of every parameter and buffer."""
    return {name: value.detach().cpu().numpy().tobytes() for name, value in model.state_dict().items()}
