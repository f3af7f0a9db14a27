"""Energy meters: counters where they can be read, otherwise a stated model, and never a zero.

``choose`` returns the best meter of this machine for a device; every meter wraps one window of work.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from harness.contracts import EnergyReading


class Meter(Protocol):
    """Measures the energy of the work between :meth:`start` and :meth:`stop`."""

    @property
    def min_window_s(self) -> float:
        """Shortest window that the meter resolves: 100 of its update periods."""
        ...

    def start(self) -> None:
        """Open the window."""
        ...

    def stop(self, inferences: int) -> list[EnergyReading]:
        """Close the window, in which ``inferences`` batches ran, and return one reading per domain."""
        ...


def choose(settings: Mapping[str, Any], device: str = "cpu") -> Meter:
    """The meter for a device: RAPL for "cpu", NVML for "cuda", otherwise the stated model.

    Parameters
    ----------
    settings : mapping
        Fields of :class:`harness.spec.EnergySettings`.
    device : {"cpu", "cuda"}
        Where the work runs.
    """
    from harness.energy.model import CpuTimeModel
    from harness.energy.nvml import NvmlMeter
    from harness.energy.rapl import RaplMeter, readable_domains

    if device == "cuda" and NvmlMeter.unavailable() is None:
        return NvmlMeter()
    if device == "cpu" and (domains := readable_domains()):
        return RaplMeter(domains)
    return CpuTimeModel(watts_per_core=settings["watts_per_core"])


def available() -> dict[str, str]:
    """Each meter with "ok" or the reason why it cannot be read, for ``assay doctor``."""
    from harness.energy import nvml, rapl

    return {
        "rapl": rapl.unavailable() or "ok",
        "nvml": nvml.NvmlMeter.unavailable() or "ok",
        "modelled": "ok (CPU seconds x watts_per_core; labelled 'modelled')",
    }
