"""Runtimes on devices, one a file; :data:`TABLE` is the only list of them.

A runtime is a frozen pydantic dataclass whose fields are its options; see :class:`harness.contracts.Hardware`. Nothing
heavy is imported here.
"""

from __future__ import annotations

from harness.registry import Entry

TABLE: dict[str, Entry] = {
    "torch": Entry("hardware.torch_cpu:Torch", "PyTorch eager on the CPU; a quantized model is simulated in float"),
    "onnxruntime": Entry("hardware.onnxruntime_cpu:OnnxRuntime", "ONNX Runtime on the CPU"),
    "openvino": Entry("hardware.openvino_cpu:OpenVino", "OpenVINO on the CPU, in f32 or bf16 as asked"),
}
