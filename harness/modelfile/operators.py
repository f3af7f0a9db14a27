"""What a stored graph may call, and which functions a stored module may keep: short lists, written out.

They hold functions from tensors and numbers to tensors and numbers. None reads a file, a variable or a name, takes a
function, or hands out memory; arguments that could change that (text, modules) are held against lists too
(:mod:`harness.modelfile.graphs`).
"""

from __future__ import annotations

import builtins
import functools
import importlib
import math
import operator
import re
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def words(text: str) -> list[str]:
    """The words of a text."""
    return text.split()


_OPERATORS = words(
    """
    abs add and_ eq floordiv ge getitem gt index inv invert le lshift lt matmul mod mul ne neg not_ or_ pos pow
    rshift sub truediv xor iadd iand ifloordiv ilshift imatmul imod imul ior ipow irshift isub itruediv ixor is_
    is_not setitem
    """
)
_BUILTINS = words(
    """
    abs bool float getattr int len max min round sum
    """
)
_MATH = words(
    """
    ceil floor sqrt log log2 exp pow prod trunc
    """
)

# Of torch, as functions; most are methods of tensors by the same name.
_ELEMENTWISE = words(
    """
    abs acos acosh add addcdiv addcmul angle asin asinh atan atan2 atanh bitwise_and bitwise_not bitwise_or
    bitwise_xor bucketize ceil celu celu_ clamp clamp_max clamp_min clip clone conj copysign cos cosh deg2rad diff
    div eq erf erfc erfinv exp exp2 expm1 fix float_power floor floor_divide fmax fmin fmod frac ge gelu greater
    greater_equal gt heaviside hypot imag isclose isfinite isinf isnan le lerp less less_equal lgamma log log10
    log1p log2 logaddexp logical_and logical_not logical_or logical_xor logit lt maximum minimum mish mul multiply
    nan_to_num ne neg negative not_equal polar pow prelu rad2deg real reciprocal relu relu_ remainder round rrelu
    rsqrt rsub selu selu_ sigmoid sigmoid_ sign signbit silu sin sinc sinh softplus softshrink sqrt square sub
    subtract tan tanh tanh_ threshold true_divide trunc view_as_complex view_as_real where xlogy zero_
    """
)
_SHAPE = words(
    """
    as_strided broadcast_tensors broadcast_to cat chunk concat concatenate column_stack diag diag_embed diagflat
    diagonal dsplit dstack expand_copy flatten flip fliplr flipud gather hsplit hstack index_add index_copy
    index_fill index_put index_select masked_fill masked_scatter masked_select meshgrid moveaxis movedim narrow
    nonzero numel permute pixel_shuffle pixel_unshuffle channel_shuffle ravel repeat_interleave reshape roll rot90
    scatter scatter_add select slice_scatter split split_with_sizes squeeze stack swapaxes swapdims t take
    take_along_dim tensor_split tile transpose tril triu unbind unflatten unsqueeze vsplit vstack atleast_1d
    atleast_2d atleast_3d block_diag cartesian_prod
    """
)
_REDUCTIONS = words(
    """
    all allclose amax amin aminmax any argmax argmin argsort bincount cummax cummin cumprod cumsum count_nonzero
    dist equal histc kthvalue logcumsumexp logsumexp max mean median min mode msort nanmean nanmedian nansum norm
    prod quantile nanquantile renorm searchsorted softmax log_softmax sort std std_mean sum topk trapezoid unique
    unique_consecutive var var_mean
    """
)
_PRODUCTS = words(
    """
    addbmm addmm addmv addr baddbmm bilinear bmm cdist chain_matmul cross dot einsum ger inner kron linear matmul mm
    mv outer pairwise_distance cosine_similarity tensordot vdot conv1d conv2d conv3d conv_transpose1d
    conv_transpose2d conv_transpose3d batch_norm group_norm instance_norm layer_norm rms_norm adaptive_avg_pool1d
    adaptive_max_pool1d avg_pool1d max_pool1d max_pool2d max_pool3d dropout feature_dropout alpha_dropout embedding
    embedding_bag affine_grid_generator grid_sampler native_layer_norm native_batch_norm native_group_norm trace
    """
)
_CREATION = words(
    """
    arange empty empty_like eye full full_like linspace logspace ones ones_like rand rand_like randn randn_like
    scalar_tensor tensor zeros zeros_like complex bernoulli
    """
)
_ABOUT = words(
    """
    is_complex is_floating_point is_nonzero is_tensor result_type promote_types can_cast sym_float sym_int sym_ite
    sym_max sym_min sym_not sym_sqrt sym_sum _assert
    """
)

_METHODS = words(
    """
    abs_ add_ addmm_ bool byte ceil_ char clamp_ clamp_max_ clamp_min_ clamp clip_ contiguous copy_ cpu detach dim
    div_ double element_size exp_ expand expand_as fill_ flatten float floor_ floor_divide_ half bfloat16 get_device
    index_add_ index_copy_ index_fill_ index_put_ int is_contiguous is_inference item long logical_not_ lt_
    masked_fill_ masked_scatter_ mul_ ndimension neg_ nelement new_empty new_full new_ones new_tensor new_zeros
    numel permute pow_ reciprocal_ repeat reshape_as resolve_conj resolve_neg round_ rsqrt_ scatter_ scatter_add_
    short sin_ size sqrt_ squeeze_ stride sub_ sum_to_size t_ to tolist transpose_ tril_ triu_ type_as unfold
    unsqueeze_ view view_as zero_
    """
)

_FUNCTIONAL = words(
    """
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d affine_grid alpha_dropout avg_pool1d avg_pool2d avg_pool3d batch_norm bilinear
    binary_cross_entropy binary_cross_entropy_with_logits celu channel_shuffle conv1d conv2d conv3d conv_transpose1d
    conv_transpose2d conv_transpose3d cosine_similarity cross_entropy dropout dropout1d dropout2d dropout3d elu elu_
    embedding embedding_bag feature_alpha_dropout fold gelu glu grid_sample group_norm gumbel_softmax hardshrink
    hardsigmoid hardswish hardtanh hardtanh_ huber_loss instance_norm interpolate kl_div l1_loss layer_norm
    leaky_relu leaky_relu_ linear local_response_norm log_softmax logsigmoid lp_pool1d lp_pool2d max_pool1d
    max_pool2d max_pool3d max_unpool1d max_unpool2d max_unpool3d mish mse_loss nll_loss normalize one_hot pad
    pairwise_distance pixel_shuffle pixel_unshuffle prelu relu relu6 relu_ rms_norm rrelu
    scaled_dot_product_attention selu sigmoid silu smooth_l1_loss softmax softmin softplus softshrink softsign tanh
    tanhshrink threshold unfold upsample
    """
)

# Functions of libraries that torch.fx keeps as one call (``torch.fx.wrap``), or that modules keep.
_NAMED = (
    "timm.layers.activations:gelu",
    "torchvision.models.optical_flow.raft:_pass_through_h",
    "torchvision.models.swin_transformer:_get_relative_position_bias",
    "torchvision.models.swin_transformer:_patch_merging_pad",
    "torchvision.models.swin_transformer:shifted_window_attention",
    "torchvision.ops.boxes:box_iou",
    "torchvision.ops.drop_block:drop_block2d",
    "torchvision.ops.drop_block:drop_block3d",
    "torchvision.ops.stochastic_depth:stochastic_depth",
)

_ATEN = re.compile(r"(aten|assay):([A-Za-z_][A-Za-z0-9_]*)\.([A-Za-z0-9_]+)")
# They open files or change where a tensor's memory lies; everything else in aten computes.
_BARRED_ATEN = frozenset(
    words(
        """
    copy_sparse_to_sparse data dequantize from_file is_pinned pin_memory record_stream rename_ rename requires_grad_
    resize resize_ resize_as resize_as_ resize_as_sparse resize_as_sparse_ retain_grad set set_ set_data
    sparse_resize sparse_resize_ sparse_resize_and_clear sparse_resize_and_clear_ share_memory_ to_mkldnn
    """
    )
)
# Operators with an underscore in front are torch's own business and some trust their arguments; graphs that
# torch.export makes use these.
_PRIVATE_ATEN = frozenset(
    words(
        """
    __and__ __lshift__ __or__ __rshift__ __xor__
    _adaptive_avg_pool2d _adaptive_avg_pool3d _assert_async _assert_scalar _assert_tensor_metadata _cdist_forward
    _embedding_bag _fused_rms_norm _local_scalar_dense _log_softmax _native_batch_norm_legit
    _native_batch_norm_legit_no_training _safe_softmax _scaled_dot_product_attention_math
    _scaled_dot_product_flash_attention_for_cpu _shape_as_tensor _softmax _to_copy _trilinear _unsafe_index
    _unsafe_view _upsample_bicubic2d_aa _upsample_bilinear2d_aa _weight_norm
    """
    )
)
# They run a graph that is stored as a submodule, under a setting; torch.export makes them of ``torch.no_grad()``
# and of autocast.
_HIGHER_ORDER = ("wrap_with_autocast", "wrap_with_set_grad_enabled")
_REGISTERING = "harness.quantized"
"""The module that registers the ``assay`` operators."""

ATTRIBUTES = frozenset({"device", "dtype", "imag", "is_cuda", "itemsize", "mT", "ndim", "real", "shape", "H", "T"})
"""Attributes of a tensor that a graph may read."""

METHODS = frozenset(
    name for name in (*_ELEMENTWISE, *_SHAPE, *_REDUCTIONS, *_PRODUCTS, *_METHODS) if hasattr(Tensor, name)
)
"""Methods of a tensor that a graph may call."""

ASSERTIONS = frozenset({"torch:_assert", "aten:_assert_scalar.default", "aten:_assert_async.msg"})
"""Functions that take a message."""

EINSUMS = frozenset({"torch:einsum", "aten:einsum.default"})
"""Functions that take an equation."""

WORDS = frozenset(
    words(
        """
    area batch bicubic bilinear border circular constant cpu cuda euclid fro floor ij left linear max mean nearest
    nearest-exact none nuc reflect reflection replicate right row sum tanh trilinear trunc xy zeros
    use_mm_for_euclid_dist use_mm_for_euclid_dist_if_necessary donot_use_mm_for_euclid_dist amax amin prod
    """
    )
)
"""Text that a graph may hand to a function: modes of padding, interpolation, rounding and reduction."""


@functools.cache
def functions() -> dict[str, Callable[..., Any]]:
    """The functions that a graph may call and a module may keep, by name; operators of torch.ops are not in it."""
    found: dict[str, Callable[..., Any]] = {}
    sources: tuple[tuple[str, object, list[str]], ...] = (
        ("operator", operator, _OPERATORS),
        ("builtins", builtins, _BUILTINS),
        ("math", math, _MATH),
        ("torch", torch, [*_ELEMENTWISE, *_SHAPE, *_REDUCTIONS, *_PRODUCTS, *_CREATION, *_ABOUT]),
        ("torch.nn.functional", F, _FUNCTIONAL),
    )
    for prefix, source, names in sources:
        for name in names:
            function = getattr(source, name, None)
            # A version of torch may lack one; some names are methods only.
            if callable(function):
                found[f"{prefix}:{name}"] = function
    return found


@functools.cache
def _names() -> dict[int, str]:
    return {id(function): name for name, function in reversed(functions().items())}


def function(name: str) -> Callable[..., Any] | None:
    """The listed function of this name, or None."""
    if name in _NAMED:
        module, _, attribute = name.partition(":")
        try:
            found = getattr(importlib.import_module(module), attribute)
        except (ImportError, AttributeError):
            return None
        return found if isinstance(found, types.FunctionType) else None
    return functions().get(name)


def function_name(value: Any) -> str | None:
    """The name of a listed function, or None."""
    if (known := _names().get(id(value))) is not None:
        return known
    name = f"{getattr(value, '__module__', '')}:{getattr(value, '__qualname__', '')}"
    return name if name in _NAMED and function(name) is value else None


def is_kept(name: str) -> bool:
    """Whether a module may keep the listed function as an attribute; reading by name is left to graphs."""
    return name in _NAMED or name.startswith(("torch:", "torch.nn.functional:", "math:"))


def target(name: str) -> Callable[..., Any] | None:
    """What a graph's function node calls, by name, or None where it is not listed."""
    if name.startswith("higher_order:"):
        name = name.removeprefix("higher_order:")
        return getattr(torch.ops.higher_order, name) if name in _HIGHER_ORDER else None
    match = _ATEN.fullmatch(name)
    if match is None:
        return function(name)
    space, packet, overload = match.groups()
    if space == "assay":
        importlib.import_module(_REGISTERING)
    elif packet in _BARRED_ATEN or (packet.startswith("_") and packet not in _PRIVATE_ATEN):
        return None
    try:
        found = getattr(getattr(getattr(torch.ops, space), packet), overload)
    except AttributeError:
        return None
    return found if isinstance(found, torch._ops.OpOverload) else None


def target_name(value: Any) -> str | None:
    """The name of what a graph's function node calls, or None where it is not listed."""
    if isinstance(value, torch._ops.OpOverload):
        space, _, packet = value._schema.name.partition("::")
        name = f"{space}:{packet}.{value._overloadname}"
    elif isinstance(value, torch._ops.HigherOrderOperator):
        name = f"higher_order:{value.name()}"  # type: ignore[no-untyped-call]
    else:
        return function_name(value)
    return name if target(name) is value else None
