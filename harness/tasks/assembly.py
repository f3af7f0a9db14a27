"""A model and its data put together: what is not given is found out from one batch and one call, and is said."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from harness.calling import arguments, evaluating, flatten
from harness.contracts import Batch, Loss, Metric, Port, Recipe, Signature, Split, Workload
from harness.errors import AssayError, InputError, Unavailable, explanation
from harness.tasks import classes, finetuning, splits
from harness.usercode import blamed

if TYPE_CHECKING:
    from torch import Tensor, nn

    from harness.contracts import Tensors

PARTS = ("test", "validation", "train")
_INFERENCE = 256
_DEFAULT_BATCH = 128
_INTEGERS = ("bool", "uint8", "int8", "int16", "int32", "int64")
_EXACT = 2**24
_ROUNDING = 1e-4


def settled(model: nn.Module, where: str) -> tuple[nn.Module, tuple[str, ...]]:
    """The model as everything else takes it: plain, in float32, in evaluation mode; and what was changed for it."""
    import torch

    from harness.bake import bake

    with blamed(f"{where}: bringing the model into a plain form"):
        model, said = bake(model)
        notes = tuple(said)
        tensors = [*model.parameters(), *model.buffers()]
        kinds = Counter(str(value.dtype).removeprefix("torch.") for value in tensors if value.is_floating_point())
        if set(kinds) - {"float32"}:
            most = kinds.most_common(1)[0][0]
            others = "" if len(kinds) == 1 else f" (and {', '.join(sorted(set(kinds) - {most}))})"
            model = model.to(torch.float32)
            notes = (*notes, f"The model came in {most}{others}; it is converted to float32.")
        return model.to("cpu").eval(), notes


@dataclass(frozen=True, kw_only=True)
class _Facts:
    """What one call shows."""

    signature: Signature
    workload: Workload
    casts: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Scoring:
    """Loss and metrics; ``missing`` says why there is no loss."""

    loss: Loss | None
    metrics: tuple[Metric, ...]
    scores: bool
    missing: str = ""
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, eq=False)
class Assembly:
    """A model with its data.

    Parameters
    ----------
    where : str
        "Task 'mine:make'", for messages.
    model : nn.Module
        Settled (:func:`settled`).
    data : mapping
        Splits under "train", "validation" and "test".
    example : Batch or None
        Inputs where there are no data.
    signature : Signature or None
        Where it is known without a call.
    varying : tuple of Port
        The inputs, where some of their axes vary and are known to.
    loss, metrics, recipe, finetune, workload
        As in :class:`harness.tasks.given.Given`.
    untested : str
        Why there is nothing to score, where there is no "test".
    untrained : str
        Why a score would mean nothing.
    said : tuple of str
        Notes from before.
    """

    where: str
    model: nn.Module
    data: Mapping[str, Split] = field(default_factory=dict)
    example: Batch | None = None
    signature: Signature | None = None
    varying: tuple[Port, ...] = ()
    loss: Any = None
    metrics: tuple[Any, ...] = ()
    recipe: Recipe | None = None
    finetune: Recipe | None = None
    workload: Workload = field(default_factory=Workload)
    untested: str = ""
    untrained: str = ""
    said: tuple[str, ...] = ()

    @functools.cached_property
    def facts(self) -> _Facts:
        """Signature, batch size and dtypes, from one call of two examples, or of one where two are refused."""
        first = self._seen()
        notes: list[str] = []
        if self.signature is not None:
            return self._fitted(self.signature, first)
        casts = self._casts(first)
        if casts:
            was = ", ".join(f"{name!r} ({_dtype(first.inputs[name])})" for name in casts)
            notes.append(f"Inputs {was} are converted to float32, the model's type.")
        first = _cast(first, casts)
        try:
            outputs, batch, said = self._answers(first)
        except InputError as refused:
            integers, outputs, batch, said = self._as_floats(first, refused)
            notes.append(
                f"Inputs {', '.join(map(repr, integers))} are integers and become float32: the model takes it."
            )
            first, casts = _cast(first, integers), (*casts, *integers)
        notes += said
        inputs = tuple(_port(name, value, with_values=True) for name, value in first.inputs.items())
        found = Signature(
            inputs=inputs, outputs=tuple(_port(name, value) for name, value in outputs.items()), batch=batch
        )
        found, workload, said = self._named(found) if self.varying else self._varying(found, first, casts)
        return _Facts(signature=found, workload=workload, casts=casts, notes=(*notes, *said))

    @functools.cached_property
    def scoring(self) -> _Scoring:
        """Loss and metrics: given, or inferred from the outputs and targets of some examples."""
        from harness.losses import CLASS_FIDELITY, infer

        metrics = tuple(self._metric(item) for item in self.metrics)
        loss = None if self.loss is None else self._loss(self.loss)
        labelled = [part for part in PARTS if part in self._firsts and self._firsts[part].targets]
        shape = self.facts.signature.outputs[0].shape
        scores = _of_classes(metrics[0]) if metrics else len(shape) == 1 and shape[0] != 1
        if not labelled or (loss is not None and metrics):
            missing = "" if labelled else "no loader has targets"
            return _Scoring(loss=loss, metrics=metrics, scores=scores, missing=missing)
        batch = splits.cut(_cast(self._firsts[labelled[0]], self.facts.casts), 0, _INFERENCE)
        try:
            found = infer(self._outputs(batch), batch.targets, metrics[0] if metrics else None)
        except InputError as error:
            if metrics:  # there is something to measure; only training needs a loss
                return _Scoring(loss=None, metrics=metrics, scores=scores, missing=str(error))
            raise InputError(f"{self.where}: the loader {labelled[0]!r}: {error}") from error
        return _Scoring(
            loss=loss or found.loss,
            metrics=metrics or found.metrics,
            scores=scores if metrics else len(found.fidelity) == len(CLASS_FIDELITY),
            notes=found.notes,
        )

    def split(self, part: str) -> Split:
        """The examples of a part as the model takes them."""
        if part not in self._splits:
            casts = self.facts.casts
            change = functools.partial(_cast, names=casts)
            self._splits[part] = splits.ChangedSplit(split=self.data[part], change=change) if casts else self.data[part]
        return self._splits[part]

    def test(self) -> Split:
        """The test examples.

        Raises
        ------
        Unavailable
            If there are none, with the reason.
        InputError
            If they have no targets.
        """
        if "test" not in self.data or self.untrained:
            raise Unavailable(self.untrained or self.untested)
        if not self._firsts["test"].targets:
            raise InputError(
                f"{self.where}: the loader 'test' has no targets. Give batches (inputs, targets), or leave it out."
            )
        return self.split("test")

    def evaluate_loss(self, outputs: Tensors, targets: Tensors, label_smoothing: float) -> Tensor:
        """The loss of a batch.

        Raises
        ------
        InputError
            If there is none, with the reason.
        """
        if self.scoring.loss is None:
            raise InputError(f"{self.where}: there is no loss: {self.scoring.missing}. Give one beside the model.")
        return self.scoring.loss(outputs, targets, label_smoothing)

    def fidelity(self) -> tuple[Metric, ...]:
        """Metrics against torch's outputs; those of classes where the outputs are, or look like, their scores."""
        from harness.losses import CLASS_FIDELITY, VALUE_FIDELITY

        return classes.metrics(*(CLASS_FIDELITY if self.scoring.scores else VALUE_FIDELITY))

    def finetuning(self) -> Recipe | None:
        """The recipe that fine-tuning derives from; None without training data, a loss or parameters."""
        trainable = any(value.requires_grad for value in self.model.parameters())
        if "train" not in self.data or self.scoring.loss is None or not trainable:
            return None
        return self.finetune or self.recipe or finetuning.default(self.model, self._batch_size())

    def notes(self) -> tuple[str, ...]:
        """All that was inferred or changed."""
        notes = [*self.said, *self.facts.notes, *self.scoring.notes]
        if not (self.finetune or self.recipe) and (recipe := self.finetuning()):
            notes.append(
                f"Fine-tuning derives from a default recipe: {recipe.optimizer}, lr {recipe.lr:g}, batches of "
                f"{recipe.batch_size}."
            )
        return tuple(notes)

    @functools.cached_property
    def _splits(self) -> dict[str, Split]:
        """Splits that were asked for, which remember their identity."""
        return {}

    @functools.cached_property
    def _firsts(self) -> dict[str, Batch]:
        """The first batch of every part."""
        return {part: _first(split) for part, split in self.data.items()}

    def _batch_size(self) -> int:
        """That of the loader; of one that is a list, at most 128."""
        own = self.facts.signature.batch or getattr(getattr(self.data["train"], "loader", None), "batch_size", None)
        return own if isinstance(own, int) else min(_DEFAULT_BATCH, len(self._firsts["train"]))

    def _seen(self) -> Batch:
        for part in PARTS:
            if part in self._firsts:
                return self._firsts[part]
        if self.example is None:
            raise InputError(
                f"{self.where}: the shape of one example is not known. Return loaders or an example, give the "
                'parameter input = "1x3x224x224:float32" or input_shape = [3, 224, 224], or set the model\'s '
                "attribute input_shape."
            )
        return self.example

    def _casts(self, first: Batch) -> tuple[str, ...]:
        """Inputs of another floating type than the model's parameters; but not doubles that it needs."""
        inputs = first.inputs
        has_floats = any(value.is_floating_point() for value in self.model.parameters())
        other = {name for name, value in inputs.items() if value.is_floating_point() and _dtype(value) != "float32"}
        casts = tuple(name for name in inputs if name in other and (has_floats or _dtype(inputs[name]) == "bfloat16"))
        doubles = tuple(name for name in casts if bool((inputs[name].float() != inputs[name]).any()))
        if not doubles:
            return casts
        rest = tuple(name for name in casts if name not in doubles)
        try:
            kept, cast = (self._answers(_cast(first, names))[0] for names in (rest, casts))
        except InputError:  # it takes no doubles
            return casts
        return casts if all(_alike(value, cast[name]) for name, value in kept.items()) else rest

    def _fitted(self, signature: Signature, first: Batch) -> _Facts:
        """Facts of a known signature: inputs of the loaders have to be of its types, or become its float32."""
        casts = []
        for port in signature.inputs:
            if port.name not in first.inputs:
                raise InputError(
                    f"{self.where}: the data have no input {port.name!r}; they have {', '.join(first.inputs)}."
                )
            found = _dtype(first.inputs[port.name])
            if found == port.dtype:
                continue
            if port.dtype != "float32" or found == "bool":
                raise InputError(f"{self.where}: the input {port.name!r} is {found}; the model takes {port.dtype}.")
            casts.append(port.name)
        notes = (f"Inputs {', '.join(map(repr, casts))} are converted to float32, the model's type.",) if casts else ()
        return _Facts(signature=signature, workload=self.workload, casts=tuple(casts), notes=notes)

    def _answers(self, first: Batch) -> tuple[dict[str, Tensor], int | None, list[str]]:
        """The outputs of two examples, or of as many as the model takes: that number, and what is said about it."""
        good, notes, problem = self._tried_with(first, 2)
        if good:
            _, _, other = self._tried_with(first, 3)
            if not other:
                return good, None, notes
            said = f"The model takes batches of 2 only (with 3 it {other}): it is measured and evaluated so."
            return good, 2, [*notes, said]
        problems = [problem]
        # A batch size that is written into the code is one, or that of the loader.
        for count in dict.fromkeys((1, min(len(first), _INFERENCE))):
            good, notes, problem = self._tried_with(first, count)
            if good:
                takes = "one example at a time" if count == 1 else f"batches of {count} only"
                said = f"The model takes {takes} (with two it {problems[0]}): it is measured and evaluated so."
                return good, count, [*notes, said]
            problems.append(problem)
        given = ", ".join(f"{name} {tuple(value.shape[1:])} {_dtype(value)}" for name, value in first.inputs.items())
        if problems[0] == problems[1] or all(problem.startswith("returned") for problem in problems):
            raise InputError(f"{self.where}: called with {given} the model {problems[0]}")
        raise InputError(
            f"{self.where}: called with {given} the model {problems[0]} with two examples, and {problems[1]} with one"
        )

    def _tried_with(self, first: Batch, count: int) -> tuple[dict[str, Tensor], list[str], str]:
        """The outputs of ``count`` examples, what is said about them, and what is wrong where there are none."""
        try:
            flat = self._flat({name: _repeated(value, count) for name, value in first.inputs.items()})
        except AssayError:
            raise
        except Exception as error:  # noqa: BLE001 - the user's model may raise anything: it is reported as theirs
            return {}, [], f"raised {explanation(error)}"
        return _read(flat, count)

    def _as_floats(
        self, first: Batch, refused: InputError
    ) -> tuple[tuple[str, ...], dict[str, Tensor], int | None, list[str]]:
        """The integer inputs that the model takes as floats only, and its answers: one of them, or all."""
        integers = tuple(name for name, value in first.inputs.items() if _dtype(value) in _INTEGERS)
        for names in dict.fromkeys([*((name,) for name in integers), integers]):
            try:
                return names, *self._answers(_cast(first, names))
            except InputError:
                continue
        raise refused

    def _flat(self, inputs: Tensors) -> dict[str, Any]:
        import torch

        named = Signature(inputs=tuple(Port(name=name, shape=()) for name in inputs), outputs=())
        args, kwargs = arguments(self._tried, inputs, named)
        with evaluating(self._tried), torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)
            return flatten(self._tried(*args, **kwargs))

    @functools.cached_property
    def _tried(self) -> nn.Module:
        """A copy to call: some models count their calls or keep what they saw, and must stay as they were given."""
        from torch.nn.parameter import is_lazy

        if any(is_lazy(value) for value in (*self.model.parameters(), *self.model.buffers())):
            return self.model  # the first call gives its weights their shapes
        with blamed(f"{self.where}: copying the model"):
            return copy.deepcopy(self.model)

    def _outputs(self, batch: Batch) -> dict[str, Tensor]:
        """The signature's outputs for a batch, called as the model allows."""
        import torch

        signature = self.facts.signature
        size = signature.batch or max(2, len(batch))
        parts = [splits.cut(batch, start, start + size).inputs for start in range(0, len(batch), size)]
        flat = [
            self._flat({name: _repeated(v, max(len(v), 2)) for name, v in part.items()} if size > 1 else part)
            for part in parts
        ]
        return {
            port.name: torch.cat([values[port.name] for values in flat])[: len(batch)] for port in signature.outputs
        }

    def _varying(self, found: Signature, first: Batch, casts: Sequence[str]) -> tuple[Signature, Workload, list[str]]:
        """Name the axes that differ between the loaders' examples, once the model has answered both shapes."""
        loaders = [split for split in self.data.values() if getattr(split, "varying", False)]
        other = next(
            (batch for split in loaders for batch in split.stream(0) if _shapes(batch) != _shapes(first)),  # type: ignore[attr-defined]
            None,
        )
        if other is None:
            return found, self.workload, []
        outputs, _, _ = self._answers(_cast(other, casts))
        lengths: dict[tuple[int, int], str] = {}

        def ports(before: tuple[Port, ...], after: Tensors) -> tuple[Port, ...]:
            renamed = []
            for port in before:
                pairs = list(zip(port.shape, after[port.name].shape[1:], strict=True))
                for a, b in pairs:
                    if a != b:
                        lengths.setdefault((int(a), int(b)), "tokens" if not lengths else f"size{len(lengths)}")
                shape = tuple(lengths[int(a), int(b)] if a != b else a for a, b in pairs)
                renamed.append(dataclasses.replace(port, shape=shape))
            return tuple(renamed)

        changed = dataclasses.replace(
            found, inputs=ports(found.inputs, other.inputs), outputs=ports(found.outputs, outputs)
        )
        sizes = {name: size for (size, _), name in lengths.items()}
        note = f"Examples differ in length: {', '.join(f'{name} = {size}' for name, size in sizes.items())} is timed."
        if self.workload.sizes:
            return changed, self.workload, []
        return changed, dataclasses.replace(self.workload, sizes=sizes), [note]

    def _named(self, found: Signature) -> tuple[Signature, Workload, list[str]]:
        """Name the axes of the outputs that follow those of the inputs, by a call with other sizes."""
        from harness.reference import made_up

        taken = tuple(port for port in self.varying if port.name in {known.name for known in found.inputs})
        known = {port.name: port.shape for port in found.inputs}
        used = {
            axis: int(size)
            for port in taken
            for axis, size in zip(port.shape, known[port.name], strict=True)
            if isinstance(axis, str)
        }
        # Other sizes, and no longer ones, which a table of positions may not have.
        others = {
            axis: size - 1 - place if size > 4 else size + 1 + place for place, (axis, size) in enumerate(used.items())
        }
        names = {size: axis for axis, size in others.items()}
        inputs = made_up(Signature(inputs=taken, outputs=()), Workload(sizes=others), 2)
        outputs, _, _ = self._answers(Batch(inputs=inputs))

        def named(port: Port) -> Port:
            sizes = outputs[port.name].shape[1:]
            shape = tuple(names.get(int(b), int(b)) if a != b else a for a, b in zip(port.shape, sizes, strict=True))
            return dataclasses.replace(port, shape=shape)

        return (
            dataclasses.replace(found, inputs=taken, outputs=tuple(map(named, found.outputs))),
            self.workload,
            [],
        )

    def _metric(self, item: Any) -> Metric:
        from harness import metrics

        if isinstance(item, Metric) and not isinstance(item, type):
            return metrics.checked(item, self.where)
        if not isinstance(item, str | Mapping):
            raise InputError(
                f"{self.where}: a metric must be a name, a table with a name, or an object with score and value; it is "
                f"{type(item).__name__}."
            )
        return metrics.create(item)

    def _loss(self, given: Any) -> Loss:
        from harness import losses

        if type(given).__module__ == losses.__name__:
            own: Loss = given
            return own
        if not callable(given):
            raise InputError(
                f"{self.where}: the loss must be a function of outputs and targets; it is {type(given).__name__}."
            )
        return OwnLoss(where=self.where, function=given)


@dataclass(frozen=True, kw_only=True)
class OwnLoss:
    """A loss of the user's, or one of torch's: of the only output and target, or of the mappings of several."""

    where: str
    function: Callable[..., Any]

    def __call__(self, outputs: Tensors, targets: Tensors, label_smoothing: float = 0.0) -> Tensor:
        """The loss of a batch; see :class:`harness.contracts.Loss`."""
        import torch

        if label_smoothing:
            raise InputError(f"{self.where}: its own loss has no label smoothing; set label_smoothing to 0.")
        torchs = (getattr(self.function, "__module__", None) or type(self.function).__module__).startswith("torch.")
        single = torchs or len(outputs) == len(targets) == 1
        values = (next(iter(outputs.values())), next(iter(targets.values()))) if single else (outputs, targets)
        with blamed(f"{self.where}: its loss"):
            found = self.function(*values)
        if not isinstance(found, torch.Tensor) or found.ndim:
            kind = f"of shape {tuple(found.shape)}" if isinstance(found, torch.Tensor) else type(found).__name__
            raise InputError(f"{self.where}: its loss must be one number, a tensor with a gradient; it is {kind}.")
        return found


def _first(split: Split) -> Batch:
    own = getattr(split, "first", None)
    found: Batch = own() if own else next(iter(split.batches(_INFERENCE)))
    return found


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _shapes(batch: Batch) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape[1:]) for name, value in batch.inputs.items()}


def _cast(batch: Batch, names: Sequence[str]) -> Batch:
    if not names:
        return batch
    return dataclasses.replace(
        batch, inputs={name: _float(name, value) if name in names else value for name, value in batch.inputs.items()}
    )


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether two outputs differ by no more than the rounding of float32 explains."""
    a, b = a.double(), b.double()
    return bool(((a - b).abs() <= _ROUNDING * a.abs().amax().clamp(min=1e-30)).all())


def _float(name: str, value: Tensor) -> Tensor:
    if _dtype(value) in _INTEGERS[1:] and value.numel() and int(value.abs().max()) > _EXACT:
        raise InputError(
            f"The input {name!r} holds integers above 2**24, which float32 does not tell apart, and the model takes no "
            "integers. Give floats, or cast in forward."
        )
    return value.float()


def _repeated(value: Tensor, count: int) -> Tensor:
    """``count`` examples, repeated where there are fewer."""
    import torch

    return value[torch.arange(count) % len(value)]


def _port(name: str, value: Tensor, *, with_values: bool = False) -> Port:
    integer = not value.is_floating_point() and _dtype(value) != "bool"
    values = None
    if with_values and integer and value.numel() and int(value.min()) >= 0:
        values = int(value.max()) + 1
    return Port(name=name, shape=tuple(value.shape[1:]), dtype=_dtype(value), values=values)


def _read(flat: Mapping[str, Any], count: int) -> tuple[dict[str, Tensor], list[str], str]:
    """The outputs that can be scored, what is said about the others, and what is wrong where there is none."""
    import torch

    good = {
        name: value
        for name, value in flat.items()
        if isinstance(value, torch.Tensor)
        and _dtype(value) in ("float16", "float32", "float64")
        and value.ndim
        and len(value) == count
    }
    others = {name: value for name, value in flat.items() if name not in good}
    if good:
        notes = [f"The output {name!r} ({_kind(value)}) is left out." for name, value in others.items()]
        return good, notes, ""
    shown = "; ".join(f"{name!r}: {_kind(value)}" for name, value in others.items()) or "nothing"
    if not flat or all(value is None for value in flat.values()):
        shown = "None"
    return (
        {},
        [],
        (
            f"returned {shown}. Allowed are float tensors whose first axis is the example, alone or in a tuple, list, "
            "mapping or ModelOutput: scores of classes rather than classes, tensors rather than arrays."
        ),
    )


def _kind(value: Any) -> str:
    import torch

    return f"{_dtype(value)} {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__


def _of_classes(metric: Metric) -> bool:
    """Whether a metric reads scores of classes."""
    from harness.metrics.classes import Classes
    from harness.metrics.tokens import Perplexity

    return isinstance(metric, Classes | Perplexity)
