"""Training: a recipe is data, and one trainer carries it out, the same bytes for the same seed and threads.

Heavy imports happen inside functions, so that recipes can be read without torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from harness.contracts import Step
from harness.errors import NotFinite

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from harness.contracts import Data


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a model is trained.

    Parameters
    ----------
    epochs : int
        Passes over the training data.
    batch_size : int
        Examples per step.
    lr : float
        Peak learning rate.
    optimizer : {"sgd", "adam", "adamw"}
        Adam and AdamW with their usual betas.
    momentum : float
        Of SGD.
    nesterov : bool
        Whether SGD's momentum is Nesterov's.
    weight_decay : float
        L2 (SGD, Adam) or decoupled (AdamW) decay; not applied to biases and normalisation parameters.
    schedule : {"onecycle", "cosine", "constant"}
        Per-step schedule; "onecycle" warms up linearly over the first 20 % of steps, then decays linearly to 0.
    label_smoothing : float
        Of the cross-entropy.
    augment : bool
        Whether the task's training augmentation is on.
    """

    epochs: int
    batch_size: int = 128
    lr: float = 0.1
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    schedule: Literal["onecycle", "cosine", "constant"] = "onecycle"
    label_smoothing: float = 0.0
    augment: bool = True

    def finetune(self, epochs: int, lr_scale: float = 0.1) -> Recipe:
        """The same recipe for ``epochs`` at ``lr * lr_scale``, cosine (Han et al. 2015, §3.2: retrain at lr/10)."""
        return replace(self, epochs=epochs, lr=self.lr * lr_scale, schedule="cosine")


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


def evaluate(model: nn.Module, batches: Iterable[tuple[Any, Any]]) -> tuple[int, int]:
    """Count correct top-1 predictions, in eval mode; the model's mode is restored.

    Parameters
    ----------
    model : nn.Module
        Maps inputs (n, ...) to logits (n, classes).
    batches : iterable
        (inputs, labels) as tensors or NumPy arrays.

    Returns
    -------
    correct, n : int
        Correct predictions, and examples seen.

    Raises
    ------
    NotFinite
        If an output is NaN or infinite.
    """
    import torch

    training = model.training
    model.eval()
    correct = n = 0
    try:
        with torch.inference_mode():
            for x, y in batches:
                logits = model(torch.as_tensor(x))
                if not bool(torch.isfinite(logits).all()):
                    raise NotFinite(
                        f"The model's outputs hold NaN or infinity (examples {n} to {n + len(logits) - 1})."
                    )
                correct += int((logits.argmax(1) == torch.as_tensor(y)).sum())
                n += len(logits)
    finally:
        model.train(training)
    return correct, n


@dataclass(frozen=True, kw_only=True)
class SGDTrainer:
    """Trains by minibatch gradient descent (SGD or AdamW); see :class:`harness.contracts.Trainer`.

    The same seed and thread count on the same machine give the same weights, bit for bit. Random layers such as dropout
    draw from ``seed``, and the caller's random state, thread count and determinism settings are restored.

    Training runs in float32 with channels-last images. For ResNet-20 on a 2-core x86 server CPU with AVX-512 that took
    about 30 % less time than the default layout, and bfloat16 autocast was not reliably faster than float32.

    Parameters
    ----------
    data : Data
        Gives training and validation batches.
    seed : int
        Of data order, augmentation and random layers.
    threads : int
        Of torch.
    progress : callable
        ``progress(fraction, message)``.
    """

    data: Data
    seed: int
    threads: int = 1
    progress: Callable[[float, str], None] = lambda fraction, message: None

    def __call__(
        self,
        model: nn.Module,
        recipe: Recipe,
        *,
        after_step: Callable[[Step], None] | None = None,
        loss: Callable[[nn.Module, Tensor, Tensor], Tensor] | None = None,
    ) -> Mapping[str, float]:
        """Train ``model`` in place and leave it in eval mode.

        Parameters
        ----------
        model : nn.Module
            Trained where it is; parameters with ``requires_grad`` False stay.
        recipe : Recipe
            How.
        after_step : callable, optional
            Called after every optimizer step, gradients off.
        loss : callable, optional
            ``loss(model, inputs, labels)``, instead of the cross-entropy of the model's outputs.

        Returns
        -------
        mapping
            ``train_loss``, the mean over the last epoch, and ``validation_accuracy`` in [0, 1]; each only where there
            is one.

        Raises
        ------
        NotFinite
            If the loss becomes NaN or infinite; the message names the epoch.
        """
        import torch

        metrics: dict[str, float] = {}
        per_epoch = math.ceil(self.data.train_size / recipe.batch_size)
        steps = recipe.epochs * per_epoch
        objective = loss or cross_entropy(recipe.label_smoothing)
        with _reproducible(self.seed, self.threads):
            model.to(memory_format=torch.channels_last)
            model.train()
            optimizer = _optimizer(model, recipe)
            step = 0
            for epoch in range(recipe.epochs):
                total = 0.0
                batches = self.data.train(recipe.batch_size, seed=_epoch_seed(self.seed, epoch), augment=recipe.augment)
                for x, y in batches:
                    for group in optimizer.param_groups:
                        group["lr"] = learning_rate(recipe, step, steps)
                    optimizer.zero_grad(set_to_none=True)
                    value = objective(model, _channels_last(x), y)
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
                    total += current * len(y)
                    step += 1
                    if step % 20 == 0:
                        self.progress(min(1.0, step / steps), f"epoch {epoch + 1}/{recipe.epochs}, loss {current:.3f}")
                metrics["train_loss"] = total / self.data.train_size
            model.eval()
            if self.data.validation_size:
                correct, n = evaluate(model, self.data.validation(500))
                metrics["validation_accuracy"] = correct / n
            model.to(memory_format=torch.contiguous_format)
        self.progress(1.0, ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in metrics.items()))
        return metrics


def cross_entropy(label_smoothing: float) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """The trainer's own loss, for a method that adds a penalty to it: mean cross-entropy of ``model(x)`` in nats."""
    from torch.nn import functional as F

    return lambda model, x, y: F.cross_entropy(model(x), y, label_smoothing=label_smoothing)


def _channels_last(x: Tensor) -> Tensor:
    import torch

    return x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x


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
