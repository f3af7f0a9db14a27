"""Intel/AMD package energy by the kernel's powercap interface (counters in microjoules that wrap)."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from harness.contracts import EnergyReading

ROOT = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Domain:
    """One counter: ``package-0``, ``dram``, ..."""

    name: str
    energy: Path
    wraps_at_uj: int

    def read_uj(self) -> int:
        """The counter's value in microjoules."""
        return int(self.energy.read_text())


def readable_domains(root: Path = ROOT) -> list[Domain]:
    """Top-level package domains, and their DRAM domains, whose counters this user can read."""
    found = []
    # Not "intel-rapl-mmio:*": the same packages again, by another way.
    for folder in sorted(root.glob("intel-rapl:*")):
        energy, limit = folder / "energy_uj", folder / "max_energy_range_uj"
        try:
            name = (folder / "name").read_text().strip()
            # Sub-domains "core" and "uncore" are parts of their package: counting them too would count twice.
            if not (name.startswith("package") or name == "dram"):
                continue
            int(energy.read_text())
            found.append(Domain(f"{folder.name.partition(':')[2]} {name}", energy, int(limit.read_text())))
        except (OSError, ValueError):
            continue
    return found


def unavailable(root: Path = ROOT) -> str | None:
    """Why RAPL cannot be read here, or None."""
    if not list(root.glob("intel-rapl:*")):
        return (
            "no RAPL counters (a virtual machine, another architecture, "
            "or the kernel module intel_rapl_msr is not loaded)"
        )
    if not readable_domains(root):
        return f"RAPL counters are not readable by this user: run as root, or chmod o+r {root}/intel-rapl:*/energy_uj"
    return None


@dataclass
class RaplMeter:
    """Package and DRAM energy; idle power is measured for half a second before the window.

    Counters update about every millisecond and are of the whole package: other work on the machine is in them.
    """

    domains: Sequence[Domain]
    min_window_s: float = 0.1
    idle_s: float = 0.5
    _before: list[int] = field(default_factory=list, init=False)
    _idle_w: list[float] = field(default_factory=list, init=False)
    _wall: float = field(default=0.0, init=False)

    def start(self) -> None:
        """Measure idle power, then open the window."""
        begin, first = time.perf_counter(), [domain.read_uj() for domain in self.domains]
        time.sleep(self.idle_s)
        elapsed = time.perf_counter() - begin
        self._before = [domain.read_uj() for domain in self.domains]
        self._idle_w = [
            _difference(domain, a, b) / 1e6 / elapsed
            for domain, a, b in zip(self.domains, first, self._before, strict=True)
        ]
        self._wall = time.perf_counter()

    def stop(self, inferences: int) -> list[EnergyReading]:
        """Close the window."""
        after, wall = [domain.read_uj() for domain in self.domains], time.perf_counter() - self._wall
        return [
            EnergyReading(
                method="measured_counter",
                domain=domain.name,
                gross_j=_difference(domain, before, now) / 1e6,
                idle_w=idle,
                window_s=wall,
                inferences=inferences,
                inputs={"before_uj": before, "after_uj": now, "wraps_at_uj": domain.wraps_at_uj, "pid": os.getpid()},
            )
            for domain, before, now, idle in zip(self.domains, self._before, after, self._idle_w, strict=True)
        ]


def _difference(domain: Domain, before: int, after: int) -> int:
    """Microjoules between two readings; the counter restarts at 0 after ``wraps_at_uj`` (at most once a window)."""
    return after - before if after >= before else after + domain.wraps_at_uj + 1 - before
