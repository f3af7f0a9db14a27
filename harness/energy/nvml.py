"""NVIDIA GPU energy by NVML's total-energy counter (millijoules, Volta and newer)."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from harness.contracts import EnergyReading

_INSTALL = 'pip install "assay-bench[nvidia]"'


@dataclass
class NvmlMeter:
    """Energy of one GPU. The counter ticks every 10 to 100 ms, so a window lasts 10 s at least."""

    index: int = 0
    min_window_s: float = 10.0
    idle_s: float = 2.0
    _before: int = field(default=0, init=False)
    _idle_w: float = field(default=0.0, init=False)
    _wall: float = field(default=0.0, init=False)

    @staticmethod
    def unavailable() -> str | None:
        """Why the counter cannot be read here, or None."""
        try:
            import pynvml
        except ImportError:
            return f"the NVML binding is not installed: {_INSTALL}"
        try:
            pynvml.nvmlInit()
            if not pynvml.nvmlDeviceGetCount():
                return "no NVIDIA GPU"
            pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByIndex(0))
        except pynvml.NVMLError as error:
            return f"NVML: {error}"
        return None

    def _read_mj(self) -> int:
        import pynvml

        return int(pynvml.nvmlDeviceGetTotalEnergyConsumption(pynvml.nvmlDeviceGetHandleByIndex(self.index)))

    def start(self) -> None:
        """Measure idle power, then open the window."""
        begin, first = time.perf_counter(), self._read_mj()
        time.sleep(self.idle_s)
        self._before = self._read_mj()
        self._idle_w = (self._before - first) / 1e3 / (time.perf_counter() - begin)
        self._wall = time.perf_counter()

    def stop(self, inferences: int) -> list[EnergyReading]:
        """Close the window."""
        after, wall = self._read_mj(), time.perf_counter() - self._wall
        return [
            EnergyReading(
                method="measured_counter",
                domain=f"gpu-{self.index}",
                gross_j=(after - self._before) / 1e3,
                idle_w=self._idle_w,
                window_s=wall,
                inferences=inferences,
                inputs={"before_mj": self._before, "after_mj": after},
            )
        ]
