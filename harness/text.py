"""Values and foreign text in messages: short, on one line, and harmless in a terminal."""

from __future__ import annotations

from typing import Any

SHOWN = 200
"""Characters of a value that a message shows."""


def printable(text: str) -> str:
    r"""The text with whatever a terminal would obey instead of show written as an escape (``\x1b``, ``\u202e``).

    Line breaks are escaped too, so that one name stays one line; letters of all scripts and emoji stay as they are.
    """
    return "".join(sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text)


def shown(value: Any, limit: int = SHOWN) -> str:
    """The ``repr`` of a value for a message: never longer than ``limit`` characters, and never an exception."""
    try:
        text = printable(repr(value))
    except Exception as error:  # noqa: BLE001  a foreign __repr__, a huge integer, a nesting too deep for the stack
        text = f"<{type(value).__name__} that cannot be shown: {type(error).__name__}>"
    return cut(text, limit)


def cut(text: str, limit: int) -> str:
    """The text, or as much of it as ``limit`` allows, with an ellipsis."""
    return text if len(text) <= limit else text[: limit - 1] + "…"
