"""HashedNets: the hash, virtual weights, gradients, fits, and models that keep only their real weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from hardware.export import to_onnx
from harness import modelfile
from harness.errors import Unsupported
from harness.testing.networks import reference
from methods.layers.attention import HeadAttention
from methods.weight_sharing import hashed_nets
from methods.weight_sharing.hashed_nets import HashedConv2d, HashedLinear, HashedNets, buckets, hashes
from tests.unit.contexts import images, labelled

pytestmark = pytest.mark.usefixtures("one_thread")


def splitmix64(index: int, salt: int) -> int:
    """The documented hash in Python's own integers."""
    wrap = 2**64 - 1
    z = ((index + 1) * 0x9E3779B97F4A7C15 + salt) & wrap
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & wrap
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & wrap
    return z ^ (z >> 31)


def test_the_hash_is_the_documented_one() -> None:
    # The first outputs of splitmix64 from state 1234567, as its reference implementation prints them.
    assert hashes(2, 1234567).tolist() == [6457827717110365317, 3203168211198807973]
    for salt in (0, 1, 2**63 - 1):
        assert hashes(50, salt).tolist() == [splitmix64(i, salt) for i in range(50)]
    bucket, negative = buckets(50, 7, 3)
    assert bucket.tolist() == [(splitmix64(i, 3) >> 32) * 7 >> 32 for i in range(50)]
    assert negative.tolist() == [splitmix64(i, 3) % 2 == 1 for i in range(50)]


def test_buckets_and_signs_are_evenly_used_and_independent() -> None:
    count, real = 200_000, 50
    bucket, negative = buckets(count, real, 99)
    table = np.stack([np.bincount(bucket[negative == sign], minlength=real) for sign in (False, True)])
    expected = count / real / 2
    chi = float(((table - expected) ** 2 / expected).sum())
    assert chi < 99 + 5 * np.sqrt(2 * 99), "99 degrees of freedom"


@pytest.mark.parametrize("layer", [nn.Linear(12, 9), nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2)])
def test_virtual_weights_and_gradients_against_float64(layer: nn.Linear | nn.Conv2d) -> None:
    torch.manual_seed(0)
    salt, real = 17, nn.Parameter(torch.randn(10))
    hashed = (
        HashedLinear(layer.weight.shape, real, layer.bias, salt)
        if isinstance(layer, nn.Linear)
        else HashedConv2d(layer, real, layer.bias, salt)
    )
    count = layer.weight.numel()
    matrix = torch.zeros(count, 10, dtype=torch.float64)  # V = matrix @ w
    for position in range(count):
        code = splitmix64(position, salt)
        matrix[position, (code >> 32) * 10 >> 32] = -1.0 if code % 2 else 1.0
    expected = (matrix @ real.detach().double()).view(layer.weight.shape)
    torch.testing.assert_close(hashed.weight.detach().double(), expected)

    x = torch.randn(5, 12) if isinstance(layer, nn.Linear) else torch.randn(5, 4, 8, 8)
    plain = copy.deepcopy(layer).double()
    plain.weight.data = expected
    torch.testing.assert_close(hashed(x).double(), plain(x.double()), rtol=1e-5, atol=1e-5)
    hashed(x).square().sum().backward()
    plain(x.double()).square().sum().backward()
    assert real.grad is not None
    assert plain.weight.grad is not None
    torch.testing.assert_close(real.grad.double(), matrix.T @ plain.weight.grad.flatten(), rtol=1e-4, atol=1e-3)


def test_the_fit_is_least_squares(tmp_path: Path) -> None:
    given = reference("perceptron")
    hashed = HashedNets(compression=4, from_scratch=False).compress(given.model, given.context(scratch=tmp_path))
    layer = hashed.get_submodule("fc2")
    assert isinstance(layer, HashedLinear)
    original = given.model.get_parameter("fc2.weight").detach().double().flatten()
    count, real = original.numel(), layer.real.numel()
    assert real == round(count / 4)
    bucket, negative = buckets(count, real, layer.salt)
    matrix = torch.zeros(count, real, dtype=torch.float64)
    matrix[torch.arange(count), torch.from_numpy(bucket)] = torch.from_numpy(np.where(negative, -1.0, 1.0))
    best = torch.linalg.lstsq(matrix, original[:, None], driver="gelsd").solution[:, 0]
    torch.testing.assert_close(layer.real.detach().double(), best, rtol=1e-5, atol=1e-6)
    assert torch.equal(layer.bias, given.model.get_parameter("fc2.bias"))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["perceptron", "residual"])
def test_only_real_weights_are_parameters(name: str, tmp_path: Path) -> None:
    given = reference(name)
    hashed = HashedNets(compression=8, epochs=1).compress(given.model, given.context(scratch=tmp_path))
    layers = [m for m in hashed.modules() if isinstance(m, HashedLinear | HashedConv2d)]
    virtual = [m for m in given.model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    assert [m.real.numel() for m in layers] == [max(1, round(m.weight.numel() / 8)) for m in virtual]
    saved = sum(m.weight.numel() - max(1, round(m.weight.numel() / 8)) for m in virtual)
    before, after = (sum(value.numel() for value in model.state_dict().values()) for model in (given.model, hashed))
    assert after == before - saved, "no index is kept"
    assert not any(isinstance(m, nn.Linear | nn.Conv2d) for m in hashed.modules())


def test_the_start_is_distributed_as_the_dense_networks(tmp_path: Path) -> None:
    given = reference("perceptron")
    hashed = HashedNets(compression=4, epochs=0).compress(given.model, given.context(scratch=tmp_path))
    fresh = given.fresh()
    for name in ("fc1", "fc2"):
        layer = hashed.get_submodule(name)
        assert isinstance(layer, HashedLinear)
        weight, dense = layer.weight.detach(), fresh.get_parameter(f"{name}.weight").detach()
        assert float(weight.std()) == pytest.approx(float(dense.std()), rel=0.1)
        assert abs(float(weight.mean())) < float(dense.std()) * 5 / np.sqrt(weight.numel() / 4)
        assert weight.abs().max() <= dense.abs().max()


def test_training_from_scratch_learns_and_does_not_see_the_trained_weights(tmp_path: Path) -> None:
    given = reference("perceptron")
    other = copy.deepcopy(given.model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    method = HashedNets(compression=4)
    first, second = (method.compress(model, given.context(scratch=tmp_path)) for model in (given.model, other))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    x, y = next(iter(labelled(given, 500)))
    assert float((first(x).argmax(1) == y).float().mean()) > 0.8
    fitted = HashedNets(compression=4, from_scratch=False).compress(given.model, given.context(scratch=tmp_path))
    tuned = HashedNets(compression=4, from_scratch=False, finetune_epochs=3).compress(
        given.model, given.context(scratch=tmp_path)
    )

    def accuracy(model: nn.Module) -> float:
        return float((model(x).argmax(1) == y).float().mean())

    assert accuracy(tuned) > accuracy(fitted) + 0.05


def test_seeds_and_layers_have_their_own_hash(tmp_path: Path) -> None:
    given = reference("perceptron")
    salts = set()
    for seed in (0, 1):
        hashed = HashedNets(from_scratch=False).compress(given.model, given.context(scratch=tmp_path, seed=seed))
        salts |= {m.salt for m in hashed.modules() if isinstance(m, HashedLinear)}
    assert len(salts) == 6
    assert all(0 <= salt < 2**63 for salt in salts)


@pytest.mark.parametrize("name", ["perceptron", "residual"])
def test_it_survives_its_file_and_the_export(name: str, tmp_path: Path) -> None:
    given = reference(name)
    hashed = HashedNets(epochs=1).compress(given.model, given.context(scratch=tmp_path)).eval()
    path = modelfile.save(hashed, tmp_path / "model")
    assert path.stat().st_size < 4 * sum(p.numel() for p in given.model.parameters())
    again = modelfile.load(path)
    x = images(given, 4)
    torch.testing.assert_close(again(x), hashed(x), rtol=0, atol=0)
    assert modelfile.save(again, tmp_path / "again").read_bytes() == path.read_bytes()

    hashed_nets._positions.cache_clear()  # the export works out the hash by itself
    file = to_onnx(again, given.signature, {"input": x}, tmp_path / "model.onnx")
    onnx.checker.check_model(file)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"input": x.numpy()})
    np.testing.assert_allclose(found, hashed(x).detach().numpy(), rtol=1e-4, atol=1e-4)


def test_tied_and_repeated_layers_keep_sharing(tmp_path: Path) -> None:
    given = reference("perceptron")
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    model.append(model[0])
    model[2].weight = model[0].weight
    hashed = HashedNets(from_scratch=False).compress(model, given.context(scratch=tmp_path))
    assert hashed.get_submodule("0") is hashed.get_submodule("3")
    assert hashed.get_parameter("0.real") is hashed.get_parameter("2.real")
    first, third = hashed.get_submodule("0"), hashed.get_submodule("2")
    assert isinstance(first, HashedLinear)
    assert isinstance(third, HashedLinear)
    assert torch.equal(first.weight, third.weight)


@pytest.mark.parametrize(
    ("attention", "projections", "shapes"),
    [
        (lambda: nn.MultiheadAttention(16, 2, batch_first=True), ["in_proj_weight"], (16, 16)),
        (lambda: HeadAttention(16, 2, 4), ["in_proj_weight"], (16, 16)),
        (
            lambda: nn.MultiheadAttention(16, 2, batch_first=True, kdim=6, vdim=10),
            ["q_proj_weight", "k_proj_weight", "v_proj_weight"],
            (6, 10),
        ),
    ],
    ids=["packed", "heads", "separate"],
)
def test_attention_reads_hashed_projections(
    attention: Callable[[], nn.Module], projections: list[str], shapes: tuple[int, int], tmp_path: Path
) -> None:
    given = reference("perceptron")
    torch.manual_seed(0)
    module = attention().eval()
    messages: list[str] = []
    made = given.context(scratch=tmp_path, progress=lambda _, message: messages.append(message))
    hashed = HashedNets(compression=1.5, from_scratch=False).compress(module, made)
    plain = copy.deepcopy(module)
    projection = hashed.get_submodule("out_proj")
    assert isinstance(projection, HashedLinear)
    plain.get_parameter("out_proj.weight").data = projection.weight.detach()
    for name in projections:
        weight, before = getattr(hashed, name), module.get_parameter(name)
        real = hashed.get_parameter(f"{name}_real")
        assert weight.shape == before.shape
        assert real.numel() == round(before.numel() / 1.5)
        assert set(weight.abs().flatten().tolist()) <= set(real.abs().tolist())
        plain.get_parameter(name).data = weight.detach()
        assert name not in dict(hashed.named_parameters())
        assert torch.equal(module.get_parameter(name), before), "the model given keeps its own"
    sizes = sum(p.numel() for name, p in hashed.named_parameters() if name.endswith("real"))
    assert messages[0].startswith(f"{sizes} real weights")
    x = torch.randn(2, 5, 16)
    key, value = (x, x) if shapes == (16, 16) else (torch.randn(2, 7, shapes[0]), torch.randn(2, 7, shapes[1]))
    expected = plain(x, key, value)[0]
    torch.testing.assert_close(hashed(x, key, value)[0], expected)
    again = modelfile.load(modelfile.save(hashed, tmp_path / "model"))
    assert torch.equal(again(x, key, value)[0], hashed(x, key, value)[0])
    hashed.train()(x, key, value)[0].sum().backward()
    assert all(hashed.get_parameter(f"{name}_real").grad.abs().sum() > 0 for name in projections)


@pytest.mark.parametrize(
    ("model", "settings", "changes", "reason"),
    [
        (nn.ReLU(), {}, {}, "no convolution or linear layer"),
        (nn.Linear(4, 4), {"hash_last": False}, {}, "hash_last=False"),
        (nn.Sequential(nn.Conv1d(4, 4, 3)), {}, {}, "layer '0' is a Conv1d"),
        (nn.Sequential(nn.Conv2d(4, 4, 3, padding_mode="circular")), {}, {}, "layer '0' pads with 'circular'"),
        (None, {}, {"fresh": None}, "trained from scratch.*use from_scratch=False"),
        (nn.Linear(4, 4), {}, {}, "not those of the task's untrained network"),
        (None, {"from_scratch": False, "finetune_epochs": 2}, {"training": None}, "finetune_epochs=2 needs"),
    ],
)
def test_what_cannot_be_hashed_is_refused(
    model: nn.Module | None, settings: dict[str, Any], changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    given = reference("perceptron")
    with pytest.raises(Unsupported, match=reason):
        HashedNets(**settings).compress(model or given.model, given.context(scratch=tmp_path, **changes))


def test_the_last_layer_can_stay_dense(tmp_path: Path) -> None:
    given = reference("perceptron")
    hashed = HashedNets(hash_last=False, from_scratch=False).compress(given.model, given.context(scratch=tmp_path))
    assert isinstance(hashed.get_submodule("fc3"), nn.Linear)
    assert isinstance(hashed.get_submodule("fc2"), HashedLinear)
