"""Network slimming: training makes the scales of batch normalisations sparse, and channels with small ones go."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from harness.errors import Unsupported
from harness.training import cross_entropy
from methods.layers import masks
from methods.pruning.structure import budget, criteria
from methods.pruning.structure.find import find
from methods.pruning.structure.recalibration import recalibrate
from methods.pruning.structure.surgery import remove

if TYPE_CHECKING:
    from harness.contracts import Context


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class NetworkSlimming:
    """Train with an L1 penalty on batch-normalisation scales, remove the channels of the smallest, fine-tune.

    The penalty is ``penalty`` times the sum of ``|gamma|`` over all batch normalisations; its subgradient
    ``penalty * sign(gamma)`` is added to that of the loss. Afterwards one threshold on ``|gamma|`` for the whole
    network removes the share ``ratio`` of the channels that pass a batch normalisation and can be removed. Channels
    that only go together (those of a residual sum) are ranked by the mean of their scales. Every layer keeps at least
    one channel, or ``min_channels``.

    Source: Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017
    (arXiv:1708.06519), §3. The paper keeps the channels of residual sums and selects among them before each block;
    here they are removed together, everywhere, so that no selection is left in the network.

    ::

        @inproceedings{liu2017slimming,
          title     = {Learning Efficient Convolutional Networks through Network Slimming},
          author    = {Liu, Zhuang and Li, Jianguo and Shen, Zhiqiang and Huang, Gao and Yan, Shoumeng
                       and Zhang, Changshui},
          booktitle = {IEEE International Conference on Computer Vision},
          year      = {2017}
        }

    Parameters
    ----------
    ratio : float
        Share of channels removed, in [0, 1).
    penalty : float
        Weight of the L1 penalty (lambda in the paper, which uses 1e-4 and 1e-5).
    sparse_epochs : int
        Epochs of training with the penalty; 0 ranks the scales as they are.
    from_scratch : bool
        Train with the penalty from initialisation, on the task's recipe (the paper's way), instead of going on from the
        trained network at ``sparse_lr_scale`` of its learning rate.
    sparse_lr_scale : float
        See ``from_scratch``.
    finetune_epochs : int
        Epochs of fine-tuning after the removal, without the penalty.
    finetune_lr_scale : float
        Its learning rate, as a share of the recipe's.
    round_to : int
        Channel counts that change become multiples of it; 1, as in the paper, rounds nothing. See ``structured``.
    min_channels : int
        That every layer keeps.
    """

    uses_scheme: ClassVar[bool] = False

    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.5
    penalty: Annotated[float, Field(ge=0)] = 1e-4
    sparse_epochs: Annotated[int, Field(ge=0)] = 1
    from_scratch: bool = False
    sparse_lr_scale: Annotated[float, Field(gt=0)] = 0.1
    finetune_epochs: Annotated[int, Field(ge=0)] = 1
    finetune_lr_scale: Annotated[float, Field(gt=0)] = 0.1
    round_to: Annotated[int, Field(ge=1)] = 1
    min_channels: Annotated[int, Field(ge=1)] = 1

    def unsupported(self, model: nn.Module, context: Context) -> str | None:
        """A reason: nothing to train on, no batch normalisation whose channels can be removed, or a ratio too high."""
        if reason := self._untrainable(context):
            return reason
        try:
            # What can be removed does not depend on the values of the scales.
            self._pruned(model, context)
        except Unsupported as error:
            return str(error)
        return None

    def compress(self, model: nn.Module, context: Context) -> nn.Module:
        """Return a smaller network.

        Raises
        ------
        Unsupported
            See :meth:`unsupported`.
        """
        if reason := self.unsupported(model, context):
            raise Unsupported(reason)
        sparse = copy.deepcopy(model)
        trainer, recipe = context.trainer, context.recipe
        if self.from_scratch and context.fresh is not None:
            sparse = context.fresh()
        if self.sparse_epochs and trainer and recipe:
            schedule = (
                replace(recipe, epochs=self.sparse_epochs)
                if self.from_scratch
                else recipe.finetune(self.sparse_epochs, self.sparse_lr_scale)
            )
            trainer(sparse, schedule, loss=self._penalised(sparse, recipe.label_smoothing))
        smaller, chosen = self._pruned(sparse, context)
        context.progress(0.5, str(chosen))
        recalibrate(smaller, context)
        if self.finetune_epochs and trainer and recipe:
            trainer(smaller, recipe.finetune(self.finetune_epochs, self.finetune_lr_scale))
        context.progress(1.0, str(chosen))
        return smaller

    def _untrainable(self, context: Context) -> str | None:
        if self.from_scratch and not self.sparse_epochs:
            return "from_scratch=true needs sparse_epochs of at least 1: there is nothing to rank before a training"
        for name in ("sparse_epochs", "finetune_epochs"):
            if epochs := getattr(self, name):
                fresh = self.from_scratch and name == "sparse_epochs"
                if reason := masks.untrainable(context, f"{name}={epochs}", fresh=fresh):
                    return reason
        return None

    def _penalised(self, model: nn.Module, label_smoothing: float) -> _Penalised:
        scales = [m.weight for m in model.modules() if isinstance(m, _BatchNorm) and m.affine]
        return _Penalised(scales, self.penalty, label_smoothing)

    def _pruned(self, model: nn.Module, context: Context) -> tuple[nn.Module, budget.Plan]:
        structure = find(model, context.input_shape)
        scores = criteria.score(model, structure, "bn-gamma", context)
        chosen = budget.make(
            structure,
            scores,
            ratio=self.ratio,
            target="ratio",
            scope="global",
            round_to=self.round_to,
            min_channels=self.min_channels,
        )
        return remove(model, structure, chosen.units), chosen


class _Penalised:
    """Cross-entropy plus the L1 norm of the scales."""

    def __init__(self, scales: list[nn.Parameter], penalty: float, label_smoothing: float) -> None:
        self.scales, self.penalty = scales, penalty
        self.loss = cross_entropy(label_smoothing)

    def __call__(self, model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        return self.loss(model, x, y) + self.penalty * torch.stack([scale.abs().sum() for scale in self.scales]).sum()
