r"""Foreign text in what Assay prints: one function a format, so that a name is shown as a name and nothing obeys it.

Names, reasons and warnings may come from anybody's record. Line breaks, control characters and marks that turn the
direction of writing are written as escapes (``\n``, ``\x1b``, ``\u202e``) in every format.
"""

from __future__ import annotations

import re
from typing import Any

from harness.text import cut, printable

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_FORMULA = tuple("=+-@＝＋－＠")
_PLOT_CHARACTERS = 120


def terminal(text: str, *, lines: bool = False) -> str:
    """Text for a terminal.

    Parameters
    ----------
    text : str
    lines : bool
        Whether its line breaks and tabs stay: of a traceback, not of a cell.
    """
    if not lines:
        return printable(text)
    return "\n".join(printable(line.expandtabs()) for line in text.split("\n"))


def json_text(text: str) -> str:
    """JSON that a terminal may print: what is not printable is written as JSON's own escapes."""

    def escaped(sign: str) -> str:
        units = sign.encode("utf-16-be", "surrogatepass")
        return "".join(f"\\u{units[i]:02x}{units[i + 1]:02x}" for i in range(0, len(units), 2))

    return "".join(sign if sign.isprintable() or sign == "\n" else escaped(sign) for sign in text)


_MARKDOWN = re.compile(
    r"""
      \\(?=[!-/:-@\[-`{-~])          # a backslash that would escape what follows
    | [|`*~$]
    | (?<![0-9A-Za-z])_ | _(?![0-9A-Za-z])
    | (?<=\])[(\[:]                  # the address of a link
    | <(?=[A-Za-z/!?])               # HTML
    | &(?=\#|\w+;)
    """,
    re.VERBOSE,
)


def markdown(text: str) -> str:
    """Text for a cell or a line of Markdown, as GitHub reads it."""

    def escaped(match: re.Match[str]) -> str:
        sign = match[0]
        return {"<": "&lt;", "&": "&amp;"}.get(sign, f"\\{sign}")

    return _MARKDOWN.sub(escaped, printable(text))


_TEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "×": r"$\times$",
    "Δ": r"$\Delta$",
    "±": r"$\pm$",
    "–": "--",
    "−": "$-$",
}


def latex(text: str) -> str:
    r"""Text for a cell or a line of LaTeX.

    A bracket or star in the beginning would be read as an argument of the ``\\`` before it.
    """
    found = "".join(_TEX.get(sign, sign) for sign in printable(text))
    return f"{{{found[0]}}}{found[1:]}" if found.startswith(("[", "*")) else found


def csv_cell(value: Any) -> str:
    """A value for a cell of CSV: raw, except that no spreadsheet takes text for a formula.

    An apostrophe before it is what spreadsheets themselves write for "this is text".
    """
    if not isinstance(value, str):
        return "" if value is None else str(value)
    text = printable(value)
    return f"'{text}" if text.lstrip().startswith(_FORMULA) and not _NUMBER.fullmatch(text) else text


def plot_text(text: str) -> str:
    """Text for a plot, of a length that fits one; matplotlib leaves out labels that begin with an underscore."""
    shown = cut(printable(text), _PLOT_CHARACTERS)
    return f" {shown}" if shown.startswith("_") else shown
