"""Tables with named columns: ``.npz``, ``.csv`` and Parquet files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.errors import DataError, InputError, explanation, suggestion
from harness.tasks.batches import TARGETS
from harness.tasks.sets import TABLES, Loaded, Wanted

_PARTS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}
_TEXTS = ("text", "sentence", "sentence1", "premise", "question", "content")


@dataclass(frozen=True)
class Tables:
    """One file, which is the test set, or a folder with ``train``, ``validation`` and ``test`` of them."""

    place: Path

    def unavailable(self) -> str | None:
        """Why the file is not here, or None."""
        return None if self.place.exists() else f"{self.place} does not exist."

    def load(self, wanted: Wanted) -> Loaded:
        """Every file as one batch."""
        if self.place.is_file():
            files = {"test": self.place}
        else:
            files = {
                part: self.place / f"{name}{suffix}"
                for name, part in _PARTS.items()
                for suffix in TABLES
                if (self.place / f"{name}{suffix}").is_file()
            }
        parts, notes = {}, dict[str, None]()
        for part, file in files.items():
            batch, said = batch_of(read(file), wanted, str(file))
            parts[part] = [batch]
            notes |= dict.fromkeys(said)
        return Loaded(parts=parts, notes=tuple(notes))


def read(file: Path) -> dict[str, Any]:
    """The columns of a file as arrays; nothing is unpickled.

    Raises
    ------
    DataError
        If it cannot be read.
    """
    import numpy as np

    try:
        if file.suffix.lower() == ".npz":
            with file.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
                return {name: archive[name] for name in archive.files}
        if file.suffix.lower() == ".csv":
            from pyarrow import csv

            table = csv.read_csv(file)
        else:
            from pyarrow import parquet

            table = parquet.read_table(file)
    except Exception as error:
        raise DataError(f"{file} cannot be read as {file.suffix}: {explanation(error)}") from error
    return {name: column(table.column(name), name, str(file)) for name in table.column_names}


def column(values: Any, name: str, where: str) -> Any:
    """A column of Arrow as an array of numbers or texts; lists of equal length become rows.

    Raises
    ------
    DataError
        If values are missing, or lists differ in length.
    """
    import numpy as np

    if values.null_count:
        raise DataError(
            f"{where}: the column {name!r} has {values.null_count} empty values. Fill them in or leave the rows out."
        )
    found = values.to_pylist() if "list" in str(values.type) else values.to_numpy()
    try:
        return np.asarray(found)
    except ValueError as error:
        raise DataError(
            f"{where}: the lists in column {name!r} differ in length. Fill them up to one length ({error})."
        ) from error


def batch_of(columns: Mapping[str, Any], wanted: Wanted, where: str) -> tuple[Any, tuple[str, ...]]:
    """(inputs, targets) of named columns, and what has to be said.

    Columns of the names of the model's inputs are its inputs; for a model with one input of another name, one column
    is it, and several columns of numbers are its features, in their order. Texts go through the model's tokenizer.

    Raises
    ------
    InputError
        If no column is an input, or a target is not there.
    """
    targets = {name: columns[name] for name in _targets(columns, wanted, where)}
    rest = {name: value for name, value in columns.items() if name not in targets}
    named = {name: value for name, value in rest.items() if name in wanted.names}
    if named:
        left = [name for name in rest if name not in named]
        return (named, targets), ((f"Columns that are no inputs are left out: {', '.join(left)}.",) if left else ())
    texts = {name: value for name, value in rest.items() if value.dtype.kind in "UO"}
    if texts and wanted.made.tokenizer is not None:
        return (*_tokenized(texts, targets, wanted),)
    numbers = {name: value for name, value in rest.items() if value.dtype.kind in "biuf"}
    if not numbers:
        inputs = ", ".join(wanted.names) or "a column of numbers"
        raise InputError(f"{where}: none of the columns {', '.join(columns)} is an input ({inputs}).")
    if len(numbers) == 1:
        return ((next(iter(numbers.values())),), targets), ()
    if any(value.ndim != 1 for value in numbers.values()) or len(wanted.names) > 1:
        raise InputError(
            f"{where}: which of the columns {', '.join(numbers)} are inputs is not known. Name them as the model does: "
            f"{', '.join(wanted.names) or 'input'}."
        )
    import numpy as np

    features = np.stack([value.astype(np.float32) for value in numbers.values()], axis=1)
    return ((features,), targets), (f"The columns {', '.join(numbers)} are the features, in this order.",)


def _targets(columns: Mapping[str, Any], wanted: Wanted, where: str) -> list[str]:
    for name in wanted.targets:
        if name not in columns:
            raise InputError(f"{where} has no column {name!r} for a target. {suggestion(name, columns)}")
    return list(wanted.targets) or [name for name in columns if name in TARGETS and name not in wanted.names]


def _tokenized(texts: Mapping[str, Any], targets: Any, wanted: Wanted) -> tuple[Any, tuple[str, ...]]:
    chosen = [name for name in _TEXTS if name in texts][:1] or list(texts)[:1]
    values = [str(text) for text in texts[chosen[0]]]
    encoded = wanted.made.tokenizer(
        values, padding="max_length", truncation=True, max_length=wanted.tokens, return_tensors="np"
    )
    inputs = {name: encoded[name].astype("int64") for name in encoded if not wanted.names or name in wanted.names}
    note = f"The column {chosen[0]!r} is tokenized, cut and filled to {wanted.tokens} tokens."
    return (inputs, targets), (note,)
