"""k-means weight sharing: every layer's weights take the values of a small codebook."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from harness.errors import Unsupported
from methods.layers.prunable import require_weights, say_unreached
from methods.layers.training import finetuning
from methods.weight_sharing import tied
from methods.weight_sharing.kmeans1d import Init, cluster, count_sorted
from methods.weight_sharing.tied import Layer, Shared

if TYPE_CHECKING:
    from harness.contracts import Context, Recipe

Bits = Annotated[int, Field(ge=1, le=16)]


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class KMeansSharing:
    """Replace the weights of convolutions and linear layers by the nearest entry of a codebook found by k-means.

    Codebooks are found per layer or per output channel (:func:`methods.weight_sharing.kmeans1d.cluster`). With
    ``keep_zeros`` zero weights stay zero and belong to no cluster, so that a pruned layer keeps its sparsity and has
    ``2**bits`` different values besides zero. Biases and normalisation are not shared.

    Fine-tuning moves the codebooks (and biases and normalisation parameters) while every weight stays with its
    cluster: the gradient of an entry is the sum of the gradients of its weights (§3.3). A sum over thousands of
    weights makes steps that no single learning rate suits, for a layer with 50 weights to an entry and one with 5,000;
    the codebooks are therefore trained with Adam, whose steps do not depend on a gradient's scale, at
    ``finetune_lr``, with a cosine schedule. On Fashion-MNIST's LeNet-300-100, 92 % pruned (89.16 %; seed 0, two epochs
    of fine-tuning), 3 bits gave 88.83 % without fine-tuning; with Adam 89.1, 89.2, 89.2 and 89.2 % at learning rates of
    1e-4, 3e-4, 1e-3 and 3e-3; with SGD and summed gradients 89.0 % at 1e-4, 89.1 % at 1e-3, and 34 % at 1e-2, which was
    the best of SGD's rates for 2 bits. Four epochs of Adam at 1e-3 took 2, 3, 4, 5 and 6 bits from 87.48, 88.83, 88.91,
    89.04 and 89.10 % to 88.81, 89.20, 89.45, 89.19 and 89.31 %.

    Source: Han et al., "Deep Compression: Compressing Deep Neural Networks with Pruning, Trained Quantization and
    Huffman Coding", ICLR 2016 (arXiv 1510.00149), §3. They use 8 bits for convolutions and 5 for linear layers of
    AlexNet, and linear initialisation.

    ::

        @inproceedings{han2016deep,
          title     = {Deep Compression: Compressing Deep Neural Networks with Pruning, Trained Quantization and
                       Huffman Coding},
          author    = {Han, Song and Mao, Huizi and Dally, William J.},
          booktitle = {International Conference on Learning Representations},
          year      = {2016}
        }

    Parameters
    ----------
    bits : int
        A codebook has ``2**bits`` entries.
    conv_bits, linear_bits : int, optional
        Instead of ``bits``, for convolutions and for linear layers (attention's projections among them).
    clusters : int, optional
        Entries of every codebook, in place of all bits.
    init : {"linear", "density", "random", "exact"}
        Initial centroids of Lloyd's algorithm (§3.2), or the optimal codebook.
    scope : {"layer", "channel"}
        One codebook for a layer, or one for every output channel (the weight's first axis).
    keep_zeros : bool
        Whether zero weights stay zero, outside of all clusters.
    finetune_epochs : int
        Epochs of centroid fine-tuning.
    finetune_lr : float
        Adam's learning rate for it.
    """

    bits: Bits = 5
    conv_bits: Bits | None = None
    linear_bits: Bits | None = None
    clusters: Annotated[int, Field(ge=1, le=2**16)] | None = None
    init: Init = "linear"
    scope: Literal["layer", "channel"] = "layer"
    keep_zeros: bool = True
    finetune_epochs: Annotated[int, Field(ge=0)] = 0
    finetune_lr: Annotated[float, Field(gt=0)] = 1e-3

    def entries(self, layer: nn.Module) -> int:
        """Codebook entries of a layer (of a channel, with ``scope="channel"``)."""
        own = self.conv_bits if isinstance(layer, nn.modules.conv._ConvNd) else self.linear_bits
        return self.clusters or 2 ** (self.bits if own is None else own)

    def compress(self, model: nn.Module, context: Context) -> nn.Module:
        """Return a copy of ``model`` whose layers hold at most as many different non-zero weights as entries.

        Raises
        ------
        Unsupported
            If there is no such layer, one has fewer different weights than clusters, or there is nothing to fine-tune
            on.
        """
        tuning = finetuning(context, self.finetune_epochs)
        layers = tied.layers(model)
        require_weights({layer.name: layer.weight for layer in layers})
        for layer in layers:
            self._refuse_too_many(layer)
        say_unreached(model, [layer.weight for layer in layers], context)
        shared: dict[str, Shared] = {}
        report = []
        for done, layer in enumerate(layers):
            context.progress(done / len(layers) / 2, f"clustering {layer.name}")
            part, distortion = self._share(layer, context.seed)
            shared[layer.key] = part
            energy = float(layer.weight.detach().double().square().sum())
            report.append(f"{layer.name} {part.codebook.numel()} ({distortion / energy if energy else 0.0:.1e})")
        context.progress(0.5, "codebook entries (relative squared error): " + ", ".join(report))
        if tuning:
            tuned, _ = tied.train(model, shared, context, self._recipe(tuning.recipe), mean=False, others=True)
            return tuned
        return tied.write(copy.deepcopy(model), shared)

    def promises(self, original: nn.Module, compressed: nn.Module) -> Iterator[str]:
        """No more different weights than entries, and zeros stay."""
        for layer in tied.layers(compressed):
            if self.keep_zeros and not torch.equal(layer.weight == 0, original.get_parameter(layer.key) == 0):
                yield f"layer {layer.name!r} has zeros elsewhere"
            for row in [layer.weight] if self.scope == "layer" else layer.weight:
                values = row[row != 0] if self.keep_zeros else row
                if torch.unique(values).numel() > self.entries(layer.module):
                    yield f"layer {layer.name!r} has more different weights than entries"

    def _recipe(self, recipe: Recipe) -> Recipe:
        return replace(recipe.finetune(self.finetune_epochs), optimizer="adam", lr=self.finetune_lr)

    def _rows(self, weight: Tensor) -> list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]]:
        """What is clustered together: the whole weight, or each output channel."""
        values = weight.detach().cpu().contiguous().float().numpy()
        return [values.reshape(-1)] if self.scope == "layer" else list(values.reshape(len(values), -1))

    def _refuse_too_many(self, layer: Layer) -> None:
        k, name = self.entries(layer.module), layer.name
        for number, row in enumerate(self._rows(layer.weight)):
            used = row[row != 0] if self.keep_zeros else row
            if not len(used) and self.keep_zeros:
                continue  # an empty channel, or layer, has nothing to share
            if not np.isfinite(used).all():
                raise Unsupported(f"layer {name!r} has weights that are NaN or infinite")
            if (distinct := count_sorted(np.sort(used))) < k:
                where = f"layer {name!r}" if self.scope == "layer" else f"channel {number} of layer {name!r}"
                kind = "non-zero " if self.keep_zeros else ""
                raise Unsupported(
                    f"{k} clusters are more than the {distinct} different {kind}weights of {where}; "
                    f"use fewer bits or clusters (at most {distinct} there)"
                )

    def _share(self, layer: Layer, seed: int) -> tuple[Shared, float]:
        """The weight's codebook (rows one after another) and the sum of squared errors."""
        k, weight = self.entries(layer.module), layer.weight.detach()
        codebooks, indices, total, offset = [], [], 0.0, 1
        for row in self._rows(weight):
            used = row != 0 if self.keep_zeros else np.ones(row.shape, dtype=bool)
            index = np.zeros(row.shape, dtype=np.int64)
            if used.any():
                found = cluster(row[used], k, init=self.init, seed=seed)
                index[used] = found.assignments.astype(np.int64) + offset
                codebooks.append(found.codebook)
                offset += k
                total += found.distortion
            indices.append(index)
        entries = np.concatenate(codebooks) if codebooks else np.zeros(0, dtype=np.float32)
        shared = Shared(
            codebook=torch.from_numpy(entries).to(weight).view(-1, 1),
            index=torch.from_numpy(np.concatenate(indices)).to(weight.device),
            shape=weight.shape,
        )
        return shared, total
