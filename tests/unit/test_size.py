"""What a model's weights weigh: a real file that gives them back, and nothing claimed that was not weighed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from harness.errors import InputError
from harness.measure import size
from harness.storage import container


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 30), nn.BatchNorm1d(30), nn.Linear(30, 10))
    with torch.no_grad():
        model[0].weight[model[0].weight.abs() < 0.1] = 0.0
        model[0].bias[0] = -0.0
    return model


def test_the_file_is_what_is_counted_and_gives_every_bit_back(tmp_path: Path) -> None:
    model = network()
    sizes = size.weigh_weights(model, tmp_path)
    state = model.state_dict()
    assert tuple(sizes) == size.WEIGHTS
    assert sizes["plain_bytes"] == sum(value.numel() * value.element_size() for value in state.values())
    assert sizes["container_bytes"] == (tmp_path / "weights.assay").stat().st_size
    assert sizes["shannon_bytes"] < sizes["container_bytes"] < sizes["plain_bytes"]
    decoded = container.load(tmp_path / "weights.assay")
    assert list(decoded) == list(state)
    assert all(decoded[name].numpy().tobytes() == value.numpy().tobytes() for name, value in state.items())


def test_pruned_and_shared_weights_weigh_less(tmp_path: Path) -> None:
    dense, pruned = nn.Linear(300, 100), nn.Linear(300, 100)
    with torch.no_grad():
        pruned.weight.copy_(dense.weight)
        pruned.weight[pruned.weight.abs() < pruned.weight.abs().quantile(0.9)] = 0.0
        shared = nn.Linear(300, 100)
        shared.weight.copy_(pruned.weight.sign())
    weights = [size.weigh_weights(model, tmp_path)["container_bytes"] for model in (dense, pruned, shared)]
    assert weights[0] > 5 * weights[1] > 10 * weights[2]


def test_large_weights_are_not_put_through_slow_compressors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(container, "GENERAL_LIMIT", 100)
    sizes = size.weigh_weights(network(), tmp_path)
    assert [sizes[name] for name in ("zstd_bytes", "xz_bytes", "gzip_bytes")] == [None] * 3
    assert sizes["container_bytes"] > 0


@pytest.mark.parametrize("fault", ["one bit", "a name", "a shape"])
def test_a_format_that_loses_something_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    class Lossy(container.Container):
        def decode(self, data: bytes, **options: Any) -> dict[str, Tensor]:  # type: ignore[override]
            state = super().decode(data, **options)
            if fault == "one bit":
                state["0.bias"][0] = 0.0  # was -0.0: equal as numbers
            elif fault == "a name":
                del state["0.bias"]
            else:
                state["0.bias"] = state["0.bias"].reshape(1, -1)
            return state

    def create(kind: str, name: str, parameters: Mapping[str, Any]) -> Any:
        return Lossy()

    monkeypatch.setattr(size, "create", create)
    with pytest.raises(InputError, match=r"does not give tensor '0\.bias' back"):
        size.weigh_weights(network(), tmp_path)
