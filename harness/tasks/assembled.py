"""What a task answers from an assembly of model and data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from harness.contracts import Metric, Recipe, Signature, Split, Workload
from harness.usercode import blamed

if TYPE_CHECKING:
    from torch import Tensor, nn

    from harness.contracts import Tensors
    from harness.tasks.assembly import Assembly


class Assembled:
    """What a task answers from its :class:`harness.tasks.assembly.Assembly`."""

    def _assembly(self) -> Assembly:
        raise NotImplementedError

    @property
    def signature(self) -> Signature:
        """What the model takes and gives: from one batch and one call."""
        return self._assembly().facts.signature

    @property
    def workload(self) -> Workload:
        """What one timed query is."""
        return self._assembly().facts.workload

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Those that were given, or inferred from the targets."""
        return self._assembly().scoring.metrics

    @property
    def fidelity(self) -> tuple[Metric, ...]:
        """Metrics of deployed outputs against torch's."""
        return self._assembly().fidelity()

    def model(self, seed: int) -> nn.Module:  # noqa: ARG002 - whoever made the model decided about its randomness
        """A copy of the model."""
        import copy

        assembly = self._assembly()
        with blamed(f"{assembly.where}: copying the model"):
            return copy.deepcopy(assembly.model)

    def recipe(self) -> Recipe | None:
        """The recipe that trains the model from scratch, or None: the model is taken as trained."""
        return self._assembly().recipe

    def finetuning(self) -> Recipe | None:
        """The recipe that fine-tuning derives from; None without labelled training data."""
        return self._assembly().finetuning()

    def loss(self, outputs: Tensors, targets: Tensors, label_smoothing: float = 0.0) -> Tensor:
        """The given or inferred loss of a batch."""
        return self._assembly().evaluate_loss(outputs, targets, label_smoothing)

    def data(self) -> Mapping[str, Split]:
        """The training and validation examples, those of them that there are."""
        assembly = self._assembly()
        return {part: assembly.split(part) for part in ("train", "validation") if part in assembly.data}

    def test(self) -> Split:
        """The test examples, or Unavailable with the reason."""
        return self._assembly().test()

    def dataset_hash(self) -> str | None:
        """Sha256 of the test examples, or None where there are none."""
        assembly = self._assembly()
        return assembly.test().identity if "test" in assembly.data else None

    def notes(self) -> tuple[str, ...]:
        """What was inferred or changed."""
        return self._assembly().notes()
