-- Assay's results database, version 3 (the version is the row of schema_version; results/schema.py inserts it).
--
-- Everything here can be rebuilt from the record files beside the database (`assay db rebuild`). The tables hold what was
-- measured and the statistics that are computed once, when a record is taken up (harness/stats.py); the views compute
-- everything else. results/columns.py has the columns of runs and those of records that are stored as they are measured:
-- results/schema.py puts them where a line /* NAME */ stands. The comment after a column says what it is and its unit; it is stored in the
-- database too (duckdb_columns().comment). NULL means "not known", never 0; runs.reasons says why.

CREATE TABLE schema_version ( -- One row: which schema the file has.
    version INTEGER NOT NULL, -- version of the tables; another one is refused, `assay db rebuild` converts (count)
    views_sha256 VARCHAR NOT NULL, -- of schema.sql; the views are replaced when it changes (sha256 hex)
);

CREATE TABLE records ( -- One row a run: the scalar fields and JSON fields of its record file.
    run_id VARCHAR PRIMARY KEY, -- unique, sortable by creation time (text)
    created_at TIMESTAMPTZ NOT NULL, -- when the run began (UTC)
    status VARCHAR NOT NULL, -- ok, unsupported, unavailable, failed, timeout or interrupted (text)
    reason VARCHAR, -- why the status is not ok (text)
    traceback VARCHAR, -- of an exception that nobody expected (text)
    task VARCHAR NOT NULL, -- registered name (text)
    task_config JSON NOT NULL, -- resolved parameters of the task (JSON object)
    method VARCHAR NOT NULL, -- names of the chain joined with " > " (text)
    chain JSON NOT NULL, -- one {"name": ..., parameters} a step (JSON array)
    config JSON NOT NULL, -- {step name: its parameters, ..., "hardware": its parameters}, empty ones left out; a repeated step is "name#2" (JSON object)
    hardware VARCHAR NOT NULL, -- registered name (text)
    hardware_config JSON NOT NULL, -- resolved parameters of the hardware (JSON object)
    seed BIGINT NOT NULL, -- seed of everything random (integer)
    batch_size BIGINT NOT NULL, -- examples in one timed inference (count)
    threads BIGINT NOT NULL, -- threads asked for (count)
    settings JSON NOT NULL, -- resolved measure and energy settings (JSON object)
    spec_name VARCHAR NOT NULL, -- the spec that asked for the run (text)
    spec_hash VARCHAR NOT NULL, -- of the resolved spec (sha256 hex)
    cell_hash VARCHAR NOT NULL, -- of everything that goes into the result: sources, package versions, machine (sha256 hex)
    task_hash VARCHAR NOT NULL, -- of the task's source and parameters (sha256 hex)
    method_hash VARCHAR NOT NULL, -- of the chain's source and parameters (sha256 hex)
    hardware_hash VARCHAR NOT NULL, -- of the hardware's source and parameters (sha256 hex)
    dataset_hash VARCHAR, -- of the decompressed data (sha256 hex)
    git_commit VARCHAR, -- of Assay's checkout (hex)
    git_dirty BOOLEAN, -- whether the checkout had uncommitted changes (true/false)
    packages JSON NOT NULL, -- distribution name to version (JSON object)
    machine_id VARCHAR, -- see machines (text)
    machine JSON NOT NULL, -- description of the machine at that time (JSON object)
    conditions JSON NOT NULL, -- what varies on one machine: load average, clock in MHz (JSON object)
    effective JSON NOT NULL, -- what the runtime said of itself, and the quantization scheme (JSON object)
    /* fields */
    original_sha256 VARCHAR, -- of the stored model before compression; runs are compared only where it is equal (sha256 hex)
    random_in_evaluation BOOLEAN, -- whether two calls of the torch model on equal inputs differed: scores are not compared (true/false)
    signature JSON, -- names, shapes and dtypes of inputs and outputs (JSON object)
    workload JSON, -- what one timed query is: phases, sizes, unit (JSON object)
    warmup_queries BIGINT, -- untimed inferences before the timed ones (count)
    stages JSON NOT NULL, -- what each step reported: name, seconds, cached, params_nonzero, bytes of its weights (JSON array)
    reasons JSON NOT NULL, -- column name to why it is NULL, as recorded (JSON object)
    warnings JSON NOT NULL, -- what may have spoilt a number, with the remedy (JSON array of text)
    notes JSON NOT NULL, -- what was inferred or changed on the way (JSON array of text)
    setting_sha256 VARCHAR NOT NULL, -- of what must be equal for a comparison: task, its parameters and source, hardware and its parameters, seed, threads, batch size, machine, data, and whether the record was merged (sha256 hex)
    origin VARCHAR, -- where a merged record came from, and when; NULL for one that was made here (text)
    arrived_at TIMESTAMPTZ NOT NULL, -- by which the newest is found: created_at, or just after our own record that came before it, where the clock went back (UTC)
    record_schema INTEGER NOT NULL, -- version of the record format, as in its file (count)
    record_sha256 VARCHAR NOT NULL, -- of the record's canonical JSON, as in its file (sha256 hex)
);

CREATE TABLE latency_samples ( -- Every timed call.
    run_id VARCHAR NOT NULL, -- see records (text)
    phase VARCHAR NOT NULL, -- forward; prefill or decode of a language model (text)
    i INTEGER NOT NULL, -- position in the timed loop, from 0 (index)
    ns BIGINT NOT NULL, -- duration of one call over batch_size examples (nanoseconds)
);

CREATE TABLE phases ( -- One row a phase of a run's workload, summed up when the record was taken up.
    run_id VARCHAR NOT NULL, -- see records (text)
    i INTEGER NOT NULL, -- position in the workload, from 0 (index)
    phase VARCHAR NOT NULL, -- forward; prefill or decode of a language model (text)
    calls BIGINT NOT NULL, -- calls in one query (count)
    units BIGINT NOT NULL, -- of the workload's unit (examples or tokens), made of one example by one call (count)
    n BIGINT NOT NULL, -- timed calls (count)
    total_ns BIGINT NOT NULL, -- their durations together (nanoseconds)
    p50_ms DOUBLE, -- median; NULL below 6 calls, the least whose extremes bound it with 95 % confidence (milliseconds)
    p90_ms DOUBLE, -- 90th percentile; NULL below 64 calls (milliseconds)
    p99_ms DOUBLE, -- 99th percentile; NULL below 662 calls (milliseconds)
);

CREATE TABLE scores ( -- One row a metric and comparison of a run.
    run_id VARCHAR NOT NULL, -- see records (text)
    i INTEGER NOT NULL, -- position in the record, from 0; the first against targets is the task's metric (index)
    metric VARCHAR NOT NULL, -- name, with what distinguishes it (text)
    config JSON NOT NULL, -- registered name and parameters (JSON object)
    data VARCHAR NOT NULL, -- test, validation, train or random: what was scored (text)
    against VARCHAR NOT NULL, -- targets; torch: the model's own outputs in torch; float: those before it was quantized (text)
    unit VARCHAR NOT NULL, -- as it is shown: % for a fraction (text)
    better VARCHAR NOT NULL, -- higher or lower (text)
    proportion BOOLEAN NOT NULL, -- whether it is the mean of a first part that is 0 or 1 (true/false)
    split_sha256 VARCHAR, -- of the examples; runs are compared only where it is equal (sha256 hex)
    n BIGINT, -- examples (count)
    value DOUBLE, -- of all of them (unit of the metric; a fraction where unit is %)
    low DOUBLE, -- 95 % interval over examples, lower end; against targets only (as value)
    high DOUBLE, -- 95 % interval over examples, upper end; against targets only (as value)
    no_interval VARCHAR, -- why there is none (text)
);

CREATE TABLE example_scores ( -- What every example left: one row a part of a score.
    run_id VARCHAR NOT NULL, -- see records (text)
    i INTEGER NOT NULL, -- of scores (index)
    part VARCHAR NOT NULL, -- of the metric: correct, label, predicted, nll, ... (text)
    by_example DOUBLE[] NOT NULL, -- in the order of the examples; NULL for one without a score (list of numbers)
);

CREATE TABLE comparisons ( -- One row a score against targets of a run that has a baseline: the paired test over examples.
    run_id VARCHAR NOT NULL, -- see records (text)
    i INTEGER NOT NULL, -- of scores (index)
    metric VARCHAR NOT NULL, -- as in scores (text)
    baseline_run_id VARCHAR NOT NULL, -- as in pairs (text)
    delta DOUBLE, -- value - baseline's value on the same examples (as value)
    low DOUBLE, -- 95 % interval of delta, lower end (as value)
    high DOUBLE, -- 95 % interval of delta, upper end (as value)
    p DOUBLE, -- two-sided p-value of no difference (probability)
    test VARCHAR, -- the test (text)
    gained BIGINT, -- of a proportion: examples that only this run gets right (count)
    lost BIGINT, -- of a proportion: examples that only the baseline gets right (count)
    reason VARCHAR, -- why there is no comparison (text)
);

CREATE TABLE layers ( -- What happened to each layer.
    run_id VARCHAR NOT NULL, -- see records (text)
    i INTEGER NOT NULL, -- position in the model, from 0 (index)
    name VARCHAR NOT NULL, -- of the weight's module (text)
    kind VARCHAR, -- of the module (text)
    shape JSON, -- of the weight (JSON array)
    parameters BIGINT, -- of the weight (count)
    nonzero BIGINT, -- of parameters, not zero (count)
    bits DOUBLE, -- that one weight takes (bits)
    rank BIGINT, -- of the weight as a matrix (count)
    error_mean DOUBLE, -- mean absolute difference to the original's weight (units of the weight)
    error_max DOUBLE, -- largest absolute difference to the original's weight (units of the weight)
    sqnr_db DOUBLE, -- signal-to-quantization-noise ratio of the weight (decibels)
);

CREATE TABLE energy_readings ( -- One row a meter domain and window.
    run_id VARCHAR NOT NULL, -- see records (text)
    i INTEGER NOT NULL, -- position in the record, from 0 (index)
    method VARCHAR NOT NULL, -- measured_counter, measured_sampled or modelled (text)
    domain VARCHAR NOT NULL, -- what the meter covers; domains of one run do not overlap (text)
    gross_j DOUBLE NOT NULL, -- energy of the window, idle power included (joules)
    idle_w DOUBLE, -- power without the work (watts)
    window_s DOUBLE NOT NULL, -- length of the window (seconds)
    inferences BIGINT NOT NULL, -- batches run in the window (count)
    inputs JSON NOT NULL, -- counter values, or the stated model and its inputs (JSON object)
    grid_g_per_kwh DOUBLE, -- carbon intensity of electricity (grams of CO2 equivalent per kilowatt hour)
);

CREATE TABLE artifacts ( -- The deployed file or folder of a run.
    run_id VARCHAR NOT NULL, -- see records (text)
    sha256 VARCHAR NOT NULL, -- of the artifact's bytes (sha256 hex)
    size_bytes BIGINT, -- as deployed, on disk (bytes)
    zstd_bytes BIGINT, -- compressed with Zstandard level 19 (bytes)
    format VARCHAR, -- file format (text)
    files JSON, -- relative names (JSON array of text)
);

CREATE TABLE weights ( -- The compressed model's state dict of a run, weighed.
    run_id VARCHAR NOT NULL, -- see records (text)
    plain_bytes BIGINT, -- raw tensors (bytes)
    container_bytes BIGINT, -- as a file of compressed weights: codebooks, tables and headers counted (bytes)
    shannon_bytes BIGINT, -- entropy bound of the representation that the file chose (bytes)
    zstd_bytes BIGINT, -- raw tensors by Zstandard level 19 (bytes)
    xz_bytes BIGINT, -- raw tensors by xz preset 9 (bytes)
    gzip_bytes BIGINT, -- raw tensors by gzip level 9 (bytes)
);

CREATE TABLE machines ( -- One row a machine, as its newest run described it.
    machine_id VARCHAR PRIMARY KEY, -- stable pseudonym of the machine (text)
    last_run_id VARCHAR NOT NULL, -- the newest run on it, whose description this is (text)
    last_seen TIMESTAMPTZ NOT NULL, -- creation time of that run (UTC)
    hostname VARCHAR, -- network name (text)
    cpu_model VARCHAR, -- processor name (text)
    isa JSON, -- instruction-set flags that matter here (JSON array of text)
    cores INTEGER, -- logical cores (count)
    memory_bytes BIGINT, -- main memory (bytes)
    governor VARCHAR, -- CPU frequency governor (text)
    os VARCHAR, -- operating system and kernel (text)
    gpus JSON, -- graphics processors with driver (JSON array)
    description JSON NOT NULL, -- everything recorded about the machine (JSON object)
);

CREATE TABLE claims ( -- One row a checked claim of a paper; older checks stay.
    entry_id VARCHAR PRIMARY KEY, -- unique, sortable by creation time (text)
    created_at TIMESTAMPTZ NOT NULL, -- when it was checked (UTC)
    paper VARCHAR NOT NULL, -- key of the paper's recipe (text)
    id VARCHAR NOT NULL, -- the claim's id within the paper (text)
    claimed DOUBLE, -- the paper's figure, or its difference of a relation (unit of the claim, see details)
    measured DOUBLE, -- ours: the mean over seeds, or the mean paired difference of a relation (unit of the claim)
    tolerance DOUBLE, -- largest |measured - claimed| that counts as reproduced; of a relation its margin (unit of the claim)
    verdict VARCHAR NOT NULL, -- reproduced, not reproduced, stand-in, holds, does not hold, inconclusive or not run, with qualifications or a reason in parentheses (text)
    reason VARCHAR, -- why it was not run or is a stand-in (text)
    run_ids VARCHAR[] NOT NULL, -- the runs it rests on (list of text)
    details JSON NOT NULL, -- whatever else the recipe says: unit, description, criterion (JSON object)
    record_sha256 VARCHAR NOT NULL, -- of the claim's canonical JSON, as in its file (sha256 hex)
);

-- ---------------------------------------------------------------------------------------------------------------------
-- The baseline of a run is the newest ok run whose chain is [{"name": "baseline"}] of an equal setting_sha256 (records), an
-- equal model (original_sha256) and an equal workload. A baseline's baseline is itself. "Newest" goes by arrival, so that a
-- merged record with a clock of its own does not come first. Energy is compared only where method and energy settings are
-- equal, scores only over equal examples.

CREATE OR REPLACE VIEW pairs AS -- One row a run: the baseline that it is compared with.
WITH baselines AS (
    SELECT * FROM records WHERE status = 'ok' AND chain = '[{"name":"baseline"}]'
    QUALIFY row_number() OVER (
        PARTITION BY setting_sha256, original_sha256, workload ORDER BY arrived_at DESC, created_at DESC, run_id DESC
    ) = 1
),
alike AS (SELECT setting_sha256, list(DISTINCT coalesce(original_sha256, '')) AS models FROM baselines GROUP BY ALL)
SELECT
    r.run_id, -- see records (text)
    CASE WHEN r.status = 'ok' AND r.chain = '[{"name":"baseline"}]' THEN r.run_id ELSE b.run_id END AS baseline_run_id, -- the run that it is compared with (text)
    CASE
        WHEN b.run_id IS NOT NULL THEN NULL
        WHEN list_contains(a.models, coalesce(r.original_sha256, '')) THEN 'the baseline ran another workload: run both again with --rerun'
        WHEN a.models IS NOT NULL AND r.status = 'ok' THEN 'the baseline is of another model (original_sha256 differs): run both again with --rerun'
        ELSE 'no ok baseline run with equal task, hardware, seed, threads, batch size and data on the same machine'
    END AS reason, -- why there is none (text)
FROM records r
LEFT JOIN baselines b
    ON r.setting_sha256 = b.setting_sha256 AND r.original_sha256 IS NOT DISTINCT FROM b.original_sha256
    AND r.workload IS NOT DISTINCT FROM b.workload
LEFT JOIN alike a ON r.setting_sha256 = a.setting_sha256;

CREATE OR REPLACE VIEW predictions AS -- Every test example of every classification.
SELECT
    run_id, -- see records (text)
    unnest(range(len(labels)))::INTEGER AS example_id, -- position in the test set, from 0 (index)
    unnest(labels)::BIGINT AS label, -- true class (class index)
    unnest(predicted)::BIGINT AS predicted, -- predicted class (class index)
FROM (
    SELECT run_id, i, max(by_example) FILTER (part = 'label') AS labels, max(by_example) FILTER (part = 'predicted') AS predicted
    FROM example_scores SEMI JOIN scores USING (run_id, i)
    GROUP BY run_id, i
)
WHERE labels IS NOT NULL AND predicted IS NOT NULL;

CREATE OR REPLACE VIEW runs AS -- One tidy row a run.
WITH timed AS (
    SELECT run_id,
        string_agg(phase, ', ' ORDER BY i) AS phases,
        max(n) FILTER (i = 0) AS n_timed,
        max(p50_ms) FILTER (phase = 'forward') AS p50_ms,
        max(p90_ms) FILTER (phase = 'forward') AS p90_ms,
        max(p99_ms) FILTER (phase = 'forward') AS p99_ms,
        max(p50_ms) FILTER (phase = 'prefill') AS prefill_p50_ms,
        max(p50_ms) FILTER (phase = 'decode') AS decode_p50_ms,
        CASE WHEN count(p50_ms) = count(*) THEN sum(calls * p50_ms) END AS query_p50_ms,
        sum(calls * total_ns / nullif(n, 0)::DOUBLE) AS query_mean_ns,
        arg_max(units * n / nullif(total_ns, 0)::DOUBLE, i) AS units_per_ns
    FROM phases GROUP BY run_id
),
meters AS (
    -- Measured and modelled joules are never added: a run that has both is represented by the measured ones.
    -- 'measured_counter' < 'measured_sampled' in the alphabet, so max() names the weaker of two measurements.
    SELECT run_id,
        max(method) AS energy_method,
        sum(gross_j / nullif(inferences, 0)) AS gross_per_batch,
        CASE WHEN count(idle_w) = count(*) THEN sum((gross_j - idle_w * window_s) / nullif(inferences, 0)) END AS net_per_batch,
        max(grid_g_per_kwh) AS grid_g_per_kwh
    FROM energy_readings
    GROUP BY run_id, method = 'modelled'
    QUALIFY row_number() OVER (PARTITION BY run_id ORDER BY method = 'modelled') = 1
),
first_scores AS (
    SELECT * FROM scores QUALIFY row_number() OVER (PARTITION BY run_id, against, metric ORDER BY i) = 1
),
figures AS (
    SELECT run_id, map_from_entries(list((against || '/' || metric, value))) AS figures, bool_or(against = 'torch') AS compared_with_torch
    FROM first_scores GROUP BY run_id
),
accuracies AS (
    SELECT * FROM scores WHERE against = 'targets' AND (metric = 'accuracy' OR starts_with(metric, 'accuracy['))
    QUALIFY row_number() OVER (PARTITION BY run_id ORDER BY i) = 1
),
task_scores AS (
    SELECT * FROM scores WHERE against = 'targets' QUALIFY row_number() OVER (PARTITION BY run_id ORDER BY i) = 1
),
facts AS MATERIALIZED (
    SELECT r.*, t.* EXCLUDE (run_id), p.baseline_run_id, p.reason AS no_baseline,
        m.energy_method,
        m.gross_per_batch / r.batch_size AS energy_j,
        m.net_per_batch / r.batch_size AS energy_net_j,
        m.grid_g_per_kwh,
        a.sha256 AS artifact_sha256, a.size_bytes, a.zstd_bytes,
        w.plain_bytes, w.container_bytes, w.shannon_bytes, w.zstd_bytes AS weights_zstd_bytes, w.xz_bytes, w.gzip_bytes,
        s.i AS score_i, s.metric, s.unit AS metric_unit, s.better AS metric_better, s.n AS n_examples,
        s.value AS score, s.low AS score_low, s.high AS score_high, s.no_interval,
        c.i AS accuracy_i, c.value AS accuracy, c.low AS accuracy_low, c.high AS accuracy_high,
        f.figures, coalesce(f.compared_with_torch, false) AS compared_with_torch
    FROM records r
    JOIN pairs p USING (run_id)
    LEFT JOIN timed t USING (run_id)
    LEFT JOIN meters m USING (run_id)
    LEFT JOIN artifacts a USING (run_id)
    LEFT JOIN weights w USING (run_id)
    LEFT JOIN task_scores s USING (run_id)
    LEFT JOIN accuracies c USING (run_id)
    LEFT JOIN figures f USING (run_id)
),
warned AS (
    SELECT f.run_id, to_json(list_concat(
        CAST(f.warnings AS VARCHAR[]),
        CASE WHEN b.packages <> f.packages THEN ['the baseline ran with other package versions: run it again with --rerun'] ELSE [] END,
        CASE
            WHEN abs(date_diff('second', b.created_at, f.created_at)) > 3600
            THEN ['the baseline was measured more than an hour apart, and timings drift: run both again with --rerun'] ELSE []
        END
    )) AS all_warnings
    FROM facts f LEFT JOIN facts b ON b.run_id = f.baseline_run_id
),
computed AS (
    SELECT
        /* columns */
        f.reasons AS recorded,
        f.no_baseline, f.no_interval, f.phases, f.compared_with_torch, f.figures, f.query_p50_ms,
        b.energy_method AS b_energy_method,
        task.reason AS not_compared,
        acc.reason AS accuracy_not_compared,
        CASE WHEN f.status <> 'ok' THEN 'status ' || f.status || coalesce(': ' || f.reason, '') END AS not_ok
    FROM (SELECT * FROM facts JOIN warned USING (run_id)) f
    LEFT JOIN facts b ON b.run_id = f.baseline_run_id
    LEFT JOIN comparisons task ON task.run_id = f.run_id AND task.i = f.score_i AND task.baseline_run_id = f.baseline_run_id
    LEFT JOIN comparisons acc ON acc.run_id = f.run_id AND acc.i = f.accuracy_i AND acc.baseline_run_id = f.baseline_run_id
)
SELECT
    /* described */
-- Recorded reasons win; a reason is given for every NULL. In json_merge_patch a null in the patch means "no such key".
FROM (
    SELECT *, json_merge_patch('{}', json_merge_patch(json_object(
        /* reasons */
    ), recorded)) AS reasons
    FROM computed
)
ORDER BY created_at, run_id;

CREATE OR REPLACE VIEW latest AS -- runs, one row a cell_hash: the newest that needs no new run (ok, unsupported), else the newest.
SELECT runs.* FROM runs JOIN records USING (run_id)
QUALIFY row_number() OVER (
    PARTITION BY runs.cell_hash
    ORDER BY runs.status IN ('ok', 'unsupported') DESC, origin IS NULL DESC, arrived_at DESC, runs.created_at DESC, run_id DESC
) = 1
ORDER BY runs.created_at, run_id;
