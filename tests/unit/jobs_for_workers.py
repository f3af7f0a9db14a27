"""Jobs that misbehave on purpose; workers find them by the name of their class."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from harness.errors import Unavailable, Unsupported
from harness.jobs import Job, Progress


@dataclass(frozen=True, kw_only=True)
class Answer:
    value: Any = None
    folder: Path = Path()
    pairs: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Call(Job[Answer]):
    function: ClassVar[str] = "tests.unit.jobs_for_workers:call"
    result: ClassVar[type[Any]] = Answer
    title: ClassVar[str] = "calling"
    name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)


def call(job: Call, progress: Progress) -> Answer:
    found = globals()[f"do_{job.name}"](progress, **job.arguments)
    return found if isinstance(found, Answer) else Answer(value=found)


def do_echo(progress: Progress, **arguments: Any) -> Answer:
    progress(0.5, "half")
    return Answer(value=arguments, folder=Path("/a/b"), pairs=(("x", 1), ("y", 2)))


def do_raise(_: Progress, text: str = "it broke") -> None:
    raise RuntimeError(text)


def do_unsupported(_: Progress) -> None:
    raise Unsupported("the layer 'a' is odd")


def do_unavailable(_: Progress) -> None:
    raise Unavailable("pip install it")


def do_memory(_: Progress) -> None:
    raise MemoryError


def do_sys_exit(_: Progress) -> None:
    sys.exit("enough")


def do_keyboard(_: Progress) -> None:
    raise KeyboardInterrupt


def do_hard_exit(_: Progress) -> None:
    print("last words \x1b[31m", flush=True)
    os._exit(3)


def do_signal(_: Progress, number: int = signal.SIGSEGV) -> None:
    os.kill(os.getpid(), number)


def do_recurse(progress: Progress) -> Any:
    return do_recurse(progress)


def do_no_json(_: Progress) -> Any:
    return object()


def do_input(_: Progress) -> str:
    return input("well? ")


def do_arguments(_: Progress) -> list[str]:
    return sys.argv[1:]


def do_print(_: Progress) -> int:
    return os.write(1, b"x" * 100_000)


def do_steps(progress: Progress, seconds: float = 0.6, hang: bool = False) -> None:
    for name in ("training", "building"):
        progress.step(name)
        progress(0.1, f"{name}, epoch 1")
        time.sleep(seconds)
    if hang:
        progress.step("waiting")
        time.sleep(600)


def _sleep(seconds: float) -> None:
    time.sleep(seconds)


def do_children(_: Progress, die: bool = False) -> list[int]:
    """A forked child, a program, and a program in a session of its own; with ``die``, this process is then killed."""
    forked = multiprocessing.get_context("fork").Process(target=_sleep, args=(600,), daemon=True)
    forked.start()
    program = [sys.executable, "-c", "import time; time.sleep(600)"]
    started = [subprocess.Popen(program), subprocess.Popen(program, start_new_session=True)]
    numbers = [int(forked.pid or 0), *(process.pid for process in started)]
    if die:
        Path(os.environ["CHILDREN_FILE"]).write_text(" ".join(map(str, numbers)))
        os.kill(os.getpid(), signal.SIGKILL)
    return numbers


def do_loader(_: Progress, persistent: bool = True) -> int:
    """Sums what a DataLoader with two processes of its own brings, twice."""
    import torch
    from torch.utils.data import DataLoader, TensorDataset

    data = TensorDataset(torch.arange(64.0).reshape(32, 2), torch.arange(32))
    loader: Any = DataLoader(data, 8, shuffle=True, num_workers=2, persistent_workers=persistent)
    return int(sum(int(y.sum()) for _ in range(2) for _, y in loader))


def do_import(_: Progress, name: str) -> str:
    return str(importlib.import_module(name).__file__)
