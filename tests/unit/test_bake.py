"""Baking leaves a plain model with the same outputs, and says what it did."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from harness import modelfile
from harness.bake import bake
from harness.errors import InputError
from harness.modelfile.key import KEY_VARIABLE

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def two() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))


def pruned() -> nn.Module:
    model = two()
    prune.l1_unstructured(model[0], "weight", 0.5)
    prune.random_unstructured(model[0], "weight", 0.5)
    prune.l1_unstructured(model[1], "bias", 0.5)
    return model


def pruned_and_tied() -> nn.Module:
    model = two()
    model[1].weight = model[0].weight
    prune.l1_unstructured(model[0], "weight", 0.5)
    return model


def parametrized() -> nn.Module:
    model = two()
    parametrizations.weight_norm(model[0])
    parametrizations.spectral_norm(model[1])
    return model


def parametrized_and_tied() -> nn.Module:
    model = two()
    model[1].weight = model[0].weight
    parametrizations.spectral_norm(model[0])
    return model


def orthogonal() -> nn.Module:
    model = two()
    parametrizations.orthogonal(model[0])
    return model


def hooks() -> nn.Module:
    model = two()
    nn.utils.weight_norm(model[0])
    nn.utils.spectral_norm(model[1])
    return model


def compiled() -> nn.Module:
    model = two()
    model[1].compile(backend="eager")
    inner = nn.Sequential(torch.compile(model[0], backend="eager"), model[1])
    return torch.compile(inner, backend="eager")  # type: ignore[return-value]


def exported() -> nn.Module:
    n = torch.export.Dim("n")
    return torch.export.export(two().eval(), (torch.ones(2, 4),), dynamic_shapes=({0: n},)).module()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (two, []),
        (pruned, ["0.weight was pruned with torch.nn.utils.prune", "1.bias was pruned"]),
        (pruned_and_tied, ["0.weight was pruned"]),
        (parametrized, ["0.weight was parametrized (WeightNorm)", "1.weight was parametrized (SpectralNorm)"]),
        (parametrized_and_tied, ["0.weight was parametrized"]),
        (orthogonal, ["0.weight was parametrized (Orthogonal)"]),
        (hooks, ["0.weight had weight normalisation", "1.weight had spectral normalisation"]),
        (compiled, ["The model was compiled", "0 was compiled", "1 was compiled"]),
        (lambda: nn.DataParallel(nn.Sequential(nn.DataParallel(two()[0]))), ["The model was wrapped", "0 was wrapped"]),
        (exported, ["The model comes from torch.export"]),
    ],
    ids=["plain", "pruned", "pruned-tied", "parametrized", "parametrized-tied", "orthogonal", "hooks", "compiled",
         "parallel", "exported"],
)  # fmt: skip
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_baked_model_is_plain_and_computes_the_same(
    make: Callable[[], nn.Module], said: list[str], training: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, str(tmp_path / "key"))
    model = make()
    x = torch.randn(3, 4)
    if make is not exported:
        model.eval()
    with torch.no_grad():
        wanted = model(x)
    if training and make is not exported:
        model.train()
    baked, sentences = bake(model)
    assert baked.training == (training and make is not exported)
    assert len(sentences) == len(said)
    assert all(sentence.startswith(start) for sentence, start in zip(sentences, said, strict=True))
    again = modelfile.load(modelfile.save(baked.eval(), tmp_path / "m"))
    with torch.no_grad():
        assert torch.equal(baked(x), wanted)
        assert torch.equal(again(x), wanted)
    assert all(parameter.requires_grad for parameter in baked.parameters())
    assert {name for name, _ in baked.named_parameters()} <= {"0.weight", "0.bias", "1.weight", "1.bias"}
    assert bake(baked) == (baked, [])


@pytest.mark.parametrize("how", ["prune", "parametrize", "hook"])
def test_recurrent_layers_use_the_baked_weight(how: str) -> None:
    model = nn.LSTM(3, 3).eval()
    if how == "prune":
        prune.l1_unstructured(model, "weight_hh_l0", 0.5)
    elif how == "hook":
        nn.utils.weight_norm(model, "weight_hh_l0")
    else:
        parametrizations.weight_norm(model, "weight_hh_l0")
    x = torch.randn(5, 2, 3)
    with torch.no_grad():
        wanted = model(x)[0]
        baked, _ = bake(model)
        assert torch.equal(baked(x)[0], wanted)
        baked.weight_hh_l0.zero_()
        assert not torch.equal(baked(x)[0], wanted)


def test_a_random_parametrization_is_refused() -> None:
    class Noise(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return weight + torch.randn_like(weight)

    model = two()
    parametrize.register_parametrization(model[1], "weight", Noise())
    with pytest.raises(InputError, match=r"1\.weight is computed by Noise, which is random"):
        bake(model)


@pytest.mark.parametrize("wrap", [lambda module: module, nn.Sequential])
def test_torchscript_is_refused_with_the_remedy(wrap: Callable[[nn.Module], nn.Module]) -> None:
    with pytest.raises(InputError, match=r"TorchScript .*Give the nn\.Module that it was made from"):
        bake(wrap(torch.jit.script(nn.Linear(1, 1))))
