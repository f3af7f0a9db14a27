"""What every method has to keep."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness import registry
from harness.contracts import Context, Hardware, Method, Scheme
from harness.errors import Unsupported
from harness.testing.clauses import Coverage, created, require, state
from harness.testing.hardware import answer, loaded

if TYPE_CHECKING:
    from torch import nn

    from harness.testing.networks import Reference

Effect = Callable[["nn.Module", "nn.Module", Any], None]
"""``effect(original, compressed, method)`` asserts what the method promises."""


def check_method(
    name: str, parameters: Mapping[str, Any] | None = None, *, effect: Effect | None = None, deploy: bool = True
) -> Coverage:
    """Check a method on two small networks trained on digits, and on every runtime that is here.

    Its fields have defaults and refuse what they do not know; the model given stays as it is; the same seed gives the
    same bytes; the result is a model of its own with finite outputs of the same shape; it deploys, and the deployed
    outputs are the torch model's.

    Parameters
    ----------
    name : str
        A registered name, or ``module:Class``.
    parameters : mapping, optional
        Instead of the defaults.
    effect : callable, optional
        Asserts what the method promises, such as a measured sparsity.
    deploy : bool
        Whether to build and run artifacts (some seconds each).

    Raises
    ------
    AssertionError
        Naming the clause that does not hold.
    """
    from harness.testing.networks import NAMES, reference

    method = created("method", name, parameters)
    require(isinstance(method, Method), f"{name}: lacks uses_scheme, unsupported or compress")
    require(isinstance(type(method).uses_scheme, bool), f"{name}: uses_scheme is True or False")
    ran: list[str] = []
    skipped: dict[str, str] = {}
    for model_name in NAMES:
        given = reference(model_name)
        if reason := _unsupported(name, method, given):
            skipped[model_name] = reason
            continue
        model = _check_compression(f"{name} on {model_name}", method, given, effect)
        if deploy:
            _check_deployment(f"{name} on {model_name}", method, given, model)
        ran.append(model_name)
    return Coverage(name=name, ran=tuple(ran), skipped=skipped)


def _context(given: Reference, scratch: str, scheme: Scheme | None = None) -> Context:
    from harness.testing.networks import SHAPE
    from harness.training import SGDTrainer

    return Context(
        data=given.data,
        recipe=given.recipe,
        trainer=SGDTrainer(data=given.data, seed=0),
        scheme=scheme or Scheme(),
        input_shape=SHAPE,
        seed=0,
        scratch=Path(scratch),
        fresh=given.fresh,
    )


def _unsupported(name: str, method: Method, given: Reference) -> str | None:
    """The reason, if any, and that ``compress`` gives the same one."""
    before = state(given.model)
    with tempfile.TemporaryDirectory() as scratch:
        context = _context(given, scratch)
        reason = method.unsupported(given.model, context)
        require(reason is None or (isinstance(reason, str) and reason), f"{name}: unsupported gives a reason or None")
        if reason is not None:
            try:
                method.compress(given.model, context)
            except Unsupported:
                pass
            else:
                raise AssertionError(f"{name}: compress raises Unsupported where unsupported gives a reason")
    require(state(given.model) == before, f"{name}: unsupported leaves the model as it was")
    return reason


def _compressed(method: Method, given: Reference, scheme: Scheme | None = None) -> nn.Module:
    with tempfile.TemporaryDirectory() as scratch:
        return method.compress(given.model, _context(given, scratch, scheme))


def _check_compression(where: str, method: Method, given: Reference, effect: Effect | None) -> nn.Module:
    import torch
    from torch import nn

    before, mode = state(given.model), given.model.training
    first, second = _compressed(method, given), _compressed(method, given)
    require(state(given.model) == before, f"{where}: the model given is left untouched")
    require(given.model.training == mode, f"{where}: the model given keeps its mode")
    require(isinstance(first, nn.Module), f"{where}: returns an nn.Module")
    theirs = {value.data_ptr() for value in given.model.state_dict().values() if value.numel()}
    shared = [name for name, value in first.state_dict().items() if value.numel() and value.data_ptr() in theirs]
    require(not shared, f"{where}: the result shares memory with the model given: {shared}")
    require(state(first) == state(second), f"{where}: the same seed gives the same bytes")
    for count in (1, 5):
        x = given.images(count)
        with torch.inference_mode():
            expected, found = given.model(x), first.eval()(x)
        require(found.shape == expected.shape, f"{where}: outputs keep their shape")
        require(found.dtype == expected.dtype, f"{where}: outputs keep their type")
        require(torch.isfinite(found).all(), f"{where}: outputs are finite")
    if effect is not None:
        effect(given.model, first, method)
    return first


def _check_deployment(where: str, method: Method, given: Reference, compressed: nn.Module) -> None:
    import numpy as np
    import torch

    x = given.images(128)
    for hardware_name, hardware in _here():
        # Only a method that looks at the target's scheme has a result of its own for each target.
        model = (_compressed(method, given, hardware.scheme) if method.uses_scheme else compressed).eval()
        with torch.inference_mode():
            expected = model(x).numpy()
        with tempfile.TemporaryDirectory() as folder, loaded(hardware, model, Path(folder), x) as deployed:
            found = answer(deployed, x.numpy())
            precision = deployed.effective["precision"]
        difference = np.abs(found - expected)
        agreement = float((found.argmax(1) == expected.argmax(1)).mean())
        # Integer kernels of different runtimes round differently; floating-point ones only reorder sums.
        limit = 1e-3 if precision == "f32" and not method.uses_scheme else 0.1 * float(np.ptp(expected))
        clause = f"{where}: deployed on {hardware_name} ({precision}) it answers as in torch"
        require(difference.max() <= limit, f"{clause}: largest difference {difference.max():.3g}, allowed {limit:.3g}")
        require(agreement >= 0.97, f"{clause}: {agreement:.1%} of the classes agree")


def _here() -> Iterator[tuple[str, Hardware]]:
    for name in sorted(registry.table("hardware")):
        hardware = registry.create("hardware", name, {})
        if hardware.unavailable() is None:
            yield name, hardware
