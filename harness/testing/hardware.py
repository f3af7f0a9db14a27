"""What every runtime has to keep."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.canonical import digest, file_sha256
from harness.contracts import Deployed, Hardware, Scheme
from harness.testing.clauses import Coverage, created, require, state

if TYPE_CHECKING:
    from torch import nn

    from harness.contracts import Arrays, Signature, Tensors
    from harness.testing.networks import Reference


@contextlib.contextmanager
def loaded(
    hardware: Hardware, model: nn.Module, signature: Signature, folder: Path, inputs: Tensors
) -> Iterator[Deployed]:
    """``model`` built into ``folder`` and loaded for batches like ``inputs``, on one thread; closed at the end."""
    artifact = hardware.build(model, signature, _first(inputs, 2), folder)
    arrays = {name: value.numpy() for name, value in inputs.items()}
    deployed = hardware.load(artifact, signature=signature, inputs=arrays, threads=1)
    try:
        yield deployed
    finally:
        deployed.close()


def answer(deployed: Deployed, inputs: Arrays) -> Arrays:
    """The outputs for one batch."""
    deployed.bind(inputs)
    deployed()
    deployed.synchronize()
    return deployed.fetch()


def _first(inputs: Any, count: int) -> dict[str, Any]:
    return {name: value[:count] for name, value in inputs.items()}


def check_hardware(
    name: str, parameters: Mapping[str, Any] | None = None, *, networks: Sequence[str] | None = None
) -> Coverage:
    """Check a runtime on the reference networks (:mod:`harness.testing.networks`).

    It says why it is unavailable instead of raising; the artifact lies in the folder given, and has the same bytes each
    time; any batch size is answered as torch does in float64, to 1e-4; what is fetched is a copy; and the settings
    read back have the keys of :class:`harness.contracts.Deployed`.

    Parameters
    ----------
    name : str
        A registered name, or ``module:Class``.
    parameters : mapping, optional
        Instead of the defaults. Float32 is expected: lower precisions are for a test of the runtime's own.
    networks : sequence of str, optional
        Some of :data:`harness.testing.networks.NAMES` instead of all.

    Raises
    ------
    AssertionError
        Naming the clause that does not hold.
    """
    from harness.testing.networks import NAMES, reference

    hardware = created("hardware", name, parameters)
    require(isinstance(hardware, Hardware), f"{name}: lacks packages, scheme, unavailable, build or load")
    require(isinstance(hardware.scheme, Scheme), f"{name}: scheme is a Scheme")
    require(all(isinstance(package, str) for package in hardware.packages), f"{name}: packages are names")
    reason = hardware.unavailable()
    require(reason is None or (isinstance(reason, str) and reason), f"{name}: unavailable gives a reason or None")
    if reason is not None:
        return Coverage(name=name, ran=(), skipped={"this machine": reason})
    chosen = tuple(networks or NAMES)
    for network in chosen:
        with tempfile.TemporaryDirectory() as folder:
            _check_runtime(f"{name} with {network}", hardware, reference(network), Path(folder))
    return Coverage(name=name, ran=chosen)


def _check_runtime(where: str, hardware: Hardware, given: Reference, folder: Path) -> None:
    import numpy as np
    import torch

    from harness.calling import call

    before = state(given.model)
    examples = given.inputs(16)
    artifacts = []
    for number in range(2):
        place = folder / str(number)
        place.mkdir()
        artifacts.append(hardware.build(given.model, given.signature, _first(examples, 2), place))
        require(artifacts[-1].exists(), f"{where}: build returns a path that exists")
        require(
            place in artifacts[-1].parents or artifacts[-1] == place, f"{where}: the artifact lies in the folder given"
        )
    require(state(given.model) == before, f"{where}: build leaves the model as it was")
    require(file_sha256(artifacts[0]) == file_sha256(artifacts[1]), f"{where}: the artifact's bytes are reproducible")
    exact = copy.deepcopy(given.model).double()
    wide = {name: value.double() if value.is_floating_point() else value for name, value in examples.items()}
    with torch.inference_mode():
        expected = {name: value.numpy() for name, value in call(exact, wide, given.signature).items()}
    for count in (1, 3, 16):
        inputs = {name: value[:count].numpy().copy() for name, value in examples.items()}
        others = {name: np.roll(value, 1, axis=-1) for name, value in inputs.items()}
        deployed = hardware.load(artifacts[0], signature=given.signature, inputs=inputs, threads=1)
        try:
            require(isinstance(deployed, Deployed), f"{where}: lacks a member of Deployed")
            found = answer(deployed, inputs)
            _check_effective(where, deployed)
            require(found.keys() == expected.keys(), f"{where}: fetch names the signature's outputs")
            for name, value in expected.items():
                require(found[name].dtype == np.float32, f"{where}: fetch returns the outputs' type")
                require(found[name].shape == value[:count].shape, f"{where}: fetch returns n = {count} examples")
                error = np.abs(found[name] - value[:count]).max()
                require(error <= 1e-4, f"{where}: outputs at batch {count} differ from float64 by {error:.3g}")
            kept = {name: value.copy() for name, value in found.items()}
            other = answer(deployed, others)
            require(_equal(found, kept), f"{where}: what was fetched is a copy that later inferences leave alone")
            require(not _equal(other, found), f"{where}: another batch gives another answer")
            require(_equal(answer(deployed, inputs), found), f"{where}: the same batch gives the same bits")
        finally:
            deployed.close()


def _equal(some: Arrays, others: Arrays) -> bool:
    import numpy as np

    return all(np.array_equal(some[name], value) for name, value in others.items())


def _check_effective(where: str, deployed: Deployed) -> None:
    effective = deployed.effective
    for key in ("precision", "threads", "streams", "provider", "kernels"):
        require(key in effective, f"{where}: effective names {key!r}")
    digest(dict(effective))  # the record keeps them as JSON
    require(effective["precision"] == "f32", f"{where}: a float32 model runs in f32, got {effective['precision']!r}")
    require(effective["threads"] == 1, f"{where}: one thread was asked for, got {effective['threads']!r}")
    kernels = effective["kernels"]
    require(
        kernels is None or all(isinstance(count, int) and count > 0 for count in kernels.values()),
        f"{where}: kernels maps 'Type:precision' to a count",
    )
