"""The one timing loop that every runtime is measured with."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

MOST_SAMPLES = 2**20
"""A loop ends here although its time is not over: a record keeps every sample, and a million tell all there is."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Samples of one loop.

    Parameters
    ----------
    latency_ns : dict of str to list of int
        By phase, every timed call in order: wall-clock nanoseconds around call and synchronize.
    queries : int
        Timed queries: passes through all phases.
    warmup_queries : int
        Untimed queries before them.
    wall_s : float
        Length of the timed loop, clock reading included.
    complete : bool
        False where ``max_seconds`` ended the loop before ``min_queries`` were reached.
    """

    latency_ns: dict[str, list[int]]
    queries: int
    warmup_queries: int
    wall_s: float
    complete: bool


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """A collection in the middle of a query is Python's time, not the runtime's."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def time_queries(
    call: Callable[[str], None],
    synchronize: Callable[[], None],
    *,
    min_queries: int,
    min_seconds: float,
    max_seconds: float,
    phases: Sequence[tuple[str, int]] = (("forward", 1),),
    warmup_queries: int = 0,
    warmup_seconds: float = 0.0,
    on_start: Callable[[], None] | None = None,
) -> Timing:
    """Time ``call(phase); synchronize()`` until a minimum count AND a minimum time are reached.

    Parameters
    ----------
    call, synchronize : callable
        One call of a phase; waiting for the device.
    min_queries, min_seconds : int, float
        Both must be reached ...
    max_seconds : float
        ... unless this is.
    phases : sequence of (str, int)
        What one query is: phases in order, each with its number of calls. Every call is a sample.
    warmup_queries, warmup_seconds : int, float
        Untimed queries first, both met.
    on_start : callable or None
        Called between warm-up and loop (opens an energy window).

    Returns
    -------
    Timing
        All samples; none is dropped as an outlier.
    """
    clock = time.perf_counter_ns
    names = [name for name, count in phases for _ in range(count)]
    warmed, until = 0, clock() + int(warmup_seconds * 1e9)
    while warmed < warmup_queries or clock() < until:
        for name in names:
            call(name)
            synchronize()
        warmed += 1
    samples: dict[str, list[int]] = {name: [] for name in names}
    plan = [(name, samples[name].append) for name in names]
    enough_ns, at_most_ns = int(min_seconds * 1e9), int(max_seconds * 1e9)
    queries, most = 0, max(1, MOST_SAMPLES // len(names))
    with _no_garbage_collection():
        if on_start:
            on_start()
        begin = clock()
        while True:
            for name, append in plan:
                t0 = clock()
                call(name)
                synchronize()
                t1 = clock()
                append(t1 - t0)
            queries += 1
            elapsed = t1 - begin
            if elapsed >= enough_ns and (queries >= min_queries or elapsed >= at_most_ns):
                break
            if queries >= most:
                break
    return Timing(
        latency_ns=samples,
        queries=queries,
        warmup_queries=warmed,
        wall_s=elapsed / 1e9,
        complete=queries >= min_queries,
    )
