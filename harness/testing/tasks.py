"""What every task has to keep."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from harness import registry
from harness.contracts import Batch, Metric, Recipe, Signature, Split, Task, Workload
from harness.errors import Unavailable
from harness.testing.clauses import Coverage, created, require, state

if TYPE_CHECKING:
    from torch import Tensor


def check_task(name: str, parameters: Mapping[str, Any] | None = None) -> Coverage:
    """Check a task: its model, its loss and metrics, its data and their separation.

    The same seed gives the same model and the same batches; names, shapes and types are as the signature says; sizes
    are what the batches add up to; loss and metrics fit the model's outputs; and no more than 0.1 % of the test
    examples are also among the training or validation examples.

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
    task = created("task", name, parameters)
    require(isinstance(task.name, str), f"{name}: its name is text")
    reason = task.unavailable()
    require(reason is None or (isinstance(reason, str) and reason), f"{name}: unavailable gives a reason or None")
    if reason is not None:
        return Coverage(name=name, ran=(), skipped={"this machine": reason})
    require(isinstance(task, Task), f"{name}: lacks a member of Task")
    _check_parts(name, task)
    _check_model(name, task)
    ran, skipped = ["model"], {}
    data = task.data()
    if data:
        _check_data(name, task, data)
        ran.append("data")
    else:
        require(task.recipe() is None and task.finetuning() is None, f"{name}: a recipe needs data")
        skipped["data"] = "none"
    try:
        test = task.test()
    except Unavailable as missing:
        require(str(missing), f"{name}: without a test set it says why nothing is scored")
        skipped["test"] = str(missing)
    else:
        _check_test(name, task, test, data)
        ran.append("test")
    found = task.dataset_hash()
    if "test" in ran:
        require(isinstance(found, str), f"{name}: data have a hash")
        require(len(found) == 64 and set(found) <= set("0123456789abcdef"), f"{name}: dataset_hash is a hex sha256")
        require(found == registry.create("task", name, parameters or {}).dataset_hash(), f"{name}: the hash is stable")
    return Coverage(name=name, ran=tuple(ran), skipped=skipped)


def _check_parts(name: str, task: Task) -> None:
    require(isinstance(task.recipe(), Recipe | None), f"{name}: recipe is a Recipe or None")
    require(isinstance(task.finetuning(), Recipe | None), f"{name}: finetuning is a Recipe or None")
    signature = task.signature
    require(isinstance(signature, Signature), f"{name}: signature is a Signature")
    require(signature.inputs and signature.outputs, f"{name}: there are inputs and outputs")
    ports = [*signature.inputs, *signature.outputs]
    require(isinstance(task.workload, Workload), f"{name}: workload is a Workload")
    varying = {axis for port in signature.inputs for axis in port.shape if isinstance(axis, str)}
    require(varying <= set(task.workload.sizes), f"{name}: the workload gives a size to every axis that varies")
    require(len({port.name for port in ports}) == len(ports), f"{name}: inputs and outputs have different names")
    for metric in (*task.metrics, *task.fidelity):
        require(isinstance(metric, Metric), f"{name}: {metric!r} is a Metric")
    require(task.fidelity, f"{name}: there is a metric of fidelity")
    notes = task.notes()
    require(isinstance(notes, tuple) and all(note.endswith(".") for note in notes), f"{name}: notes are sentences")


def _check_model(name: str, task: Task) -> None:
    import torch

    from harness.calling import call, evaluating
    from harness.reference import made_up

    generator = torch.random.get_rng_state()
    first, second = state(task.model(0)), state(task.model(0))
    require(first == second, f"{name}: the same seed gives the same model")
    if task.recipe() is not None:
        require(state(task.model(1)) != first, f"{name}: another seed gives another model")
    require(
        torch.equal(torch.random.get_rng_state(), generator), f"{name}: model leaves the caller's random state alone"
    )
    signature, size = task.signature, task.signature.batch or 2
    model = task.model(0)
    with evaluating(model):
        outputs = call(model, made_up(signature, task.workload, size), signature)
    sizes = task.workload.sizes
    for port in signature.outputs:
        shape = (size, *(sizes.get(axis, axis) if isinstance(axis, str) else axis for axis in port.shape))
        found = outputs[port.name]
        require(tuple(found.shape) == shape, f"{name}: output {port.name!r} has the stated shape")
        require(_dtype(found) == port.dtype, f"{name}: output {port.name!r} has the stated type")


def _check_data(name: str, task: Task, data: Mapping[str, Split]) -> None:
    require(set(data) <= {"train", "validation"}, f"{name}: data are train and validation")
    require("train" in data or task.finetuning() is None, f"{name}: fine-tuning needs training data")
    for part, split in data.items():
        where = f"{name}, {part}"
        _check_ports(where, task, next(iter(split.batches(3))))
        _check_split(where, split)
    if "train" not in data or data["train"].size < 32:
        return
    train, where = data["train"], f"{name}, train"
    require(_equal(_first(train, seed=0), _first(train, seed=0)), f"{where}: the same seed gives the same batches")
    require(not _equal(_first(train, seed=0), _first(train, seed=1)), f"{where}: another seed gives another order")


def _check_split(where: str, split: Split) -> None:
    sizes = [len(batch) for batch in split.batches(100)]
    require(sum(sizes) == split.size > 0, f"{where}: one pass yields as many examples as it says")
    require(max(sizes) <= 100, f"{where}: no batch is larger than asked for")
    require(_equal(_first(split), _first(split)), f"{where}: without a seed the order is fixed")
    identity = split.identity
    require(len(identity) == 64 and set(identity) <= set("0123456789abcdef"), f"{where}: identity is a hex sha256")


def _check_test(name: str, task: Task, test: Split, data: Mapping[str, Split]) -> None:
    where = f"{name}, test"
    batch = next(iter(test.batches(3)))
    _check_ports(where, task, batch)
    _check_split(where, test)
    require(batch.targets, f"{where}: there are targets")
    require(task.metrics, f"{where}: there is a metric")
    _check_scoring(name, task, next(iter(test.batches(task.signature.batch or 8))))
    known = {row for split in data.values() for row in _rows(split.batches(500))}
    repeated = sum(row in known for row in _rows(test.batches(500)))
    require(
        repeated <= max(1, test.size // 1000), f"{name}: {repeated} of {test.size} test examples are training examples"
    )


def _check_scoring(name: str, task: Task, batch: Batch) -> None:
    """Loss, metrics and fidelity take the model's outputs."""
    import numpy as np
    import torch

    from harness.calling import call, evaluating

    model = task.model(0)
    with evaluating(model):
        outputs = call(model, batch.inputs, task.signature)
    arrays = {key: value.numpy() for key, value in outputs.items()}
    targets = {key: value.numpy() for key, value in batch.targets.items()}
    for metrics, against in ((task.metrics, targets), (task.fidelity, arrays)):
        for metric in metrics:
            scores = metric.score(arrays, against)
            require(scores.shape == (len(batch), len(metric.parts)), f"{name}: {metric.name} scores every example")
            require(np.ndim(metric.value(scores)) == 0, f"{name}: {metric.name} makes one figure")
    if task.finetuning() is not None:
        loss = task.loss(call(model, batch.inputs, task.signature), batch.targets)
        require(loss.ndim == 0 and bool(torch.isfinite(loss)), f"{name}: the loss is a finite number")
        require(loss.requires_grad, f"{name}: the loss has a gradient")


def _check_ports(where: str, task: Task, batch: Batch) -> None:
    for port in task.signature.inputs:
        require(port.name in batch.inputs, f"{where}: batches have the input {port.name!r}")
        value = batch.inputs[port.name]
        require(_dtype(value) == port.dtype, f"{where}: {port.name!r} has the stated type")
        fits = len(port.shape) == value.ndim - 1 and all(
            isinstance(axis, str) or axis == size for axis, size in zip(port.shape, value.shape[1:], strict=True)
        )
        require(fits, f"{where}: {port.name!r} has the stated shape")


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _first(split: Split, seed: int | None = None) -> Batch:
    return next(iter(split.batches(32, seed=seed)))


def _equal(a: Batch, b: Batch) -> bool:
    import torch

    return all(torch.equal(value, b.inputs[key]) for key, value in a.inputs.items()) and all(
        torch.equal(value, b.targets[key]) for key, value in a.targets.items()
    )


def _rows(batches: Iterable[Batch]) -> Iterable[bytes]:
    """The inputs of every example, as bytes."""
    for batch in batches:
        arrays = [batch.inputs[key].numpy() for key in sorted(batch.inputs)]
        for place in range(len(batch)):
            yield b"".join(array[place].tobytes() for array in arrays)
