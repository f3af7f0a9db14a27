from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from harness.errors import DataError
from harness.files import read_regular


def test_a_regular_file_is_read_through_links_up_to_the_limit(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert read_regular(tmp_path / "link", 5) == b"12345"
    with pytest.raises(DataError, match="larger than 4 bytes"):
        read_regular(tmp_path / "link", 4)


def test_what_is_no_regular_file_is_named_without_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's path may have 100 characters
    os.mkfifo("pipe")
    Path("folder").mkdir()
    Path("loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        for name, words in (
            ("pipe", "is a named pipe"),
            ("folder", "is a folder"),
            ("loop", "cannot be read"),
            ("socket", "cannot be read"),
            ("nothing", "No such file"),
            ("/dev/null", "is a device"),
            ("a\0b", "cannot be read"),
        ):
            with pytest.raises(DataError, match=words):
                read_regular(Path(name), 10)
