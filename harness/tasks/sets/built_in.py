"""The built-in sets of images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from harness.tasks.sets import Loaded, Wanted

if TYPE_CHECKING:
    from harness.tasks.digits import Digits
    from harness.tasks.idx_images import IdxImages


@dataclass(frozen=True)
class BuiltIn:
    """Digits, Fashion-MNIST or MNIST, as the tasks of their names have them."""

    name: str

    def unavailable(self) -> str | None:
        """Why the files are not here, or None."""
        return self._task().unavailable()

    def load(self, wanted: Wanted) -> Loaded:  # noqa: ARG002 - images are what they are
        """All three parts."""
        task = self._task()
        return Loaded(parts={**task.data(), "test": task.test()})

    def _task(self) -> Digits | IdxImages:
        from harness.tasks.digits import Digits
        from harness.tasks.idx_images import IdxImages

        if self.name == "digits":
            return Digits()
        return IdxImages(dataset=self.name, architecture="resnet20")  # type: ignore[arg-type]
