"""The columns of the view ``runs``: one row of a table each.

Everything that is said of a column is said here once. :mod:`results.schema` makes the view, the comments in the
database and the fields of ``records`` from it; tables, plots, ``assay show`` and the papers take headings, units,
directions, digits and sections.

``sql`` is an expression over ``f``, the facts about the run, and ``b``, those about its baseline (``schema.sql`` says
what they are), ``task`` and ``acc``, the comparisons with the baseline by the task's metric and by accuracy. ``why``
lists SQL texts that say why the value is NULL, the first that is not NULL counts; they may use the other columns and
what the view ``runs`` calls ``not_ok``, ``no_baseline``, ``not_compared`` and ``accuracy_not_compared``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harness.errors import UnknownName
from results.quantities import Column, Quantity


def _say(text: str) -> str:
    """A reason as an SQL text."""
    return "'" + text.replace("'", "''") + "'"


def _told(*keys: str) -> str:
    """The reason that was recorded under the first of these names."""
    found = [f"recorded ->> '{key}'" for key in keys]
    return found[0] if len(found) == 1 else f"coalesce({', '.join(found)})"


def _without(name: str, *why: str) -> str:
    """The reasons of another column, where that one is NULL."""
    return f"CASE WHEN {name} IS NULL THEN coalesce({', '.join((_told(name), *why))}) END"


_COUNTED = ("not_ok", _say("not counted"))
_MEASURED = ("not_ok", _say("not measured"))
_SCORED = (
    _told("score", "scores", "accuracy", "predictions"),
    "not_ok",
    "CASE WHEN metric IS NOT NULL THEN metric || ' is not defined on these examples' END",
    _say("the test set was not evaluated"),
)
_ACCURACY = (
    _told("accuracy", "predictions"),
    "not_ok",
    "'the task''s metric is ' || metric",
    _say("the test set was not evaluated"),
)
_OTHER_EXAMPLES = _say("the baseline was not evaluated on the same examples")
_COMPARED = (_without("score", *_SCORED), "no_baseline", "not_compared", _OTHER_EXAMPLES)
_ACCURACY_COMPARED = (_without("accuracy", *_ACCURACY), "no_baseline", "accuracy_not_compared", _OTHER_EXAMPLES)
_DISCORDANT = (
    *_COMPARED[:-1],
    "CASE WHEN score_test IS NOT NULL THEN 'the metric does not call an example right or wrong' END",
    _OTHER_EXAMPLES,
)
_SIZE = (_told("size_bytes", "artifact"), "not_ok", _say("no artifact was deployed"))
_ZSTD = (_told("artifact"), "not_ok", _say("the artifact was not compressed"))
_WEIGHTS = (
    _told("weights"),
    "not_ok",
    _say("recorded by a version that did not weigh weights: run it again with --rerun"),
)
_UNTIMED = (
    f"CASE WHEN n_latency = 0 THEN coalesce({_told('latency_ns', 'latency')}, not_ok, 'no inference was timed') END"
)
_PHASES = "CASE WHEN phases NOT LIKE '%forward%' THEN 'timed by phase: ' || phases END"
_ENERGY = (_told("energy"), "not_ok", _say("no meter was read"))
_EQUAL = _say("it is not finite: the outputs are equal, or not to be compared")


def _figure(key: str) -> dict[str, Any]:
    """``sql`` and ``why`` of a score against other outputs than the targets: ``torch/sqnr``."""
    told = {
        "torch": (_told("fidelity"), "CASE WHEN compared_with_torch THEN 'no fidelity metric of the task' END"),
        "float": (_told("quantization"), _say("nothing was quantized, or it was not compared")),
    }[key.partition("/")[0]]
    there = f"CASE WHEN map_contains(figures, '{key}') THEN {_EQUAL} END"
    return {"sql": f"f.figures['{key}']", "why": (told[0], "not_ok", there, told[1], _say("not compared"))}


_MODEL = _say("recorded by a version that did not keep the identity of models: run it again with --rerun")
_GIT = (_say("Assay did not run from a git checkout"),)
_WILSON = "95 % Wilson interval"


def _percentile(percent: int, needed: int) -> tuple[str, ...]:
    return (_UNTIMED, _PHASES, f"n_latency || ' samples; p{percent} needs {needed}'")


def _of_phase(phase: str) -> tuple[str, ...]:
    return (_UNTIMED, f"CASE WHEN phases NOT LIKE '%{phase}%' THEN 'the workload has no phase {phase}' END", _FEW)


_FEW = "'too few samples: p50 needs 6'"


def _bytes(name: str, sql: str, text: str, why: tuple[str, ...], label: str, heading: str) -> Column:
    """A size in bytes, shown in kB."""
    shown = Quantity(label=label, heading=heading, unit="kB", better="lower", log=True, scale=1e-3)
    return Column(name=name, sql=sql, text=text, unit="bytes", why=why, section="Size", shown=shown)


def _ratio(name: str, sql: str, text: str, unit: str, why: tuple[str, ...], section: str, *names: str) -> Column:
    """The baseline's value through the run's own."""
    shown = Quantity(label=names[0], heading=names[-1], unit="×", log=True, decimals=2)
    return Column(name=name, sql=sql, text=text, unit=unit, why=why, section=section, shown=shown)


def _plain(name: str, text: str, unit: str, section: str = "", heading: str = "", **rest: Any) -> Column:
    """A column of ``records`` as it is."""
    return Column(name=name, sql=f"f.{name}", text=text, unit=unit, section=section, heading=heading, **rest)


COLUMNS: tuple[Column, ...] = (
    _plain("run_id", "unique, sortable by creation time", "text", "Run"),
    _plain("created_at", "when the run began", "UTC", "Run"),
    _plain("status", "ok, unsupported, unavailable, failed, timeout or interrupted", "text", "Run", "Status"),
    _plain("reason", "why the status is not ok", "text", "Run", "Reason"),
    _plain("task", "registered name", "text", "Run", "Task"),
    _plain("method", 'names of the chain joined with " > "', "text", "Run", "Method"),
    _plain("chain", 'one {"name": ..., parameters} a step', "JSON array", "Asked for"),
    _plain(
        "config", '{step name: its parameters, ..., "hardware": its parameters}, empty ones left out', "JSON object"
    ),
    _plain("hardware", "registered name", "text", "Run", "Hardware"),
    _plain("seed", "seed of everything random", "integer", "Asked for", "Seed"),
    _plain("batch_size", "examples in one timed inference", "count", "Asked for", "Batch"),
    _plain("threads", "threads asked for", "count", "Asked for", "Threads"),
    _plain(
        "precision",
        "effective precision of the kernels",
        "text",
        "Run",
        "Precision",
        field="VARCHAR",
        why=("not_ok", _say("the runtime did not say")),
    ),
    _plain("metric", "the task's metric: what score is", "text", "Score", "Metric", why=_SCORED),
    _plain("metric_unit", 'of the metric as it is shown: "%" for a fraction', "text", "Score", why=_SCORED),
    _plain("metric_better", "higher or lower: which way the metric is better", "text", "Score", why=_SCORED),
    Column(
        name="score",
        sql="f.score",
        text="the task's metric on the test set",
        unit="of the metric; a fraction where metric_unit is %",
        why=_SCORED,
        section="Score",
        shown=Quantity(
            label="Score", of_task=True, low="score_low", high="score_high", interval="95 % interval over examples"
        ),
    ),
    _plain(
        "score_low",
        "95 % interval over examples, lower end",
        "as score",
        "Score",
        why=(_without("score", *_SCORED), "no_interval"),
    ),
    _plain(
        "score_high",
        "95 % interval over examples, upper end",
        "as score",
        "Score",
        why=(_without("score", *_SCORED), "no_interval"),
    ),
    Column(
        name="score_delta",
        sql="task.delta",
        text="score - baseline's score on the same examples",
        unit="as score",
        why=_COMPARED,
        section="Score",
        shown=Quantity(
            label="Score change",
            heading="Δ",
            of_task=True,
            low="score_delta_low",
            high="score_delta_high",
            interval="95 % interval of the paired difference",
            change="score_p",
        ),
    ),
    Column(
        name="score_delta_low",
        sql="task.low",
        text="95 % interval of the paired difference, lower end",
        unit="as score",
        why=_COMPARED,
        section="Score",
    ),
    Column(
        name="score_delta_high",
        sql="task.high",
        text="95 % interval of the paired difference, upper end",
        unit="as score",
        why=_COMPARED,
        section="Score",
    ),
    Column(
        name="score_p",
        sql="task.p",
        text="two-sided p-value of no difference from the baseline, by score_test",
        unit="probability",
        why=_COMPARED,
        section="Score",
        shown=Quantity(label="p of the change", heading="p", general=True),
    ),
    Column(
        name="score_test",
        sql="task.test",
        text="the paired test over examples",
        unit="text",
        why=_COMPARED,
        section="Score",
    ),
    Column(
        name="accuracy",
        sql="f.accuracy",
        text="share of the test set that is right: the metric accuracy",
        unit="fraction",
        why=_ACCURACY,
        shown=Quantity(
            label="Accuracy",
            unit="%",
            scale=100,
            decimals=2,
            low="accuracy_low",
            high="accuracy_high",
            interval=_WILSON,
        ),
    ),
    _plain("accuracy_low", "Wilson 95 % interval, lower end", "fraction", why=_ACCURACY),
    _plain("accuracy_high", "Wilson 95 % interval, upper end", "fraction", why=_ACCURACY),
    _plain(
        "n_examples", "examples of the test set", "count", "Score", why=_SCORED, shown=Quantity(label="Test examples")
    ),
    _bytes("size_bytes", "f.size_bytes", "artifact as deployed", _SIZE, "Size", "Size"),
    _bytes("zstd_bytes", "f.zstd_bytes", "artifact compressed with Zstandard level 19", _ZSTD, "Size, zstd", "zstd"),
    _ratio(
        "compression_ratio",
        "b.size_bytes / nullif(f.size_bytes, 0)::DOUBLE",
        "baseline's size_bytes / size_bytes",
        "ratio, higher is smaller",
        (_without("size_bytes", *_SIZE), "no_baseline", _say("the size is 0, or the baseline has none")),
        "Size",
        "Compression ratio",
        "Ratio",
    ),
    _ratio(
        "zstd_compression_ratio",
        "b.zstd_bytes / nullif(f.zstd_bytes, 0)::DOUBLE",
        "baseline's zstd_bytes / zstd_bytes",
        "ratio, higher is smaller",
        (_without("zstd_bytes", *_ZSTD), "no_baseline", _say("the baseline has no compressed size")),
        "Size",
        "Compression ratio, zstd",
        "Ratio zstd",
    ),
    _bytes(
        "plain_bytes",
        "f.plain_bytes",
        "raw tensors of the compressed model's state dict",
        _WEIGHTS,
        "Weights, plain",
        "Plain weights",
    ),
    _bytes(
        "container_bytes",
        "f.container_bytes",
        "the state dict as a file of compressed weights, everything in it counted",
        _WEIGHTS,
        "Weights, compressed file",
        "Weights' file",
    ),
    _bytes(
        "shannon_bytes",
        "f.shannon_bytes",
        "entropy bound of the representation that the file chose",
        _WEIGHTS,
        "Weights, Shannon bound",
        "Shannon bound",
    ),
    _bytes(
        "weights_zstd_bytes",
        "f.weights_zstd_bytes",
        "raw tensors by Zstandard level 19",
        _WEIGHTS,
        "Weights, zstd",
        "Weights zstd",
    ),
    _bytes("xz_bytes", "f.xz_bytes", "raw tensors by xz preset 9", _WEIGHTS, "Weights, xz", "Weights xz"),
    _bytes("gzip_bytes", "f.gzip_bytes", "raw tensors by gzip level 9", _WEIGHTS, "Weights, gzip", "Weights gzip"),
    _ratio(
        "container_compression_ratio",
        "b.plain_bytes / nullif(f.container_bytes, 0)::DOUBLE",
        "baseline's plain_bytes / container_bytes",
        "ratio, higher is smaller",
        (_without("container_bytes", *_WEIGHTS), "no_baseline", _say("the baseline's weights were not weighed")),
        "Size",
        "Compression ratio of the weights' file",
        "Ratio of weights' file",
    ),
    _plain("params_original", "parameters before compression", "count", "Size", field="BIGINT", why=_COUNTED),
    _plain(
        "params_total",
        "parameters after compression",
        "count",
        "Size",
        field="BIGINT",
        why=_COUNTED,
        shown=Quantity(label="Parameters", better="lower", log=True),
    ),
    _plain(
        "params_nonzero",
        "of params_total, not zero",
        "count",
        "Size",
        field="BIGINT",
        why=_COUNTED,
        shown=Quantity(label="Non-zero parameters", better="lower", log=True),
    ),
    Column(
        name="pruning_rate",
        sql="1 - f.params_nonzero / nullif(f.params_original, 0)::DOUBLE",
        text="1 - params_nonzero / params_original",
        unit="fraction",
        why=(_told("params_nonzero", "params_original"), "not_ok", _say("parameters were not counted")),
        section="Size",
        shown=Quantity(label="Pruning rate", heading="Pruned", unit="%", scale=100, decimals=2),
    ),
    _plain(
        "macs",
        "multiply-accumulates of one example; FLOPs are twice as many",
        "count",
        "Size",
        field="BIGINT",
        why=_COUNTED,
        shown=Quantity(label="Multiply-accumulates per example", heading="MACs", better="lower", log=True),
    ),
    _ratio(
        "macs_ratio",
        "b.macs / nullif(f.macs, 0)::DOUBLE",
        "baseline's macs / macs",
        "ratio, higher is cheaper",
        (
            _without("macs", *_COUNTED),
            "no_baseline",
            _say("the baseline's multiply-accumulates were not counted, or there are none"),
        ),
        "Size",
        "Ratio of multiply-accumulates",
        "MACs ratio",
    ),
    Column(
        name="latency_p50_ms",
        sql="f.p50_ms",
        text="median duration of one inference over batch_size examples, n >= 6",
        unit="milliseconds",
        why=_percentile(50, 6),
        section="Latency",
        shown=Quantity(
            label="Latency p50",
            heading="p50",
            unit="ms",
            better="lower",
            log=True,
            low="latency_p50_ms",
            high="latency_p90_ms",
            interval="p50 to p90",
        ),
    ),
    Column(
        name="latency_p90_ms",
        sql="f.p90_ms",
        text="90th percentile, n >= 64",
        unit="milliseconds",
        why=_percentile(90, 64),
        section="Latency",
        shown=Quantity(label="Latency p90", heading="p90", unit="ms", better="lower", log=True),
    ),
    Column(
        name="latency_p99_ms",
        sql="f.p99_ms",
        text="99th percentile, n >= 662",
        unit="milliseconds",
        why=_percentile(99, 662),
        section="Latency",
        shown=Quantity(label="Latency p99", heading="p99", unit="ms", better="lower", log=True),
    ),
    Column(
        name="prefill_p50_ms",
        sql="f.prefill_p50_ms",
        text="median duration of the phase prefill: time to the first token",
        unit="milliseconds",
        why=_of_phase("prefill"),
        section="Latency",
        shown=Quantity(label="Time to the first token", heading="Prefill p50", unit="ms", better="lower", log=True),
    ),
    Column(
        name="decode_p50_ms",
        sql="f.decode_p50_ms",
        text="median duration of one call of the phase decode: time per output token",
        unit="milliseconds",
        why=_of_phase("decode"),
        section="Latency",
        shown=Quantity(label="Time per output token", heading="Decode p50", unit="ms", better="lower", log=True),
    ),
    Column(
        name="n_latency",
        sql="coalesce(f.n_timed, 0)",
        text="timed inferences; with several phases, calls of the first",
        unit="count",
        section="Latency",
        shown=Quantity(label="Timed inferences", log=True),
    ),
    _ratio(
        "speedup",
        "b.query_p50_ms / nullif(f.query_p50_ms, 0)",
        "baseline's p50 / p50; with several phases, of their sum over the calls of a query",
        "ratio, higher is faster",
        (
            f"CASE WHEN query_p50_ms IS NULL THEN coalesce({_told('latency_p50_ms')}, {_UNTIMED}, "
            "n_latency || ' samples; p50 needs 6') END",
            "no_baseline",
            _say("the baseline has no median latency"),
        ),
        "Latency",
        "Speed-up",
    ),
    Column(
        name="throughput_per_s",
        sql="f.batch_size / nullif(f.query_mean_ns / 1e9, 0)",
        text="batch_size / mean duration of a query",
        unit="examples per second",
        why=(_UNTIMED,),
        section="Latency",
        shown=Quantity(label="Throughput", unit="examples/s", log=True),
    ),
    Column(
        name="units_per_s",
        sql="f.batch_size * f.units_per_ns * 1e9",
        text="throughput of the workload's unit (examples, or tokens) in its last phase",
        unit="units per second",
        why=(_UNTIMED, _say("a sample took no time")),
        section="Latency",
        shown=Quantity(label="Throughput in the workload's unit", heading="Units/s", log=True),
    ),
    Column(
        name="energy_j",
        sql="f.energy_j",
        text="gross energy of one example: sum over domains of gross_j / (inferences * batch_size)",
        unit="joules",
        why=_ENERGY,
        section="Energy",
        shown=Quantity(
            label="Energy per example",
            heading="Energy",
            unit="mJ",
            better="lower",
            log=True,
            scale=1e3,
            kind="energy_method",
        ),
    ),
    Column(
        name="energy_net_j",
        sql="f.energy_net_j",
        text="the same less idle power",
        unit="joules",
        why=(_without("energy_j", *_ENERGY), _say("idle power is not known")),
        section="Energy",
        shown=Quantity(
            label="Energy per example, idle subtracted",
            heading="Net energy",
            unit="mJ",
            better="lower",
            log=True,
            scale=1e3,
        ),
    ),
    _plain(
        "energy_method",
        "measured_counter, measured_sampled (if any domain was sampled) or modelled; never a mixture",
        "text",
        "Energy",
        why=(_told("energy_j"), *_ENERGY),
    ),
    _ratio(
        "energy_ratio",
        "CASE WHEN b.energy_method = f.energy_method AND (b.settings -> 'energy') = (f.settings -> 'energy') "
        "THEN b.energy_j END / nullif(f.energy_j, 0)",
        "baseline's energy_j / energy_j, of equal energy_method and energy settings",
        "ratio, higher is less energy",
        (
            _without("energy_j", *_ENERGY),
            "no_baseline",
            "CASE WHEN b_energy_method <> energy_method THEN 'this is ' || energy_method || ', the baseline''s is ' || "
            "b_energy_method END",
            _say("the baseline has no energy under equal energy settings, or the energy is 0"),
        ),
        "Energy",
        "Energy ratio",
    ),
    Column(
        name="carbon_g",
        sql="f.energy_j / 3.6e6 * f.grid_g_per_kwh",
        text="energy_j / 3.6e6 * grid intensity",
        unit="grams of CO2 equivalent per example",
        why=(_without("energy_j", *_ENERGY), _say("no grid intensity was stated")),
        section="Energy",
        shown=Quantity(
            label="Carbon per million examples",
            unit="g CO₂e",
            better="lower",
            log=True,
            scale=1e6,
            heading="Carbon per 10⁶",
        ),
    ),
    _plain(
        "peak_rss_bytes",
        "high-water mark of the measuring process",
        "bytes",
        "Latency",
        field="BIGINT",
        why=_MEASURED,
        shown=Quantity(label="Peak memory of the process", heading="Peak", unit="MB", better="lower", scale=1e-6),
    ),
    _plain(
        "load_ms",
        "loading the artifact in a fresh process",
        "milliseconds",
        "Latency",
        field="DOUBLE",
        why=_MEASURED,
        shown=Quantity(label="Load time", heading="Load", unit="ms", better="lower", log=True),
    ),
    _plain(
        "first_ms",
        "first inference after loading",
        "milliseconds",
        "Latency",
        field="DOUBLE",
        why=_MEASURED,
        shown=Quantity(label="First inference", heading="First", unit="ms", better="lower", log=True),
    ),
    Column(
        name="fidelity_max_abs",
        **_figure("torch/max-abs"),
        text="largest |deployed output - torch output| on validation examples",
        unit="output units",
        section="Fidelity",
        shown=Quantity(label="Largest output difference", better="lower", general=True),
    ),
    Column(
        name="fidelity_top1",
        **_figure("torch/top1-agreement"),
        text="share of those examples with the same top class",
        unit="fraction",
        section="Fidelity",
        shown=Quantity(label="Top-1 agreement with torch", heading="Top-1 agreement", unit="%", scale=100, decimals=2),
    ),
    Column(
        name="fidelity_mean_kl",
        **_figure("torch/mean-kl"),
        text="mean Kullback-Leibler divergence of the softmax outputs",
        unit="nats",
        section="Fidelity",
        shown=Quantity(label="Mean KL divergence from torch", unit="nats", better="lower", general=True),
    ),
    Column(
        name="fidelity_sqnr",
        **_figure("torch/sqnr"),
        text="signal-to-quantization-noise ratio of the deployed outputs to torch's",
        unit="decibels",
        section="Fidelity",
        shown=Quantity(label="SQNR to torch", unit="dB"),
    ),
    Column(
        name="quantization_top1",
        **_figure("float/top1-agreement"),
        text="share of examples with the same top class as the model before it was quantized",
        unit="fraction",
        section="Fidelity",
        shown=Quantity(label="Top-1 agreement with the float model", unit="%", scale=100, decimals=2),
    ),
    Column(
        name="quantization_sqnr",
        **_figure("float/sqnr"),
        text="signal-to-quantization-noise ratio to the outputs of the model before it was quantized",
        unit="decibels",
        section="Fidelity",
        shown=Quantity(label="SQNR to the float model", unit="dB"),
    ),
    Column(
        name="accuracy_delta",
        sql="acc.delta",
        text="accuracy - baseline's accuracy on the same examples",
        unit="fraction",
        why=_ACCURACY_COMPARED,
        shown=Quantity(
            label="Accuracy change",
            heading="Δ",
            unit="points",
            scale=100,
            decimals=2,
            low="accuracy_delta_low",
            high="accuracy_delta_high",
            interval="95 % Bonett-Price interval",
            change="mcnemar_p",
        ),
    ),
    Column(
        name="accuracy_delta_low",
        sql="acc.low",
        text="Bonett-Price 95 % interval, lower end",
        unit="fraction",
        why=_ACCURACY_COMPARED,
    ),
    Column(
        name="accuracy_delta_high",
        sql="acc.high",
        text="Bonett-Price 95 % interval, upper end",
        unit="fraction",
        why=_ACCURACY_COMPARED,
    ),
    Column(
        name="n_gained",
        sql="coalesce(task.gained, acc.gained)",
        text="examples that only this run gets right",
        unit="count",
        why=_DISCORDANT,
        section="Score",
        shown=Quantity(label="Examples gained"),
    ),
    Column(
        name="n_lost",
        sql="coalesce(task.lost, acc.lost)",
        text="examples that only the baseline gets right",
        unit="count",
        why=_DISCORDANT,
        section="Score",
        shown=Quantity(label="Examples lost", better="lower"),
    ),
    Column(
        name="mcnemar_p",
        sql="acc.p",
        text="exact two-sided McNemar test of accuracy: n_gained against n_lost",
        unit="probability",
        why=_ACCURACY_COMPARED,
        shown=Quantity(label="McNemar p", general=True),
    ),
    Column(
        name="baseline_run_id",
        sql="f.baseline_run_id",
        text="the run that ratios and deltas refer to",
        unit="text",
        why=("no_baseline", "not_ok"),
        section="Score",
    ),
    _plain("spec_name", "the spec that asked for the run", "text", "Provenance"),
    _plain("spec_hash", "of the resolved spec", "sha256 hex", "Provenance"),
    _plain("cell_hash", "of everything that goes into the result", "sha256 hex", "Provenance"),
    _plain("method_hash", "of the chain's source and parameters", "sha256 hex", "Provenance"),
    _plain(
        "dataset_hash",
        "of the decompressed data",
        "sha256 hex",
        "Provenance",
        why=("not_ok", _say("the task has no data")),
    ),
    _plain(
        "original_sha256",
        "of the stored model before compression; runs are compared only where it is equal",
        "sha256 hex",
        "Provenance",
        why=("not_ok", _MODEL),
    ),
    _plain("git_commit", "of Assay's checkout", "hex", "Provenance", why=_GIT),
    _plain("git_dirty", "whether the checkout had uncommitted changes", "true/false", "Provenance", why=_GIT),
    _plain("machine_id", "see machines", "text", "Provenance", why=(_say("the machine was not identified"),)),
    _plain("artifact_sha256", "of the artifact's bytes", "sha256 hex", "Size", why=_SIZE),
    _plain("task_config", "resolved parameters of the task", "JSON object", "Asked for"),
    _plain("hardware_config", "resolved parameters of the hardware", "JSON object", "Asked for"),
    _plain("settings", "resolved measure and energy settings", "JSON object", "Asked for"),
    _plain("packages", "distribution name to version", "JSON object", "What ran"),
    _plain("effective", "what the runtime said of itself, and the quantization scheme", "JSON object", "What ran"),
    _plain("notes", "what was inferred or changed on the way", "JSON array of text", "What ran"),
    Column(
        name="warnings",
        sql="f.all_warnings",
        text="what may have spoilt a number, with the remedy",
        unit="JSON array of text",
    ),
    Column(name="reasons", sql="", text="column name to why it is NULL", unit="JSON object"),
)

BY_NAME: Mapping[str, Column] = {column.name: column for column in COLUMNS}

QUANTITIES: Mapping[str, Quantity] = {column.name: column.shown for column in COLUMNS if column.shown is not None}
"""The numeric columns that can be plotted, averaged over seeds and claimed."""

ENERGY = frozenset({"energy_j", "energy_net_j", "energy_ratio", "carbon_g"})
"""Quantities that mean different things for measured and for modelled energy."""

SECTIONS: Mapping[str, tuple[str, ...]] = {
    "Run": (),
    "Asked for": (),
    "Size": ("artifact_format", "artifact_files"),
    "Latency": ("phases", "warmup_queries"),
    "Energy": ("energy_readings",),
    "Score": ("scores",),
    "Fidelity": ("random_in_evaluation",),
    "What ran": ("workload", "signature", "layers", "stages", "conditions", "machine"),
    "Provenance": ("task_hash", "hardware_hash", "origin", "record_sha256"),
}
"""The sections of ``assay show``, in order, with what they have beside the columns of ``runs``."""


def quantity(name: str) -> Quantity:
    """How a numeric column is shown.

    Raises
    ------
    UnknownName
        With the nearest name.
    """
    if name not in QUANTITIES:
        raise UnknownName("metric", name, QUANTITIES)
    return QUANTITIES[name]


def quantity_of(name: str, rows: Sequence[Mapping[str, Any]]) -> Quantity:
    """How a column is shown in these rows: that of a task's metric is called by it, where they all have one metric.

    Raises
    ------
    UnknownName
        With the nearest name.
    """
    found = quantity(name)
    metrics = {(row["metric"], row["metric_unit"], row["metric_better"]) for row in rows if row["metric"] is not None}
    return found.of(*metrics.pop()) if found.of_task and len(metrics) == 1 else found


def section(title: str) -> list[str]:
    """The names of a section of ``assay show``, in order."""
    return [column.name for column in COLUMNS if column.section == title] + list(SECTIONS[title])
