"""How the baselines of the built-in image tasks are trained.

Values only: a recipe's values are part of what identifies a task's results, so this file's text is not (see
:func:`harness.prepare.code_hash`), and changing one network's recipe leaves the others' trained models valid.
"""

from __future__ import annotations

from collections.abc import Mapping

from harness.contracts import Recipe

RECIPES: Mapping[str, Recipe] = {
    "lenet-300-100": Recipe(epochs=16, lr=0.1, weight_decay=5e-4, label_smoothing=0.1, augment=False),
    "lenet5-caffe": Recipe(epochs=8, lr=0.05, weight_decay=5e-4, augment=False),
    "vgg-small": Recipe(epochs=8, lr=0.2, weight_decay=5e-4),
    # The authors' setting, for 5,000 training examples (Mocanu et al. 2018); `epochs` of theirs are 400.
    "set-mlp": Recipe(
        epochs=100,
        batch_size=40,
        lr=0.05,
        nesterov=False,
        weight_decay=2e-4,
        schedule="constant",
        augment=False,
    ),
    "resnet20": Recipe(epochs=12, lr=0.2, weight_decay=5e-4, label_smoothing=0.05),
    "mobilenet-tiny": Recipe(epochs=5, lr=0.2, weight_decay=1e-4),
    "convnext-tiny-ish": Recipe(epochs=4, lr=4e-3, optimizer="adamw", weight_decay=0.05),
    "vit-tiny": Recipe(epochs=6, lr=2e-3, optimizer="adamw", weight_decay=0.05),
}
"""By network."""
