"""Structured pruning: the shrunken model computes what the masked one computes, on every kind of graph."""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models as vision
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.densenet import DenseNet
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.models.swin_transformer import ShiftedWindowAttention, SwinTransformer
from torchvision.models.vision_transformer import VisionTransformer

from harness import modelfile
from harness.contracts import Port, Signature
from harness.errors import Unsupported
from harness.measure import counts
from harness.tasks import models
from harness.tasks.classes import signature
from harness.testing.networks import reference
from methods.layers.attention import HeadAttention, WindowAttention, explicit
from methods.pruning.structure import budget, criteria
from methods.pruning.structure.find import find
from methods.pruning.structure.recalibration import recalibrate
from methods.pruning.structure.surgery import masked, remove
from methods.pruning.structure.units import Layer, Structure, Unit
from methods.pruning.structured import Structured
from tests.unit.contexts import bare, labelled, refusal


def lively(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights everywhere, scales and statistics of normalisations included, so that every channel matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if not value.is_floating_point():
                continue
            noise = torch.randn(value.shape, generator=generator)
            if name.endswith("running_var"):
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
            elif value.ndim > 1 and not name.endswith(("layer_scale", "scale", "position", "class_token", "embedding")):
                value.copy_(noise * math.sqrt(2 / value[0].numel()))
            elif name.endswith("weight"):
                value.copy_(1 + 0.3 * noise)
            else:
                value.copy_(0.3 * noise)
    return model.eval()


class Channels(nn.Module):
    """GroupNorm, a transposed convolution, channel attention, a concatenation with the input, an embedding table."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3, 2, 1)
        self.norm = nn.GroupNorm(4, 16)
        self.up = nn.ConvTranspose2d(16, 12, 2, 2)
        self.gate = nn.Linear(12, 12)
        self.mix = nn.Conv2d(15, 10, 1)
        self.grouped = nn.Conv2d(10, 20, 3, groups=2, padding=1)
        self.table = nn.Embedding(64, 20)
        self.fc = nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(F.silu(self.norm(self.conv(x))))
        y = y * torch.sigmoid(self.gate(y.mean((2, 3))))[:, :, None, None]
        y = self.grouped(F.relu(self.mix(torch.cat([x, y], 1))))
        tokens = y.flatten(2).transpose(1, 2) + self.table.weight[None]
        return self.fc(tokens.mean(1))


class Gated(nn.Module):
    """A gated linear unit, PReLU by channel, instance normalisation, and attention that derives a head's width."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 12, 3), nn.InstanceNorm2d(12, affine=True), nn.PReLU(12)
        self.up, self.width = nn.Conv2d(12, 32, 1), nn.Linear(16, 16)
        self.heads = 4
        self.qkv, self.project = nn.Linear(16, 48), nn.Linear(16, 16)
        self.hidden, self.fc = nn.Linear(16, 20), nn.Linear(20, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.glu(self.up(self.act(self.norm(self.conv(x)))), dim=1).flatten(2).transpose(1, 2)
        x = self.width(x)
        n, tokens, width = x.shape
        parts = self.qkv(x).reshape(n, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        y = ((parts[0] @ parts[1].transpose(-2, -1)).softmax(-1) @ parts[2]).transpose(1, 2).reshape(n, tokens, width)
        return self.fc(F.gelu(self.hidden(x + self.project(y))).mean(1))


class Tied(nn.Module):
    """One layer used twice, and two layers that share a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 24)
        self.again = nn.Linear(24, 24)
        self.other = nn.Linear(24, 24, bias=False)
        self.other.weight = self.again.weight
        self.last = nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.first(x.flatten(1)))
        return self.last(self.other(torch.tanh(self.again(torch.tanh(self.again(y))))))


IMAGES = (3, 32, 32)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    **{
        name: (partial(models.create, name, 0), (1, 8, 8) if name == "digits-cnn" else (1, 28, 28))
        for name in ("digits-cnn", "lenet-300-100", "lenet5-caffe", "resnet20", "mobilenet-tiny", "convnext-tiny-ish",
                     "vit-tiny")
    },
    "resnext": (lambda: ResNet(Bottleneck, [1, 1, 1, 1], num_classes=10, groups=8, width_per_group=16), IMAGES),
    "densenet": (lambda: DenseNet(8, (2, 3), 16, num_classes=10), IMAGES),
    "mobilenet-v3": (lambda: vision.mobilenet_v3_small(num_classes=10), IMAGES),
    "shufflenet": (lambda: vision.shufflenet_v2_x0_5(num_classes=10), IMAGES),
    "convnext": (lambda: ConvNeXt([CNBlockConfig(16, 24, 1), CNBlockConfig(24, None, 2)], num_classes=10), IMAGES),
    "vit": (
        lambda: VisionTransformer(32, 8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=48, num_classes=10),
        IMAGES,
    ),
    "swin": (lambda: SwinTransformer([4, 4], 24, [2, 2], [3, 6], [3, 3], num_classes=10), IMAGES),
    "transformer-encoder": (
        lambda: nn.Sequential(
            nn.Linear(16, 32),
            nn.TransformerEncoderLayer(32, 4, 48, batch_first=True),
            nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, norm_first=True, activation="gelu"),
            nn.Flatten(),
            nn.Linear(32 * 6, 10),
        ),
        (6, 16),
    ),
    "channels": (Channels, (3, 8, 8)),
    "gated": (Gated, (3, 8, 8)),
    "tied": (Tied, (8,)),
}  # fmt: skip


def some(structure: Structure, seed: int = 0) -> list[Unit]:
    chosen = random.Random(seed)
    units: list[Unit] = []
    for layer in structure.layers:
        keep = 0 if layer.fixed else 1
        units += chosen.sample(layer.units, chosen.randint(len(layer.units) // 3, len(layer.units) - keep))
    return units


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_shrunken_model_equals_the_masked_one(name: str, tmp_path: Path) -> None:
    make, shape = NETWORKS[name]
    model = lively(make()).double()
    structure = find(model, signature(shape, 10))
    units = some(structure)
    smaller, zeroed = remove(model, structure, units), masked(model, structure, units)
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with torch.no_grad():
        found, expected, before = smaller(x), zeroed(x), model(x)
    assert difference(found, expected) < 1e-10
    assert difference(expected, before) > 1e-3, "what was removed mattered"
    gone = structure.removed(units)
    assert counts.parameters(smaller)[0] == structure.parameters(gone) < counts.parameters(model)[0]
    # torch's fused attention hides its products: count with attention written out.
    explicit(model)
    example, taken = {"input": torch.zeros(2, *shape, dtype=torch.float64)}, signature(shape, 10)
    assert counts.macs(model, example, taken) == structure.macs(structure.removed([]))
    if name != "transformer-encoder":
        explicit(smaller)
        assert counts.macs(smaller, example, taken) == structure.macs(gone) < structure.macs(structure.removed([]))
    loaded = modelfile.load(modelfile.save(smaller, tmp_path / "model"), allow=("tests",))
    with torch.no_grad():
        assert torch.equal(loaded(x), smaller(x))


def test_another_mask_is_another_function() -> None:
    make, shape = NETWORKS["resnet20"]
    model = lively(make()).double()
    structure = find(model, signature(shape, 10))
    units = some(structure)
    others = [unit for unit in structure.units if unit not in units][:1]
    x = torch.randn(2, *shape, dtype=torch.float64)
    with torch.no_grad():
        found = remove(model, structure, units)(x)
        assert difference(found, masked(model, structure, [*units[1:], *others])(x)) > 1e-3


def test_layers_describe_themselves() -> None:
    make, shape = NETWORKS["channels"]
    model = lively(make())
    structure = find(model, signature(shape, 10))
    smaller = remove(model, structure, some(structure))
    for module in smaller.modules():
        if isinstance(module, nn.ConvTranspose2d):
            assert module.weight.shape[:2] == (module.in_channels, module.out_channels)
        elif isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
        elif isinstance(module, nn.Linear):
            assert tuple(module.weight.shape) == (module.out_features, module.in_features)
        elif isinstance(module, nn.GroupNorm):
            assert len(module.weight) == module.num_channels
        elif isinstance(module, nn.Embedding):
            assert module.weight.shape[1] == module.embedding_dim


def test_a_residual_stream_is_one_layer_and_the_classes_stay() -> None:
    make, shape = NETWORKS["resnet20"]
    structure = find(make(), signature(shape, 10))
    stream = next(layer for layer in structure.layers if layer.name == "conv1")
    assert stream.makers == ("conv1", "stage1.0.conv2", "stage1.1.conv2", "stage1.2.conv2")
    assert structure.left_alone == {"fc": "the model's outputs are its classes"}
    unit = stream.units[3]
    touched = {(part.tensor, part.axis, part.indices) for part in unit.slices}
    assert {
        ("bn1.running_mean", 0, (3,)),
        ("stage1.0.conv1.weight", 1, (3,)),
        ("stage2.0.shortcut.0.weight", 1, (3,)),
    } <= touched
    assert len(touched) == 4 + 4 * 4 + 5  # filters, normalisations' vectors, readers


def test_heads_go_as_a_whole() -> None:
    make, shape = NETWORKS["vit"]
    model = lively(make())
    structure = find(model, signature(shape, 10))
    layer = next(part for part in structure.layers if "self_attention" in part.name)
    assert (len(layer.units), layer.units[0].width) == (4, 8)
    smaller = remove(model, structure, layer.units[:1])
    attention = smaller.encoder.layers.encoder_layer_0.self_attention
    untouched = smaller.encoder.layers.encoder_layer_1.self_attention
    assert isinstance(attention, HeadAttention)
    assert attention.num_heads == 3
    assert type(untouched) is nn.MultiheadAttention, "only what changed is exchanged"


def test_an_attribute_that_holds_a_size_follows() -> None:
    make, shape = NETWORKS["vit-tiny"]
    model = lively(make())
    structure = find(model, signature(shape, 10))
    layer = next(part for part in structure.layers if part.name == "blocks.2.attention.qkv")
    smaller = remove(model, structure, layer.units[1:3])
    assert [block.attention.heads for block in smaller.blocks] == [4, 4, 2, 4]
    assert [block.attention.heads for block in model.blocks] == [4, 4, 4, 4]


class Written(nn.Module):
    """A size written into the forward pass."""

    def __init__(self, free: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.fc1 = nn.Linear(8 * 64, 20)
        self.fc2 = nn.Linear(20, 10)
        self.free = free

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.fc1(self.conv(x).reshape(-1, 512)))
        return self.fc2(y if self.free else y.reshape(-1, 20))


def test_what_the_forward_pass_does_not_allow_stays() -> None:
    structure = find(Written(free=True), signature((1, 8, 8), 10))
    assert [layer.name for layer in structure.layers] == ["fc1"]
    assert "holds a size that does not follow" in structure.left_alone["conv"]
    smaller = Structured(round_to=4).compress(Written(free=True), bare(1, 8, 8))
    assert (smaller.conv.out_channels, smaller.fc1.out_features) == (8, 8)
    with pytest.raises(Unsupported, match=r"conv: the forward pass of the model holds a size"):
        find(Written(free=False), signature((1, 8, 8), 10))


def test_attention_that_ties_its_heads_to_its_input_keeps_both() -> None:
    structure = find(Gated(), signature((3, 8, 8), 10))
    assert {layer.name for layer in structure.layers} == {"conv", "up", "hidden"}
    assert {"width", "qkv", "project"} <= set(structure.left_alone)


class Residue(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc((x + self.conv(x)).mean((2, 3)))


class Peeks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x) if x.sum() > 0 else x


class Normalises(nn.Module):
    """Softmax over channels: fewer channels would be another function."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(4, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(torch.softmax(self.fc1(x), dim=-1))


@pytest.mark.parametrize(
    ("model", "shape", "reason"),
    [
        (Residue(), (4, 8, 8), "conv: they enter add in the forward pass of the model with a tensor that no layer"),
        (Peeks(), (4,), "reads numbers out of a tensor"),
        (Normalises(), (4,), "fc1: they enter _softmax"),
        (nn.Linear(4, 3), (4,), "the model's outputs are its classes"),
        (nn.ReLU(), (4,), "there is no convolution and no linear layer"),
        (nn.Linear(5, 3), (4,), "fails on inputs of input [2, 4] float32"),
    ],
)
def test_unsupported_names_the_layer(model: nn.Module, shape: tuple[int, ...], reason: str) -> None:
    assert reason in str(refusal(Structured(), model, bare(*shape)))
    with pytest.raises(Unsupported) as raised:
        Structured().compress(model, bare(*shape))
    assert reason in str(raised.value)


class Masked(nn.Module):
    """Takes another way where nothing is masked, as transformers does."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 12)
        self.up, self.down = nn.Linear(12, 32), nn.Linear(32, 3)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = torch.relu(self.up(self.embed(ids)))
        x = x.mean(1) if bool(mask.all()) else (x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.down(x)


def test_a_way_that_only_the_mask_chooses_is_no_obstacle() -> None:
    model = Masked().eval()
    taken = Signature(
        inputs=(Port(name="ids", shape=(7,), dtype="int64", values=20), Port(name="mask", shape=(7,), dtype="int64")),
        outputs=(Port(name="output", shape=(3,)),),
    )
    structure = find(model, taken)
    smaller = remove(model, structure, structure.layers[-1].units[:10])
    zeroed = masked(model, structure, structure.layers[-1].units[:10])
    ids, mask = torch.randint(20, (4, 7)), torch.ones(4, 7, dtype=torch.int64)
    for hidden in (0, 3):
        mask[:, 7 - hidden :] = 0
        with torch.no_grad():
            assert difference(smaller(ids, mask), zeroed(ids, mask)) < 1e-5


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", ["none", "causal", "padding", "heads"])
def test_written_out_attention_is_torchs(batch_first: bool, mask: str) -> None:
    torch.manual_seed(0)
    original = nn.MultiheadAttention(24, 4, batch_first=batch_first).double().eval()
    nn.init.normal_(original.in_proj_bias)
    made = HeadAttention.of(original)
    x = torch.randn(3, 5, 24, dtype=torch.float64)
    x, memory = (x, x.flip(1)) if batch_first else (x.transpose(0, 1), x.flip(1).transpose(0, 1))
    keywords: dict[str, Any] = {}
    if mask == "causal":
        keywords["attn_mask"] = torch.ones(5, 5).triu(1).bool()
    if mask == "padding":
        keywords["key_padding_mask"] = torch.tensor([[False] * 4 + [True]] * 3)
    if mask == "heads":
        keywords["attn_mask"] = torch.randn(12, 5, 5, dtype=torch.float64)
    for key in (x, memory):
        for need in (True, False):
            expected, weights = original(x, key, key, need_weights=need, **keywords)
            found, shares = made(x, key, key, need_weights=need, **keywords)
            torch.testing.assert_close(found, expected)
            assert (shares is None) == (weights is None)
            if weights is not None:
                torch.testing.assert_close(shares, weights)


@pytest.mark.parametrize("shift", [0, 1, 2])
@pytest.mark.parametrize("size", [(8, 8), (7, 10), (4, 9), (3, 3)])
def test_window_attention_is_torchvisions(shift: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    original = ShiftedWindowAttention(12, [4, 4], [shift, shift], 3).double().eval()
    nn.init.normal_(original.relative_position_bias_table)
    x = torch.randn(2, *size, 12, dtype=torch.float64)
    torch.testing.assert_close(WindowAttention.of(original)(x), original(x))


# Criteria


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.fc = nn.Linear(6 * 36, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.bn(self.conv(x))).flatten(1))


@pytest.mark.parametrize("criterion", ["l1", "l2", "geometric-median", "bn-gamma", "taylor"])
def test_scores_are_those_of_the_definition(criterion: criteria.Criterion) -> None:
    model = lively(Pair())
    data, recipe = reference("residual").data, dataclasses.replace(reference("residual").recipe, label_smoothing=0.1)
    given = bare(1, 8, 8, data=data, recipe=recipe, seed=3)
    structure = find(model, signature((1, 8, 8), 10))
    (scores,) = criteria.score(model, structure, criterion, given, batches=2)
    assert scores is not None
    rows = model.conv.weight.detach().double().flatten(1)
    columns = model.fc.weight.detach().double().view(10, 6, 36)
    if criterion == "l1":
        parts = [rows.abs().mean(1), columns.abs().mean((0, 2))]
    elif criterion == "l2":
        parts = [rows.square().mean(1).sqrt(), columns.square().mean((0, 2)).sqrt()]
    elif criterion == "geometric-median":
        parts = [torch.stack([sum((a - b).norm() for b in rows) for a in rows])]
    elif criterion == "bn-gamma":
        np.testing.assert_allclose(scores, model.bn.weight.detach().double().abs().numpy())
        return
    else:
        total = torch.zeros(6, dtype=torch.float64)
        for batch in itertools.islice(data["train"].batches(recipe.batch_size, seed=3), 2):
            names = dict(model.named_parameters())
            gradients = torch.autograd.grad(given.objective(0.1)(model, batch), list(names.values()))
            term = {
                name: (g * w.detach()).double().abs() for (name, w), g in zip(names.items(), gradients, strict=True)
            }
            total += term["conv.weight"].sum((1, 2, 3)) + term["bn.weight"] + term["bn.bias"]
            total += term["fc.weight"].view(10, 6, 36).sum((0, 2))
        np.testing.assert_allclose(scores, (total / 2).numpy(), rtol=1e-5)
        return
    expected = torch.stack([part / part.mean() for part in parts]).mean(0)
    np.testing.assert_allclose(scores, expected.numpy(), rtol=1e-12)


def test_criteria_that_cannot_be_had() -> None:
    perceptron = reference("perceptron").model
    assert "no channel that could be removed passes a batch normalisation" in str(
        refusal(Structured(criterion="bn-gamma"), perceptron, bare(1, 8, 8))
    )
    reason = refusal(Structured(criterion="taylor"), perceptron, bare(1, 8, 8))
    assert reason == 'criterion "taylor" needs a task with training data'
    reason = refusal(Structured(finetune_epochs=1), perceptron, bare(1, 8, 8))
    assert "finetune_epochs=1 needs a task with training data" in str(reason)


# Budgets


@pytest.mark.parametrize("target", ["ratio", "macs", "params"])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_target_is_met_and_no_step_is_wasted(target: budget.Target, ratio: float, scope: budget.Scope) -> None:
    make, shape = NETWORKS["resnet20"]
    model = lively(make())
    method = Structured(ratio=ratio, target=target, scope=scope, criterion="l2", round_to=4)
    structure, plan = method.plan(model, bare(*shape))
    smaller = remove(model, structure, plan.units)
    example, taken = {"input": torch.zeros(2, *shape)}, signature(shape, 10)
    assert plan.macs == pytest.approx(1 - counts.macs(smaller, example, taken) / counts.macs(model, example, taken))
    assert plan.params == pytest.approx(1 - counts.parameters(smaller)[0] / counts.parameters(model)[0])
    assert all(after % 4 == 0 and after >= 4 for _, _, after in plan.sizes)
    if (scope, target) == ("layer", "ratio"):
        for _, before, after in plan.sizes:
            assert abs(after - before * (1 - ratio)) <= 2
        return
    reached = {"ratio": plan.channels, "macs": plan.macs, "params": plan.params}[target]
    assert reached >= ratio - 1e-9
    # Without the last four channels of any layer it would not be reached.
    for layer in structure.layers:
        lost = [unit for unit in plan.units if unit in layer.units]
        if lost:
            fewer = structure.removed(unit for unit in plan.units if unit not in lost[-4:])
            share = {
                "ratio": (fewer.sum()) / sum(part.channels for part in structure.layers),
                "macs": 1 - structure.macs(fewer) / structure.macs(structure.removed([])),
                "params": 1 - structure.parameters(fewer) / structure.parameters(structure.removed([])),
            }[target]
            assert share < ratio


def test_the_lowest_scores_go_first() -> None:
    model = lively(Pair())
    with torch.no_grad():
        model.bn.weight.copy_(torch.tensor([0.5, -0.1, 0.9, 0.05, -0.7, 0.3]))
    smaller = Structured(criterion="bn-gamma", round_to=1).compress(model, bare(1, 8, 8))
    torch.testing.assert_close(smaller.bn.weight.detach(), torch.tensor([0.5, 0.9, -0.7]))
    assert refusal(Structured(criterion="bn-gamma", round_to=1, ratio=0.9, min_channels=2), model, bare(1, 8, 8)) == (
        "ratio 0.9 cannot be reached: at most 66.7% of the channels can be removed with round_to=1 and min_channels=2 "
        "(fc: the model's outputs are its classes)"
    )


@pytest.mark.parametrize(
    ("channels", "width", "round_to", "expected"),
    [(64, 1, 16, 16), (32, 1, 16, 16), (31, 1, 16, 8), (16, 1, 16, 8), (10, 1, 16, 4), (2, 1, 16, 1), (64, 1, 1, 1),
     (12, 64, 16, 1), (12, 24, 16, 2), (4, 4, 16, 2), (100, 1, 10, 10)],
)  # fmt: skip
def test_steps(channels: int, width: int, round_to: int, expected: int) -> None:
    units = tuple(Unit(label=i, slices=(), width=width) for i in range(channels))
    assert budget.step(Layer(name="layer", makers=("layer",), units=units), round_to) == expected


def test_counts_that_are_no_multiples_become_some() -> None:
    make, shape = NETWORKS["lenet5-caffe"]
    _, plan = Structured(ratio=0.08, scope="layer").plan(lively(make()), bare(*shape))
    assert plan.sizes == (("conv1", 20, 20), ("conv2", 50, 48), ("fc1", 500, 464))


# Afterwards


def test_statistics_are_those_of_the_data() -> None:
    given = reference("residual")
    smaller = Structured(ratio=0.4, recalibrate=False).compress(given.model, bare(1, 8, 8))
    stale = smaller.norm.running_mean.clone()
    modes = [module.training for module in smaller.modules()]
    ctx = bare(1, 8, 8, data=given.data, recipe=given.recipe)
    assert recalibrate(smaller, ctx, batches=5) == 5
    assert [module.training for module in smaller.modules()] == modes
    batches = [x for _, (x, _) in zip(range(5), labelled(given, 32, "train", seed=0), strict=False)]
    with torch.no_grad():
        means = torch.stack([smaller.stem(x).mean((0, 2, 3)) for x in batches]).mean(0)
    torch.testing.assert_close(smaller.norm.running_mean, means)
    assert not torch.allclose(stale, means)


def test_fine_tuning_trains_the_smaller_model() -> None:
    given = reference("residual")
    messages: list[str] = []
    ctx = given.context(progress=lambda _, text: messages.append(text))
    settings: dict[str, Any] = {"target": "macs", "ratio": 0.6, "criterion": "taylor"}
    tuned = Structured(**settings, finetune_epochs=2, finetune_lr_scale=0.3).compress(given.model, ctx)
    plain = Structured(**settings, recalibrate=False).compress(given.model, ctx)
    assert {name: value.shape for name, value in tuned.state_dict().items()} == {
        name: value.shape for name, value in plain.state_dict().items()
    }

    def correct(model: nn.Module) -> int:
        with torch.no_grad():
            return sum(int((model(x).argmax(1) == y).sum()) for x, y in labelled(given, 500))

    assert correct(tuned) > correct(plain)
    assert "of the multiply-accumulates" in messages[-1]


class Attentive(nn.Module):
    """Shifted windows, then attention over all tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 2, 2)
        self.windows = ShiftedWindowAttention(24, [2, 2], [1, 1], 3)
        self.attention = nn.MultiheadAttention(24, 4, batch_first=True)
        self.fc = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.windows(self.patches(x).permute(0, 2, 3, 1)).flatten(1, 2)
        return self.fc(self.attention(x, x, x, need_weights=False)[0].mean(1))


def test_a_pruned_transformer_exports(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    from hardware.export import to_onnx

    model, shape = lively(Attentive()), (3, 8, 8)
    structure = find(model, signature(shape, 10))
    smaller = remove(model, structure, some(structure))
    path = to_onnx(smaller, signature(shape, 10), {"input": torch.zeros(2, *shape)}, tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = torch.randn(3, *shape)
    with torch.no_grad():
        expected = smaller(x)
    (found,) = session.run(None, {"input": x.numpy()})
    assert difference(torch.from_numpy(found), expected) < 1e-4
