"""Assay's core: what a cell is, and how it is run and measured.

>>> import harness
>>> spec = harness.Spec(task="digits-cnn", method=["baseline", {"name": "magnitude", "sparsity": [0.5, 0.9]}])
>>> [cell.method for cell in spec.cells()]
['baseline', 'magnitude', 'magnitude']
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harness.contracts import Recipe as Recipe
    from harness.record import Record as Record
    from harness.runner import Outcome as Outcome
    from harness.runner import run as run
    from harness.runner import sweep as sweep
    from harness.spec import Spec as Spec

_PUBLIC = {
    "Spec": "harness.spec",
    "Recipe": "harness.contracts",
    "Record": "harness.record",
    "Outcome": "harness.runner",
    "run": "harness.runner",
    "sweep": "harness.runner",
}
__all__ = ["Outcome", "Recipe", "Record", "Spec", "run", "sweep"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Lazily: `assay --help` imports this package and must stay fast.
    if name not in _PUBLIC:
        raise AttributeError(f"module 'harness' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_PUBLIC[name]), name)
