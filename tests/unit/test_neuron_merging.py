"""Neuron merging: what is removed, what is folded where, and the paper's own table."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist
from torch import Tensor, nn
from torch.nn import functional as F

import papers
from harness import registry
from harness.errors import SpecError, Unsupported
from harness.tasks import models
from methods.pruning.neuron_merging import NeuronMerging
from methods.pruning.structure import merging
from methods.pruning.structure.links import Link, find_links
from papers import sources
from tests.unit.contexts import bare, refusal

Weights = dict[str, np.ndarray[Any, np.dtype[np.float64]]]


pytestmark = pytest.mark.usefixtures("one_thread")


def perceptron(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 5)).double()


class Residual(nn.Module):
    """Stem, two residual blocks with batch normalisation, head."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.inside = nn.ModuleList(nn.Conv2d(6, 8, 3, padding=1, bias=index == 0) for index in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(8) for _ in range(2))
        self.outside = nn.ModuleList(nn.Conv2d(8, 6, 3, padding=1) for _ in range(2))
        self.head = nn.Linear(6, 4)
        for norm in self.norms:
            for values in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                nn.init.uniform_(values, 0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for inside, norm, outside in zip(self.inside, self.norms, self.outside, strict=True):
            x = x + outside(F.relu(norm(inside(x))))
        return self.head(x.mean((2, 3)))


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """In float64 and eval mode, with batch normalisation that does something."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                assert values is not None
                values.copy_(0.5 + torch.rand(values.shape, generator=generator))
    return model.double().eval()


def numbers(model: nn.Module) -> Weights:
    return {name: value.detach().double().numpy() for name, value in model.state_dict().items()}


# ---- which layers ----


def test_links_of_a_convolutional_stack() -> None:
    links, left_alone = find_links(models.create("lenet5-caffe", 0))
    assert links == [
        Link(producer="conv1", consumer="conv2"),
        Link(producer="conv2", consumer="fc1", columns=16),
        Link(producer="fc1", consumer="fc2"),
    ]
    assert left_alone == {"fc2": "its outputs are the model's outputs"}


def test_links_of_a_residual_network_are_the_insides_of_its_blocks() -> None:
    links, left_alone = find_links(models.create("resnet20", 0))
    blocks = [f"stage{stage}.{block}" for stage in (1, 2, 3) for block in range(3)]
    assert links == [Link(producer=f"{b}.conv1", consumer=f"{b}.conv2", norm=f"{b}.bn1") for b in blocks]
    assert left_alone["stage1.0.conv2"] == "its outputs enter add"
    assert left_alone["conv1"].startswith("its outputs are used 2 times")


class Written(nn.Module):
    """A convolution flattened by the given function."""

    def __init__(self, flatten: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.fc = nn.Conv2d(1, 4, 3), nn.Linear(4 * 36, 3)
        self.flatten = flatten

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.flatten(F.relu(self.conv(x))))


@pytest.mark.parametrize(
    "flatten",
    [
        lambda x: x.flatten(1),
        lambda x: torch.flatten(x, start_dim=1),
        lambda x: x.view(x.size(0), -1),
        lambda x: x.reshape(x.shape[0], -1),
        lambda x: x.view((x.size()[0], -1)),
    ],
)
def test_every_way_to_flatten_is_understood(flatten: Callable[[Tensor], Tensor]) -> None:
    links, _ = find_links(Written(flatten))
    assert links == [Link(producer="conv", consumer="fc", columns=36)]


@pytest.mark.parametrize("flatten", [lambda x: x.view(-1, 144), lambda x: x.view(x.size(0), 144)])
def test_sizes_written_into_the_forward_pass_are_left_alone(flatten: Callable[[Tensor], Tensor]) -> None:
    reason = refusal(NeuronMerging(), Written(flatten), bare(1, 8, 8))
    assert reason is not None
    assert "conv: its outputs enter view" in reason


def test_shared_and_repeated_layers_are_left_alone() -> None:
    inner = nn.Linear(6, 6)
    repeated = nn.Sequential(nn.Linear(6, 6), inner, inner, nn.Linear(6, 2))
    assert find_links(repeated)[1]["0"] == "1 is called more than once"
    tied = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2))
    tied[1].weight = tied[0].weight
    links, left_alone = find_links(tied)
    assert links == []
    assert left_alone["0"] == "the parameters of 0 are shared"


def test_a_depthwise_network_is_refused_with_the_layer() -> None:
    reason = refusal(NeuronMerging(), models.create("mobilenet-tiny", 0), bare(1, 28, 28))
    assert reason is not None
    assert "conv1: blocks.0.depthwise is a grouped convolution" in reason


def test_gelu_allows_pruning_but_not_merging() -> None:
    model = models.create("vit-tiny", 0)
    reason = refusal(NeuronMerging(), model, bare(1, 28, 28))
    assert reason is not None
    assert "gelu follows, through which no scale passes: merge=false prunes it" in reason
    smaller = NeuronMerging(merge=False).compress(model, bare(1, 28, 28))
    assert smaller.get_submodule("blocks.2.fc1").out_features == 64


def test_a_model_that_cannot_be_traced_is_refused() -> None:
    class Conditional(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum() > 0 else x

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x) if x.sum() > 0 else x

    reason = refusal(NeuronMerging(), Model(), bare(4))
    assert reason is not None
    assert reason.startswith("the forward pass cannot be traced symbolically")
    # A part that cannot be traced does not spoil the rest.
    mixed = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), Conditional(4, 4))
    assert [link.producer for link in find_links(mixed)[0]] == ["0"]


# ---- pruning ----

ZOO = {
    "digits-cnn": (1, 8, 8),
    "lenet-300-100": (1, 28, 28),
    "lenet5-caffe": (1, 28, 28),
    "resnet20": (1, 28, 28),
    "mobilenet-tiny": (1, 8, 8),  # depthwise convolutions in float64 are slow
    "convnext-tiny-ish": (1, 28, 28),
    "vit-tiny": (1, 28, 28),
}


def _times(factor: Tensor, _: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    return (args[0] * factor,)


@pytest.mark.parametrize("name", ZOO)
def test_pruning_equals_silencing_the_removed_neurons(name: str) -> None:
    """The smaller network computes what the whole one does when removed neurons reach their consumer as zeros."""
    model = randomised(models.create(name, 0))
    method = NeuronMerging(ratio=0.4, merge=False)
    links, _ = find_links(model)
    assert links
    hooks = []
    for link in links:
        kept, _ = method._decompose(model, link)
        rows = len(model.get_submodule(link.producer).weight)
        alive = torch.zeros(rows, dtype=torch.float64)
        alive[kept] = 1
        alive = alive.repeat_interleave(link.columns)
        axis = 1 if isinstance(model.get_submodule(link.consumer), nn.Conv2d) else -1
        shape = [-1, 1, 1] if axis == 1 else [-1]
        silence = functools.partial(_times, alive.reshape(shape))
        hooks.append(model.get_submodule(link.consumer).register_forward_pre_hook(silence))
    x = torch.randn(3, *ZOO[name], dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        silenced = model(x)
        for hook in hooks:
            hook.remove()
        smaller = method.compress(model, bare(*ZOO[name]))
        torch.testing.assert_close(smaller(x), silenced, rtol=1e-9, atol=1e-9)
        assert not torch.allclose(silenced, model(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5, 0.55, 0.9])
def test_layers_shrink_to_the_stated_count_and_keep_their_classes(ratio: float) -> None:
    model = models.create("resnet20", 0).eval()
    smaller = NeuronMerging(ratio=ratio).compress(model, bare(1, 28, 28))
    for name, module in smaller.named_modules():
        assert type(module) is type(model.get_submodule(name))
    for link in find_links(model)[0]:
        count = round(model.get_submodule(link.producer).out_channels * (1 - ratio))
        producer, norm, consumer = (smaller.get_submodule(str(n)) for n in (link.producer, link.norm, link.consumer))
        assert (producer.out_channels, norm.num_features, consumer.in_channels) == (count, count, count)
        assert (len(producer.weight), len(norm.running_var), consumer.weight.shape[1]) == (count, count, count)
    assert all(p.requires_grad for p in smaller.parameters())
    assert not smaller.training


def test_the_given_model_is_untouched_and_the_result_repeatable() -> None:
    model = models.create("lenet5-caffe", 0)
    before = copy.deepcopy(model.state_dict())
    first, second = (NeuronMerging().compress(model, bare(1, 28, 28)).state_dict() for _ in range(2))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_layer_that_would_lose_every_neuron_is_named() -> None:
    with pytest.raises(Unsupported, match=r"ratio 0\.98 would remove all 20 neurons of layer '0'"):
        NeuronMerging(ratio=0.98).compress(perceptron(), bare(12))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ratio": 1.5}, r"ratio: .*less than 1 \(got 1.5\)"),
        ({"ratio": -0.5}, "greater than or equal to 0"),
        ({"criterion": "l3-norm"}, "'l1', 'l2' or 'geometric-median'"),
        ({"threshold": 2}, "less than or equal to 1"),
        ({"ration": 0.5}, "Did you mean 'ratio'"),
    ],
)
def test_bad_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        registry.create("method", "neuron-merging", values)


# ---- merging ----


def importance(rows: np.ndarray[Any, Any], criterion: str) -> np.ndarray[Any, Any]:
    if criterion == "geometric-median":
        return np.asarray(cdist(rows, rows).sum(axis=0))
    return np.asarray(np.linalg.norm(rows, ord=1 if criterion == "l1" else 2, axis=1))


def merged_by_hand(given: Weights, ratio: float, criterion: str, threshold: float) -> Weights:
    """Algorithm 1 for a perceptron, one neuron at a time, in NumPy."""
    result = {name: value.copy() for name, value in given.items()}
    for layer, following in (("0", "2"), ("2", "4")):
        rows = np.column_stack([given[f"{layer}.weight"], given[f"{layer}.bias"]])
        count = round(len(rows) * (1 - ratio))
        kept = sorted(np.argsort(-importance(rows, criterion))[:count])
        outgoing = result[f"{following}.weight"]
        folded = outgoing[:, kept].copy()
        for i in set(range(len(rows))) - set(kept):
            cosines = [rows[i] @ rows[j] / (np.linalg.norm(rows[i]) * np.linalg.norm(rows[j])) for j in kept]
            best = int(np.argmax(cosines))
            if cosines[best] >= threshold:
                scale = np.linalg.norm(rows[i]) / np.linalg.norm(rows[kept[best]])
                folded[:, best] += scale * outgoing[:, i]
        result[f"{following}.weight"] = folded
        result[f"{layer}.weight"] = result[f"{layer}.weight"][kept]
        result[f"{layer}.bias"] = result[f"{layer}.bias"][kept]
    return result


@pytest.mark.parametrize("criterion", ["l1", "l2", "geometric-median"])
@pytest.mark.parametrize("threshold", [0.45, 0.2, -1.0])
def test_a_perceptron_merges_as_by_hand(criterion: Any, threshold: float) -> None:
    model = perceptron(seed=3)
    method = NeuronMerging(ratio=0.4, criterion=criterion, threshold=threshold)
    found = numbers(method.compress(model, bare(12)))
    expected = merged_by_hand(numbers(model), 0.4, criterion, threshold)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-12, atol=1e-12, err_msg=name)


def test_proportional_neurons_merge_without_loss() -> None:
    """Half of every layer are positive multiples of the other half: the smaller network is the same function."""
    torch.manual_seed(0)
    model = models.create("lenet5-caffe", 0).double().eval()
    for layer in (model.conv1, model.conv2, model.fc1):
        half = len(layer.weight) // 2
        scale = torch.rand(half, dtype=torch.float64) * 0.4 + 0.1
        layer.weight.data[half:] = torch.einsum("n,n...->n...", scale, layer.weight.data[:half])
        layer.bias.data[half:] = scale * layer.bias.data[:half]
    x = torch.randn(4, 1, 28, 28, dtype=torch.float64)
    with torch.no_grad():
        merged = NeuronMerging(ratio=0.5, threshold=0.99).compress(model, bare(1, 28, 28))
        torch.testing.assert_close(merged(x), model(x), rtol=1e-9, atol=1e-12)
        pruned = NeuronMerging(ratio=0.5, merge=False).compress(model, bare(1, 28, 28))
        assert (pruned(x) - model(x)).abs().max() > 1e-3


def test_proportional_filters_merge_without_loss_through_batch_normalisation() -> None:
    """Filters w_i = s w_j whose normalisation gives offset B = 0, any slopes: again the same function."""
    model = Residual(seed=1).double().eval()
    generator = torch.Generator().manual_seed(2)
    for conv, norm in zip(model.inside, model.norms, strict=True):
        s = torch.rand(4, dtype=torch.float64, generator=generator) * 0.4 + 0.1
        conv.weight.data[4:] = torch.einsum("n,n...->n...", s, conv.weight.data[:4])
        bias = torch.zeros(8, dtype=torch.float64) if conv.bias is None else conv.bias.data
        # Moved by the convolution's bias, the means are in the filters' ratio, and beta in that of the outputs.
        norm.running_mean[4:] = s * (norm.running_mean[:4] - bias[:4]) + bias[4:]
        slope = norm.weight.data / (norm.running_var + norm.eps).sqrt()
        norm.bias.data[4:] = s * slope[4:] / slope[:4] * norm.bias.data[:4]
    x = torch.randn(4, 1, 8, 8, dtype=torch.float64, generator=generator)
    with torch.no_grad():
        merged = NeuronMerging(ratio=0.5).compress(model, bare(1, 8, 8))
        torch.testing.assert_close(merged(x), model(x), rtol=1e-9, atol=1e-12)
        pruned = NeuronMerging(ratio=0.5, merge=False).compress(model, bare(1, 8, 8))
        assert (pruned(x) - model(x)).abs().max() > 1e-3


def test_the_offset_after_batch_normalisation() -> None:
    """y_i = S y_j + B holds for any normalisation where the pre-activations are proportional."""
    torch.manual_seed(0)
    norm = randomised(nn.Sequential(nn.BatchNorm2d(5)))[0]  # type: ignore[index]
    bias = torch.randn(5, dtype=torch.float64)
    kept = torch.tensor([1, 3])
    lengths = torch.rand(5, dtype=torch.float64) + 0.5
    ratio = lengths[:, None] / lengths[kept][None, :]
    scale, offset = merging.normalised(norm, bias, kept, ratio)
    base = torch.randn(7, dtype=torch.float64)
    with torch.no_grad():
        y = norm((base[:, None] * lengths + bias)[:, :, None, None])[:, :, 0, 0]
    for i in range(5):
        for place, j in enumerate(kept):
            torch.testing.assert_close(y[:, i], scale[i, place] * y[:, j] + offset[i, place])


def test_a_negative_scale_is_never_used() -> None:
    """gamma of opposite signs: the ReLU would cut the other side, so the pair must not merge."""
    model = Residual(seed=4).double().eval()
    for conv, norm in zip(model.inside, model.norms, strict=True):
        conv.weight.data[4:] = 0.5 * conv.weight.data[:4]
        norm.weight.data[4:] *= -1
    merged = NeuronMerging(ratio=0.5, threshold=-1.0).compress(model, bare(1, 8, 8))
    pruned = NeuronMerging(ratio=0.5, merge=False).compress(model, bare(1, 8, 8))
    for name, value in pruned.state_dict().items():
        assert torch.equal(merged.state_dict()[name], value), name


def test_dead_neurons_neither_divide_by_zero_nor_attract() -> None:
    model = perceptron()
    model[0].weight.data[:15] = 0
    model[0].bias.data[:15] = 0
    merged = NeuronMerging(ratio=0.5, threshold=-1.0).compress(model, bare(12))
    assert all(torch.isfinite(p).all() for p in merged.parameters())


# ---- the paper ----

PAPER = papers.load("neuron-merging-2020")


@pytest.fixture(scope="module")
def fashion(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Tensor, Tensor]:
    """The authors' network and the 10,000 test images."""
    # Skips only where ASSAY_DATA has no copy of the authors' checkpoint, which may not be shipped with this code.
    if sources.local_copy(PAPER.sources[0], PAPER.key) is None:
        pytest.skip(f"{PAPER.sources[0].filename} is in no folder of ASSAY_DATA")
    patch = pytest.MonkeyPatch()
    with patch.context() as patched:
        patched.setenv("ASSAY_HOME", str(tmp_path_factory.mktemp("home")))
        sources.fetch(PAPER)
        (spec,) = PAPER.specs
        item = spec["task"]
        task = registry.create("task", item["name"], {"weights": item["weights"]})
        if reason := task.unavailable():
            pytest.skip(reason)
        model, held_out = task.model(0).eval(), task.test()
        assert task.recipe() is None
    (batch,) = held_out.batches(held_out.size)
    return model, batch.inputs["input"], batch.targets["label"]


@pytest.mark.parametrize("claim", PAPER.claims, ids=lambda claim: claim.id)
def test_the_papers_table_comes_out_to_the_last_digit(
    claim: papers.Claim, fashion: tuple[nn.Module, Tensor, Tensor]
) -> None:
    model, images, labels = fashion
    step = dict(claim.select["chain"][0])
    method = registry.create("method", step.pop("name"), step)
    with torch.inference_mode():
        compressed = method.compress(model, bare(1, 28, 28))
        accuracy = 100 * float((compressed(images).argmax(1) == labels).double().mean())
    assert accuracy == pytest.approx(claim.claimed, abs=claim.tolerance)


@pytest.mark.parametrize("criterion", ["l2", "geometric-median"])
def test_merging_beats_pruning_under_the_other_criteria(
    criterion: Any, fashion: tuple[nn.Module, Tensor, Tensor]
) -> None:
    model, images, labels = fashion
    for ratio in (0.5, 0.8):
        with torch.inference_mode():
            pruned, merged = (
                NeuronMerging(ratio=ratio, criterion=criterion, merge=merge).compress(model, bare(1, 28, 28))(images)
                for merge in (False, True)
            )
        assert (merged.argmax(1) == labels).sum() > (pruned.argmax(1) == labels).sum()
