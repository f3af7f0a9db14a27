"""Where data come from: one file a kind of source; :func:`find` is the only list of them.

A data source gives loaders, or splits, under "train", "validation" and "test".
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from harness import paths
from harness.errors import InputError, suggestion
from harness.tasks.sources import Made
from harness.text import shown

BUILT_IN = ("digits", "fashion-mnist", "mnist")
TABLES = (".npz", ".csv", ".parquet")
FORMS = (
    f"{', '.join(BUILT_IN)}; imagenet, or a folder of class folders; a {', '.join(TABLES)} file, or a folder with "
    "train, validation and test of them; a folder of Hugging Face datasets; module:function, which returns loaders"
)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a task asks of its data.

    Parameters
    ----------
    where : str
        For messages.
    made : Made
        The model with its preprocessing.
    names : tuple of str
        The model's inputs, in order; empty where it takes any.
    targets : tuple of str
        Columns that are targets; empty: those of the usual names.
    tokens : int
        Length to which texts are cut and filled.
    """

    where: str
    made: Made
    names: tuple[str, ...]
    targets: tuple[str, ...] = ()
    tokens: int = 128


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """Loaders or splits by part, and what has to be said about them."""

    parts: Mapping[str, Any]
    notes: tuple[str, ...] = ()


class DataSource(Protocol):
    """Data that a text names."""

    def unavailable(self) -> str | None:
        """Why the data cannot be had here, with the remedy, or None."""
        ...

    def load(self, wanted: Wanted) -> Loaded:
        """The data as the model takes them."""
        ...


def find(text: str) -> DataSource:
    """The data source that a text names.

    Raises
    ------
    InputError
        If it is none of the forms.
    """
    from harness.tasks.sets import built_in, folders, hub, own, tables

    if text in BUILT_IN:
        return built_in.BuiltIn(text)
    if ":" in text and not Path(text).exists():
        return own.Own(text)
    place = located(text)
    if text.lower().endswith(TABLES):
        return tables.Tables(place or Path(text))
    if text == "imagenet":
        return folders.Folder(place, imagenet=True)
    if place is None or not place.is_dir():
        raise InputError(f"The data {shown(text)} are not known. {suggestion(text, BUILT_IN)} Forms: {FORMS}.")
    if (place / "dataset_dict.json").is_file() or (place / "dataset_info.json").is_file():
        return hub.Dataset(place)
    parts = ("train", "validation", "val", "test")
    if any((place / f"{part}{suffix}").is_file() for part in parts for suffix in TABLES):
        return tables.Tables(place)
    return folders.Folder(place)


def located(text: str) -> Path | None:
    """The file or folder itself, or the one of that name in a folder of ``ASSAY_DATA``."""
    own = Path(text).expanduser()
    for path in (own, *(folder / text for folder in paths.data_folders())):
        if path.exists():
            return path.absolute()
    return None
