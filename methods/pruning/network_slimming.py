"""Network slimming: training makes the scales of batch normalisations sparse, and channels with small ones go."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from harness.errors import Unsupported
from methods.layers import promises
from methods.layers.prunable import say_unreached
from methods.layers.training import finetuning, from_scratch
from methods.pruning.structure import budget, criteria
from methods.pruning.structure.find import find
from methods.pruning.structure.recalibration import recalibrate
from methods.pruning.structure.surgery import remove

if TYPE_CHECKING:
    from harness.contracts import Batch, Context
    from methods.pruning.structure.units import Structure


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

    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.5
    penalty: Annotated[float, Field(ge=0)] = 1e-4
    sparse_epochs: Annotated[int, Field(ge=0)] = 1
    from_scratch: bool = False
    sparse_lr_scale: Annotated[float, Field(gt=0)] = 0.1
    finetune_epochs: Annotated[int, Field(ge=0)] = 1
    finetune_lr_scale: Annotated[float, Field(gt=0)] = 0.1
    round_to: Annotated[int, Field(ge=1)] = 1
    min_channels: Annotated[int, Field(ge=1)] = 1

    def compress(self, model: nn.Module, context: Context) -> nn.Module:
        """Return a smaller network.

        Raises
        ------
        Unsupported
            If there is nothing to train on, no batch normalisation whose channels can be removed, or the ratio is out
            of reach.
        """
        if self.from_scratch and not self.sparse_epochs:
            raise Unsupported(
                "from_scratch=true needs sparse_epochs of at least 1: there is nothing to rank before a training"
            )
        sparsely = finetuning(context, self.sparse_epochs, "sparse_epochs")
        tuning = finetuning(context, self.finetune_epochs)
        # What can be removed does not depend on the values of the scales: what cannot be met is refused before.
        structure, _ = self._plan(model, context)
        say_unreached(model, structure.reached(model), context)
        sparse = copy.deepcopy(model)
        if sparsely:
            schedule = sparsely.recipe.finetune(self.sparse_epochs, self.sparse_lr_scale)
            if self.from_scratch:
                sparse, schedule = from_scratch(context, self.sparse_epochs, "from_scratch=true")
            sparsely.fit(sparse, schedule, objective=self._penalised(sparse, context, schedule.label_smoothing))
        structure, chosen = self._plan(sparse, context)
        smaller = remove(sparse, structure, chosen.units)
        context.progress(0.5, str(chosen))
        recalibrate(smaller, context)
        if tuning:
            tuning.fit(smaller, tuning.recipe.finetune(self.finetune_epochs, self.finetune_lr_scale))
        context.progress(1.0, str(chosen))
        return smaller

    def promises(self, original: nn.Module, compressed: nn.Module) -> Iterator[str]:
        """The layers are smaller, and say so."""
        yield from promises.smaller_layers(original, compressed, self.ratio)

    def _penalised(
        self, model: nn.Module, context: Context, label_smoothing: float
    ) -> Callable[[nn.Module, Batch], Tensor]:
        """The task's loss plus the L1 norm of the scales of ``model``."""
        scales = [m.weight for m in model.modules() if isinstance(m, _BatchNorm) and m.affine]
        loss = context.objective(label_smoothing)

        def penalised(network: nn.Module, batch: Batch) -> Tensor:
            return loss(network, batch) + self.penalty * torch.stack([scale.abs().sum() for scale in scales]).sum()

        return penalised

    def _plan(self, model: nn.Module, context: Context) -> tuple[Structure, budget.Plan]:
        structure = find(model, context.signature, context.data.get("train"))
        chosen = budget.make(
            structure,
            criteria.score(model, structure, "bn-gamma", context),
            ratio=self.ratio,
            target="ratio",
            scope="global",
            round_to=self.round_to,
            min_channels=self.min_channels,
        )
        return structure, chosen
