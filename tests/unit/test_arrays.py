"""Named arrays on disk: dtypes and order are kept, shapes may change, and names never become file names."""

from __future__ import annotations

import errno
import json

import numpy as np
import pytest

from harness import arrays
from harness.errors import DataError, InputError


def batch(ids, y, width=2):
    ids = np.asarray(ids, np.int64)
    return {"../../ids": np.repeat(ids[:, None], width, 1), "x": (ids % 9).astype(np.float16)[:, None]}, {
        "y": np.asarray(y)
    }


def test_what_is_written_is_read_with_its_types(tmp_path):
    big = 2**53 + 1
    assert arrays.write(tmp_path, [batch([big, 1], [0, 1]), batch([2], [2])]) == 3
    (block,) = arrays.read(tmp_path)
    assert len(block) == 3
    assert block.inputs["../../ids"].dtype == np.int64
    assert block.inputs["x"].dtype == np.float16
    assert block.inputs["../../ids"][0, 0] == big
    assert [targets["y"].tolist() for _, targets in block.parts(2)] == [[0, 1], [2]]
    assert {path.name for path in tmp_path.iterdir()} == {"0.bin", "1.bin", "2.bin", "index.json"}


def test_other_shapes_begin_a_block(tmp_path):
    arrays.write(tmp_path, [batch([1], [0]), batch([2], [0], width=5), batch([3], [0], width=5)])
    assert [(len(block), block.inputs["../../ids"].shape) for block in arrays.read(tmp_path)] == [
        (1, (1, 2)),
        (2, (2, 5)),
    ]


def test_endless_shapes_are_refused(tmp_path):
    with pytest.raises(InputError, match="more than 64 shapes"):
        arrays.write(tmp_path, [batch([1], [0], width=width) for width in range(1, 80)])


def test_a_full_disk_is_noticed_before_it_is_full(tmp_path):
    with pytest.raises(OSError, match="examples need") as caught:
        arrays.write(tmp_path, [batch([1] * 1000, [0] * 1000)] * 10, free_bytes=100_000)
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("damage", ["missing", "{}", "[1", '{"n": 1, "blocks": [{"n": 1, "inputs": 3}]}', "long"])
def test_a_damaged_folder_is_a_data_error(tmp_path, damage):
    arrays.write(tmp_path, [batch([1], [0])])
    index = tmp_path / "index.json"
    if damage == "missing":
        index.unlink()
    elif damage == "long":
        value = json.loads(index.read_text())
        value["blocks"][0]["n"] = 10**6
        index.write_text(json.dumps(value))
    else:
        index.write_text(damage)
    with pytest.raises(DataError, match="not a folder of examples"):
        arrays.read(tmp_path)


def test_examples_are_repeated_in_order():
    assert arrays.repeated({"x": np.arange(3)}, 5)["x"].tolist() == [0, 1, 2, 0, 1]
    assert arrays.repeated({"x": np.arange(3)}, 2)["x"].tolist() == [0, 1]
