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
import re
from collections.abc import Iterable

from harness.text import SHOWN, cut, printable, shown

_LINES = 3
_CHARACTERS = 500
_UNFINISHED = (":", "!", ",", ";", "(", "[", "{")
# What torch and its exporter write around the line that explains: how to ask for more, and where they were.
_NOISE = re.compile(
    r"(For (more|extended|C\+\+)\b|If you suspect|The error above occurred|The following call raised|Set TORCH"
    r"|Traceback|File \"|Suggested fixes|Exception from )"
)
_ADVICE = re.compile(r"\s*For more (information|details|debugging help)\b.*$")


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
        super().__init__(f"Unknown {kind} {shown(name)}. {suggestion(name, known)}")


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
    near = difflib.get_close_matches(name[:SHOWN], names, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return f"{hint}Allowed: {', '.join(names) or '(none)'}."


def explanation(error: BaseException) -> str:
    r"""What went wrong, in as many lines of the error's text as it takes to say it, joined to one.

    Many libraries write a heading first and the reason below it ("Constraints violated (batch)!", "... failed with
    OpConversionFailure:"): a line that ends unfinished takes the next one with it, up to three. Advice on how to log
    more is left out.

    Parameters
    ----------
    error : BaseException
        Any error; its ``str`` may be empty, huge or broken.

    Returns
    -------
    str
        One line of at most 500 characters; it begins with the error's type unless the error is Assay's own.

    Examples
    --------
    >>> explanation(ValueError("Error in loading:\n\n  the key 'a' is missing\nand a tail"))
    "ValueError: Error in loading: the key 'a' is missing"
    """
    return cut(printable(_explained(error, depth=_LINES)), _CHARACTERS)


def _explained(error: BaseException, depth: int) -> str:
    kind = "" if isinstance(error, AssayError) else type(error).__name__
    text = _useful(error)
    below = error.exceptions[0] if isinstance(error, BaseExceptionGroup) else error.__cause__
    needs_more = not text or text.endswith(":") or isinstance(error, BaseExceptionGroup)
    if needs_more and below is not None and depth:
        text = f"{text} {_explained(below, depth - 1)}".strip()
    return ": ".join(part for part in (kind, text) if part) or type(error).__name__


def _useful(error: BaseException) -> str:
    try:
        # A megabyte of text is cut before it is split.
        lines = str(error)[:20_000].splitlines()
    except Exception:  # noqa: BLE001  a foreign __str__ may raise anything
        return ""
    useful = (_ADVICE.sub("", line.strip()) for line in lines)
    kept: list[str] = []
    for line in useful:
        if not any(sign.isalnum() for sign in line) or _NOISE.match(line):
            continue
        kept.append(line.removeprefix("- "))
        if len(kept) == _LINES or not line.endswith(_UNFINISHED):
            break
    return " ".join(kept)
