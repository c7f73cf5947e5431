#!/usr/bin/env bash
# Every GPU figure of this state, on one H100 within a quarter of an hour, in two calls:
#   benchmarks/gpu/quarter_hour.sh ops OUT        7 minutes: tests on CUDA, whole steps, then each op
#   benchmarks/gpu/quarter_hour.sh paper OUT DATA 7 minutes: the paper's experiments at scale gpu
# COMMIT says what is measured where there is no git to ask, PYTHON which interpreter. TINY=1 tries
# every line on small models, on a CPU too. Each part writes what it has as it goes, so one that is
# cut off keeps it, and one that fails does not keep the others from running.
set -uo pipefail
cd "$(dirname "$0")/../.."
part=${1:?ops or paper expected} out=${2:?a directory for the results expected}
python=${PYTHON:-python3} commit=${COMMIT:-$(git rev-parse HEAD)} tiny=${TINY:+--tiny}
export PYTHONPATH=.:python
mkdir -p "$out"
began=$SECONDS

say() { echo "== $((SECONDS - began)) s: $*"; }

run() { # seconds, log, command: it ends when its time is over
    local seconds=$1 log=$out/$2.log
    shift 2
    say "$*"
    timeout "$seconds" "$@" > "$log" 2>&1
    say "ended with $?: $(tail -n 1 "$log")"
}

case $part in
ops)
    # What the op tests of the last part do not have: quantizers, and the loss that keeps a base.
    run 80 tests "$python" -m pytest -q -p no:cacheprovider tests/test_quantize.py \
        tests/test_linear_kl_divergence.py tests/test_frozen_model.py -k "triton or cuda"
    run 210 steps "$python" -m benchmarks.gpu.step --out "$out" --minutes 3 --commit "$commit" $tiny
    minutes=$(awk "BEGIN { print (420 - $SECONDS + $began) / 60 }")
    run $((420 - SECONDS + began)) ops "$python" -m benchmarks.gpu --out "$out" \
        --minutes "$minutes" --commit "$commit"
    ;;
paper)
    scale=gpu
    [[ -z ${TINY:-} ]] || scale=smoke
    run 420 paper "$python" -m recipes.paper "$scale" --out "$out/paper" \
        --data-root "${3:?the folder of benchmarks and texts expected}"
    ;;
*)
    echo "ops or paper expected, got $part" >&2
    exit 2
    ;;
esac
say "everything ended"
