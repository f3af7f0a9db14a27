"""Specs that try to run code, to never end, or to bring the parser down."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from harness.errors import InputError, SpecError
from harness.spec import Item, Spec, build


def _spec(**changes: Any) -> Spec:
    return Spec.from_mapping({"task": "digits-cnn", **changes}, "test.toml")


def test_an_item_is_built_like_a_cells_table() -> None:
    table = {"name": "magnitude", "sparsity": 0.75}
    assert Item.of(table) == Item("magnitude", {"sparsity": 0.75})
    assert build("method", Item.of(table)) == build("method", table)


NO_METHOD: list[tuple[Any, list[str]]] = [
    ({"name": "subprocess:getoutput", "cmd": "touch PWNED"}, ["'subprocess' is a module of Python itself"]),
    ({"name": "os:_exit", "status": 0}, ["'os' is a module of Python itself"]),
    ("sys:exit", ["a module of Python itself"]),
    ("builtins:input", ["a module of Python itself"]),
    ("builtins:breakpoint", ["a module of Python itself"]),
    ("antigravity:fly_id", ["a module of Python itself"]),
    ("torch:zeros", ["is no {kind} but the function", "a frozen dataclass with {member}"]),
    ("torch.nn:Linear", ["has no {member}"]),
    ("harness.spec:Cell", ["has no {member}"]),
    ("harness.contracts:{Protocol}", ["must be a frozen dataclass"]),
    ("harness.paths:os", ["is no {kind} but"]),
    ("no_such_module_at_all:Thing", ["there is no module 'no_such_module_at_all'"]),
    ("methods.baseline:Baselin", ["has no 'Baselin'. Did you mean 'Baseline'?"]),
    ("folder/mine.py:Thing", ["module:name, with a module's name, not its path"]),
    ("..mine:Thing", ["module:name"]),
    ("mine:", ["module:name"]),
    ("__main__:Thing", ["notebook", "file of its own"]),
]
KINDS = {"method": ("compress", "Method"), "hardware": ("unavailable", "Hardware")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("item", "words"), NO_METHOD, ids=[str(item) for item, _ in NO_METHOD])
def test_a_name_must_stand_for_a_class_of_its_kind_before_anything_is_called(
    tmp_path: Path, kind: str, item: Any, words: list[str]
) -> None:
    member, protocol = KINDS[kind]
    if isinstance(item, str):
        item = item.replace("{Protocol}", protocol)
    with pytest.raises(SpecError) as caught:
        _spec(**{kind: item}).cells()
    assert caught.value.exit_code == 2
    for word in ["test.toml", kind, *(word.format(kind=kind, member=member) for word in words)]:
        assert word in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["os:_exit", "builtins:input", "subprocess:getoutput"])
def test_a_task_is_no_function_of_python_itself(name: str) -> None:
    with pytest.raises(SpecError, match="a module of Python itself"):
        _spec(task=name).cells()


WATCHED = """
from dataclasses import dataclass

def make(width=1):
    raise SystemExit("called")

@dataclass(frozen=True)
class Mine:
    ratio: float = 0.5
    def compress(self, model, context):
        raise SystemExit("called")
    def resolved_parameters(self):
        raise SystemExit("called")
"""


def test_reading_a_spec_calls_nothing_of_the_users(tmp_path: Path) -> None:
    (tmp_path / "watched.py").write_text(WATCHED)
    (cell,) = _spec(task={"name": "watched:make", "width": 3}, method={"name": "watched:Mine", "ratio": 0.25}).cells()
    assert cell.task == {"name": "watched:make", "width": 3}
    assert cell.chain == ({"name": "watched:Mine", "ratio": 0.25},)


STRICT = """
import sys
from dataclasses import dataclass

@dataclass(frozen=True)
class Mine:
    ratio: float = 0.5
    def compress(self, model, context): ...
    def __post_init__(self):
        if self.ratio == 1:
            sys.exit("all of it?")
        if self.ratio > 1:
            raise ZeroDivisionError("more than all")

class Undecorated(Mine):
    pass

@dataclass
class Thawed:
    ratio: float = 0.5
    def compress(self, model, context): ...
"""


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ({"name": "strict:Mine", "ratio": 1.0}, "ended the program (sys.exit('all of it?'))"),
        ({"name": "strict:Mine", "ratio": 2.0}, "ZeroDivisionError: more than all"),
        ({"name": "strict:Mine", "ratio": "x"}, "ratio: Input should be a valid number"),
        ({"name": "strict:Mine", "share": 1}, "no parameter 'share'"),
        ({"name": "strict:Thawed"}, "must be a frozen dataclass"),
    ],
)
def test_a_users_class_that_refuses_its_values_is_a_spec_error(tmp_path: Path, item: Any, words: str) -> None:
    (tmp_path / "strict.py").write_text(STRICT)
    with pytest.raises(SpecError) as caught:
        _spec(method=item).cells()
    assert words in str(caught.value)


def test_a_users_subclass_of_a_frozen_dataclass_is_one(tmp_path: Path) -> None:
    (tmp_path / "strict.py").write_text(STRICT)
    assert _spec(method="strict:Undecorated").cells()[0].chain == ({"name": "strict:Undecorated", "ratio": 0.5},)


GRIDS: list[tuple[dict[str, Any], list[str]]] = [
    (
        {"seed": list(range(1000)), "threads": list(range(1, 1001)), "batch_size": list(range(1, 1001))},
        ["1,000,000,000 cells", "seed 1,000 x threads 1,000 x batch_size 1,000", "100,000", "ASSAY_MAX_CELLS"],
    ),
    ({"method": {"chain": [{"name": "magnitude", "sparsity": [i / 10 for i in range(10)]}] * 9}}, ["1,000,000,000"]),
    (
        {"method": {"name": "magnitude", **{key: list(range(3000)) for key in ("sparsity", "scope", "criterion")}}},
        ["27,000,000,000 cells"],
    ),
    ({"task": {"name": "digits-cnn", **{f"a{i}": [1, 2] for i in range(3000)}}}, ["more than 10^15 cells"]),
    ({"seed": range(10**9)}, ["1,000,000,000 cells"]),
    ({"method": [{"name": "magnitude", "sparsity": [0.5] * 60_000}, "baseline"], "seed": [0, 0]}, ["120,002 cells"]),
    # An empty list elsewhere does not hide the size.
    ({"method": {"name": "magnitude", "sparsity": [0.5] * 10**6, "scope": []}, "seed": []}, ["1,000,000 cells"]),
]


@pytest.mark.parametrize(("changes", "words"), GRIDS, ids=[words[0] for _, words in GRIDS])
def test_a_grid_is_counted_before_it_is_expanded(changes: dict[str, Any], words: list[str]) -> None:
    begin = time.monotonic()
    with pytest.raises(SpecError) as caught:
        _spec(**changes).cells()
    assert time.monotonic() - begin < 5
    for word in ["test.toml", *words]:
        assert word in str(caught.value)


def test_the_limit_of_cells_is_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ASSAY_MAX_CELLS", "3")
    assert len(_spec(seed=[0, 1, 2]).cells()) == 3
    with pytest.raises(SpecError, match=r"the grid has 4 cells \(seed 4\); at most 3 are allowed"):
        _spec(seed=[0, 1, 2, 3]).cells()
    for wrong in ("", "0", "-5", "many", "1" * 5000):
        monkeypatch.setenv("ASSAY_MAX_CELLS", wrong)
        with pytest.raises(InputError, match="ASSAY_MAX_CELLS must be a positive integer"):
            _spec().cells()


def test_the_largest_grid_is_read_in_seconds() -> None:
    spec = _spec(seed=list(range(300)), batch_size=list(range(1, 301)))
    begin = time.monotonic()
    assert len(spec.cells()) == 90_000
    assert len(spec.hash()) == 64
    assert time.monotonic() - begin < 30


A = "a"
INVALID = {
    "nested arrays": ("name = " + "[" * 5000, "nested deeper"),
    "nested tables": ("measure = " + "{a=" * 3000 + "1" + "}" * 3000, "nested deeper"),
    "nested by steps": ("\n".join(f"[{'.'.join(A * 30)}.{'.'.join('b' * n)}]" for n in (1, 20)), "parts"),
    "a long dotted header": ("[" + ".".join(A * 100_000) + "]", "a key has more than 32 parts"),
    "a long dotted key": (".".join(A * 100_000) + " = 1", "a key has more than 32 parts"),
    "a long dotted quoted key": (".".join(['"a"'] * 50_000) + " = 1", "a key has more than 32 parts"),
    "a long dotted spaced key": (" . ".join(A * 50_000) + " = 1", "a key has more than 32 parts"),
    "a long dotted inline key": ("x = {" + ".".join(A * 100_000) + " = 1}", "a key has more than 32 parts"),
    "a long key behind a string": ('x = """\n"a.b"""\n' + ".".join(A * 100_000) + " = 1", "more than 32 parts"),
    "a long integer": ("seed = " + "9" * 5000, "an integer has more than 64 bits"),
    "a long hexadecimal integer": ("seed = 0x" + "f" * 200_000, "an integer has more than 64 bits"),
    "an integer of 65 bits": (f"seed = {2**64}", "an integer has more than 64 bits"),
    "quotes without end": ("x = " + '"' * 100_001, "not valid TOML"),
    "escaped quotes without end": ('x = """' + '\\"""' * 100_000, "Unterminated string"),
}


@pytest.mark.parametrize("name", INVALID)
def test_toml_that_takes_the_parser_to_its_limits_is_refused_in_bounded_time(tmp_path: Path, name: str) -> None:
    text, words = INVALID[name]
    path = tmp_path / "odd.toml"
    path.write_text(f'task = "digits-cnn"\n{text}')
    begin = time.monotonic()
    with pytest.raises(SpecError) as caught:
        Spec.load(path)
    assert time.monotonic() - begin < 5
    assert str(caught.value).startswith(f"{path}: not valid TOML: ")
    assert words in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_dots_in_text_and_comments_are_no_keys(tmp_path: Path) -> None:
    path, dots = tmp_path / "dots.toml", "." * 100
    lines = [
        'task = "digits-cnn"',
        f"# it{dots}",
        f'description = "and so on{dots} \\" {dots}"',
        f"name = '''{dots}\n'{dots}'''",
        "[measure]",
        f"min_seconds = 0.5 # {dots}",
    ]
    path.write_text("\n".join(lines))
    assert len(Spec.load(path).cells()) == 1


def test_a_spec_is_a_regular_file_of_bounded_size(tmp_path: Path) -> None:
    pipe, large, folder = tmp_path / "pipe.toml", tmp_path / "large.toml", tmp_path / "folder.toml"
    os.mkfifo(pipe)
    large.write_bytes(b"#" * (2 << 20))
    folder.mkdir()
    (tmp_path / "dangling.toml").symlink_to(tmp_path / "nothing")
    expected = {
        pipe: "is a named pipe",
        large: "is larger than 1,048,576 bytes",
        folder: "is a folder",
        tmp_path / "dangling.toml": "No such file",
        Path("/dev/zero"): "is a device",
    }
    for path, words in expected.items():
        with pytest.raises(SpecError, match=words) as caught:
            Spec.load(path)
        assert str(path) in str(caught.value)
    with pytest.raises(SpecError, match="No spec"):
        Spec.load("a\0b")


def test_values_that_python_gives_are_bounded_too() -> None:
    deep: list[Any] = []
    for _ in range(10_000):
        deep = [deep]
    for changes, words in (
        ({"seed": 10**5000}, "an integer has more than 64 bits"),
        ({"method": {"name": "magnitude", "sparsity": deep}}, "nested deeper"),
        ({"description": "\ud800"}, "no valid Unicode"),
        ({"method": {"name": "magnitude", "sparsity": object()}}, "sparsity"),
        ({"method": {"name": "magnitude", 3: 1}}, "no parameter 3"),
    ):
        with pytest.raises(SpecError, match=words):
            _spec(**changes).cells()


def test_a_long_value_is_cut_in_a_message() -> None:
    for changes in ({"batch_size": "x" * 10**6}, {"method": "x" * 10**6}, {"x" * 10**6: 1}):
        with pytest.raises(InputError) as caught:
            _spec(**changes).cells()
        assert len(str(caught.value)) < 2000
