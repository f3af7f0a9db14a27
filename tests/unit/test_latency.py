from __future__ import annotations

import gc
import time

import pytest

from harness.measure.latency import time_queries


def _nothing(*_: object) -> None:
    pass


def test_both_minima_are_met() -> None:
    by_time = time_queries(_nothing, _nothing, min_queries=1, min_seconds=0.05, max_seconds=5)
    assert by_time.wall_s >= 0.05
    by_count = time_queries(_nothing, _nothing, min_queries=5000, min_seconds=0.0, max_seconds=5)
    assert len(by_count.latency_ns["forward"]) >= 5000
    assert by_count.complete


def test_the_maximum_ends_a_slow_loop_and_says_so() -> None:
    timing = time_queries(lambda _: time.sleep(0.02), _nothing, min_queries=1000, min_seconds=0.0, max_seconds=0.1)
    assert not timing.complete
    assert 1 <= timing.queries == len(timing.latency_ns["forward"]) <= 6


def test_samples_are_nanoseconds_of_call_and_synchronize() -> None:
    timing = time_queries(
        lambda _: time.sleep(0.004), lambda: time.sleep(0.006), min_queries=3, min_seconds=0.0, max_seconds=5
    )
    # sleep never returns early, so the lower bound is exact; the upper is generous for a busy machine.
    assert all(10e6 <= sample < 1e9 for sample in timing.latency_ns["forward"])
    assert sum(timing.latency_ns["forward"]) / 1e9 <= timing.wall_s


def test_warm_up_is_not_timed_and_the_window_opens_after_it() -> None:
    calls: list[str] = []
    timing = time_queries(
        lambda _: calls.append("call"),
        _nothing,
        min_queries=5,
        min_seconds=0.0,
        max_seconds=5,
        warmup_queries=3,
        on_start=lambda: calls.append("start"),
    )
    assert timing.warmup_queries == 3
    assert calls.index("start") == 3
    assert calls.count("call") == 3 + timing.queries


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_collection_is_off_inside_and_restored(enabled: bool) -> None:
    states: list[bool] = []
    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        time_queries(lambda _: states.append(gc.isenabled()), _nothing, min_queries=3, min_seconds=0, max_seconds=1)
        assert gc.isenabled() is enabled
    finally:
        (gc.enable if before else gc.disable)()
    assert not any(states)


def test_every_call_of_every_phase_is_a_sample_in_order() -> None:
    calls: list[str] = []
    timing = time_queries(
        calls.append,
        _nothing,
        phases=(("prefill", 1), ("decode", 3)),
        min_queries=4,
        min_seconds=0.0,
        max_seconds=5,
        warmup_queries=2,
    )
    assert calls == ["prefill", "decode", "decode", "decode"] * (2 + timing.queries)
    assert len(timing.latency_ns["prefill"]) == timing.queries >= 4
    assert len(timing.latency_ns["decode"]) == 3 * timing.queries


def test_a_loop_of_endless_samples_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("harness.measure.latency.MOST_SAMPLES", 1000)
    timing = time_queries(
        _nothing, _nothing, phases=(("a", 1), ("b", 3)), min_queries=10, min_seconds=60.0, max_seconds=60.0
    )
    assert timing.queries == 250
    assert timing.complete
