"""Compression techniques, one a file; :data:`TABLE` is the only list of them.

A method is a frozen pydantic dataclass whose fields are its hyper-parameters (every one has a default); see
:class:`harness.contracts.Method`. Nothing heavy is imported here.
"""

from __future__ import annotations

from harness.registry import Entry

TABLE: dict[str, Entry] = {
    "baseline": Entry("methods.baseline:Baseline", "the trained model as it is"),
    "magnitude": Entry("methods.pruning.magnitude:Magnitude", "zero the smallest weights (Han et al. 2015)"),
    "neuron-merging": Entry(
        "methods.pruning.neuron_merging:NeuronMerging",
        "remove neurons, fold them into the most similar ones (Kim et al. 2020)",
    ),
    "ptq-int8": Entry(
        "methods.quantization.ptq_int8:PtqInt8", "static 8-bit post-training quantization (Jacob et al. 2018)"
    ),
}
