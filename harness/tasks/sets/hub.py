"""Hugging Face's datasets in a folder on disk (``save_to_disk``)."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from harness.errors import DataError, explanation
from harness.tasks.sets import Loaded, Wanted
from harness.tasks.sets.tables import batch_of, column

_PARTS = {"train": "train", "validation": "validation", "valid": "validation", "dev": "validation", "test": "test"}


@dataclass(frozen=True)
class Dataset:
    """A folder that ``datasets`` wrote: splits by their names, one alone is the test set."""

    place: Path

    def unavailable(self) -> str | None:
        """The install line where datasets is missing, or None."""
        return None if importlib.util.find_spec("datasets") else "datasets is not installed: pip install datasets."

    def load(self, wanted: Wanted) -> Loaded:
        """Every split as one batch."""
        import datasets

        try:
            found = datasets.load_from_disk(str(self.place))
        except Exception as error:
            raise DataError(f"{self.place} cannot be read as a data set: {explanation(error)}") from error
        tables = dict(found) if isinstance(found, datasets.DatasetDict) else {"test": found}
        parts, notes = {}, dict[str, None]()
        for name, table in tables.items():
            if name not in _PARTS:
                notes[f"The split {name!r} is left out."] = None
                continue
            rows = table.with_format("arrow")[:]
            columns = {key: column(rows.column(key), key, str(self.place)) for key in rows.column_names}
            batch, said = batch_of(columns, wanted, f"{self.place}: {name}")
            parts[_PARTS[name]] = [batch]
            notes |= dict.fromkeys(said)
        return Loaded(parts=parts, notes=tuple(notes))
