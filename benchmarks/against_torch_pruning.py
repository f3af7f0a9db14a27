"""Assay's structured pruning and Torch-Pruning's: same checkpoint, same budget of MACs, same fine-tuning.

ResNet-20 on Fashion-MNIST. Both rank channels globally by the l2 norm over the group of coupled layers, divided by the
group's mean: Assay with ``structured`` (criterion "l2"; once to single channels as Torch-Pruning does, once to
multiples of 16 as by default), Torch-Pruning with its BasePruner (the one that MagnitudePruner is a name of),
GroupMagnitudeImportance and global pruning, in small steps until the budget is met. Then the statistics of batch
normalisations are estimated anew and the networks fine-tuned, alike for all. The dense network gets the same
fine-tuning as a control. Accuracy is on the 10,000 test images, with a 95 % interval of about half a point either way.

Measured with ``--epochs 2 --lr-scale 0.3`` on one core of a 2-core x86 server CPU with AVX-512::

    network                         MACs  params  pruned  recalibrated  fine-tuned
    dense                         100.0%  100.0%   93.67         93.72       93.89
    Assay                          50.0%   57.8%   23.40         84.06       93.32
    Assay, multiples of 16         48.7%   67.6%   14.02         73.90       93.31
    Torch-Pruning 1.6.0            49.2%   70.2%   11.15         65.60       92.74

Torch-Pruning is needed here only: ``pip install torch-pruning``.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from pathlib import Path
from typing import Any

import torch
from torch import nn

from harness import cache, environment, modelfile, paths
from harness.contracts import Context, Signature, Task, Training
from harness.jobs import PrepareJob
from harness.measure import counts
from harness.prepare import prepare
from harness.spec import Spec, build
from harness.training import SGDTrainer, evaluate
from methods.pruning.structure.recalibration import recalibrate
from methods.pruning.structured import Structured

TASK = "fashion-mnist/resnet20"


class Shown:
    """Progress on the terminal."""

    def __call__(self, fraction: float, message: str) -> None:
        print(f"\r{fraction:4.0%} {message:70.70}", end="")

    def step(self, name: str) -> None:
        print(f"\r     {name:70.70}", end="")


def checkpoint(seed: int) -> Path:
    """The task's baseline, from the cache, or trained into it."""
    (cell,) = Spec(task=TASK, hardware="torch", seed=seed).cells()
    made = prepare(PrepareJob(cell=cell, not_before=0.0), Shown())
    print()
    for folder in paths.cache("models").iterdir():
        meta = cache.lookup(folder)
        if meta is not None and meta.get("sha256") == made.identity[0]:
            return folder / "model.pt"
    raise SystemExit(f"the baseline is not in {paths.cache('models')}")


def by_assay(model: nn.Module, context: Context, ratio: float, round_to: int) -> nn.Module:
    method = Structured(ratio=ratio, target="macs", criterion="l2", round_to=round_to, recalibrate=False)
    return method.compress(model, context)


def by_torch_pruning(model: nn.Module, example: torch.Tensor, signature: Signature, ratio: float) -> nn.Module:
    import torch_pruning as tp

    smaller = copy.deepcopy(model)
    inputs = {signature.inputs[0].name: example}
    goal = (1 - ratio) * counts.macs(model, inputs, signature)
    pruner = tp.pruner.BasePruner(
        smaller,
        example,
        importance=tp.importance.GroupMagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=1.0,
        max_pruning_ratio=0.95,
        iterative_steps=400,
        ignored_layers=[smaller.fc],
    )
    while counts.macs(smaller, inputs, signature) > goal:
        pruner.step()
        if pruner.current_step >= 400:
            raise SystemExit("Torch-Pruning does not reach the budget")
    smaller.zero_grad(set_to_none=True)
    for parameter in smaller.parameters():
        parameter.requires_grad_(True)
    return smaller.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--checkpoint", type=Path, help="a model file of the task (default: the cached baseline)")
    parser.add_argument("--epochs", type=int, default=4, help="of fine-tuning; 0 for none")
    parser.add_argument("--lr-scale", type=float, default=0.5, help="peak learning rate, as a share of the recipe's")
    parser.add_argument("--ratio", type=float, default=0.5, help="share of multiply-accumulates to remove")
    parser.add_argument("--seeds", type=int, default=1, help="fine-tunings of each network")
    options = parser.parse_args()
    try:
        import torch_pruning
    except ImportError:
        raise SystemExit("This benchmark compares with Torch-Pruning: pip install torch-pruning") from None
    torch.set_num_threads(environment.cores())
    task: Task = build("task", {"name": TASK})
    if reason := task.unavailable():
        raise SystemExit(reason)
    data, recipe, test, signature = task.data(), task.recipe(), task.test(), task.signature
    assert recipe is not None
    model = modelfile.load(options.checkpoint or checkpoint(0)).eval()
    (port,) = signature.inputs
    inputs = {port.name: torch.zeros(2, *(int(size) for size in port.shape))}

    def trainer(seed: int) -> SGDTrainer:
        return SGDTrainer(data=data, loss=task.loss, signature=signature, seed=seed, threads=environment.cores())

    context = Context(
        signature=signature, data=data, loss=task.loss, metrics=task.metrics, original=lambda: copy.deepcopy(model),
        training=Training(recipe=recipe, fit=trainer(0)), seed=0, scratch=Path(),
    )  # fmt: skip
    networks: dict[str, nn.Module] = {
        "dense": model,
        "Assay": by_assay(model, context, options.ratio, 1),
        "Assay, multiples of 16": by_assay(model, context, options.ratio, 16),
        f"Torch-Pruning {torch_pruning.__version__}": by_torch_pruning(
            model, inputs[port.name], signature, options.ratio
        ),
    }

    def accuracy(subject: nn.Module) -> float:
        return 100 * evaluate(subject, test.batches(500), signature, task.metrics)[task.metrics[0].name]

    macs, params = counts.macs(model, inputs, signature), counts.parameters(model)[0]
    print(f"{'network':28} {'MACs':>7} {'params':>7} {'pruned':>7} {'recalibrated':>13} {'fine-tuned':>11}")
    for name, pruned in networks.items():
        ready = copy.deepcopy(pruned)
        before = accuracy(ready)
        recalibrate(ready, context)
        after: list[float] = []
        for seed in range(options.seeds if options.epochs else 0):
            tuned: Any = copy.deepcopy(ready)
            trainer(seed)(tuned, recipe.finetune(options.epochs, options.lr_scale))
            after.append(accuracy(tuned))
        spread = f" ± {statistics.stdev(after):.2f}" if len(after) > 1 else ""
        left, kept = counts.macs(pruned, inputs, signature) / macs, counts.parameters(pruned)[0] / params
        print(
            f"{name:28} {left:7.1%} {kept:7.1%} "
            f"{before:7.2f} {accuracy(ready):13.2f} {f'{statistics.mean(after):.2f}' if after else '-':>11}{spread}",
            flush=True,
        )
    print(f"{options.epochs} epochs at {options.lr_scale:g} of the learning rate, {options.seeds} seeds")
    print(environment.machine()["cpu_model"], environment.conditions())


if __name__ == "__main__":
    main()
