"""Prefill and decode: every runtime generates what transformers' generate() does, and scores whole prompts as torch."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from hardware.decoding import Generation  # noqa: E402  (after the check that transformers is there)
from hardware.onnxruntime_cpu import OnnxRuntime  # noqa: E402
from hardware.openvino_cpu import OpenVino  # noqa: E402
from hardware.torch_cpu import Torch  # noqa: E402
from harness.contracts import Hardware, Port, Signature  # noqa: E402
from harness.errors import InputError, Unsupported  # noqa: E402

RUNTIMES: dict[str, Hardware] = {"torch": Torch(), "onnxruntime": OnnxRuntime(), "openvino": OpenVino()}
PHASES = ("prefill", "decode")
VOCABULARY, PROMPT, NEW = 97, 16, 32
IDS = Port(name="input_ids", shape=("tokens",), dtype="int64", values=VOCABULARY)
MASK = Port(name="attention_mask", shape=("tokens",), dtype="int64", values=2)
LOGITS = Port(name="scores", shape=("tokens", VOCABULARY))
PLAIN = Signature(inputs=(IDS,), outputs=(LOGITS,))
MASKED = Signature(inputs=(IDS, MASK), outputs=(LOGITS,))


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model() -> Any:
    """Grouped queries and tied embeddings, at random."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval()


def prompts() -> dict[str, Tensor]:
    """Two prompts, one of them padded on the left."""
    ids = torch.randint(1, VOCABULARY, (2, PROMPT), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.fixture(scope="module")
def artifacts(model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One file for both ONNX runtimes: the export takes a while."""
    example = {name: value for name, value in prompts().items() if name == "input_ids"}
    made = {"torch": Torch().build(model, PLAIN, example, tmp_path_factory.mktemp("torch"), PHASES)}
    builder = next((h for h in (RUNTIMES["onnxruntime"], RUNTIMES["openvino"]) if h.unavailable() is None), None)
    if builder is not None:
        path = builder.build(model, PLAIN, example, tmp_path_factory.mktemp("onnx"), PHASES)
        made |= {"onnxruntime": path, "openvino": path}
    return made


@pytest.mark.parametrize("name", RUNTIMES)
@pytest.mark.parametrize("signature", [PLAIN, MASKED], ids=["plain", "padded"])
def test_greedy_tokens_are_those_of_generate(
    name: str, signature: Signature, model: Any, artifacts: dict[str, Path]
) -> None:
    if reason := RUNTIMES[name].unavailable():
        pytest.skip(reason)
    inputs = {port.name: prompts()[port.name] for port in signature.inputs}
    with torch.no_grad():
        expected = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[:, PROMPT:].numpy()
        whole = model(**inputs).logits.numpy()
    arrays = {key: value.numpy() for key, value in inputs.items()}
    deployed: Any = RUNTIMES[name].load(artifacts[name], signature=signature, inputs=arrays, threads=1)
    with pytest.raises(InputError, match="call 'prefill' before 'decode'"):
        deployed("decode")
    for _ in range(2):  # a second query begins anew
        deployed.bind(arrays)
        deployed("forward")
        scores = deployed.fetch()["scores"]
        real = slice(None) if signature is PLAIN else arrays["attention_mask"].astype(bool)
        assert scores.shape == (2, PROMPT, VOCABULARY)
        assert np.abs(scores - whole)[real].max() < 1e-5
        deployed("prefill")
        first = deployed.fetch()["scores"]
        assert first.shape == (2, 1, VOCABULARY)
        for _ in range(NEW - 1):
            deployed("decode")
        last = deployed.fetch()["scores"]
        assert last.shape == (2, 1, VOCABULARY)
        assert np.array_equal(deployed.generated, expected[:, :-1])
        assert np.array_equal(last[:, 0].argmax(axis=1), expected[:, -1])
    assert deployed.effective["precision"] == "f32"
    assert deployed.effective["mac_share"] == {"f32": 1.0}
    with pytest.raises(InputError, match="no phase 'sing'"):
        deployed("sing")
    deployed.close()


def test_every_side_and_length_of_padding_ends_at_the_last_real_token() -> None:
    ids = np.arange(8).reshape(2, 4)
    generation = Generation({"input_ids": ids, "attention_mask": np.array([[1, 1, 0, 0], [0, 1, 1, 1]])})
    assert generation.kept.tolist() == [1, 3]
    assert generation.positions.tolist() == [[0, 1, 1, 1], [0, 0, 1, 2]]
    kept = np.zeros((2, 2, 9))  # scores of the kept places only
    kept[0, 0, 5] = kept[1, 1, 7] = 1
    generation.step(kept)
    assert generation.ids.tolist() == [[5], [7]]
    assert generation.positions.tolist() == [[2], [3]]
    assert generation.mask.tolist() == [[1, 1, 0, 0, 1], [0, 1, 1, 1, 1]]
    generation.step(np.eye(9)[[[3], [4]]])
    assert generation.ids.tolist() == [[3], [4]]
    assert generation.positions.tolist() == [[3], [4]]
    every = Generation({"input_ids": ids, "attention_mask": np.array([[1, 1, 0, 0], [0, 1, 1, 1]])})
    scores = np.zeros((2, 4, 9))  # of a model that cannot leave any out
    scores[0, 1, 5] = scores[1, 3, 7] = 1
    every.step(scores)
    assert every.ids.tolist() == [[5], [7]]


@pytest.mark.parametrize("name", RUNTIMES)
def test_models_that_cannot_generate_are_refused(name: str, model: Any, tmp_path: Path) -> None:
    hardware = RUNTIMES[name]
    if reason := hardware.unavailable():
        pytest.skip(reason)
    example = {"input_ids": prompts()["input_ids"]}
    table = nn.Sequential(nn.Embedding(VOCABULARY, VOCABULARY))
    with pytest.raises(Unsupported, match="forward of Sequential takes no key-value cache"):
        hardware.build(table, PLAIN, example, tmp_path, PHASES)
    two = Signature(inputs=(IDS, Port(name="scale", shape=())), outputs=(LOGITS,))
    with pytest.raises(Unsupported, match="this model has input_ids, scale and scores"):
        hardware.build(copy.deepcopy(model), two, example | {"scale": torch.ones(2)}, tmp_path, PHASES)
