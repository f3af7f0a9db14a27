"""Generation in OpenVINO: the cache goes from one request's outputs to the other's inputs."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hardware import decoding, openvino_cpu, ports

if TYPE_CHECKING:
    from hardware.openvino_cpu import OpenVino
    from harness.contracts import JSON, Arrays, Signature


class OpenVinoDecoder:
    """A compiled model with two inference requests, which take turns: what one gives, the other reads where it lies."""

    def __init__(
        self, model: Any, path: Path, signature: Signature, inputs: Arrays, threads: int, settings: OpenVino
    ) -> None:
        decoding.check_signature(signature)
        self._path, self._ov = path, openvino_cpu.runtime()
        self._output = signature.outputs[0].name
        self._bound = ports.zeros(signature, inputs)
        self._taken = [source.get_any_name() for source in model.inputs]
        layers = decoding.layers_of(self._taken)
        self._past, self._present = decoding.past_names(layers), decoding.present_names(layers)
        n = len(next(iter(self._bound.values())))
        self._empty = {}
        for name in self._past:
            source = model.input(name)
            _, heads, _, width = source.get_partial_shape()
            shape = self._ov.Shape([n, heads.get_length(), 0, width.get_length()])
            self._empty[name] = self._ov.Tensor(source.get_element_type(), shape)
        model.reshape({name: self._free(model.input(name), n) for name in self._taken})
        self._compiled = settings.compiled(model, threads, path)
        self._requests = [self._compiled.create_infer_request() for _ in range(2)]
        self._generation: decoding.Generation | None = None
        self._held: dict[str, Any] = {}

    def _free(self, source: Any, n: int) -> Any:
        """The shape of an input with this batch size; what names the kept tokens has none."""
        shape = source.get_partial_shape()
        if source.get_any_name() != decoding.KEPT:
            shape[0] = n
        return shape

    @property
    def generated(self) -> Any:
        """The tokens that were decoded since the last prefill, shape (n, tokens)."""
        return decoding.tokens_of(self._generation)

    @functools.cached_property
    def effective(self) -> Mapping[str, JSON]:
        """Read back from the compiled model and its executed graph; products are counted for the bound prompt."""
        original = openvino_cpu.read(self._path)
        given = decoding.feeds(decoding.Generation(self._bound), self._taken)
        shapes = {name: list(value.shape) for name, value in given.items()}
        original.reshape({**shapes, **{name: list(tensor.shape) for name, tensor in self._empty.items()}})
        return openvino_cpu.effective(self._compiled, original, self._path)

    def bind(self, inputs: Arrays) -> None:
        """Copy one batch of prompts."""
        ports.check_bound(self._bound, inputs)
        for name, place in self._bound.items():
            openvino_cpu.check_integers(name, inputs[name])
            np.copyto(place, inputs[name])

    def __call__(self, phase: str = "forward") -> None:
        """Run "forward" or "prefill" on the bound prompt, or "decode" one more token."""
        if phase == "forward":
            self._generation = None
            self._run(decoding.Generation(self._bound, whole=True), self._empty)
            return
        if phase == "prefill":
            self._generation = decoding.Generation(self._bound)
            self._run(self._generation, self._empty)
        elif phase == "decode":
            decoding.advance(self._generation, lambda: self._requests[0].get_tensor(decoding.LOGITS).data)
            present = {
                past: self._requests[0].get_tensor(name) for past, name in zip(self._past, self._present, strict=True)
            }
            self._run(self._generation, present)
        else:
            raise decoding.unknown_phase(phase)

    def _run(self, at: Any, past: Mapping[str, Any]) -> None:
        request = self._requests[1]
        given = decoding.feeds(at, self._taken)
        for name, value in given.items():
            request.set_tensor(name, self._ov.Tensor(value, shared_memory=True))
        for name, tensor in past.items():
            request.set_tensor(name, tensor)
        request.infer(share_outputs=True)
        self._held = given  # the request's tensors are views of it
        self._requests.reverse()

    def synchronize(self) -> None:
        """Nothing to wait for: the call is synchronous."""

    def fetch(self) -> dict[str, Any]:
        """The scores of the last call, as a copy."""
        return {self._output: self._requests[0].get_tensor(decoding.LOGITS).data.copy()}

    def close(self) -> None:
        """Drop the compiled model."""
        self._requests, self._compiled, self._empty = [], None, {}
