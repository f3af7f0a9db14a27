"""What a model file keeps, what it refuses, and that no file makes code run."""

from __future__ import annotations

import collections
import copy
import enum
import functools
import json
import math
import os
import random
import stat
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from harness import modelfile
from harness.canonical import file_sha256
from harness.errors import DataError, InputError, StoreError
from harness.modelfile import operators
from harness.modelfile.key import KEY_VARIABLE, key_file, make_key, mark
from harness.quantized import ActivationQuantizer
from harness.tasks.models import create

START = 48
"""Where the header begins: magic, mark and length are before it."""


@pytest.fixture(autouse=True)
def _own_key(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, str(tmp_path_factory.mktemp("state") / "assay" / "key"))
    monkeypatch.delenv(modelfile.TRUST_VARIABLE, raising=False)


Pair = collections.namedtuple("Pair", "left right")


class Colour(enum.Enum):
    RED = 1


@dataclass
class Settings:
    width: int
    names: list[str] = field(default_factory=list)


class Plain:
    """A configuration as users write it: no dataclass."""

    def __init__(self) -> None:
        self.depth = 3
        self.more = {"rate": 0.1}


class Tied(nn.Module):
    """Two layers with one weight, a constant, and attributes of many kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)
        self.b.weight = self.a.weight
        self.register_buffer("offset", torch.arange(4.0), persistent=False)
        self.make = functools.partial(nn.LayerNorm, eps=1e-3)
        self.norm_layer = nn.BatchNorm2d
        self.settings = {"shape": torch.Size([2, 3]), "cut": slice(0, 2), "limit": float("inf"), "kinds": {"x", "y"}}
        self.act = F.gelu
        self.tanh = functools.partial(F.gelu, approximate="tanh")

    def forward(self, x: Tensor) -> Tensor:
        offset: Any = self.offset
        result: Tensor = self.act(self.b(self.a(x)) + offset)
        return result


class Holder(nn.Module):
    """Holds what it is given."""

    def __init__(self, thing: Any) -> None:
        super().__init__()
        self.thing = thing

    def forward(self, x: Tensor) -> Tensor:
        return x


class Acting:
    """Would do something when it is deleted."""

    def __del__(self) -> None:
        return


def own_activation(x: Tensor) -> Tensor:
    return x * 2


def traced() -> fx.GraphModule:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stages = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
            self.gain = nn.Parameter(torch.tensor([2.0]))
            self.rounding = ActivationQuantizer(0.1, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = F.max_pool2d(self.rounding(self.stages(x)), 2)[:, :, 1:]
            y = torch.cat([y, y.permute(0, 1, 3, 2).reshape(y.size(0), 2, y.shape[2], -1)], dim=1) * self.gain
            y = (
                F.pad(y, (1, 1, 0, 0), mode="reflect")
                + torch.einsum("b c h w, c d -> b d h w", y, torch.eye(4))[..., :1]
            )
            return (y + 1.0).clamp(max=math.inf).flatten(1).mean(dim=1, dtype=torch.float32)

    torch.manual_seed(0)
    module = fx.symbolic_trace(Net().eval())
    module.meta["note"] = {"kept": ["a"]}
    return module


def round_trip(model: nn.Module, folder: Path, *inputs: Any, **named: Any) -> nn.Module:
    """Save and load; the outputs, the names, the flags and the bytes written again must be the same."""
    first = modelfile.save(model, folder / "first")
    again = modelfile.load(first, allow=("tests",))
    # Before they are called: some models keep what they compute.
    assert file_sha256(modelfile.save(again, folder / "second")) == file_sha256(first)
    assert type(again).__name__ == type(model).__name__
    with torch.no_grad():
        wanted, got = flat(model(*inputs, **named)), flat(again(*inputs, **named))
    assert len(wanted) == len(got) > 0
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))
    assert described(again) == described(model)
    return again


def flat(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in flat(part)]


def described(model: nn.Module) -> Any:
    return (
        [(name, type(module).__name__, module.training) for name, module in model.named_modules()],
        [(name, p.requires_grad, p.stride(), p.dtype) for name, p in model.named_parameters(remove_duplicate=False)],
        list(model.state_dict()),
    )


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: create("resnet20", 0), (2, 1, 28, 28)),
        (lambda: create("vit-tiny", 0), (2, 1, 28, 28)),
        (lambda: nn.LSTM(4, 5), (3, 4)),
        (lambda: nn.TransformerEncoderLayer(16, 2, batch_first=True), (2, 5, 16)),
        (traced, (2, 1, 14, 14)),
        (lambda: nn.Sequential(traced(), nn.Unflatten(0, (-1, 1)), nn.Linear(1, 3).to(torch.float32)), (2, 1, 14, 14)),
        (Tied, (2, 4)),
    ],
    ids=["resnet", "vit", "lstm", "transformer", "graph", "graph-inside", "tied"],
)
def test_what_is_loaded_is_the_same_function_and_saves_to_the_same_bytes(
    make: Callable[[], nn.Module], shape: tuple[int, ...], tmp_path: Path
) -> None:
    round_trip(make().eval(), tmp_path, torch.randn(shape))


def test_training_mode_and_frozen_parameters_survive(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3).eval(), nn.Linear(3, 3))
    model[1].bias.requires_grad_(False)
    round_trip(model, tmp_path, torch.ones(1, 3))


def test_attributes_of_many_kinds_survive(tmp_path: Path) -> None:
    things = {
        "pair": Pair(1, (2.5, None)),
        "colour": Colour.RED,
        "settings": Settings(3, ["a"]),
        "complex": 1 - 2j,
        "bytes": b"\x00\xff",
        "range": range(1, 9, 2),
        "frozen": frozenset({"b", "a"}),
        "queue": collections.deque([1, 2], maxlen=3),
        "ordered": collections.OrderedDict(b=1, a=2),
        "int keys": {1: "x", (2, "y"): None},
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "format": torch.channels_last,
        "number": np.float32(0.1),
        "surrogate": "\ud800é",
        "large": 2**80,
        "dots": ...,
        "size": torch.Size([1, 2]),
    }
    again = modelfile.load(modelfile.save(Holder(things), tmp_path / "m"), allow=("tests",)).thing
    assert again == things
    assert all(type(again[key]) is type(value) for key, value in things.items())
    assert again["queue"].maxlen == 3
    assert again["colour"] is Colour.RED


def test_arrays_plain_objects_and_functions_survive(tmp_path: Path) -> None:
    table, plain = np.arange(6, dtype=np.int16).reshape(2, 3), Plain()
    model = Holder([table, plain, own_activation, plain, np.array(2.5)])
    again = modelfile.load(modelfile.save(model, tmp_path / "m"), allow=("tests",)).thing
    assert np.array_equal(again[0], table)
    assert again[0].dtype == np.int16
    assert again[0].flags.writeable
    assert vars(again[1]) == vars(plain)
    assert again[1] is again[3]
    assert again[2] is own_activation
    assert again[4].shape == ()


def test_sharing_and_attributes_survive(tmp_path: Path) -> None:
    model = Tied()
    model.a.settings = model.settings  # type: ignore[assignment]
    model.children_again = [model.a, model]
    model.type = ["plain data may have a method's name"]  # type: ignore[method-assign,assignment]
    tied = modelfile.load(modelfile.save(model, tmp_path / "m"), allow=("tests",))
    assert tied.a.weight is tied.b.weight
    assert tied.training
    assert tied.act is F.gelu
    assert tied.norm_layer is nn.BatchNorm2d
    assert tied.make.func is nn.LayerNorm
    assert tied.tanh.keywords == {"approximate": "tanh"}
    assert tied.settings == model.settings
    assert tied.a.settings is tied.settings
    assert tied.children_again[0] is tied.a
    assert tied.children_again[1] is tied
    assert "offset" not in tied.state_dict()
    graph = modelfile.load(modelfile.save(traced(), tmp_path / "g"))
    assert graph.meta["note"] == {"kept": ["a"]}


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(3, 4, 5, 6).contiguous(memory_format=torch.channels_last),
        lambda: torch.randn(4, 5).t(),
        lambda: torch.randn(4, 1).expand(4, 5),
        lambda: torch.randn(0, 3),
        lambda: torch.tensor(2.5),
        lambda: torch.randn(3).to(torch.bfloat16),
        lambda: torch.randn(8).to(torch.float8_e4m3fn),
        lambda: torch.randn(3, dtype=torch.complex64).conj(),
        lambda: torch.tensor([True, False]),
        lambda: torch.arange(5).to(torch.uint16),
    ],
    ids=["channels-last", "transposed", "expanded", "empty", "scalar", "bf16", "fp8", "conjugate", "bool", "uint16"],
)
def test_tensors_keep_values_types_and_strides(make: Callable[[], Tensor], tmp_path: Path) -> None:
    tensor = make()
    again = modelfile.load(modelfile.save(Holder(tensor), tmp_path / "m"), allow=("tests",)).thing
    assert again.dtype == tensor.dtype
    assert again.shape == tensor.shape
    assert again.stride() == tensor.stride()
    same = again.resolve_conj().flatten().view(torch.uint8) == tensor.resolve_conj().flatten().view(torch.uint8)
    assert same.all() if tensor.ndim else again == tensor


def test_only_what_a_tensor_reaches_is_stored(tmp_path: Path) -> None:
    big = torch.randn(100_000, 4)
    model = Holder(big[::1000])
    path = modelfile.save(model, tmp_path / "m")
    assert path.stat().st_size < 5_000
    assert torch.equal(modelfile.load(path, allow=("tests",)).thing, big[::1000])
    holder = Holder(None)
    holder.register_buffer("q", torch.zeros(10_000, dtype=torch.int8))
    assert modelfile.save(holder, tmp_path / "m").stat().st_size < 12_000


def test_views_of_one_memory_stay_views(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    again = modelfile.load(modelfile.save(Holder([base, base[1], base.t()]), tmp_path / "m"), allow=("tests",)).thing
    again[1].fill_(-1)
    assert torch.equal(again[0][1], torch.full((4,), -1.0))
    assert torch.equal(again[2], again[0].t())


def test_equal_models_have_equal_files_in_two_processes(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from harness import modelfile; from tests.unit import test_modelfile as t; "
        "import torch; torch.manual_seed(3); "
        "m = torch.nn.Sequential(t.Tied(), t.traced(), t.Holder({'s': {'a', 'b', 'c', 'd'}, 'p': t.Plain()})); "
        "modelfile.save(m, pathlib.Path(sys.argv[1]))"
    )
    torch.manual_seed(3)
    here = nn.Sequential(Tied(), traced(), Holder({"s": {"a", "b", "c", "d"}, "p": Plain()}))
    modelfile.save(here, tmp_path / "here")
    path = os.pathsep.join(filter(None, sys.path))
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "there")], check=True, env=environment)
    assert (tmp_path / "here").read_bytes() == (tmp_path / "there").read_bytes()


# ---- what is not data


def hooked() -> nn.Module:
    model = nn.Linear(1, 1)
    model.register_forward_hook(lambda *_: None)
    return model


def hooked_tensor() -> nn.Module:
    model = nn.Linear(1, 1)
    model.weight.register_hook(lambda gradient: gradient)
    return model


def looped() -> nn.Module:
    outer, inner = Holder(None), Holder(None)
    outer.thing, inner.thing = inner, outer
    return outer


def local_class() -> nn.Module:
    class Local(nn.Module):
        pass

    return Local()


def replaced() -> nn.Module:
    model = Holder(None)
    model.half = torch.relu  # type: ignore[assignment,method-assign]
    return model


def bound() -> nn.Module:
    model = Holder(None)
    model.forward = model.extra_repr  # type: ignore[method-assign,assignment]
    return model


def pruned() -> nn.Module:
    model = nn.Linear(2, 2)
    prune.l1_unstructured(model, "weight", 0.5)
    return model


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Holder(lambda: 1), r"Holder\.thing .*lambda"),
        (lambda: Holder([1, {"key": object()}]), r"Holder\.thing\[1\]\.key is a builtins\.object"),
        (hooked, r"_forward_hooks holds a hook"),
        (hooked_tensor, r"Linear\.weight has a hook"),
        (looped, "refers back"),
        (local_class, r"Local.*cannot be found again"),
        (replaced, r"Holder\.half replaces a method"),
        (bound, r"Holder\.forward is the bound method"),
        (lambda: Holder(torch.load), r"thing is the function torch.serialization:load"),
        (lambda: Holder(os.system), r"thing is the function posix:system"),
        (lambda: Holder(Acting()), r"acts when it is deleted"),
        (lambda: Holder(subprocess.Popen), r"subprocess:Popen"),
        (lambda: Holder({nn.Linear(1, 1)}), r"a set that holds a Linear"),
        (lambda: Holder(torch.eye(2).to_sparse()), r"layout torch.sparse_coo"),
        (lambda: nn.LazyLinear(3), r"call the model once"),
        (pruned, r"_forward_pre_hooks holds a hook"),
        (lambda: Holder(open), r"thing is the function"),
        (lambda: Holder(iter([1])), r"thing is a builtins.list_iterator"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*lazy.*:UserWarning")
def test_what_is_not_data_is_refused_by_name(make: Callable[[], nn.Module], named: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=named):
        modelfile.save(make(), tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning")
def test_script_modules_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="TorchScript"):
        modelfile.save(torch.jit.trace(nn.Linear(1, 1), torch.ones(1, 1)), tmp_path / "m")


# ---- the mark


def split(path: Path) -> tuple[dict[str, Any], bytes]:
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[START - 8 : START])
    return json.loads(content[START : START + length]), content[START + length :]


def write(path: Path, header: Any, data: bytes = b"", *, signed: bool = True) -> Path:
    """A file with this header, marked with this machine's key: what no attacker can do, so that the rest is tried."""
    raw = json.dumps(header).encode()
    body = struct.pack("<Q", len(raw)) + raw + data
    key = make_key() if signed else b"another key"
    path.write_bytes(modelfile.MAGIC + mark(key, [modelfile.MAGIC, body]) + body)
    return path


def forge(path: Path, change: Callable[[dict[str, Any]], None], model: nn.Module) -> Path:
    header, data = split(modelfile.save(model, path))
    change(header)
    return write(path, header, data)


def test_a_changed_byte_anywhere_is_refused(tmp_path: Path) -> None:
    path = modelfile.save(nn.Linear(2, 2), tmp_path / "m")
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with pytest.raises(DataError, match=r"was not written by this machine|not a model file"):
            modelfile.load(path)
        assert not modelfile.is_ours(path)
    path.write_bytes(content)
    assert modelfile.is_ours(path)


def test_a_file_from_another_machine_is_refused_before_it_is_parsed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = modelfile.save(nn.Linear(2, 2), tmp_path / "m")
    monkeypatch.setenv(KEY_VARIABLE, str(tmp_path / "other"))
    monkeypatch.setattr(modelfile, "Reader", None)
    for _ in range(2):  # without a key, and with one
        with pytest.raises(DataError, match="was not written by this machine and user"):
            modelfile.load(path)
        make_key()
    with pytest.raises(DataError, match="was not written by this machine"):
        modelfile.load(write(tmp_path / "forged", {}, signed=False))


def test_the_key_is_the_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "deep" / "key"
    monkeypatch.setenv(KEY_VARIABLE, str(path))
    key = make_key()
    assert len(key) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert make_key() == key
    assert list(path.parent.iterdir()) == [path]
    path.chmod(0o644)
    with pytest.raises(DataError, match="chmod 600"):
        modelfile.save(nn.Linear(1, 1), tmp_path / "m")
    path.chmod(0o600)
    path.write_text("short\n")
    with pytest.raises(DataError, match="does not hold a key"):
        make_key()
    path.unlink()
    os.mkfifo(path, 0o600)
    with pytest.raises(DataError, match="not a regular file"):
        make_key()


def test_the_key_lies_in_the_state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEY_VARIABLE)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert key_file() == tmp_path / "assay" / "key"
    monkeypatch.setenv("XDG_STATE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert key_file() == tmp_path / "home" / ".local" / "state" / "assay" / "key"


def test_a_key_that_cannot_be_written_is_an_error_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(KEY_VARIABLE, str(tmp_path / "file" / "key"))
    with pytest.raises((StoreError, DataError), match=KEY_VARIABLE):
        modelfile.save(nn.Linear(1, 1), tmp_path / "m")


def test_those_that_start_together_make_one_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadPoolExecutor(8) as pool:
        for number in range(20):
            path = tmp_path / str(number) / "key"
            monkeypatch.setenv(KEY_VARIABLE, str(path))
            made = set(pool.map(lambda _: make_key(), range(8)))
            assert made == {bytes.fromhex(path.read_text())}
            assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("keep", [0, 4, 12, 100, -1])
def test_truncated_files_are_refused(keep: int, tmp_path: Path) -> None:
    path = modelfile.save(nn.Linear(20, 20), tmp_path / "m")
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(DataError, match=r"(?i)model file"):
        modelfile.load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="No such file"):
        modelfile.load(tmp_path / "absent")
    torch.save({"a": 1}, tmp_path / "pickle")
    with pytest.raises(DataError, match="not a model file"):
        modelfile.load(tmp_path / "pickle")
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(DataError, match="not a regular file"):
        modelfile.load(tmp_path / "fifo")
    with pytest.raises(DataError):
        modelfile.load(tmp_path)


# ---- attacks: what code ran from in files of the former kind. Every file here bears a right mark.

PARTS: dict[str, Any] = {
    "training": False,
    "_parameters": [],
    "_buffers": [],
    "_modules": [],
    "transient": [],
    "state": [],
}
IDENTITY = "torch.nn.modules.linear:Identity"
REGISTRY = "harness.registry:create"
X = ["placeholder", "x", "x", {"tuple": []}, []]


def out(name: str) -> list[Any]:
    return ["output", "output", "output", {"tuple": [{"node": name}]}, []]


def node(op: str, name: str, target: Any, *args: Any, keywords: Any = ()) -> list[Any]:
    return [op, name, target, {"tuple": list(args)}, list(keywords)]


def graph(*nodes: Any, **more: Any) -> dict[str, Any]:
    return {"kind": "graph", "name": "G", **PARTS, "meta": {"ref": 1}, "nodes": list(nodes), "nesting": None, **more}


def header(*objects: Any, classes: Any = (), functions: Any = ()) -> dict[str, Any]:
    empty = {"kind": "dict", "items": []}
    first, *rest = objects
    return {
        "classes": list(classes),
        "functions": list(functions),
        "objects": [first, empty, *rest],
        "tensors": [],
        "storages": [],
        "root": 0,
        "bytes": 0,
    }


def identity(*state: Any) -> dict[str, Any]:
    return {"kind": "module", "class": 0, **PARTS, "state": list(state)}


def command(marker: Path) -> str:
    return f"touch {marker}"


ATTACKS: dict[str, Callable[[str], dict[str, Any]]] = {
    "A: source through the repr of a module as a default": lambda run: header(
        graph(["placeholder", "x", "x", {"tuple": [{"ref": 2}]}, []], out("x")),
        identity(["_get_name", {"partial": [{"function": 0}, {"ref": 3}, {"ref": 1}]}]),
        {"kind": "list", "items": [f"__import__('os').system({run!r})", ""]},
        classes=[IDENTITY],
        functions=["operator:concat"],
    ),
    "A2: a partial of the registry in the place of _get_name": lambda run: header(
        identity(["_get_name", {"partial": [{"function": 0}, {"ref": 2}, {"ref": 1}]}]),
        {"kind": "list", "items": ["method", "subprocess:getoutput"]},
        classes=[IDENTITY],
        functions=[REGISTRY],
    ),
    "A3: a listed function in the place of _get_name": lambda run: header(
        identity(["_get_name", {"function": 0}]), classes=[IDENTITY], functions=["torch:abs"]
    ),
    "B: a graph that calls the registry": lambda run: header(
        graph(X, node("call_function", "y", REGISTRY, "method", "subprocess:getoutput"), out("y")),
    ),
    "C: eval is something else": lambda run: header(
        identity(["eval", {"partial": [{"function": 0}, {"ref": 2}, {"ref": 1}]}]),
        {"kind": "list", "items": []},
        classes=[IDENTITY],
        functions=["torch:zeros"],
    ),
    "C2: eval is a module": lambda run: header(
        identity(["eval", {"ref": 2}]), {"kind": "module", "class": 0, **PARTS}, classes=[IDENTITY]
    ),
    "C3: a module is a part of itself": lambda run: header(
        {"kind": "module", "class": 0, **PARTS, "_modules": [["loop", 0]]}, classes=[IDENTITY]
    ),
    "D: get_attr through dunders": lambda run: header(
        graph(
            X,
            node("get_attr", "g", "__class__.forward.__globals__"),
            node("call_function", "b", "operator:getitem", {"node": "g"}, "__builtins__"),
            node("call_function", "e", "operator:getitem", {"node": "b"}, "eval"),
            node("call_function", "y", "builtins:max", {"list": ["1"]}, keywords=[["key", {"node": "e"}]]),
            out("x"),
        ),
    ),
    "E: a hook": lambda run: header(
        identity(["_forward_pre_hooks", {"ref": 2}]),
        {"kind": "ordered", "items": [[0, {"partial": [{"function": 0}, {"ref": 3}, {"ref": 1}]}]]},
        {"kind": "list", "items": []},
        classes=[IDENTITY],
        functions=["torch:zeros"],
    ),
    "F: a class of harness.__main__": lambda run: header(
        {"kind": "module", "class": 0, **PARTS}, classes=["harness.__main__:X"]
    ),
    "F2: a class of the command line": lambda run: header(
        {"kind": "module", "class": 0, **PARTS}, classes=["harness.cli:main"]
    ),
    "G: call_module through dunders": lambda run: header(
        graph(X, node("call_module", "b", "__class__.forward.__globals__.get", "__builtins__"), out("b")),
    ),
    "H: source in a node's name": lambda run: header(
        graph(X, node("call_function", f"y=__import__('os').system({run!r})", "torch:abs", {"node": "x"}), out("x")),
    ),
    "I: source in a path": lambda run: header(
        graph(X, node("get_attr", "g", f'a"); __import__("os").system({run!r}); ("'), out("x")),
    ),
    "J: source in the names of inputs": lambda run: header(
        graph(
            X,
            out("x"),
            nesting={
                "arguments": [f"x=__import__('os').system({run!r})"],
                "inputs": ["tuple", None, [["tuple", None, ["leaf"]], ["dict", [], []]]],
                "outputs": "leaf",
            },
        ),
    ),
    "K: source in a name of a dict": lambda run: header(
        graph(
            X,
            out("x"),
            nesting={
                "arguments": ["x"],
                "inputs": [
                    "tuple",
                    None,
                    [["tuple", None, []], ["dict", [f"':__import__('os').system({run!r}),'"], ["leaf"]]],
                ],
                "outputs": "leaf",
            },
        ),
    ),
    "L: an operator that reads a file": lambda run: header(
        graph(X, node("call_function", "y", "aten:from_file.default", "/etc/passwd", False, 4), out("y")),
    ),
    "M: an object whose class acts when it is deleted": lambda run: header(
        identity(["thing", {"ref": 2}]),
        {"kind": "object", "class": 1, "state": []},
        classes=[IDENTITY, "tests.unit.test_modelfile:Acting"],
    ),
    "N: the class of an object is a function": lambda run: header(
        identity(["thing", {"ref": 2}]),
        {"kind": "object", "class": 1, "state": []},
        classes=[IDENTITY, "tests.unit.test_modelfile:own_activation"],
    ),
    "O: a partial of what the file holds": lambda run: header(
        identity(["thing", {"partial": [{"ref": 2}, {"ref": 3}, {"ref": 1}]}]),
        identity(),
        {"kind": "list", "items": []},
        classes=[IDENTITY],
    ),
    "Q: a default that reads": lambda run: header(
        graph(X, ["placeholder", "y", "y", {"tuple": [{"node": "x"}]}, []], out("x"))
    ),
    "R: a method of a text": lambda run: header(graph(X, node("call_method", "y", "index_add", "cpu"), out("x"))),
    "P: __class__ among the attributes": lambda run: header(identity(["__class__", {"class": 0}]), classes=[IDENTITY]),
}


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("signed", [True, False])
def test_attacks_are_refused_before_anything_is_made(
    name: str, signed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    marker = tmp_path / "ran"
    path = write(tmp_path / "m", ATTACKS[name](command(marker)), signed=signed)

    def made(*_: Any) -> None:
        raise AssertionError("something was made")

    if not name.startswith("C3"):
        monkeypatch.setattr(nn.Module, "__init__", made)
    monkeypatch.setattr(fx.GraphModule, "__init__", made)
    known = set(sys.modules)
    with pytest.raises(DataError):
        modelfile.load(path, allow=("tests",))
    assert not marker.exists()
    assert not {"harness.__main__", "harness.cli"} & (set(sys.modules) - known)


def test_the_attacks_differ_from_honest_files_by_the_attack_alone(tmp_path: Path) -> None:
    honest = header(graph(X, node("call_function", "y", "torch:abs", {"node": "x"}), out("y")))
    assert torch.equal(modelfile.load(write(tmp_path / "m", honest))(torch.tensor([-1.0])), torch.ones(1))
    honest = header(identity(["thing", {"function": 0}]), classes=[IDENTITY], functions=["torch:abs"])
    assert modelfile.load(write(tmp_path / "m", honest)).thing is torch.abs
    nesting = {
        "arguments": ["x"],
        "inputs": ["tuple", None, [["tuple", None, []], ["dict", ["x"], ["leaf"]]]],
        "outputs": ["dict", ["y"], ["leaf"]],
    }
    returned = ["output", "output", "output", {"tuple": [{"tuple": [{"node": "x"}]}]}, []]
    honest = header(graph(X, returned, nesting=nesting))
    assert list(modelfile.load(write(tmp_path / "m", honest))(x=torch.ones(1))) == ["y"]


def named(name: str) -> Callable[[dict[str, Any]], None]:
    def change(described: dict[str, Any]) -> None:
        described["classes"] = [name]

    return change


@pytest.mark.parametrize(
    "name",
    [
        "os:system",
        "subprocess:Popen",
        "tests.unit.test_modelfile:Holder",  # not trusted unless said so
        "torch.nn.modules.module:register_module_forward_hook",  # not a class
        "torch.nn.modules.linear:torch.serialization.load",  # through a module's imports
        "torch.nn.modules.linear:Module",  # imported there, defined elsewhere
        "torch.nn.parallel.distributed:DistributedDataParallel",
        "torch.distributed.run:main",
        "harness.modelfile:Path",
        "harness.executor:Worker",
        "torch.fx.graph_module:GraphModule",
        "transformers.pipelines.base:Pipeline",
        "transformers.models.bert.convert_bert:X",
        "harnessed.evil:Module",
        "builtins:object",
        "torch.nn.modules.linear:Linear.__init__",
        "torch.nn.modules..linear:Linear",
    ],
)
def test_only_layers_of_trusted_packages_are_made(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=name.split(":")[0].replace(".", r"\.")):
        modelfile.load(forge(tmp_path / "m", named(name), nn.Linear(1, 1)))


def test_a_module_that_is_not_trusted_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evil_layers.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(DataError, match="not from a trusted package"):
        modelfile.load(forge(tmp_path / "m", named("evil_layers:Layer"), nn.Linear(1, 1)))
    assert not (tmp_path / "ran").exists()


def test_trust_is_given_by_argument_or_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = modelfile.save(Holder(3), tmp_path / "m")
    with pytest.raises(DataError, match="ASSAY_TRUSTED_MODULES"):
        modelfile.load(path)
    assert modelfile.load(path, allow=("tests",)).thing == 3
    monkeypatch.setenv("ASSAY_TRUSTED_MODULES", "other, tests")
    assert modelfile.load(path).thing == 3


@pytest.mark.parametrize("name", ["os:system", "torch.serialization:load", "harness.registry:create", "builtins:exec"])
def test_trust_does_not_reach_into_the_standard_library_or_our_own(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "m", header(identity(["thing", {"function": 0}]), classes=[IDENTITY], functions=[name]))
    with pytest.raises(DataError, match=r"which is not"):
        modelfile.load(path, allow=("os", "posix", "torch", "harness", "builtins"))


# ---- graphs


def noded(op: str, target: Any, *args: Any) -> Callable[[dict[str, Any]], None]:
    def change(described: dict[str, Any]) -> None:
        (found,) = (entry for entry in described["objects"] if entry["kind"] == "graph")
        found["nodes"].insert(1, node(op, "forged", target, *args))

    return change


@pytest.mark.parametrize(
    ("op", "target", "args"),
    [
        ("call_function", "torch:load", ["/etc/passwd"]),
        ("call_function", "os:system", ["true"]),
        ("call_function", "builtins:eval", ["1"]),
        ("call_function", "operator:call", [1]),
        ("call_function", "operator:attrgetter", ["shape"]),
        ("call_function", "torch:from_file", ["/etc/passwd"]),
        ("call_function", "builtins:getattr", [{"node": "x"}, "__class__"]),
        ("call_function", "builtins:getattr", [{"node": "x"}, {"node": "x"}]),
        ("call_function", "aten:set_.source_Tensor", [{"node": "x"}, {"node": "x"}]),
        ("call_function", "aten:_foreach_abs.default", [{"list": [{"node": "x"}]}]),
        ("call_function", "assay:unknown.default", [{"node": "x"}]),
        ("call_function", "higher_order:cond", [True]),
        ("call_function", "torch:abs", [{"node": "later"}]),
        ("call_function", "torch:abs", [{"ref": 0}]),
        ("call_function", "torch:abs", ["some text"]),
        ("call_function", "torch:einsum", ["ab->ba')#"]),
        ("call_function", ["torch:abs"], []),
        ("call_method", "__reduce__", [{"node": "x"}]),
        ("call_method", "numpy", [{"node": "x"}]),
        ("call_method", "share_memory_", [{"node": "x"}]),
        ("call_module", "stages.7", [{"node": "x"}]),
        ("call_module", "gain", [{"node": "x"}]),
        ("get_attr", "stages", []),
        ("get_attr", "stages.__class__", []),
        ("get_attr", "training", []),
        ("get_attr", 'gain"); import os; ("', []),
        ("placeholder", "y=print(1)", []),
        ("execute", "x", []),
    ],
)
def test_graphs_call_listed_functions_and_their_own_parts_only(
    op: str, target: Any, args: list[Any], tmp_path: Path
) -> None:
    with pytest.raises(DataError):
        modelfile.load(forge(tmp_path / "m", noded(op, target, *args), traced()))


def test_an_honest_extra_node_is_accepted(tmp_path: Path) -> None:
    add = noded("call_function", "aten:add.Tensor", {"node": "x"}, 1)
    loaded = modelfile.load(forge(tmp_path / "m", add, traced()))
    assert isinstance(loaded, fx.GraphModule)
    assert any(found.target is torch.ops.aten.add.Tensor for found in loaded.graph.nodes)


def test_a_graph_with_a_call_that_is_not_listed_cannot_be_saved(tmp_path: Path) -> None:
    made = fx.Graph()
    made.output(made.call_function(torch.load, ("x",)))
    with pytest.raises(DataError, match=r"torch\.serialization:load"):
        modelfile.save(fx.GraphModule(nn.Module(), made), tmp_path / "m")


def test_every_listed_function_is_found_by_its_name() -> None:
    for function in operators.functions().values():
        again = operators.function_name(function)
        assert again is not None
        assert operators.functions()[again] is function


def exported(model: nn.Module, *inputs: Tensor, shapes: Any) -> Any:
    return torch.export.export(model.eval(), inputs, dynamic_shapes=shapes).module()


@pytest.mark.filterwarnings("ignore")
def test_exported_modules_keep_their_outputs_and_the_check_of_their_inputs(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
            self.constant = torch.ones(4)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            with torch.no_grad():
                shift = self.constant * 2
            return {"sum": self.layer(x) + y, "shifted": (y + shift).reshape(x.shape[0], 2, 2)}

    n = torch.export.Dim("n", min=1, max=8)
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    model = exported(Two(), x, y, shapes=({0: n}, {0: n}))
    again = modelfile.load(modelfile.save(model, tmp_path / "m"))
    with torch.no_grad():
        for rows in (1, 3):
            wanted, got = model(x[:rows], y[:rows]), again(x[:rows], y[:rows])
            assert list(wanted) == list(got)
            assert all(torch.equal(wanted[key], got[key]) for key in wanted)
    assert list(again.state_dict()) == list(model.state_dict())
    round_trip(again, tmp_path, x, y)
    for bad in ((x, y[:2]), (x.double(), y.double()), (x.repeat(4, 1), y.repeat(4, 1)), (x[0], y[0]), (x[:, :3], y)):
        with pytest.raises(InputError, match="exported model"):
            again(*bad)
    again.train()
    again(x, y)["sum"].sum().backward()
    assert again.layer.get_submodule("0").weight.grad is not None


# ---- libraries

pytest_ignore = pytest.mark.filterwarnings("ignore")


@pytest_ignore
def test_transformers_round_trip_exactly(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    ids, mask = torch.randint(0, 50, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[0, 4:] = 0
    bert = transformers.BertModel(transformers.BertConfig(**size, vocab_size=50)).eval()
    again = round_trip(bert, tmp_path, input_ids=ids, attention_mask=mask)
    assert set(vars(again)) == set(vars(bert))
    assert again.config.to_dict() == bert.config.to_dict()
    assert vars(again.config).keys() == vars(bert.config).keys()
    assert again.encoder.layer[0].attention.self.config is again.config
    llama = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**size, vocab_size=50, tie_word_embeddings=True, pad_token_id=0)
    ).eval()
    again = round_trip(llama, tmp_path, input_ids=ids)
    assert again.lm_head.weight is again.model.embed_tokens.weight
    options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(again.generate(ids, **options), llama.generate(ids, **options))


@pytest_ignore
def test_an_exported_transformer_round_trips(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48, vocab_size=50
    )
    bert = transformers.BertModel(config).eval()
    ids, mask = torch.randint(0, 50, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    n, t = torch.export.Dim("n", min=1, max=64), torch.export.Dim("t", min=2, max=64)
    shapes = {"input_ids": {0: n, 1: t}, "attention_mask": {0: n, 1: t}}
    program = torch.export.export(bert, (), {"input_ids": ids, "attention_mask": mask}, dynamic_shapes=shapes)
    again = modelfile.load(modelfile.save(program.module(), tmp_path / "m"))
    with torch.no_grad():
        wanted = bert(input_ids=ids[:1, :5], attention_mask=mask[:1, :5])
        got = again(input_ids=ids[:1, :5], attention_mask=mask[:1, :5])
    assert type(got) is type(wanted)
    torch.testing.assert_close(got.last_hidden_state, wanted.last_hidden_state)


@pytest_ignore
@pytest.mark.parametrize("name", ["resnet10t", "test_vit", "test_convnext", "levit_128s"])
def test_timm_models_round_trip(name: str, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model(name).eval()
    size = model.pretrained_cfg["input_size"]
    round_trip(model, tmp_path, torch.randn(1, *size))


# ---- damage


def model_for_damage() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(traced(), Tied(), nn.LSTM(2, 2), Holder([Plain(), Pair(1, 2), np.arange(3), Colour.RED]))


JUNK: list[Any] = [
    None, True, -1, 0, 1, 10**30, "", "x", "__class__", [], {}, [[]], {"ref": 0}, {"ref": 10**6}, {"tensor": 0},
    {"float": "x"}, {"function": 0}, {"class": 0}, {"partial": [1, 2, 3]}, {"tuple": [{"ref": 1}]},
    {"enum": [0, "RED"]}, {"scalar": ["<f8", "00"]},
    {"range": [0, 1, 0]}, {"device": "cuda:99"}, "torch.nn.modules.linear:Linear", 1.5,
]  # fmt: skip


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in pairs:
        yield value, key
        yield from places(part)


def damaged(described: dict[str, Any], chance: random.Random) -> dict[str, Any]:
    changed = copy.deepcopy(described)
    for _ in range(chance.choice([1, 1, 2, 4])):
        found = list(places(changed))
        holder, key = chance.choice(found)
        other, other_key = chance.choice(found)
        match chance.randrange(4):
            case 0:
                holder[key] = copy.deepcopy(chance.choice(JUNK))
            case 1:
                holder[key] = copy.deepcopy(other[other_key])
            case 2:
                del holder[key]
            case _ if isinstance(holder[key], int):
                holder[key] += chance.choice([-1, 1, 7, 2**31])
            case _:
                holder[key] = [holder[key]]
    return changed


def outcome(path: Path) -> str:
    try:
        loaded = modelfile.load(path, allow=("tests",))
    except DataError:
        return "refused"
    assert isinstance(loaded, nn.Module)
    return "read"


def test_damaged_descriptions_are_refused_or_make_a_model(tmp_path: Path) -> None:
    described, data = split(modelfile.save(model_for_damage(), tmp_path / "m"))
    chance = random.Random(20)
    outcomes = collections.Counter(outcome(write(tmp_path / "d", damaged(described, chance), data)) for _ in range(300))
    assert outcomes["refused"] > 100


def test_damaged_bytes_are_refused(tmp_path: Path) -> None:
    content = modelfile.save(model_for_damage(), tmp_path / "m").read_bytes()
    chance = random.Random(21)
    path = tmp_path / "d"
    for _ in range(300):
        changed = bytearray(content)
        for _ in range(chance.choice([1, 2, 8])):
            place = chance.randrange(len(changed))
            match chance.randrange(3):
                case 0:
                    changed[place] ^= 1 << chance.randrange(8)
                case 1:
                    del changed[place : place + chance.randrange(1, 64)]
                case _:
                    changed[place:place] = chance.randbytes(chance.randrange(1, 64))
        path.write_bytes(changed)
        assert outcome(path) == "refused" or bytes(changed) == content
