"""Training: a recipe is data, and one trainer carries it out, the same bytes for the same seed and threads.

Heavy imports happen inside functions, so that recipes can be read without torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from harness.calling import call, evaluating
from harness.contracts import Batch, Step
from harness.contracts import Recipe as Recipe  # users' own code imports it from here
from harness.errors import NotFinite

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from harness.contracts import Loss, Metric, Signature, Split, Tensors

_EVALUATION_BATCH = 500


def learning_rate(recipe: Recipe, step: int, steps: int) -> float:
    """Learning rate of one optimizer step.

    Parameters
    ----------
    recipe : Recipe
        Gives peak and schedule.
    step : int
        0 .. ``steps - 1``.
    steps : int
        Steps of the whole training.
    """
    if recipe.schedule == "constant":
        return recipe.lr
    if recipe.schedule == "cosine":
        return recipe.lr * 0.5 * (1.0 + math.cos(math.pi * step / steps))
    warm = max(1, round(0.2 * steps))
    if step < warm:
        return recipe.lr * (step + 1) / warm
    return recipe.lr * (steps - step) / (steps - warm)


def evaluate(
    model: nn.Module, batches: Iterable[Batch], signature: Signature, metrics: Sequence[Metric]
) -> dict[str, float]:
    """Score a torch model, in evaluation mode; every module's mode is restored.

    Parameters
    ----------
    model : nn.Module
    batches : iterable of Batch
        With targets.
    signature : Signature
    metrics : sequence of Metric

    Returns
    -------
    dict
        Metric name to value over all examples.

    Raises
    ------
    NotFinite
        If an output is NaN or infinite.
    """
    import numpy as np
    import torch

    scores: list[list[Any]] = [[] for _ in metrics]
    n = 0
    with evaluating(model):
        for batch in batches:
            outputs = {
                name: value[: len(batch)] for name, value in call(model, full(batch, signature), signature).items()
            }
            for name, value in outputs.items():
                if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                    raise NotFinite(
                        f"The model's output {name!r} holds NaN or infinity (examples {n} to {n + len(batch) - 1})."
                    )
            arrays = {name: value.numpy() for name, value in outputs.items()}
            targets = {name: value.numpy() for name, value in batch.targets.items()}
            for metric, kept in zip(metrics, scores, strict=True):
                kept.append(metric.score(arrays, targets))
            n += len(batch)
    return {
        metric.name: float(metric.value(np.concatenate(kept)))
        for metric, kept in zip(metrics, scores, strict=True)
        if kept
    }


@dataclass(frozen=True, kw_only=True)
class SGDTrainer:
    """Trains by minibatch gradient descent (SGD or AdamW); see :class:`harness.contracts.Trainer`.

    The same seed and thread count on the same machine give the same weights, bit for bit. Random layers such as dropout
    draw from ``seed``, and the caller's random state, thread count and determinism settings are restored.

    Training runs in float32 with channels-last images. For ResNet-20 on a 2-core x86 server CPU with AVX-512 that took
    about 30 % less time than the default layout, and bfloat16 autocast was not reliably faster than float32.

    Parameters
    ----------
    data : mapping
        "train", and "validation" where there is one.
    signature : Signature
        How the model is called.
    loss : Loss
        What is minimised.
    seed : int
        Seed of data order, augmentation and random layers.
    metrics : tuple of Metric
        What the trained model is scored by on "validation"; the first one counts.
    threads : int
        Threads of torch.
    progress : callable
        ``progress(fraction, message)``.
    say : callable
        ``say(sentence)``: what was done otherwise than asked.
    """

    data: Mapping[str, Split]
    signature: Signature
    loss: Loss
    seed: int
    metrics: tuple[Metric, ...] = ()
    threads: int = 1
    progress: Callable[[float, str], None] = lambda fraction, message: None
    say: Callable[[str], None] = lambda sentence: None

    def __call__(
        self,
        model: nn.Module,
        recipe: Recipe,
        *,
        after_step: Callable[[Step], None] | None = None,
        objective: Callable[[nn.Module, Batch], Tensor] | None = None,
    ) -> Mapping[str, float]:
        """Train ``model`` in place and leave it in evaluation mode.

        A last batch of a single example joins the batch before it, since BatchNorm cannot train on one; that is said.

        Parameters
        ----------
        model : nn.Module
            Trained where it is; parameters with ``requires_grad`` False stay.
        recipe : Recipe
            How.
        after_step : callable, optional
            Called after every optimizer step, gradients off.
        objective : callable, optional
            ``objective(model, batch)``, instead of the task's loss.

        Returns
        -------
        mapping
            ``train_loss``, the mean over the last epoch, and ``validation_NAME`` of the first metric (such as
            ``validation_accuracy``, in [0, 1]); each only where there is one.

        Raises
        ------
        NotFinite
            If the loss becomes NaN or infinite; the message names the epoch.
        """
        import torch

        metrics: dict[str, float] = {}
        train = self.data["train"]
        per_epoch = math.ceil(train.size / recipe.batch_size)
        if lone := train.size % recipe.batch_size == 1 and per_epoch > 1:
            per_epoch -= 1
            self.say(
                f"The last training batch would hold one example of {train.size} (batch size {recipe.batch_size}); it "
                "joins the batch before it."
            )
        steps = recipe.epochs * per_epoch
        minimised = objective or self._objective(recipe.label_smoothing)
        with _reproducible(self.seed, self.threads):
            model.to(memory_format=torch.channels_last)
            model.train()
            optimizer = _optimizer(model, recipe)
            step = 0
            for epoch in range(recipe.epochs):
                total = 0.0
                batches = train.batches(recipe.batch_size, seed=_epoch_seed(self.seed, epoch), augment=recipe.augment)
                for batch in _joined(batches) if lone else batches:
                    for group in optimizer.param_groups:
                        group["lr"] = learning_rate(recipe, step, steps)
                    optimizer.zero_grad(set_to_none=True)
                    value = minimised(model, replace(batch, inputs=_channels_last(batch.inputs)))
                    current = value.item()
                    if not math.isfinite(current):
                        raise NotFinite(
                            f"The training loss became {current} in epoch {epoch + 1} of {recipe.epochs} "
                            f"(step {step + 1} of {steps}): lower the recipe's lr ({recipe.lr})."
                        )
                    value.backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    if after_step is not None:
                        with torch.no_grad():
                            after_step(
                                Step(
                                    model=model,
                                    optimizer=optimizer,
                                    index=step,
                                    steps=steps,
                                    epoch=epoch,
                                    epoch_end=(step + 1) % per_epoch == 0,
                                )
                            )
                    total += current * len(batch)
                    step += 1
                    if step % 20 == 0:
                        self.progress(min(1.0, step / steps), f"epoch {epoch + 1}/{recipe.epochs}, loss {current:.3f}")
                metrics["train_loss"] = total / train.size
            model.eval()
            if "validation" in self.data and self.metrics:
                batches = self.data["validation"].batches(self.signature.batch or _EVALUATION_BATCH)
                scored = evaluate(model, batches, self.signature, self.metrics[:1])
                metrics |= {f"validation_{name}": value for name, value in scored.items()}
            model.to(memory_format=torch.contiguous_format)
        self.progress(1.0, ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in metrics.items()))
        return metrics

    def _objective(self, label_smoothing: float) -> Callable[[nn.Module, Batch], Tensor]:
        return lambda model, batch: self.loss(call(model, batch.inputs, self.signature), batch.targets, label_smoothing)


def full(batch: Batch, signature: Signature) -> Tensors:
    """A batch's inputs; where the model takes one size only, a short batch is filled up by repeating its examples."""
    import torch

    short = len(batch) < (signature.batch or 0)
    places = torch.arange(signature.batch or 0) % len(batch)
    return {name: value[places] for name, value in batch.inputs.items()} if short else batch.inputs


def _joined(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The batches with a last one of a single example joined to the one before it."""
    import torch

    held: Batch | None = None
    for batch in batches:
        if held is not None and len(batch) == 1:
            inputs = {name: torch.cat([value, batch.inputs[name]]) for name, value in held.inputs.items()}
            targets = {name: torch.cat([value, batch.targets[name]]) for name, value in held.targets.items()}
            held = replace(held, inputs=inputs, targets=targets)
            continue
        if held is not None:
            yield held
        held = batch
    if held is not None:
        yield held


def _channels_last(inputs: Tensors) -> dict[str, Tensor]:
    import torch

    return {
        name: value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value
        for name, value in inputs.items()
    }


def _epoch_seed(seed: int, epoch: int) -> int:
    """63 bits that differ for every (seed, epoch), so that no two seeds share an epoch's order."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{epoch}".encode()).digest()[:8]) >> 1


def _optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    import torch

    trainable = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": recipe.weight_decay},
        # Biases, and scales and shifts of normalisation layers.
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=recipe.lr)
    if recipe.optimizer == "adam":
        return torch.optim.Adam(groups, lr=recipe.lr)
    nesterov = recipe.nesterov and recipe.momentum > 0
    return torch.optim.SGD(groups, lr=recipe.lr, momentum=recipe.momentum, nesterov=nesterov)


@contextlib.contextmanager
def _reproducible(seed: int, threads: int) -> Iterator[None]:
    """Deterministic algorithms, a fixed thread count and a seeded generator, for a while."""
    import torch

    algorithms = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    before = torch.get_num_threads()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(_epoch_seed(seed, -1))
            torch.set_num_threads(threads)
            # Some user models have an operator without a deterministic form: they train, with torch's warning.
            torch.use_deterministic_algorithms(True, warn_only=True)
            # Filling every new tensor took a quarter of the training time; nothing here reads unwritten memory.
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
            yield
    finally:
        torch.set_num_threads(before)
        torch.use_deterministic_algorithms(algorithms, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
