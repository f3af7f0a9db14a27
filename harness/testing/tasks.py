"""What every task has to keep."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from harness import registry
from harness.contracts import Data, Task, TestSet
from harness.testing.clauses import Coverage, created, require, state

if TYPE_CHECKING:
    from torch import Tensor


def check_task(name: str, parameters: Mapping[str, Any] | None = None) -> Coverage:
    """Check a task: its model, its data and their separation.

    The same seed gives the same model and the same batches; shapes and types are as stated; sizes are what the batches
    add up to; and no more than 0.1 % of the test examples are also among the training or validation examples.

    Parameters
    ----------
    name : str
        A registered name, or ``module:Class``.
    parameters : mapping, optional
        Instead of the defaults.

    Raises
    ------
    AssertionError
        Naming the clause that does not hold.
    """
    from harness.training import Recipe

    task = created("task", name, parameters)
    require(isinstance(task, Task), f"{name}: lacks a member of Task")
    require(isinstance(task.name, str), f"{name}: its name is text")
    reason = task.unavailable()
    require(reason is None or (isinstance(reason, str) and reason), f"{name}: unavailable gives a reason or None")
    if reason is not None:
        return Coverage(name=name, ran=(), skipped={"this machine": reason})
    recipe = task.recipe()
    require(recipe is None or isinstance(recipe, Recipe), f"{name}: recipe is a Recipe or None")
    _check_task_model(name, task, trained=recipe is None)
    ran, skipped = ["model"], {}
    data, test = task.data(), task.test()
    if data is not None:
        _check_data(name, task, data)
        ran.append("data")
    else:
        require(recipe is None, f"{name}: a recipe needs data")
        skipped["data"] = "none"
    if test is not None:
        _check_test(name, task, test, data)
        ran.append("test")
    else:
        require(task.no_accuracy_reason(), f"{name}: without a test set it says why accuracy is not measured")
        skipped["test"] = str(task.no_accuracy_reason())
    found = task.dataset_hash()
    if data is not None or test is not None:
        require(isinstance(found, str), f"{name}: data have a hash")
        require(len(found) == 64 and set(found) <= set("0123456789abcdef"), f"{name}: dataset_hash is a hex sha256")
        require(found == registry.create("task", name, parameters or {}).dataset_hash(), f"{name}: the hash is stable")
    return Coverage(name=name, ran=tuple(ran), skipped=skipped)


def _check_task_model(name: str, task: Task, *, trained: bool) -> None:
    import torch

    generator = torch.random.get_rng_state()
    first, second = state(task.model(0)), state(task.model(0))
    require(first == second, f"{name}: the same seed gives the same model")
    if not trained:
        require(state(task.model(1)) != first, f"{name}: another seed gives another model")
    require(
        torch.equal(torch.random.get_rng_state(), generator), f"{name}: model leaves the caller's random state alone"
    )
    with torch.inference_mode():
        logits = task.model(0).eval()(torch.zeros(2, *task.input_shape))
    require(logits.ndim == 2, f"{name}: the model answers (n, classes)")
    require(logits.shape[0] == 2, f"{name}: the model answers (n, classes)")
    require(logits.shape[1] >= 2, f"{name}: there are at least two classes")


def _check_data(name: str, task: Task, data: Data) -> None:
    import torch

    def first(**options: Any) -> tuple[Tensor, Tensor]:
        return next(iter(data.train(32, **options)))

    x, y = first(seed=0)
    require((x.dtype, y.dtype) == (torch.float32, torch.int64), f"{name}: batches are float32 and int64")
    require(tuple(x.shape[1:]) == tuple(task.input_shape), f"{name}: inputs have the stated shape")
    again = first(seed=0)
    require(torch.equal(x, again[0]), f"{name}: the same seed gives the same batches")
    require(torch.equal(y, again[1]), f"{name}: the same seed gives the same batches")
    require(not torch.equal(x, first(seed=1)[0]), f"{name}: another seed gives another order")
    plain = [first(seed=seed, shuffle=False, augment=False)[0] for seed in (0, 1)]
    require(torch.equal(*plain), f"{name}: without shuffling and augmentation the seed does not matter")
    sizes = [len(labels) for _, labels in data.train(100, seed=0, shuffle=False, augment=False)]
    require(sum(sizes) == data.train_size, f"{name}: one pass yields train_size examples")
    require(set(sizes[:-1]) <= {100}, f"{name}: all batches but the last are full")
    validation = [labels for _, labels in data.validation(64)]
    require(sum(map(len, validation)) == data.validation_size > 0, f"{name}: there are validation_size examples")
    repeated = [labels for _, labels in data.validation(64)]
    require(all(map(torch.equal, validation, repeated)), f"{name}: validation comes in fixed order")


def _check_test(name: str, task: Task, test: TestSet, data: Data | None) -> None:
    import numpy as np

    known: set[bytes] = set()
    if data is not None:
        for batches in (data.train(500, seed=0, shuffle=False, augment=False), data.validation(500)):
            known.update(image.tobytes() for x, _ in batches for image in x.numpy())
    count = repeated = 0
    classes: set[int] = set()
    for x, y in test.batches(500):
        require(
            (str(x.dtype), str(y.dtype)) == ("float32", "int64"), f"{name}: the test set is float32 and int64 arrays"
        )
        require(tuple(x.shape) == (len(y), *task.input_shape), f"{name}: test inputs have the stated shape")
        count += len(y)
        classes |= set(y.tolist())
        repeated += sum(image.tobytes() in known for image in x)
    require(count == test.size, f"{name}: the test set has the stated size")
    require(min(classes) >= 0 and len(classes) >= 2, f"{name}: labels are classes")
    require(
        repeated <= max(1, count // 1000), f"{name}: {repeated} of {count} test examples are also training examples"
    )
    again = next(iter(test.batches(7)))
    require(np.array_equal(again[0], next(iter(test.batches(7)))[0]), f"{name}: the test set comes in fixed order")
