// The Python face of the compiled code; with calls.h the only file that knows Python.
//
// An operator takes where to run (a number of CPU threads, or a CUDA launch and its workspace) and the fields of its
// parameter struct as one flat tuple of numbers: calls.h.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "calls.h"
#include "cpu/kernels.h"
#ifdef FASTSAM_CUDA
#include "fastsam/cuda_kernels.h"
#include "fastsam/device.h"
#endif

namespace py = pybind11;

namespace fastsam {
namespace {

struct InstructionSet {
  const char* name;
  bool available;
  const CpuKernels<float>* float32;
  const CpuKernels<double>* float64;
  const CpuKernels<fastsam::bfloat16>* bfloat16;
};

#define FASTSAM_INSTRUCTION_SET(isa, available) {#isa, available, &isa::kFloat32, &isa::kFloat64, &isa::kBfloat16}

std::vector<InstructionSet> instruction_sets() {
  std::vector<InstructionSet> sets = {FASTSAM_INSTRUCTION_SET(generic, true)};
#ifdef FASTSAM_ISAS_X86
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  sets.push_back(FASTSAM_INSTRUCTION_SET(avx2, has_avx2));
  sets.push_back(FASTSAM_INSTRUCTION_SET(avx512, has_avx512));
#endif
  return sets;
}

// The widest instruction set of this processor, or the one that FASTSAM_CPU_ISA names.
InstructionSet choose_instruction_set() {
  const char* forced = std::getenv("FASTSAM_CPU_ISA");
  InstructionSet best{};
  std::string names;
  for (const InstructionSet& set : instruction_sets()) {
    if (!set.available) continue;
    best = set;
    names += (names.empty() ? "" : ", ") + std::string(set.name);
    if (forced != nullptr && std::string(forced) == set.name) return set;
  }
  if (forced != nullptr && *forced != '\0') {
    throw std::runtime_error("FASTSAM_CPU_ISA is '" + std::string(forced) + "', this build and processor offer " +
                             names);
  }
  return best;
}

const InstructionSet& chosen() {
  static const InstructionSet set = choose_instruction_set();
  return set;
}

template <class T>
const CpuKernels<T>& kernels();
template <>
const CpuKernels<float>& kernels<float>() {
  return *chosen().float32;
}
template <>
const CpuKernels<double>& kernels<double>() {
  return *chosen().float64;
}
template <>
const CpuKernels<bfloat16>& kernels<bfloat16>() {
  return *chosen().bfloat16;
}

template <class Call>
void define_cpu(py::module_& module, const char* name, void (*kernel)(const Call&, int)) {
  const auto run = [kernel](int threads, const py::tuple& fields) {
    const Call call = call_from<Call>(fields);
    const py::gil_scoped_release unlocked;
    kernel(call, threads);
  };
  module.def(name, run, py::arg("threads"), py::arg("fields"));
}

// One submodule a scalar type, so that a caller picks it once.
template <class S>
void define_cpu_operators(py::module_ module) {
  const CpuKernels<S>& of = kernels<S>();
  define_cpu(module, "attention_forward", of.attention_forward);
  define_cpu(module, "attention_backward", of.attention_backward);
  define_cpu(module, "separable_gates_forward", of.separable_gates_forward);
  define_cpu(module, "separable_gates_backward", of.separable_gates_backward);
  define_cpu(module, "lstm_gates_forward", of.lstm_gates_forward);
  define_cpu(module, "lstm_gates_backward", of.lstm_gates_backward);
}

#ifdef FASTSAM_CUDA

// device, stream, compute capability of the code times ten, multiprocessors, bytes of shared memory a block, tf32.
cuda::Launch launch_from(const py::tuple& values) {
  Fields fields(values);
  cuda::Launch launch{};
  int tf32 = 0;
  fields.read(launch.device, launch.stream, launch.capability, launch.multiprocessors, launch.shared_bytes, tf32);
  fields.done();
  launch.precision = tf32 != 0 ? cuda::Precision::kTf32 : cuda::Precision::kFloat32;
  return launch;
}

// Two functions: `name`, and `name`_workspace, the bytes of device memory that it wants.
template <class Call, class Kernel>
void define_cuda(py::module_& module, const std::string& name, int64_t (*workspace)(const Call&, const cuda::Launch&),
                 Kernel kernel) {
  const auto size = [workspace](const py::tuple& launch, const py::tuple& fields) {
    return workspace(call_from<Call>(fields), launch_from(launch));
  };
  const auto run = [kernel](const py::tuple& launch, intptr_t memory, const py::tuple& fields) {
    const Call call = call_from<Call>(fields);
    const cuda::Launch where = launch_from(launch);
    const py::gil_scoped_release unlocked;
    kernel(call, reinterpret_cast<void*>(memory), where);
  };
  module.def((name + "_workspace").c_str(), size, py::arg("launch"), py::arg("fields"));
  module.def(name.c_str(), run, py::arg("launch"), py::arg("workspace"), py::arg("fields"));
}

// The same for a kernel that wants none.
template <class Call>
void define_cuda(py::module_& module, const std::string& name, void (*kernel)(const Call&, const cuda::Launch&)) {
  define_cuda<Call>(
      module, name, [](const Call&, const cuda::Launch&) { return int64_t{0}; },
      [kernel](const Call& call, void*, const cuda::Launch& launch) { kernel(call, launch); });
}

template <class S>
void define_cuda_operators(py::module_ module) {
  define_cuda(module, "attention_forward", &cuda::attention_forward<S>);
  define_cuda(module, "attention_gates_forward", &cuda::attention_gates_forward<S>);
  define_cuda(module, "attention_backward", &cuda::attention_backward_workspace<S>, &cuda::attention_backward<S>);
  define_cuda(module, "separable_gates_forward", &cuda::separable_gates_forward<S>);
  define_cuda(module, "separable_gates_backward", &cuda::separable_gates_backward_workspace<S>,
              &cuda::separable_gates_backward<S>);
  define_cuda(module, "lstm_gates_forward", &cuda::lstm_gates_forward_workspace<S>, &cuda::lstm_gates_forward<S>);
  define_cuda(module, "lstm_gates_backward", &cuda::lstm_gates_backward_workspace<S>, &cuda::lstm_gates_backward<S>);
}

#endif

}  // namespace
}  // namespace fastsam

PYBIND11_MODULE(_native, module) {
  using namespace fastsam;
  chosen();
  define_cpu_operators<float>(module.def_submodule("float32"));
  define_cpu_operators<double>(module.def_submodule("float64"));
  define_cpu_operators<bfloat16>(module.def_submodule("bfloat16"));
  module.def("cpu_isa", [] { return chosen().name; }, "The instruction set in use.");
  module.def(
      "cpu_isas",
      [] {
        std::vector<std::string> names;
        for (const InstructionSet& set : instruction_sets()) names.emplace_back(set.name);
        return names;
      },
      "The instruction sets that were compiled.");
#ifdef FASTSAM_CUDA
  py::module_ device = module.def_submodule("cuda");
  define_cuda_operators<float>(device.def_submodule("float32"));
  define_cuda_operators<double>(device.def_submodule("float64"));
  define_cuda_operators<float16>(device.def_submodule("float16"));
  define_cuda_operators<bfloat16>(device.def_submodule("bfloat16"));
  device.def("runtime_version", &cuda::runtime_version);
  device.def("driver_version", &cuda::driver_version);
  device.def("device_count", &cuda::device_count);
  device.def("code_capability", &cuda::code_capability);
  device.def("shared_bytes", &cuda::shared_bytes_of_block);
  device.attr("architectures") = FASTSAM_CUDA_ARCHITECTURES;
  device.def("compute_capability", [](int index) {
    int major = 0, minor = 0;
    cuda::compute_capability(index, &major, &minor);
    return std::make_pair(major, minor);
  });
#endif
}
