"""The contract suite: what every method, runtime and task has to keep, whoever wrote it.

It is a pytest plugin. A test that asks for ``method_name``, ``hardware_name`` or ``task_name`` runs once for every
registered name, and the functions here check one name::

    from harness.testing import check_method

    def test_contract(method_name):
        check_method(method_name).require()

Each returns a :class:`Coverage`, which says on what the check ran and where it did not apply; ``require`` fails where
it applied nowhere. A violated contract raises AssertionError with the clause in words.

Loading the plugin imports neither torch nor NumPy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness import registry
from harness.testing.clauses import Coverage
from harness.testing.hardware import check_hardware
from harness.testing.methods import check_method
from harness.testing.tasks import check_task

if TYPE_CHECKING:
    import pytest

__all__ = ["Coverage", "check_hardware", "check_method", "check_task"]

_KINDS: dict[str, registry.Kind] = {"method_name": "method", "hardware_name": "hardware", "task_name": "task"}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run tests that ask for a registered name once for each, unless they say otherwise themselves."""
    own = {
        name.strip() for mark in metafunc.definition.iter_markers("parametrize") for name in _arguments(mark.args[0])
    }
    for argument, kind in _KINDS.items():
        # Another project's own fixture of that name goes first; pytest tells of it only here.
        fixture = getattr(metafunc, "_arg2fixturedefs", {}).get(argument)
        if argument in metafunc.fixturenames and argument not in own and not fixture:
            metafunc.parametrize(argument, sorted(registry.table(kind)))


def _arguments(names: Any) -> list[str]:
    return names.split(",") if isinstance(names, str) else list(names)
