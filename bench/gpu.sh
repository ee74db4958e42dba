#!/usr/bin/env bash
# Everything there is to know from a GPU, in under ten minutes and without a network: builds the
# package, checks every kernel against float64, runs compute-sanitizer on small cases, measures.
# Needs a python3 with torch and triton (PYTHON=... for another); leaves at most seven files.
# Every part has a second of the run at which it ends, so that the last one is over by 580.
#
#   bash bench/gpu.sh [folder]      default: bench/results/<name of the GPU>
set -uo pipefail
cd "$(dirname "$0")/.."
root=$PWD
python=${PYTHON:-python3}
start=$SECONDS

gpu=$("$python" -c '
import sys
try:
    import torch
except ImportError:
    sys.exit("gpu.sh: this Python has no torch")
if not torch.cuda.is_available():
    sys.exit(f"gpu.sh: there is no GPU here that torch {torch.__version__} can use; nothing was done")
try:
    import triton
except ImportError:
    sys.exit("gpu.sh: this Python has no triton")
print(torch.cuda.get_device_name().lower().replace(" ", "-").replace("/", "-"))
') || exit 1
results=$(mkdir -p "${1:-bench/results/$gpu}" && cd "${1:-bench/results/$gpu}" && pwd) || exit 1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
failed=()

# Seconds for a part: at most $1, and none after second $2 of the run.
within() {
    local left=$(($2 - (SECONDS - start)))
    echo $((left < 1 ? 1 : left < $1 ? left : $1))
}

echo "== build ($gpu)"
if timeout "$(within 150 150)" "$python" -m pip install --quiet --no-index --no-deps --no-build-isolation \
    --disable-pip-version-check --target "$work/site" . >"$results/build.txt" 2>&1; then
    site=$work/site
else
    echo "   not built (see build.txt): the source tree serves, without native kernels"
    site=$root
fi
# From $work, so that the source tree's own files are not found before those of $site.
run() { (cd "$work" && PYTHONPATH="$site:$root/bench" PYTHONDONTWRITEBYTECODE=1 "$@"); }
run timeout "$(within 30 180)" "$python" -m shampoo_kernels info >>"$results/build.txt" 2>&1 || failed+=(info)

count=$(($(nproc) / 2)) # most of the time they compile
count=$((count < 4 ? 4 : count > 8 ? 8 : count))
echo "== checks, in $count processes ($((SECONDS - start)) s)"
limit=$(within 240 400)
parts=()
for ((part = 0; part < count; part++)); do
    run timeout "$limit" "$python" "$root/bench/gpu_checks.py" --part "$part/$count" \
        >"$work/checks.$part" 2>&1 &
    parts+=($!)
done
for part in "${parts[@]}"; do wait "$part" || failed+=(checks); done
cat "$work"/checks.* >"$results/checks.txt"
grep -E "^FAILED|checks passed" "$results/checks.txt"

echo "== compute-sanitizer ($((SECONDS - start)) s)"
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -1)
sanitize() { # tool, seconds, second of the run, program ...
    local tool=$1 seconds
    seconds=$(within "$2" "$3")
    shift 3
    echo "-- $tool $*" >>"$results/sanitizer.txt"
    run timeout "$seconds" "$sanitizer" --tool "$tool" --error-exitcode 9 "$python" "$@" \
        >>"$results/sanitizer.txt" 2>&1
    case $? in
    0) echo "   $tool: clean" ;;
    124) echo "   $tool: out of time" | tee -a "$results/sanitizer.txt" ;;
    *) failed+=("$tool") ;;
    esac
}
if [ -n "$sanitizer" ]; then
    : >"$results/sanitizer.txt"
    sanitize memcheck 60 440 "$root/bench/gpu_checks.py" --small --part 0/5
    # CUDA C++ alone: races in shared memory are what Triton leaves no room for.
    if run "$python" -c 'import gpu_checks_native as c, sys; sys.exit(bool(c.why_not()))'; then
        sanitize memcheck 40 470 "$root/bench/gpu_checks_native.py"
        sanitize racecheck 60 510 "$root/bench/gpu_checks_native.py"
    else
        echo "   CUDA C++ is not built: nothing of it to sanitize" | tee -a "$results/sanitizer.txt"
    fi
else
    echo "   not done: there is no compute-sanitizer" | tee "$results/sanitizer.txt"
fi

limit=$(within 580 580)
echo "== benchmarks, $((limit - 40)) s ($((SECONDS - start)) s)"
run timeout "$limit" "$python" "$root/bench/gpu_bench.py" "$results/gpu.json" $((limit - 40)) \
    >"$results/gpu.md" 2>"$results/bench.txt" || failed+=(benchmarks)
cat "$results/gpu.md"

echo "== done in $((SECONDS - start)) s, results in $results"
if [ ${#failed[@]} -gt 0 ]; then
    echo "FAILED: ${failed[*]}"
    exit 1
fi
