"""What a user's function returns, taken as far as the runtimes without a process of its own."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from harness import chain, modelfile, registry
from harness.contracts import Context, Hardware, Training
from harness.reference import outputs_of
from harness.tasks import user
from harness.tasks.assembled import Assembled
from harness.tasks.assembly import Assembly
from harness.tasks.given import parse
from harness.training import SGDTrainer

if TYPE_CHECKING:
    from harness.contracts import Arrays

WHERE = "Task 'mine:make'"
PARTS = ("train", "validation", "test")


@dataclass(frozen=True)
class Given(Assembled):
    """A task of what a function returned."""

    result: Any
    found: list[Assembly] = field(default_factory=list)

    def _assembly(self) -> Assembly:
        if not self.found:
            self.found.append(user.assemble(parse(self.result, WHERE), WHERE, {}))
        return self.found[0]

    def said(self) -> str:
        """All notes."""
        return " ".join(self.notes())


def answered(model: nn.Module, *inputs: torch.Tensor) -> Given:
    """A model with these inputs, whose labels are its own answers."""
    model.eval()
    with torch.no_grad():
        y = model(*inputs).argmax(1)
    return Given((model, {part: [(*inputs, y)] for part in PARTS}))


def drawn(model: nn.Module, *shape: int, n: int = 40) -> Given:
    """The same with normal inputs."""
    return answered(model, torch.randn(n, *shape, generator=torch.Generator().manual_seed(5)))


def labelled(model: nn.Module, x: torch.Tensor, y: Any, **more: Any) -> Given:
    """A model with these inputs and labels."""
    return Given({"model": model, "data": {part: [(x, y)] for part in PARTS}, **more})


def compressed(task: Given, name: str, **parameters: Any) -> tuple[nn.Module, str]:
    """What a method makes of a task's model, and its warnings."""
    warnings: list[str] = []
    finetuning = task.finetuning()
    trainer = SGDTrainer(data=task.data(), signature=task.signature, loss=task.loss, metrics=task.metrics, seed=0)
    with tempfile.TemporaryDirectory() as scratch:
        context = Context(
            signature=task.signature,
            data=task.data(),
            loss=task.loss,
            metrics=task.metrics,
            training=Training(recipe=finetuning, fit=trainer) if finetuning else None,
            original=lambda: task.model(0),
            seed=0,
            scratch=Path(scratch),
            warn=warnings.append,
        )
        return registry.create("method", name, parameters).compress(task.model(0), context), " ".join(warnings)


def deployed(
    task: Given, folder: Path, model: nn.Module | None = None, hardware: str = "onnxruntime"
) -> tuple[float, dict[str, Any]]:
    """Store a model, build it, run it on the first examples: (largest difference to torch, settings in effect)."""
    runtime: Hardware = registry.create("hardware", hardware, {})
    signature = task.signature
    model = task.model(0) if model is None else model
    chain.trust(model)
    kept = modelfile.load(modelfile.save(model, folder / "model.pt")).eval()
    batch = next(iter(task.test().batches(signature.batch or 8)))
    inputs = {port.name: batch.inputs[port.name] for port in signature.inputs}
    expected = outputs_of(model.eval(), inputs, signature, signature.batch or 1)
    example = {name: value[: signature.batch or 2] for name, value in inputs.items()}
    arrays: Arrays = {name: value.numpy() for name, value in inputs.items()}
    artifact = runtime.build(kept, signature, example, folder / hardware)
    loaded = runtime.load(artifact, signature=signature, inputs=arrays, threads=1)
    try:
        loaded.bind(arrays)
        loaded("forward")
        loaded.synchronize()
        found, effective = loaded.fetch(), dict(loaded.effective)
    finally:
        loaded.close()
    assert found.keys() == expected.keys()
    return max(float(np.abs(found[k].astype(float) - expected[k].astype(float)).max()) for k in expected), effective
