"""What this machine is and how it stands at the moment: the facts without which a timing means nothing."""

from __future__ import annotations

import functools
import os
import platform
import shutil
from pathlib import Path
from typing import Any

from harness.canonical import digest

# Flags whose presence changes which kernels a runtime picks (Linux's names).
_ISA = ("avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx_vnni", "avx512_bf16",
        "avx512_fp16", "amx_tile", "amx_int8", "amx_bf16", "amx_fp16", "neon", "asimd", "asimddp", "i8mm",
        "bf16", "sve")  # fmt: skip


def cores() -> int:
    """CPUs that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def machine() -> dict[str, Any]:
    """The machine's lasting properties, and ``machine_id``, their hash with the system's own id."""
    import psutil

    cpu, flags = _cpu()
    facts = {
        "cpu_model": cpu,
        "isa": [flag for flag in _ISA if flag in flags],
        "cores": cores(),
        "memory_bytes": psutil.virtual_memory().total,
        "os": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "gpus": gpus(),
    }
    # Memory and kernel change with a reboot or a resize without making it another machine to measure on.
    identity = {"id": _system_id(), **{key: facts[key] for key in ("cpu_model", "isa", "cores", "gpus")}}
    return {
        "machine_id": digest(identity)[:16],
        "hostname": platform.node(),
        "governor": governor(),
        "virtual": "hypervisor" in flags,
        **facts,
    }


def _system_id() -> str:
    for path in ("/etc/machine-id", "/var/lib/dbus/machine-id"):
        if (text := _read(path)) and text != "uninitialized":
            return text
    return platform.node()


def _cpu() -> tuple[str, set[str]]:
    model, flags = platform.processor() or platform.machine(), set[str]()
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            model = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags = set(value.split())
            break
    return model, flags


def _read(path: str | Path) -> str | None:
    try:
        return Path(path).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None


def governor() -> str | None:
    """Frequency governor of the first CPU, or None where the system does not tell (virtual machines)."""
    return _read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")


def gpus() -> list[dict[str, Any]]:
    """NVIDIA GPUs by NVML, if its Python binding and driver are here; otherwise an empty list."""
    try:
        import pynvml
    except ImportError:
        return []
    try:
        pynvml.nvmlInit()
        found = []
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            found.append(
                {
                    "name": str(pynvml.nvmlDeviceGetName(handle)),
                    "memory_bytes": int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
                    "driver": str(pynvml.nvmlSystemGetDriverVersion()),
                }
            )
    except pynvml.NVMLError:
        return []
    return found


def conditions() -> dict[str, Any]:
    """What varies on one machine: load average over a minute, clock, memory that is free."""
    import psutil

    clock = psutil.cpu_freq()
    return {
        "load_average_1m": round(os.getloadavg()[0], 2),
        "clock_mhz": round(clock.current, 1) if clock else None,
        "memory_available_bytes": psutil.virtual_memory().available,
    }


def measurement_warnings(threads: int = 1) -> list[str]:
    """What would spoil a timing right now, each with its remedy."""
    found = []
    load, count = os.getloadavg()[0], cores()
    if threads > count:
        found.append(
            f"{threads} threads on {count} usable cores: they will wait for one another. Use threads <= {count}."
        )
    # One core's worth of load is the measurement itself (or what ran just before it).
    if load > max(1.5, count - 0.5):
        found.append(f"Load average {load:.1f} on {count} cores: other work disturbs timings. Stop it or wait.")
    mode = governor()
    if mode and mode != "performance":
        found.append(f"CPU governor is {mode!r}: clocks vary. Set it: cpupower frequency-set -g performance.")
    if machine()["virtual"]:
        found.append("Virtual machine: neighbours share the CPU. Compare only within one run, by ratios.")
    return found


def free_disk_bytes(path: Path) -> int:
    """Free space of the file system that holds ``path`` or its nearest existing parent."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free
