"""From executed kernels to the name of a precision; and from missing packages to a remedy."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from hardware import TABLE
from hardware.kernels import Kernel, attention_macs, matrix_macs, summary
from hardware.packages import missing
from harness.measure.counts import convolution_macs, product_macs


def test_the_precision_is_that_of_most_of_the_work_not_of_most_of_the_kernels() -> None:
    kernels = [Kernel(kind="Conv", precision="f32", macs=10)] * 3 + [Kernel(kind="QConv", precision="int8", macs=70)]
    found = summary(kernels, wanted="int8", because="the model is quantized")
    assert found["precision"] == "int8"
    assert found["mac_share"] == {"int8": 0.7, "f32": 0.3}
    assert found["kernels"] == {"Conv:f32": 3, "QConv:int8": 1}
    assert "precision_reason" not in found


def test_a_quantized_model_that_runs_in_float_is_told_so() -> None:
    kernels = [Kernel(kind="Conv", precision="f32", macs=90), Kernel(kind="QConv", precision="int8", macs=10)]
    found = summary([*kernels, Kernel(kind="Relu", precision="f32")], wanted="int8", because="the model is quantized")
    assert found["precision"] == "f32"
    assert found["precision_reason"] == (
        "the model is quantized, but only 10% of the multiply-accumulates ran in int8; the others: 1 x Conv:f32"
    )
    nothing = summary([Kernel(kind="Relu", precision="f32")], wanted="f32", because="")
    assert nothing["precision"] == "none"
    assert nothing["precision_reason"] == "no kernel that ran is known to multiply matrices"


def test_weights_of_few_bits_are_what_was_wanted_with_any_activations() -> None:
    kernels = [Kernel(kind="MatMulNBits", precision="w4a8", macs=99), Kernel(kind="MatMul", precision="f32", macs=1)]
    found = summary(kernels, wanted="w4", because="the weights are stored in 4 bits")
    assert found["precision"] == "w4a8"
    assert "precision_reason" not in found
    found = summary(kernels[1:], wanted="w4", because="the weights are stored in 4 bits")
    assert found["precision_reason"] == (
        "the weights are stored in 4 bits, but only 0% of the multiply-accumulates ran in w4; "
        "the others: 1 x MatMul:f32"
    )


@pytest.mark.parametrize(("groups", "out"), [(1, 6), (2, 6), (4, 8)])
def test_multiply_accumulates_are_half_of_torch_s_flops(groups: int, out: int) -> None:
    x, w = torch.randn(2, 4, 9, 9), torch.randn(out, 4 // groups, 3, 3)
    with FlopCounterMode(display=False) as counter:
        y = F.conv2d(x, w, groups=groups)
    assert convolution_macs(y.shape, w.shape) == counter.get_total_flops() // 2
    grouped = (groups, out // groups, *w.shape[1:])
    assert convolution_macs(y.shape, grouped) == counter.get_total_flops() // 2
    with FlopCounterMode(display=False) as counter:
        product = x @ torch.randn(9, 5)
    assert product_macs(product.shape, x.shape) == counter.get_total_flops() // 2


@pytest.mark.parametrize(
    ("left", "right", "output"),
    [((3, 5), (5, 2), (3, 2)), ((5, 3), (5, 2), (3, 2)), ((7, 3, 5), (5, 2), (7, 3, 2)), ((3, 5), (5,), (3,)),
     ((5,), (7, 5, 2), (7, 2))],
)  # fmt: skip
def test_products_of_stored_transposed_matrices(
    left: tuple[int, ...], right: tuple[int, ...], output: tuple[int, ...]
) -> None:
    rows = 1
    for size in output:
        rows *= size
    assert matrix_macs(output, left, right) == rows * 5
    assert matrix_macs(output, [], right) == 0


def test_attention_is_two_products() -> None:
    q, k = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 9, 4)
    with FlopCounterMode(display=False) as counter:
        torch.softmax(q @ k.transpose(-1, -2), dim=-1) @ k  # torch's counter leaves its own fused kernel out
    assert attention_macs(q.shape, 9) == counter.get_total_flops() // 2


def test_what_is_missing_is_named_with_the_install_line() -> None:
    assert missing(("json",), "onnxruntime", lambda: None) is None
    reason = missing(("json", "no_such_package"), "onnxruntime", lambda: None)
    assert reason == 'no_such_package not installed: pip install "assay-bench[onnxruntime]"'

    def broken() -> None:
        raise ImportError("libx.so: cannot open")

    said = missing(("json",), "openvino", broken)
    assert said is not None
    assert "libx.so" in said
    assert "--force-reinstall" in said


def test_the_table_names_the_three_runtimes() -> None:
    assert list(TABLE) == ["torch", "onnxruntime", "openvino"]
