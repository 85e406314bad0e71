#!/usr/bin/env bash
# On a machine with an NVIDIA GPU and CUDA 13: builds the kernels, checks them on the device against float64, and times
# them beside their peers. Needs nvcc, and Python 3.11 or newer with torch, numpy, ml_dtypes and pytest; uses
# compute-sanitizer, transformers, Triton and pytest-xdist where they are; nothing of qwenforge has to be installed.
#
#     OUT=results tests/gpu/run.sh
#     OUT=results CUTLASS=.../cutlass/include COMMIT=$(git rev-parse HEAD) tests/gpu/run.sh
#
# CUTLASS adds the grouped GEMM; COMMIT is for a copy of the sources without git. $OUT (default: build/gpu) gets log.txt,
# one JSON of times for each part that measures, and report.json, which sums everything up and is written anew after each
# part. Parts have a time limit each, less than ten minutes together, and do not wait for the success of the ones before;
# what says the most comes first. Another part is another line at the end.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${OUT:-build/gpu}
mkdir -p "$out"
out=$(cd "$out" && pwd)
work=$PWD/build/gpu-work
mkdir -p "$work"
export python=${PYTHON:-python3}
: > "$out/log.txt"
: > "$out/parts.txt"

stop() {
    echo "tests/gpu/run.sh: error: $1" >&2
    exit 1
}
nvidia-smi --query-gpu=name,memory.total,driver_version,compute_cap --format=csv,noheader > "$out/gpu.txt" 2> /dev/null \
    || stop "no NVIDIA GPU is visible"
cat "$out/gpu.txt"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || stop "$python is no Python 3.11 or newer"
command -v nvcc > /dev/null || stop "nvcc is not on PATH"
has() {
    "$python" -c "import importlib.util as u, sys; sys.exit(u.find_spec('$1') is None)"
}
for module in torch numpy ml_dtypes pytest; do
    has $module || stop "$python has no module $module: install it"
done
for module in transformers triton xdist; do
    has $module || echo "$python has no module $module: what needs it is left out" | tee -a "$out/log.txt"
done

# The namespace qwenforge as far as the kernels' tests and benchmarks need it. -P below: the repository itself must not be
# where `import qwenforge` looks.
rm -rf "$work/python"
mkdir -p "$work/python/qwenforge"
ln -s "$PWD/plugins" "$PWD/bench" "$work/python/qwenforge/"
export PYTHONPATH="$work/python:$PWD/tests" PYTHONUNBUFFERED=1
export QWENFORGE_KERNELS_ON=cuda QWENFORGE_SANITIZER=none PYTEST_WORKERS=""
has xdist && PYTEST_WORKERS="-n 8"

# part NAME SECONDS COMMAND...: runs it for at most so long; exit code, time and last line go to parts.txt.
part() {
    local name=$1 limit=$2 start=$SECONDS code
    shift 2
    echo "== $name" | tee -a "$out/log.txt"
    timeout --kill-after=5 "$limit" "$@" 2>&1 | tee -a "$out/log.txt" | tee "$work/part.txt"
    code=${PIPESTATUS[0]}
    echo "$name $code $((SECONDS - start)) $(tail -n 1 "$work/part.txt" | cut -c 1-300)" >> "$out/parts.txt"
    "$python" tests/gpu/summary.py "$out" > /dev/null
}
tests() {
    "$python" -P -m pytest -q -p no:cacheprovider -o addopts="--import-mode=importlib" $PYTEST_WORKERS "$@"
}
measure() {
    local name=$1
    shift
    "$python" -P bench/kernels.py "$@" --quick --library "$work/libqwenforge_kernels.so" --json "$out/$name.json"
}
# compute-sanitizer does not work on every machine that has it: virtual ones may refuse it.
sanitized() {
    local tool=$1
    shift
    head -c 1000 /dev/zero | compute-sanitizer --tool "$tool" --error-exitcode 99 \
        "$work/driver" 0 moe float16 1 8 8 1 0 1 0 1 0 0 65536 1 > /dev/null \
        || { echo "compute-sanitizer does not work here"; return 3; }
    QWENFORGE_SANITIZER=$tool tests "$@"
}
export -f tests measure sanitized
export out work
export moe=tests/plugins/test_moe_kernels.py layers=Qwen3-30B-A3B,Qwen1.5-MoE-A2.7B,Qwen2-57B-A14B

part build 120 "$python" -P tests/gpu/build.py "$work" ${CUTLASS:+"$CUTLASS"}
part first 60 bash -c 'tests -k "plain or half" "$moe"' # one shape of each kind of weights on every path
part peers 130 bash -c 'measure peers moe --types bf16 --layers "$layers"'
part times 90 bash -c 'measure times moe --types int4-128,int8,fp8,int4-64 --layers "$layers"'
part correctness 75 bash -c 'tests "$moe"'
part memcheck 40 bash -c 'sanitized memcheck -k outside_the_tensors "$moe"'
part racecheck 35 bash -c 'sanitized racecheck -k "outside_the_tensors and (half or 256)" "$moe"'
part attention 30 bash -c 'tests tests/plugins/test_attention_kernels.py && measure attention attention'

"$python" tests/gpu/summary.py "$out"
