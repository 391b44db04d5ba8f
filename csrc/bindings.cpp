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

template <class S>
AttentionSource<S> attention_source(Fields& fields) {
  AttentionSource<S> source{};
  source.x = fields.map<S>();
  source.query_channels = fields.integer();
  for (const Compute<S>** field : {&source.score, &source.score_bias, &source.value, &source.key})
    *field = fields.address<const Compute<S>>();
  return source;
}

// Runs a kernel without the interpreter's lock.
template <class Call>
void run(void (*kernel)(const Call&, int), const Call& call, int threads, const Fields& fields) {
  fields.done();
  const py::gil_scoped_release unlocked;
  kernel(call, threads);
}

template <class S>
void attention_forward(int threads, const py::tuple& values) {
  Fields fields(values);
  AttentionForward<S> call{};
  call.sizes = attention_sizes(fields);
  call.source_count = source_count(fields);
  for (int s = 0; s < call.source_count; ++s) call.sources[s] = attention_source<S>(fields);
  call.value_bias = fields.address<const Compute<S>>();
  call.z = fields.address<S>();
  for (int s = 0; s < call.source_count; ++s) call.r[s] = fields.address<S>();
  for (int s = 0; s < call.source_count; ++s) call.lse[s] = fields.address<Compute<S>>();
  run(kernels<S>().attention_forward, call, threads, fields);
}

template <class S>
void attention_backward(int threads, const py::tuple& values) {
  Fields fields(values);
  AttentionBackward<S> call{};
  call.sizes = attention_sizes(fields);
  call.source_count = source_count(fields);
  for (int s = 0; s < call.source_count; ++s) call.sources[s] = attention_source<S>(fields);
  call.dz = fields.map<S>();
  for (int s = 0; s < call.source_count; ++s) call.r[s] = fields.address<const S>();
  for (int s = 0; s < call.source_count; ++s) call.lse[s] = fields.address<const Compute<S>>();
  for (int s = 0; s < call.source_count; ++s) {
    AttentionGradients<S>& out = call.gradients[s];
    out.x = fields.address<S>();
    for (Compute<S>** field : {&out.score, &out.score_bias, &out.value, &out.key})
      *field = fields.address<Compute<S>>();
  }
  call.dvalue_bias = fields.address<Compute<S>>();
  run(kernels<S>().attention_backward, call, threads, fields);
}

template <class S, class Call>
void gate_inputs(Fields& fields, Call& call) {
  GateSizes& sizes = call.sizes;
  for (int64_t* field :
       {&sizes.batch, &sizes.channels, &sizes.z_channels, &sizes.height, &sizes.width, &sizes.kernel_size}) {
    *field = fields.integer();
  }
  for (Map<const S>* field : {&call.z, &call.h, &call.m}) *field = fields.map<S>();
  for (const Compute<S>** field : {&call.depthwise, &call.pointwise, &call.bias})
    *field = fields.address<const Compute<S>>();
}

template <class S>
void separable_gates_forward(int threads, const py::tuple& values) {
  Fields fields(values);
  SeparableGatesForward<S> call{};
  gate_inputs<S>(fields, call);
  call.h_hat = fields.address<S>();
  call.m_new = fields.address<S>();
  run(kernels<S>().separable_gates_forward, call, threads, fields);
}

template <class S>
void separable_gates_backward(int threads, const py::tuple& values) {
  Fields fields(values);
  SeparableGatesBackward<S> call{};
  gate_inputs<S>(fields, call);
  for (Map<const S>* field : {&call.dh_hat, &call.dm_new}) *field = fields.map<S>();
  for (S** field : {&call.dz, &call.dh, &call.dm}) *field = fields.address<S>();
  for (Compute<S>** field : {&call.ddepthwise, &call.dpointwise, &call.dbias}) *field = fields.address<Compute<S>>();
  run(kernels<S>().separable_gates_backward, call, threads, fields);
}

template <class S, class Call>
void lstm_inputs(Fields& fields, double forget_bias, Call& call) {
  for (int64_t* field : {&call.batch, &call.channels, &call.positions, &call.weights_have_positions})
    *field = fields.integer();
  for (LstmTerm<S>& term : call.terms) {
    term.x = fields.map<S>();
    for (const Compute<S>** field : {&term.weight, &term.bias}) *field = fields.address<const Compute<S>>();
  }
  call.c = fields.map<S>();
  call.forget_bias = static_cast<Compute<S>>(forget_bias);
}

template <class S>
void lstm_gates_forward(int threads, double forget_bias, double eps, const py::tuple& values) {
  Fields fields(values);
  LstmGatesForward<S> call{};
  lstm_inputs<S>(fields, forget_bias, call);
  call.eps = static_cast<Compute<S>>(eps);
  for (S** field : {&call.h, &call.c_new}) *field = fields.address<S>();
  for (Compute<S>*& statistics : call.statistics) statistics = fields.address<Compute<S>>();
  run(kernels<S>().lstm_gates_forward, call, threads, fields);
}

template <class S>
void lstm_gates_backward(int threads, double forget_bias, const py::tuple& values) {
  Fields fields(values);
  LstmGatesBackward<S> call{};
  lstm_inputs<S>(fields, forget_bias, call);
  for (Map<const S>* field : {&call.dh, &call.dc_new}) *field = fields.map<S>();
  for (const Compute<S>*& statistics : call.statistics) statistics = fields.address<const Compute<S>>();
  for (LstmTermGradients<S>& out : call.gradients) {
    out.x = fields.address<S>();
    for (Compute<S>** field : {&out.weight, &out.bias}) *field = fields.address<Compute<S>>();
  }
  call.dc = fields.address<S>();
  run(kernels<S>().lstm_gates_backward, call, threads, fields);
}

// One submodule a scalar type, so that a caller picks it once.
template <class T>
void define_operators(py::module_ module) {
  module.def("attention_forward", &attention_forward<T>, py::arg("threads"), py::arg("fields"));
  module.def("attention_backward", &attention_backward<T>, py::arg("threads"), py::arg("fields"));
  module.def("separable_gates_forward", &separable_gates_forward<T>, py::arg("threads"), py::arg("fields"));
  module.def("separable_gates_backward", &separable_gates_backward<T>, py::arg("threads"), py::arg("fields"));
  module.def("lstm_gates_forward", &lstm_gates_forward<T>, py::arg("threads"), py::arg("forget_bias"), py::arg("eps"),
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
  define_operators<bfloat16>(module.def_submodule("bfloat16"));
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
