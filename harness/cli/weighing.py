"""``assay weigh`` and ``assay init``: one command for what people try first, and a file to start from."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import click

from harness.cli.options import db_option, json_option, print_json
from harness.cli.progress import ProgressBar
from harness.errors import InputError

# Enough for a median and a p90 in seconds; a spec measures longer.
_MEASURE: dict[str, Any] = {"min_queries": 70, "min_seconds": 0.5, "max_seconds": 5.0, "weigh_below": 2**24}


@click.command()
@click.argument("target")
@click.option(
    "--method",
    "methods",
    multiple=True,
    metavar="NAME",
    help='Weigh it compressed as well: a method\'s name, with parameters ("magnitude sparsity=0.9"), or a chain '
    '("structured ratio=0.5 > finetune epochs=2"). May be repeated.',
)
@click.option(
    "--data",
    metavar="DATA",
    help="What it is scored on: a built-in set, a folder of ImageNet's form, a .npz, "
    ".csv or .parquet file, or a folder of Hugging Face datasets.",
)
@click.option("--metric", "metrics", multiple=True, metavar="NAME", help="What it is scored by (assay ls metrics).")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="NAME=SHAPE:DTYPE",
    help="An input where nothing tells its shape: pixels=1x3x224x224:float32. The first axis is the example.",
)
@click.option("--hardware", multiple=True, metavar="NAME", help="Runtimes. Default: all (assay ls hardware).")
@click.option("--batch", "batches", multiple=True, type=click.IntRange(min=1), help="Batch size. Default: 1.")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Threads of the runtime.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of everything random.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0, min_open=True, max=1e7),
    default=7200.0,
    show_default=True,
    help="Seconds that each step may take.",
)
@db_option
@json_option
def weigh(
    target: str,
    methods: tuple[str, ...],
    data: str | None,
    metrics: tuple[str, ...],
    inputs: tuple[str, ...],
    hardware: tuple[str, ...],
    batches: tuple[int, ...],
    threads: int,
    seed: int,
    timeout: float,
    db: Path | None,
    as_json: bool,
) -> int:
    """Run TARGET as it is on every runtime that is here, and print what it weighs; the records are kept.

    TARGET is an ONNX file (model.onnx), your own function (module:function, see `assay init`), timm/NAME,
    torchvision/NAME, transformers/FOLDER, a .pt2 program, a built-in network, or a packaged task (assay ls tasks).
    """
    from harness import paths, registry
    from harness.cli.running import rows_of, show_outcome
    from harness.runner import sweep
    from harness.spec import Spec

    task: dict[str, Any] = {"model": target}
    if target in registry.table("task"):
        if data is not None or metrics or inputs:
            raise InputError(
                f"The task {target!r} brings its data, inputs and metrics: leave --data, --metric and --input out."
            )
        task = {"name": target}
    if data is not None:
        task["data"] = data
    if metrics:
        task["metric"] = [[parsed_item(text) for text in metrics]]
    if inputs:
        task["input"] = [list(inputs)]
    spec = Spec.from_mapping(
        {
            "name": f"weigh {target}",
            "task": task,
            "method": ["baseline", *(parsed_chain(text) for text in methods)],
            "hardware": list(hardware) or sorted(registry.table("hardware")),
            "batch_size": list(batches) or [1],
            "threads": threads,
            "seed": seed,
            "measure": _MEASURE,
        },
        "assay weigh",
    )
    path = db or paths.default_db()
    with ProgressBar(quiet=as_json) as progress:
        outcome = sweep(spec, db=path, timeout=timeout, watch=progress.watch)
    rows = rows_of(outcome, path)
    if as_json:
        print_json(rows)
    else:
        show_outcome(outcome, rows, path)
        _show_notes(rows)
    return outcome.exit_code


def parsed_chain(text: str) -> Any:
    """The method or chain of a command-line text: ``"structured ratio=0.5 > finetune epochs=2"``.

    Raises
    ------
    InputError
        If a step has no name, or a parameter no value.
    """
    steps = [parsed_item(step) for step in re.split(r"\s*>\s*", text.strip())]
    return steps[0] if len(steps) == 1 else {"chain": steps}


def parsed_item(text: str) -> dict[str, Any]:
    """A name with parameters, ``"accuracy k=5"``, as the table of a spec; values are written as in TOML.

    Raises
    ------
    InputError
        If there is no name, or a parameter has no value.
    """
    words = text.split()
    if not words or "=" in words[0]:
        raise InputError(f"{text!r} has no name before its parameters. Example: magnitude sparsity=0.9")
    item: dict[str, Any] = {"name": words[0]}
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if not equals or not key or not value:
            raise InputError(f"{word!r} in {text!r} is no parameter: write key=value without spaces.")
        try:
            item[key] = tomllib.loads(f"value = {value}")["value"]
        except (tomllib.TOMLDecodeError, RecursionError):
            item[key] = value
    return item


def _show_notes(rows: list[dict[str, Any]]) -> None:
    """What was inferred, once each."""
    import json

    from harness.text import printable

    said: dict[str, None] = {}
    for row in rows:
        said |= dict.fromkeys(json.loads(row.get("notes") or "[]"))
    for sentence in said:
        click.echo(f"Note: {printable(sentence)}")


@click.command()
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
def init(file: Path) -> None:
    """Write FILE, a commented Python file that gives Assay your own trained model; it runs as it stands."""
    if file.suffix != ".py" or not file.stem.isidentifier():
        raise InputError(f"{file}: the file is imported as a module, so its name must be like my_model.py.")
    if file.exists():
        raise InputError(f"{file} exists already; nothing was written. Choose another name.")
    try:
        with file.open("x", encoding="utf-8") as stream:
            stream.write(_template())
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}.") from error
    click.echo(f"{file}: edit make(), then from its folder:")
    click.echo(f"  assay weigh {file.stem}:make")
    click.echo(
        f"  assay weigh {file.stem}:make --method ptq-int8 --method 'magnitude sparsity=0.8 > finetune epochs=2'"
    )


def _template() -> str:
    from importlib import resources

    return resources.files("harness.cli").joinpath("own_model.py.txt").read_text(encoding="utf-8")
