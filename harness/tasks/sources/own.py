"""The user's function as a source: its model, with all that it returns beside it."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from harness.contracts import Recipe
from harness.tasks.sources import Made
from harness.text import shown
from harness.usercode import blamed, find


@dataclass(frozen=True)
class Own:
    """``module:function``."""

    target: str

    def unavailable(self) -> str | None:
        """None: what the function lacks, it says itself when it is called."""
        return None

    def recipe(self) -> Recipe | None:
        """The recipe that the function returns."""
        recipe: Recipe | None = self.make(0).given["recipe"]
        return recipe

    def make(self, seed: int) -> Made:  # noqa: ARG002 - the function decides about its own randomness
        """What the function returns."""
        from harness.tasks.given import parse

        where = f"Task {shown(self.target)}"
        function = find(self.target)
        with blamed(where):
            result = function()
        given = parse(result, where)
        return Made(
            model=given.model,
            given={field.name: getattr(given, field.name) for field in dataclasses.fields(given)},
        )
