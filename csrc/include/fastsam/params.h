// Parameters of the operators: plain structs of addresses, sizes and strides, shared by every back end.
#pragma once

#include <cstdint>

namespace fastsam {

// A float32 without its lower 16 bits of mantissa.
struct bfloat16 {
  uint16_t bits;
};

// The 16-bit number of IEEE 754.
struct float16 {
  uint16_t bits;
};

// The parameter S of a call is the type in which its maps are stored, Compute<S> that of its arithmetic and its
// weights.
template <class S>
struct ComputeOf {
  using type = S;
};
template <>
struct ComputeOf<bfloat16> {
  using type = float;
};
template <>
struct ComputeOf<float16> {
  using type = float;
};
template <class S>
using Compute = typename ComputeOf<S>::type;

// A (B, C, N) map whose N = H * W positions are contiguous. Strides count elements.
template <class T>
struct Map {
  T* data;
  int64_t stride_batch;
  int64_t stride_channel;
};

// Maps cut into `down` x `across` windows whose rows have `width` positions, on GPUs only: then each window is an entry
// of the batch, `positions` are those of a window, and strides, also of the outputs, those of the whole maps. Contexts
// are (entries, C, positions). All zero: no windows.
struct Windows {
  int64_t across = 0, down = 0, width = 0;
};

struct AttentionSizes {
  int64_t batch;
  int64_t channels;
  int64_t value_channels;
  int64_t positions;
  Windows windows{};
};

// One map that is attended to. Without a key map (key == nullptr) the map itself is the key and query_channels equals
// channels. Matrices are contiguous and row-major.
template <class S>
struct AttentionSource {
  Map<const S> x;
  int64_t query_channels;
  const Compute<S>* score;       // (D, C)
  const Compute<S>* score_bias;  // (D)
  const Compute<S>* value;       // (Cz, C)
  const Compute<S>* key;         // (D, C) or nullptr
};

constexpr int kMaxSources = 2;

// Queries come from sources[0].x. shift[s] (B, C) is what was taken from every column of source s, r[s] (B, C, N) and
// lse[s] (B, N) are those of the source without it. The three may be nullptr: then they are not kept.
template <class S>
struct AttentionForward {
  AttentionSizes sizes;
  int source_count;
  AttentionSource<S> sources[kMaxSources];
  const Compute<S>* value_bias;  // (Cz)
  S* z;                          // (B, Cz, N)
  Compute<S>* r[kMaxSources];
  Compute<S>* lse[kMaxSources];
  Compute<S>* shift[kMaxSources];
};

// The attention and, on its z and the hidden state, separable gates without a depthwise filter. attention.z, (B, Cz,
// N), may be nullptr too.
template <class S>
struct AttentionGatesForward {
  AttentionForward<S> attention;
  Map<const S> m;               // (B, C, N), the memory that the gates update
  const Compute<S>* pointwise;  // (3C, Cz + C)
  const Compute<S>* bias;       // (3C) or nullptr
  S* h_hat;                     // (B, C, N)
  S* m_new;                     // (B, C, N)
};

template <class S>
struct AttentionGradients {
  S* x;                    // (B, C, N)
  Compute<S>* score;       // (D, C)
  Compute<S>* score_bias;  // (D)
  Compute<S>* value;       // (Cz, C)
  Compute<S>* key;         // (D, C) or nullptr
};

template <class S>
struct AttentionBackward {
  AttentionSizes sizes;
  int source_count;
  AttentionSource<S> sources[kMaxSources];
  Map<const S> dz;                       // (B, Cz, N)
  const Compute<S>* r[kMaxSources];      // (B, C, N)
  const Compute<S>* lse[kMaxSources];    // (B, N)
  const Compute<S>* shift[kMaxSources];  // (B, C), chosen by the forward pass, whichever back end ran it
  AttentionGradients<S> gradients[kMaxSources];
  Compute<S>* dvalue_bias;  // (Cz)
};

struct GateSizes {
  int64_t batch;
  int64_t channels;
  int64_t z_channels;  // 0 where there is no z
  int64_t height;
  int64_t width;
  int64_t kernel_size;  // 0 where there is no depthwise filter
};

// Weights of the gates, and their gradients, have the type W.
template <class S, class W = Compute<S>>
struct SeparableGatesForward {
  GateSizes sizes;
  Map<const S> z;
  Map<const S> h;
  Map<const S> m;
  const W* depthwise;  // (Cz + C, k, k) or nullptr
  const W* pointwise;  // (3C, Cz + C)
  const W* bias;       // (3C) or nullptr
  S* h_hat;            // (B, C, N)
  S* m_new;            // (B, C, N)
};

template <class S, class W = Compute<S>>
struct SeparableGatesBackward {
  GateSizes sizes;
  Map<const S> z;
  Map<const S> h;
  Map<const S> m;
  const W* depthwise;
  const W* pointwise;
  const W* bias;
  Map<const S> dh_hat;
  Map<const S> dm_new;
  S* dz;          // (B, Cz, N)
  S* dh;          // (B, C, N)
  S* dm;          // (B, C, N)
  W* ddepthwise;  // as depthwise
  W* dpointwise;
  W* dbias;  // (3C) or nullptr
};

// What the kernels of the LSTM gates make of the gates a, rows of C channels each, and of a state c (B, C, N); s is the
// sigmoid:
//   kLstm     a = (i, f, g, o)  c_new = s(f + constant) c + s(i) tanh(g)  h = s(o) tanh(c_new)
//   kMemory   a = (i, g, o)     c_new = (1 - s(i)) c + s(i) tanh(g)       h = s(o) c_new
//   kProduct  a = (a)           c_new = a                                 h = constant act(a) c
enum class Update : int64_t { kLstm, kMemory, kProduct };

// kLstm, kMemory: whether h is as above, or s(o), because a norm comes between c_new and h. kProduct: what act is.
enum class Form : int64_t { kHidden = 0, kGate = 1, kIdentity = 0, kTanh = 1, kSigmoid = 2 };

constexpr int gates_of(Update update) { return update == Update::kLstm ? 4 : update == Update::kMemory ? 3 : 1; }

// A summand of the gates, G rows of C channels. One with weights is normalised over all of a sample.
template <class S, class W = Compute<S>>
struct LstmTerm {
  Map<const S> x;   // (B, G C, N); without data where there is no second summand
  const W* weight;  // (G C) or (G C, N), or nullptr
  const W* bias;    // as weight
};

constexpr int kLstmTerms = 2;

template <class S, class W = Compute<S>>
struct LstmGatesForward {
  int64_t batch;
  int64_t channels;
  int64_t positions;
  int64_t weights_have_positions;  // 1 where weight and bias are (G C, N)
  Update update;
  Form form;
  LstmTerm<S, W> terms[kLstmTerms];
  Map<const S> c;
  Compute<S> constant;
  Compute<S> eps;
  S* h;                                // (B, C, N)
  S* c_new;                            // (B, C, N); nullptr where it is not kept, with kProduct only
  Compute<S>* statistics[kLstmTerms];  // (B, 2): mean and 1 / sqrt(variance + eps) of a term with weights
};

template <class S, class W = Compute<S>>
struct LstmTermGradients {
  S* x;       // (B, G C, N); of the second summand nullptr where it is that of the first, both without weights
  W* weight;  // as the weights of the term
  W* bias;
};

template <class S, class W = Compute<S>>
struct LstmGatesBackward {
  int64_t batch;
  int64_t channels;
  int64_t positions;
  int64_t weights_have_positions;
  Update update;
  Form form;
  LstmTerm<S, W> terms[kLstmTerms];
  Map<const S> c;
  Compute<S> constant;
  Map<const S> dh;
  Map<const S> dc_new;  // without data where c_new is not kept
  const Compute<S>* statistics[kLstmTerms];
  LstmTermGradients<S, W> gradients[kLstmTerms];
  S* dc;  // (B, C, N)
};

}  // namespace fastsam
