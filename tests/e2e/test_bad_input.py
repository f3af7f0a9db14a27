"""Every bad input: a clear error, exit code 2 (or a recorded reason), and an intact database."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.command import assay, environment, rows, spec


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('task = "digits-cn"', ["Unknown task 'digits-cn'. Did you mean 'digits-cnn'?"]),
        ('task = "digits-cnn"\nmethod = "magnitud"', ["Unknown method 'magnitud'. Did you mean 'magnitude'?"]),
        ('task = "digits-cnn"\nmetod = "baseline"', ["unknown key 'metod'", "Did you mean 'method'?"]),
        ('task = "digits-cnn"\nmethod = {name = "magnitude", sparsity = 1.5}', ["sparsity", "1.5"]),
        ('task = "digits-cnn"\nbatch_size = -4', ["batch_size", "-4"]),
        ("task = [", ["not valid TOML"]),
        ('task = "no_such_module_here:make"', ["no_such_module_here"]),
    ],
)
def test_a_spec_that_cannot_be_run(home: Path, content: str, words: list[str]) -> None:
    path = home.parent / "bad.toml"
    path.write_text(content)
    for command in ("run", "validate"):
        _, err = assay(home, command, str(path), code=2)
        for word in ["Error:", *words]:
            assert word in err
    assert not (home / "assay.duckdb").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "no-such-spec"],
        ["runn"],
        ["ls", "taks"],
        ["run", "quickstart", "--timeout", "-1"],
        ["reproduce", "neuron-merging-2021"],
        ["reproduce", "neuron-merging-2020", "--set", "criterion=l3-norm"],
        ["show", "nothing"],
        ["table"],
        ["plot", "latency", "accuracy"],
        ["db", "query", "SELECT 1"],
    ],
)
def test_a_command_that_cannot_be_run(home: Path, arguments: list[str]) -> None:
    _, err = assay(home, *arguments, code=2)
    assert err.strip()
    assert not (home / "assay.duckdb").exists()


HOSTILE = {
    "runs a program": 'method = {name = "subprocess:getoutput", cmd = "touch PWNED"}',
    "runs a program as hardware": 'hardware = {name = "subprocess:getoutput", cmd = "touch PWNED"}',
    "exits at once": 'method = {name = "os:_exit", status = 0}',
    "exits": 'method = {name = "sys:exit"}',
    "asks": 'method = "builtins:input"',
    "debugs": 'method = "builtins:breakpoint"',
    "is a grid without end": f"seed = {list(range(1000))}\nthreads = {list(range(1, 1001))}",
    "is nested": f"name = {'[' * 5000}",
    "has a key without end": f"[{'.'.join('a' * 100_000)}]",
    "has an integer without end": f"seed = {'9' * 5000}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_spec_that_attacks_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    path, home = tmp_path / "hostile.toml", tmp_path / "home"
    path.write_text(f'task = "digits-cnn"\n{HOSTILE[name]}\n')
    out, err = assay(home, "validate", str(path), code=2)
    assert out == ""
    assert err.startswith(f"Error: {path}: ")
    assert err.count("\n") == 1
    assert sorted(item.name for item in tmp_path.iterdir()) == ["hostile.toml"]


def test_names_cannot_steer_the_terminal(tmp_path: Path) -> None:
    path = tmp_path / "names.toml"
    path.write_text('task = "digits-cnn"\nname = "\\u001b[31mx\\n| a |\\u202e größe"\n')
    out, _ = assay(tmp_path / "home", "validate", str(path))
    assert out == "\\x1b[31mx\\n| a |\\u202e größe: valid, 1 cells\n"
    path.write_text('task = "\\u001b[31mdigits"\n')
    _, err = assay(tmp_path / "home", "validate", str(path), code=2)
    assert "\x1b" not in err
    # A terminal that knows no such sign shows the rest.
    path.write_text('task = "digits-cnn"\nname = "fire 🔥"\n')
    out, _ = assay(tmp_path / "home", "validate", str(path), PYTHONIOENCODING="latin-1")
    assert out == "fire \\U0001f525: valid, 1 cells\n"


def test_a_users_json_file_is_not_taken_for_pythons(tmp_path: Path) -> None:
    for name in ("json", "methods", "hardware", "tomllib", "click"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong file')")
    path = tmp_path / "plain.toml"
    path.write_text('task = "digits-cnn"\n')
    assert "1 cells" in assay(tmp_path / "home", "validate", str(path))[0]


def test_a_current_folder_that_was_deleted_is_said(tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    program = f"cd {gone} && rmdir {gone} && exec {sys.executable} -P -m harness validate quickstart"
    done = subprocess.run(
        ["sh", "-c", program], env=environment(tmp_path / "home"), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "Error: the current folder no longer exists. Change to one that does.\n"


def test_a_pipe_as_a_spec_does_not_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.toml")
    _, err = assay(tmp_path / "home", "run", str(tmp_path / "pipe.toml"), code=2)
    assert "is a named pipe" in err


def test_a_runtime_that_is_not_installed_is_a_stated_reason(home: Path) -> None:
    out, _ = assay(home, "run", spec(home.parent, "missing"), "--json")
    (row,) = json.loads(out)
    assert row["status"] == "unavailable"
    assert "pip install" in row["reason"]


USER = """
import torch
from torch import nn

def raises():
    raise RuntimeError("my own mistake")

class Nan(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
    def forward(self, x):
        return self.linear(x) * float("nan")

class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
    def forward(self, x):
        if x.sum() > 0:
            return self.linear(x)
        return -self.linear(x)

class Good(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 3)
    def forward(self, x):
        return self.linear(x)

def _batches(n):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(20, 4, generator=generator), torch.arange(20) % 3) for _ in range(n)]

def nan():
    return Nan(), {"test": _batches(2), "train": _batches(2), "validation": _batches(1)}

def branches():
    return Branches(), {"test": _batches(2), "train": _batches(2), "validation": _batches(1)}

def good():
    return Good(), {"test": _batches(2), "train": _batches(2), "validation": _batches(1)}
"""


@pytest.fixture
def user(home: Path) -> Path:
    (home.parent / "users_own.py").write_text(USER)
    return home


def _run_user(home: Path, function: str, hardware: str, code: int) -> dict[str, object]:
    path = home.parent / "user.toml"
    path.write_text(
        f'task = "users_own:{function}"\nhardware = "{hardware}"\n[measure]\nmin_queries = 100\nmin_seconds = 0.01\n'
    )
    out, _ = assay(home, "run", str(path), "--json", code=code)
    (row,) = json.loads(out)
    return dict(row)


def test_the_users_own_model(user: Path) -> None:
    row = _run_user(user, "good", "torch", 0)
    assert row["status"] == "ok", row["reason"]
    assert row["n_examples"] == 40
    assert row["accuracy"] is not None


@pytest.mark.parametrize(
    ("function", "hardware", "words"),
    [("raises", "torch", "my own mistake"), ("nan", "torch", "NaN"), ("branches", "onnxruntime", "export")],
)
def test_a_users_model_that_cannot_be_measured_is_a_recorded_reason(
    user: Path, function: str, hardware: str, words: str
) -> None:
    if hardware == "onnxruntime":
        pytest.importorskip("onnxruntime")
    row = _run_user(user, function, hardware, 1)
    assert row["status"] == "failed"
    assert words in str(row["reason"])
    assert rows(user, "SELECT count(*) AS n FROM runs")[0]["n"] == 1


def test_a_data_file_that_is_missing_truncated_or_altered(home: Path) -> None:
    source = Path("/usr/share/datasets/fashion-mnist")
    if not source.is_dir():
        pytest.skip("needs Debian's dataset-fashion-mnist")
    data = home.parent / "data" / "fashion-mnist"
    data.mkdir(parents=True)
    for file in source.iterdir():
        (data / file.name).symlink_to(file)
    victim = data / "t10k-images-idx3-ubyte.gz"
    content = victim.read_bytes()
    path = home.parent / "fashion.toml"
    path.write_text('task = "fashion-mnist/lenet-300-100"\n')
    for damaged in (content[: len(content) // 2], b"\x1f\x8b" + bytes(1000), b""):
        victim.unlink()
        victim.write_bytes(damaged)
        _, err = assay(home, "run", str(path), code=2, ASSAY_DATA=str(data.parent))
        assert victim.name in err
    assert not (home / "assay.duckdb").exists()


def test_a_checkpoint_with_a_wrong_sha256(home: Path) -> None:
    data = home.parent / "data"
    data.mkdir()
    (data / "LeNet_300_100.original.300_100.bias.pth.tar").write_bytes(b"something else")
    _, err = assay(home, "reproduce", "neuron-merging-2020", code=2, ASSAY_DATA=str(data))
    assert "sha256" in err
    assert "e248b1f9" in err


def test_a_corrupt_database_is_named_and_rebuilt_from_the_records(home: Path) -> None:
    path = spec(home.parent, batches=[1, 2])
    assay(home, "run", path)
    before = rows(home, "SELECT * FROM runs ORDER BY run_id")
    database = home / "assay.duckdb"
    database.write_bytes(b"not a database" * 1000)
    _, err = assay(home, "run", path, code=2)
    assert "assay db rebuild" in err
    _, err = assay(home, "table", code=2)
    assert "assay db rebuild" in err
    assay(home, "db", "rebuild")
    assert rows(home, "SELECT * FROM runs ORDER BY run_id") == before
    assay(home, "db", "check")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 16 MB; only root may mount one."""
    place = tmp_path / "disk"
    place.mkdir()
    if (
        os.geteuid() != 0
        or subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(place)], check=False, capture_output=True
        ).returncode
    ):
        pytest.skip("mounting a small file system needs root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def _fill(path: Path) -> None:
    with path.open("wb", buffering=0) as stream:
        while True:
            try:
                stream.write(bytes(4096))
            except OSError:
                return


def test_a_full_disk_loses_nothing(home: Path, small_disk: Path) -> None:
    path, database = spec(home.parent, batches=[1, 2, 3]), small_disk / "results.duckdb"
    assay(home, "run", path, "--db", str(database), "--only", "batch_size=1")
    first = json.loads(assay(home, "ls", "runs", "--json", "--db", str(database))[0])
    filler = small_disk / "filler"
    _fill(filler)
    _, err = assay(home, "run", path, "--db", str(database), code=2)
    assert "No space left" in err or "full" in err.lower()
    filler.unlink()
    assay(home, "run", path, "--db", str(database))
    assay(home, "db", "check", "--db", str(database))
    out, _ = assay(home, "db", "query", "SELECT DISTINCT batch_size FROM runs", "--json", "--db", str(database))
    assert len(json.loads(out)) == 3
    runs = json.loads(assay(home, "ls", "runs", "--json", "--db", str(database))[0])
    assert {run["name"] for run in first} <= {run["name"] for run in runs}


def test_a_read_only_disk_is_a_clear_error(home: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    _, err = assay(home, "run", spec(home.parent), "--db", str(small_disk / "results.duckdb"), code=2)
    assert "read-only" in err.lower() or "Read-only" in err
    _, err = assay(small_disk / "home", "run", spec(home.parent), code=2)
    assert "ASSAY_HOME" in err
