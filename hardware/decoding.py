"""Greedy generation, one token a call: what the runtimes share of it, in NumPy alone.

An artifact for both phases takes what models of transformers take: ``input_ids`` (n, new tokens), ``attention_mask``
(n, all tokens so far), ``position_ids`` where the model has them, ``logits_to_keep`` (places of the new tokens whose
scores are wanted) where it can, and for every layer ``past_key_values.N.key`` and ``.value`` (n, heads, past, width).
It gives ``logits`` and the longer ``present.N.key`` and ``.value``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from harness.errors import InputError, Unsupported

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable

    from harness.contracts import Arrays, Signature

IDS, MASK, POSITIONS, KEPT, LOGITS = "input_ids", "attention_mask", "position_ids", "logits_to_keep", "logits"
PHASES = ("prefill", "decode")


def past_names(layers: int) -> list[str]:
    """The cache's inputs, in order."""
    return [f"past_key_values.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def present_names(layers: int) -> list[str]:
    """The cache's outputs, in the order of :func:`past_names`."""
    return [f"present.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]


def layers_of(names: Iterable[str]) -> int:
    """How many layers' caches an artifact takes; 0 where it only runs forward."""
    return sum(name.startswith("past_key_values.") and name.endswith(".key") for name in names)


def check_signature(signature: Signature) -> None:
    """Refuse to generate with a model that takes other things than ids and a mask, or gives more than scores.

    Raises
    ------
    Unsupported
        Naming what is too much or missing.
    """
    taken = {port.name for port in signature.inputs}
    if IDS not in taken or taken - {IDS, MASK} or len(signature.outputs) != 1:
        raise Unsupported(
            f"Generation takes the inputs {IDS!r} and {MASK!r} (or only the first) and one output, the scores; this "
            f"model has {', '.join(sorted(taken))} and {', '.join(port.name for port in signature.outputs)}."
        )


class Generation:
    """Where a generation stands; every array is ready to be given to a runtime.

    Attributes
    ----------
    ids, mask, positions, kept : array of int64
        For the next call.
    tokens : list of array, shape (n,)
        What was generated, in order.
    """

    def __init__(self, prompt: Arrays, *, whole: bool = False) -> None:
        """Begin at a prompt; ``whole`` asks for the scores of all its tokens, as a forward pass gives them."""
        self.ids = np.ascontiguousarray(prompt[IDS], np.int64)
        n, length = self.ids.shape
        given = prompt.get(MASK)
        self.mask = np.ones((n, length), np.int64) if given is None else np.ascontiguousarray(given, np.int64)
        self.tokens: list[Any] = []
        if whole:
            self.positions = np.tile(np.arange(length), (n, 1))
            self.kept = np.arange(length)
            return
        # As transformers' generate counts: padding has no position.
        self.positions = np.maximum(self.mask.cumsum(axis=1) - 1, 0)
        # The last token that is no padding, on whichever side that is.
        self._last = length - 1 - self.mask[:, ::-1].argmax(axis=1)
        self.kept = np.unique(self._last)

    def step(self, logits: Any) -> None:
        """Take the most likely next token of every example, and make ready for one more call.

        Parameters
        ----------
        logits : array, shape (n, kept or all new tokens, vocabulary)
            Of the call before.
        """
        n = len(self.ids)
        if logits.shape[1] == 1:
            last = logits[:, 0]
        else:
            places = np.searchsorted(self.kept, self._last) if logits.shape[1] == len(self.kept) else self._last
            last = logits[np.arange(n), places]
        token = last.argmax(axis=1)
        self.tokens.append(token)
        self.ids = token[:, None]
        self.positions = self.mask.sum(axis=1, keepdims=True)
        self.mask = np.concatenate([self.mask, np.ones((n, 1), np.int64)], axis=1)
        self._last = np.zeros(n, np.int64)
        self.kept = np.zeros(1, np.int64)


def unknown_phase(phase: str) -> InputError:
    """What a call of a phase that there is not raises."""
    return InputError(f"There is no phase {phase!r}; allowed: forward, prefill, decode.")


def feeds(generation: Generation, taken: Collection[str]) -> dict[str, Any]:
    """What the next call takes beside the cache, those of it that the artifact takes."""
    found = {IDS: generation.ids, MASK: generation.mask, POSITIONS: generation.positions, KEPT: generation.kept}
    return {name: np.ascontiguousarray(value) for name, value in found.items() if name in taken}


def advance(generation: Generation | None, logits: Callable[[], Any]) -> None:
    """Take the next token; ``logits`` gives the scores of the call before.

    Raises
    ------
    InputError
        If there is no prompt to go on from.
    """
    if generation is None:
        raise InputError("There is nothing to go on from: call 'prefill' before 'decode'.")
    generation.step(logits())


def tokens_of(generation: Generation | None) -> Any:
    """What was generated, shape (n, tokens)."""
    if generation is None or not generation.tokens:
        return np.zeros((0, 0), np.int64)
    return np.stack(generation.tokens, axis=1)
