"""Compression techniques, one a file; :data:`TABLE` is the only list of them.

A method is a frozen pydantic dataclass whose fields are its hyper-parameters (every one has a default); see
:class:`harness.contracts.Method`. Nothing heavy is imported here.
"""

from __future__ import annotations

from harness.registry import Entry

TABLE: dict[str, Entry] = {
    "baseline": Entry("methods.baseline:Baseline", "the trained model as it is"),
    "finetune": Entry("methods.finetune:Finetune", "train on without compressing: the dense control"),
    "random": Entry("methods.pruning.random:Random", "zero weights drawn at random: the control"),
    "threshold": Entry(
        "methods.pruning.threshold:Threshold",
        "zero weights below a share of each layer's deviation, in rounds (Han et al. 2015)",
    ),
    "gradual": Entry(
        "methods.pruning.gradual:Gradual", "zero the smallest weights while training (Zhu and Gupta 2017)"
    ),
    "lottery-ticket": Entry(
        "methods.pruning.lottery_ticket:LotteryTicket", "train, prune, rewind, train again (Frankle and Carbin 2019)"
    ),
    "snip": Entry("methods.pruning.snip:Snip", "prune at initialisation by sensitivity, train (Lee et al. 2019)"),
    "grasp": Entry("methods.pruning.grasp:Grasp", "prune at initialisation by gradient flow, train (Wang et al. 2020)"),
    "synflow": Entry(
        "methods.pruning.synflow:SynFlow", "prune at initialisation without data, train (Tanaka et al. 2020)"
    ),
    "n-m": Entry("methods.pruning.n_m:NM", "keep n of every m consecutive weights (Mishra et al. 2021)"),
    "wanda": Entry("methods.pruning.wanda:Wanda", "zero the smallest weight times input of each row (Sun et al. 2024)"),
    "sparsegpt": Entry(
        "methods.pruning.sparsegpt:SparseGPT", "prune layer by layer, updating what stays (Frantar & Alistarh 2023)"
    ),
    "set": Entry(
        "methods.pruning.set:SparseEvolutionaryTraining", "sparse training with random regrowth (Mocanu et al. 2018)"
    ),
    "rigl": Entry("methods.pruning.rigl:RigL", "sparse training with regrowth by gradient (Evci et al. 2020)"),
    "magnitude": Entry("methods.pruning.magnitude:Magnitude", "zero the smallest weights (Han et al. 2015)"),
    "neuron-merging": Entry(
        "methods.pruning.neuron_merging:NeuronMerging",
        "remove neurons, fold them into the most similar ones (Kim et al. 2020)",
    ),
    "kmeans-sharing": Entry(
        "methods.weight_sharing.kmeans_sharing:KMeansSharing",
        "a small codebook of weights per layer, fine-tuned (Han et al. 2016)",
    ),
    "hashed-nets": Entry(
        "methods.weight_sharing.hashed_nets:HashedNets", "few real weights shared by a hash (Chen et al. 2015)"
    ),
    "product-quantization": Entry(
        "methods.weight_sharing.product_quantization:ProductQuantization",
        "blocks of weights from a codebook, near in the layer's output (Stock et al. 2020)",
    ),
    "structured": Entry(
        "methods.pruning.structured:Structured", "remove channels, neurons and heads (Li et al. 2017 and others)"
    ),
    "network-slimming": Entry(
        "methods.pruning.network_slimming:NetworkSlimming",
        "train with a penalty on BatchNorm's scales, remove the small ones' channels (Liu et al. 2017)",
    ),
    "ptq-int8": Entry(
        "methods.quantization.ptq_int8:PtqInt8", "static 8-bit post-training quantization (Jacob et al. 2018)"
    ),
}

RENAMED: dict[str, str] = {
    "han": "threshold",
    "threshold.kept": "'sparsity', which counts the zeros: 1 minus the share kept",
    "lottery-ticket.rate": "'ratio'",
    "lottery-ticket.output_rate": "'output_ratio'",
    "structured.scope=local": "layer",
    "neuron-merging.criterion=l1-norm": "l1",
    "neuron-merging.criterion=l2-norm": "l2",
}
"""Names of earlier versions: methods, ``method.parameter``, and ``method.parameter=value``, with what they are now."""
