"""The one timing loop that every runtime is measured with."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Samples of one loop.

    Parameters
    ----------
    latency_ns : list of int
        Every timed query in order: wall-clock nanoseconds around call and synchronize.
    warmup_queries : int
        Untimed queries before them.
    wall_s : float
        Length of the timed loop, clock reading included.
    complete : bool
        False where ``max_seconds`` ended the loop before ``min_queries`` were reached.
    """

    latency_ns: list[int]
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
    call: Callable[[], None],
    synchronize: Callable[[], None],
    *,
    min_queries: int,
    min_seconds: float,
    max_seconds: float,
    warmup_queries: int = 0,
    warmup_seconds: float = 0.0,
    on_start: Callable[[], None] | None = None,
) -> Timing:
    """Time ``call(); synchronize()`` until a minimum count AND a minimum time are reached.

    Parameters
    ----------
    call, synchronize : callable
        One inference; waiting for the device.
    min_queries, min_seconds : int, float
        Both must be reached ...
    max_seconds : float
        ... unless this is.
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
    warmed, until = 0, clock() + int(warmup_seconds * 1e9)
    while warmed < warmup_queries or clock() < until:
        call()
        synchronize()
        warmed += 1
    samples: list[int] = []
    append = samples.append
    enough_ns, at_most_ns = int(min_seconds * 1e9), int(max_seconds * 1e9)
    with _no_garbage_collection():
        if on_start:
            on_start()
        begin = clock()
        while True:
            t0 = clock()
            call()
            synchronize()
            t1 = clock()
            append(t1 - t0)
            elapsed = t1 - begin
            if elapsed >= enough_ns and (len(samples) >= min_queries or elapsed >= at_most_ns):
                break
    return Timing(
        latency_ns=samples,
        warmup_queries=warmed,
        wall_s=elapsed / 1e9,
        complete=len(samples) >= min_queries,
    )
