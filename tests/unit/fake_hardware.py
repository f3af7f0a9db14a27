"""Runtimes that misbehave on purpose; they are named ``tests.unit.fake_hardware:Class`` in jobs and specs."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from harness.contracts import Scheme
from harness.errors import Unavailable, Unsupported

Behaviour = Literal["ok", "segfault", "killed", "hang", "nan", "raise", "exit", "print", "memory", "missing", "cannot"]


class Constant:
    """A deployed model that answers zeros, after misbehaving where asked to."""

    def __init__(self, behaviour: Behaviour, outputs: tuple[str, ...] = ("output",)) -> None:
        self._behaviour = behaviour
        self._outputs = outputs
        self._n = 0

    @property
    def effective(self) -> Mapping[str, Any]:
        return {"precision": "f32", "threads": 1, "streams": 1, "provider": "fake", "kernels": {}}

    def bind(self, inputs: Any) -> None:
        self._n = len(next(iter(inputs.values())))

    def __call__(self, phase: str = "forward") -> None:
        match self._behaviour:
            case "segfault":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hang":
                if mark := os.environ.get("FAKE_HANGS"):
                    Path(mark).touch()
                time.sleep(600)
            case "raise":
                raise RuntimeError("the fake runtime broke")
            case "exit":
                os._exit(3)
            case "memory":
                raise MemoryError
            case "print":
                print("chatter on standard output")

    def synchronize(self) -> None:
        pass

    def fetch(self) -> Any:
        values = np.full((self._n, 10), np.nan if self._behaviour == "nan" else 0.0, dtype=np.float32)
        return {name: values.copy() for name in self._outputs}

    def close(self) -> None:
        pass


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Fake:
    """A runtime without a device."""

    packages: ClassVar[tuple[str, ...]] = ()
    behaviour: Behaviour = "ok"

    @property
    def scheme(self) -> Scheme:
        return Scheme()

    def unavailable(self) -> str | None:
        return 'not installed: pip install "fake"' if self.behaviour == "missing" else None

    def build(self, model: Any, signature: Any, example: Any, folder: Path, phases: Any = ("forward",)) -> Path:
        if self.behaviour == "cannot":
            raise Unsupported("operator 'fake' of layer 'body.0' has no kernel")
        path = folder / "model.bin"
        path.write_bytes(b"weights" * 100)
        return path

    def load(self, artifact: Path, *, signature: Any, inputs: Any, threads: int) -> Constant:
        if self.behaviour == "missing":
            raise Unavailable("not installed")
        return Constant(self.behaviour, tuple(port.name for port in signature.outputs))
