#!/usr/bin/env bash
# Builds fastsam in place on a GPU machine, runs the GPU tests and all benchmarks, and writes everything to one folder.
#
#   [OUT=gpu-report] [PYTHON=python3] [COMPILE_LIMIT=120] benchmarks/gpu_report.sh [options of python -m benchmarks]
#
# It takes a bare checkout and a Python with PyTorch, NumPy, pytest, pytest-benchmark, pytest-timeout and Matplotlib; with
# setuptools, pybind11 and nvcc the CUDA part is built. Nothing is fetched. A step that fails does not stop the next ones.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

out=${OUT:-gpu-report}
python=${PYTHON:-python3}
compile_limit=${COMPILE_LIMIT:-120}
export MPLBACKEND=Agg PYTHONUNBUFFERED=1

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

gpu_tests() {
  timeout 180 "$python" -m pytest tests --ignore=tests/training -m cuda
  local status=$?
  [ "$status" -ne 5 ] || { echo "there are no tests marked cuda"; return 0; }
  return "$status"
}

if "$python" -c 'import setuptools, pybind11' 2>/dev/null; then
  step build "$python" setup.py build_ext --inplace
else
  echo "gpu-report: no setuptools and pybind11 here, the eager back end serves" | tee "$out/build.log"
fi
step machine bash -c "nvidia-smi; nvcc --version | tail -n 2; '$python' -m fastsam"
step tests gpu_tests
step benchmarks "$python" -m benchmarks --device cuda --out "$out" --name report --compile-limit "$compile_limit" "$@"

[ ${#failed[@]} -eq 0 ] || { echo "gpu-report: failed: ${failed[*]}; see the logs in $out" >&2; exit 1; }
echo "gpu-report: done in $SECONDS s, see $out"
