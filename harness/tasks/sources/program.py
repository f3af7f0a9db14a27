"""A program of ``torch.export`` in a file."""

from __future__ import annotations

import json
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import DataError, explanation
from harness.tasks.sources import Made

_LIMIT = 64 << 20
# Calls of a graph: torch's operators, and arithmetic of sizes.
_TARGET = re.compile(
    r"torch\.ops\.aten\.\w+\.\w+|_operator\.(add|sub|mul|floordiv|truediv|mod|pow|neg|eq|ne|lt|le|gt|ge|getitem)"
    r"|math\.(ceil|floor|trunc)|torch\.sym_(int|float|max|min|not|ite)"
)
# Sizes are read by evaluating their text: nothing but symbols, numbers and arithmetic may stand there.
_SIZE = re.compile(
    r"(?:\s|,|\(|\)|-?\d++|[su]\d++|Symbol\('[su]\d++'(?:, \w++=(?:True|False))*+\)|Integer|Add|Mul|Max|Min|FloorDiv"
    r"|Mod|PythonMod|CeilToInt|FloorToInt|IntTrueDiv|TruncToInt)*+"
)
_NAME = re.compile(r"[\w.]*")


@dataclass(frozen=True)
class Program:
    """A ``.pt2`` file that ``torch.export.save`` wrote.

    torch reads such files with evaluated texts and pickles. So every call, every size and every archive entry is held
    against what an exported network consists of before torch reads anything, and pickles are read as plain tensors.
    """

    path: str

    def __post_init__(self) -> None:
        """Refuse a path where there is no file, before anything runs."""
        if not Path(self.path).expanduser().is_file():
            raise DataError(f"Program {self.path}: there is no such file in {Path.cwd()}.")

    def unavailable(self) -> str | None:
        """None: torch reads it."""
        return None

    def recipe(self) -> None:
        """None: it comes trained."""
        return

    def make(self, seed: int) -> Made:  # noqa: ARG002 - the weights are those of the file
        """The program as a module."""
        import torch

        from harness.tasks.pretrained import weights_only

        path = Path(self.path).expanduser()
        check(path)
        try:
            with weights_only():  # pickles in it are read as plain tensors, whatever torch asks for
                program = torch.export.load(path)
        except Exception as error:  # torch raises many kinds for damaged files
            raise DataError(f"{path} is no program of torch.export: {explanation(error)}") from error
        # Guards are texts that torch evaluates; the shapes of inputs are checked by what the model becomes.
        return Made(model=program.module(check_guards=False))


def check(path: Path) -> None:
    """Refuse a program that is more than calls of torch's operators on tensors.

    Raises
    ------
    DataError
        Naming what is not allowed.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                name = entry.filename
                if "custom_obj" in name or name.endswith((".so", ".py", ".pyc", ".cubin")):
                    raise DataError(f"{path}: the entry {name!r} is code or an object, which is not loaded.")
                if not name.endswith(".json"):
                    continue
                if entry.file_size > _LIMIT:
                    raise DataError(
                        f"{path}: the entry {name!r} has {entry.file_size:,} bytes; {_LIMIT:,} are allowed."
                    )
                _check_values(json.loads(archive.read(entry)), path)
    except (OSError, zipfile.BadZipFile, ValueError, RecursionError, EOFError) as error:
        raise DataError(f"{path} is no program of torch.export: {explanation(error)}") from error


def _check_values(value: Any, path: Path) -> None:
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, list):
            waiting += item
        if not isinstance(item, dict):
            continue
        waiting += item.values()
        target = item.get("target")
        if "inputs" in item and "outputs" in item and isinstance(target, str) and not _TARGET.fullmatch(target):
            raise DataError(f"{path} calls {target!r}; allowed are torch's operators (torch.ops.aten) on tensors.")
        size = item.get("expr_str")
        if size is not None and not (isinstance(size, str) and len(size) < 1000 and _SIZE.fullmatch(size)):
            raise DataError(f"{path}: {str(size)[:100]!r} is no size; allowed are symbols, numbers and arithmetic.")
        name = item.get("name")
        if isinstance(name, str) and not _NAME.fullmatch(name):
            raise DataError(f"{path}: {name[:100]!r} is no name of a value.")
