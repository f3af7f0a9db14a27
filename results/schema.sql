-- Assay's results database, version 2 (the version is the row of schema_version; results/schema.py inserts it).
--
-- Everything here can be rebuilt from the record files beside the database (`assay db rebuild`). The tables hold what was
-- measured, the views compute everything else. The comment after a column says what it is and its unit; it is stored in the
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
    precision VARCHAR, -- effective precision of the kernels (text)
    params_original BIGINT, -- parameters before compression (count)
    params_total BIGINT, -- parameters after compression (count)
    params_nonzero BIGINT, -- of params_total, not zero (count)
    macs BIGINT, -- multiply-accumulates of one example; FLOPs are twice as many (count)
    n_examples BIGINT, -- examples of the test set (count)
    n_correct BIGINT, -- of n_examples, classified right (count)
    correct BIT, -- bit i is 1 where example i is right, so that paired comparisons are bit operations (bit string)
    labels_sha256 VARCHAR, -- of the labels in order; runs are paired only where equal (sha256 hex)
    warmup_queries BIGINT, -- untimed inferences before the timed ones (count)
    load_ms DOUBLE, -- loading the artifact in a fresh process (milliseconds)
    first_ms DOUBLE, -- first inference after loading (milliseconds)
    peak_rss_bytes BIGINT, -- high-water mark of the measuring process (bytes)
    fidelity JSON, -- deployed outputs against the torch model's: max_abs, top1, mean_kl, n, data (JSON object)
    stages JSON NOT NULL, -- what each step reported: name, seconds, cached, params_nonzero, bytes of its weights (JSON array)
    reasons JSON NOT NULL, -- column name to why it is NULL, as recorded (JSON object)
    warnings JSON NOT NULL, -- what may have spoilt a number, with the remedy (JSON array of text)
    record_schema INTEGER NOT NULL, -- version of the record format (count)
    record_sha256 VARCHAR NOT NULL, -- of the record's canonical JSON, as in its file (sha256 hex)
);

CREATE TABLE latency_samples ( -- Every timed inference.
    run_id VARCHAR NOT NULL, -- see records (text)
    i INTEGER NOT NULL, -- position in the timed loop, from 0 (index)
    ns BIGINT NOT NULL, -- duration of one inference over batch_size examples (nanoseconds)
);

CREATE TABLE predictions ( -- Every test example of every run.
    run_id VARCHAR NOT NULL, -- see records (text)
    example_id INTEGER NOT NULL, -- position in the test set, from 0 (index)
    label BIGINT NOT NULL, -- true class (class index)
    predicted BIGINT NOT NULL, -- predicted class (class index)
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
-- Statistics. harness/stats.py has the same functions in Python; tests hold the two together.

-- (least and greatest pass over NULL, so it is asked for first.)
-- Wilson score interval at 95 % (Wilson 1927, JASA 22:209, eq. 1 solved for p), as a fraction. z = 1.959963984540054.
CREATE OR REPLACE MACRO wilson_low(k, n) AS
    CASE WHEN n > 0 AND k IS NOT NULL THEN greatest(0.0, (k + 1.9207294103470620 - 1.959963984540054 * sqrt(k * (n - k) / n::DOUBLE + 0.9603647051735310)) / (n + 3.8414588206941240)) END;

CREATE OR REPLACE MACRO wilson_high(k, n) AS
    CASE WHEN n > 0 AND k IS NOT NULL THEN least(1.0, (k + 1.9207294103470620 + 1.959963984540054 * sqrt(k * (n - k) / n::DOUBLE + 0.9603647051735310)) / (n + 3.8414588206941240)) END;

-- Exact McNemar test (McNemar 1947; binomial, two-sided): b and c are the two kinds of discordant pairs, n = b + c, and
-- p = min(1, 2 P(X <= min(b, c))), X ~ Bin(n, 1/2). Terms more than 6 sqrt(n) below min(b, c) are smaller than the
-- first by a factor of exp(-72) (Hoeffding) and are left out, so that the sum stays short for any n.
CREATE OR REPLACE MACRO mcnemar_exact(b, c) AS
    CASE
        WHEN b IS NULL OR c IS NULL THEN NULL
        WHEN b = c THEN 1.0::DOUBLE
        ELSE least(1.0::DOUBLE, 2 * list_sum(list_transform(
            range(greatest(0, least(b, c) - ceil(6 * sqrt(b + c))::BIGINT), least(b, c) + 1),
            lambda i: exp(lgamma(b + c + 1) - lgamma(i + 1) - lgamma(b + c - i + 1) - (b + c) * 0.69314718055994530942)
        )))
    END;

-- Adjusted Wald interval at 95 % for a difference of paired proportions (Bonett & Price 2012, J. Educ. Behav. Stat. 37:479,
-- eq. 10): one is added to each discordant count and two to n. gained and lost are discordant counts, n the pairs.
CREATE OR REPLACE MACRO paired_low(gained, lost, n) AS
    CASE WHEN n > 0 AND gained + lost IS NOT NULL THEN greatest(-1.0, (gained - lost) / (n + 2.0) - 1.959963984540054 * sqrt(((gained + lost + 2) / (n + 2.0) - pow((gained - lost) / (n + 2.0), 2)) / (n + 2.0))) END;

CREATE OR REPLACE MACRO paired_high(gained, lost, n) AS
    CASE WHEN n > 0 AND gained + lost IS NOT NULL THEN least(1.0, (gained - lost) / (n + 2.0) + 1.959963984540054 * sqrt(((gained + lost + 2) / (n + 2.0) - pow((gained - lost) / (n + 2.0), 2)) / (n + 2.0))) END;

-- ---------------------------------------------------------------------------------------------------------------------
-- Percentiles need samples: p90 >= 64 and p99 >= 662, the smallest n for which the percentile's one-sided 99 % bound
-- is the second largest sample (MLPerf inference's early-stopping rule); p50 >= 6, the smallest n whose extremes
-- bound the median with 95 % confidence.
--
-- The baseline of a run is the newest ok run whose chain is [{"name": "baseline"}] with equal task, task_config, task_hash
-- (its source code), hardware, hardware_config, seed, threads, batch_size, machine_id and dataset_hash. A baseline's baseline is itself. Energy is
-- compared only where method and energy settings are equal, predictions only where the labels are equal.

CREATE OR REPLACE VIEW runs AS -- One tidy row a run.
WITH latency AS (
    SELECT run_id, count(*) AS n, sum(ns) AS total_ns, quantile_cont(ns, [0.5, 0.9, 0.99]) AS q
    FROM latency_samples GROUP BY run_id
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
facts AS MATERIALIZED (
    SELECT r.*,
        r.status = 'ok' AND r.chain = '[{"name":"baseline"}]' AS is_baseline,
        coalesce(l.n, 0) AS n_latency,
        CASE WHEN l.n >= 6 THEN l.q[1] / 1e6 END AS p50_ms,
        CASE WHEN l.n >= 64 THEN l.q[2] / 1e6 END AS p90_ms,
        CASE WHEN l.n >= 662 THEN l.q[3] / 1e6 END AS p99_ms,
        r.batch_size * l.n / nullif(l.total_ns / 1e9, 0) AS throughput,
        m.energy_method,
        m.gross_per_batch / r.batch_size AS energy_j,
        m.net_per_batch / r.batch_size AS energy_net_j,
        m.grid_g_per_kwh,
        a.sha256 AS artifact_sha256, a.size_bytes, a.zstd_bytes,
        w.plain_bytes, w.container_bytes, w.shannon_bytes, w.zstd_bytes AS weights_zstd_bytes, w.xz_bytes, w.gzip_bytes
    FROM records r
    LEFT JOIN latency l USING (run_id)
    LEFT JOIN meters m USING (run_id)
    LEFT JOIN artifacts a USING (run_id)
    LEFT JOIN weights w USING (run_id)
),
newest_baseline AS (
    SELECT * FROM facts WHERE is_baseline
    QUALIFY row_number() OVER (
        PARTITION BY task, task_config, task_hash, hardware, hardware_config, seed, threads, batch_size, machine_id, dataset_hash
        ORDER BY created_at DESC, run_id DESC
    ) = 1
),
matched AS (
    SELECT f.run_id,
        CASE WHEN f.is_baseline THEN f.run_id ELSE n.run_id END AS baseline_run_id
    FROM facts f
    LEFT JOIN newest_baseline n
        ON f.task = n.task AND f.task_config = n.task_config AND f.task_hash = n.task_hash
        AND f.hardware = n.hardware AND f.hardware_config = n.hardware_config
        AND f.seed = n.seed AND f.threads = n.threads AND f.batch_size = n.batch_size
        AND f.machine_id IS NOT DISTINCT FROM n.machine_id
        AND f.dataset_hash IS NOT DISTINCT FROM n.dataset_hash
),
pairs AS (
    SELECT m.run_id, m.baseline_run_id,
        b.size_bytes AS b_size_bytes, b.plain_bytes AS b_plain_bytes, b.macs AS b_macs, b.zstd_bytes AS b_zstd_bytes, b.p50_ms AS b_p50_ms, b.packages AS b_packages, b.created_at AS b_created_at,
        CASE WHEN b.energy_method = f.energy_method AND (b.settings -> 'energy') = (f.settings -> 'energy') THEN b.energy_j END AS b_energy_j,
        b.energy_method AS b_energy_method,
        -- Bit strings of unequal length cannot be combined; equal labels mean equal length.
        CASE WHEN f.labels_sha256 = b.labels_sha256 THEN bit_count(f.correct & ~b.correct)::BIGINT END AS gained,
        CASE WHEN f.labels_sha256 = b.labels_sha256 THEN bit_count(~f.correct & b.correct)::BIGINT END AS lost
    FROM matched m
    JOIN facts f USING (run_id)
    LEFT JOIN facts b ON b.run_id = m.baseline_run_id
),
derived AS (
    SELECT f.*, p.* EXCLUDE (run_id),
        f.n_correct / nullif(f.n_examples, 0)::DOUBLE AS accuracy,
        p.b_size_bytes / nullif(f.size_bytes, 0)::DOUBLE AS compression_ratio,
        p.b_zstd_bytes / nullif(f.zstd_bytes, 0)::DOUBLE AS zstd_compression_ratio,
        p.b_plain_bytes / nullif(f.container_bytes, 0)::DOUBLE AS container_compression_ratio,
        p.b_macs / nullif(f.macs, 0)::DOUBLE AS macs_ratio,
        1 - f.params_nonzero / nullif(f.params_original, 0)::DOUBLE AS pruning_rate,
        p.b_p50_ms / nullif(f.p50_ms, 0) AS speedup,
        p.b_energy_j / nullif(f.energy_j, 0) AS energy_ratio,
        f.energy_j / 3.6e6 * f.grid_g_per_kwh AS carbon_g,
        (p.gained - p.lost) / nullif(f.n_examples, 0)::DOUBLE AS accuracy_delta,
        -- A run against itself differs by nothing at all, so its interval has no width.
        CASE WHEN f.run_id = p.baseline_run_id AND p.gained IS NOT NULL THEN 0.0 ELSE paired_low(p.gained, p.lost, f.n_examples) END AS accuracy_delta_low,
        CASE WHEN f.run_id = p.baseline_run_id AND p.gained IS NOT NULL THEN 0.0 ELSE paired_high(p.gained, p.lost, f.n_examples) END AS accuracy_delta_high,
        mcnemar_exact(p.gained, p.lost) AS mcnemar_p,
        try_cast(f.fidelity ->> 'max_abs' AS DOUBLE) AS fidelity_max_abs,
        try_cast(f.fidelity ->> 'top1' AS DOUBLE) AS fidelity_top1,
        try_cast(f.fidelity ->> 'mean_kl' AS DOUBLE) AS fidelity_mean_kl,
        CASE WHEN f.status <> 'ok' THEN 'status ' || f.status || coalesce(': ' || f.reason, '') END AS not_ok,
        CASE
            WHEN p.baseline_run_id IS NULL THEN
                'no ok baseline run with equal task, hardware, seed, threads, batch size and data on the same machine'
        END AS no_baseline
    FROM facts f JOIN pairs p USING (run_id)
),
explained AS (
    -- Recorded reasons win; a reason is given for every NULL. In json_merge_patch a null in the patch means "no such key".
    SELECT run_id, json_merge_patch('{}', json_merge_patch(json_object(
        'precision', CASE WHEN precision IS NULL THEN coalesce(not_ok, 'the runtime did not say') END,
        'dataset_hash', CASE WHEN dataset_hash IS NULL THEN coalesce(not_ok, 'the task has no data') END,
        'accuracy', CASE WHEN accuracy IS NULL THEN why_accuracy END,
        'accuracy_low', CASE WHEN accuracy IS NULL THEN why_accuracy END,
        'accuracy_high', CASE WHEN accuracy IS NULL THEN why_accuracy END,
        'n_examples', CASE WHEN n_examples IS NULL THEN why_accuracy END,
        'accuracy_delta', CASE WHEN accuracy_delta IS NULL THEN why_delta END,
        'accuracy_delta_low', CASE WHEN accuracy_delta IS NULL THEN why_delta END,
        'accuracy_delta_high', CASE WHEN accuracy_delta IS NULL THEN why_delta END,
        'mcnemar_p', CASE WHEN mcnemar_p IS NULL THEN why_delta END,
        'n_gained', CASE WHEN gained IS NULL THEN why_delta END,
        'n_lost', CASE WHEN lost IS NULL THEN why_delta END,
        'size_bytes', CASE WHEN size_bytes IS NULL THEN why_size END,
        'zstd_bytes', CASE WHEN zstd_bytes IS NULL THEN coalesce(reasons ->> 'artifact', not_ok, 'the artifact was not compressed') END,
        'artifact_sha256', CASE WHEN artifact_sha256 IS NULL THEN why_size END,
        'compression_ratio', CASE WHEN compression_ratio IS NULL THEN coalesce(CASE WHEN size_bytes IS NULL THEN coalesce(reasons ->> 'size_bytes', why_size) END, no_baseline, 'the size is 0, or the baseline has none') END,
        'zstd_compression_ratio', CASE WHEN zstd_compression_ratio IS NULL THEN coalesce(CASE WHEN zstd_bytes IS NULL THEN coalesce(reasons ->> 'zstd_bytes', reasons ->> 'artifact', not_ok, 'the artifact was not compressed') END, no_baseline, 'the baseline has no compressed size') END,
        'plain_bytes', CASE WHEN plain_bytes IS NULL THEN why_weights END,
        'container_bytes', CASE WHEN container_bytes IS NULL THEN why_weights END,
        'shannon_bytes', CASE WHEN shannon_bytes IS NULL THEN why_weights END,
        'weights_zstd_bytes', CASE WHEN weights_zstd_bytes IS NULL THEN why_weights END,
        'xz_bytes', CASE WHEN xz_bytes IS NULL THEN why_weights END,
        'gzip_bytes', CASE WHEN gzip_bytes IS NULL THEN why_weights END,
        'container_compression_ratio', CASE WHEN container_compression_ratio IS NULL THEN coalesce(CASE WHEN container_bytes IS NULL THEN why_weights END, no_baseline, 'the baseline''s weights were not weighed') END,
        'macs_ratio', CASE WHEN macs_ratio IS NULL THEN coalesce(CASE WHEN macs IS NULL THEN coalesce(reasons ->> 'macs', not_ok, 'not counted') END, no_baseline, 'the baseline''s multiply-accumulates were not counted, or there are none') END,
        'baseline_run_id', CASE WHEN baseline_run_id IS NULL THEN coalesce(no_baseline, not_ok) END,
        'params_original', CASE WHEN params_original IS NULL THEN coalesce(not_ok, 'not counted') END,
        'params_total', CASE WHEN params_total IS NULL THEN coalesce(not_ok, 'not counted') END,
        'params_nonzero', CASE WHEN params_nonzero IS NULL THEN coalesce(not_ok, 'not counted') END,
        'pruning_rate', CASE WHEN pruning_rate IS NULL THEN coalesce(reasons ->> 'params_nonzero', reasons ->> 'params_original', not_ok, 'parameters were not counted') END,
        'macs', CASE WHEN macs IS NULL THEN coalesce(not_ok, 'not counted') END,
        'latency_p50_ms', CASE WHEN p50_ms IS NULL THEN coalesce(no_latency, n_latency || ' samples; p50 needs 6') END,
        'latency_p90_ms', CASE WHEN p90_ms IS NULL THEN coalesce(no_latency, n_latency || ' samples; p90 needs 64') END,
        'latency_p99_ms', CASE WHEN p99_ms IS NULL THEN coalesce(no_latency, n_latency || ' samples; p99 needs 662') END,
        'throughput_per_s', CASE WHEN throughput IS NULL THEN no_latency END,
        'speedup', CASE WHEN speedup IS NULL THEN coalesce(CASE WHEN p50_ms IS NULL THEN coalesce(reasons ->> 'latency_p50_ms', no_latency, n_latency || ' samples; p50 needs 6') END, no_baseline, 'the baseline has no median latency') END,
        'energy_j', CASE WHEN energy_j IS NULL THEN why_energy END,
        'energy_net_j', CASE WHEN energy_net_j IS NULL THEN CASE WHEN energy_j IS NULL THEN coalesce(reasons ->> 'energy_j', why_energy) ELSE 'idle power is not known' END END,
        'energy_method', CASE WHEN energy_method IS NULL THEN coalesce(reasons ->> 'energy_j', why_energy) END,
        'energy_ratio', CASE WHEN energy_ratio IS NULL THEN coalesce(CASE WHEN energy_j IS NULL THEN coalesce(reasons ->> 'energy_j', why_energy) END, no_baseline, CASE WHEN b_energy_method <> energy_method THEN 'this is ' || energy_method || ', the baseline''s is ' || b_energy_method END, 'the baseline has no energy under equal energy settings, or the energy is 0') END,
        'carbon_g', CASE WHEN carbon_g IS NULL THEN CASE WHEN energy_j IS NULL THEN coalesce(reasons ->> 'energy_j', why_energy) ELSE 'no grid intensity was stated' END END,
        'peak_rss_bytes', CASE WHEN peak_rss_bytes IS NULL THEN coalesce(not_ok, 'not measured') END,
        'load_ms', CASE WHEN load_ms IS NULL THEN coalesce(not_ok, 'not measured') END,
        'first_ms', CASE WHEN first_ms IS NULL THEN coalesce(not_ok, 'not measured') END,
        'fidelity_max_abs', CASE WHEN fidelity_max_abs IS NULL THEN why_fidelity END,
        'fidelity_top1', CASE WHEN fidelity_top1 IS NULL THEN why_fidelity END,
        'fidelity_mean_kl', CASE WHEN fidelity_mean_kl IS NULL THEN why_fidelity END,
        'git_commit', CASE WHEN git_commit IS NULL THEN 'Assay did not run from a git checkout' END,
        'git_dirty', CASE WHEN git_dirty IS NULL THEN 'Assay did not run from a git checkout' END,
        'machine_id', CASE WHEN machine_id IS NULL THEN 'the machine was not identified' END
    ), reasons)) AS all_reasons
    FROM (
        SELECT *,
            coalesce(reasons ->> 'accuracy', reasons ->> 'predictions', not_ok, 'the test set was not evaluated') AS why_accuracy,
            coalesce(
                CASE WHEN accuracy IS NULL THEN coalesce(reasons ->> 'accuracy', reasons ->> 'predictions', not_ok, 'the test set was not evaluated') END,
                no_baseline, 'the baseline was not evaluated on the same examples'
            ) AS why_delta,
            coalesce(reasons ->> 'size_bytes', reasons ->> 'artifact', not_ok, 'no artifact was deployed') AS why_size,
            coalesce(reasons ->> 'weights', not_ok, 'recorded by a version that did not weigh weights: run it again with --rerun') AS why_weights,
            CASE WHEN n_latency = 0 THEN coalesce(reasons ->> 'latency_ns', reasons ->> 'latency', not_ok, 'no inference was timed') END AS no_latency,
            coalesce(reasons ->> 'energy', not_ok, 'no meter was read') AS why_energy,
            coalesce(reasons ->> 'fidelity', not_ok, 'not compared') AS why_fidelity
        FROM derived
    )
)
SELECT
    d.run_id, -- unique, sortable by creation time (text)
    d.created_at, -- when the run began (UTC)
    d.status, -- ok, unsupported, unavailable, failed, timeout or interrupted (text)
    d.reason, -- why the status is not ok (text)
    d.task, -- registered name (text)
    d.method, -- names of the chain joined with " > " (text)
    d.chain, -- one {"name": ..., parameters} a step (JSON array)
    d.config, -- {step name: its parameters, ..., "hardware": its parameters}, empty ones left out (JSON object)
    d.hardware, -- registered name (text)
    d.seed, -- seed of everything random (integer)
    d.batch_size, -- examples in one timed inference (count)
    d.threads, -- threads asked for (count)
    d.precision, -- effective precision of the kernels (text)
    d.accuracy, -- n_correct / n_examples on the test set (fraction)
    wilson_low(d.n_correct, d.n_examples) AS accuracy_low, -- Wilson 95 % interval, lower end (fraction)
    wilson_high(d.n_correct, d.n_examples) AS accuracy_high, -- Wilson 95 % interval, upper end (fraction)
    d.n_examples, -- examples of the test set (count)
    d.size_bytes, -- artifact as deployed (bytes)
    d.zstd_bytes, -- artifact compressed with Zstandard level 19 (bytes)
    d.compression_ratio, -- baseline's size_bytes / size_bytes (ratio, higher is smaller)
    d.zstd_compression_ratio, -- baseline's zstd_bytes / zstd_bytes (ratio, higher is smaller)
    d.plain_bytes, -- raw tensors of the compressed model's state dict (bytes)
    d.container_bytes, -- the state dict as a file of compressed weights, everything in it counted (bytes)
    d.shannon_bytes, -- entropy bound of the representation that the file chose (bytes)
    d.weights_zstd_bytes, -- raw tensors by Zstandard level 19 (bytes)
    d.xz_bytes, -- raw tensors by xz preset 9 (bytes)
    d.gzip_bytes, -- raw tensors by gzip level 9 (bytes)
    d.container_compression_ratio, -- baseline's plain_bytes / container_bytes (ratio, higher is smaller)
    d.params_original, -- parameters before compression (count)
    d.params_total, -- parameters after compression (count)
    d.params_nonzero, -- of params_total, not zero (count)
    d.pruning_rate, -- 1 - params_nonzero / params_original (fraction)
    d.macs, -- multiply-accumulates of one example (count)
    d.macs_ratio, -- baseline's macs / macs (ratio, higher is cheaper)
    d.p50_ms AS latency_p50_ms, -- median duration of one inference over batch_size examples, n >= 6 (milliseconds)
    d.p90_ms AS latency_p90_ms, -- 90th percentile, n >= 64 (milliseconds)
    d.p99_ms AS latency_p99_ms, -- 99th percentile, n >= 662 (milliseconds)
    d.n_latency, -- timed inferences (count)
    d.speedup, -- baseline's p50 / p50 (ratio, higher is faster)
    d.throughput AS throughput_per_s, -- batch_size * n_latency / sum of latencies (examples per second)
    d.energy_j, -- gross energy of one example: sum over domains of gross_j / (inferences * batch_size) (joules)
    d.energy_net_j, -- the same less idle power (joules)
    d.energy_method, -- measured_counter, measured_sampled (if any domain was sampled) or modelled; never a mixture (text)
    d.energy_ratio, -- baseline's energy_j / energy_j, of equal energy_method and energy settings (ratio, higher is less energy)
    d.carbon_g, -- energy_j / 3.6e6 * grid intensity (grams of CO2 equivalent per example)
    d.peak_rss_bytes, -- high-water mark of the measuring process (bytes)
    d.load_ms, -- loading the artifact in a fresh process (milliseconds)
    d.first_ms, -- first inference after loading (milliseconds)
    d.fidelity_max_abs, -- largest |deployed output - torch output| on validation examples (output units)
    d.fidelity_top1, -- share of those examples with the same top class (fraction)
    d.fidelity_mean_kl, -- mean Kullback-Leibler divergence of the softmax outputs (nats)
    d.accuracy_delta, -- accuracy - baseline's accuracy on the same examples (fraction)
    d.accuracy_delta_low, -- Bonett-Price 95 % interval, lower end (fraction)
    d.accuracy_delta_high, -- Bonett-Price 95 % interval, upper end (fraction)
    d.gained AS n_gained, -- examples that only this run gets right (count)
    d.lost AS n_lost, -- examples that only the baseline gets right (count)
    d.mcnemar_p, -- exact two-sided McNemar test of n_gained against n_lost (probability)
    d.baseline_run_id, -- the run that ratios and deltas refer to (text)
    d.spec_name, -- the spec that asked for the run (text)
    d.spec_hash, -- of the resolved spec (sha256 hex)
    d.cell_hash, -- of everything that goes into the result (sha256 hex)
    d.method_hash, -- of the chain's source and parameters (sha256 hex)
    d.dataset_hash, -- of the decompressed data (sha256 hex)
    d.git_commit, -- of Assay's checkout (hex)
    d.git_dirty, -- whether the checkout had uncommitted changes (true/false)
    d.machine_id, -- see machines (text)
    d.artifact_sha256, -- of the artifact's bytes (sha256 hex)
    d.task_config, -- resolved parameters of the task (JSON object)
    d.hardware_config, -- resolved parameters of the hardware (JSON object)
    d.settings, -- resolved measure and energy settings (JSON object)
    d.packages, -- distribution name to version (JSON object)
    d.effective, -- what the runtime said of itself, and the quantization scheme (JSON object)
    to_json(list_concat(
        CAST(d.warnings AS VARCHAR[]),
        CASE WHEN d.b_packages <> d.packages THEN ['the baseline ran with other package versions: run it again with --rerun'] ELSE [] END,
        CASE
            WHEN abs(date_diff('second', d.b_created_at, d.created_at)) > 3600
            THEN ['the baseline was measured more than an hour apart, and timings drift: run both again with --rerun'] ELSE []
        END
    )) AS warnings, -- what may have spoilt a number, with the remedy (JSON array of text)
    e.all_reasons AS reasons, -- column name to why it is NULL (JSON object)
FROM derived d JOIN explained e USING (run_id)
ORDER BY d.created_at, d.run_id;

CREATE OR REPLACE VIEW latest AS -- runs, one row a cell_hash: the newest that needs no new run (ok, unsupported), else the newest.
SELECT * FROM runs
QUALIFY row_number() OVER (
    PARTITION BY cell_hash ORDER BY status IN ('ok', 'unsupported') DESC, created_at DESC, run_id DESC
) = 1
ORDER BY created_at, run_id;
