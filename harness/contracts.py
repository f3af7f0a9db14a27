"""What a task, a method, a metric, a runtime and a store are: the interfaces that everything hangs on.

Only protocols and frozen dataclasses live here, and nothing imports torch or NumPy at run time, so that the command
line can read them in milliseconds.

Data are **named arrays** with their dtypes, as every runtime names them; axis 0 is the example.

* A :class:`Task` owns a model, its data, its loss and its metrics.
* A :class:`Metric` scores every example, and makes one figure of the scores.
* A :class:`Method` turns an ``nn.Module`` into another ``nn.Module``.
* A :class:`Hardware` *builds* an artifact from the model (in a process that has torch) and *loads* it (in a fresh
  process, without torch where the runtime does not need it), so that load time and peak memory are the runtime's own.
* A :class:`Deployed` is a loaded artifact that answers one bound batch.

A model is called in one place, :func:`harness.calling.call`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from torch import Tensor, nn

    Arrays = Mapping[str, npt.NDArray[Any]]
    """Named NumPy arrays; axis 0 is the example."""
    Tensors = Mapping[str, Tensor]
    """Named tensors; axis 0 is the example."""
    FloatArray = npt.NDArray[np.float64]

JSON = Any
"""A value that ``json.dumps`` accepts."""

DTYPES = ("bool", "uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
"""Types that inputs and targets may have: those that NumPy, torch and the runtimes share."""


@dataclass(frozen=True, kw_only=True)
class Port:
    """One input or output of a model, without the batch axis.

    Parameters
    ----------
    name : str
        As the model's ``forward`` and the artifact name it.
    shape : tuple of int or str
        Of one example. An axis that is given by a name may vary: ``("tokens",)``.
    dtype : str
        One of :data:`DTYPES`.
    values : int or None
        Integers lie in [0, values): the size of a vocabulary, for made-up examples.
    """

    name: str
    shape: tuple[int | str, ...]
    dtype: str = "float32"
    values: int | None = None


@dataclass(frozen=True, kw_only=True)
class Signature:
    """What a model takes and gives.

    Parameters
    ----------
    inputs, outputs : tuple of Port
        In the order of ``forward`` and of its result. Outputs that are not listed are not exported.
    batch : int or None
        The only batch size that the model takes, or None where it takes any.
    """

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    batch: int | None = None

    @classmethod
    def from_json(cls, value: Mapping[str, JSON]) -> Signature:
        """The signature of ``dataclasses.asdict``'s value after a trip through JSON."""

        def ports(items: Sequence[Mapping[str, JSON]]) -> tuple[Port, ...]:
            return tuple(Port(**{**item, "shape": tuple(item["shape"])}) for item in items)

        return cls(inputs=ports(value["inputs"]), outputs=ports(value["outputs"]), batch=value.get("batch"))


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some examples: named inputs and named targets, equally many of each; targets are empty where nothing is known."""

    inputs: Tensors
    targets: Tensors = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of examples."""
        return len(next(iter(self.inputs.values())))

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with ``change`` applied to every input and target."""
        return replace(
            self,
            inputs={name: change(value) for name, value in self.inputs.items()},
            targets={name: change(value) for name, value in self.targets.items()},
        )


class Split(Protocol):
    """Examples in a fixed order; an example's id is its place."""

    @property
    def size(self) -> int:
        """Number of examples."""
        ...

    @property
    def identity(self) -> str:
        """Sha256 (hex) of all inputs and targets."""
        ...

    def batches(self, size: int, *, seed: int | None = None, augment: bool = False) -> Iterator[Batch]:
        """One pass over the examples, ``size`` at a time; the last batch may be short.

        Parameters
        ----------
        size : int
            Examples in a batch.
        seed : int or None
            None gives the fixed order. A seed shuffles; order and augmentation depend on it alone.
        augment : bool
            Whether the split's training augmentation, if it has one, is on.
        """
        ...


@runtime_checkable
class Metric(Protocol):
    """What a task is about, as a number. Implementations are frozen pydantic dataclasses: fields are parameters.

    Two steps, so that intervals and paired tests come from the per-example scores: :meth:`score` leaves some numbers
    for every example (the parts), and :meth:`value` makes one figure of any set of examples.
    """

    @property
    def name(self) -> str:
        """The registered name, with what distinguishes it: ``accuracy``, ``accuracy@5``, ``perplexity``."""
        ...

    @property
    def unit(self) -> str:
        """Of the value as it is shown: "%", "dB", "" for a plain number."""
        ...

    @property
    def better(self) -> Literal["higher", "lower"]:
        """Which way is better."""
        ...

    @property
    def parts(self) -> tuple[str, ...]:
        """What one example leaves: ``("correct", "label", "predicted")``, ``("nll", "tokens")``."""
        ...

    @property
    def proportion(self) -> bool:
        """Whether the value is the mean of a first part that is 0 or 1: Wilson and McNemar are exact then."""
        ...

    def score(self, outputs: Arrays, against: Arrays) -> FloatArray:
        """Score every example.

        Parameters
        ----------
        outputs : Arrays
            A model's outputs.
        against : Arrays
            The targets, or a reference's outputs of the same examples.

        Returns
        -------
        array, float64, shape (n, len(parts))

        Raises
        ------
        InputError
            If outputs and targets do not fit one another (a label out of range, another shape), with the remedy.
        """
        ...

    def value(self, scores: FloatArray) -> Any:
        """One figure of the scores.

        Parameters
        ----------
        scores : array, shape (..., n, len(parts))
            Any leading axes, so that many resamples are evaluated at once.

        Returns
        -------
        array of shape (...)
            In plain units (a fraction, not per cent); NaN where it is not defined.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What one timed query is.

    Parameters
    ----------
    phases : tuple of (str, int)
        Name and number of calls, in order: ``(("forward", 1),)``; for a language model
        ``(("prefill", 1), ("decode", 63))``.
    sizes : mapping
        Sizes of varying axes in the query: ``{"tokens": 128}``.
    unit : {"example", "token"}
        What throughput counts.
    """

    phases: tuple[tuple[str, int], ...] = (("forward", 1),)
    sizes: Mapping[str, int] = field(default_factory=dict)
    unit: Literal["example", "token"] = "example"

    @classmethod
    def from_json(cls, value: Mapping[str, JSON]) -> Workload:
        """The workload of ``dataclasses.asdict``'s value after a trip through JSON."""
        phases = tuple((str(name), int(count)) for name, count in value["phases"])
        return cls(phases=phases, sizes=dict(value["sizes"]), unit=value["unit"])


class Loss(Protocol):
    """What training minimises; see :mod:`harness.losses`."""

    def __call__(self, outputs: Tensors, targets: Tensors, label_smoothing: float = 0.0) -> Tensor:
        """The mean loss of a batch, a scalar tensor with a gradient.

        Raises
        ------
        InputError
            If outputs and targets do not fit one another, or the loss has no label smoothing and one is asked for.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """The integer quantization that a target executes fast.

    Weights are always signed 8-bit and symmetric, [-127, 127], zero point 0.

    Parameters
    ----------
    activation : {"u8", "s8"}
        Integer type of activations.
    activation_symmetric : bool
        True: zero point 0 for s8 (128 for u8); False: affine.
    weight_per_channel : bool
        One weight scale per output channel instead of per tensor.
    quantized_bias : bool
        Bias stored as int32 with scale ``s_x * s_w``; otherwise bias stays float32.
    """

    activation: Literal["u8", "s8"] = "u8"
    activation_symmetric: bool = False
    weight_per_channel: bool = True
    quantized_bias: bool = True


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained.

    Parameters
    ----------
    epochs : int
        Passes over the training data.
    batch_size : int
        Examples per step.
    lr : float
        Peak learning rate.
    optimizer : {"sgd", "adam", "adamw"}
        Adam and AdamW with their usual betas.
    momentum : float
        SGD momentum.
    nesterov : bool
        Whether SGD's momentum is Nesterov's.
    weight_decay : float
        L2 (SGD, Adam) or decoupled (AdamW) decay; not applied to biases and normalisation parameters.
    schedule : {"onecycle", "cosine", "constant"}
        Per-step schedule; "onecycle" warms up linearly over the first 20 % of steps, then decays linearly to 0.
    label_smoothing : float
        Label smoothing of the cross-entropy.
    augment : bool
        Whether the task's training augmentation is on.
    """

    epochs: int
    batch_size: int = 128
    lr: float = 0.1
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    schedule: Literal["onecycle", "cosine", "constant"] = "onecycle"
    label_smoothing: float = 0.0
    augment: bool = True

    def finetune(self, epochs: int, lr_scale: float = 0.1) -> Recipe:
        """The same recipe for ``epochs`` at ``lr * lr_scale``, cosine (Han et al. 2015, §3.2: retrain at lr/10)."""
        return replace(self, epochs=epochs, lr=self.lr * lr_scale, schedule="cosine")


@runtime_checkable
class Task(Protocol):
    """A model with its data, its loss and its metrics; fields are its parameters.

    Implementations are frozen dataclasses; constructors do no work.
    """

    @property
    def name(self) -> str:
        """The registered name, or ``module:function``."""
        ...

    @property
    def signature(self) -> Signature:
        """What the model takes and gives. May run the model once, in a process that has torch."""
        ...

    @property
    def workload(self) -> Workload:
        """What one timed query is."""
        ...

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Metrics against the targets; tables show the first. Empty where there is nothing to score."""
        ...

    @property
    def fidelity(self) -> tuple[Metric, ...]:
        """Metrics of deployed outputs against the torch model's."""
        ...

    def unavailable(self) -> str | None:
        """A reason why the task cannot run here (with the remedy), or None."""
        ...

    def model(self, seed: int) -> nn.Module:
        """A fresh model: initialised from ``seed``, or trained where :meth:`recipe` is None."""
        ...

    def recipe(self) -> Recipe | None:
        """How the baseline is trained; None if :meth:`model` is trained already or cannot be."""
        ...

    def finetuning(self) -> Recipe | None:
        """The recipe that fine-tuning derives from: :meth:`recipe`, or one of its own for a model that came trained.

        None where there is no training data.
        """
        ...

    def loss(self, outputs: Tensors, targets: Tensors, label_smoothing: float = 0.0) -> Tensor:
        """The loss of a batch (see :class:`Loss`): training, fine-tuning, Taylor, SNIP and GraSP use this one."""
        ...

    def data(self) -> Mapping[str, Split]:
        """What methods may see: "train" and "validation", those of them that there are; never the test set."""
        ...

    def test(self) -> Split:
        """The held-out examples.

        Raises
        ------
        Unavailable
            With the reason, where nothing can be scored.
        """
        ...

    def dataset_hash(self) -> str | None:
        """Sha256 of the decompressed data set, or None where there is none."""
        ...

    def notes(self) -> tuple[str, ...]:
        """What was inferred or changed and must be said: one sentence each."""
        ...


@dataclass(frozen=True, kw_only=True)
class Step:
    """One optimizer step that has just been taken; gradients are still in the parameters' ``grad``.

    Parameters
    ----------
    model : nn.Module
        Being trained.
    optimizer : torch.optim.Optimizer
        With its state (momentum), which a method that removes weights has to clear there.
    index : int
        From 0, over all epochs.
    steps : int
        Steps of the whole training.
    epoch : int
        From 0.
    epoch_end : bool
        Whether this was the epoch's last step.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    index: int
    steps: int
    epoch: int
    epoch_end: bool


class Trainer(Protocol):
    """Trains in place on a task's training data; see :class:`harness.training.SGDTrainer`."""

    def __call__(
        self,
        model: nn.Module,
        recipe: Recipe,
        *,
        after_step: Callable[[Step], None] | None = None,
        objective: Callable[[nn.Module, Batch], Tensor] | None = None,
    ) -> Mapping[str, float]:
        """Train ``model`` in place and return its final metrics.

        ``after_step`` runs after every optimizer step (masks are re-applied there), gradients off; ``objective``
        replaces the task's loss and receives (model, batch). :meth:`Context.objective` gives the task's own, for a
        method that adds to it.
        """
        ...


def _silent(fraction: float, message: str) -> None:
    """Progress that nobody watches."""


def _unheard(sentence: str) -> None:
    """A warning that nobody keeps."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """How a task's model is trained further, or anew.

    Parameters
    ----------
    recipe : Recipe
        Fine-tuning derives from it: ``recipe.finetune(epochs)``. Where ``fresh`` is given, it trained the baseline.
    fit : Trainer
        Trains on the task's training data with the task's loss.
    fresh : callable or None
        ``fresh()`` returns the network untrained, initialised as the baseline's training began (equal seed): for
        pruning at initialisation, rewinding and training from scratch. None for a model that came trained.
    """

    recipe: Recipe
    fit: Trainer
    fresh: Callable[[], nn.Module] | None = None


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a method may use.

    Parameters
    ----------
    signature : Signature
        What the model takes and gives.
    data : mapping
        "train" and "validation", those of them that there are.
    loss : Loss
        The task's loss.
    metrics : tuple of Metric
        The task's metrics; the first is the one that its tables show.
    training : Training or None
        None where there is no training data.
    original : callable
        ``original()`` returns the trained model before any compression: the teacher.
    seed : int
        Seed of everything random.
    scratch : Path
        A folder of this step's own.
    progress : callable
        ``progress(fraction, message)``.
    warn : callable
        ``warn(sentence)`` puts a warning on the row: what may spoil a number, with the remedy.
    """

    signature: Signature
    loss: Loss
    original: Callable[[], nn.Module]
    seed: int
    scratch: Path
    data: Mapping[str, Split] = field(default_factory=dict)
    metrics: tuple[Metric, ...] = ()
    training: Training | None = None
    progress: Callable[[float, str], None] = _silent
    warn: Callable[[str], None] = _unheard

    def objective(self, label_smoothing: float = 0.0) -> Callable[[nn.Module, Batch], Tensor]:
        """The task's loss as a function of model and batch."""
        from harness.calling import call

        return lambda model, batch: self.loss(call(model, batch.inputs, self.signature), batch.targets, label_smoothing)


@runtime_checkable
class Method(Protocol):
    """A compression technique. Implementations are frozen pydantic dataclasses: fields are hyper-parameters.

    A method whose result depends on the target's integer scheme leaves those fields open (None) and has a method
    ``targeting(scheme)`` that returns it with them filled: that happens when a cell is resolved, so that the chain in
    the record says what was used.

    A method may have ``promises(original, compressed)``: an iterator of what does not hold of a result, in words
    (a sparsity that was not met). :func:`harness.testing.check_method` holds it to them.
    """

    def compress(self, model: nn.Module, context: Context) -> nn.Module:
        """Return a new, smaller or cheaper model; the one given is left untouched.

        Raises
        ------
        Unsupported
            If this model cannot be treated, naming the layer; before any costly work.
        """
        ...


@runtime_checkable
class Deployed(Protocol):
    """A loaded artifact that answers one bound batch at a time.

    ``bind`` and ``fetch`` convert and are not timed; ``__call__`` then ``synchronize`` is what latency means.
    """

    @property
    def effective(self) -> Mapping[str, JSON]:
        """Settings read back from the runtime, not those asked for.

        Keys: ``precision`` ("f32", "bf16", "int8", ...: that of the multiply-accumulate kernels, the lowest
        that most of them run in), ``threads``, ``streams``, ``provider``, ``kernels`` (mapping
        ``"Type:precision"`` to a count, from the runtime's own profile or executed graph) and, where the
        precision is not what the artifact asks for, ``precision_reason``.
        """
        ...

    def bind(self, inputs: Arrays) -> None:
        """Put one batch, of the shapes and dtypes that :meth:`Hardware.load` was given, where the runtime reads it."""
        ...

    def __call__(self, phase: str = "forward") -> None:
        """Run one call of a phase over the bound batch.

        A runtime that generates has "prefill", which takes the bound prompt and fills the cache, and "decode", which
        takes the most likely next token and makes one more.
        """
        ...

    def synchronize(self) -> None:
        """Wait until the device is done; nothing to do on a CPU."""
        ...

    def fetch(self) -> Arrays:
        """The outputs of the last call by name, as copies."""
        ...

    def close(self) -> None:
        """Release the runtime's resources."""
        ...


@runtime_checkable
class Hardware(Protocol):
    """A runtime on a device. Implementations are frozen pydantic dataclasses: fields are its options."""

    packages: ClassVar[tuple[str, ...]]
    """Distributions whose versions belong into the record and into the cell's identity."""

    @property
    def scheme(self) -> Scheme:
        """The integer quantization that this target wants."""
        ...

    def unavailable(self) -> str | None:
        """A reason why this runtime cannot run here, with the install line, or None."""
        ...

    def build(
        self,
        model: nn.Module,
        signature: Signature,
        example: Tensors,
        folder: Path,
        phases: Sequence[str] = ("forward",),
    ) -> Path:
        """Write the deployable artifact into ``folder`` and return its path (a file, or a folder).

        Parameters
        ----------
        model : nn.Module
            In evaluation mode. One that has an attribute ``artifact`` (a Path) is a file already, such as an ONNX file:
            it is deployed as it is.
        signature : Signature
            Names, shapes and dtypes; the artifact accepts any batch size where the model and the runtime allow.
        example : Tensors
            Inputs of two examples (one where ``signature.batch`` is 1).
        folder : Path
        phases : sequence of str
            What the artifact must run: ``("forward",)``, or ``("prefill", "decode")`` with a key-value cache.

        Raises
        ------
        Unsupported, ExportError
            The model cannot be brought into the runtime's format.
        """
        ...

    def load(self, artifact: Path, *, signature: Signature, inputs: Arrays, threads: int) -> Deployed:
        """Load the artifact for inputs of exactly the shapes and dtypes of ``inputs`` with a fixed thread count."""
        ...


@dataclass(frozen=True, kw_only=True)
class EnergyReading:
    """Energy of one window of inferences, from one meter and domain.

    ``method`` is ``measured_counter``, ``measured_sampled`` or ``modelled``; joules are gross, and
    ``idle_w`` (watts, or None where not known) is what the machine draws without the work.
    """

    method: Literal["measured_counter", "measured_sampled", "modelled"]
    domain: str
    gross_j: float
    idle_w: float | None
    window_s: float
    inferences: int
    inputs: Mapping[str, JSON] = field(default_factory=dict)


class Storage(Protocol):
    """A file format for a model's weights: lossless, so that what it weighs is what the model is."""

    def encode(self, state: Mapping[str, Tensor]) -> bytes:
        """The state dict as the bytes of a file; equal tensors give equal bytes."""
        ...

    def decode(self, data: bytes) -> dict[str, Tensor]:
        """The state dict, bit for bit.

        Raises
        ------
        InputError
            If the data are damaged, truncated or hostile.
        """
        ...

    def sizes(self, state: Mapping[str, Tensor], data: bytes | None = None) -> Mapping[str, int | None]:
        """The state dict in bytes.

        ``plain_bytes`` (raw tensors), ``container_bytes`` (this file, everything in it counted), ``shannon_bytes``
        (the entropy bound of the representation chosen), and the raw tensors by ``zstd_bytes`` (level 19),
        ``xz_bytes`` (preset 9) and ``gzip_bytes`` (level 9), None where that would take minutes. ``data`` is what
        :meth:`encode` returned, where it is at hand.
        """
        ...


class Store(Protocol):
    """Where records go. The only implementation that writes is :class:`results.store.Store`."""

    def add(self, record: Mapping[str, JSON]) -> None:
        """Write the record's file durably, then take it up into the database (idempotent)."""
        ...

    def sync(self) -> int:
        """Take up record files that are not in the database yet; return how many."""
        ...

    def record(self, run_id: str) -> Mapping[str, JSON]:
        """The stored record of a run."""
        ...

    def add_claims(self, paper: str, claims: Iterable[Mapping[str, JSON]]) -> list[str]:
        """Keep the verdicts on a paper's claims; returns their ids."""
        ...

    def finished(self, cell_hashes: Sequence[str]) -> Mapping[str, Mapping[str, JSON]]:
        """The newest row of ``runs`` per cell hash that needs no new run (ok or unsupported)."""
        ...
