"""Every exception that Assay raises on purpose.

::

    AssayError
    ├── InputError            the user gave something that cannot be run (exit code 2)
    │   ├── SpecError         a spec file or a spec's value
    │   ├── UnknownName       a name that is not registered, with the nearest one
    │   └── DataError         a data file that is missing, truncated or has another hash
    ├── Unsupported           this method or runtime cannot do this model: a recorded outcome
    ├── Unavailable           something is not installed or not present: a recorded outcome
    ├── ExportError           the model cannot be brought into the runtime's format
    ├── NotFinite             the model returned NaN or infinity
    └── StoreError            the database or the disk refused
        └── DatabaseBusy      another process holds the database (retry later)

An ``AssayError`` carries its remedy in its message and is shown without a traceback;
anything else that escapes is a bug and keeps its traceback in the record.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AssayError(Exception):
    """Base of all of Assay's own errors."""

    exit_code = 1


class InputError(AssayError):
    """The request cannot be run as given; nothing was changed."""

    exit_code = 2


class SpecError(InputError):
    """A spec is not valid: the message names file, key, value and what is allowed."""


class UnknownName(InputError):
    """A name that no registry has."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        super().__init__(f"Unknown {kind} {name!r}. {suggestion(name, known)}")


class DataError(InputError):
    """A data file is missing, truncated, or not the file that was asked for."""


class Unsupported(AssayError):
    """The method or the runtime cannot treat this model; the reason says what and where."""


class Unavailable(AssayError):
    """A runtime, data set or device is not here; the reason says how to get it."""


class ExportError(AssayError):
    """The model could not be written in the runtime's format."""


class NotFinite(AssayError):
    """The model's outputs hold NaN or infinity, so no number about it would mean anything."""


class StoreError(AssayError):
    """The database or the disk under it refused; the record file, if written, is kept."""

    exit_code = 2


class DatabaseBusy(StoreError):
    """Another process holds the database file."""


def suggestion(name: str, known: Iterable[str]) -> str:
    """Return 'Did you mean ...?' for the nearest known name, and the list of all.

    Parameters
    ----------
    name : str
        What the user wrote.
    known : iterable of str
        The allowed names.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return f"{hint}Allowed: {', '.join(names) or '(none)'}."
