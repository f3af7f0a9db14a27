from __future__ import annotations

import hashlib
import sys
import textwrap

import numpy as np
import pytest
import torch

from harness import tasks
from harness.contracts import Task
from harness.errors import InputError, SpecError
from harness.tasks import user
from harness.training import Recipe, SGDTrainer

MODULE = """
import numpy as np, torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from harness.training import Recipe

def linear():
    return nn.Linear(4, 3).train()

def examples(n, first=0):
    x = torch.arange(first, first + n * 4, dtype=torch.float64).reshape(n, 4)
    return TensorDataset(x, torch.arange(n) % 3)

def only_model():
    return linear()

def with_attribute():
    model = linear()
    model.input_shape = (4,)
    return model

def takes_shape(input_shape):
    assert input_shape == [4]
    return linear()

def everything(n=10, workers=0):
    loaders = {
        "train": DataLoader(examples(n), batch_size=4, shuffle=True),
        "validation": DataLoader(examples(5, 100), batch_size=2),
        "test": DataLoader(examples(7, 200), batch_size=3),
    }
    return linear(), loaders, Recipe(epochs=1, batch_size=4, lr=1e-6)

def test_generator():
    return linear(), {"test": ((np.full((2, 4), i, dtype=np.uint8), np.array([0, 1])) for i in range(3))}

def test_shuffled():
    return linear(), {"test": DataLoader(examples(7, 200), batch_size=3, shuffle=True)}

def no_test():
    return linear(), {"train": [(np.zeros((2, 4)), [0, 1])]}

def breaks(): raise RuntimeError("the weights are gone")
def returns_text(): return "a model"
def returns_wrong_key(): return linear(), {"tests": []}
def returns_list(): return linear(), []
def returns_number(): return linear(), {"test": 5}
def recipe_without_train(): return linear(), {"test": []}, Recipe(epochs=1)
def recipe_is_a_dict(): return linear(), {"train": []}, {"epochs": 1}
def bad_pair(): return linear(), {"test": [torch.zeros(2, 4)]}
def bad_lengths(): return linear(), {"test": [(torch.zeros(2, 4), torch.zeros(3, dtype=torch.int64))]}
def bad_classes(): return linear(), {"test": [(torch.zeros(2, 4), torch.zeros(2))]}
def empty_test(): return linear(), {"test": []}

def breaking_batches():
    yield torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
    raise OSError("disk gone")

class Breaking:
    def __iter__(self): return breaking_batches()

def bad_loader(): return linear(), {"test": Breaking()}

not_a_function = 3
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("raise ValueError('no such GPU')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    user._call.cache_clear()
    yield tmp_path
    sys.modules.pop("mine", None)
    sys.modules.pop("broken", None)


def test_a_module_in_the_current_directory_is_a_task():
    task = tasks.create("mine:everything", {"n": 6})
    assert isinstance(task, Task)
    assert task.name == "mine:everything"
    assert task.unavailable() is None
    assert task.input_shape == (4,)
    assert task.recipe() == Recipe(epochs=1, batch_size=4, lr=1e-6)
    assert task.no_accuracy_reason() is None
    assert task.data().train_size == 6


def test_the_model_is_a_fresh_copy_in_eval_mode():
    task = tasks.create("mine:everything", {})
    first, second = task.model(0), task.model(1)
    assert not first.training
    assert first is not second
    with torch.no_grad():
        first.weight.zero_()
    assert second.weight.abs().sum() > 0
    assert torch.equal(task.model(0).weight, second.weight)


def test_test_batches_are_cut_and_joined_in_order():
    task = tasks.create("mine:everything", {})
    test = task.test()
    for size in (1, 2, 3, 5, 7, 100):
        parts = list(test.batches(size))
        assert [len(y) for _, y in parts][:-1] == [size] * (len(parts) - 1)
        x = np.concatenate([x for x, _ in parts])
        assert x.dtype == np.float32
        assert np.array_equal(x.ravel(), np.arange(200, 228))
        assert np.concatenate([y for _, y in parts]).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert test.size == 7


def test_a_shuffling_loader_repeats_with_the_seed_and_leaves_the_global_state_alone():
    data = tasks.create("mine:everything", {}).data()
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    first = torch.cat([x for x, _ in data.train(4, seed=1)])
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(first, torch.cat([x for x, _ in data.train(3, seed=1)]))
    assert not torch.equal(first, torch.cat([x for x, _ in data.train(4, seed=2)]))
    assert sorted(first[:, 0].tolist()) == [4.0 * i for i in range(10)]


def test_a_shuffled_test_set_keeps_one_order():
    test = tasks.create("mine:test_shuffled", {}).test()
    first, second = (np.concatenate([x for x, _ in test.batches(2)]) for _ in range(2))
    assert np.array_equal(first, second)


def test_the_recipe_trains_it():
    task = tasks.create("mine:everything", {})
    model = task.model(0)
    before = model.weight.detach().clone()
    metrics = SGDTrainer(data=task.data(), seed=0)(model, task.recipe())
    assert not torch.equal(model.weight, before)
    assert 0 <= metrics["validation_accuracy"] <= 1


def test_the_dataset_hash_is_that_of_the_bytes_whatever_the_batches():
    x = np.arange(200, 228, dtype=np.float32)
    y = np.array([0, 1, 2, 0, 1, 2, 0], dtype=np.int64)
    parts = f"(4,) {hashlib.sha256(x.tobytes()).hexdigest()} {hashlib.sha256(y.tobytes()).hexdigest()}"
    assert tasks.create("mine:everything", {}).dataset_hash() == hashlib.sha256(parts.encode()).hexdigest()


def test_a_generator_is_kept():
    task = tasks.create("mine:test_generator", {})
    assert task.input_shape == (4,)
    assert task.data() is None
    for _ in range(2):
        assert [x[0, 0] for x, _ in task.test().batches(2)] == [0, 1, 2]


def test_a_model_alone_has_latency_only():
    task = tasks.create("mine:only_model", {"input_shape": [4]})
    assert task.input_shape == (4,)
    assert (task.test(), task.data(), task.dataset_hash(), task.recipe()) == (None, None, None, None)
    assert "no 'test' loader" in task.no_accuracy_reason()
    assert tasks.create("mine:takes_shape", {"input_shape": [4]}).input_shape == (4,)
    assert tasks.create("mine:with_attribute", {}).input_shape == (4,)
    assert "no 'test' loader" in tasks.create("mine:no_test", {}).no_accuracy_reason()


@pytest.mark.parametrize("shape", [None, [], [0], "4", [2.5]])
def test_a_shape_that_is_not_known_is_asked_for(shape):
    task = tasks.create("mine:only_model", {} if shape is None else {"input_shape": shape})
    with pytest.raises(InputError, match=r"mine:only_model.*input_shape = \["):
        _ = task.input_shape


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing_module:f", "importing 'missing_module' raised ModuleNotFoundError"),
        ("broken:f", "importing 'broken' raised ValueError: no such GPU"),
        ("mine:everythin", "has no 'everythin'. Did you mean 'everything'"),
        ("mine:not_a_function", "is int, not a function"),
    ],
)
def test_a_target_that_cannot_be_used_is_refused_at_once(name, message):
    with pytest.raises(InputError) as caught:
        tasks.create(name, {})
    assert name in str(caught.value)
    assert message in str(caught.value)


def test_parameters_must_fit_the_function():
    with pytest.raises(SpecError, match=r"mine:everything.*'m'.*The function takes: n, workers"):
        tasks.create("mine:everything", {"m": 1})
    with pytest.raises(SpecError, match=r"missing a required argument: 'input_shape'"):
        tasks.create("mine:takes_shape", {})


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("breaks", "raised RuntimeError: the weights are gone"),
        ("returns_text", "it returned (str)"),
        ("returns_wrong_key", "loader 'tests'. Did you mean 'test'"),
        ("returns_list", "must be a mapping"),
        ("returns_number", "cannot be iterated over"),
        ("recipe_without_train", "no 'train' loader"),
        ("recipe_is_a_dict", "must be a harness.training.Recipe; it is dict"),
        ("bad_pair", "batch 0 of the loader 'test' is not a pair"),
        ("bad_lengths", "must have shape (n, ...) with n = 3"),
        ("bad_classes", "classes must be integers"),
        ("empty_test", "has no examples"),
        ("bad_loader", "'test' raised OSError: disk gone (batch 1)"),
    ],
)
def test_what_the_function_does_wrong_is_said_with_its_name(function, message):
    task = tasks.create(f"mine:{function}", {})

    def use() -> None:
        task.model(0)
        list(task.test().batches(1))

    with pytest.raises(InputError) as caught:
        use()
    assert f"mine:{function}" in str(caught.value)
    assert message in str(caught.value)


def test_a_users_own_task_class_is_built_like_a_registered_one(here):
    (here / "mine.py").write_text(
        textwrap.dedent(
            """
            from pydantic.dataclasses import dataclass

            @dataclass(frozen=True, kw_only=True)
            class Own:
                width: int = 3
            """
        )
    )
    assert tasks.create("mine:Own", {"width": 5}).width == 5
    with pytest.raises(SpecError, match=r"no parameter 'widht'. Did you mean 'width'"):
        tasks.create("mine:Own", {"widht": 5})
