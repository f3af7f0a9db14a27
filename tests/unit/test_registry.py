from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from harness import registry
from harness.errors import SpecError, UnknownName

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("kind", ["task", "method", "hardware", "metric", "storage"])
def test_every_registered_name_stands_for_a_class_of_its_kind(kind: registry.Kind) -> None:
    assert registry.table(kind)
    for name in registry.table(kind):
        registry.check_kind(kind, name, registry.resolve(kind, name))


def test_what_is_of_another_kind_is_refused() -> None:
    with pytest.raises(SpecError, match="is no hardware: the class has no unavailable"):
        registry.create("hardware", "methods.baseline:Baseline", {})
    with pytest.raises(SpecError, match="is no method: the class has no compress"):
        registry.create("method", "hardware.torch_cpu:Torch", {})
    with pytest.raises(UnknownName, match="Unknown method 'torch'"):
        registry.create("method", "torch", {})


def test_a_registered_name_with_a_colon_is_no_users(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = {"plug:in": registry.Entry("methods.baseline:Baseline", "of another distribution")}
    monkeypatch.setattr(registry, "table", lambda kind: entries)
    assert not registry.is_users("method", "plug:in")
    assert registry.is_users("method", "mine:Class")
    assert type(registry.create("method", "plug:in", {})).__name__ == "Baseline"


def test_a_file_that_hides_assays_own_package_is_named_and_not_run(tmp_path: Path) -> None:
    (tmp_path / "methods.py").write_text("raise SystemExit('the user's file was run')")
    program = "from harness import registry\nregistry.table('method')"
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{program}"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert f"Python finds 'methods' in {tmp_path / 'methods.py'}" in done.stderr
    assert "file was run" not in done.stderr
