"""The schema as Python sees it: its text, its version, and the documentation of its columns.

The text is ``schema.sql`` with what :mod:`results.columns` says of the columns of ``runs`` filled in.
"""

from __future__ import annotations

import functools
import hashlib
import re
from dataclasses import dataclass
from importlib import resources
from typing import Any

from results.columns import COLUMNS
from results.quantities import Column

VERSION = 3
"""Version of the tables. Views may change without it; they are replaced when the schema's text changes."""

_OBJECT = re.compile(r"^CREATE (?:OR REPLACE )?(TABLE|VIEW) (\w+) .*?-- (.+)$")
_COLUMN = re.compile(r"^ {4}(?:.*[ .])?(\w+),? -- (.+)$")
_TABLE_COLUMN = re.compile(r"^ {4}(\w+) [A-Z].*, -- (.+)$")


@dataclass(frozen=True)
class Documented:
    """A table or view with what ``schema.sql`` says of it.

    Parameters
    ----------
    kind : {"TABLE", "VIEW"}
    name : str
    text : str
        What one row is.
    columns : mapping of str to str
        Column name to description with unit, in order.
    """

    kind: str
    name: str
    text: str
    columns: dict[str, str]


@functools.cache
def sql() -> str:
    """The statements that make the database."""
    text = resources.files("results").joinpath("schema.sql").read_text(encoding="utf-8")
    told = [column for column in COLUMNS if column.why]
    filled = {
        "fields": [f"{c.name} {c.field}, -- {c.text} ({c.unit})" for c in COLUMNS if c.field],
        "columns": [f"{c.sql} AS {c.name}," for c in COLUMNS if c.sql],
        "described": [f"{c.name}{_comma(c)} -- {c.text} ({c.unit})" for c in COLUMNS],
        "reasons": [_reason(column) + ("," if column is not told[-1] else "") for column in told],
    }
    for name, lines in filled.items():
        text = re.sub(rf"^( *)/\* {name} \*/$", lambda m, lines=lines: _indented(m[1], lines), text, flags=re.MULTILINE)  # type: ignore[misc]
    return text


def _comma(column: Column) -> str:
    return "" if column is COLUMNS[-1] else ","


def _reason(column: Column) -> str:
    """The entry of a column in the JSON object of reasons: its reason where it is NULL, else NULL."""
    why = column.why[0] if len(column.why) == 1 else f"coalesce({', '.join(column.why)})"
    return f"'{column.name}', CASE WHEN {column.name} IS NULL THEN {why} END"


def _indented(indent: str, lines: list[str]) -> str:
    return "\n".join(indent + line for line in lines)


@functools.cache
def sql_sha256() -> str:
    """Sha256 (hex) of :func:`sql`."""
    return hashlib.sha256(sql().encode()).hexdigest()


@functools.cache
def documented() -> dict[str, Documented]:
    """Every table and view by name; ``latest`` has the columns of ``runs``."""
    found: dict[str, Documented] = {}
    current: Documented | None = None
    for line in sql().splitlines():
        if match := _OBJECT.match(line):
            current = Documented(match[1], match[2], match[3], {})
            found[current.name] = current
        elif current and (match := (_TABLE_COLUMN if current.kind == "TABLE" else _COLUMN).match(line)):
            current.columns[match[1]] = match[2]
    found["latest"].columns.update(found["runs"].columns)
    return found


def tables() -> list[str]:
    """Names of the tables, in the order of ``schema.sql``."""
    return [item.name for item in documented().values() if item.kind == "TABLE"]


def _statements() -> list[str]:
    """The statements of ``schema.sql``; a semicolon at a line's end closes one, wherever it is not in a comment."""
    parts, lines = [], []
    for line in sql().splitlines():
        lines.append(line)
        if line.rstrip().endswith(";") and not line.lstrip().startswith("--"):
            parts.append("\n".join(lines))
            lines = []
    return parts


def create(connection: Any) -> None:
    """Create everything in an empty database, with the columns' descriptions as comments."""
    connection.begin()
    connection.execute(sql())
    connection.execute("".join(map(_comments, documented().values())))
    connection.execute("INSERT INTO schema_version VALUES (?, ?)", [VERSION, sql_sha256()])
    connection.commit()


def refresh_views(connection: Any) -> None:
    """Replace views and macros, in one transaction, where the database's are another text's."""
    if connection.execute("SELECT views_sha256 FROM schema_version").fetchall() == [(sql_sha256(),)]:
        return
    connection.begin()
    for statement in _statements():
        if "CREATE OR REPLACE" in statement:
            connection.execute(statement)
    connection.execute("".join(_comments(item) for item in documented().values() if item.kind == "VIEW"))
    connection.execute("UPDATE schema_version SET views_sha256 = ?", [sql_sha256()])
    connection.commit()


def shadow_views(connection: Any) -> None:
    """Put Assay's own views and macros before those of the file, for this connection only.

    What a file says of its views is anybody's SQL, and may be of another version of Assay.
    """
    connection.begin()
    for statement in _statements():
        if "CREATE OR REPLACE" in statement:
            connection.execute(statement.replace("CREATE OR REPLACE", "CREATE OR REPLACE TEMP", 1))
    connection.commit()


def _comments(item: Documented) -> str:
    """The statements that put a table's or view's documentation into the database."""

    def quoted(text: str) -> str:
        return "'" + text.replace("'", "''") + "'"

    lines = [f"COMMENT ON {item.kind} {item.name} IS {quoted(item.text)};\n"]
    if item.name != "latest":  # its columns are those of runs; a comment on a view's column binds the whole view
        lines += [f"COMMENT ON COLUMN {item.name}.{name} IS {quoted(text)};\n" for name, text in item.columns.items()]
    return "".join(lines)


def readme() -> str:
    """The schema as Markdown: one table of columns for each table and view."""
    lines = [
        f"# Assay results, schema version {VERSION}",
        "",
        "One Parquet file a table, the views `runs` and `latest` included as they were computed at export. `records/`",
        'holds the record files that everything was taken from: `{"sha256": ..., "record": {...}}`, the hash being',
        "that of the record's canonical JSON (sorted keys, no spaces, UTF-8). `assay db merge` takes this folder up",
        "into another database.",
        "",
    ]
    for item in documented().values():
        lines += [f"## {item.name}", "", item.text, "", "| column | meaning (unit) |", "|---|---|"]
        lines += [f"| {column} | {text.replace('|', chr(92) + '|')} |" for column, text in item.columns.items()]
        lines.append("")
    return "\n".join(lines)
