"""HashedNets: a layer's weights share few real ones, by a hash that needs no memory."""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import numpy.typing as npt
import torch
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from harness.errors import Unsupported
from methods.layers.attention import HeadAttention
from methods.layers.prunable import PROJECTIONS, prunable_weights, require_weights, say_unreached
from methods.layers.training import finetuning, from_scratch, training
from methods.weight_sharing import tied

if TYPE_CHECKING:
    from harness.contracts import Context, Recipe, Trainer


def hashes(count: int, salt: int) -> npt.NDArray[np.uint64]:
    """64-bit hashes of 0 .. ``count - 1``: the finaliser of splitmix64 (Steele et al., OOPSLA 2014).

    With all arithmetic modulo 2**64: ``z = (i + 1) * 0x9E3779B97F4A7C15 + salt``, then
    ``z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9``, ``z = (z ^ z >> 27) * 0x94D049BB133111EB`` and ``z ^ z >> 31``.

    Parameters
    ----------
    count : int
        How many.
    salt : int
        In [0, 2**63).

    Returns
    -------
    ndarray of uint64, shape (count,)
    """
    z = np.arange(1, count + 1, dtype=np.uint64)
    z *= np.uint64(0x9E3779B97F4A7C15)
    z += np.uint64(salt)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def buckets(count: int, real: int, salt: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """The bucket h and whether the sign xi is negative, of virtual weights 0 .. ``count - 1`` in row-major order.

    h is the upper 32 bits of the hash, times ``real``, divided by 2**32; xi is the lowest bit.

    Parameters
    ----------
    count, real : int
        Virtual and real weights, less than 2**32.
    salt : int
        Of :func:`hashes`.

    Returns
    -------
    bucket : ndarray of int64, shape (count,)
        In [0, real).
    negative : ndarray of bool, shape (count,)
    """
    hashed = hashes(count, salt)
    bucket = ((hashed >> np.uint64(32)) * np.uint64(real)) >> np.uint64(32)
    return bucket.astype(np.int64), (hashed & np.uint64(1)).astype(bool)


@functools.lru_cache(maxsize=64)
def _positions(count: int, real: int, salt: int) -> npt.NDArray[np.int32 | np.int64]:
    """Where each virtual weight lies in the real weights followed by their negatives."""
    bucket, negative = buckets(count, real, salt)
    return (bucket + negative * real).astype(np.int32 if 2 * real < 2**31 else np.int64)


def _virtual(real: Tensor, shape: tuple[int, ...], salt: int) -> Tensor:
    """The virtual weight, differentiable in ``real``: a gradient of ``real`` is the signed sum of its bucket's."""
    count = functools.reduce(int.__mul__, shape, 1)
    index = torch.from_numpy(_positions(count, real.numel(), salt)).to(real.device)
    return torch.cat((real, -real)).index_select(0, index).view(shape)


class _Hashed(nn.Module):
    """A layer whose only weights are ``real``; the hash is computed when it is needed, and never stored."""

    bias: nn.Parameter | None

    def __init__(self, shape: torch.Size, real: nn.Parameter, bias: nn.Parameter | None, salt: int) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.salt = salt
        self.real = real
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> Tensor:
        """The virtual weight."""
        return _virtual(self.real, self.shape, self.salt)

    def extra_repr(self) -> str:
        """Shape and number of real weights."""
        return f"{self.shape}, real={self.real.numel()}, salt={self.salt}"


class HashedLinear(_Hashed):
    """A linear layer with hashed weights (out, in); parameters ``real`` (K,) and ``bias`` (out,)."""

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (..., out) of inputs (..., in)."""
        return F.linear(x, self.weight, self.bias)


class HashedConv2d(_Hashed):
    """A 2-D convolution with hashed weights (out, in / groups, height, width), padded with zeros."""

    def __init__(self, layer: nn.Conv2d, real: nn.Parameter, bias: nn.Parameter | None, salt: int) -> None:
        super().__init__(layer.weight.shape, real, bias, salt)
        self.stride: Any = layer.stride
        self.padding: Any = layer.padding
        self.dilation: Any = layer.dilation
        self.groups = layer.groups

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (n, out, height, width) of inputs (n, in, height, width)."""
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


def _projection(kind: str) -> property:
    def weight(self: _HashedProjections) -> Tensor | None:
        if kind not in self.hashed:
            return self._parameters.get(kind)
        shape, salt = self.hashed[kind]
        return _virtual(self.get_parameter(f"{kind}_real"), shape, salt)

    return property(weight, doc="The virtual weight; the weight itself where it is not hashed.")


class _HashedProjections(nn.Module):
    """Attention with hashed input projections: parameters such as ``in_proj_weight_real`` (K,) instead of weights."""

    hashed: dict[str, tuple[tuple[int, ...], int]]
    in_proj_weight = _projection("in_proj_weight")
    q_proj_weight = _projection("q_proj_weight")
    k_proj_weight = _projection("k_proj_weight")
    v_proj_weight = _projection("v_proj_weight")

    @classmethod
    def replacing(cls, original: nn.Module, hashed: Mapping[str, tuple[nn.Parameter, int]]) -> _HashedProjections:
        """``original`` with the projections named in ``hashed`` made from real weights and a salt."""
        made = cls.__new__(cls)
        # As it was made; whatever holds parts of the module is copied, the parts are not.
        made.__dict__.update({key: copy.copy(v) if isinstance(v, dict) else v for key, v in vars(original).items()})
        made.hashed = {}
        for kind, (real, salt) in hashed.items():
            made.hashed[kind] = tuple(original.get_parameter(kind).shape), salt
            del made._parameters[kind]
            made.register_parameter(f"{kind}_real", real)
        return made


class HashedMultiheadAttention(_HashedProjections, nn.MultiheadAttention):
    """``nn.MultiheadAttention`` with hashed input projections."""


class HashedHeadAttention(_HashedProjections, HeadAttention):
    """Attention with heads of a fixed width, and hashed input projections."""


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class HashedNets:
    """Hash the weights of linear layers and 2-D convolutions into few real weights, and train these.

    A virtual weight is ``V_ij = xi(i, j) * w[h(i, j)]``: h chooses one of
    ``K = max(1, round(n / compression))`` real weights of the layer, xi a sign. Both follow from the position in the
    row-major weight, K and a salt (:func:`buckets`), so that nothing but the K real weights and the biases is stored.
    The salt follows from the seed and the layer's name. The paper hashes fully connected layers; here filters and
    attention's input projections, packed as they are, are hashed in the same way.

    From scratch, a real weight begins as the (signed) first initial weight of its bucket, so that virtual weights
    are distributed as the dense network's were. Otherwise it begins as the least-squares fit to the trained weights:
    the mean of its bucket's weights times their signs.

    Exported to ONNX, the layer gathers its weight from real weights by stored 32-bit positions, a constant that
    runtimes fold when they load the file: a deployed artifact is as large as the dense one, and as fast. What is
    small is the model's state.

    Source: Chen et al., "Compressing Neural Networks with the Hashing Trick", ICML 2015 (arXiv 1504.04788).

    ::

        @inproceedings{chen2015compressing,
          title     = {Compressing Neural Networks with the Hashing Trick},
          author    = {Chen, Wenlin and Wilson, James T. and Tyree, Stephen and Weinberger, Kilian Q. and Chen, Yixin},
          booktitle = {International Conference on Machine Learning},
          year      = {2015}
        }

    Parameters
    ----------
    compression : float
        Virtual weights to one real weight, at least 1.
    hash_last : bool
        Whether the last layer is hashed as well.
    from_scratch : bool
        Train from the network's initialisation, as the paper does; False fits the trained model.
    epochs : int, optional
        Of training from scratch; the recipe's where None.
    lr_scale : float
        The learning rate of training from scratch is the recipe's times this. A real weight's gradient is a sum over
        its bucket; Fashion-MNIST's LeNet-300-100 (89.87 % dense; seed 0) was trained to 88.82 % at 1 and 89.07 % at
        0.25 with ``compression=8``, and to 86.50 and 86.36 % with 64.
    finetune_epochs : int
        Epochs of fine-tuning, with ``recipe.finetune``, where ``from_scratch`` is False.
    """

    compression: Annotated[float, Field(ge=1)] = 8.0
    hash_last: bool = True
    from_scratch: bool = True
    epochs: Annotated[int, Field(ge=0)] | None = None
    lr_scale: Annotated[float, Field(gt=0)] = 1.0
    finetune_epochs: Annotated[int, Field(ge=0)] = 0

    def compress(self, model: nn.Module, context: Context) -> nn.Module:
        """Return a model with hashed layers, trained.

        Raises
        ------
        Unsupported
            If there is no such layer, one is of another kind, or there is no training where it is asked for.
        """
        require_weights(prunable_weights(model))
        layers = self._layers(model)
        if not layers:
            raise Unsupported("the model has one layer, which hash_last=False leaves as it is; use hash_last=True")
        for layer in layers:
            if not isinstance(layer.module, nn.Linear | nn.Conv2d) and type(layer.module) not in _ATTENTION:
                kind = type(layer.module).__name__
                raise Unsupported(
                    f"layer {layer.name!r} is a {kind}; only linear layers and 2-D convolutions are hashed"
                )
            if isinstance(layer.module, nn.Conv2d) and layer.module.padding_mode != "zeros":
                raise Unsupported(
                    f"layer {layer.name!r} pads with {layer.module.padding_mode!r}; only zeros are supported"
                )
        network, fit, recipe = self._start(model, context)
        say_unreached(model, [layer.weight for layer in layers], context)
        virtual = sum(layer.weight.numel() for layer in self._layers(network))
        hashed = self._hashed(network, context.seed)
        real = {
            id(parameter): parameter.numel()
            for module in hashed.modules()
            for name, parameter in module.named_parameters(recurse=False)
            if isinstance(module, _Hashed | _HashedProjections) and name.endswith("real")
        }
        context.progress(0.0, f"{sum(real.values())} real weights for {virtual} virtual ones")
        if fit and recipe and recipe.epochs:
            fit(hashed, recipe)
        return hashed.train(model.training)

    def _start(self, model: nn.Module, context: Context) -> tuple[nn.Module, Trainer | None, Recipe | None]:
        """The network to hash, and how it is trained afterwards."""
        if not self.from_scratch:
            tuning = finetuning(context, self.finetune_epochs)
            recipe = tuning.recipe.finetune(self.finetune_epochs) if tuning else None
            return copy.deepcopy(model), tuning.fit if tuning else None, recipe
        try:
            network, recipe = from_scratch(context, self.epochs, "from_scratch=True")
        except Unsupported as error:
            raise Unsupported(f"{error}; use from_scratch=False") from error
        if _shapes(network) != _shapes(model):
            raise Unsupported(
                "the layers of the model given are not those of the task's untrained network, so that it cannot be "
                "trained from scratch; use from_scratch=False"
            )
        fit = training(context).fit
        return network, fit, replace(recipe, lr=recipe.lr * self.lr_scale)

    def promises(self, original: nn.Module, compressed: nn.Module) -> Iterator[str]:
        """Every virtual weight is a real one or its negative, and there are as many real ones as were asked for."""
        virtual = {id(layer.weight): layer.weight.numel() for layer in self._layers(original)}
        real = sum(max(1, round(count / self.compression)) for count in virtual.values())
        before, after = (sum(p.numel() for p in model.parameters()) for model in (original, compressed))
        if before - after != sum(virtual.values()) - real:
            yield f"{after} parameters are left of {before}, and {real} real weights stand for {sum(virtual.values())}"
        for name, module in compressed.named_modules():
            if isinstance(module, _Hashed) and not bool(torch.isin(module.weight.abs(), module.real.abs()).all()):
                yield f"layer {name!r} has a weight that is none of its real ones"

    def _layers(self, model: nn.Module) -> list[tied.Layer]:
        layers = tied.layers(model)
        return layers if self.hash_last else layers[:-1]

    def _hashed(self, network: nn.Module, seed: int) -> nn.Module:
        """``network`` with its layers replaced, in place (a single layer: its replacement)."""
        made: dict[int, tuple[nn.Parameter, int]] = {}
        for layer in self._layers(network):
            salt = int.from_bytes(hashlib.sha256(f"{seed}/{layer.name}".encode()).digest()[:8]) >> 1
            count = layer.weight.numel()
            real = max(1, round(count / self.compression))
            start = (_first if self.from_scratch else _least_squares)(layer.weight.detach(), real, salt)
            made[id(layer.weight)] = nn.Parameter(start, requires_grad=layer.weight.requires_grad), salt
        replaced: dict[int, nn.Module] = {}
        # A layer may stand at several places, and a weight in several layers.
        for name, module in list(network.named_modules(remove_duplicate=False)):
            if id(module) not in replaced and (new := _replacement(module, made)) is not None:
                replaced[id(module)] = new.train(module.training)
            if id(module) not in replaced:
                continue
            if name:
                network.set_submodule(name, replaced[id(module)])
            else:
                network = replaced[id(module)]
        return network


def _replacement(module: nn.Module, made: Mapping[int, tuple[nn.Parameter, int]]) -> nn.Module | None:
    """The hashed form of a module, with the real weights and the salt by its weight's id; None where it has none."""
    own = module._parameters
    if type(module) in _ATTENTION:
        hashed = {kind: made[id(own[kind])] for kind in PROJECTIONS if id(own.get(kind)) in made}
        return _ATTENTION[type(module)].replacing(module, hashed) if hashed else None
    if id(own.get("weight")) not in made or not isinstance(module, nn.Linear | nn.Conv2d):
        return None
    parameter, salt = made[id(own["weight"])]
    if isinstance(module, nn.Linear):
        return HashedLinear(module.weight.shape, parameter, own["bias"], salt)
    return HashedConv2d(module, parameter, own["bias"], salt)


_ATTENTION: dict[type[nn.Module], type[_HashedProjections]] = {
    nn.MultiheadAttention: HashedMultiheadAttention,
    HeadAttention: HashedHeadAttention,
}


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def _first(weight: Tensor, real: int, salt: int) -> Tensor:
    """For each bucket the first of its virtual weights, times its sign; an empty bucket has a weight all the same."""
    values = weight.flatten().cpu()
    bucket, negative = buckets(weight.numel(), real, salt)
    used, first = np.unique(bucket, return_index=True)
    start = values[torch.arange(real) % len(values)].clone()
    sign = torch.from_numpy(np.where(negative[first], -1.0, 1.0)).to(values)
    start[torch.from_numpy(used)] = values[torch.from_numpy(first)] * sign
    return start.to(weight.device)


def _least_squares(weight: Tensor, real: int, salt: int) -> Tensor:
    """The real weights whose virtual weights are nearest to ``weight``: signed bucket means; 0 for an empty bucket."""
    bucket, negative = buckets(weight.numel(), real, salt)
    values = weight.flatten().double().cpu().numpy()
    total = np.bincount(bucket, np.where(negative, -values, values), real)
    mean = total / np.maximum(np.bincount(bucket, minlength=real), 1)
    return torch.from_numpy(mean).to(weight)
