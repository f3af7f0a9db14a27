"""Models of transformers: a local folder, or one of the hub's cache; nothing is downloaded."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.contracts import Port, Signature, Workload
from harness.errors import DataError, InputError, explanation
from harness.tasks.sources import Made

INSTALL = 'transformers is not installed: pip install "assay-bench[text]".'
GENERATION = Workload(phases=(("prefill", 1), ("decode", 63)), sizes={"tokens": 128}, unit="token")
"""A timed query of a causal model: a prompt, and tokens decoded one by one."""
_CAUSAL = "CausalLM"


@dataclass(frozen=True)
class Transformers:
    """A model with its tokenizer.

    Parameters
    ----------
    name : str
        A folder with ``config.json`` and safetensors, or with one GGUF file; or an id of the hub.
    """

    name: str

    def unavailable(self) -> str | None:
        """The install line of what is missing, or None."""
        needed = ("transformers", "tokenizers", "safetensors")
        return None if all(map(importlib.util.find_spec, needed)) else INSTALL

    def recipe(self) -> None:
        """None: nothing is trained from scratch."""
        return

    def make(self, seed: int) -> Made:  # noqa: ARG002 - the weights are those of the files
        """The model in float32, in evaluation mode, and its tokenizer."""
        folder = self._folder()
        model = load(folder)
        inputs = text_inputs(model)
        causal = len(inputs) == 1
        return Made(
            model=model,
            signature=Signature(inputs=inputs, outputs=()),
            inputs=inputs,
            longest=getattr(model.config, "max_position_embeddings", None),
            given={"workload": GENERATION} if causal else {},
            tokenizer=tokenizer(folder),
        )

    def _folder(self) -> Path:
        folder = Path(self.name).expanduser()
        if folder.is_dir():
            return folder
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        with contextlib.suppress(HFValidationError):
            found = try_to_load_from_cache(self.name, "config.json")
            if isinstance(found, str):
                return Path(found).parent
        raise InputError(
            f"transformers/{self.name}: there is no such folder, and the hub's cache has no model of that name. Name a "
            "folder with config.json, or fetch the model once where there is a network: "
            f"hf download {self.name}."
        )


def load(folder: Path) -> Any:
    """The model of a folder, in float32 and evaluation mode; only tensors are read, and no code of the folder runs.

    Raises
    ------
    DataError
        If the folder holds no model that transformers knows.
    """
    import torch
    import transformers

    gguf = sorted(folder.glob("*.gguf"))
    with _quiet():
        try:
            if not (folder / "config.json").is_file() and len(gguf) == 1:
                model = _plain(
                    transformers.AutoModelForCausalLM.from_pretrained(
                        folder, gguf_file=gguf[0].name, dtype=torch.float32, local_files_only=True
                    )
                )
            else:
                kind = _kind(folder)
                model = kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True, use_safetensors=True)
        except DataError:
            raise
        except Exception as error:  # readers raise many kinds for damaged files
            raise DataError(f"{folder}: transformers cannot load it: {explanation(error)}") from error
    # Where it lay is no part of the model: its bytes identify it.
    model.name_or_path = model.config._name_or_path = ""
    model.config.__dict__.pop("_model_name_or_path", None)
    # Without the cache, which is no tensor; a runtime that generates asks for it.
    model.config.use_cache = False
    return model.eval()


def _kind(folder: Path) -> Any:
    """The class that ``config.json`` names."""
    import transformers

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = config.get("architectures") or ["AutoModel"]
    kind = getattr(transformers, str(names[0]), None)
    if not hasattr(kind, "from_pretrained"):
        raise DataError(f"{folder}: transformers has no class {names[0]!r}, which config.json names.")
    return kind


def _plain(model: Any) -> Any:
    """The network as if it had never been quantized: transformers refuses to store one that came from GGUF."""
    for holder in (model, model.config):
        for name in ("quantization_config", "hf_quantizer", "quantization_method", "is_quantized"):
            holder.__dict__.pop(name, None)
    return model


def tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder, or None where there is none."""
    import transformers

    gguf = sorted(folder.glob("*.gguf"))
    options: dict[str, Any] = {"local_files_only": True}
    if gguf and not (folder / "tokenizer.json").is_file():
        options["gguf_file"] = gguf[0].name
    with _quiet():
        try:
            return transformers.AutoTokenizer.from_pretrained(folder, **options)
        except (OSError, ValueError, ImportError, KeyError):
            return None


def text_inputs(model: Any) -> tuple[Port, ...]:
    """Token ids, and their mask where the model is no causal one."""
    vocabulary = int(getattr(model.config, "vocab_size", 2))
    ids = Port(name="input_ids", shape=("tokens",), dtype="int64", values=vocabulary)
    if _CAUSAL in type(model).__name__ or type(model).__name__.endswith("LMHeadModel"):
        return (ids,)
    return (ids, Port(name="attention_mask", shape=("tokens",), dtype="int64"))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and advice."""
    from transformers.utils import logging as theirs

    before = theirs.get_verbosity()
    bars = theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        # A bar of another package goes to standard error whatever is set.
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        theirs.set_verbosity(before)
        if bars:
            theirs.enable_progress_bar()
