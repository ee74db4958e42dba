#!/usr/bin/env bash
# Everything there is to know from a GPU, in under ten minutes and without a network: builds the
# package, checks every kernel against float64, runs compute-sanitizer on small cases, measures.
# Needs a python3 with torch and triton (PYTHON=... for another); leaves at most seven files.
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

echo "== build ($gpu)"
if timeout 150 "$python" -m pip install --quiet --no-index --no-deps --no-build-isolation \
    --disable-pip-version-check --target "$work/site" . >"$results/build.txt" 2>&1; then
    site=$work/site
else
    echo "   not built (see build.txt): the source tree serves, without native kernels"
    site=$root
fi
# From $work, so that the source tree's own files are not found before those of $site.
run() { (cd "$work" && PYTHONPATH="$site:$root/bench" PYTHONDONTWRITEBYTECODE=1 "$@"); }
run timeout 60 "$python" -m shampoo_kernels info >>"$results/build.txt" 2>&1 || failed+=(info)

echo "== checks, in four processes ($((SECONDS - start)) s)"
parts=()
for part in 0 1 2 3; do
    run timeout 240 "$python" "$root/bench/gpu_checks.py" --part "$part/4" >"$work/checks.$part" 2>&1 &
    parts+=($!)
done
for part in "${parts[@]}"; do wait "$part" || failed+=(checks); done
cat "$work"/checks.* >"$results/checks.txt"
grep -E "^FAILED|checks passed" "$results/checks.txt"

echo "== compute-sanitizer ($((SECONDS - start)) s)"
sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda*/bin/compute-sanitizer 2>/dev/null | head -1)
sanitize() { # tool, seconds, program ...
    local tool=$1 seconds=$2
    shift 2
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
    sanitize memcheck 60 "$root/bench/gpu_checks.py" --small --part 0/5
    # CUDA C++ alone: races in shared memory are what Triton leaves no room for.
    if run "$python" -c 'import gpu_checks_native as c, sys; sys.exit(bool(c.why_not()))'; then
        sanitize memcheck 40 "$root/bench/gpu_checks_native.py"
        sanitize racecheck 60 "$root/bench/gpu_checks_native.py"
    else
        echo "   CUDA C++ is not built: nothing of it to sanitize" | tee -a "$results/sanitizer.txt"
    fi
else
    echo "   not done: there is no compute-sanitizer" | tee "$results/sanitizer.txt"
fi

left=$((560 - (SECONDS - start)))
echo "== benchmarks, $((left > 60 ? left - 40 : 30)) s ($((SECONDS - start)) s)"
run timeout "$((left > 60 ? left : 60))" "$python" "$root/bench/gpu_bench.py" "$results/gpu.json" \
    "$((left > 60 ? left - 40 : 30))" >"$results/gpu.md" 2>"$results/bench.txt" || failed+=(benchmarks)
cat "$results/gpu.md"

echo "== done in $((SECONDS - start)) s, results in $results"
if [ ${#failed[@]} -gt 0 ]; then
    echo "FAILED: ${failed[*]}"
    exit 1
fi
