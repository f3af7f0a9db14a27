"""Product quantization: blocks of weights share the vectors of a codebook."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from harness.calling import call
from harness.errors import Unsupported
from harness.tasks.splits import cut
from methods.layers.activations import untouched, walk
from methods.layers.inputs import examples
from methods.layers.prunable import Attention, require_weights, say_unreached
from methods.layers.training import finetuning, imitation, train_split, training
from methods.weight_sharing import tied
from methods.weight_sharing.tied import Layer, Shared

if TYPE_CHECKING:
    from harness.contracts import Context

_PART = 32
"""Examples that the network is run on at once: their unfolded inputs are held."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class ProductQuantization:
    r"""Replace blocks of weights by the nearest vectors of a codebook, near in what the layer computes.

    A block is d weights that follow one another in an output channel's row: a filter's k*k weights of one input
    channel (two with ``large_block``) in a convolution, ``block`` weights (twice as many with ``large_block``) of a
    1x1 convolution, a linear layer or attention's projections. Where d does not divide the row, the largest divisor
    below it is taken (for k x k filters the largest number of whole input channels).

    The codebook minimises the squared error of the layer's output on training inputs x, block by block:
    ``sum over blocks b of (b - c)' G (b - c)`` with G the second moments ``E[x x']`` of the inputs that blocks see.
    With ``moments="pooled"``, as in the authors' code, one G stands for all positions along a row; "position" has a G
    for each, which is nearer to the output's error. Assignments and least-squares entries alternate. G is computed from
    all sampled inputs once, where the authors draw new ones for every iteration. Layers are quantized in order, with
    inputs from the network quantized so far. An empty cluster splits the most populated one by a small
    perturbation.

    The codebook of a layer has the given number of entries, but at most the largest power of two that is not above a
    quarter of the layer's blocks (the authors' code takes a power below a quarter), and not
    more than there are different blocks. A layer with fewer than 8 blocks stays as it is, and so does, as in the
    paper, a network's first layer if it is a k x k convolution, unless ``quantize_first``.

    Fine-tuning moves the codebooks only, by stochastic gradient descent with the mean of the gradients of an entry's
    blocks, to imitate the outputs of the task's original model (KL divergence of classes, squared difference of other
    outputs): after each layer (``layer_epochs``), and of all
    layers together (``finetune_epochs``, with the running statistics of batch normalisation following). The
    network keeps plain layers.

    Fashion-MNIST's LeNet-300-100 (89.87 %; one run, seed 0) shows that this objective is not accuracy: test accuracy,
    and KL divergence from the model given on validation data in nats,

    ================================= ================= =====================
    without fine-tuning               256 vectors of 4  64 vectors of 8
    ================================= ================= =====================
    ``moments="pooled"``              88.72 %, 0.121    76.19 %, 0.540
    ``moments="position"``            88.48 %, 0.062    84.07 %, 0.264
    ``activation_aware=False``        89.43 %, 0.117    86.01 %, 0.557
    ================================= ================= =====================

    Three epochs of fine-tuning took the 76.19 % to 85.5, 87.7 and 88.1 % at learning rates of 0.01, 0.1 and 0.5, and
    256 vectors of 4 (at 0.1) to 89.66 % (pooled) and 89.73 % ("position").

    Source: Stock et al., "And the Bit Goes Down: Revisiting the Quantization of Neural Networks", ICLR 2020 (arXiv
    1907.05686), and the authors' repository facebookresearch/kill-the-bits.

    ::

        @inproceedings{stock2020bit,
          title     = {And the Bit Goes Down: Revisiting the Quantization of Neural Networks},
          author    = {Stock, Pierre and Joulin, Armand and Gribonval, R{\'e}mi and Graham, Benjamin and
                       J{\'e}gou, Herv{\'e}},
          booktitle = {International Conference on Learning Representations},
          year      = {2020}
        }

    Parameters
    ----------
    centroids : int
        Vectors in a layer's codebook, at most.
    linear_centroids : int, optional
        Instead of ``centroids`` for linear layers; the authors take 2,048 for the classifier.
    block : int
        Weights in a block of a 1x1 convolution or a linear layer.
    large_block : bool
        Blocks twice as long.
    activation_aware : bool
        False: squared error of the weights instead of the outputs (G the identity); needs no data.
    moments : {"pooled", "position"}
        Of the inputs, over all positions together, or for each.
    calibration : int
        Training examples whose activations are taken.
    em_iterations : int
        Of k-means, at most; it ends when no assignment changes.
    quantize_first : bool
        Whether a k x k convolution that comes first is quantized as well.
    layer_epochs : int
        Epochs of fine-tuning after each layer, of that layer's codebook.
    finetune_epochs : int
        Epochs of fine-tuning of all codebooks in the end.
    finetune_lr : float
        Learning rate of both, with a cosine schedule and momentum 0.9.
    """

    centroids: Annotated[int, Field(ge=2, le=2**16)] = 256
    linear_centroids: Annotated[int, Field(ge=2, le=2**16)] | None = None
    block: Annotated[int, Field(ge=1, le=64)] = 4
    large_block: bool = False
    activation_aware: bool = True
    moments: Literal["pooled", "position"] = "pooled"
    calibration: Annotated[int, Field(ge=1)] = 1024
    em_iterations: Annotated[int, Field(ge=1)] = 100
    quantize_first: bool = False
    layer_epochs: Annotated[int, Field(ge=0)] = 0
    finetune_epochs: Annotated[int, Field(ge=0)] = 0
    finetune_lr: Annotated[float, Field(gt=0)] = 0.1

    def compress(self, model: nn.Module, context: Context) -> nn.Module:
        """Return a copy of ``model`` whose layers hold at most as many different blocks as their codebook.

        Raises
        ------
        Unsupported
            If there is no layer to quantize, one is of another kind, or there are no data for activations or for
            fine-tuning; where activations are taken, also for a layer whose inputs cannot be seen.
        """
        for setting in ("layer_epochs", "finetune_epochs"):
            finetuning(context, getattr(self, setting), setting)
        self._refuse(model)
        chosen = self._layers(model)
        if self.activation_aware:
            if "train" not in context.data:
                raise Unsupported("activation_aware=True needs a task with training data; use activation_aware=False")
            unseen = untouched(model, context)
            for layer in chosen:
                if layer.name in unseen:
                    raise Unsupported(
                        f"the inputs of layer {layer.name!r} are not known ({unseen[layer.name]}); use "
                        "activation_aware=False"
                    )
        say_unreached(model, [layer.weight for layer in chosen], context)
        student = copy.deepcopy(model).eval()
        generator = torch.Generator().manual_seed(context.seed)
        shared: dict[str, Shared] = {}
        names = [layer.name for layer in chosen]
        for done, name in enumerate(names):
            layer = next(layer for layer in self._layers(student) if layer.name == name)
            width = self.width(layer)
            metric = self._second_moments(student, layer, width, context)
            shared[layer.key], error = self._quantize(layer, metric, generator)
            tied.write(student, {layer.key: shared[layer.key]})
            context.progress(
                done / len(names),
                f"{name}: {len(shared[layer.key].codebook)} vectors of {width} weights, relative error {error:.1e}",
            )
            if self.layer_epochs:
                student, tuned = self._tune(student, {layer.key: shared[layer.key]}, self.layer_epochs, context)
                shared |= tuned
        if self.finetune_epochs:
            student, _ = self._tune(student, shared, self.finetune_epochs, context)
        return student.train(model.training)

    def promises(self, original: nn.Module, compressed: nn.Module) -> Iterator[str]:
        """No more different blocks in a layer than entries in its codebook."""
        changed = 0
        for layer in tied.layers(compressed):
            if torch.equal(layer.weight, original.get_parameter(layer.key)):
                continue
            changed += 1
            different = len(torch.unique(layer.weight.reshape(-1, self.width(layer)), dim=0))
            if different > self.entries(layer):
                yield f"layer {layer.name!r} has {different} different blocks, and {self.entries(layer)} entries"
        if changed < len(self._layers(original)):
            yield f"{changed} layers of {len(self._layers(original))} have changed"

    def _refuse(self, model: nn.Module) -> None:
        layers = tied.layers(model)
        require_weights({layer.name: layer.weight for layer in layers})
        for layer in layers:
            if not isinstance(layer.module, nn.Linear | nn.Conv2d | Attention):
                kind = type(layer.module).__name__
                raise Unsupported(
                    f"layer {layer.name!r} is a {kind}; only linear layers and 2-D convolutions are quantized"
                )
            if not layer.weight.isfinite().all():
                raise Unsupported(f"layer {layer.name!r} has weights that are NaN or infinite")
        if not self._layers(model):
            raise Unsupported(
                f"no layer has the 8 blocks that quantization needs at least (layer {layers[-1].name!r} has "
                f"{layers[-1].weight.numel() // self.width(layers[-1])}); use a smaller block or quantize_first=True"
            )

    def width(self, layer: Layer) -> int:
        """Weights in a block of this layer."""
        weight = layer.weight
        row = weight[0].numel()
        kernel = weight[0, 0].numel()
        wanted = (kernel if kernel > 1 else self.block) * (2 if self.large_block else 1)
        unit = kernel if kernel > 1 else 1
        return next(width for width in range(min(wanted, row), 0, -1) if row % width == 0 and width % unit == 0)

    def entries(self, layer: Layer) -> int:
        """Entries of this layer's codebook, before different blocks are counted; 1 for a layer that is too small."""
        wanted = self.centroids
        if layer.weight.ndim == 2 and self.linear_centroids is not None:
            wanted = self.linear_centroids
        quarter = layer.weight.numel() // self.width(layer) // 4
        return min(wanted, 1 << (quarter.bit_length() - 1)) if quarter else 1

    def _layers(self, model: nn.Module) -> list[Layer]:
        layers = tied.layers(model)
        if layers and not self.quantize_first and layers[0].weight.ndim > 2 and layers[0].weight[0, 0].numel() > 1:
            layers = layers[1:]
        return [layer for layer in layers if self.entries(layer) > 1]

    def _second_moments(self, network: nn.Module, layer: Layer, width: int, context: Context) -> Tensor:
        """``E[x x']`` of the inputs that blocks see, float64 (positions, width, width); one position where pooled."""
        if not self.activation_aware:
            return torch.eye(width, dtype=torch.float64)[None]
        sums, rows = torch.zeros(1, width, width, dtype=torch.float64), 0

        def add(name: str, module: nn.Module, x: Tensor) -> None:
            nonlocal sums, rows
            if name != layer.name:
                return
            blocks = _blocks(module, x, width).double()
            if self.moments == "pooled":
                blocks = blocks.reshape(-1, 1, width)
            sums = sums + blocks.permute(1, 2, 0) @ blocks.transpose(0, 1)
            rows += len(blocks)

        batch = examples(train_split(context, "activation_aware=True"), self.calibration, seed=context.seed)
        with walk(network, add) as running:
            size = context.signature.batch or _PART
            for start in range(0, len(batch), size):
                call(running, cut(batch, start, start + size).inputs, context.signature)
        return sums / rows

    def _quantize(self, layer: Layer, metric: Tensor, generator: torch.Generator) -> tuple[Shared, float]:
        """The layer's codebook and the relative squared error of its output (or of its weights)."""
        weight, width = layer.weight.detach(), metric.shape[-1]
        problem = _Problem(weight, metric, getattr(layer.module, "groups", 1))
        different = torch.unique(problem.blocks, dim=0)
        chosen = torch.randperm(len(different), generator=generator)[: self.entries(layer)]
        index = _cluster(problem, different[chosen], self.em_iterations, generator)
        used, index = torch.unique(index, return_inverse=True)
        codebook = problem.centres(index, len(used)).to(weight.dtype)
        error = problem.error(codebook.double(), index).sum() / problem.energy().clamp(min=1e-300)
        return Shared(codebook=codebook.view(-1, width), index=index + 1, shape=weight.shape), float(error)

    def _tune(
        self, student: nn.Module, shared: dict[str, Shared], epochs: int, context: Context
    ) -> tuple[nn.Module, dict[str, Shared]]:
        recipe = training(context, "fine-tuning codebooks").recipe.finetune(epochs)
        recipe = replace(recipe, optimizer="sgd", momentum=0.9, nesterov=False, lr=self.finetune_lr)
        return tied.train(student, shared, context, recipe, mean=True, others=False, loss=imitation(context))


def _blocks(module: nn.Module, x: Tensor, width: int) -> Tensor:
    """What blocks of ``width`` weights are multiplied with, (rows, positions, width), for the inputs of a layer.

    Positions are those along a row of the weight, one group of a convolution after the other.
    """
    if not isinstance(module, nn.Conv2d):
        return x.reshape(-1, x.shape[-1] // width, width)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    x = F.pad(x, module._reversed_padding_repeated_twice, mode=mode)
    height, breadth = module.kernel_size
    patches = F.unfold(x, (height, breadth), dilation=module.dilation, stride=module.stride)  # (n, c * k * k, places)
    return patches.transpose(1, 2).reshape(-1, patches.shape[1] // width, width)


class _Problem:
    """The least squares of one layer: ``sum over blocks b of (b - c)' G_b (b - c)``, G_b by the block's position.

    Parameters
    ----------
    weight : Tensor, shape (out, ...)
        Of the layer.
    metric : Tensor, float64, shape (positions or 1, d, d)
        Second moments G.
    groups : int
        Of a convolution.
    """

    def __init__(self, weight: Tensor, metric: Tensor, groups: int) -> None:
        width = metric.shape[-1]
        self.metric = metric
        self.blocks = weight.contiguous().reshape(-1, width).double()
        per_row = weight[0].numel() // width
        if len(metric) == 1:
            self.place = torch.zeros(len(self.blocks), dtype=torch.int64)
            self.weighted = self.blocks @ metric[0]
        else:
            first = torch.arange(groups).repeat_interleave(len(weight) // groups)[:, None] * per_row
            self.place = (first + torch.arange(per_row)).flatten()
            rows = self.blocks.view(groups, -1, per_row, width)
            own = metric.view(groups, per_row, width, width)
            self.weighted = torch.einsum("gopd,gpde->gope", rows, own).reshape(-1, width)
        self._single = self.weighted.float()

    def nearest(self, centres: Tensor) -> Tensor:
        """The entry of least error for every block; in chunks because of the memory, in float32 because of the time."""
        squares = torch.einsum("kd,pde,ke->pk", centres, self.metric, centres).float()
        across = -2 * centres.T.float()
        found = []
        chunk = max(1, 2**22 // len(centres))
        for start in range(0, len(self.blocks), chunk):
            part = slice(start, start + chunk)
            own = squares if len(squares) == 1 else squares[self.place[part]]
            found.append((self._single[part] @ across).add_(own).argmin(1))
        return torch.cat(found)

    def centres(self, index: Tensor, k: int) -> Tensor:
        """Least-squares entries of clusters; directions that no input has stay at the mean of the blocks."""
        counts = torch.bincount(index * len(self.metric) + self.place, minlength=k * len(self.metric)).double()
        counts = counts.view(k, -1)
        width = self.blocks.shape[1]
        total = counts.sum(1).clamp(min=1)[:, None]
        mean = torch.zeros(k, width, dtype=torch.float64).index_add_(0, index, self.blocks) / total
        if len(self.metric) == 1:
            return mean
        matrix = (counts @ self.metric.flatten(1)).view(k, width, width)
        right = torch.zeros(k, width, dtype=torch.float64).index_add_(0, index, self.weighted)
        rest = right - (matrix @ mean[:, :, None])[:, :, 0]
        found: Tensor = mean + (torch.linalg.pinv(matrix, hermitian=True, rtol=1e-10) @ rest[:, :, None])[:, :, 0]
        return found

    def error(self, centres: Tensor, index: Tensor) -> Tensor:
        """Squared error of every block, (n,)."""
        chosen = centres[index]
        squares = torch.einsum("kd,pde,ke->pk", centres, self.metric, centres)[self.place, index]
        energy = (self.blocks * self.weighted).sum(1)
        return (energy - 2 * (self.weighted * chosen).sum(1) + squares).clamp(min=0)

    def energy(self) -> Tensor:
        """Squared output of the layer as it is, summed over blocks."""
        total: Tensor = (self.blocks * self.weighted).sum()
        return total


def _cluster(problem: _Problem, starts: Tensor, iterations: int, generator: torch.Generator) -> Tensor:
    """Assignments (n,) of k-means from starts (k, d); empty clusters are filled where that works."""
    k, centres = len(starts), starts.clone()
    scale = 1e-4 * problem.blocks.std(0, correction=0)
    before: Tensor | None = None
    for _ in range(iterations):
        index = problem.nearest(centres)
        counts = torch.bincount(index, minlength=k)
        for _ in range(k):
            if counts.all():
                break
            # A cluster of equal blocks, such as the zeros of a pruned layer, cannot be split.
            spread = torch.bincount(index, (problem.blocks - centres[index]).square().sum(1), k)
            empty, largest = int((counts == 0).nonzero()[0]), int((counts * (spread > 0)).argmax())
            step = scale * torch.randn(centres.shape[1], generator=generator, dtype=centres.dtype)
            centres[empty], centres[largest] = centres[largest] + step, centres[largest] - step
            index = problem.nearest(centres)
            counts = torch.bincount(index, minlength=k)
        if before is not None and torch.equal(index, before):
            break
        before = index
        centres = torch.where(counts[:, None] > 0, problem.centres(index, k), centres)
    return index
