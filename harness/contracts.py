"""What a task, a method, a runtime and a store are: the interfaces that everything hangs on.

Only protocols and frozen dataclasses live here, and nothing imports torch at run time, so that the
command line can read them in milliseconds.

* A :class:`Task` owns a model, its data and its training recipe.
* A :class:`Method` turns a trained ``nn.Module`` into another ``nn.Module``.
* A :class:`Hardware` *builds* an artifact from the model (in a process that has torch) and
  *loads* it (in a fresh process, without torch where the runtime does not need it), so that load time and
  peak memory are the runtime's own.
* A :class:`Deployed` is a loaded artifact that answers one bound batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch
    from torch import Tensor, nn

    from harness.training import Recipe

    FloatArray = npt.NDArray[np.float32]
    IntArray = npt.NDArray[np.int64]

JSON = Any
"""A value that ``json.dumps`` accepts."""


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


class Data(Protocol):
    """What a method may see of a task's data: training and validation examples, never the test set."""

    @property
    def train_size(self) -> int:
        """Number of training examples."""
        ...

    @property
    def validation_size(self) -> int:
        """Number of validation examples."""
        ...

    def train(
        self, batch_size: int, *, seed: int, shuffle: bool = True, augment: bool = True
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """One pass over the training data as (inputs float32 (n, ...), labels int64 (n,)).

        The order and the augmentation depend on ``seed`` alone; the last short batch is kept.
        """
        ...

    def validation(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The validation data in fixed order, not augmented."""
        ...


@dataclass(frozen=True, kw_only=True)
class TestSet:
    """The held-out examples, in a fixed order; an example's id is its index.

    Parameters
    ----------
    size : int
        Number of examples.
    batches : callable
        ``batches(batch_size)`` yields (inputs float32 (n, ...), labels int64 (n,)) as NumPy arrays.
    """

    __test__: ClassVar[bool] = False  # pytest: a data set, not a test class

    size: int
    batches: Callable[[int], Iterator[tuple[FloatArray, IntArray]]]


@runtime_checkable
class Task(Protocol):
    """A model with its data, metric and training recipe; fields are its parameters.

    Implementations are frozen dataclasses; constructors do no work.
    """

    @property
    def name(self) -> str:
        """The registered name, or ``module:function``."""
        ...

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one example, without the batch axis."""
        ...

    def unavailable(self) -> str | None:
        """A reason why the task cannot run here (with the remedy), or None."""
        ...

    def model(self, seed: int) -> nn.Module:
        """A fresh model: initialised from ``seed``, or pretrained where :meth:`recipe` is None."""
        ...

    def recipe(self) -> Recipe | None:
        """How the baseline is trained; None if :meth:`model` is trained already or cannot be."""
        ...

    def data(self) -> Data | None:
        """Training and validation data, or None where there are none."""
        ...

    def test(self) -> TestSet | None:
        """The test set, or None where there is none."""
        ...

    def dataset_hash(self) -> str | None:
        """Sha256 of the decompressed data set, or None where there is none."""
        ...

    def no_accuracy_reason(self) -> str | None:
        """Why accuracy is NULL (no labelled data, no pretrained weights), or None."""
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
        loss: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None,
    ) -> Mapping[str, float]:
        """Train ``model`` in place and return its final metrics.

        ``after_step`` runs after every optimizer step (masks are re-applied there), gradients off; ``loss`` replaces
        the cross-entropy and receives (model, inputs, labels).
        """
        ...


def _silent(fraction: float, message: str) -> None:
    """Progress that nobody watches."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a method may use: data, trainer, target scheme, seed, progress, scratch folder.

    Parameters
    ----------
    data : Data or None
        Training and validation data; None for a task that has none.
    recipe : Recipe or None
        The recipe that trained the baseline: fine-tuning recipes derive from it.
    trainer : Trainer or None
        Trains on ``data``; None where ``data`` is None.
    scheme : Scheme
        What the target hardware wants of a quantized model.
    input_shape : tuple of int
        Shape of one example.
    seed : int
        Seed of everything random.
    scratch : Path
        A folder of this step's own.
    progress : callable
        ``progress(fraction, message)``.
    fresh : callable or None
        ``fresh()`` returns the network untrained, initialised as the baseline's training began (equal seed): for
        pruning at initialisation, rewinding and training from scratch. None for a task that trains no baseline.
    """

    data: Data | None
    recipe: Recipe | None
    trainer: Trainer | None
    scheme: Scheme
    input_shape: tuple[int, ...]
    seed: int
    scratch: Path
    progress: Callable[[float, str], None] = _silent
    fresh: Callable[[], nn.Module] | None = None


@runtime_checkable
class Method(Protocol):
    """A compression technique. Implementations are frozen pydantic dataclasses: fields are hyper-parameters.

    ``uses_scheme`` is True where the result depends on the target's :class:`Scheme`; the result is then
    computed once per scheme instead of once.
    """

    uses_scheme: ClassVar[bool]

    def unsupported(self, model: nn.Module, context: Context) -> str | None:
        """A reason why this model cannot be treated (naming the layer), or None."""
        ...

    def compress(self, model: nn.Module, context: Context) -> nn.Module:
        """Return a new, smaller or cheaper model; the one given is left untouched."""
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

    def bind(self, x: FloatArray) -> None:
        """Put one batch, of the shape that :meth:`Hardware.load` was given, where the runtime reads its input."""
        ...

    def __call__(self) -> None:
        """Run one inference over the bound batch."""
        ...

    def synchronize(self) -> None:
        """Wait until the device is done; nothing to do on a CPU."""
        ...

    def fetch(self) -> FloatArray:
        """The outputs of the last inference, shape (n, classes), as a copy."""
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

    def build(self, model: nn.Module, example: Tensor, folder: Path) -> Path:
        """Write the deployable artifact into ``folder`` and return its path (a file, or a folder).

        ``example`` has shape (2, ...); the artifact accepts any batch size where the runtime allows.

        Raises
        ------
        Unsupported, ExportError
            The model cannot be brought into the runtime's format.
        """
        ...

    def load(self, artifact: Path, *, threads: int, batch: tuple[int, ...]) -> Deployed:
        """Load the artifact for inputs of exactly the shape ``batch`` = (n, ...) with a fixed thread count."""
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
