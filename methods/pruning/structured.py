"""Structured pruning: channels, neurons and attention heads are removed, and the layers become smaller."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from methods.layers import promises
from methods.layers.prunable import say_unreached
from methods.layers.training import finetuning
from methods.pruning.structure import budget, criteria, merging
from methods.pruning.structure.budget import Plan, Scope, Target
from methods.pruning.structure.criteria import Criterion
from methods.pruning.structure.find import find
from methods.pruning.structure.recalibration import recalibrate
from methods.pruning.structure.surgery import remove
from methods.pruning.structure.units import Structure

if TYPE_CHECKING:
    from torch import nn

    from harness.contracts import Context


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Structured:
    """Remove the least important channels, neurons and attention heads of any network that can be run.

    What belongs together is found by running the network once (:mod:`methods.pruning.structure.find`): a channel goes
    with everything that makes, scales and reads it, across residual sums, concatenations, channel shuffles, depthwise
    and grouped convolutions, normalisations, squeeze-and-excitation products and flattening; an attention head goes
    with its queries, keys and values. The classes of the output stay. Layers that cannot lose anything stay whole.

    The result computes what the masked network computes (:func:`methods.pruning.structure.surgery.masked`), with fewer
    multiply-accumulates. With ``merge``, removed neurons are first folded into similar ones that stay, in the layers
    where that applies: those that a single layer reads, with only operations between them that a positive scale passes
    through (also inside residual blocks). Elsewhere, as on residual sums or before GELU, they are dropped.

    Source: Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017 (arXiv:1608.08710), §3: filters by their l1
    norm, with the feature maps and kernels that depend on them. Groups of coupled layers: Fang et al., "DepGraph:
    Towards Any Structural Pruning", CVPR 2023 (arXiv:2301.12900). Criteria: see
    :func:`methods.pruning.structure.criteria.score`. Merging: Kim et al., "Neuron Merging: Compensating for Pruned
    Neurons", NeurIPS 2020 (arXiv:2010.13160); with this class's choice of neurons instead of the paper's, which
    ``neuron-merging`` makes.

    ::

        @inproceedings{li2017pruning,
          title     = {Pruning Filters for Efficient ConvNets},
          author    = {Li, Hao and Kadav, Asim and Durdanovic, Igor and Samet, Hanan and Graf, Hans Peter},
          booktitle = {International Conference on Learning Representations},
          year      = {2017}
        }
        @inproceedings{fang2023depgraph,
          title     = {DepGraph: Towards Any Structural Pruning},
          author    = {Fang, Gongfan and Ma, Xinyin and Song, Mingli and Mi, Michael Bi and Wang, Xinchao},
          booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
          year      = {2023}
        }
        @inproceedings{molchanov2019importance,
          title     = {Importance Estimation for Neural Network Pruning},
          author    = {Molchanov, Pavlo and Mallya, Arun and Tyree, Stephen and Frosio, Iuri and Kautz, Jan},
          booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition},
          year      = {2019}
        }
        @inproceedings{kim2020merging,
          title     = {Neuron Merging: Compensating for Pruned Neurons},
          author    = {Kim, Woojeong and Kim, Suhyun and Park, Mincheol and Jeon, Geonseok},
          booktitle = {Advances in Neural Information Processing Systems},
          year      = {2020}
        }

    Parameters
    ----------
    ratio : float
        Share to remove, in [0, 1).
    target : {"ratio", "macs", "params"}
        Of what: of the channels of the layers that can lose some, of the model's multiply-accumulates, or of its
        parameters. The target is exceeded by less than one step of ``round_to`` channels; what was reached is reported
        as progress.
    scope : {"global", "layer"}
        Rank the channels of all layers together, or give all layers the same share (with ``target="ratio"``: the
        nearest number that ``round_to`` allows).
    criterion : {"l1", "l2", "geometric-median", "bn-gamma", "taylor", "random"}
        Importance of a channel, over all that belongs to it.
    round_to : int
        Channel counts that change become multiples of it, which kernels compute at full speed. For a layer of fewer
        than twice as many channels it is halved until there is a choice: 8 for 16 to 31 channels, 4 for 8 to 15.
        1 rounds nothing.
    min_channels : int
        That every layer keeps, at least; every layer keeps one step in any case.
    merge : bool
        Add the outgoing weights of removed neurons, scaled, to those of the most similar neuron that stays
        (:func:`methods.pruning.structure.merging.scaling`), where that applies; the rest is dropped. It needs no data,
        and is for tasks that have none: recalibrating and fine-tuning on data repair the same damage, and more of it.
        Where it applies to no layer that loses channels, the model is unsupported.
    merge_threshold : float
        With ``merge``: cosine similarity below which a neuron is dropped and not merged. The paper's authors use 0.45
        for LeNet-300-100 and 0.1 for ResNet-56.
    merge_cosine_weight : float
        With ``merge``, for layers with batch normalisation: weight of the cosine against the offset that is left
        (lambda in the paper).
    recalibrate : bool
        Estimate the statistics of batch normalisations anew on training data (where there are any) before fine-tuning.
    finetune_epochs : int
        Epochs of fine-tuning, with ``recipe.finetune``.
    finetune_lr_scale : float
        Its learning rate, as a share of the recipe's. A tenth is usual, and too little where half of a network is gone.
    taylor_batches : int
        Training batches that ``criterion="taylor"`` averages over.
    """

    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.5
    target: Target = "ratio"
    scope: Scope = "global"
    criterion: Criterion = "l1"
    round_to: Annotated[int, Field(ge=1)] = 16
    min_channels: Annotated[int, Field(ge=1)] = 1
    merge: bool = False
    merge_threshold: Annotated[float, Field(ge=-1, le=1)] = 0.45
    merge_cosine_weight: Annotated[float, Field(ge=0, le=1)] = 0.85
    recalibrate: bool = True
    finetune_epochs: Annotated[int, Field(ge=0)] = 0
    finetune_lr_scale: Annotated[float, Field(gt=0)] = 0.1
    taylor_batches: Annotated[int, Field(ge=1)] = 8

    def plan(self, model: nn.Module, context: Context) -> tuple[Structure, Plan]:
        """What would be removed, and what it was chosen from.

        Raises
        ------
        Unsupported
            If no layer can lose channels, the target is out of reach, or there is no data for the criterion.
        """
        structure = find(model, context.signature, context.data.get("train"))
        scores = criteria.score(model, structure, self.criterion, context, batches=self.taylor_batches)
        chosen = budget.make(
            structure,
            scores,
            ratio=self.ratio,
            target=self.target,
            scope=self.scope,
            round_to=self.round_to,
            min_channels=self.min_channels,
        )
        return structure, chosen

    def compress(self, model: nn.Module, context: Context) -> nn.Module:
        """Return a copy of ``model`` with smaller layers.

        Raises
        ------
        Unsupported
            See :meth:`plan`; also if there is nothing to merge, or to fine-tune on.
        """
        tuning = finetuning(context, self.finetune_epochs)
        structure, chosen = self.plan(model, context)
        say_unreached(model, structure.reached(model), context)
        done = str(chosen)
        if self.merge:
            model, layers = merging.merge(
                model,
                structure,
                chosen.units,
                threshold=self.merge_threshold,
                cosine_weight=self.merge_cosine_weight,
            )
            done += f"; merged: {', '.join(map(str, layers)) or 'nothing'}"
        smaller = remove(model, structure, chosen.units)
        context.progress(0.1, done)
        if self.recalibrate:
            recalibrate(smaller, context)
        if tuning:
            tuning.fit(smaller, tuning.recipe.finetune(self.finetune_epochs, self.finetune_lr_scale))
        context.progress(1.0, done)
        return smaller

    def promises(self, original: nn.Module, compressed: nn.Module) -> Iterator[str]:
        """The layers are smaller, and say so."""
        yield from promises.smaller_layers(original, compressed, self.ratio)
