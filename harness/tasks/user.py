"""The user's own model: a function that returns it."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from harness.canonical import dumps
from harness.contracts import Batch, Port, Signature, Workload
from harness.errors import InputError, SpecError
from harness.tasks.assembled import Assembled
from harness.text import shown
from harness.usercode import blamed, find

if TYPE_CHECKING:
    from harness.tasks.assembly import Assembly
    from harness.tasks.given import Given
    from harness.tasks.user_data import LoaderSplit

_OURS = ("input", "input_shape")
"""Parameters that describe the inputs; they are passed on only to a function that takes them."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class UserTask(Assembled):
    """A model from ``module:function``, called as ``function(**parameters)`` once in each process.

    The module is looked for in the current directory first. The function returns one of:

    ``model``
        An ``nn.Module`` that is taken as trained. There is no data, so there is no score; latency, size and energy are
        measured. The shape of one example must be known (below).
    ``(model, loaders)``
        A trained model. ``loaders`` is a mapping with any of the keys "train", "validation" and "test". Each value is
        an iterable of batches such as a ``DataLoader`` or a list; a generator is read once and kept. Batches are
        (x, y), (x, z, y), ((x, z), y), ({...}, y) or one mapping with the targets under "label", "labels", "target",
        "targets" or "y"; values are tensors or arrays of any type. Batch sizes are the loader's: batches are cut and
        joined as a measurement wants. The score is that of "test"; methods see only "train" and "validation", and
        fine-tune on "train".
    ``(model, loaders, recipe)``
        As before, but the model is not trained yet: ``recipe`` (:class:`harness.contracts.Recipe`) trains it on
        "train". With ``epochs=0`` the model is trained, and the recipe's other values are for fine-tuning.
    a mapping, or :class:`harness.tasks.given.Given`
        With any of the keys "model", "data", "recipe", "finetune", "loss", "metrics", "example" and "workload".

    What is not given is inferred from one batch and one call, and said in the row's notes: integer targets mean
    cross-entropy and accuracy, one logit binary cross-entropy, real numbers the mean squared error and its root, token
    ids perplexity. A model in half or double precision is converted to float32; inputs of another floating type than
    the model's become float32, all others stay what they are.

    Without loaders the inputs are those of "example", the parameter ``input`` ("1x3x224x224:float32", or by name
    "ids=1x128:int64<30522,mask=1x128:int64<2") or ``input_shape`` (without the batch axis; passed on only if the
    function takes it), or the model's attribute ``input_shape``.

    Order and augmentation of "train" are the loader's own. While it is read, the random states of torch, NumPy and
    Python are seeded from the cell's seed and epoch, so that a shuffling ``DataLoader`` repeats. "validation" and
    "test" are read under one fixed seed.

    Parameters
    ----------
    target : str
        ``"module:function"``.
    parameters : mapping
        Keyword arguments of the function.
    """

    target: str
    parameters: Mapping[str, Any] = Field(default_factory=dict)

    @property
    def name(self) -> str:
        """``module:function``, as given."""
        return self.target

    def unavailable(self) -> str | None:
        """None: what the function lacks, it says itself when it is called."""
        return None

    def check(self) -> None:
        """Check that the function exists and takes the parameters, without calling it.

        Raises
        ------
        InputError
            If it does not.
        """
        function = find(self.target)
        if not callable(function):
            raise InputError(f"Task {shown(self.target)} is {type(function).__name__}, not a function.")
        _arguments(self.target, function, self.parameters)

    def resolved_parameters(self) -> dict[str, Any]:
        """What the function is called with, for the record and for making this task again."""
        return dict(self.parameters)

    def _assembly(self) -> Assembly:
        return _assembled(self.target, dumps(dict(self.parameters)))


@functools.lru_cache(maxsize=4)
def _assembled(target: str, parameters: str) -> Assembly:
    """Call the user's function once per process, check what it returns, and put it together."""
    from harness.tasks.given import parse

    where = f"Task {shown(target)}"
    function = find(target)
    values = json.loads(parameters)
    with blamed(where):
        result = function(**_arguments(target, function, values))
    return assemble(parse(result, where), where, values)


def assemble(given: Given, where: str, described: Mapping[str, Any]) -> Assembly:
    """An assembly of what was given.

    Parameters
    ----------
    given : Given
        Model and loaders.
    where : str
        "Task 'mine:make'", for messages.
    described : mapping
        ``input`` and ``input_shape``, where they are given.
    """
    from harness.tasks import assembly, batches

    model, notes = assembly.settled(given.model, where)
    names, required = batches.parameters(model)

    loaders = loader_splits(given.data, where, names, required)
    example = None
    if not loaders:
        example = _example(given, where, described, names, required)
    return assembly.Assembly(
        where=where,
        model=model,
        data=loaders,
        example=example,
        loss=given.loss,
        metrics=given.metrics,
        recipe=given.recipe,
        finetune=given.finetune,
        workload=given.workload,
        untested=f"{where} returns no 'test' loader, so there is nothing to measure accuracy on.",
        said=(*given.notes, *notes),
    )


def loader_splits(
    loaders: Mapping[str, Any], where: str, names: Sequence[str], required: Sequence[str]
) -> dict[str, LoaderSplit]:
    """The loaders as splits; sequences of integers may differ in length from batch to batch."""
    from harness.tasks.user_data import LoaderSplit

    def made(varying: bool) -> dict[str, LoaderSplit]:
        return {
            part: LoaderSplit(where=where, part=part, loader=loader, names=names, required=required, varying=varying)
            for part, loader in loaders.items()
        }

    found = made(varying=False)
    return made(varying=True) if any(_is_tokens(split.first()) for split in found.values()) else found


def _is_tokens(batch: Batch) -> bool:
    """Whether there are sequences of integers: only their examples may differ in length."""
    return any(value.ndim == 2 and not value.is_floating_point() for value in batch.inputs.values())


def _example(
    given: Given, where: str, described: Mapping[str, Any], names: tuple[str, ...], required: tuple[str, ...]
) -> Batch | None:
    from harness.tasks import batches, inputs

    if given.example is not None:
        example = given.example if isinstance(given.example, Mapping | tuple | list) else (given.example,)
        # As the inputs of a pair, so that the last of several is not taken for targets.
        return batches.inputs_of(example, names, required, f"{where}: the example")
    if "input" in described:
        return _made_up(inputs.parse(described["input"], names, where))
    shape = described.get("input_shape", getattr(given.model, "input_shape", None))
    if shape is None:
        return None
    valid = isinstance(shape, list | tuple) and all(isinstance(size, int) and size > 0 for size in shape)
    if not valid or not shape:
        raise InputError(
            f"{where}: the shape of one example is not known (input_shape: {shape!r}). Give a list of sizes without "
            "the batch axis: input_shape = [3, 224, 224]."
        )
    return _made_up((Port(name=names[0] if names else "input", shape=tuple(shape)),))


def _made_up(ports: tuple[Port, ...]) -> Batch:
    from harness.reference import made_up

    return Batch(inputs=made_up(Signature(inputs=ports, outputs=()), Workload(), 2))


def _arguments(target: str, function: Callable[..., Any], parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments to pass: all parameters, but those about the inputs only where the function takes them."""
    arguments = dict(parameters)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-in callables have none
        return arguments
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    for key in _OURS:
        if key not in signature.parameters and inspect.Parameter.VAR_KEYWORD not in kinds:
            arguments.pop(key, None)
    try:
        signature.bind(**arguments)
    except TypeError as error:
        names = [name for name in signature.parameters if name != "self"]
        raise SpecError(
            f"Task {shown(target)}: {error}. The function takes: {', '.join(names) or 'nothing'}."
        ) from None
    return arguments
