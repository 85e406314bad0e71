#!/usr/bin/env bash
# On a machine with an NVIDIA GPU and CUDA 13: builds the kernels, checks them on the device against float64, times them
# beside their peers, and measures whole models. Needs nvcc, and Python 3.11 or newer with torch, numpy, ml_dtypes and
# pytest; uses compute-sanitizer, transformers, Triton and pytest-xdist where they are. Nothing of qwenforge has to be
# installed; models also need CMake, Ninja and what pyproject.toml asks for. docs/gpu-measurements.md says more.
#
#     OUT=results tests/gpu/run.sh
#     OUT=results PARTS=attention,models CUTLASS=.../cutlass/include COMMIT=$(git rev-parse HEAD) tests/gpu/run.sh
#
# PARTS chooses among moe, attention and models (default: all). Every part has a time limit, less than ten minutes
# together; where some are left out the others get their time. CUTLASS adds the grouped GEMM; COMMIT is for a copy of the
# sources without git; MODEL_OPTIONS go to bench/gpu_models.py. $OUT (default: build/gpu) gets log.txt, one JSON of times for each part that measures, and
# report.json, which sums everything up and is written anew after each part. Parts do not wait for the success of the
# ones before; what says the most comes first. Another part is another line at the end.
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
: > "$out/planned.txt"

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
chosen=${PARTS:-moe,attention,models}
for name in ${chosen//,/ }; do
    [[ $name =~ ^(moe|attention|models)$ ]] || stop "PARTS has $name, which is none of moe, attention, models"
done
for module in transformers triton xdist onnxruntime; do
    has $module || echo "$python has no module $module: what needs it is left out" | tee -a "$out/log.txt"
done

# -P below: the repository itself must not be where `import qwenforge` looks.
"$python" -P tests/gpu/layout.py "$work/python" || stop "the namespace qwenforge cannot be laid out in $work"
export PYTHONPATH="$work/python:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
export QWENFORGE_KERNELS_ON=cuda QWENFORGE_SANITIZER=none PYTEST_WORKERS=""
has xdist && PYTEST_WORKERS="-n 8"

# part GROUP NAME SECONDS COMMAND...: runs it if its group is chosen, for at most so long, and longer where parts are left
# out. Exit code, time and last line go to parts.txt; the command finds its seconds in $limit.
budget=590
total=0
is_chosen() {
    [[ $1 == always || ,$chosen, == *,$1,* ]]
}
part() {
    if is_chosen "$1"; then
        total=$((total + $3))
        echo "$2" >> "$out/planned.txt"
    fi
}
run() {
    local name=$2 start=$SECONDS code
    is_chosen "$1" || return 0
    limit=$(($3 * budget / total))
    shift 3
    echo "== $name, $limit s" | tee -a "$out/log.txt"
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
# libqwenforge_ort.so for this GPU alone.
library() {
    cmake -S . -B "$work/cmake" -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_CUDA_ARCHITECTURES=native \
        -DCMAKE_CUDA_COMPILER="$(command -v nvcc)" -DPython3_EXECUTABLE="$(command -v "$python")" \
        && cmake --build "$work/cmake" --target qwenforge_ort
}
# ONNX Runtime finds the libraries of CUDA's wheels beside itself alone, wherever it was put.
models() {
    local libraries
    libraries=$("$python" -c 'import glob, nvidia; print(":".join(p for n in nvidia.__path__ for p in glob.glob(n + "/*/lib")))')
    LD_LIBRARY_PATH="$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}" "$python" -P bench/gpu_models.py --library "$work/cmake/plugins/libqwenforge_ort.so" --work "$work" \
        --json "$out/models.json" --limit $((limit - 20)) ${MODEL_OPTIONS:-}
}
export -f tests measure sanitized library models
export out work limit=0
export moe=tests/plugins/test_moe_kernels.py layers=Qwen3-30B-A3B,Qwen1.5-MoE-A2.7B,Qwen2-57B-A14B
export attention=tests/plugins/test_attention_kernels.py

parts() {
    part always build 80 "$python" -P tests/gpu/build.py "$work" ${CUTLASS:+"$CUTLASS"}
    part moe first 30 bash -c 'tests -k "plain or half" "$moe"' # one shape of each kind of weights on every path
    part attention attention-first 15 bash -c 'tests -k "test_attention_agrees or every_group" "$attention"'
    part moe peers 75 bash -c 'measure peers moe --types bf16 --layers "$layers"'
    part attention attention-times 75 bash -c 'measure attention-times attention --limit $((limit - 10))'
    part models library 40 bash -c library
    part models models 75 bash -c models
    part moe times 45 bash -c 'measure times moe --types int4-128,int8,fp8,int4-64 --layers "$layers"'
    part moe correctness 40 bash -c 'tests "$moe"'
    part attention attention-correctness 50 bash -c 'tests "$attention"'
    part moe memcheck 20 bash -c 'sanitized memcheck -k outside_the_tensors "$moe"'
    part moe racecheck 15 bash -c 'sanitized racecheck -k "outside_the_tensors and (half or 256)" "$moe"'
    part attention attention-memcheck 15 bash -c 'sanitized memcheck -k outside_the_tensors "$attention"'
    part attention attention-racecheck 15 bash -c 'sanitized racecheck -k outside_the_tensors "$attention"'
}
parts # adds the times up
part() { run "$@"; }
parts

"$python" tests/gpu/summary.py "$out"
