"""k-means weight sharing: cluster counts, zeros, gradients that are sums, weights that stay tied."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from harness import modelfile
from harness.contracts import Batch
from harness.errors import Unsupported
from harness.testing.networks import reference
from methods.pruning.magnitude import Magnitude
from methods.weight_sharing import tied
from methods.weight_sharing.kmeans1d import cluster
from methods.weight_sharing.kmeans_sharing import KMeansSharing
from methods.weight_sharing.tied import Shared, gather
from tests.unit.contexts import fit_of, images, labelled

pytestmark = pytest.mark.usefixtures("one_thread")


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {layer.name: layer.weight.detach() for layer in tied.layers(model)}


@pytest.mark.parametrize("name", ["perceptron", "residual"])
@pytest.mark.parametrize("init", ["linear", "density", "random", "exact"])
def test_every_layer_has_exactly_its_clusters(name: str, init: Any, tmp_path: Path) -> None:
    given = reference(name)
    shared = KMeansSharing(conv_bits=4, linear_bits=3, init=init).compress(given.model, given.context(scratch=tmp_path))
    for layer, weight in weights(shared).items():
        original = weights(given.model)[layer]
        assert weight.unique().numel() == (8 if weight.ndim == 2 else 16)
        # Every weight has the nearest value of its codebook.
        distances = (original.flatten()[:, None] - weight.unique()).abs()
        torch.testing.assert_close((original - weight).abs().flatten(), distances.amin(1), rtol=0, atol=0)
    others = {key for key, _ in given.model.named_parameters()} - {layer.key for layer in tied.layers(given.model)}
    for key in others:
        assert torch.equal(shared.get_parameter(key), given.model.get_parameter(key)), key


def test_the_codebook_is_the_optimum_of_the_nonzero_weights(tmp_path: Path) -> None:
    given = reference("perceptron")
    pruned = Magnitude(sparsity=0.6).compress(given.model, given.context(scratch=tmp_path))
    shared = KMeansSharing(bits=4, init="exact").compress(pruned, given.context(scratch=tmp_path))
    for layer, weight in weights(shared).items():
        original = weights(pruned)[layer]
        assert torch.equal(weight == 0, original == 0), "zeros stay, and no other weight becomes one"
        best = cluster(original[original != 0].numpy(), 16, init="exact")
        assert float((original - weight).double().square().sum()) == pytest.approx(best.distortion, rel=1e-6)
        assert weight[weight != 0].unique().tolist() == best.codebook.tolist()


def test_zeros_are_clustered_where_they_are_not_kept(tmp_path: Path) -> None:
    given = reference("perceptron")
    pruned = Magnitude(sparsity=0.6).compress(given.model, given.context(scratch=tmp_path))
    shared = KMeansSharing(bits=3, keep_zeros=False).compress(pruned, given.context(scratch=tmp_path))
    assert all(weight.unique().numel() == 8 for weight in weights(shared).values())


def test_channels_have_codebooks_of_their_own(tmp_path: Path) -> None:
    given = reference("residual")
    shared = KMeansSharing(bits=3, scope="channel").compress(given.model, given.context(scratch=tmp_path))
    for weight in weights(shared).values():
        assert [row.unique().numel() for row in weight] == [8] * len(weight)
    conv = weights(shared)["conv1"]
    assert conv.unique().numel() > 8 * 20


def test_an_empty_channel_stays_empty(tmp_path: Path) -> None:
    given = reference("perceptron")
    model = copy.deepcopy(given.model)
    with torch.no_grad():
        model.get_parameter("fc1.weight")[3] = 0
    shared = KMeansSharing(bits=2, scope="channel").compress(model, given.context(scratch=tmp_path))
    assert not shared.get_parameter("fc1.weight")[3].any()


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("width", [1, 4])
def test_the_codebooks_gradient_is_the_sum_of_its_weights_gradients(mean: bool, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shape, entries = torch.Size((6, 8)), 5
    index = torch.randperm(48 // width, generator=generator) % (entries + 1)  # 0: zeros
    codebook = torch.randn(entries, width, generator=generator, dtype=torch.float64, requires_grad=True)
    x = torch.randn(10, 8, generator=generator, dtype=torch.float64)

    weight = gather(codebook, index, shape, mean=mean)
    plain = weight.detach().clone().requires_grad_()
    for used in (weight, plain):
        (x @ used.T).tanh().square().sum().backward()  # type: ignore[no-untyped-call]

    assert plain.grad is not None
    blocks = plain.grad.reshape(-1, width)
    for entry in range(entries):
        own = blocks[index == entry + 1]
        expected = own.mean(0) if mean else own.sum(0)
        torch.testing.assert_close(codebook.grad[entry], expected)  # type: ignore[index]
    assert not weight.reshape(-1, width)[index == 0].any()


def test_finite_differences_agree() -> None:
    index = torch.tensor([1, 2, 0, 2, 3, 1])
    codebook = torch.randn(3, 1, dtype=torch.float64, requires_grad=True)
    shape = torch.Size((2, 3))
    assert torch.autograd.gradcheck(lambda c: gather(c, index, shape, mean=False).sin(), (codebook,))


def test_a_step_moves_an_entry_by_the_summed_gradient(tmp_path: Path) -> None:
    """One SGD step without momentum through the trainer, against the same step worked out by hand in float64."""
    given = reference("perceptron")
    made = KMeansSharing(bits=2)
    shared = {layer.key: made._share(layer, 0)[0] for layer in tied.layers(given.model)}
    recipe = replace(given.recipe.finetune(1), batch_size=given.data["train"].size, momentum=0.0, lr=1e-3)
    _, after = tied.train(given.model, shared, given.context(scratch=tmp_path), recipe, mean=False, others=False)

    model = tied.write(copy.deepcopy(given.model), shared).double()
    steps = []

    def record(network: nn.Module, batch: Batch) -> torch.Tensor:
        x = batch.inputs["input"]
        steps.append((x.double(), batch.targets["label"]))
        return network(x).sum() * 0

    fit_of(given.context())(copy.deepcopy(given.model), recipe, objective=record)
    ((x, y),) = steps
    nn.functional.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
    for key, part in shared.items():
        gradient = model.get_parameter(key).grad
        assert gradient is not None
        for entry in range(len(part.codebook)):
            moved = after[key].codebook[entry].double() - part.codebook[entry].double()
            expected = -1e-3 * gradient.flatten()[part.index == entry + 1].sum()
            torch.testing.assert_close(moved, expected[None], rtol=2e-3, atol=2e-8)


@pytest.mark.parametrize("name", ["perceptron", "residual"])
def test_weights_stay_tied_through_fine_tuning(name: str, tmp_path: Path) -> None:
    given = reference(name)
    pruned = Magnitude(sparsity=0.5).compress(given.model, given.context(scratch=tmp_path))
    plain = KMeansSharing(bits=2).compress(pruned, given.context(scratch=tmp_path))
    tuned = KMeansSharing(bits=2, finetune_epochs=2).compress(pruned, given.context(scratch=tmp_path))
    for layer, before in weights(plain).items():
        after = weights(tuned)[layer]
        assert torch.equal(after == 0, before == 0)
        pairs = torch.stack([before.flatten(), after.flatten()], 1).unique(dim=0)
        assert len(pairs) == before.unique().numel() == after.unique().numel(), "values moved together, or not at all"
        assert not torch.equal(before, after)
    for key, parameter in tuned.named_parameters():
        assert parameter.requires_grad
        assert parameter.grad is None
        assert type(tuned.get_parameter(key)) is nn.Parameter
    x = images(given, 200)

    def error(model: nn.Module) -> float:
        labels = next(iter(labelled(given, 200)))[1]
        with torch.no_grad():
            return float(nn.functional.cross_entropy(model.eval()(x), labels))

    assert error(tuned) < error(plain)


def test_the_model_survives_its_file(tmp_path: Path) -> None:
    given = reference("residual")
    shared = KMeansSharing(bits=4, finetune_epochs=1).compress(given.model, given.context(scratch=tmp_path))
    again = modelfile.load(modelfile.save(shared, tmp_path / "model"))
    assert type(again) is type(given.model)
    torch.testing.assert_close(again(images(given, 3)), shared(images(given, 3)), rtol=0, atol=0)


def test_tied_layers_share_one_codebook(tmp_path: Path) -> None:
    given = reference("perceptron")
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))
    model[3].weight = model[1].weight
    shared = KMeansSharing(bits=2, finetune_epochs=1).compress(model, given.context(scratch=tmp_path))
    assert shared.get_submodule("1").weight is shared.get_submodule("3").weight
    assert shared.get_parameter("1.weight").unique().numel() == 4


def test_a_single_layer_is_a_model(tmp_path: Path) -> None:
    given = reference("perceptron")
    shared = KMeansSharing(bits=2).compress(nn.Linear(64, 10), given.context(scratch=tmp_path))
    assert shared.get_parameter("weight").unique().numel() == 4


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (
            {"clusters": 400},
            r"400 clusters are more than the 320 different non-zero weights of layer 'fc3'.*at most 320",
        ),
        ({"bits": 6, "scope": "channel"}, r"64 clusters are more than the 48 different .* channel 0 of layer 'fc2'"),
        ({"linear_bits": 9, "keep_zeros": False}, r"512 clusters are more than the 320 different weights"),
    ],
)
def test_more_clusters_than_values_are_refused(settings: dict[str, Any], reason: str, tmp_path: Path) -> None:
    given = reference("perceptron")
    with pytest.raises(Unsupported, match=reason):
        KMeansSharing(**settings).compress(given.model, given.context(scratch=tmp_path))


def test_what_cannot_be_shared_or_tuned_is_refused(tmp_path: Path) -> None:
    given = reference("perceptron")
    with pytest.raises(Unsupported, match="no convolution or linear layer"):
        KMeansSharing().compress(nn.Sequential(nn.ReLU()), given.context(scratch=tmp_path))
    with pytest.raises(Unsupported, match="finetune_epochs=1 needs a task with training data"):
        KMeansSharing(finetune_epochs=1).compress(given.model, given.context(scratch=tmp_path, training=None))
    broken = copy.deepcopy(given.model)
    with torch.no_grad():
        broken.get_parameter("fc2.weight")[0, 0] = torch.nan
    with pytest.raises(Unsupported, match="layer 'fc2' has weights that are NaN"):
        KMeansSharing().compress(broken, given.context(scratch=tmp_path))


def test_a_codebook_of_blocks_is_read_row_by_row() -> None:
    part = Shared(
        codebook=torch.tensor([[1.0, 2.0], [3.0, 4.0]]), index=torch.tensor([2, 0, 1, 1]), shape=torch.Size((2, 4))
    )
    assert part.weight().tolist() == [[3, 4, 0, 0], [1, 2, 1, 2]]
