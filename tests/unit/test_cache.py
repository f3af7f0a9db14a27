from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import Any

import pytest

from harness import cache
from harness.errors import StoreError


def _fill(content: str) -> Any:
    def fill(folder: Path) -> dict[str, Any]:
        (folder / "file").write_text(content)
        return {"content": content}

    return fill


def test_computed_once(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "abc"
    first, cached = cache.obtain(folder, _fill("one"))
    assert (first["content"], cached) == ("one", False)
    again, cached = cache.obtain(folder, _fill("two"))
    assert (again, cached) == (first, True)
    assert (folder / "file").read_text() == "one"


def test_older_than_asked_for_is_computed_again(tmp_path: Path) -> None:
    folder = tmp_path / "abc"
    cache.obtain(folder, _fill("one"))
    meta, cached = cache.obtain(folder, _fill("two"), not_before=time.time() + 60)
    assert (meta["content"], cached) == ("two", False)
    assert (folder / "file").read_text() == "two"


def test_a_failed_filling_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> dict[str, Any]:
        (folder / "half").write_text("x")
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        cache.obtain(tmp_path / "abc", fail)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_a_clear_error(tmp_path: Path) -> None:
    def full(folder: Path) -> dict[str, Any]:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StoreError, match=r"No space left on device.*ASSAY_HOME"):
        cache.obtain(tmp_path / "abc", full)


def test_a_damaged_description_counts_as_missing(tmp_path: Path) -> None:
    folder = tmp_path / "abc"
    cache.obtain(folder, _fill("one"))
    (folder / cache.META).write_text('{"created"')
    assert cache.obtain(folder, _fill("two"))[1] is False


def test_only_old_leftovers_are_removed(tmp_path: Path) -> None:
    for name in ("tmp-old", "tmp-new", "abc"):
        (tmp_path / "models" / name).mkdir(parents=True)
    os.utime(tmp_path / "models" / "tmp-old", (0, 0))
    os.utime(tmp_path / "models" / "abc", (0, 0))
    assert cache.remove_leftovers(tmp_path) == 1
    assert {path.name for path in (tmp_path / "models").iterdir()} == {"tmp-new", "abc"}
