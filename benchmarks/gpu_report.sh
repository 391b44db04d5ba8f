#!/usr/bin/env bash
# Builds fastsam in place on a GPU machine, runs the GPU tests and all benchmarks, and writes everything to one folder.
#
#   [OUT=gpu-report] [PYTHON=python3] [STEPS="build ..."] [COMPILE_LIMIT=120] benchmarks/gpu_report.sh [options of
#   python -m benchmarks]
#
# STEPS are some of: build machine cuda-tests memcheck racecheck triton-tests tune benchmarks; by default all, in this
# order. Done in parts, the folder collects them. It takes a bare checkout and a Python with PyTorch, NumPy, pytest,
# pytest-benchmark, pytest-timeout and Matplotlib; with setuptools, pybind11 and nvcc the CUDA part is built. Nothing is
# fetched. A step that fails does not stop the next ones. The benchmarks run with the tile sizes that tune has found, in
# triton.json: README.md says how it is committed, as fastsam/ops/_triton/tuned.json, together with the lines of
# fastest.txt, which were measured with it.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=${OUT:-gpu-report}
python=${PYTHON:-python3}
steps=${STEPS:-build machine cuda-tests memcheck racecheck triton-tests tune benchmarks}
compile_limit=${COMPILE_LIMIT:-120}
export MPLBACKEND=Agg PYTHONUNBUFFERED=1
export FASTSAM_CACHE=${FASTSAM_CACHE:-$out} # what tune finds is what the benchmarks run with

for module in torch numpy pytest pytest_benchmark pytest_timeout matplotlib; do
  "$python" -c "import $module" 2>/dev/null || { echo "gpu-report: $python has no module $module" >&2; exit 2; }
done
capability=$("$python" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())' 2>/dev/null) ||
  { echo "gpu-report: PyTorch of $python sees no CUDA device" >&2; exit 2; }
export TORCH_CUDA_ARCH_LIST=${TORCH_CUDA_ARCH_LIST:-$capability}
mkdir -p "$out" || exit 2

failed=()
step() { # NAME COMMAND...: run it, keep what it prints in NAME.log, remember whether it failed
  local name=$1 start=$SECONDS
  shift
  echo "== $name: $*"
  "$@" 2>&1 | tee "$out/$name.log"
  local status=${PIPESTATUS[0]}
  echo "== $name: exit status $status after $((SECONDS - start)) s" | tee -a "$out/$name.log"
  [ "$status" -eq 0 ] || failed+=("$name")
}

build() {
  "$python" -c 'import setuptools, pybind11' 2>/dev/null ||
    { echo "no setuptools and pybind11 here: nothing is built, Triton and the eager back end serve"; return 0; }
  "$python" setup.py build_ext --inplace
}

machine() {
  nvidia-smi
  nvcc --version | tail -n 2
  "$python" -m fastsam
}

gpu_tests() { # EXPRESSION that chooses among them
  timeout 560 "$python" -m pytest tests/ops/test_cuda.py -m cuda -q -k "$1"
}

triton_tests() { # as the operators' back end, then every kernel by itself
  local status=0
  gpu_tests triton || status=$?
  timeout 560 "$python" -m pytest tests/triton_kernels --ignore tests/triton_kernels/test_ahead_of_time.py -q || status=$?
  return "$status"
}

sanitizer() { # TOOL: one small map for each operator, forward and backward, in every dtype
  command -v compute-sanitizer >/dev/null || { echo "compute-sanitizer is not on PATH: it comes with CUDA"; return 1; }
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 560 compute-sanitizer --tool "$1" --error-exitcode 1 \
    --kernel-name-exclude kernel_substring=at:: "$python" -m pytest tests/ops/test_cuda.py -m cuda -q \
    -k "not triton and test_accuracy and size2"
}

benchmark() { # one report for each arithmetic, and the lines of fastsam/fastest.txt that follow from them
  local status=0
  for arithmetic in float32 tf32 bfloat16 float16; do
    local options=(--dtype "$arithmetic")
    [ "$arithmetic" != tf32 ] || options=(--dtype float32 --tf32)
    "$python" -m benchmarks --device cuda --out "$out" --name "report-$arithmetic" --compile-limit "$compile_limit" \
      "${options[@]}" "$@" || status=$?
  done
  "$python" -m benchmarks.fastest "$out"/report-*.json | tee "$out/fastest.txt"
  return "$status"
}

for name in $steps; do
  case $name in
    build | machine) step "$name" "$name" ;;
    cuda-tests) step "$name" gpu_tests "not triton" ;;
    triton-tests) step "$name" triton_tests ;;
    memcheck | racecheck) step "$name" sanitizer "$name" ;;
    tune) step "$name" timeout 560 "$python" -m fastsam tune --sizes 16 32 64 ;;
    benchmarks) step "$name" benchmark "$@" ;;
    *) echo "gpu-report: there is no step $name; see the head of $0" >&2; exit 2 ;;
  esac
done

[ ${#failed[@]} -eq 0 ] || { echo "gpu-report: failed: ${failed[*]}; see the logs in $out" >&2; exit 1; }
echo "gpu-report: done in $SECONDS s, see $out"
