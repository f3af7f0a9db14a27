"""What ``assay doctor`` reports: runtimes, machine, meters, data, disk, and what would spoil a measurement."""

from __future__ import annotations

from typing import Any

from harness import energy, environment, paths, registry
from harness.errors import AssayError
from harness.provenance import git_state, versions
from harness.spec import build


def examine() -> dict[str, Any]:
    """Look at this machine; nothing is changed.

    Returns
    -------
    dict
        JSON: ``runtimes``, ``machine``, ``conditions``, ``energy``, ``data``, ``disk``, ``packages``, ``warnings``.
    """
    commit, dirty = git_state()
    return {
        "runtimes": _runtimes(),
        "machine": environment.machine(),
        "conditions": environment.conditions(),
        "energy": energy.available(),
        "data": _data(),
        "disk": {"home": str(paths.home()), "free_bytes": environment.free_disk_bytes(paths.home())},
        "packages": versions(["assay-bench", "torch", "torchvision", "numpy", "duckdb", "onnx", "onnxscript"]),
        "git": {"commit": commit, "dirty": dirty},
        "warnings": environment.measurement_warnings(),
    }


def _runtimes() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name in sorted(registry.table("hardware")):
        try:
            runtime = build("hardware", {"name": name})
            reason = runtime.unavailable()
            found[name] = {"available": reason is None, "reason": reason, "versions": versions(runtime.packages)}
        except AssayError as error:
            found[name] = {"available": False, "reason": str(error), "versions": {}}
    return found


def _data() -> dict[str, str]:
    """Each data set with where it was found, or the reason why not; nothing is downloaded."""
    from harness.tasks import imagenet
    from harness.tasks.idx_dataset import FASHION_MNIST, MNIST

    found = {"digits": "comes with scikit-learn"}
    for data in (FASHION_MNIST, MNIST):
        try:
            files = data.locate(download=False)
            data.verify(files)
            (folder,) = {str(path.parent) for path in files.values()}
            found[data.title.lower()] = f"{folder}, sha256 verified"
        except AssayError as error:
            found[data.title.lower()] = str(error)
    folder_of_classes = imagenet.locate(None, "val")
    found["imagenet"] = str(
        folder_of_classes or "not found: put its folders under imagenet/val in a folder of ASSAY_DATA"
    )
    return found


def render(report: dict[str, Any]) -> str:
    """The report as text for a terminal."""
    machine, lines = report["machine"], ["Runtimes"]
    for name, item in report["runtimes"].items():
        version = ", ".join(f"{key} {value}" for key, value in item["versions"].items())
        lines.append(f"  {name:12} {'ok   ' + version if item['available'] else 'no   ' + item['reason']}")
    lines += [
        "Machine",
        f"  {machine['cpu_model']}, {machine['cores']} usable cores, "
        f"{machine['memory_bytes'] / 2**30:.1f} GiB, {machine['os']}",
        f"  ISA: {' '.join(machine['isa']) or 'unknown'}",
        f"  governor: {machine['governor'] or 'not told by the system'}; "
        f"load average {report['conditions']['load_average_1m']}; machine id {machine['machine_id']}",
        f"  GPUs: {', '.join(gpu['name'] for gpu in machine['gpus']) or 'none found'}",
        "Energy",
        *(f"  {name:12} {state}" for name, state in report["energy"].items()),
        "Data",
        *(f"  {name:14} {state}" for name, state in report["data"].items()),
        "Disk",
        f"  {report['disk']['free_bytes'] / 2**30:.1f} GiB free at {report['disk']['home']}",
        "Warnings" if report["warnings"] else "Nothing here would spoil a measurement.",
        *(f"  {warning}" for warning in report["warnings"]),
    ]
    return "\n".join(lines) + "\n"
