"""The user's loaders: a function that returns them."""

from __future__ import annotations

from dataclasses import dataclass

from harness.tasks.given import loaders
from harness.tasks.sets import Loaded, Wanted
from harness.text import shown
from harness.usercode import blamed, find


@dataclass(frozen=True)
class Own:
    """``module:function``, which returns a mapping of loaders."""

    target: str

    def unavailable(self) -> str | None:
        """None: what the function lacks, it says itself when it is called."""
        return None

    def load(self, wanted: Wanted) -> Loaded:  # noqa: ARG002 - the function knows its model
        """What the function returns."""
        where = f"The data {shown(self.target)}"
        function = find(self.target)
        with blamed(where):
            found = function()
        parts, notes = loaders(found, where)
        return Loaded(parts=parts, notes=notes)
