#!/usr/bin/env bash
# On a machine with an NVIDIA GPU and CUDA 13: builds the kernels, checks them on the device against float64, and times
# them beside their peers. Needs Python with pytest, numpy, ml_dtypes and torch, and nothing of qwenforge installed.
# Everything goes to $OUT (default: build/gpu); $OUT/report.json sums it up, with the commit that was measured. Parts have
# a time limit each and do not wait for the success of the ones before; in all it takes less than ten minutes.
#
#     OUT=results tests/gpu/run.sh
#     OUT=results CUTLASS=.../cutlass/include tests/gpu/run.sh      with the grouped GEMM
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${OUT:-build/gpu}
mkdir -p "$out"
python=${PYTHON:-python3}

if ! nvidia-smi --query-gpu=name,memory.total,driver_version,compute_cap --format=csv,noheader > "$out/gpu.txt" 2> /dev/null; then
    echo "tests/gpu/run.sh: error: no NVIDIA GPU is visible" >&2
    exit 1
fi
cat "$out/gpu.txt"

# The namespace qwenforge as far as the kernels' tests and benchmarks need it.
mkdir -p "$out/python/qwenforge"
ln -sfn "$PWD/plugins" "$PWD/bench" "$out/python/qwenforge/"
export PYTHONPATH="$PWD/$out/python:$PWD/tests" PYTHONUNBUFFERED=1
[[ $out == /* ]] && export PYTHONPATH="$out/python:$PWD/tests"
: > "$out/parts.txt"

# part NAME SECONDS COMMAND...: runs it for at most so long; its exit code and time go to parts.txt.
part() {
    local name=$1 limit=$2 start=$SECONDS
    shift 2
    echo "== $name"
    timeout "$limit" "$@" 2>&1 | tee "$out/$name.txt"
    echo "$name ${PIPESTATUS[0]} $((SECONDS - start))" >> "$out/parts.txt"
}
# compute-sanitizer does not work on every machine that has it: virtual ones may refuse it.
export QWENFORGE_SANITIZER=none
if compute-sanitizer --error-exitcode 99 "$python" -c 'import torch; torch.zeros(1, device="cuda")' > "$out/sanitizer.txt" 2>&1; then
    QWENFORGE_SANITIZER=memcheck
fi
workers=()
"$python" -c 'import xdist' 2> /dev/null && workers=(-n 8)
tests() {
    # -P: the repository itself must not be where `import qwenforge` looks.
    QWENFORGE_KERNELS_ON=cuda "$python" -P -m pytest -q -p no:cacheprovider -o addopts="--import-mode=importlib" \
        ${PYTEST_WORKERS} "$@"
}
export -f tests
export python PYTEST_WORKERS="${workers[*]}"

# What says the most first: one shape of each kind on every path, from a build of half a minute.
part first 90 bash -c 'tests -k "half and float16" tests/plugins/test_moe_kernels.py'
part correctness 120 bash -c 'tests tests/plugins/test_moe_kernels.py tests/plugins/test_attention_kernels.py'
part times 270 "$python" bench/kernels.py moe --quick --json "$out/times.json" ${CUTLASS:+--cutlass "$CUTLASS"}
part attention 40 "$python" bench/kernels.py attention --quick --json "$out/attention.json"
if [[ $QWENFORGE_SANITIZER == memcheck ]]; then
    part races 40 env QWENFORGE_SANITIZER=racecheck bash -c \
        'tests -k outside_the_tensors tests/plugins/test_moe_kernels.py tests/plugins/test_attention_kernels.py'
else
    echo "races -1 0" >> "$out/parts.txt" # neither memcheck nor racecheck ran: sanitizer.txt says why
fi

"$python" tests/gpu/summary.py "$out"
