// The Python face of the compiled code, and the only file that knows Python.
//
// A call hands over the fields of its parameter struct (params.h) as one flat tuple of integers in the order of the
// struct: sizes, addresses and strides. Address 0 is nullptr. Tensors are kept alive and checked by the caller.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"
#ifdef FASTSAM_CUDA
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
};

std::vector<InstructionSet> instruction_sets() {
  std::vector<InstructionSet> sets = {{"generic", true, &generic::kFloat32, &generic::kFloat64}};
#ifdef FASTSAM_ISAS_X86
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
                          __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
  sets.push_back({"avx2", has_avx2, &avx2::kFloat32, &avx2::kFloat64});
  sets.push_back({"avx512", has_avx512, &avx512::kFloat32, &avx512::kFloat64});
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

// Reads the flat tuple of a call, one field after the other.
class Fields {
 public:
  explicit Fields(const py::tuple& values) : values_(values) {}

  int64_t integer() {
    if (next_ >= values_.size()) throw std::invalid_argument("too few fields for this call");
    return values_[next_++].cast<int64_t>();
  }

  template <class T>
  T* address() {
    return reinterpret_cast<T*>(static_cast<intptr_t>(integer()));
  }

  template <class T>
  Map<const T> map() {
    const T* data = address<const T>();
    const int64_t stride_batch = integer();
    return {data, stride_batch, integer()};
  }

  void done() const {
    if (next_ != values_.size()) throw std::invalid_argument("too many fields for this call");
  }

 private:
  const py::tuple& values_;
  size_t next_ = 0;
};

AttentionSizes attention_sizes(Fields& fields) {
  AttentionSizes sizes{};
  for (int64_t* field : {&sizes.batch, &sizes.channels, &sizes.value_channels, &sizes.positions})
    *field = fields.integer();
  return sizes;
}

int source_count(Fields& fields) {
  const int64_t count = fields.integer();
  if (count < 1 || count > kMaxSources) throw std::invalid_argument("one or two sources are served");
  return static_cast<int>(count);
}

template <class T>
AttentionSource<T> attention_source(Fields& fields) {
  AttentionSource<T> source{};
  source.x = fields.map<T>();
  source.query_channels = fields.integer();
  for (const T** field : {&source.score, &source.score_bias, &source.value, &source.key})
    *field = fields.address<const T>();
  return source;
}

// Runs a kernel without the interpreter's lock.
template <class Call>
void run(void (*kernel)(const Call&, int), const Call& call, int threads, const Fields& fields) {
  fields.done();
  const py::gil_scoped_release unlocked;
  kernel(call, threads);
}

template <class T>
void attention_forward(int threads, const py::tuple& values) {
  Fields fields(values);
  AttentionForward<T> call{};
  call.sizes = attention_sizes(fields);
  call.source_count = source_count(fields);
  for (int s = 0; s < call.source_count; ++s) call.sources[s] = attention_source<T>(fields);
  call.value_bias = fields.address<const T>();
  call.z = fields.address<T>();
  for (int s = 0; s < call.source_count; ++s) call.r[s] = fields.address<T>();
  for (int s = 0; s < call.source_count; ++s) call.lse[s] = fields.address<T>();
  run(kernels<T>().attention_forward, call, threads, fields);
}

template <class T>
void attention_backward(int threads, const py::tuple& values) {
  Fields fields(values);
  AttentionBackward<T> call{};
  call.sizes = attention_sizes(fields);
  call.source_count = source_count(fields);
  for (int s = 0; s < call.source_count; ++s) call.sources[s] = attention_source<T>(fields);
  call.dz = fields.map<T>();
  for (int s = 0; s < call.source_count; ++s) call.r[s] = fields.address<const T>();
  for (int s = 0; s < call.source_count; ++s) call.lse[s] = fields.address<const T>();
  for (int s = 0; s < call.source_count; ++s) {
    AttentionGradients<T>& out = call.gradients[s];
    for (T** field : {&out.x, &out.score, &out.score_bias, &out.value, &out.key}) *field = fields.address<T>();
  }
  call.dvalue_bias = fields.address<T>();
  run(kernels<T>().attention_backward, call, threads, fields);
}

template <class T, class Call>
void gate_inputs(Fields& fields, Call& call) {
  GateSizes& sizes = call.sizes;
  for (int64_t* field :
       {&sizes.batch, &sizes.channels, &sizes.z_channels, &sizes.height, &sizes.width, &sizes.kernel_size}) {
    *field = fields.integer();
  }
  for (Map<const T>* field : {&call.z, &call.h, &call.m}) *field = fields.map<T>();
  for (const T** field : {&call.depthwise, &call.pointwise, &call.bias}) *field = fields.address<const T>();
}

template <class T>
void separable_gates_forward(int threads, const py::tuple& values) {
  Fields fields(values);
  SeparableGatesForward<T> call{};
  gate_inputs<T>(fields, call);
  call.h_hat = fields.address<T>();
  call.m_new = fields.address<T>();
  run(kernels<T>().separable_gates_forward, call, threads, fields);
}

template <class T>
void separable_gates_backward(int threads, const py::tuple& values) {
  Fields fields(values);
  SeparableGatesBackward<T> call{};
  gate_inputs<T>(fields, call);
  for (Map<const T>* field : {&call.dh_hat, &call.dm_new}) *field = fields.map<T>();
  for (T** field : {&call.dz, &call.dh, &call.dm, &call.ddepthwise, &call.dpointwise, &call.dbias})
    *field = fields.address<T>();
  run(kernels<T>().separable_gates_backward, call, threads, fields);
}

template <class T, class Call>
void lstm_inputs(Fields& fields, double forget_bias, Call& call) {
  for (int64_t* field : {&call.batch, &call.channels, &call.positions}) *field = fields.integer();
  for (Map<const T>* field : {&call.gates, &call.c}) *field = fields.map<T>();
  call.forget_bias = static_cast<T>(forget_bias);
}

template <class T>
void lstm_gates_forward(int threads, double forget_bias, const py::tuple& values) {
  Fields fields(values);
  LstmGatesForward<T> call{};
  lstm_inputs<T>(fields, forget_bias, call);
  for (T** field : {&call.h, &call.c_new}) *field = fields.address<T>();
  run(kernels<T>().lstm_gates_forward, call, threads, fields);
}

template <class T>
void lstm_gates_backward(int threads, double forget_bias, const py::tuple& values) {
  Fields fields(values);
  LstmGatesBackward<T> call{};
  lstm_inputs<T>(fields, forget_bias, call);
  for (Map<const T>* field : {&call.dh, &call.dc_new}) *field = fields.map<T>();
  for (T** field : {&call.dgates, &call.dc}) *field = fields.address<T>();
  run(kernels<T>().lstm_gates_backward, call, threads, fields);
}

// One submodule a scalar type, so that a caller picks it once.
template <class T>
void define_operators(py::module_ module) {
  module.def("attention_forward", &attention_forward<T>, py::arg("threads"), py::arg("fields"));
  module.def("attention_backward", &attention_backward<T>, py::arg("threads"), py::arg("fields"));
  module.def("separable_gates_forward", &separable_gates_forward<T>, py::arg("threads"), py::arg("fields"));
  module.def("separable_gates_backward", &separable_gates_backward<T>, py::arg("threads"), py::arg("fields"));
  module.def("lstm_gates_forward", &lstm_gates_forward<T>, py::arg("threads"), py::arg("forget_bias"),
             py::arg("fields"));
  module.def("lstm_gates_backward", &lstm_gates_backward<T>, py::arg("threads"), py::arg("forget_bias"),
             py::arg("fields"));
}

}  // namespace
}  // namespace fastsam

PYBIND11_MODULE(_native, module) {
  using namespace fastsam;
  chosen();
  define_operators<float>(module.def_submodule("float32"));
  define_operators<double>(module.def_submodule("float64"));
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
  device.def("runtime_version", &cuda::runtime_version);
  device.def("driver_version", &cuda::driver_version);
  device.def("device_count", &cuda::device_count);
  device.def("compiled_architectures", &cuda::compiled_architectures);
  device.def("compute_capability", [](int index) {
    int major = 0, minor = 0;
    cuda::compute_capability(index, &major, &minor);
    return std::make_pair(major, minor);
  });
#endif
}
