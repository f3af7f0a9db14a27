"""Decoding by Assay's runtimes against transformers' ``generate()`` and, where it is installed, openvino-genai.

SmolLM2-135M in float32, one thread, a prompt of 128 tokens, 64 tokens generated greedily. Every variant runs once in
each round, in random order; its rate is that of the tokens after the first, and ratios are taken round by round. All
variants must generate equal tokens.

    python benchmarks/decode.py [ROUNDS]
"""

from __future__ import annotations

import importlib.util
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harness import environment
from harness.spec import build

PROMPT, TOKENS = 128, 64
Generate = Callable[[], tuple[list[int], float]]
"""Generates, and returns the tokens with the seconds of those after the first."""


def of_assay(name: str, model: Any, task: Any, ids: Any, folder: Path) -> Generate:
    hardware = build("hardware", {"name": name})
    place = folder / name
    place.mkdir()
    example = {"input_ids": ids.repeat(2, 1)}
    artifact = hardware.build(model, task.signature, example, place, ("prefill", "decode"))
    deployed = hardware.load(artifact, signature=task.signature, inputs={"input_ids": ids.numpy()}, threads=1)
    deployed.bind({"input_ids": ids.numpy()})

    def last() -> int:
        return int(np.asarray(deployed.fetch()["logits"])[0, -1].argmax())

    def generate() -> tuple[list[int], float]:
        deployed("prefill")
        deployed.synchronize()
        found, seconds = [last()], 0.0
        for _ in range(TOKENS - 1):
            begin = time.perf_counter()
            deployed("decode")
            deployed.synchronize()
            seconds += time.perf_counter() - begin
            found.append(last())
        return found, seconds

    return generate


def of_transformers(model: Any, ids: Any) -> Generate:
    def run(tokens: int) -> tuple[list[int], float]:
        begin = time.perf_counter()
        with torch.inference_mode():
            made = model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens
            )
        return made[0, PROMPT:].tolist(), time.perf_counter() - begin

    def generate() -> tuple[list[int], float]:
        _, first = run(1)
        tokens, all_of_them = run(TOKENS)
        return tokens, all_of_them - first

    return generate


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    torch.set_num_threads(1)
    task = build("task", {"name": "smollm2-135m"})
    model = task.model(0).eval()
    ids = next(iter(task.test().batches(1))).inputs["input_ids"][:, :PROMPT]
    with tempfile.TemporaryDirectory() as folder:
        variants: dict[str, Generate] = {"transformers generate()": of_transformers(model, ids)}
        for name in ("torch", "onnxruntime", "openvino"):
            variants[f"assay {name}"] = of_assay(name, model, task, ids, Path(folder))
        if importlib.util.find_spec("openvino_genai") is None:
            print("openvino-genai is not installed; it also needs a model that optimum-intel converts.")
        rates: dict[str, list[float]] = {name: [] for name in variants}
        expected: list[int] | None = None
        for number in range(rounds + 1):  # the first round warms up
            for name in random.sample(list(variants), len(variants)):
                tokens, seconds = variants[name]()
                expected = expected or tokens
                if tokens != expected:
                    sys.exit(f"{name} generates other tokens: {tokens} instead of {expected}")
                if number:
                    rates[name].append((TOKENS - 1) / seconds)
    reference = rates["transformers generate()"]
    for name, values in rates.items():
        ratios = [value / other for value, other in zip(values, reference, strict=True)]
        print(
            f"{name:26} {statistics.median(values):6.1f} tokens/s (median of {rounds}), "
            f"{statistics.median(ratios):.2f} times generate() ({min(ratios):.2f} to {max(ratios):.2f})"
        )
    print(json.dumps({"cpu": environment.machine()["cpu_model"], **environment.conditions()}))


if __name__ == "__main__":
    main()
