"""What the tasks share whose model maps one input to scores of classes: their loss, metrics and ports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.contracts import Metric, Port, Signature, Workload

if TYPE_CHECKING:
    from torch import Tensor

    from harness.contracts import Tensors


def metrics(*names: str) -> tuple[Metric, ...]:
    """Registered metrics by name, with their defaults."""
    from harness import metrics as table

    return tuple(map(table.create, names))


def signature(shape: tuple[int | str, ...], classes: int) -> Signature:
    """One float32 "input" of this shape, and an "output" of one score a class."""
    return Signature(inputs=(Port(name="input", shape=shape),), outputs=(Port(name="output", shape=(classes,)),))


class Classification:
    """Cross-entropy, accuracy, one forward pass a query; targets are named "label"."""

    @property
    def workload(self) -> Workload:
        """One forward pass."""
        return Workload()

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Top-1 accuracy."""
        return metrics("accuracy")

    @property
    def fidelity(self) -> tuple[Metric, ...]:
        """Largest difference and signal-to-noise ratio of the scores; agreement of the classes; their divergence."""
        from harness.losses import CLASS_FIDELITY

        return metrics(*CLASS_FIDELITY)

    def loss(self, outputs: Tensors, targets: Tensors, label_smoothing: float = 0.0) -> Tensor:
        """Cross-entropy."""
        from harness.losses import CrossEntropy

        return CrossEntropy()(outputs, targets, label_smoothing)

    def notes(self) -> tuple[str, ...]:
        """Nothing is inferred."""
        return ()
