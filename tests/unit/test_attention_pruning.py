"""Attention's projections, packed or not: every method prunes them, by what they really see, and they stay pruned."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from hardware.export import to_onnx
from harness import modelfile
from harness.contracts import Batch, Context
from harness.errors import Unsupported
from harness.testing.networks import SHAPE, Reference, reference
from harness.training import Recipe
from methods.finetune import Finetune
from methods.layers import masks
from methods.layers.activations import Layer, matrix, unmatrix, untouched, visit
from methods.layers.attention import HeadAttention, explicit, written_out
from methods.layers.inputs import examples
from methods.layers.masks import MaskedTraining
from methods.layers.prunable import prunable_weights
from methods.pruning import snip, synflow, wanda
from methods.pruning.gradual import Gradual
from methods.pruning.grasp import Grasp
from methods.pruning.lottery_ticket import LotteryTicket
from methods.pruning.magnitude import Magnitude
from methods.pruning.n_m import NM
from methods.pruning.random import Random
from methods.pruning.rigl import RigL
from methods.pruning.set import SparseEvolutionaryTraining
from methods.pruning.snip import Snip
from methods.pruning.sparsegpt import SparseGPT, hessian, optimal_brain_surgeon
from methods.pruning.synflow import SynFlow
from methods.pruning.threshold import Threshold
from methods.pruning.wanda import Wanda
from methods.weight_sharing import tied
from methods.weight_sharing.hashed_nets import HashedNets
from methods.weight_sharing.kmeans_sharing import KMeansSharing
from methods.weight_sharing.product_quantization import ProductQuantization
from tests.unit.contexts import bare, fit_of, images, ordered

RECIPE = Recipe(epochs=1, batch_size=64, lr=0.05, weight_decay=5e-4, augment=False)
NAMES = ["embed", "attention.in_proj_weight", "attention.out_proj", "head"]


pytestmark = pytest.mark.usefixtures("one_thread")


class Net(nn.Module):
    """Rows of an image as tokens, attention with a residual, a mean over tokens and a linear layer."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.attention = nn.MultiheadAttention(16, 4, dropout=dropout, batch_first=True)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(1, 2))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        out: Tensor = self.head(x.relu().mean(1))
        return out


def fresh(dropout: float = 0.0) -> Net:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Net(dropout)


@functools.cache
def trained() -> nn.Module:
    model = fresh()
    fit_of(given().context())(model, replace(RECIPE, epochs=3))
    return model.eval()


def context(**changes: Any) -> Context:
    return given().context(**{"recipe": RECIPE, "fresh": fresh, "original": trained, **changes})


def given() -> Reference:
    return reference("perceptron")


def see(model: nn.Module, x: Tensor, treat: Callable[[str, Layer, Tensor], None]) -> None:
    visit(model, {"input": x}, given().signature, treat)


def drawn(count: int) -> Tensor:
    return examples(given().data["train"], count, seed=0).inputs["input"]


def zeros(model: nn.Module) -> dict[str, float]:
    return {name: (weight == 0).double().mean().item() for name, weight in prunable_weights(model).items()}


# Every method, its sparsity measured


@pytest.mark.parametrize(
    "method",
    [
        Magnitude(sparsity=0.5, scope="layer"),
        Random(sparsity=0.5, scope="layer", finetune_epochs=1),
        NM(n=2, m=4, finetune_epochs=1),
        Gradual(sparsity=0.5, scope="layer", epochs=1),
        Wanda(sparsity=0.5, finetune_epochs=1),
        Wanda(n=2, m=4),
        SparseGPT(sparsity=0.5),
        SparseGPT(n=1, m=2),
        Snip(sparsity=0.5, scope="layer"),
        Grasp(sparsity=0.5, scope="layer", epochs=0),
        SparseEvolutionaryTraining(sparsity=0.5, epochs=1),
        RigL(sparsity=0.5, scope="layer", delta_t=5),
        LotteryTicket(ratio=0.5, output_ratio=0.5, rounds=1, epochs=1),
        Threshold(sparsity=(0.5, 0.5, 0.5, 0.5), finetune_epochs=1),
    ],
    ids=lambda method: type(method).__name__,
)
def test_every_method_prunes_attention_to_its_sparsity(method: Any) -> None:
    model = trained()
    before = copy.deepcopy(model.state_dict())
    pruned = method.compress(model, context())
    found = zeros(pruned)
    assert list(found) == NAMES
    if isinstance(method, SparseEvolutionaryTraining):  # Erdős-Rényi budgets
        weights = prunable_weights(model)
        lost = masks.removals(weights, 0.5, "erk")
        assert found == {name: lost[name] / weights[name].numel() for name in NAMES}
        assert found["attention.in_proj_weight"] > 0.4
    else:
        assert found == dict.fromkeys(NAMES, 0.5)
    if isinstance(method, NM) or getattr(method, "m", None) == 4:
        packed = pruned.get_parameter("attention.in_proj_weight")
        assert ((packed.reshape(48, 4, 4) != 0).sum(-1) == 2).all(), "along the input dimension"
    assert type(pruned.get_submodule("attention")) is nn.MultiheadAttention
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in before.items())
    again = method.compress(model, context())
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in pruned.state_dict().items())


def test_the_linear_threshold_holds_for_projections() -> None:
    model = trained()
    pruned = Threshold(quality_conv=0.0, quality_linear=1.0).compress(model, context())
    weight = model.get_parameter("attention.in_proj_weight").detach()
    limit = weight.double().std(correction=0)
    assert torch.equal(pruned.get_parameter("attention.in_proj_weight") == 0, weight.abs() < limit)


def test_projections_share_a_codebook() -> None:
    shared = KMeansSharing(linear_bits=3, conv_bits=1, finetune_epochs=1).compress(trained(), context())
    for name in ("attention.in_proj_weight", "attention.out_proj.weight"):
        assert len(shared.get_parameter(name).unique()) == 8


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_zeros_stay_through_momentum_and_weight_decay(optimizer: Any) -> None:
    model = copy.deepcopy(trained())
    kept = masks.random_masks(prunable_weights(model), 0.5, "layer", 0)
    recipe = replace(RECIPE, optimizer=optimizer, lr=0.05 if optimizer == "sgd" else 1e-3, weight_decay=1e-2, epochs=2)
    seen = 0

    def look(step: Any, _: masks.Masks) -> bool:
        nonlocal seen
        weight = prunable_weights(model)["attention.in_proj_weight"]
        gone = ~kept["attention.in_proj_weight"]
        assert weight[gone].eq(0).all()
        memory = [value for value in step.optimizer.state[weight].values() if value.shape == weight.shape]
        assert memory
        assert all(value[gone].eq(0).all() and value.ne(0).any() for value in memory)
        seen += 1
        return False

    # Gradients are masked before the optimizer sees them.
    training = MaskedTraining(masks=kept, change=look, reads_gradients=lambda _: False)
    training(model, context(), recipe)
    assert seen > 20
    assert torch.equal(prunable_weights(model)["attention.in_proj_weight"] != 0, kept["attention.in_proj_weight"])
    tuned = Finetune(epochs=1).compress(model, context())
    assert zeros(tuned)["attention.in_proj_weight"] == 0.5


# What wanda and sparsegpt see


def inputs_of_projections(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Float64 inputs of in_proj and out_proj, with attention computed from its definition."""
    net = copy.deepcopy(model).double()
    assert isinstance(net, Net)
    with torch.no_grad():
        tokens = net.embed(x.double().flatten(1, 2))
        weight, bias = net.attention.in_proj_weight, net.attention.in_proj_bias
        q, k, v = (tokens @ weight.T + bias).split(16, dim=-1)
        heads = []
        for head in range(4):
            part = slice(4 * head, 4 * head + 4)
            share = torch.softmax(q[..., part] @ k[..., part].transpose(1, 2) / 2.0, -1)
            heads.append(share @ v[..., part])
    return tokens, torch.cat(heads, -1)


def test_wandas_scores_are_those_of_the_true_inputs() -> None:
    model = copy.deepcopy(trained())
    x = images(given(), 20)
    found: dict[str, Tensor] = {}
    see(model, x, lambda name, layer, value: found.update({name: wanda.scores(layer, value)}))
    assert list(found) == NAMES
    for name, value in zip(NAMES[1:3], inputs_of_projections(model, x), strict=True):
        weight = prunable_weights(model)[name].detach().double()
        expected = weight.abs() * value.flatten(0, 1).norm(dim=0)
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-6)


def test_out_proj_sees_what_the_pruned_in_proj_gives() -> None:
    model = trained()
    made = context()
    pruned = Wanda(examples=40).compress(model, made)
    x = drawn(40)
    # All but out_proj and the head as they were when out_proj was reached.
    value = inputs_of_projections(pruned, x)[1]
    weight = prunable_weights(model)["attention.out_proj"].detach().double()
    order = (weight.abs() * value.flatten(0, 1).norm(dim=0)).argsort(1)
    expected = torch.ones_like(weight, dtype=torch.bool).scatter_(1, order[:, :8], False)
    assert torch.equal(prunable_weights(pruned)["attention.out_proj"] != 0, expected)


def test_sparsegpts_error_is_below_magnitudes_at_both_projections() -> None:
    model = trained()
    x = drawn(128)
    updated: dict[str, Tensor] = {}

    def treat(name: str, layer: Layer, seen: Tensor) -> None:
        weight = matrix(layer, layer.weight.detach()).double()
        updated[name] = unmatrix(layer, optimal_brain_surgeon(weight, hessian(layer, seen), sparsity=0.5, block=4)[0])

    see(copy.deepcopy(model), x, treat)
    for name, seen in zip(NAMES[1:3], inputs_of_projections(model, x), strict=True):
        weight = prunable_weights(model)[name].detach().double()
        smallest = weight * masks.keep_highest({name: weight.abs()}, 0.5, "layer")[name]
        assert (updated[name] == 0).double().mean() == 0.5
        errors = [float((seen @ (changed - weight).T).square().sum()) for changed in (updated[name], smallest)]
        assert errors[0] < 0.8 * errors[1]


class Decoder(nn.Module):
    """torch's own encoder and decoder layers: self- and cross-attention, one of it with separate projections."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
        self.decoder = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)
        self.separate = nn.MultiheadAttention(8, 2, kdim=4, vdim=6, batch_first=True)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1, 2)
        memory = self.encoder(x)
        x = self.decoder(x, memory)
        x = x + self.separate(x, key=memory[..., :4], value=memory[..., 2:])[0]
        out: Tensor = self.head(x.mean(1))
        return out


def test_cross_attention_stays_dense_with_a_reason_and_separate_projections_do_not() -> None:
    torch.manual_seed(0)
    model, messages = Decoder().eval(), []
    made = context(progress=lambda _, message: messages.append(message))
    assert untouched(model, given().context()) == {
        "decoder.multihead_attn.in_proj_weight": "its queries, keys and values come from different inputs",
        "separate.out_proj": "attention with separate projections or added keys does not call it",
    }
    for method in (Wanda(examples=64), SparseGPT(examples=64)):
        found = zeros(method.compress(model, made))
        dense = {"decoder.multihead_attn.in_proj_weight", "separate.out_proj"}
        assert {name for name, share in found.items() if share == 0} == dense
        assert all(share == 0.5 for name, share in found.items() if name not in dense)
        assert "decoder.multihead_attn.in_proj_weight (its queries" in messages[-1]
    seen: dict[str, Tensor] = {}
    x = images(given(), 5)
    see(model, x, lambda name, layer, value: seen.update({name: value}))
    x = x.flatten(1, 2)
    with torch.no_grad():
        memory = model.encoder(x)
    torch.testing.assert_close(seen["separate.k_proj_weight"], memory[..., :4])
    torch.testing.assert_close(seen["separate.v_proj_weight"], memory[..., 2:])


@pytest.mark.parametrize("kind", [Net, Decoder])
def test_a_visit_that_changes_nothing_leaves_everything_as_it_was(kind: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = kind()
    model.train()
    model.head.eval()
    places = [(name, id(module), module.training) for name, module in model.named_modules()]
    parameters = [(name, id(parameter)) for name, parameter in model.named_parameters()]
    x = images(given(), 3)
    copied = copy.deepcopy(model).eval()
    expected = copied(x)
    random = torch.get_rng_state()

    see(model, x, lambda name, layer, value: None)
    see(copied, x, lambda name, layer, value: None)

    def refuse(name: str, layer: nn.Module, value: Tensor) -> None:
        if "out_proj" in name:
            raise KeyError(name)

    with pytest.raises(KeyError):
        see(model, x, refuse)
    assert torch.equal(random, torch.get_rng_state())
    assert places == [(name, id(module), module.training) for name, module in model.named_modules()]
    assert parameters == [(name, id(parameter)) for name, parameter in model.named_parameters()]
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.equal(copied(x), expected)


def test_attention_that_stands_at_two_places_is_written_out_at_both() -> None:
    class Twice(Net):
        def __init__(self) -> None:
            super().__init__()
            self.again = self.attention

        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x.flatten(1, 2))
            x = self.attention(x, x, x)[0]
            out: Tensor = self.again(x, x, x)[0].mean(1)
            return out

    model = Twice()
    with written_out(model):
        assert isinstance(model.attention, HeadAttention)
        assert model.again is model.attention
    assert type(model.attention) is nn.MultiheadAttention
    assert model.again is model.attention
    assert untouched(model, given().context()) == {"head": "the model does not call it"}


def test_attention_with_heads_removed_is_pruned_alike() -> None:
    model = copy.deepcopy(trained())
    assert list(explicit(model)) == ["attention"]
    plain, heads = Wanda().compress(trained(), context()), Wanda().compress(model, context())
    assert list(zeros(heads)) == NAMES
    for name, weight in prunable_weights(plain).items():
        assert torch.equal(weight, prunable_weights(heads)[name])


# Pruning at initialisation


def flow(linear: nn.Module, *shape: int) -> dict[str, Tensor]:
    made = bare(*shape)
    return synflow.flow(linear, synflow.ones(linear, made), made.signature)


def test_synflow_conserves_the_flow_through_queries_keys_values_and_output() -> None:
    linear = synflow.linearized(fresh())
    assert list(prunable_weights(linear)) == NAMES
    scores = flow(linear, *SHAPE)
    assert all((score > 0).all() for score in scores.values())
    totals = [part.sum().item() for part in scores["attention.in_proj_weight"].split(16)]
    totals.append(scores["attention.out_proj"].sum().item())
    assert totals == pytest.approx([totals[0]] * 4)
    # The whole flow: what attention adds, and the residual past it.
    assert scores["head"].sum().item() > totals[0]
    pruned = SynFlow(sparsity=0.8, epochs=0).compress(trained(), context())
    assert sum(int((w == 0).sum()) for w in prunable_weights(pruned).values()) == round(0.8 * (128 + 768 + 256 + 160))
    assert 0 < zeros(pruned)["attention.in_proj_weight"] < 1


def test_shares_are_what_softmax_is_for_equal_products_and_follow_products_else() -> None:
    x = torch.tensor([[2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0], [1.0, 3.0, 0.0, -torch.inf]], dtype=torch.float64)
    expected = torch.tensor([[0.25] * 4, [0.25] * 4, [0.25, 0.75, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(synflow.shares(x, -1), expected)
    x = torch.tensor([[1.0, 3.0]], requires_grad=True)
    synflow.shares(x, 1)[0, 1].backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor([[0.0, 0.25]]))


def test_synflows_attention_is_seen_however_it_is_written() -> None:
    q, k, v = torch.rand(3, 2, 4, 6, 8, dtype=torch.float64)
    with synflow._PassOn():
        fused = F.scaled_dot_product_attention(q, k, v)
        causal = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        masked = F.scaled_dot_product_attention(q, k, v, torch.ones(6, 6).tril().bool())
        written = nn.Softmax(-1)(q @ k.transpose(-2, -1)) @ v
    torch.testing.assert_close(fused, written)
    torch.testing.assert_close(causal, masked)
    torch.testing.assert_close(causal[..., 0, :], v[..., 0, :])


def test_snip_and_grasp_do_without_attentions_dropout() -> None:
    batch = Batch(inputs=given().inputs(8), targets={"label": torch.arange(8)})
    plain = snip.sensitivity(snip.training_mode(fresh()), batch, context())
    dropping = snip.sensitivity(snip.training_mode(fresh(dropout=0.5)), batch, context())
    for name, score in plain.items():
        torch.testing.assert_close(dropping[name], score)
    assert (plain["attention.in_proj_weight"].split(16)[0] > 0).any()


# Product quantization


@pytest.mark.parametrize("moments", ["pooled", "position"])
def test_quantized_projections_follow_their_inputs(moments: Any) -> None:
    model = trained()
    method = ProductQuantization(centroids=32, calibration=64, moments=moments)
    quantized = method.compress(model, context())
    assert type(quantized.get_submodule("attention")) is nn.MultiheadAttention
    for layer in tied.layers(quantized):
        different = layer.weight.reshape(-1, method.width(layer)).unique(dim=0)
        assert len(different) == method.entries(layer)
    # The second moments are those of the definition.
    x = drawn(64)
    inputs = dict(zip(NAMES[1:3], inputs_of_projections(model, x), strict=True))
    for name, value in inputs.items():
        student = copy.deepcopy(model)
        layer = next(layer for layer in tied.layers(student) if layer.name == name)
        blocks = value.reshape(-1, 4, 4)
        expected = torch.einsum("rpi,rpj->pij", blocks, blocks) / len(blocks)
        if moments == "pooled":
            expected = expected.mean(0, keepdim=True)
        torch.testing.assert_close(method._second_moments(student, layer, 4, context()), expected, rtol=1e-4, atol=1e-6)


def test_quantizing_cross_attention_needs_no_activations() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"cross": nn.MultiheadAttention(8, 2, batch_first=True), "head": nn.Linear(8, 10)})

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = model

        def forward(self, x: Tensor) -> Tensor:
            x = x.flatten(1, 2)
            out: Tensor = self.parts["head"](self.parts["cross"](x, x.flip(1), x.flip(1))[0].mean(1))
            return out

    with pytest.raises(Unsupported, match=r"'parts\.cross\.in_proj_weight' are not known \(its queries"):
        ProductQuantization(centroids=4, calibration=32).compress(Cross(), context())
    quantized = ProductQuantization(centroids=4, activation_aware=False).compress(Cross(), context())
    assert len(quantized.get_parameter("parts.cross.in_proj_weight").reshape(-1, 4).unique(dim=0)) == 4


# Files and runtimes


@pytest.mark.parametrize(
    "method",
    [Wanda(), KMeansSharing(bits=3), HashedNets(from_scratch=False, compression=2.0)],
    ids=lambda method: type(method).__name__,
)
def test_what_is_made_survives_its_file_and_exports(method: Any, tmp_path: Path) -> None:
    made = method.compress(trained(), context()).eval()
    x = images(given(), 4)
    again = modelfile.load(modelfile.save(made, tmp_path / "model"), allow=("tests",))
    with torch.no_grad():
        expected = made(x)
        assert torch.equal(again(x), expected)
    path = to_onnx(made, given().signature, {"input": x}, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


# Large networks


@pytest.mark.parametrize(
    ("build", "size"),
    [
        (lambda: torchvision.models.vit_b_16(weights=None, image_size=64), 64),
        (lambda: torchvision.models.swin_t(weights=None), 64),
    ],
    ids=["vit_b_16", "swin_t"],
)
def test_every_layer_of_a_vision_transformer_reaches_the_sparsity(build: Callable[[], nn.Module], size: int) -> None:
    torch.manual_seed(0)
    model = build().eval()
    made = bare(3, size, size, data=ordered(torch.randn(2, 3, size, size)))
    pruned = Wanda(examples=2).compress(model, made)
    found = zeros(pruned)
    linear = {id(module.weight) for module in pruned.modules() if isinstance(module, nn.Linear)}
    packed = {id(m.in_proj_weight) for m in pruned.modules() if isinstance(m, nn.MultiheadAttention)}
    assert linear | packed <= {id(weight) for weight in prunable_weights(pruned).values()}
    # torchvision's ViT has a head that begins as zeros.
    assert {name: share for name, share in found.items() if share != 0.5} in ({}, {"heads.head": 1.0})
    assert [type(module) for module in pruned.modules()] == [type(module) for module in model.modules()]


def test_synflows_scores_on_swin_are_finite_and_positive() -> None:
    torch.manual_seed(0)
    linear = synflow.linearized(torchvision.models.swin_t(weights=None))
    weights, scores = prunable_weights(linear), flow(linear, 3, 64, 64)
    for name, score in scores.items():
        assert torch.equal(score > 0, weights[name] > 0)  # some are drawn as zero
        if name.endswith("qkv"):
            out = scores[name.replace("qkv", "proj")].sum().item()
            # The bias by position adds a little that is not queries' and keys'.
            assert [part.sum().item() for part in score.chunk(3)] == pytest.approx([out] * 3, rel=1e-3)
