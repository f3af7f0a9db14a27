"""Neuron merging: remove neurons and filters, and let the most similar ones that stay take over their part."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal, cast

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from harness.calling import call, evaluating
from harness.errors import Unsupported
from methods.layers import promises
from methods.layers.inputs import made_up
from methods.layers.prunable import say_unreached
from methods.pruning.structure import merging
from methods.pruning.structure.links import Link, find_links

if TYPE_CHECKING:
    from harness.contracts import Context


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class NeuronMerging:
    """Remove the least important neurons; add their outgoing weights, scaled, to the most similar neuron kept.

    A neuron is a row of a linear layer's weights or a filter of a convolution, with its bias. In every layer whose
    outputs only one other layer reads (also inside residual blocks) ``round(n * (1 - ratio))`` of ``n`` neurons stay,
    and the layers become that much smaller. No data and no training is needed. Importance and similarity are always
    those of the original weights, not of weights that an earlier layer's merging has changed.

    Without batch normalisation, a removed neuron i is merged into the kept neuron j of largest cosine similarity, if
    that reaches ``threshold``, with the scale ``|w_i| / |w_j|``. With it (weights without bias, a = gamma / sigma),
    ``w_i = s w_j`` makes the normalised outputs ``y_i = S y_j + B`` with ``S = s a_i / a_j`` and
    ``B = a_i (s (mu_j - beta_j / a_j) - mu_i) + beta_i``; the scale is S, which must be positive to pass through a
    ReLU, and j minimises ``cosine_weight (1 - cos) + (1 - cosine_weight) |B| / S``, the last term scaled to [0, 1]
    over all j.

    Source: Kim et al., "Neuron Merging: Compensating for Pruned Neurons", NeurIPS 2020 (arXiv 2010.13160):
    decomposition of the weights into kept neurons and a scaling matrix. Geometric median: He et al., CVPR 2019.

    ::

        @inproceedings{kim2020merging,
          title     = {Neuron Merging: Compensating for Pruned Neurons},
          author    = {Kim, Woojeong and Kim, Suhyun and Park, Mincheol and Jeon, Geonseok},
          booktitle = {Advances in Neural Information Processing Systems},
          year      = {2020}
        }

    Parameters
    ----------
    ratio : float
        Share of neurons removed from every layer, in [0, 1).
    criterion : {"l1", "l2", "geometric-median"}
        Importance: the norm of a neuron's weights, or the sum of its distances to all others (those near the
        geometric median go first).
    merge : bool
        False only prunes.
    threshold : float
        Cosine similarity below which a neuron is dropped and not merged. The authors use 0.45 for LeNet-300-100
        and 0.1 for ResNet-56.
    cosine_weight : float
        Weight of the cosine against the offset B, with batch normalisation only (lambda in the paper).
    """

    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.5
    criterion: Literal["l1", "l2", "geometric-median"] = "l1"
    merge: bool = True
    threshold: Annotated[float, Field(ge=-1, le=1)] = 0.45
    cosine_weight: Annotated[float, Field(ge=0, le=1)] = 0.85

    def compress(self, model: nn.Module, context: Context) -> nn.Module:
        """Return a copy of ``model`` with smaller layers.

        Raises
        ------
        Unsupported
            If the model cannot be traced, no layer can lose neurons, one would lose them all, or the forward pass holds
            sizes that the smaller layers do not fit.
        """
        links, left_alone = self._links(model)
        for link in links:
            neurons = len(model.get_submodule(link.producer).get_parameter("weight"))
            if round(neurons * (1 - self.ratio)) == 0:
                raise Unsupported(
                    f"ratio {self.ratio:g} would remove all {neurons} neurons of layer {link.producer!r}; lower it"
                )
        ends = {name for link in links for name in (link.producer, link.consumer)}
        say_unreached(model, [model.get_submodule(name).get_parameter("weight") for name in ends], context)
        smaller = copy.deepcopy(model)
        sizes = []
        for link in links:
            kept, scaling = self._decompose(model, link)
            _shrink(smaller, link, kept, scaling)
            sizes.append(f"{link.producer} {len(scaling)} -> {len(kept)}")
        untouched = [f"{name} ({why})" for name, why in left_alone.items()]
        context.progress(1.0, "; ".join([", ".join(sizes), *untouched]))
        _check_runs(smaller, context)
        return smaller

    def promises(self, original: nn.Module, compressed: nn.Module) -> Iterator[str]:
        """The layers are smaller, and say so."""
        yield from promises.smaller_layers(original, compressed, self.ratio)

    def _links(self, model: nn.Module) -> tuple[list[Link], dict[str, str]]:
        """The layers that lose neurons, and why the others do not."""
        found, left_alone = find_links(model)
        links = [link for link in found if not (self.merge and link.not_homogeneous)]
        for link in found:
            if self.merge and link.not_homogeneous:
                left_alone[link.producer] = (
                    f"{link.not_homogeneous} follows, through which no scale passes: merge=false prunes it"
                )
        if not links:
            raise Unsupported(f"no layer can lose neurons: {_summary(found, left_alone)}")
        return links, left_alone

    def _decompose(self, model: nn.Module, link: Link) -> tuple[Tensor, Tensor]:
        """Indices of the kept neurons, ascending, shape (k,), and the scaling matrix, shape (n, k), float64."""
        rows = merging.neurons(model, link)
        kept = self._kept(rows)
        if self.merge:
            return kept, merging.scaling(model, link, kept, threshold=self.threshold, cosine_weight=self.cosine_weight)
        return kept, merging.selection(len(rows), kept)

    def _kept(self, rows: Tensor) -> Tensor:
        if self.criterion == "geometric-median":
            importance = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").sum(dim=1)
        else:
            importance = rows.norm(p=1 if self.criterion == "l1" else 2, dim=1)
        count = round(len(rows) * (1 - self.ratio))
        return importance.argsort(descending=True, stable=True)[:count].sort().values


def _summary(found: list[Link], left_alone: dict[str, str]) -> str:
    """The first few reasons, those that another setting would remove before the others."""
    names = [link.producer for link in found]
    names += [name for name in left_alone if name not in names]
    reasons = [f"{name}: {left_alone[name]}" for name in names[:4]] or ["there is no nn.Linear and no nn.Conv2d"]
    more = [f"and {len(names) - 4} more layers"] if len(names) > 4 else []
    return "; ".join(reasons + more)


def _shrink(model: nn.Module, link: Link, kept: Tensor, scaling: Tensor) -> None:
    """Keep the rows ``kept`` of the producer, and fold the others into the consumer's columns, in place."""
    producer, consumer = model.get_submodule(link.producer), model.get_submodule(link.consumer)
    _select(producer, ("weight", "bias"), kept)
    setattr(producer, "out_channels" if isinstance(producer, nn.Conv2d) else "out_features", len(kept))
    if link.norm:
        norm = model.get_submodule(link.norm)
        _select(norm, ("weight", "bias", "running_mean", "running_var"), kept)
        cast(_BatchNorm, norm).num_features = len(kept)
    weight = consumer.get_parameter("weight")
    weight = nn.Parameter(merging.folded(weight, scaling), requires_grad=weight.requires_grad)
    consumer.weight = weight
    setattr(consumer, "in_channels" if isinstance(consumer, nn.Conv2d) else "in_features", weight.shape[1])


def _select(module: nn.Module, names: tuple[str, ...], kept: Tensor) -> None:
    for name in names:
        value = getattr(module, name)
        if isinstance(value, nn.Parameter):
            setattr(module, name, nn.Parameter(value.detach()[kept].clone(), requires_grad=value.requires_grad))
        elif value is not None:
            setattr(module, name, value[kept].clone())


def _check_runs(model: nn.Module, context: Context) -> None:
    """The trace cannot see sizes that are hard-coded in a forward pass; running it once finds them."""
    inputs = made_up(model, context.signature, 2, split=context.data.get("train"))
    try:
        with evaluating(model):
            call(model, inputs, context.signature)
    except RuntimeError as error:
        raise Unsupported(f"the forward pass does not accept smaller layers: {error}") from error
