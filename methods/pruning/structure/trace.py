"""A run of a model as the list of operators that it executed, on real numbers.

Everything that Python does on the way (loops, sizes computed with integers, functions of functions) has happened when
an operator is recorded, so that any model that can be run can be recorded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from harness.calling import call, evaluating, plain_attention
from harness.errors import Unsupported

if TYPE_CHECKING:
    from harness.contracts import Signature, Tensors

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
        # Tensors that depend on a float input or a weight. A mask or token ids alone choose between ways (such as
        # attention with and without a mask) that have the same layers.
        self.learned: set[int] = set()

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
        if name in _READS and any(self.ref(value).number in self.learned for value in tensors):
            raise Unsupported(
                f"the forward pass of {self.stack[-1] or 'the model'} reads numbers out of a tensor "
                f"({name.removeprefix('aten::')}) and may take another way for another input"
            )
        learned = any(self.ref(value).number in self.learned for value in tensors)
        result = func(*args, **kwargs)
        outputs = [value for value in tree_flatten(result)[0] if isinstance(value, Tensor)]
        if learned:
            self.learned.update(self.ref(value).number for value in outputs)
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


def record(model: nn.Module, inputs: Tensors, signature: Signature) -> Run:
    """Run a model once in evaluation mode and record it.

    Parameters
    ----------
    model : nn.Module
        Left as it was.
    inputs : Tensors
        One batch (of :data:`BATCH` examples where the model allows).
    signature : Signature
        How it is called.

    Raises
    ------
    Unsupported
        If the run reads numbers out of tensors that depend on floats (its course depends on the data), or fails.
    """
    run, stack = Run(), [""]
    try:
        record_into(run, model, inputs, signature, stack)
    except Unsupported:
        raise
    except Exception as error:  # the model's own code runs here and may raise anything
        raise Unsupported(
            f"the forward pass fails on inputs of {_described(inputs)} ({type(error).__name__}: {error})"
        ) from error
    return run


def _described(inputs: Tensors) -> str:
    return ", ".join(f"{name} {list(x.shape)} {str(x.dtype).removeprefix('torch.')}" for name, x in inputs.items())


def record_into(run: Run, model: nn.Module, inputs: Tensors, signature: Signature, stack: list[str]) -> None:
    """:func:`record` into ``run``, which holds what has happened so far if the model raises; ``stack`` likewise."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    recorder = _Recorder(run, stack)
    for name, value in tensors.items():
        run.leaves[recorder.ref(value).number] = name
    for value in (*tensors.values(), *inputs.values()):
        if value.is_floating_point():
            recorder.learned.add(recorder.ref(value).number)
    with evaluating(model), _named_calls(model, stack), plain_attention(), recorder:
        results = call(model, inputs, signature)
    run.results = tuple(recorder.ref(value) for value in results.values())


@contextlib.contextmanager
def _named_calls(model: nn.Module, stack: list[str]) -> Iterator[None]:
    """Keep the name of the running module on top of ``stack``; after an exception it stays there."""
    handles = []
    for name, module in model.named_modules():
        if name:
            handles.append(module.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))
            handles.append(module.register_forward_hook(lambda *_: _left(stack)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _left(stack: list[str]) -> None:
    # What a hook returns would replace the module's output.
    stack.pop()
