from __future__ import annotations

import sys
import textwrap

import numpy as np
import pytest
import torch

from harness import tasks
from harness.calling import call, evaluating
from harness.contracts import Port, Recipe, Task
from harness.errors import InputError, SpecError, Unavailable
from harness.tasks import user
from harness.training import SGDTrainer

MODULE = """
import itertools, random
import numpy as np, torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from harness.contracts import Recipe

def linear():
    return nn.Linear(4, 3).train()

def examples(n, first=0):
    x = torch.arange(first, first + n * 4, dtype=torch.float32).reshape(n, 4)
    return TensorDataset(x, torch.arange(n) % 3)

def only_model():
    return linear()

def with_attribute():
    model = linear()
    model.input_shape = (4,)
    return model

def takes_shape(input_shape):
    assert input_shape == [4]
    return linear()

def everything(n=10, workers=0):
    loaders = {
        "train": DataLoader(examples(n), batch_size=4, shuffle=True),
        "validation": DataLoader(examples(5, 100), batch_size=2),
        "test": DataLoader(examples(7, 200), batch_size=3),
    }
    return linear(), loaders, Recipe(epochs=1, batch_size=4, lr=1e-6)

def test_generator():
    return linear(), {"test": ((np.full((2, 4), i, dtype=np.uint8), np.array([0, 1])) for i in range(3))}

def test_shuffled(own=False):
    generator = torch.Generator() if own else None
    return linear(), {"test": DataLoader(examples(7, 200), batch_size=3, shuffle=True, generator=generator)}

def no_test(): return linear(), {"train": [(np.zeros((2, 4), np.float32), [0, 1])]}
def breaks(): raise RuntimeError("the weights are gone")
def returns_text(): return "a model"
def returns_wrong_key(): return linear(), {"tests": []}
def returns_two(): return linear(), {"val": [], "valid": []}
def returns_list(): return linear(), []
def returns_number(): return linear(), {"test": 5}
def recipe_without_train(): return linear(), {"test": []}, Recipe(epochs=1)
def recipe_is_a_dict(): return linear(), {"train": []}, {"epochs": 1}
def mapping_key(): return {"model": linear(), "loaders": {}}
def bad_workload(): return {"model": linear(), "workload": {"phase": 1}}
def no_targets(): return linear(), {"test": [torch.zeros(2, 4)]}
def bad_lengths(): return linear(), {"test": [(torch.zeros(2, 4), torch.zeros(3, dtype=torch.int64))]}
def scalar(): return linear(), {"test": [(torch.zeros(2, 4), 1)]}
def empty_test(): return linear(), {"test": []}
def only_empty_batches(): return linear(), {"test": [(torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))]}
def ragged(): return linear(), {"test": [(torch.zeros(2, 4), [0, 1]), (torch.zeros(2, 5), [0, 1])]}
def has_nan(): return linear(), {"test": [(torch.full((2, 4), torch.nan), [0, 1])]}
def is_complex(): return linear(), {"test": [(torch.zeros(2, 4, dtype=torch.complex64), [0, 1])]}
def is_text(): return linear(), {"test": [(torch.zeros(2, 4), np.array(["a", "b"]))]}
def is_sparse(): return linear(), {"test": [(torch.zeros(2, 4).to_sparse(), [0, 1])]}
def too_many(): return linear(), {"test": [(torch.zeros(2, 4), torch.zeros(2, 4), [0, 1])]}

class Endless(IterableDataset):
    def __iter__(self):
        return iter(lambda: (torch.zeros(4), 1), None)

def endless(): return linear(), {"train": DataLoader(Endless(), 64), "test": [(torch.zeros(2, 4), [0, 1])]}
def cycle(): return linear(), {"train": itertools.cycle([(torch.zeros(2, 4), [0, 1])])}

def breaking_batches():
    yield torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
    raise OSError("disk gone")

class Breaking:
    def __iter__(self): return breaking_batches()

def bad_loader(): return linear(), {"test": Breaking()}

class Noise:
    def __iter__(self):
        for _ in range(3):
            x = torch.rand(2, 4) + float(np.random.rand()) + random.random()
            yield x, [0, 1]

def noise(): return linear(), {"test": Noise()}

class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, x, z, labels=None, scale=1.0):
        y = self.a(x) + self.b(z) * scale
        return {"logits": y, "hidden": x, "note": None}

def two(form):
    x, z, y = torch.randn(6, 4), torch.randn(6, 2), torch.arange(6) % 3
    batch = {
        "nested": ((x, z), y), "flat": (x, z, y), "dict": {"z": z, "labels": y, "x": x, "id": y},
        "inner": ({"x": x, "z": z}, y), "arrays": (x.numpy(), z.numpy(), y.numpy()),
        "target dict": ({"x": x, "z": z}, {"y": y}),
    }[form]
    return Two(), {"test": [batch]}

class Ids(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(50, 4), nn.Linear(4, 3)

    def forward(self, ids):
        return self.head(self.embedding(ids).mean(1))

def ids(lengths=(7,), kind="int64"):
    dtype = getattr(torch, kind)
    batches = [(torch.randint(0, 50, (4, n)).to(dtype), torch.arange(4) % 3) for n in lengths]
    return Ids(), {"test": batches, "train": batches[:1]}

class Shape(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind, self.head = kind, nn.Linear(4, 3)

    def forward(self, x):
        y = self.head(x)
        if self.kind == "batch of one":
            return y.view(1, 3)
        return {
            "classes": y.argmax(1), "none": None, "numpy": y.detach().numpy(), "number": 3,
            "scalar": y.mean(), "text": "yes", "mixed": (y.argmax(1), y, "yes"), "nested": ((y, y), y),
        }[self.kind]

def shape(kind):
    return Shape(kind), {"test": [(torch.zeros(5, 4), torch.arange(5) % 3)]}

def half(kind, inputs="float32"):
    model = linear().to(getattr(torch, kind))
    return model, {"test": [(torch.zeros(2, 4).to(getattr(torch, inputs)), [0, 1])]}

def targets(kind):
    x = torch.randn(8, 4)
    width, y = {
        "classes": (3, torch.arange(8) % 3), "logit": (1, torch.arange(8) % 2),
        "value": (1, torch.randn(8)), "values": (3, torch.randn(8, 3)), "beyond": (3, torch.arange(8) % 4),
    }[kind]
    return nn.Linear(4, width), {"train": [(x, y)], "test": [(x, y)]}

class Language(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 4)

    def forward(self, input_ids):
        return self.embedding(input_ids) @ self.embedding.weight.T

def language():
    ids = torch.randint(0, 11, (5, 6))
    return Language(), {"train": [{"input_ids": ids, "labels": ids}], "test": [{"input_ids": ids, "labels": ids}]}

def given(**changes):
    y = torch.arange(8) % 3
    y[0] = -1
    batch = (torch.randn(8, 4), y)
    return {
        "model": nn.Linear(4, 3), "data": {"train": [batch], "val": DataLoader(TensorDataset(*batch)), "test": batch},
        "finetune": Recipe(epochs=1, batch_size=2, lr=0.5), "loss": nn.CrossEntropyLoss(ignore_index=-1),
        "metrics": [{"name": "accuracy", "ignore": [-1]}, "f1"], "workload": {"unit": "example"},
    }

def own_loss(single=True):
    def of_two(output, target):
        return (output - target).abs().mean()
    def of_mappings(outputs, targets):
        return (outputs["logits"].sum() - targets["label"].sum()).abs()
    if single:
        return {"model": linear(), "data": {"train": [(torch.zeros(2, 4), torch.zeros(2, 3))]}, "loss": of_two}
    model, data = two("flat")
    return {"model": model, "data": {"train": data["test"]}, "loss": of_mappings, "metrics": "accuracy"}

def bad_loss(): return {"model": linear(), "data": {"train": [(torch.zeros(2, 4), [0, 1])]}, "loss": lambda a, b: a}
def example(): return {"model": Two(), "example": (torch.zeros(1, 4), torch.zeros(1, 2))}
def epochs_0(): return linear(), {"train": examples(40)}, Recipe(epochs=0, batch_size=10, lr=0.25)

class Counting(nn.Linear):
    def forward(self, x):
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x)

def counting(): return Counting(4, 3), {"test": [(torch.zeros(2, 4), [0, 1])]}

def pruned():
    from torch.nn.utils import prune
    model = linear()
    prune.l1_unstructured(model, "weight", 0.5)
    return model, {"test": [(torch.zeros(2, 4), [0, 1])]}

not_a_function = 3
"""


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(MODULE)
    (tmp_path / "broken.py").write_text("raise ValueError('no such GPU')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    user._assembled.cache_clear()
    yield tmp_path
    sys.modules.pop("mine", None)
    sys.modules.pop("broken", None)


def make(function: str, **parameters):
    return tasks.create(f"mine:{function}", parameters)


def inputs(split, size=3, **options):
    return torch.cat([next(iter(batch.inputs.values())) for batch in split.batches(size, **options)])


def names(metrics):
    return [metric.name for metric in metrics]


def said(task, part: str) -> bool:
    return any(part in note for note in task.notes())


def test_a_module_in_the_current_directory_is_a_task():
    task = make("everything", n=6)
    assert isinstance(task, Task)
    assert task.name == "mine:everything"
    assert task.unavailable() is None
    assert task.signature.inputs == (Port(name="input", shape=(4,)),)
    assert task.signature.outputs == (Port(name="output", shape=(3,)),)
    assert task.recipe() == task.finetuning() == Recipe(epochs=1, batch_size=4, lr=1e-6)
    assert {part: split.size for part, split in task.data().items()} == {"train": 6, "validation": 5}


def test_the_model_is_a_fresh_copy_in_evaluation_mode():
    task = make("everything")
    first, second = task.model(0), task.model(1)
    assert not first.training
    assert first is not second
    with torch.no_grad():
        first.weight.zero_()
    assert second.weight.abs().sum() > 0
    assert torch.equal(task.model(0).weight, second.weight)


def test_the_model_stays_as_it_was_given_while_it_is_tried():
    task = make("counting")
    assert task.signature.batch is None
    assert task.metrics
    assert not hasattr(task.model(0), "calls")


def test_test_batches_are_cut_and_joined_in_order():
    test = make("everything").test()
    for size in (1, 2, 3, 5, 7, 100):
        parts = list(test.batches(size))
        assert [len(batch) for batch in parts][:-1] == [size] * (len(parts) - 1)
        x = torch.cat([batch.inputs["input"] for batch in parts])
        assert x.dtype == torch.float32
        assert torch.equal(x.ravel(), torch.arange(200.0, 228.0))
        assert torch.cat([batch.targets["label"] for batch in parts]).tolist() == [0, 1, 2, 0, 1, 2, 0]
    assert test.size == 7


def test_a_shuffling_loader_repeats_with_the_seed_and_leaves_the_global_state_alone():
    train = make("everything").data()["train"]
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    first = inputs(train, 4, seed=1)
    assert torch.equal(torch.rand(2), expected)
    assert torch.equal(first, inputs(train, 3, seed=1))
    assert not torch.equal(first, inputs(train, 4, seed=2))
    assert sorted(first[:, 0].tolist()) == [4.0 * i for i in range(10)]


@pytest.mark.parametrize("own", [False, True])
def test_a_shuffled_test_set_keeps_one_order(own):
    test = make("test_shuffled", own=own).test()
    assert torch.equal(inputs(test), inputs(test))
    assert test.identity == make("test_shuffled", own=own).test().identity


def test_random_numbers_of_all_three_kinds_repeat():
    test = make("noise").test()
    assert torch.equal(inputs(test), inputs(test))
    np.random.seed(3)
    expected = np.random.rand()
    np.random.seed(3)
    assert torch.equal(inputs(test, seed=1), inputs(test, seed=1))
    assert np.random.rand() == expected
    assert not torch.equal(inputs(test), inputs(test, seed=1))


def test_the_recipe_trains_it():
    task = make("everything")
    model = task.model(0)
    before = model.weight.detach().clone()
    trainer = SGDTrainer(data=task.data(), signature=task.signature, loss=task.loss, metrics=task.metrics, seed=0)
    metrics = trainer(model, task.recipe())
    assert not torch.equal(model.weight, before)
    assert 0 <= metrics["validation_accuracy"] <= 1


def test_a_trained_model_is_fine_tuned_by_a_careful_recipe_that_is_said():
    task = make("targets", kind="classes")
    assert task.recipe() is None
    recipe = task.finetuning()
    assert (recipe.optimizer, recipe.lr, recipe.momentum, recipe.batch_size) == ("sgd", 0.01, 0.9, 8)
    assert said(task, "default recipe: sgd, lr 0.01, batches of 8")
    words = make("ids").finetuning()
    assert (words.optimizer, words.lr) == ("adamw", 2e-4)


def test_a_recipe_without_epochs_means_a_trained_model():
    task = make("epochs_0")
    assert task.recipe() is None
    assert (task.finetuning().lr, task.finetuning().batch_size) == (0.25, 10)
    assert task.data()["train"].size == 40  # a data set is read like a loader


def test_all_can_be_given():
    task = make("given")
    assert task.recipe() is None
    assert task.finetuning() == Recipe(epochs=1, batch_size=2, lr=0.5)
    assert names(task.metrics) == ["accuracy", "f1"]
    assert task.metrics[0].ignore == (-1,)
    assert said(task, "'val' is taken as 'validation'")
    assert task.data()["validation"].size == 8
    batch = next(task.test().batches(8))
    outputs = call(task.model(0), batch.inputs, task.signature)
    expected = torch.nn.functional.cross_entropy(outputs["output"], batch.targets["label"], ignore_index=-1)
    assert task.loss(outputs, batch.targets) == expected
    with pytest.raises(InputError, match="no label smoothing"):
        task.loss(outputs, batch.targets, 0.1)


def test_a_loss_of_ones_own_gets_tensors_or_the_mappings_of_several():
    for single in (True, False):
        task = make("own_loss", single=single)
        (batch,) = task.data()["train"].batches(6)
        loss = task.loss(call(task.model(0), batch.inputs, task.signature), batch.targets)
        assert loss.ndim == 0
        assert loss.requires_grad
    task = make("bad_loss")
    (batch,) = task.data()["train"].batches(6)
    with pytest.raises(InputError, match=r"mine:bad_loss.*must be one number.*of shape \(2, 3\)"):
        task.loss(call(task.model(0), batch.inputs, task.signature), batch.targets)


@pytest.mark.parametrize(
    ("kind", "loss", "metrics"),
    [
        ("classes", "CrossEntropy", ["accuracy"]),
        ("logit", "BinaryCrossEntropy", ["accuracy"]),
        ("value", "MeanSquaredError", ["rmse"]),
        ("values", "MeanSquaredError", ["rmse"]),
    ],
)
def test_loss_and_metrics_are_inferred_from_the_targets_and_said(kind, loss, metrics):
    task = make("targets", kind=kind)
    assert type(task._assembly().scoring.loss).__name__ == loss
    assert names(task.metrics) == metrics
    assert ("mean-kl" in names(task.fidelity)) == (metrics == ["accuracy"])
    assert said(task, "Inferred from")
    (batch,) = task.test().batches(8)
    outputs = call(task.model(0), batch.inputs, task.signature)
    value = task.loss(outputs, batch.targets)
    assert torch.isfinite(value)
    assert value.requires_grad


def test_tokens_with_scores_of_a_vocabulary_are_a_language_model():
    task = make("language")
    assert names(task.metrics) == ["perplexity"]
    assert task.signature.inputs == (Port(name="input_ids", shape=(6,), dtype="int64", values=11),)
    (batch,) = task.test().batches(5)
    with evaluating(task.model(0)) as model:
        outputs = call(model, batch.inputs, task.signature)
    scores = task.metrics[0].score({"output": outputs["output"].numpy()}, {"label": batch.targets["label"].numpy()})
    assert task.metrics[0].value(scores) == pytest.approx(task.loss(outputs, batch.targets).exp().item(), rel=1e-5)


def test_labels_that_do_not_fit_are_refused_with_the_loader():
    task = make("targets", kind="beyond")
    with pytest.raises(InputError, match=r"mine:targets.*loader 'test'.*labels hold 3.*0 to 2"):
        _ = task.metrics


@pytest.mark.parametrize("form", ["nested", "flat", "dict", "inner", "arrays", "target dict"])
def test_batches_of_several_inputs_are_understood(form):
    task = make("two", form=form)
    ports = {port.name: port.shape for port in task.signature.inputs}
    assert ports == {"x": (4,), "z": (2,)}
    assert {port.name: port.shape for port in task.signature.outputs} == {"logits": (3,), "hidden": (4,)}
    assert names(task.metrics) == ["accuracy"]
    (batch,) = task.test().batches(6)
    assert batch.targets["label"].tolist() == [0, 1, 2, 0, 1, 2]
    with evaluating(task.model(0)) as model:
        expected = model(batch.inputs["x"], batch.inputs["z"])["logits"]
        assert torch.equal(call(model, batch.inputs, task.signature)["logits"], expected)


@pytest.mark.parametrize("kind", ["int64", "int32", "uint8", "int16"])
def test_integers_stay_what_they_are_where_the_model_takes_them(kind):
    if kind in ("uint8", "int16"):  # torch's embedding takes neither, nor floats
        with pytest.raises(InputError, match=rf"ids \(7,\) {kind} the model raised RuntimeError"):
            _ = make("ids", kind=kind).signature
        return
    task = make("ids", kind=kind)
    assert task.signature.inputs[0].dtype == kind
    assert task.test().batches(2).__next__().inputs["ids"].dtype == getattr(torch, kind)


def test_integers_become_floats_only_where_the_model_takes_none_and_that_is_said():
    task = make("test_generator")
    assert task.signature.inputs[0].dtype == "float32"
    assert said(task, "integers and become float32")
    assert inputs(task.test())[:, 0].tolist() == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("kind", ["bfloat16", "float16", "float64"])
def test_models_in_other_floats_are_converted_and_that_is_said(kind):
    task = make("half", kind=kind, inputs=kind)
    assert {p.dtype for p in task.model(0).parameters()} == {torch.float32}
    assert said(task, f"The model came in {kind}; it is converted to float32.")
    assert said(task, f"'input' ({kind}) are converted to float32")
    assert inputs(task.test()).dtype == torch.float32
    assert not said(make("half", kind="float32"), "converted")


def test_masks_of_torch_are_baked_in_and_that_is_said():
    task = make("pruned")
    assert "weight" in dict(task.model(0).named_parameters())
    assert int((task.model(0).weight == 0).sum()) == 6
    assert said(task, "pruned with torch.nn.utils.prune")


def test_a_model_that_takes_one_example_at_a_time_is_found_out_and_said():
    task = make("shape", kind="batch of one")
    assert task.signature.batch == 1
    assert said(task, "takes one example at a time")
    assert make("shape", kind="mixed").signature.batch is None


def test_outputs_that_are_no_scores_are_left_out_and_said():
    task = make("shape", kind="mixed")
    assert [port.name for port in task.signature.outputs] == ["output1"]
    assert said(task, "The output 'output' (int64 (2,)) is left out.")
    assert said(task, "The output 'output2' (str) is left out.")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("classes", "returned 'output': int64 (2,)"),
        ("none", "returned None"),
        ("numpy", "returned 'output': ndarray"),
        ("number", "returned 'output': int"),
        ("scalar", "returned 'output': float32 ()"),
        ("text", "returned 'output': str"),
    ],
)
def test_outputs_that_cannot_be_scored_are_refused_with_what_is_allowed(kind, message):
    with pytest.raises(InputError) as caught:
        _ = make("shape", kind=kind).signature
    for part in ("mine:shape", message, "Allowed are float tensors"):
        assert part in str(caught.value)


def test_sequences_of_different_lengths_make_an_axis_vary():
    task = make("ids", lengths=[7, 7, 5])
    assert task.signature.inputs[0].shape == ("tokens",)
    assert task.signature.outputs[0].shape == (3,)
    assert task.workload.sizes == {"tokens": 7}
    assert said(task, "differ in length")
    assert [tuple(batch.inputs["ids"].shape) for batch in task.test().batches(6)] == [(6, 7), (2, 7), (4, 5)]
    assert make("ids", lengths=[7]).signature.inputs[0].shape == (7,)


def test_a_generator_is_kept():
    task = make("test_generator")
    assert task.data() == {}
    for _ in range(2):
        assert [batch.inputs["input"][0, 0] for batch in task.test().batches(2)] == [0, 1, 2]


def test_a_model_alone_has_latency_only():
    task = make("only_model", input_shape=[4])
    assert task.signature.inputs[0].shape == (4,)
    assert (task.data(), task.dataset_hash(), task.recipe(), task.finetuning(), task.metrics) == (
        {},
        None,
        None,
        None,
        (),
    )
    with pytest.raises(Unavailable, match="no 'test' loader"):
        task.test()
    with pytest.raises(InputError, match="no loss"):
        task.loss({}, {})
    assert make("takes_shape", input_shape=[4]).signature.inputs[0].shape == (4,)
    assert make("with_attribute").signature.inputs[0].shape == (4,)
    with pytest.raises(Unavailable, match="no 'test' loader"):
        make("no_test").test()


def test_inputs_are_described_in_words_or_by_an_example():
    task = make("only_model", input="2x4")
    assert task.signature.inputs == (Port(name="input", shape=(4,)),)
    assert [port.name for port in make("example").signature.inputs] == ["x", "z"]
    with pytest.raises(InputError, match=r"'4 by 4' is not understood|'by' is not understood"):
        _ = make("only_model", input="4 by 4").signature
    with pytest.raises(InputError, match=r"float23.*Did you mean 'float32'"):
        _ = make("only_model", input="1x4:float23").signature


@pytest.mark.parametrize("shape", [None, [], [0], "4", [2.5]])
def test_a_shape_that_is_not_known_is_asked_for(shape):
    task = make("only_model", **({} if shape is None else {"input_shape": shape}))
    with pytest.raises(InputError, match=r"mine:only_model.*input_shape = \["):
        _ = task.signature


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing_module:f", "there is no module 'missing_module'"),
        ("broken:f", "importing 'broken' raised ValueError: no such GPU"),
        ("mine:everythin", "has no 'everythin'. Did you mean 'everything'"),
        ("mine:not_a_function", "is int, not a function"),
    ],
)
def test_a_target_that_cannot_be_used_is_refused_at_once(name, message):
    with pytest.raises(InputError) as caught:
        tasks.create(name, {})
    assert name in str(caught.value)
    assert message in str(caught.value)


def test_parameters_must_fit_the_function():
    with pytest.raises(SpecError, match=r"mine:everything.*'m'.*The function takes: n, workers"):
        make("everything", m=1)
    with pytest.raises(SpecError, match=r"missing a required argument: 'input_shape'"):
        make("takes_shape")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("breaks", "raised RuntimeError: the weights are gone"),
        ("returns_text", "it returned (str)"),
        ("returns_wrong_key", "loader 'tests'. Did you mean 'test'"),
        ("returns_two", "two loaders for validation"),
        ("returns_list", "must be a mapping"),
        ("returns_number", "cannot be iterated over"),
        ("recipe_without_train", "no 'train' loader"),
        ("recipe_is_a_dict", "must be a harness.contracts.Recipe; it is dict"),
        ("mapping_key", "returned 'loaders'. Did you mean"),
        ("bad_workload", "workload must be"),
        ("no_targets", "the loader 'test' has no targets"),
        ("bad_lengths", "the first axis of every input and target is the example"),
        ("scalar", "the first axis of every input and target is the example"),
        ("empty_test", "has no examples"),
        ("only_empty_batches", "has no examples"),
        ("bad_loader", "the loader 'test': reading batch 1 raised OSError: disk gone"),
        ("ragged", "batch 1 of the loader 'test' has examples of shape input (5,)"),
        ("has_nan", "batch 0 of the loader 'test': input 'input' holds NaN"),
        ("is_complex", "is complex"),
        ("is_text", "target 'label' is no array of numbers but of <U1"),
        ("is_sparse", "Give a dense tensor"),
        ("too_many", "has 2 inputs, and forward takes 1 (input)"),
    ],
)
def test_what_the_function_does_wrong_is_said_with_its_name(function, message):
    task = make(function)

    def use() -> None:
        task.model(0)
        _ = task.signature
        list(task.test().batches(1))

    with pytest.raises(InputError) as caught:
        use()
    assert f"mine:{function}" in str(caught.value)
    assert message in str(caught.value)


def test_an_endless_loader_ends_with_the_settings_that_would_let_it_go_on(monkeypatch):
    monkeypatch.setenv("ASSAY_LOADER_EXAMPLES", "1000")
    train = make("endless").data()["train"]
    message = r"loader 'train' has no length.*ASSAY_LOADER_EXAMPLES \(now 1000\)"
    with pytest.raises(InputError, match=message):
        _ = train.size
    with pytest.raises(InputError, match=message):
        make("cycle").data()
    monkeypatch.setattr("harness.tasks.user_data._KEPT_BYTES", 10_000)
    with pytest.raises(InputError, match="the loader 'train' is an iterator: its batches are kept"):
        make("cycle").data()


def test_a_users_own_task_class_is_built_like_a_registered_one(here):
    (here / "mine.py").write_text(
        textwrap.dedent(
            """
            from pydantic.dataclasses import dataclass

            @dataclass(frozen=True, kw_only=True)
            class Own:
                width: int = 3

                def model(self, seed): ...
                def data(self): ...
                def test(self): ...
            """
        )
    )
    assert tasks.create("mine:Own", {"width": 5}).width == 5
    with pytest.raises(SpecError, match=r"no parameter 'widht'. Did you mean 'width'"):
        tasks.create("mine:Own", {"widht": 5})
