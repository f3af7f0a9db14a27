"""The contract suite finds what breaks the contract."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from harness.calling import call
from harness.contracts import Context, Scheme, Signature
from harness.errors import DataError, Unsupported
from harness.testing import Coverage, check_hardware, check_method, check_task
from harness.testing.networks import NAMES, reference

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass(frozen=True, kw_only=True)
class Good:
    """A method that keeps the contract: it scales nothing."""

    factor: float = 1.0

    def compress(self, model: nn.Module, context: Context) -> nn.Module:
        return copy.deepcopy(model)


@dataclass(frozen=True, kw_only=True)
class Mutating(Good):
    """Works in place on the model given."""

    def compress(self, model: nn.Module, context: Context) -> nn.Module:
        result = copy.deepcopy(model)
        with torch.no_grad():
            next(model.parameters()).mul_(1.0 + 1e-6)
        return result


@dataclass(frozen=True, kw_only=True)
class Sharing(Good):
    """Returns new modules over the old memory."""

    def compress(self, model: nn.Module, context: Context) -> nn.Module:
        return nn.Sequential(model)


@dataclass(frozen=True, kw_only=True)
class Random(Good):
    """Forgets the seed."""

    def compress(self, model: nn.Module, context: Context) -> nn.Module:
        result = copy.deepcopy(model)
        with torch.no_grad():
            next(result.parameters()).add_(torch.randn(()) * 1e-3)
        return result


@dataclass(frozen=True, kw_only=True)
class NotANumber(Good):
    """Divides by zero."""

    def compress(self, model: nn.Module, context: Context) -> nn.Module:
        result = copy.deepcopy(model)
        with torch.no_grad():
            next(result.parameters()).fill_(torch.nan)
        return result


@dataclass(frozen=True, kw_only=True)
class Mute(Good):
    """Refuses without a reason."""

    def compress(self, model: nn.Module, context: Context) -> nn.Module:
        raise Unsupported("")


@dataclass(frozen=True, kw_only=True)
class Spoiling(Good):
    """Refuses once it has worked in place on the model given."""

    def compress(self, model: nn.Module, context: Context) -> nn.Module:
        with torch.no_grad():
            next(model.parameters()).mul_(1.0 + 1e-6)
        raise Unsupported("not today")


@dataclass(frozen=True, kw_only=True)
class Hooked(Good):
    """Leaves a hook, which no file holds."""

    def compress(self, model: nn.Module, context: Context) -> nn.Module:
        result = copy.deepcopy(model)
        result.fc1.register_forward_hook(lambda module, args, out: 2 * out)
        return result


@dataclass(frozen=True, kw_only=True)
class Promising(Good):
    """Promises more than it keeps."""

    def promises(self, original: nn.Module, compressed: nn.Module) -> Iterator[str]:
        yield f"{sum(p.numel() for p in compressed.parameters())} parameters are no fewer"
        yield f"{self.factor:g} is the factor"


@dataclass(frozen=True, kw_only=True)
class NoDefault(Good):
    """Has a parameter without a default."""

    required: int


@dataclass(kw_only=True)
class Thawed:
    """Is not frozen."""


HERE = __name__


@pytest.mark.parametrize(
    ("name", "clause"),
    [
        ("Mutating", "left untouched"),
        ("Sharing", "shares memory"),
        ("Random", "same seed gives the same bytes"),
        ("NotANumber", "outputs are finite"),
        ("Mute", "Unsupported says why"),
        ("Spoiling", "left untouched"),
        ("Promising", "5018 parameters are no fewer; 1 is the factor"),
        ("NoDefault", "'required' has a default"),
        ("Thawed", "is frozen"),
    ],
)
def test_a_broken_method_is_found(name: str, clause: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = reference("perceptron")
    before = copy.deepcopy(given.model.state_dict())
    try:
        with pytest.raises(AssertionError, match=clause):
            check_method(f"{HERE}:{name}", networks=["perceptron"], deploy=False)
    finally:
        given.model.load_state_dict(before)


def test_a_good_method_of_the_users_own_passes() -> None:
    assert check_method(f"{HERE}:Good", {"factor": 2.0}, deploy=False).ran == NAMES


def test_a_result_that_no_file_holds_is_found() -> None:
    with pytest.raises(DataError, match="hook"):
        check_method(f"{HERE}:Hooked", networks=["perceptron"], deploy=False)


def test_skipped_everywhere_is_a_failure() -> None:
    with pytest.raises(AssertionError, match=r"skipped everywhere: \{'all': 'no layer'\}"):
        Coverage(name="x", ran=(), skipped={"all": "no layer"}).require()


class _Answering:
    """An eager model behind the interface of a loaded artifact, with one fault."""

    def __init__(self, model: nn.Module, signature: Signature, fault: str) -> None:
        self.model, self.signature, self.fault = model, signature, fault
        self.out = np.zeros((0, 0), np.float32)
        self.inputs: dict[str, Tensor] = {}

    @property
    def effective(self) -> dict[str, Any]:
        values = {"precision": "f32", "threads": 1, "streams": 1, "provider": "test", "kernels": None}
        if self.fault == "keys":
            del values["streams"]
        return {**values, "threads": 2} if self.fault == "threads" else values

    def bind(self, inputs: Any) -> None:
        self.inputs = {name: torch.from_numpy(value) for name, value in inputs.items()}

    def __call__(self, phase: str = "forward") -> None:
        with torch.inference_mode():
            found = call(self.model, self.inputs, self.signature)["output"].numpy()
        if self.fault == "wrong":
            found = found + np.float32(1e-2)
        if self.fault == "view" and self.out.shape == found.shape:
            self.out[:] = found
        else:
            self.out = found

    def synchronize(self) -> None:
        pass

    def fetch(self) -> Any:
        return {"output": self.out if self.fault == "view" else self.out.copy()}

    def close(self) -> None:
        pass


@dataclass(frozen=True, kw_only=True)
class Faulty:
    """A runtime with a fault to be found."""

    packages: ClassVar[tuple[str, ...]] = ("torch",)
    fault: str = ""

    @property
    def scheme(self) -> Scheme:
        return Scheme()

    def unavailable(self) -> str | None:
        return "elsewhere" if self.fault == "absent" else None

    def build(
        self, model: nn.Module, signature: Signature, example: Any, folder: Path, phases: Any = ("forward",)
    ) -> Path:
        path = folder / "model.pt"
        torch.save(model.state_dict(), path)
        if self.fault == "bytes":
            path.write_bytes(path.read_bytes() + os.urandom(8))
        (folder / "kind").write_text(type(model).__name__)
        return path

    def load(self, artifact: Path, *, signature: Signature, inputs: Any, threads: int) -> _Answering:
        kind = (artifact.parent / "kind").read_text()
        (model,) = (reference(name).model for name in NAMES if type(reference(name).model).__name__ == kind)
        return _Answering(copy.deepcopy(model), signature, self.fault)


@pytest.mark.parametrize(
    ("fault", "clause"),
    [
        ("keys", "effective names 'streams'"),
        ("threads", "one thread was asked for, got 2"),
        ("wrong", "differ from float64 by 0.01"),
        ("view", "is a copy"),
        ("bytes", "bytes are reproducible"),
    ],
)
def test_a_broken_runtime_is_found(fault: str, clause: str) -> None:
    with pytest.raises(AssertionError, match=clause):
        check_hardware(f"{HERE}:Faulty", {"fault": fault}, networks=["perceptron"])


def test_a_good_runtime_passes_and_an_absent_one_says_so() -> None:
    assert check_hardware(f"{HERE}:Faulty").ran == NAMES
    assert check_hardware(f"{HERE}:Faulty", {"fault": "absent"}).skipped == {"this machine": "elsewhere"}


def test_a_task_with_test_examples_in_its_training_data_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from harness.tasks import digits

    training, validating, testing = digits._parts()
    monkeypatch.setattr(digits, "_parts", lambda: (training, validating, training.take(slice(0, 300))))
    with pytest.raises(AssertionError, match="300 of 300 test examples are training examples"):
        check_task("digits-cnn")
    assert len(testing) == 359


def run_plugin(folder: Path, text: str) -> str:
    (folder / "test_theirs.py").write_text(text)
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": root}
    command = [sys.executable, "-m", "pytest", "-p", "harness.testing", "-q", "-rA", "-c", os.devnull, "test_theirs.py"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def test_the_plugin_names_everything_and_imports_nothing_heavy(tmp_path: Path) -> None:
    said = run_plugin(
        tmp_path,
        "import sys\n"
        "def test_light(): assert not {'torch', 'numpy'} & set(sys.modules)\n"
        "def test_method(method_name): pass\n"
        "def test_hardware(hardware_name): pass\n"
        "def test_task(task_name): pass\n",
    )
    assert "failed" not in said, said
    for name in ("test_light", "test_method[magnitude]", "test_hardware[openvino]", "test_task[digits-cnn]"):
        assert f"PASSED test_theirs.py::{name}" in said, said


def test_another_projects_fixture_of_that_name_goes_first(tmp_path: Path) -> None:
    said = run_plugin(
        tmp_path,
        "import pytest\n"
        "@pytest.fixture\n"
        "def task_name(): return 'theirs'\n"
        "def test_fixture(task_name): assert task_name == 'theirs'\n"
        "@pytest.mark.parametrize('method_name,n', [('a', 1), ('b', 2)])\n"
        "def test_parameters(method_name, n): assert method_name in 'ab'\n",
    )
    assert "3 passed" in said, said
