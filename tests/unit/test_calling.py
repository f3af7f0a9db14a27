"""One way to call a model, whatever it takes and gives."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from torch import nn

from harness.calling import call, evaluating, input_names, plain_attention
from harness.contracts import Port, Signature
from harness.errors import InputError, Unsupported

Pair = namedtuple("Pair", "logits features")


def signature(inputs=("x",), outputs=("output",)):
    return Signature(
        inputs=tuple(Port(name=name, shape=(3,)) for name in inputs),
        outputs=tuple(Port(name=name, shape=(3,)) for name in outputs),
    )


class Gives(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


@pytest.mark.parametrize(
    ("make", "outputs"),
    [
        (lambda x: x + 1, ("output",)),
        (lambda x: (x + 1, x), ("output",)),
        (lambda x: [x + 1], ("output",)),
        (lambda x: {"logits": x + 1, "aux": x}, ("logits",)),
        (lambda x: {"loss": None, "logits": x + 1}, ("logits",)),
        (lambda x: {"aux": x, "logits": x + 1}, ("logits",)),
        (lambda x: Pair(x + 1, x), ("logits",)),
        (lambda x: Pair(x, x + 1), ("features",)),
    ],
)
def test_outputs_are_read_by_name_or_place(make, outputs):
    x = torch.arange(6.0).reshape(2, 3)
    found = call(Gives(make), {"x": x}, signature(outputs=outputs))
    assert list(found) == list(outputs)
    assert torch.equal(found[outputs[0]], x + 1)


def test_several_outputs_by_place():
    found = call(Gives(lambda x: (x, 2 * x)), {"x": torch.ones(2, 3)}, signature(outputs=("first", "second")))
    assert torch.equal(found["second"], 2 * found["first"])


def test_several_inputs_are_passed_by_name_whatever_their_order():
    class Minus(nn.Module):
        def forward(self, a, b, scale=1.0):
            return (a - b) * scale

    a, b = torch.full((2, 3), 5.0), torch.full((2, 3), 3.0)
    for names in (("a", "b"), ("b", "a")):
        assert torch.equal(call(Minus(), {"b": b, "a": a}, signature(names))["output"], a - b)
    assert input_names(Minus()) == ("a", "b", "scale")


def test_a_forward_with_star_arguments_is_called_by_place():
    class Star(nn.Module):
        def forward(self, *parts):
            return parts[0] - parts[1]

    values = {"p": torch.full((2, 3), 5.0), "q": torch.full((2, 3), 3.0)}
    assert torch.equal(call(Star(), values, signature(("p", "q")))["output"], torch.full((2, 3), 2.0))


def test_inputs_that_are_not_named_are_left_out_and_missing_ones_are_refused():
    model = Gives(lambda x: x)
    call(model, {"x": torch.ones(2, 3), "labels": torch.ones(2)}, signature())
    with pytest.raises(InputError, match="'x' is missing; given: y"):
        call(model, {"y": torch.ones(2, 3)}, signature())


def test_integers_reach_the_model_as_they_are():
    ids = torch.tensor([[2**24 + 1], [2**31 - 1]])
    assert torch.equal(call(Gives(lambda x: x), {"x": ids}, signature())["output"], ids)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda x: None, "no tensor|not a tensor|gives"),
        (lambda x: x.numpy(), "ndarray, not a tensor"),
        (lambda x: x.sum(), r"shape \(\)"),
        (lambda x: x[0], r"At batch size 2 .* shape \(3,\)"),
        (lambda x: (x,), "place 1"),
    ],
)
def test_outputs_that_are_none_are_refused(make, message):
    outputs = ("output", "second") if message == "place 1" else ("output",)
    with pytest.raises(Unsupported, match=message):
        call(Gives(make), {"x": torch.ones(2, 3)}, signature(outputs=outputs))


def test_every_module_gets_its_own_mode_back_after_an_error_too():
    model = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(3)).train()
    model[1].eval()
    seen = []

    def fail():
        with evaluating(model):
            seen.append((model[0].training, torch.is_grad_enabled()))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen == [(False, False)]
    assert [model.training, model[0].training, model[1].training] == [True, True, False]


def test_the_attention_path_is_restored():
    before = torch.backends.mha.get_fastpath_enabled()
    with plain_attention():
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled() is before
