"""A run of a model as the list of operators that it executed, on real numbers.

Everything that Python does on the way (loops, sizes computed with integers, functions of functions) has happened when
an operator is recorded, so that any model that can be run can be recorded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from harness.errors import Unsupported

BATCH = 2
"""Examples in the recorded batch: not 1, which a reshape could mistake for an axis to drop."""

# They read a number out of a tensor, after which the run depends on the data.
_READS = ("aten::_local_scalar_dense", "aten::item", "aten::equal", "aten::nonzero", "aten::is_nonzero")


@dataclass(frozen=True)
class Ref:
    """A tensor of the run, by number."""

    number: int


@dataclass(frozen=True, kw_only=True)
class Op:
    """One executed operator.

    Parameters
    ----------
    name : str
        Of the operator, such as ``"aten::convolution"``; of an in-place one without the trailing underscore.
    function : callable
        The operator.
    args, kwargs
        Its arguments, tensors as :class:`Ref`.
    outputs : tuple of Ref
        Tensors that it returned.
    shapes : tuple of tuple of int
        Of the outputs.
    inputs : tuple of tuple of int
        Shapes of the tensors among the arguments, in order.
    path : str
        Name of the innermost module that was running.
    """

    name: str
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Ref, ...]
    shapes: tuple[tuple[int, ...], ...]
    inputs: tuple[tuple[int, ...], ...]
    path: str

    def argument(self, name: str, default: Any = None) -> Any:
        """An argument by the name that the operator's schema gives it."""
        for position, declared in enumerate(self.function._schema.arguments):
            if declared.name == name:
                given = self.args[position] if position < len(self.args) else self.kwargs.get(name)
                return default if given is None else given
        return default


@dataclass(kw_only=True)
class Run:
    """What was recorded.

    Parameters
    ----------
    ops : list of Op
        In order.
    leaves : dict of int to str
        Parameters and buffers among the tensors, by number; of a shared one the first name.
    results : tuple of Ref
        The model's outputs.
    """

    ops: list[Op] = field(default_factory=list)
    leaves: dict[int, str] = field(default_factory=dict)
    results: tuple[Ref, ...] = ()


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    def __init__(self, run: Run, stack: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.run, self.stack = run, stack
        self.numbers: Any = WeakIdKeyDictionary()
        self.count = 0

    def ref(self, tensor: Tensor) -> Ref:
        if tensor not in self.numbers:
            self.numbers[tensor] = Ref(self.count)
            self.count += 1
        found: Ref = self.numbers[tensor]
        return found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}

        def refer(value: Any) -> Any:
            return self.ref(value) if isinstance(value, Tensor) else value

        # Before the call, which may change its arguments.
        given, named = tree_map(refer, args), tree_map(refer, kwargs)
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)]
        inputs = tuple(tuple(value.shape) for value in tensors)
        name = str(func._schema.name)
        if name in _READS:
            raise Unsupported(
                f"the forward pass of {self.stack[-1] or 'the model'} reads numbers out of a tensor "
                f"({name.removeprefix('aten::')}) and may take another way for another input"
            )
        result = func(*args, **kwargs)
        outputs = [value for value in tree_flatten(result)[0] if isinstance(value, Tensor)]
        base = name if name.endswith("__") else name.removesuffix("_")
        self.run.ops.append(
            Op(
                name=base,
                function=func,
                args=given,
                kwargs=named,
                outputs=tuple(self.ref(value) for value in outputs),
                shapes=tuple(tuple(value.shape) for value in outputs),
                inputs=inputs,
                path=self.stack[-1],
            )
        )
        return result


def record(model: nn.Module, input_shape: tuple[int, ...]) -> Run:
    """Run a model once in evaluation mode and record it.

    Parameters
    ----------
    model : nn.Module
        Left as it was.
    input_shape : tuple of int
        Of one example; the run has a batch of :data:`BATCH`.

    Raises
    ------
    Unsupported
        If the run reads numbers out of tensors (its course depends on the data), or fails.
    """
    run, stack = Run(), [""]
    try:
        record_into(run, model, input_shape, stack)
    except Unsupported:
        raise
    except Exception as error:  # the model's own code runs here and may raise anything
        raise Unsupported(
            f"the forward pass fails on a batch of {BATCH} examples of shape {input_shape} "
            f"({type(error).__name__}: {error})"
        ) from error
    return run


def record_into(run: Run, model: nn.Module, input_shape: tuple[int, ...], stack: list[str]) -> None:
    """:func:`record` into ``run``, which holds what has happened so far if the model raises; ``stack`` likewise."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    first = next((value for value in tensors.values() if value.is_floating_point()), torch.zeros(0))
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, *input_shape, generator=generator).to(first.device, first.dtype)
    recorder = _Recorder(run, stack)
    for name, value in tensors.items():
        run.leaves[recorder.ref(value).number] = name
    with evaluating(model), _named_calls(model, stack), plain_attention(), torch.no_grad(), recorder:
        result = model(x)
    run.results = tuple(recorder.ref(value) for value in tree_flatten(result)[0] if isinstance(value, Tensor))


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation mode for a while; every module's mode is restored."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def _named_calls(model: nn.Module, stack: list[str]) -> Iterator[None]:
    """Keep the name of the running module on top of ``stack``; after an exception it stays there."""
    handles = []
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))
            handles.append(module.register_forward_hook(lambda *_: void(stack.pop())))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def void(_: Any) -> None:
    """Nothing: what a hook returns would replace the module's output."""


@contextlib.contextmanager
def plain_attention() -> Iterator[None]:
    """Without the fused inference path of torch's transformer layers, whose parts cannot be seen."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
