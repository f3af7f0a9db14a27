"""What every method has to keep."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import registry
from harness.contracts import Hardware, Method
from harness.errors import Unsupported
from harness.testing.clauses import Coverage, created, require, state
from harness.testing.hardware import answer, loaded

if TYPE_CHECKING:
    from torch import nn

    from harness.testing.networks import Reference


def check_method(
    name: str,
    parameters: Mapping[str, Any] | None = None,
    *,
    networks: Sequence[str] | None = None,
    deploy: bool = True,
) -> Coverage:
    """Check a method on the reference networks (:mod:`harness.testing.networks`), and on every runtime that is here.

    Its fields have defaults and refuse what they do not know; the model given stays as it is; the same seed gives the
    same bytes; the result is a model of its own with finite outputs of the same names, shapes and types; it can be
    stored, and what is read back computes the same; it deploys, and the deployed outputs are the torch model's.

    A method that has ``promises(original, compressed)`` is held to it: the method yields what does not hold, in words.

    Parameters
    ----------
    name : str
        A registered name, or ``module:Class``.
    parameters : mapping, optional
        Instead of the defaults.
    networks : sequence of str, optional
        Some of :data:`harness.testing.networks.NAMES` instead of all.
    deploy : bool
        Whether to build and run artifacts (some seconds each).

    Raises
    ------
    AssertionError
        Naming the clause that does not hold.
    """
    from harness.testing.networks import NAMES, reference

    method = created("method", name, parameters)
    require(isinstance(method, Method), f"{name}: has compress")
    ran: list[str] = []
    skipped: dict[str, str] = {}
    for network in networks or NAMES:
        given, where = reference(network), f"{name} on {network}"
        try:
            compressed = _check_compression(where, method, given)
        except Unsupported as error:
            require(str(error), f"{where}: Unsupported says why")
            skipped[network] = str(error)
            continue
        if deploy:
            _check_deployment(where, method, given, compressed)
        ran.append(network)
    return Coverage(name=name, ran=tuple(ran), skipped=skipped)


def _compressed(method: Method, given: Reference) -> nn.Module:
    with tempfile.TemporaryDirectory() as scratch:
        return method.compress(given.model, given.context(scratch=Path(scratch)))


def _check_compression(where: str, method: Method, given: Reference) -> nn.Module:
    import torch
    from torch import nn

    from harness.calling import call

    before, mode = state(given.model), given.model.training
    try:
        first = _compressed(method, given)
    finally:
        require(state(given.model) == before, f"{where}: the model given is left untouched")
        require(given.model.training == mode, f"{where}: the model given keeps its mode")
    second = _compressed(method, given)
    require(isinstance(first, nn.Module), f"{where}: returns an nn.Module")
    theirs = {value.data_ptr() for value in given.model.state_dict().values() if value.numel()}
    shared = [name for name, value in first.state_dict().items() if value.numel() and value.data_ptr() in theirs]
    require(not shared, f"{where}: the result shares memory with the model given: {shared}")
    require(state(first) == state(second), f"{where}: the same seed gives the same bytes")
    for count in (1, 5):
        inputs = given.inputs(count)
        with torch.inference_mode():
            expected, found = (call(model.eval(), inputs, given.signature) for model in (given.model, first))
        require(found.keys() == expected.keys(), f"{where}: outputs keep their names")
        for name, value in found.items():
            require(value.shape == expected[name].shape, f"{where}: outputs keep their shape")
            require(value.dtype == expected[name].dtype, f"{where}: outputs keep their type")
            require(torch.isfinite(value).all(), f"{where}: outputs are finite")
    _check_storage(where, given, first)
    if promises := getattr(method, "promises", None):
        broken = list(promises(given.model, first))
        require(not broken, f"{where}: {'; '.join(broken)}")
    return first


def _check_storage(where: str, given: Reference, compressed: nn.Module) -> None:
    import torch

    from harness import modelfile
    from harness.calling import call

    with tempfile.TemporaryDirectory() as folder:
        path = modelfile.save(compressed.eval(), Path(folder) / "model.assay")
        # A third party's own layers live in its own package, which is not among those that are trusted.
        own = {type(module).__module__.partition(".")[0] for module in compressed.modules()}
        again = modelfile.load(path, allow=sorted(own)).eval()
    inputs = given.inputs(5)
    with torch.inference_mode():
        expected, found = (call(model, inputs, given.signature) for model in (compressed, again))
    same = all(torch.equal(found[name], value) for name, value in expected.items())
    require(same, f"{where}: the model that was stored and read back computes the same")


def _check_deployment(where: str, method: Method, given: Reference, compressed: nn.Module) -> None:
    import numpy as np
    import torch

    from harness.calling import call

    inputs = given.inputs(64)
    arrays = {name: value.numpy() for name, value in inputs.items()}
    for hardware_name, hardware in here():
        # A method that looks at the target's scheme has a result of its own for each target.
        targeting = getattr(method, "targeting", None)
        model = (_compressed(targeting(hardware.scheme), given) if targeting else compressed).eval()
        with torch.inference_mode():
            expected = {name: value.numpy() for name, value in call(model, inputs, given.signature).items()}
        with (
            tempfile.TemporaryDirectory() as folder,
            loaded(hardware, model, given.signature, Path(folder), inputs) as deployed,
        ):
            found = answer(deployed, arrays)
            precision = deployed.effective["precision"]
        clause = f"{where}: deployed on {hardware_name} ({precision}) it answers as in torch"
        for name, value in expected.items():
            difference = float(np.abs(found[name] - value).max())
            # Integer kernels of different runtimes round differently; floating-point ones only reorder sums.
            limit = 1e-3 if precision == "f32" and not targeting else 0.1 * float(np.ptp(value))
            require(difference <= limit, f"{clause}: largest difference {difference:.3g}, allowed {limit:.3g}")
            if value.ndim == 2:
                agreement = float((found[name].argmax(1) == value.argmax(1)).mean())
                require(agreement >= 0.97, f"{clause}: {agreement:.1%} of the classes agree")


def here() -> Iterator[tuple[str, Hardware]]:
    """Every registered runtime that can run on this machine, by name."""
    for name in sorted(registry.table("hardware")):
        hardware = registry.create("hardware", name, {})
        if hardware.unavailable() is None:
            yield name, hardware
