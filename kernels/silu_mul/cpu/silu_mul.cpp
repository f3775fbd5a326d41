#include "silu_mul.h"

#include <omp.h>

#include <cmath>

#include "linear/cpu/lanes.h"
#include "linear/cpu/matmul.h"

namespace {

using namespace llmc;

// A register of values: compilers do not vectorise a loop over fmin and nearbyint.
#ifdef __AVX512F__
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif
using Floats = float __attribute__((vector_size(4 * kLanes)));
using Integers = int32_t __attribute__((vector_size(4 * kLanes)));

// e^x within 2 units in the last place: below -87 it is 0, above 88 infinite.
// Degree-6 polynomial after Cody-Waite reduction, as in Cephes' expf.
inline Floats exp_of(Floats x) {
  constexpr float kToInteger = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to an integer, to nearest even
  const Floats above = x > -87.3f ? x : Floats{} - 87.3f, bounded = above < 88.0f ? above : Floats{} + 88.0f;
  const Floats n = bounded * 1.44269504089f + kToInteger - kToInteger;
  Floats r = bounded - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  Floats p = Floats{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + (r + 1.0f);
  return p * (Floats)((__builtin_convertvector(n, Integers) + 127) << 23);
}

inline Floats silu(Floats x) { return x / (1.0f + exp_of(-x)); }

// x * sigmoid(2u) is x * (1 + tanh(u)) / 2.
inline Floats gelu_tanh(Floats x) {
  const Floats u = 0.7978845608028654f * (x + 0.044715f * x * x * x);
  return x / (1.0f + exp_of(-2.0f * u));
}

inline Floats gelu(Floats x) {
  for (int i = 0; i < kLanes; i++) x[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.7071067811865476f));
  return x;
}

template <class D, class F>
void gated_rows(const LlmcGatedArgs& a, int threads, F act) {
  using E = typename D::Element;
  constexpr int64_t kPiece = 512;  // columns a thread takes at a time: one row is shared, too
  const int64_t pieces = (a.n + kPiece - 1) / kPiece;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t job = 0; job < a.m * pieces; job++) {
    const int64_t row = job / pieces, begin = job % pieces * kPiece, end = begin + kPiece < a.n ? begin + kPiece : a.n;
    const E* gate = static_cast<const E*>(a.gate) + row * a.gate_stride;
    const E* up = static_cast<const E*>(a.up) + row * a.up_stride;
    E* y = static_cast<E*>(a.y) + row * a.n;
    for (int64_t j = begin; j < end; j += 16) {
      const int64_t columns = end - j < 16 ? end - j : 16;
      alignas(64) float g[16], u[16];
      lanes_store(g, load_columns<D>(gate + j, columns));
      lanes_store(u, load_columns<D>(up + j, columns));
      for (int i = 0; i < 16; i += kLanes) {
        Floats some, by;
        memcpy(&some, g + i, sizeof(some));
        memcpy(&by, u + i, sizeof(by));
        some = act(some) * by;
        memcpy(g + i, &some, sizeof(some));
      }
      store_columns<D>(y + j, lanes_load(g), columns);
    }
  }
}

template <class D>
int32_t with_activation(const LlmcGatedArgs& a, int threads) {
  switch (a.activation) {
    case LLMC_SILU: gated_rows<D>(a, threads, [](Floats x) { return silu(x); }); return LLMC_OK;
    case LLMC_GELU: gated_rows<D>(a, threads, [](Floats x) { return gelu(x); }); return LLMC_OK;
    case LLMC_GELU_TANH: gated_rows<D>(a, threads, [](Floats x) { return gelu_tanh(x); }); return LLMC_OK;
  }
  return LLMC_BAD_DTYPE;
}

}  // namespace

int32_t llmc_gated(const LlmcGatedArgs* a) {
  if (!a || a->struct_bytes != (int64_t)sizeof(LlmcGatedArgs)) return LLMC_BAD_STRUCT;
  if (a->m < 0 || a->n < 1 || a->num_threads < 0) return LLMC_BAD_SHAPE;
  if (a->m > 1 && (a->gate_stride < a->n || a->up_stride < a->n)) return LLMC_BAD_SHAPE;
  // Below some ten thousand elements the work is over before a second thread has woken.
  const int threads = a->m * a->n < 16384 ? 1 : num_threads_for(a->num_threads, a->m * a->n * 8, a->m * a->n * 32);
  switch (a->dtype) {
    case LLMC_FLOAT32: return with_activation<F32>(*a, threads);
    case LLMC_FLOAT16: return with_activation<F16>(*a, threads);
    case LLMC_BFLOAT16: return with_activation<BF16>(*a, threads);
  }
  return LLMC_BAD_DTYPE;
}
