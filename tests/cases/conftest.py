from __future__ import annotations

import pytest

from harness import modelfile


@pytest.fixture(autouse=True)
def _trust(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored models may name the packages of their classes; the environment is as before afterwards."""
    monkeypatch.setenv(modelfile.TRUST_VARIABLE, "tests")
