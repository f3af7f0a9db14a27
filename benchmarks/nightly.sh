#!/usr/bin/env bash
# The fuzzers for some minutes, every combination of the contract suite, then every paper's recipe in its quick form, one
# after the other, and a summary. Exit code 1 if a fuzzer found something, a test failed or a recipe could not be run.
#
#   benchmarks/nightly.sh [KEY...]         the papers named, or all of `assay ls papers`
#
# Runs go to the database of ASSAY_HOME (see `assay reproduce --help`), so that what has not changed is not run again; each
# paper's output is kept in $ASSAY_HOME/nightly/KEY.log.
set -u

home="${ASSAY_HOME:-runs}"
logs="$home/nightly"
mkdir -p "$logs" || exit 2

if [ "$#" -gt 0 ]; then
    keys=("$@")
else
    listed="$(assay ls papers --json)" || exit 2
    mapfile -t keys < <(printf '%s' "$listed" | python -c 'import json, sys; print(*(p["name"] for p in json.load(sys.stdin)), sep="\n")')
fi

failed=0
lines=()
for kind in records containers locks; do
    echo "== fuzz $kind"
    # Another beginning each night.
    python "$(dirname "$0")/fuzz.py" "$kind" "${FUZZ_SECONDS:-300}" "$(date +%Y%m%d)000" >"$logs/fuzz-$kind.log" 2>&1 \
        || failed=$((failed + 1))
    tail -n 20 "$logs/fuzz-$kind.log"
done
echo "== every method on every reference network and runtime"
python -m pytest -q -m nightly "$(dirname "$0")/../tests/contract" >"$logs/contract.log" 2>&1 || failed=$((failed + 1))
tail -n 3 "$logs/contract.log"
for key in "${keys[@]}"; do
    echo "== $key"
    begin=$SECONDS
    assay reproduce "$key" --quick >"$logs/$key.log" 2>&1
    code=$?
    case $code in
        130) echo "interrupted"; exit 130 ;;
        0) word="ok" ;;
        *) word="FAILED (exit code $code)"; failed=$((failed + 1)) ;;
    esac
    cat "$logs/$key.log"
    lines+=("$(printf '%-28s %-24s %5d s  %s' "$key" "$word" $((SECONDS - begin)) "$logs/$key.log")")
done

echo
printf '%s\n' "${lines[@]}"
echo "${#keys[@]} papers, 3 fuzzers and the contract suite, $failed failed."
[ "$failed" -eq 0 ]
