from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harness.errors import InputError, SpecError
from harness.spec import Cell, Spec, packaged


def _spec(**changes: Any) -> Spec:
    return Spec.from_mapping({"task": "digits-cnn", **changes}, "test.toml")


def test_lists_expand_to_a_grid() -> None:
    spec = _spec(
        method=["baseline", {"name": "magnitude", "sparsity": [0.5, 0.9], "scope": ["global", "layer"]}],
        hardware=["torch", {"name": "openvino", "precision": ["f32", "bf16"]}],
        seed=[0, 1],
        batch_size=[1, 8],
    )
    cells = spec.cells()
    assert len(cells) == (1 + 4) * 3 * 2 * 2
    assert {cell.chain[0].get("sparsity") for cell in cells} == {None, 0.5, 0.9}


def test_a_chain_is_one_method_and_its_parameters_expand() -> None:
    cells = _spec(method={"chain": [{"name": "magnitude", "sparsity": [0.5, 0.9]}, "ptq-int8"]}).cells()
    assert [cell.method for cell in cells] == ["magnitude > ptq-int8"] * 2
    assert [cell.chain[0]["sparsity"] for cell in cells] == [0.5, 0.9]


def test_duplicates_are_dropped_and_defaults_are_resolved() -> None:
    cells = _spec(method=["baseline", {"name": "baseline"}]).cells()
    assert len(cells) == 1
    assert cells[0].hardware["name"] == "torch"
    assert cells[0].measure["min_queries"] == 700
    assert cells[0].energy["enabled"] is True


@given(
    seeds=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    batches=st.lists(st.integers(1, 9), min_size=1, max_size=4),
)
def test_the_hash_does_not_depend_on_order_or_repetition(seeds: list[int], batches: list[int]) -> None:
    spec = _spec(seed=seeds, batch_size=batches)
    other = _spec(seed=sorted(set(seeds)), batch_size=sorted(set(batches)), name="other")
    assert spec.hash() == other.hash()
    assert len(spec.cells()) == len(set(seeds)) * len(set(batches))


def test_a_cell_survives_json() -> None:
    (cell,) = _spec(method={"chain": ["baseline", "ptq-int8"]}).cells()
    assert Cell.from_json(cell.to_json()).to_json() == cell.to_json()


BAD: list[tuple[dict[str, Any], list[str]]] = [
    ({"metod": "baseline"}, ["metod", "Did you mean 'method'?"]),
    ({"method": "magnitud"}, ["Unknown method 'magnitud'. Did you mean 'magnitude'?"]),
    ({"task": "digit-cnn"}, ["Unknown task 'digit-cnn'. Did you mean 'digits-cnn'?"]),
    ({"hardware": "openvin"}, ["Unknown hardware 'openvin'. Did you mean 'openvino'?"]),
    ({"hardware": {"name": "openvino", "precision": "f16"}}, ["precision", "f16", "f32"]),
    ({"method": {"name": "magnitude", "sparsity": 1.5}}, ["sparsity", "1.5", "less than 1"]),
    ({"method": {"name": "magnitude", "sparsity": -0.1}}, ["sparsity", "-0.1"]),
    ({"method": {"name": "magnitude", "sparsity": float("nan")}}, ["sparsity", "nan"]),
    ({"method": {"name": "magnitude", "sparsity": []}}, ["sparsity", "empty"]),
    ({"method": {"name": "magnitude", "sparcity": 0.5}}, ["sparcity", "Did you mean 'sparsity'?"]),
    ({"method": []}, ["method"]),
    ({"method": {"chain": []}}, ["chain", "empty"]),
    ({"method": {"chain": "baseline"}}, ["chain", "list"]),
    ({"method": {"chain": ["baseline"], "sparsity": 0.5}}, ["sparsity", "chain"]),
    ({"method": 3}, ["method", "3"]),
    ({"batch_size": -1}, ["batch_size", "-1", ">= 1"]),
    ({"batch_size": 0}, ["batch_size", "0"]),
    ({"batch_size": 1.5}, ["batch_size", "1.5"]),
    ({"batch_size": True}, ["batch_size", "True"]),
    ({"batch_size": []}, ["batch_size", "empty"]),
    ({"threads": 0}, ["threads", ">= 1"]),
    ({"seed": -1}, ["seed", "-1"]),
    ({"seed": "zero"}, ["seed", "zero"]),
    ({"measure": {"min_querys": 3}}, ["min_querys", "Did you mean 'min_queries'?"]),
    ({"measure": {"min_queries": 0}}, ["min_queries", "0"]),
    ({"measure": {"min_seconds": 5.0, "max_seconds": 1.0}}, ["max_seconds", "min_seconds"]),
    ({"measure": "fast"}, ["measure", "fast"]),
    ({"energy": {"enabled": "yes"}}, ["enabled", "yes"]),
    ({"name": 7}, ["name", "7"]),
]


@pytest.mark.parametrize(("changes", "words"), BAD, ids=[str(changes) for changes, _ in BAD])
def test_bad_input_names_file_key_value_and_remedy(changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        _spec(**changes).cells()
    message = str(caught.value)
    assert caught.value.exit_code == 2
    for word in ["test.toml", *words]:
        assert word in message


def test_a_missing_task_is_named() -> None:
    with pytest.raises(SpecError, match="'task' is missing"):
        Spec.from_mapping({}, "test.toml")


@pytest.mark.parametrize(
    ("content", "words"), [(b"task = [", "not valid TOML"), (b"\xff\xfe\x00", "cannot be read as text")]
)
def test_a_file_that_is_not_toml(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    with pytest.raises(SpecError, match=words) as caught:
        Spec.load(path)
    assert "broken.toml" in str(caught.value)


def test_a_name_that_is_neither_file_nor_packaged() -> None:
    with pytest.raises(SpecError, match="Did you mean 'quickstart'"):
        Spec.load("quickstrat")


def test_every_packaged_spec_is_valid_and_described() -> None:
    assert {"quickstart", "fashion-mnist"} <= set(packaged())
    for name in packaged():
        spec = Spec.load(name)
        assert spec.name == name
        assert spec.description
        assert spec.cells()
