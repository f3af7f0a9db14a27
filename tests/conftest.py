from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

# Small models on many threads spend their time waiting for one another, most of all on a busy machine.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@pytest.fixture(autouse=True, scope="session")
def _home(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests must never touch the user's own results, nor make the key that marks the user's model files."""
    os.environ["ASSAY_HOME"] = str(tmp_path_factory.mktemp("assay") / "home")
    os.environ["ASSAY_KEY_FILE"] = str(tmp_path_factory.mktemp("assay-key") / "key")
    # Sweeps take turns through a lock in the temporary folder: those of this process only, where several run the tests.
    os.environ["TMPDIR"] = str(tmp_path_factory.mktemp("tmp"))
    tempfile.tempdir = None


@pytest.fixture(autouse=True)
def _folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nor leave files where they were started."""
    monkeypatch.chdir(tmp_path)
