"""The child side of :mod:`harness.executor`: reads jobs, runs them, answers in JSON lines.

Nothing heavy is imported before a job asks for it: a process that measures ONNX Runtime never loads torch.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import traceback
from typing import Any

from harness.errors import AssayError, Unavailable, Unsupported


def main() -> None:
    """Answer jobs until standard input closes."""
    answers = os.fdopen(int(os.environ.pop("ASSAY_ANSWERS_FD")), "w", buffering=1)
    jobs: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(jobs,), daemon=True).start()

    def send(kind: str, **value: Any) -> None:
        answers.write(json.dumps({"kind": kind, **value}) + "\n")

    def progress(fraction: float, message: str) -> None:
        send("progress", fraction=fraction, message=message)

    while True:
        job = json.loads(jobs.get())
        try:
            if job["op"] == "prepare":
                from harness.prepare import prepare

                result = prepare(job, progress)
            else:
                from harness.measure.run import measure

                result = measure(job, progress)
        except Unsupported as error:
            send("error", status="unsupported", reason=str(error), traceback=None)
        except Unavailable as error:
            send("error", status="unavailable", reason=str(error), traceback=None)
        except AssayError as error:
            send("error", status="failed", reason=str(error), traceback=None)
        except MemoryError:
            send("error", status="failed", reason="out of memory (MemoryError)", traceback=traceback.format_exc())
        except Exception as error:  # noqa: BLE001  any failure of a method or runtime is a record, not a crash
            first_line = (str(error).strip() or "no message").splitlines()[0]
            reason = f"{type(error).__name__}: {first_line}"
            send("error", status="failed", reason=reason, traceback=traceback.format_exc())
        else:
            send("result", result=result)


def _read(jobs: queue.SimpleQueue[str]) -> None:
    for line in sys.stdin:
        jobs.put(line)
    # The parent is gone (or has closed this worker): stop at once, in the middle of whatever runs.
    os._exit(0)


if __name__ == "__main__":
    main()
