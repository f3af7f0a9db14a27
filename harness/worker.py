"""The child side of :mod:`harness.executor`: reads jobs, runs them, answers in JSON lines.

Nothing heavy is imported before a job asks for it: a process that measures ONNX Runtime never loads torch.

The jobs come through a descriptor of their own, which a thread reads without Python's lock on standard input: a
``DataLoader`` forks this process, and a forked child would wait for ever for a lock that a thread of its parent
held. Standard input is empty, so that code that asks for input fails instead of waiting.
"""

from __future__ import annotations

import importlib
import json
import os
import queue
import signal
import sys
import threading
import traceback
from typing import Any

from harness import usercode
from harness.errors import AssayError, Unavailable, Unsupported, explanation
from harness.text import cut, shown

_TRACEBACK = 20_000  # characters, the last ones
_MESSAGE = 1000  # characters: a line of progress is written at once, whoever else writes


class _Answers:
    """The pipe to the parent; also the ``progress`` that a job is given."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __call__(self, fraction: float, message: str) -> None:
        self.send("progress", fraction=float(fraction), message=cut(message, _MESSAGE))

    def step(self, name: str) -> None:
        self.send("step", name=cut(name, _MESSAGE))

    def send(self, kind: str, **value: Any) -> None:
        line = json.dumps({"kind": kind, **value}).encode() + b"\n"
        while line:
            line = line[os.write(self.descriptor, line) :]


def main() -> None:
    """Answer jobs until the parent closes the pipe."""
    answers = _Answers(int(os.environ.pop("ASSAY_ANSWERS_FD")))
    os.set_inheritable(answers.descriptor, False)  # not for programs that a job starts
    incoming = os.dup(0)
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    _close_in_children([answers.descriptor, incoming])
    sys.argv = sys.argv[:1]
    usercode.use_current_folder()
    jobs: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(incoming, jobs), daemon=True).start()
    while True:
        line = jobs.get()
        try:
            result = _run(json.loads(line), answers)
            answers.send("result", result=result)
        except BrokenPipeError:
            return
        except BaseException as error:  # noqa: BLE001  any failure of a method or runtime is a record, not a crash
            answers.send("error", **_failure(error))


def _close_in_children(descriptors: list[int]) -> None:
    """Close descriptors in forked children: one that outlives this process must not keep the parent waiting."""

    def close() -> None:
        while descriptors:  # emptied for the children's children, where the numbers mean other files
            os.close(descriptors.pop())

    os.register_at_fork(after_in_child=close)


def _run(message: dict[str, Any], answers: _Answers) -> Any:
    from harness.jobs import from_json, to_json

    kind = _named(message["job"])
    return to_json(_named(kind.function)(from_json(kind, message["value"]), answers))


def _named(name: str) -> Any:
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def _failure(error: BaseException) -> dict[str, Any]:
    """A record's status, reason and, where nobody expected the error, traceback."""
    if isinstance(error, AssayError):
        kinds: dict[type, str] = {Unsupported: "unsupported", Unavailable: "unavailable"}
        status = next((status for kind, status in kinds.items() if isinstance(error, kind)), "failed")
        return {"status": status, "reason": str(error), "traceback": None}
    if isinstance(error, MemoryError):
        reason = f"out of memory ({explanation(error)})"
    elif isinstance(error, SystemExit):
        reason = f"the code ended the program: sys.exit({shown(error.code)})"
    else:
        reason = explanation(error)
    text = "".join(traceback.format_exception(error))
    return {"status": "failed", "reason": reason, "traceback": text[-_TRACEBACK:]}


def _read(descriptor: int, jobs: queue.SimpleQueue[bytes]) -> None:
    held = b""
    while chunk := os.read(descriptor, 1 << 16):
        *lines, held = (held + chunk).split(b"\n")
        for line in lines:
            jobs.put(line)
    # The parent is gone (or has closed this worker): stop at once, in the middle of whatever runs, with every child.
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(0)


if __name__ == "__main__":
    main()
