#!/usr/bin/env bash
# On a machine with an NVIDIA GPU and CUDA 13: builds the kernels, checks them on the device against float64, and times
# them. Needs Python with pytest, numpy and torch, and nothing of qwenforge installed. Everything goes to $OUT (default:
# build/gpu); $OUT/report.json sums it up, with the commit that was measured.
#
#     OUT=results tests/gpu/run.sh            takes a few minutes
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
out=${OUT:-build/gpu}
mkdir -p "$out"
python=${PYTHON:-python3}

nvidia-smi --query-gpu=name,memory.total,driver_version,compute_cap --format=csv,noheader | tee "$out/gpu.txt" || exit 1

echo "== correctness on the device"
QWENFORGE_KERNELS_ON=cuda PYTHONPATH=tests "$python" -m pytest -q -p no:cacheprovider --junitxml="$out/kernels.xml" \
    tests/plugins/test_moe_kernels.py tests/plugins/test_attention_kernels.py | tee "$out/kernels.txt"
correct=${PIPESTATUS[0]}

echo "== races"
if command -v compute-sanitizer > /dev/null; then
    QWENFORGE_KERNELS_ON=cuda QWENFORGE_SANITIZER=racecheck PYTHONPATH=tests "$python" -m pytest -q -p no:cacheprovider \
        -k "outside_the_tensors" tests/plugins/test_moe_kernels.py tests/plugins/test_attention_kernels.py \
        | tee "$out/races.txt"
    races=${PIPESTATUS[0]}
else
    echo "compute-sanitizer is not installed: memcheck and racecheck did not run" | tee "$out/races.txt"
    races=-1
fi

echo "== times"
PYTHONPATH=. "$python" bench/kernels.py --json "$out/times.json" | tee "$out/times.txt"
timed=${PIPESTATUS[0]}

"$python" - "$out" "$correct" "$races" "$timed" <<'PY'
import json, pathlib, subprocess, sys

out = pathlib.Path(sys.argv[1])
commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip() or "unknown"
times = out / "times.json"
report = {
    "commit": commit,
    "gpu": (out / "gpu.txt").read_text().strip(),
    "exit_codes": {"correctness": int(sys.argv[2]), "racecheck": int(sys.argv[3]), "times": int(sys.argv[4])},
    "correctness": (out / "kernels.txt").read_text().splitlines()[-1:],
    "times": json.loads(times.read_text()) if times.is_file() else None,
}
(out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
print(json.dumps(report["exit_codes"]))
PY
exit $((correct != 0 || timed != 0))
