from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from harness.executor import JobError, Worker
from tests.unit.jobs_for_workers import Answer, Call


@pytest.fixture(scope="module")
def lasting() -> Iterator[Worker]:
    """One worker for all jobs that leave it alive."""
    with Worker(threads=1) as worker:
        yield worker


def _call(worker: Worker, name: str, timeout: float = 60.0, **arguments: Any) -> Answer:
    return worker.run(Call(name=name, arguments=arguments), timeout=timeout)


def test_a_job_and_its_result_keep_their_types(lasting: Worker) -> None:
    seen: list[tuple[float, str]] = []
    job = Call(name="echo", arguments={"a": [1, None, "é"]})
    answer = lasting.run(job, timeout=60, progress=lambda fraction, message: seen.append((fraction, message)))
    assert answer == Answer(value={"a": [1, None, "é"]}, folder=Path("/a/b"), pairs=(("x", 1), ("y", 2)))
    assert seen == [(0.5, "half")]


def test_output_of_libraries_does_not_disturb_the_protocol(lasting: Worker) -> None:
    assert _call(lasting, "print").value == 100_000


@pytest.mark.parametrize(
    ("name", "status", "reason", "has_traceback"),
    [
        ("raise", "failed", "RuntimeError: it broke", True),
        ("unsupported", "unsupported", "the layer 'a' is odd", False),
        ("unavailable", "unavailable", "pip install it", False),
        ("memory", "failed", "out of memory", True),
        ("sys_exit", "failed", "the code ended the program: sys.exit('enough')", True),
        ("keyboard", "failed", "KeyboardInterrupt", True),
        ("recurse", "failed", "RecursionError: maximum recursion depth exceeded", True),
        ("no_json", "failed", "TypeError: Object of type object is not JSON serializable", True),
        ("input", "failed", "EOFError", True),
        ("no_such_job", "failed", "KeyError: 'do_no_such_job'", True),
    ],
)
def test_a_job_that_fails_is_a_status_and_a_reason_and_the_worker_lives_on(
    lasting: Worker, name: str, status: str, reason: str, has_traceback: bool
) -> None:
    with pytest.raises(JobError) as caught:
        _call(lasting, name)
    assert caught.value.status == status
    assert reason in caught.value.reason
    assert bool(caught.value.traceback) == has_traceback
    assert lasting.alive
    assert _call(lasting, "echo").value == {}


def test_an_unexpected_exception_keeps_its_traceback_and_the_line_that_explains(lasting: Worker) -> None:
    with pytest.raises(JobError) as caught:
        _call(lasting, "raise", text="node failed with OpConversionFailure:\n\nTraining mode is not supported\nmore")
    assert caught.value.reason == "RuntimeError: node failed with OpConversionFailure: Training mode is not supported"
    assert "jobs_for_workers.py" in str(caught.value.traceback)


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("signal", {}, ["killed by SIGSEGV"]),
        ("signal", {"number": int(signal.SIGKILL)}, ["killed by SIGKILL", "memory runs out"]),
        ("hard_exit", {}, ["exit code 3", "last words"]),
    ],
)
def test_a_process_that_dies_is_a_reason(name: str, arguments: dict[str, Any], words: list[str]) -> None:
    with Worker(threads=1) as worker:
        with pytest.raises(JobError) as caught:
            _call(worker, name, **arguments)
        assert not worker.alive
        with pytest.raises(JobError):
            _call(worker, "echo")
    assert caught.value.status == "failed"
    assert all(word in caught.value.reason for word in words)
    assert caught.value.reason.isprintable()


def test_a_worker_sees_no_command_line_of_its_parent(lasting: Worker) -> None:
    assert _call(lasting, "arguments").value == []


@pytest.mark.parametrize("persistent", [True, False])
def test_a_data_loader_with_processes_of_its_own_does_not_hang(lasting: Worker, persistent: bool) -> None:
    assert _call(lasting, "loader", persistent=persistent).value == 2 * sum(range(32))


def test_the_timeout_bounds_each_step_and_names_the_one_that_hangs() -> None:
    with Worker(threads=1) as worker:
        _call(worker, "echo")  # it has started
        # Two steps of 0.8 s under a timeout of 1.2 s; the third one hangs.
        with pytest.raises(JobError) as caught:
            _call(worker, "steps", timeout=1.2, seconds=0.8, hang=True)
        assert not worker.alive
    assert caught.value.status == "timeout"
    assert caught.value.reason == "waiting took longer than 1.2 s and was stopped (see --timeout)"


def test_a_job_without_steps_is_one_step_and_the_reason_says_where_it_was() -> None:
    with Worker(threads=1) as worker:
        _call(worker, "echo")
        with pytest.raises(JobError) as caught:
            _call(worker, "steps", timeout=0.5, seconds=60.0)
    assert (
        caught.value.reason == 'training took longer than 0.5 s and was stopped at "training, epoch 1" (see --timeout)'
    )


def _gone(number: int) -> bool:
    try:
        return psutil.Process(number).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _await_gone(numbers: list[int]) -> bool:
    until = time.monotonic() + 20
    while not all(map(_gone, numbers)) and time.monotonic() < until:
        time.sleep(0.05)
    return all(map(_gone, numbers))


def test_children_of_a_worker_end_with_it() -> None:
    with Worker(threads=1) as worker:
        children = _call(worker, "children").value
        assert not any(map(_gone, children))
    assert _await_gone(children)


def test_a_killed_worker_is_noticed_though_its_children_hold_its_pipes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark = tmp_path / "children"
    monkeypatch.setenv("CHILDREN_FILE", str(mark))
    begin = time.monotonic()
    with Worker(threads=1) as worker, pytest.raises(JobError, match="killed by SIGKILL"):
        _call(worker, "children", timeout=60, die=True)
    assert time.monotonic() - begin < 30
    forked, program, apart = map(int, mark.read_text().split())
    assert _await_gone([forked, program])
    psutil.Process(apart).kill()  # in a session of its own, and without its parent: nobody can find it


def test_a_worker_and_its_children_die_with_its_killed_parent() -> None:
    program = (
        "import time\nfrom harness.executor import Worker\nfrom tests.unit.jobs_for_workers import Call\n"
        "worker = Worker(1)\nchildren = worker.run(Call(name='children'), timeout=60).value\n"
        "print(worker._process.pid, *children[:2], flush=True)\nprint(children[2], flush=True)\ntime.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=_with_tests())
    assert parent.stdout is not None
    numbers = [int(word) for word in parent.stdout.readline().split()]
    apart = int(parent.stdout.readline())
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert len(numbers) == 3
    assert _await_gone(numbers)
    psutil.Process(apart).kill()


def _with_tests() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}


PROGRAM = """
from harness.executor import Worker
from tests.unit.jobs_for_workers import Call
with Worker(1) as worker:
    for name in ("json", "hardware", "methods", "results"):
        print(worker.run(Call(name="import", arguments={"name": name}), timeout=60).value)
"""


def _shadow(folder: Path, *names: str) -> None:
    for name in names:
        (folder / f"{name}.py").write_text(f"raise SystemExit('the user has a file {name}.py')")


def _files_found(arguments: list[str], folder: Path) -> list[Path]:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=_with_tests(), capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return [Path(line) for line in done.stdout.split()]


def test_files_in_the_current_folder_replace_nothing_in_a_worker(tmp_path: Path) -> None:
    _shadow(tmp_path, "json", "queue", "torch", "hardware", "methods", "results", "harness")
    found = _files_found(["-P", "-c", PROGRAM], tmp_path)
    assert len(found) == 4
    assert not any(file.is_relative_to(tmp_path) for file in found)


def test_files_beside_the_users_script_replace_nothing_in_a_worker(tmp_path: Path) -> None:
    _shadow(tmp_path, "hardware", "methods", "results")
    (tmp_path / "mine.py").write_text(PROGRAM)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    found = _files_found([str(tmp_path / "mine.py")], elsewhere)
    assert len(found) == 4
    assert not any(file.is_relative_to(tmp_path) for file in found)
