from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.text import cut, printable, shown


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("größe 🔥 $x_1$ 'q'", "größe 🔥 $x_1$ 'q'"),
        ("\x1b[31mx\a", r"\x1b[31mx\x07"),
        ("a\nb\tc", r"a\nb\tc"),
        ("a\u202eb\u2028c\ud800", r"a\u202eb\u2028c\ud800"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(text: str, expected: str) -> None:
    assert printable(text) == expected


@given(st.text())
def test_printable_text_is_printable_and_what_was_so_stays(text: str) -> None:
    assert printable(text).isprintable()
    assert printable(printable(text)) == printable(text)
    assert printable(text) == text or not text.isprintable()


class _Broken:
    def __repr__(self) -> str:
        raise ZeroDivisionError


def test_any_value_can_be_shown() -> None:
    deep: list[Any] = []
    for _ in range(10_000):
        deep = [deep]
    assert shown("a\nb") == r"'a\nb'"
    assert shown(10**5000) == "<int that cannot be shown: ValueError>"
    assert shown(deep) == "<list that cannot be shown: RecursionError>"
    assert shown(_Broken()) == "<_Broken that cannot be shown: ZeroDivisionError>"
    assert len(shown("x" * 10**6)) == 200


def test_cutting_says_that_it_was_cut() -> None:
    assert cut("abc", 3) == "abc"
    assert cut("abcd", 3) == "ab…"
