"""The stated model used where no counter can be read: energy = CPU time of the process x watts per core."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from harness.contracts import EnergyReading


@dataclass
class CpuTimeModel:
    """Energy from CPU seconds (user + system, all threads).

    So it differs from latency times a constant where a runtime spins on several threads, or waits.

    Parameters
    ----------
    watts_per_core : float
        Power of one busy core; an assumption, kept in the reading.
    """

    watts_per_core: float
    min_window_s: float = 0.0
    _cpu: float = field(default=0.0, init=False)
    _wall: float = field(default=0.0, init=False)

    def start(self) -> None:
        """Open the window."""
        self._cpu, self._wall = time.process_time(), time.perf_counter()

    def stop(self, inferences: int) -> list[EnergyReading]:
        """Close the window."""
        cpu, wall = time.process_time() - self._cpu, time.perf_counter() - self._wall
        return [
            EnergyReading(
                method="modelled",
                domain="cpu",
                gross_j=cpu * self.watts_per_core,
                idle_w=None,
                window_s=wall,
                inferences=inferences,
                inputs={"model": "cpu_seconds x watts_per_core", "cpu_s": cpu, "watts_per_core": self.watts_per_core},
            )
        ]
