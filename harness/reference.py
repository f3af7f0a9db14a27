"""What a deployed artifact is compared with: the torch model's outputs on a few examples, and the test set."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from harness import arrays, cache, environment, paths
from harness.calling import call, evaluating
from harness.canonical import digest
from harness.chain import Stored, Work
from harness.contracts import Batch, Signature, Split, Workload
from harness.errors import InputError, NotFinite
from harness.provenance import source_hash

if TYPE_CHECKING:
    from torch import Tensor, nn

    from harness.contracts import Arrays, Tensors

OUTPUT_BYTES = 2**28
"""Bytes of outputs that are held at once, which bounds batches and the number of reference examples."""
_BATCH = 32
_RANDOM_EXAMPLES = 32
_VARYING = 16
_PROBED = 32
_NOISE = 1e-6
_MIXED = 1e-3
"""Relative difference that kernels for other batch sizes do not explain."""


def source_of(data: Mapping[str, Split]) -> Literal["validation", "train", "random"]:
    """Where outputs are compared: never on the test set, which only the task's metrics read."""
    if "validation" in data:
        return "validation"
    return "train" if "train" in data else "random"


def examples(signature: Signature, workload: Workload, data: Mapping[str, Split], count: int) -> Tensors:
    """The inputs of ``count`` examples in their fixed order; made-up ones where a task has no data."""
    import torch

    kind = source_of(data)
    if kind == "random":
        return made_up(signature, workload, min(count, _RANDOM_EXAMPLES))
    parts: list[Tensors] = []
    found = 0
    for batch in data[kind].batches(min(count, 256)):
        shapes = {name: value.shape[1:] for name, value in batch.inputs.items()}
        if parts and shapes != {name: value.shape[1:] for name, value in parts[0].items()}:
            break  # examples of one shape are enough
        parts.append(batch.inputs)
        found += len(batch)
        if found >= count:
            break
    return {port.name: torch.cat([part[port.name] for part in parts])[:count].contiguous() for port in signature.inputs}


def made_up(signature: Signature, workload: Workload, count: int) -> Tensors:
    """Made-up inputs: normal floats; integers over the port's values, where these are not known zeros (masks: ones)."""
    import torch

    generator = torch.Generator().manual_seed(0)
    found = {}
    for port in signature.inputs:
        shape = (count, *(workload.sizes.get(axis, _VARYING) if isinstance(axis, str) else axis for axis in port.shape))
        dtype: torch.dtype = getattr(torch, port.dtype)
        if dtype.is_floating_point:
            found[port.name] = torch.randn(shape, generator=generator).to(dtype)
        elif port.values:
            found[port.name] = torch.randint(port.values, shape, generator=generator).to(dtype)
        else:
            found[port.name] = (torch.ones if "mask" in port.name else torch.zeros)(shape, dtype=dtype)
    return found


def reference(
    work: Work, model: nn.Module, stored: Stored, unquantized: tuple[nn.Module, Stored] | None
) -> tuple[Path, dict[str, Any]]:
    """Real examples with the torch model's outputs, and those of the model before it was quantized.

    Parameters
    ----------
    work : Work
    model, stored
        What is deployed.
    unquantized : (nn.Module, Stored) or None
        The last model of the chain that holds no quantized layer, where that is another one.

    Returns
    -------
    Path
        A folder of :mod:`harness.arrays`: inputs, and outputs as targets named ``torch/NAME`` and ``float/NAME``.
    dict
        ``random`` (whether two calls on equal inputs differed), ``mixing`` (whether an example's outputs depend on the
        others of its batch), ``output_bytes`` (of one example) and ``batch`` (examples of one call).

    Raises
    ------
    NotFinite
        If an output is NaN or infinite.
    """
    import torch

    task = work.task
    count = work.cell.measure["fidelity_examples"]
    key = [
        stored.key,
        stored.sha256,
        work.data_key,
        count,
        task.signature,
        task.workload,
        unquantized[1].sha256 if unquantized else None,
    ]
    folder = paths.cache("reference", digest([*map(str, key), source_hash("harness.reference")]))

    def fill(place: Path) -> dict[str, Any]:
        inputs = examples(task.signature, task.workload, work.data, count)
        probed = _probe(model, inputs, task.signature)
        output_bytes = probed["output_bytes"]
        limit = max(1, OUTPUT_BYTES // max(1, output_bytes))
        inputs = {name: value[:limit] for name, value in inputs.items()}
        size = task.signature.batch or min(_BATCH, limit)

        def batches() -> Iterator[tuple[Arrays, Arrays]]:
            n = len(next(iter(inputs.values())))
            for start in range(0, n, size):
                part = {name: value[start : start + size] for name, value in inputs.items()}
                outputs = {f"torch/{k}": v for k, v in outputs_of(model, part, task.signature, size).items()}
                if unquantized:
                    before = outputs_of(unquantized[0], part, task.signature, size)
                    outputs |= {f"float/{k}": v for k, v in before.items()}
                yield {name: value.numpy() for name, value in part.items()}, outputs

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            arrays.write(place, batches(), environment.free_disk_bytes(place))
        return {**probed, "batch": size}

    meta, _ = cache.obtain(folder, fill)
    return folder, meta


def outputs_of(model: nn.Module, inputs: Tensors, signature: Signature, size: int) -> dict[str, Any]:
    """A torch model's outputs as arrays; a short batch is filled up to ``size`` by repeating its examples.

    Raises
    ------
    NotFinite
        If an output is NaN or infinite.
    """
    import torch

    n = len(next(iter(inputs.values())))
    filled = {name: value[torch.arange(max(n, size)) % n] for name, value in inputs.items()} if n < size else inputs
    with evaluating(model):
        outputs = call(model, filled, signature)
    for name, value in outputs.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise NotFinite(
                f"The model's output {name!r} holds NaN or infinity on examples that are no test examples, so nothing "
                "about it is measured."
            )
    return {name: value[:n].numpy() for name, value in outputs.items()}


def _probe(model: nn.Module, inputs: Tensors, signature: Signature) -> dict[str, Any]:
    """What some calls show about a model's outputs; see :func:`reference`."""
    import torch

    available = len(next(iter(inputs.values())))
    small = signature.batch or min(2, available)

    def answers(size: int) -> list[dict[str, Tensor]]:
        part = {name: value[:size] for name, value in inputs.items()}
        found = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            found.append({name: value.clone() for name, value in call(model, part, signature).items()})
        return found

    with evaluating(model), torch.random.fork_rng(devices=[]):
        pairs = [answers(small)]
        output_bytes = sum(value.numel() * value.element_size() for value in pairs[0][0].values()) // small
        more = min(_PROBED, available, OUTPUT_BYTES // max(1, output_bytes))
        if more > small and signature.batch is None and not _changes(pairs[0]):
            pairs.append(answers(more))  # what is rare, such as skipped layers, shows in more examples only
    random = any(map(_changes, pairs))
    alone, together = pairs[0][0], pairs[-1][0]
    mixing = not random and any(_differ(value, together[name][:small], _MIXED) for name, value in alone.items())
    return {"random": random, "mixing": mixing, "output_bytes": output_bytes}


def _changes(pair: Sequence[Tensors]) -> bool:
    return any(_differ(value, pair[1][name]) for name, value in pair[0].items())


def mixing_layers(model: nn.Module) -> list[str]:
    """Names of normalisation layers that use the statistics of the batch in evaluation."""
    from torch.nn.modules.batchnorm import _BatchNorm

    return [
        name for name, layer in model.named_modules() if isinstance(layer, _BatchNorm) and layer.running_mean is None
    ]


def _differ(a: Tensor, b: Tensor, tolerance: float = _NOISE) -> bool:
    if a.shape != b.shape:
        return True
    x, y = a.double(), b.double()
    return bool(((x - y).abs() > tolerance * x.abs().amax().clamp(min=1e-30)).any()) if x.numel() else False


def test_set(work: Work) -> tuple[Path, str]:
    """The test set as arrays on disk for the measuring process, which has no torch, and its identity.

    Raises
    ------
    Unavailable
        With the reason, where the task has none.
    InputError
        If it has another number of examples than it says.
    """
    task = work.task
    test = task.test()
    key = ["test", work.cell.task, test.identity, source_hash(type(task).__module__, "harness.arrays")]
    folder = paths.cache("data", digest(key))

    def named() -> Iterator[tuple[Arrays, Arrays]]:
        batch: Batch
        for batch in test.batches(256):
            yield (
                {port.name: batch.inputs[port.name].numpy() for port in task.signature.inputs},
                {name: value.numpy() for name, value in batch.targets.items()},
            )

    def fill(place: Path) -> dict[str, Any]:
        n = arrays.write(place, named(), environment.free_disk_bytes(place))
        if n != test.size:
            raise InputError(f"The task's test set has {n} examples; it said {test.size}.")
        return {"n": n}

    cache.obtain(folder, fill)
    return folder, test.identity
