from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from harness import environment, provenance


def _hash(folder: Path, files: dict[str, str], module: str) -> str:
    for name, text in files.items():
        (folder / name).write_text(text)
    program = f"from harness.provenance import source_hash; print(source_hash({module!r}))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=folder,
        env={"PYTHONPATH": f"{folder}:{Path(provenance.__file__).parents[1]}", "PATH": ""},
    )
    return done.stdout.strip()


def test_wording_does_not_change_the_hash_and_code_does(tmp_path: Path) -> None:
    base = _hash(tmp_path, {"mine.py": "def f(x):\n    return x + 1\n"}, "mine")
    worded = _hash(
        tmp_path, {"mine.py": '"""Doc."""\n\ndef f(x):\n    """Add."""\n    # why\n    return x + 1\n'}, "mine"
    )
    changed = _hash(tmp_path, {"mine.py": "def f(x):\n    return x + 2\n"}, "mine")
    assert changed != base
    # A docstring where there was none adds an (empty) statement; rewording one changes nothing.
    reworded = _hash(tmp_path, {"mine.py": '"""Text."""\n\ndef f(x):\n    """Sum."""\n    return x + 1\n'}, "mine")
    assert reworded == worded == base


def test_code_that_is_imported_counts(tmp_path: Path) -> None:
    files = {"mine/__init__.py": "", "mine/a.py": "from mine import b\n", "mine/b.py": "X = 1\n"}
    (tmp_path / "mine").mkdir()
    first = _hash(tmp_path, files, "mine.a")
    assert _hash(tmp_path, {"mine/b.py": "X = 2\n"}, "mine.a") != first


@pytest.mark.parametrize(
    "line", ["from . import b", "from .b import X", "from ..mine.b import X", "from .deep import c"]
)
def test_code_that_is_imported_relatively_counts(tmp_path: Path, line: str) -> None:
    (tmp_path / "top/mine/deep").mkdir(parents=True)
    files = {
        "top/__init__.py": "",
        "top/mine/__init__.py": "",
        "top/mine/a.py": f"{line}\n",
        "top/mine/b.py": "X = 1\n",
        "top/mine/deep/__init__.py": "from . import c\n",
        "top/mine/deep/c.py": "from ..b import X\n",
    }
    first = _hash(tmp_path, files, "top.mine.a")
    assert _hash(tmp_path, {"top/mine/b.py": "X = 2\n"}, "top.mine.a") != first


def test_the_fine_print_of_this_machine_is_complete() -> None:
    machine = environment.machine()
    assert machine["cores"] >= 1
    assert machine["memory_bytes"] > 1 << 28
    assert len(machine["machine_id"]) == 16
    assert provenance.versions(["numpy", "no-such-distribution"]).keys() == {"numpy"}


def test_a_foreign_repository_is_not_recorded_as_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    package = tmp_path / "site-packages" / "harness"
    package.mkdir(parents=True)
    monkeypatch.setattr(provenance, "__file__", str(package / "provenance.py"))
    provenance.git_state.cache_clear()
    try:
        assert provenance.git_state() == (None, None)
    finally:
        provenance.git_state.cache_clear()
