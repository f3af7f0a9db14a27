from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.command import assay, spec


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ``ASSAY_HOME`` whose cache holds the digits baseline: training it once is enough for these tests."""
    home = tmp_path_factory.mktemp("trained") / "home"
    assay(home, "run", spec(home.parent))
    return home


@pytest.fixture
def home(trained: Path, tmp_path: Path) -> Path:
    """A fresh ``ASSAY_HOME`` with that cache and no database."""
    fresh = tmp_path / "home"
    fresh.mkdir()
    (fresh / "cache").symlink_to(trained / "cache")
    return fresh
