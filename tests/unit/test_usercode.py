from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from harness import usercode
from harness.errors import InputError, Unavailable
from harness.executor import Worker
from harness.provenance import source_hash
from tests.unit.jobs_for_workers import Call

TAKEN = ("json", "methods", "hardware", "results", "harness", "torch")


def _write(folder: Path, name: str, text: str) -> Path:
    path = folder / f"{name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))
    return path


def test_a_module_of_the_current_folder_is_found_under_its_own_name(tmp_path: Path) -> None:
    file = _write(tmp_path, "plain_module", "def make(): ...")
    found = usercode.find("plain_module:make")
    assert found.__module__ == "plain_module"
    assert Path(found.__code__.co_filename) == file
    assert usercode.package("plain_module:make") == "plain_module"
    # One and the same module for whoever imports it.
    assert importlib.import_module("plain_module").make is found


@pytest.mark.parametrize("name", TAKEN)
def test_a_file_whose_name_is_taken_is_found_and_replaces_nothing(tmp_path: Path, name: str) -> None:
    before = importlib.import_module(name)
    _write(tmp_path, name, "import json, torch, harness\nTEXT = json.dumps([1])\nclass Own: ...")
    found = usercode.find(f"{name}:Own")
    assert found.__module__ == f"assay_user.{name}"
    assert usercode.package(f"{name}:Own") == "assay_user"
    assert importlib.import_module(name) is before
    assert sys.modules[f"assay_user.{name}"].json is json
    # Stored models name their classes by module: it is found again, by name, and so is its source.
    assert importlib.import_module(f"assay_user.{name}").Own is found
    first = source_hash(f"assay_user.{name}")
    _write(tmp_path, name, "class Own: changed = 1")
    source_hash.cache_clear()
    assert source_hash(f"assay_user.{name}") != first


def test_a_folder_whose_name_is_taken_is_found_too(tmp_path: Path) -> None:
    _write(tmp_path, "methods/mine", "from assay_user.methods.beside import Base\nclass Own(Base): ...")
    _write(tmp_path, "methods/beside", "class Base: ...")
    _write(tmp_path, "hardware/__init__", "from . import beside\nclass Own(beside.Base): ...")
    _write(tmp_path, "hardware/beside", "class Base: ...")
    assert usercode.find("methods.mine:Own").__module__ == "assay_user.methods.mine"
    assert usercode.find("hardware:Own").__bases__[0].__module__ == "assay_user.hardware.beside"
    assert importlib.import_module("methods.baseline").__name__ == "methods.baseline"


def test_what_is_installed_is_found_where_the_folder_has_no_such_file() -> None:
    from methods.baseline import Baseline

    assert usercode.find("methods.baseline:Baseline", "method") is Baseline
    assert usercode.package("methods.baseline:Baseline") == "methods"


def test_names_that_are_no_identifiers(tmp_path: Path) -> None:
    _write(tmp_path, "18_loaders", "def make(): ...")
    _write(tmp_path, "1x1-conv", "def make(): ...")
    assert usercode.find("18_loaders:make").__module__ == "18_loaders"
    assert usercode.find("1x1-conv:make").__module__ == "1x1-conv"


def test_another_folder_has_other_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in (1, 2):
        folder = tmp_path / str(number)
        _write(folder, "main_module", "import helper_module, json\nfrom helper_module import NUMBER")
        _write(folder, "helper_module", f"NUMBER = {number}")
        _write(folder, "methods", f"NUMBER = {number}")
    for number in (1, 2, 1):
        monkeypatch.chdir(tmp_path / str(number))
        assert usercode.find("main_module:NUMBER") == number
        assert usercode.find("methods:NUMBER") == number


BAD = {
    "exits": ("import sys\nsys.exit('no GPU')", "importing 'exits' ended the program (sys.exit('no GPU'))"),
    "parses": (
        "import argparse\np = argparse.ArgumentParser()\np.add_argument('--data', required=True)\np.parse_args()",
        "ended the program (sys.exit(2)). Put what only a script does under `if __name__",
    ),
    "raises": ("raise OSError('no disk')", "raised OSError: no disk"),
    "interrupts": ("raise KeyboardInterrupt", "raised KeyboardInterrupt"),
    "asks": ("input('name? ')", "waits for input, and there is none"),
    "breaks_off": ("import io, pdb\npdb.Pdb(stdout=io.StringIO()).set_trace()\nx = 1", "raised BdbQuit"),
    "needs": ("import no_such_package_here", "raised ModuleNotFoundError: No module named 'no_such_package_here'"),
    "recurses": ("def f(): f()\nf()", "raised RecursionError"),
    "malformed": ("def make(:", "raised SyntaxError"),
    "no_utf8": (None, "raised SyntaxError"),
    "lacks": ("def make_model(): ...", "has no 'make'. Did you mean 'make_model'?"),
}


@pytest.mark.parametrize("name", BAD)
def test_an_import_that_fails_in_any_way_is_the_users_error(tmp_path: Path, name: str) -> None:
    text, words = BAD[name]
    path = tmp_path / f"{name}.py"
    path.write_bytes(b"x = '\xff'" if text is None else text.encode())
    arguments, given = sys.argv, sys.stdin
    with pytest.raises(InputError) as caught:
        usercode.find(f"{name}:make")
    assert str(caught.value).startswith(f"task '{name}:make': ")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert (sys.argv, sys.stdin) == (arguments, given)


def test_a_module_that_is_nowhere_is_said_with_the_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"neither far/away\.py in .* nor an installed one") as caught:
        usercode.find("far.away:make", "hardware")
    assert str(tmp_path) in str(caught.value)


def test_what_assay_itself_says_passes_through(tmp_path: Path) -> None:
    _write(tmp_path, "lacking", "from harness.errors import Unavailable\nraise Unavailable('pip install timm')")
    with pytest.raises(Unavailable, match="pip install timm"):
        usercode.find("lacking:make")


def test_an_import_sees_no_arguments_and_keeps_standard_output_clean(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["assay", "run", "x.toml"])
    _write(
        tmp_path,
        "script",
        "import argparse, sys\np = argparse.ArgumentParser()\np.add_argument('--width', type=int, default=16)\n"
        "WIDTH = p.parse_args().width\nREAD = sys.stdin.read()\nprint('chatter')",
    )
    assert usercode.find("script:WIDTH") == 16
    assert usercode.find("script:READ") == ""
    out, err = capsys.readouterr()
    assert (out, err) == ("", "chatter\n")


def test_files_beside_are_read_by_relative_paths(tmp_path: Path) -> None:
    (tmp_path / "width.txt").write_text("16")
    _write(tmp_path, "relative", "from pathlib import Path\nWIDTH = int(Path('width.txt').read_text())")
    assert usercode.find("relative:WIDTH") == 16


def test_a_ctrl_c_at_the_keyboard_is_no_error_of_the_users() -> None:
    before = signal.getsignal(signal.SIGINT)
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt), usercode.blamed("calling it"):
        time.sleep(20)
    timer.join()
    assert signal.getsignal(signal.SIGINT) is before


def test_a_deleted_current_folder_is_no_traceback(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    root = str(Path(__file__).parents[2])
    program = (
        "import os, sys\nos.rmdir(os.getcwd())\n"
        "from harness import usercode\nfrom harness.errors import InputError\n"
        "try:\n    usercode.find('mine:make')\nexcept InputError as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", program],
        cwd=gone,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "there is no module 'mine'" in done.stdout


def test_a_worker_finds_modules_of_the_current_folder_by_the_same_names(tmp_path: Path) -> None:
    _write(tmp_path, "methods", "class Own: ...")
    _write(tmp_path, "only_here", "class Own: ...")
    with Worker(threads=1) as worker:
        for name, file in (("assay_user.methods", "methods.py"), ("only_here", "only_here.py")):
            job = Call(name="import", arguments={"name": name})
            assert worker.run(job, timeout=60).value == str(tmp_path / file)
