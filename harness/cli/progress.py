"""What a sweep does, on standard error while it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from harness.text import printable

if TYPE_CHECKING:
    from harness.runner import Event


class ProgressBar:
    """A live bar on a terminal; a line per cell elsewhere."""

    def __init__(self, quiet: bool) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._console = Console(stderr=True, highlight=False)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("elapsed"),
            TimeElapsedColumn(),
            TextColumn("remaining"),
            # Cells take minutes: a short window of samples would never show an estimate.
            TimeRemainingColumn(),
            console=self._console,
            disable=quiet or not self._console.is_terminal,
            speed_estimate_period=3600,
        )
        self._quiet = quiet
        self._job: Any = None

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def watch(self, event: Event) -> None:
        """Show an event."""
        from rich.markup import escape

        if self._job is None:
            self._job = self._bar.add_task("", total=event.total)
        cell = event.cell
        name = printable(f"{cell.task_name} · {cell.method} · {cell.hardware['name']} · batch {cell.batch_size}")
        if event.kind == "done" and event.record is not None and not self._quiet:
            reason = f": {printable(event.record.reason)}" if event.record.reason else ""
            self._console.print(
                f"[{event.index + 1}/{event.total}] {name}: {event.record.status}{reason}", markup=False
            )
        self._bar.update(
            self._job,
            completed=event.index + (1.0 if event.kind in ("done", "kept") else event.fraction),
            description=escape(f"{name}  {printable(event.message)}"),
        )
