"""Tasks that a spec puts together: every source of models and of data."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from harness import modelfile, registry, tasks
from harness.calling import call, evaluating
from harness.contracts import Port, Task
from harness.errors import DataError, InputError, SpecError, Unavailable
from harness.spec import Spec
from harness.tasks import pair, sets, sources
from harness.training import evaluate

MODULE = """
import torch
from torch import nn

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 3), nn.Embedding(9, 3)

    def forward(self, x, ids):
        return self.a(x) + self.b(ids).sum(1)

def linear():
    torch.manual_seed(0)
    return nn.Linear(2, 2)

def two(): return Two()

def images():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))

def training(): return {"train": loaders()["test"]}

def loaders():
    return {"test": [(torch.ones(4, 2), torch.tensor([0, 1, 0, 1]))], "val": [(torch.ones(2, 2), torch.tensor([0, 1]))]}
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    (tmp_path / "ours.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ASSAY_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("ASSAY_DATA", raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    pair._assembled.cache_clear()
    yield tmp_path
    sys.modules.pop("ours", None)


def make(**parameters):
    return tasks.create("pair", parameters)


def said(task, part: str) -> bool:
    return any(part in note for note in task.notes())


def test_a_spec_may_give_a_model_instead_of_a_name():
    spec = Spec.from_mapping(
        {
            "name": "x",
            "task": {
                "model": ["digits-cnn", "resnet20"],
                "data": "digits",
                "metric": [["f1", {"name": "accuracy", "k": 2}]],
            },
            "method": "baseline",
            "hardware": "torch",
        },
        "here",
    )
    found = [cell.task for cell in spec.cells()]
    assert [item["model"] for item in found] == ["digits-cnn", "resnet20"]
    assert all(item["name"] == "pair" for item in found)
    task = tasks.create("pair", {key: value for key, value in found[0].items() if key != "name"})
    assert [metric.name for metric in task.metrics] == ["f1", "accuracy@2"]


def test_a_built_in_network_is_trained_by_its_recipe_like_the_task_of_its_name():
    task, named = make(model="digits-cnn", data="digits"), tasks.create("digits-cnn", {})
    assert isinstance(task, Task)
    assert task.unavailable() is None
    assert task.recipe() == named.recipe()
    ours, theirs = task.model(3).state_dict(), named.model(3).state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    assert {part: split.size for part, split in task.data().items()} == {"train": 1258, "validation": 180}
    assert task.test().identity == named.test().identity
    assert [metric.name for metric in task.metrics] == ["accuracy"]


def test_a_network_that_nobody_trains_is_not_scored():
    task = make(model="digits-cnn")
    assert task.recipe() is None
    assert task.signature.inputs == (Port(name="input", shape=(1, 8, 8)),)
    with pytest.raises(Unavailable, match="random weights: give data"):
        task.test()


@pytest.mark.parametrize(
    ("parameters", "kind", "message"),
    [
        ({}, SpecError, "has a model"),
        ({"model": "resnet2"}, SpecError, "Did you mean 'resnet20'"),
        ({"model": "nowhere/model"}, InputError, "there is no such folder"),
        ({"model": "nowhere.onnx"}, SpecError, "there is no such file"),
        ({"model": "torchvision/resnet19"}, InputError, "Did you mean 'resnet18'|Did you mean"),
        ({"model": "resnet20", "data": "mnits"}, InputError, "Did you mean 'mnist'"),
        ({"model": "resnet20", "dta": "mnist"}, SpecError, "no parameter 'dta'"),
        ({"model": "resnet20", "tokens": 0}, SpecError, "greater than or equal to 1"),
    ],
)
def test_what_names_nothing_is_refused_before_anything_runs(parameters, kind, message):
    with pytest.raises(kind, match=message):
        make(**parameters)


def test_every_source_has_a_class_and_a_line():
    for target, line in sources.TABLE.values():
        module, _, name = target.partition(":")
        assert hasattr(importlib.import_module(module), name)
        assert line


def write_table(folder: Path, suffix: str, columns: dict) -> str:
    path = folder / f"table{suffix}"
    if suffix == ".npz":
        np.savez(path, **columns)
    elif suffix == ".csv":
        rows = zip(*columns.values(), strict=True)
        path.write_text("\n".join([",".join(columns), *(",".join(map(str, row)) for row in rows)]))
    else:
        import pyarrow as pa
        from pyarrow import parquet

        parquet.write_table(pa.table({name: list(value) for name, value in columns.items()}), path)
    return path.name


COLUMNS = {"a": np.arange(6) / 2, "b": np.arange(6), "label": np.arange(6) % 2}


@pytest.mark.parametrize("suffix", [".npz", ".csv", ".parquet"])
def test_columns_of_numbers_are_the_features_of_a_model_with_one_input(here, suffix):
    task = make(model="ours:linear", data=write_table(here, suffix, COLUMNS))
    (batch,) = task.test().batches(10)
    assert batch.inputs["input"].tolist() == [[i / 2, i] for i in range(6)]
    assert batch.inputs["input"].dtype == torch.float32
    assert batch.targets["label"].tolist() == [0, 1] * 3
    assert said(task, "The columns a, b are the features, in this order.")
    assert task.data() == {}
    with pytest.raises(InputError, match=r"no column 'lable' for a target. Did you mean 'label'"):
        _ = make(model="ours:linear", data=f"table{suffix}", targets="lable").signature


def test_columns_named_as_the_model_names_its_inputs_are_these(here):
    columns = {"ids": np.arange(8).reshape(4, 2), "x": np.ones((4, 2)), "other": np.zeros(4), "y": [0, 1, 2, 0]}
    for suffix in (".npz", ".parquet"):
        task = make(model="ours:two", data=write_table(here, suffix, columns))
        ports = {port.name: (port.shape, port.dtype) for port in task.signature.inputs}
        assert ports["ids"] == ((2,), "int64")
        assert ports["x"] == ((2,), "float32")
        assert said(task, "no inputs are left out: other")
        (score,) = evaluate(task.model(0), task.test().batches(2), task.signature, task.metrics).values()
        assert 0 <= score <= 1
    ragged = {"ids": [[1, 2], [1]], "x": [[1.0, 1.0]] * 2, "y": [0, 1]}
    with pytest.raises(DataError, match="lists in column 'ids' differ in length"):
        _ = make(model="ours:two", data=write_table(here, ".parquet", ragged)).signature
    with pytest.raises(InputError, match="which of the columns p, q are inputs"):
        _ = make(model="ours:two", data=write_table(here, ".npz", {"p": np.ones(3), "q": np.ones(3)})).signature


def test_a_folder_of_tables_has_parts(here):
    (here / "set").mkdir()
    for part, size in (("train", 40), ("val", 4), ("test", 6)):
        np.savez(
            here / "set" / f"{part}.npz",
            x=np.random.default_rng(size).normal(size=(size, 2)),
            label=np.arange(size) % 2,
        )
    task = make(model="ours:linear", data="set", metric="f1")
    assert {part: split.size for part, split in task.data().items()} == {"train": 40, "validation": 4}
    assert task.test().size == 6
    assert task.finetuning().optimizer == "sgd"
    assert [metric.name for metric in task.metrics] == ["f1"]


def test_damaged_and_dangerous_tables_are_refused(here):
    (here / "broken.npz").write_bytes(b"PK\x03\x04 nothing")
    (here / "broken.parquet").write_bytes(b"PAR1")
    (here / "empty.csv").write_text("")
    np.savez(here / "pickled.npz", x=np.array([{"a": 1}], dtype=object), label=np.zeros(1))
    (here / "holes.csv").write_text("a,b,label\n1,2,0\n,3,1\n")
    for name, message in (
        ("broken.npz", "cannot be read as .npz"),
        ("broken.parquet", "cannot be read as .parquet"),
        ("empty.csv", "cannot be read as .csv"),
        ("pickled.npz", "cannot be read as .npz"),
        ("holes.csv", "the column 'a' has 1 empty values"),
    ):
        with pytest.raises(DataError, match=message):
            _ = make(model="ours:linear", data=name).signature
    assert "does not exist" in make(model="ours:linear", data="nowhere.npz").unavailable()


def test_a_folder_of_class_folders_is_read_with_the_size_that_is_given(here):
    from PIL import Image

    for part, count in (("val", 3), ("train", 60)):
        for name in ("cats", "dogs"):
            folder = here / "pets" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (20, 16), (200 if name == "cats" else 20, i, 0)).save(folder / f"{i}.png")
    task = make(model="ours:images", data="pets", input="1x3x12x12:float32")
    assert task.signature.inputs[0].shape == (3, 12, 12)
    test = task.test()
    assert torch.cat([batch.targets["label"] for batch in test.batches(4)]).tolist() == [0] * 3 + [1] * 3
    assert next(test.batches(1)).inputs["input"][0, 0, 0, 0] == pytest.approx(200 / 255)
    assert {part: split.size for part, split in task.data().items()} == {"train": 117, "validation": 3}
    with pytest.raises(DataError, match="the size of the images is not known"):
        _ = make(model="ours:images", data="pets").signature
    assert "There is no ImageNet" in make(model="ours:images", data="imagenet").unavailable()


def test_the_users_loaders_are_data_too():
    task = make(model="ours:linear", data="ours:loaders")
    assert task.test().size == 4
    assert list(task.data()) == ["validation"]
    assert said(task, "'val' is taken as 'validation'")


def test_hugging_faces_data_sets_need_their_package(here, monkeypatch):
    (here / "hf").mkdir()
    (here / "hf" / "dataset_info.json").write_text("{}")
    found = sets.find("hf")
    assert type(found).__name__ == "Dataset"
    if importlib.util.find_spec("datasets") is None:
        assert "pip install datasets" in found.unavailable()


@pytest.fixture
def linear_onnx(here) -> tuple[Path, nn.Module]:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    model = nn.Linear(2, 2).eval()
    weight, bias = (value.detach().numpy() for value in (model.weight, model.bias))
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Gemm", ["pixels", "w", "b"], ["scores"], transB=1)],
        "linear",
        [onnx.helper.make_tensor_value_info("pixels", onnx.TensorProto.FLOAT, ["n", 2])],
        [onnx.helper.make_tensor_value_info("scores", onnx.TensorProto.FLOAT, ["n", 2])],
        [onnx.numpy_helper.from_array(weight, "w"), onnx.numpy_helper.from_array(bias, "b")],
    )
    path = here / "linear.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10), path)
    return path, model


def test_an_onnx_file_is_a_model_by_its_bytes(here, linear_onnx):
    path, model = linear_onnx
    task = make(model="linear.onnx", data=write_table(here, ".npz", COLUMNS))
    assert task.signature.inputs == (Port(name="pixels", shape=(2,)),)
    assert task.signature.outputs == (Port(name="scores", shape=(2,)),)
    assert task.recipe() is None
    assert said(task, "is an ONNX file")
    (batch,) = task.test().batches(10)
    stored = modelfile.load(modelfile.save(task.model(0), here / "stored.pt"))
    for network in (task.model(0), stored):
        assert network.artifact.read_bytes() == path.read_bytes()
        with evaluating(network):
            outputs = call(network, batch.inputs, task.signature)
        torch.testing.assert_close(outputs["scores"], model(batch.inputs["pixels"]).detach())
    trainable, file = (make(model=name, data="ours:training") for name in ("ours:linear", "linear.onnx"))
    assert trainable.finetuning() is not None
    assert file.finetuning() is None
    with pytest.raises(InputError, match="'pixels' is bool; the model takes float32"):
        _ = make(model="linear.onnx", data=write_table(here, ".npz", {"x": np.ones((2, 2), bool)})).signature


def test_an_onnx_file_writes_nowhere_but_into_the_cache(here, linear_onnx):
    network = make(model="linear.onnx").model(0)
    network.names = ["../../escaped.onnx"]
    assert network.artifact.parent.is_relative_to(here / "home")
    assert not (here / "escaped.onnx").exists()


@pytest.fixture
def program(here) -> tuple[Path, nn.Module]:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10)).eval()
    count = torch.export.Dim("n")
    exported = torch.export.export(model, (torch.zeros(2, 1, 8, 8),), dynamic_shapes=({0: count},))
    torch.export.save(exported, here / "program.pt2")
    return here / "program.pt2", model


def test_a_program_of_torch_export_is_a_model(here, program):
    _, model = program
    task = make(model="program.pt2", data="digits")
    assert task.signature.batch is None
    (batch,) = task.test().batches(400)
    stored = modelfile.load(modelfile.save(task.model(0), here / "stored.pt"))
    for network in (task.model(0), stored):
        with evaluating(network):
            found = call(network, batch.inputs, task.signature)["output"]
        torch.testing.assert_close(found, model(batch.inputs["input"]).detach())


def rewritten(path: Path, change) -> str:
    """The program with its graph changed, as somebody who means harm would."""
    import json
    import zipfile

    target = path.with_name("changed.pt2")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as archive:
        for entry in source.infolist():
            content = source.read(entry)
            name = entry.filename
            if name.endswith("models/model.json"):
                content = change(json.loads(content))
                content = json.dumps(content).encode() if not isinstance(content, bytes) else content
            archive.writestr(name, content)
    return target.name


def with_size(text: str):
    def change(graph):
        for value in graph["graph_module"]["graph"]["tensor_values"].values():
            for size in value["sizes"]:
                if "as_expr" in size:
                    size["as_expr"]["expr_str"] = text
        return graph

    return change


def with_target(text: str):
    def change(graph):
        graph["graph_module"]["graph"]["nodes"][0]["target"] = text
        return graph

    return change


def with_name(text: str):
    def change(graph):
        graph["graph_module"]["graph"]["nodes"][0]["name"] = text
        return graph

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_size("__import__('pathlib').Path('ran').touch()"), "is no size"),
        (with_size("Symbol('s0', positive=True) + open('ran', 'w')"), "is no size"),
        (with_size("1" * 900 + "!"), "is no size"),
        (with_target("torch.hub.load"), "calls 'torch.hub.load'"),
        (with_target("os.system"), "calls 'os.system'"),
        (with_name("x = open('ran', 'w')"), "is no name"),
        (lambda graph: b"[" * 100_000, "is no program"),
        (lambda graph: b"not json", "is no program"),
    ],
)
def test_a_program_that_would_do_more_than_compute_is_refused(here, program, change, message):
    name = rewritten(program[0], change)
    with pytest.raises(DataError, match=message):
        _ = make(model=name).signature
    assert not (here / "ran").exists()


def test_pickles_in_a_program_are_read_as_tensors_only(here, program):
    import io
    import zipfile

    class Evil:
        def __reduce__(self):
            return (Path.touch, (here / "ran",))

    changed = here / "pickled.pt2"
    stream = io.BytesIO()
    torch.save(Evil(), stream)
    with zipfile.ZipFile(program[0]) as source, zipfile.ZipFile(changed, "w") as archive:
        for entry in source.infolist():
            evil = "sample_inputs" in entry.filename
            archive.writestr(entry.filename, stream.getvalue() if evil else source.read(entry))
    with pytest.raises(DataError, match=r"is no program of torch\.export"):
        _ = make(model="pickled.pt2").signature
    assert not (here / "ran").exists()


def test_timms_models_come_with_their_preprocessing_and_say_that_their_weights_are_random():
    pytest.importorskip("timm")
    task = make(model="timm/mobilenetv3_small_050.lamb_in1k")
    assert task.unavailable() is None
    assert task.signature.inputs == (Port(name="x", shape=(3, 224, 224)),)
    assert task.signature.outputs[0].shape == (1000,)
    with pytest.raises(Unavailable, match="is not in the hub's cache"):
        task.test()
    assert said(task, "weights are random")
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert 0.1 < task.model(0)(x).std() < 10
    with pytest.raises(InputError, match=r"timm has no model 'resnet19'. Near it: "):
        _ = make(model="timm/resnet19").signature
    with pytest.raises(InputError, match=r"Did you mean 'resnet18.a1_in1k'"):
        _ = make(model="timm/resnet18.a1_in").signature


def test_without_their_packages_sources_give_the_install_line(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    for model, extra in (("timm/resnet18", "timm"), ("transformers/x", "text"), ("torchvision/resnet18", "vision")):
        assert f'pip install "assay-bench[{extra}]"' in make(model=model).unavailable()


@pytest.fixture
def bert(here) -> Path:
    """A small BERT with a head, with random weights and a tokenizer of few words."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=12,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=3,
        max_position_embeddings=16,
    )
    folder = here / "bert"
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b", "c", "d", "e", "f", "g"]
    (folder / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def test_a_folder_of_transformers_is_a_model_whose_texts_are_tokenized(here, bert):
    columns = {"sentence": ["a b c", "d e", "f g a b"], "label": [0, 1, 2]}
    task = make(model="bert", data=write_table(here, ".csv", columns), tokens=8)
    assert [(port.name, port.shape) for port in task.signature.inputs] == [
        ("input_ids", ("tokens",)),
        ("attention_mask", ("tokens",)),
    ]
    assert [(port.name, port.shape) for port in task.signature.outputs] == [("logits", (3,))]
    assert task.workload.sizes == {"tokens": 8}
    (batch,) = task.test().batches(3)
    assert batch.inputs["attention_mask"].tolist() == [[1] * 5 + [0] * 3, [1] * 4 + [0] * 4, [1] * 6 + [0] * 2]
    assert said(task, "tokenized, cut and filled to 8 tokens")
    assert [metric.name for metric in task.metrics] == ["accuracy"]
    with evaluating(task.model(0)) as model:
        expected = model(input_ids=batch.inputs["input_ids"][:1, :5]).logits
        found = call(model, batch.inputs, task.signature)["logits"][:1]
    torch.testing.assert_close(found, expected)
    assert make(model=f"transformers/{bert}").signature.outputs == task.signature.outputs


def test_a_causal_model_generates_in_two_phases(here):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=12,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=8,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(here / "llama")
    task = make(model="llama", tokens=6)
    assert [(port.name, port.shape, port.values) for port in task.signature.inputs] == [("input_ids", ("tokens",), 12)]
    assert [(port.name, port.shape) for port in task.signature.outputs] == [("logits", ("tokens", 12))]
    assert [name for name, _ in task.workload.phases] == ["prefill", "decode"]
    assert task.workload.sizes == {"tokens": 6}
    assert task.workload.unit == "token"


def test_a_folder_whose_model_is_unknown_or_damaged_is_refused(here, bert):
    config = (bert / "config.json").read_text()
    (bert / "config.json").write_text(config.replace("BertForSequenceClassification", "OursForNothing"))
    with pytest.raises(DataError, match="no class 'OursForNothing'"):
        _ = make(model="bert").signature
    (bert / "config.json").write_text(config)
    (bert / "model.safetensors").write_bytes(b"\0" * 20)
    with pytest.raises(DataError, match="transformers cannot load it"):
        _ = make(model="bert").signature
    with pytest.raises(InputError, match="the hub's cache has no model of that name"):
        _ = make(model="transformers/nobody/nothing").signature


def test_registered_and_made_the_same_way():
    assert "pair" in registry.table("task")
    assert make(model="resnet20", data="mnist").resolved_parameters() == {"model": "resnet20", "data": "mnist"}


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("acuracy", "Did you mean 'accuracy'"),
        ({"name": "accuracy", "k": 0}, "k: Input should be greater"),
        (["accuracy", {"name": "f1", "avrage": "macro"}], "no parameter 'avrage'"),
        ("os:getcwd", "a module of Python itself"),
        (3, "A metric is a name"),
    ],
)
def test_a_metric_that_is_none_is_refused_before_anything_is_made(metric, message):
    with pytest.raises(InputError, match=message):
        tasks.create("pair", {"model": "resnet20", "data": "mnist", "metric": metric})
