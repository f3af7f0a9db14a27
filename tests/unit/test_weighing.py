"""The words of `assay weigh`, and the file that `assay init` writes."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from harness.cli import cli
from harness.cli.weighing import parsed_chain, parsed_item
from harness.errors import InputError


@pytest.mark.parametrize(
    ("text", "item"),
    [
        ("baseline", {"name": "baseline"}),
        ("magnitude sparsity=0.9 scope=layer", {"name": "magnitude", "sparsity": 0.9, "scope": "layer"}),
        ("structured merge=true round_to=8", {"name": "structured", "merge": True, "round_to": 8}),
        ("accuracy ignore=[-1,255]", {"name": "accuracy", "ignore": [-1, 255]}),
        ("my.module:Own k=5", {"name": "my.module:Own", "k": 5}),
    ],
)
def test_names_with_parameters(text, item):
    assert parsed_item(text) == item


def test_a_chain_is_written_with_arrows():
    assert parsed_chain("structured ratio=0.5 >  finetune epochs=2") == {
        "chain": [{"name": "structured", "ratio": 0.5}, {"name": "finetune", "epochs": 2}]
    }
    assert parsed_chain("ptq-int8") == {"name": "ptq-int8"}


@pytest.mark.parametrize(
    "text", ["", "sparsity=0.9", "magnitude sparsity", "magnitude =3", "magnitude sparsity=", "a >"]
)
def test_words_that_mean_nothing_are_refused(text):
    with pytest.raises(InputError):
        parsed_chain(text)


def test_init_writes_a_file_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, ["init", "mine.py"], standalone_mode=False)
    assert done.exception is None
    text = (tmp_path / "mine.py").read_text()
    compile(text, "mine.py", "exec")
    assert "assay weigh mine:make" in done.output
    again = CliRunner().invoke(cli, ["init", "mine.py"], standalone_mode=False)
    assert isinstance(again.exception, InputError)
    assert (tmp_path / "mine.py").read_text() == text


@pytest.mark.parametrize("name", ["my-model.py", "mine.txt", "1.py"])
def test_init_refuses_what_cannot_be_imported(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(cli, ["init", name], standalone_mode=False)
    assert isinstance(done.exception, InputError)
    assert not list(tmp_path.iterdir())
