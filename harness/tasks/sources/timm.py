"""The models of timm (PyTorch Image Models)."""

from __future__ import annotations

import difflib
import importlib.util
from dataclasses import dataclass
from typing import Any

from harness.contracts import Port
from harness.errors import InputError, suggestion
from harness.tasks.sources import Made

INSTALL = 'timm is not installed: pip install "assay-bench[timm]".'
_FILES = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class Timm:
    """A model of timm, such as ``resnet18.a1_in1k``, with its weights where the hub's cache has them."""

    name: str

    def unavailable(self) -> str | None:
        """Timm's install line where it is missing, or None."""
        return None if importlib.util.find_spec("timm") else INSTALL

    def recipe(self) -> None:
        """None: nothing is trained from scratch."""
        return

    def make(self, seed: int) -> Made:
        """The pretrained model, or a random one with the reason."""
        import timm
        import timm.data

        architecture = self.name.partition(".")[0]
        if not timm.is_model(architecture):
            near = difflib.get_close_matches(architecture, timm.list_models(), n=5)
            raise InputError(f"timm has no model {self.name!r}. Near it: {', '.join(near) or '(nothing)'}.")
        if "." in self.name and self.name not in timm.list_pretrained():
            tags = [name for name in timm.list_pretrained() if name.partition(".")[0] == architecture]
            raise InputError(f"timm has no weights {self.name!r}. {suggestion(self.name, tags)}")
        reason = self._missing()
        model = self._random(seed) if reason else timm.create_model(self.name, pretrained=True)
        config: dict[str, Any] = timm.data.resolve_model_data_config(model)
        return Made(
            model=model,
            untrained=reason or "",
            inputs=(Port(name="x", shape=tuple(config["input_size"])),),
            transform=timm.data.create_transform(**config, is_training=False),
            notes=(reason,) if reason else (),
        )

    def _missing(self) -> str | None:
        """Why the weights are not here, or None; nothing is downloaded."""
        import timm
        from huggingface_hub import try_to_load_from_cache

        config = timm.get_pretrained_cfg(self.name, allow_unregistered=False)
        if config is None or not config.hf_hub_id:
            return f"The weights are random: timm knows no weights of {self.name!r}; name them: NAME.TAG."
        for file in _FILES:
            if isinstance(try_to_load_from_cache(config.hf_hub_id, file), str):
                return None
        return (
            f"The weights are random: {config.hf_hub_id} is not in the hub's cache. Fetch it once where there is a "
            f"network: python -c \"import timm; timm.create_model('{self.name}', pretrained=True)\"."
        )

    def _random(self, seed: int) -> Any:
        import timm
        import timm.data
        import torch

        from harness.tasks import pretrained

        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            model = timm.create_model(self.name, pretrained=False)
        size = tuple(timm.data.resolve_model_data_config(model)["input_size"])
        return pretrained.lively(model, seed, size)
