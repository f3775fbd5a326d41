// Cuts a call into blocks of rows and ranges of panels, one range per thread, and runs the engine this build has for the type.
#include "matmul.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <type_traits>

#include "engine_amx.h"
#include "engine_amx_quantized.h"
#include "engine_fma.h"
#include "engine_quantized.h"

namespace llmc {

namespace {

constexpr int64_t kPage = 4096;

// The calling thread's buffer for prepared rows; grows, and goes with the thread.
struct Scratch {
  void* data = nullptr;
  size_t bytes = 0;
  ~Scratch() { free(data); }
  void* reserve(size_t wanted) {
    if (wanted > bytes) {
      free(data);
      bytes = (wanted + kPage - 1) / kPage * kPage;
      data = aligned_alloc(kPage, bytes);
      if (!data) bytes = 0;
    }
    return data;
  }
};

int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// [begin, end) of `total` for part `index` of `parts`, on multiples of `grain`.
struct Range {
  int64_t begin, end;
};
Range share(int64_t total, int64_t index, int64_t parts, int64_t grain) {
  const int64_t grains = (total + grain - 1) / grain;
  return {std::min(total, grains * index / parts * grain), std::min(total, grains * (index + 1) / parts * grain)};
}

template <class D, class E, class Driver>
int32_t run(const MatmulCall& call) {
  using X = typename E::X;
  using Element = typename D::Element;
  const Element* x = static_cast<const Element*>(call.x);
  Element* y = static_cast<Element*>(call.y);
  const int64_t num_rows = call.jobs[call.num_jobs - 1].end;
  const int64_t panels = (call.n + 15) / 16;
  const int64_t panel_elements = packed_bytes(16, call.k, call.dtype) / (int64_t)sizeof(Element);
  const int64_t depth = round_up(call.k, E::kDepthMultiple);
  // Odd number of cache lines between prepared rows: a power of two would put 16 rows into the same few cache sets.
  const int64_t prepared_stride = (round_up(depth * sizeof(X), 64) / 64 | 1) * 64 / sizeof(X);
  const int64_t block_rows = std::clamp<int64_t>(E::kBlockBytes / (prepared_stride * (int64_t)sizeof(X)) / 32 * 32, 32, 512);
  const bool raw = E::kTakesRawRows && std::is_same_v<X, Element> && !call.rows && depth == call.k && num_rows <= 4;

  X* prepared = nullptr;
  if (!raw) {
    static thread_local Scratch scratch;
    // 31 rows more than used: tile loads of a last, partial tile run over them, and the results are dropped.
    prepared = static_cast<X*>(scratch.reserve((std::min(num_rows, block_rows) + 31) * prepared_stride * sizeof(X)));
    if (!prepared) return LLMC_NO_MEMORY;
  }
  std::atomic<bool> out_of_memory = false;
  const auto x_row = [&](int64_t i) { return x + (call.rows ? call.rows[i] : i) * call.x_stride; };
  const auto prepare = [&](int64_t block, int64_t i) { E::prepare(prepared + i * prepared_stride, x_row(block + i), call.k, depth); };

  const int64_t matrix_bytes = call.bits ? quantized_bytes(call.n, call.k, call.bits) : packed_bytes(call.n, call.k, call.dtype);
  const int64_t weight_bytes = matrix_bytes * call.num_jobs;
  const int threads = num_threads_for(call.num_threads, weight_bytes, num_rows * call.n * call.k);

  const auto compute = [&](int64_t block, int64_t block_end, int64_t thread, int64_t team) {
    // Columns are shared out first, each thread streaming its own run of panels; rows only when there are too few panels.
    const int64_t column_parts = std::clamp<int64_t>(panels / 4, 1, team);
    const int64_t row_parts = team / column_parts;
    if (thread >= column_parts * row_parts) return;
    const Range columns = share(panels, thread % column_parts, column_parts, 4);
    for (int64_t j = 0; j < call.num_jobs; j++) {
      const MatmulJob& job = call.jobs[j];
      const int64_t begin = std::max(block, job.begin), rows = std::min(block_end, job.end) - begin;
      if (rows <= 0) continue;
      const Range mine = share(rows, thread / column_parts, row_parts, 32);
      if (mine.begin >= mine.end || columns.begin >= columns.end) continue;
      const int64_t first = begin + mine.begin;
      Tile<D, X> tile;
      tile.x = raw ? reinterpret_cast<const X*>(x) + first * call.x_stride : prepared + (first - block) * prepared_stride;
      tile.x_stride = raw ? call.x_stride : prepared_stride;
      tile.weight = static_cast<const Element*>(job.weight);
      tile.bias = static_cast<const Element*>(job.bias);
      tile.num_rows = mine.end - mine.begin;
      tile.n = call.n;
      tile.k = call.k;
      tile.panel_elements = panel_elements;
      const auto row_out = [&](int64_t i) { return y + (call.rows ? call.rows[first + i] : first + i) * call.y_stride; };
      void* scratch = nullptr;
      QuantizedPanels<D> quantized = {};
      if constexpr (Driver::kQuantized) {
        quantized.weight = static_cast<const uint8_t*>(job.weight);
        quantized.scales = static_cast<const Element*>(job.scales);
        quantized.panel_bytes = quantized_bytes(LLMC_PACK_N, call.k, call.bits);
        quantized.groups = (call.k + call.group - 1) / call.group;
        quantized.group_steps = std::min(call.group, round_up(call.k, kStepDepths)) / kStepDepths;
        static thread_local Scratch held;
        const int64_t wanted = Driver::scratch_bytes(tile, quantized);
        scratch = held.reserve(wanted);
        if (wanted && !scratch) {
          out_of_memory = true;
          return;
        }
      }
      const unsigned mode = E::enter(tile.num_rows);
      if constexpr (Driver::kQuantized)
        Driver::run(tile, quantized, scratch, columns.begin, columns.end, row_out);
      else
        Driver::run(tile, columns.begin, columns.end, row_out);
      E::leave(mode);
    }
  };

  if (threads == 1) {
    for (int64_t block = 0; block < num_rows; block += block_rows) {
      const int64_t end = std::min(num_rows, block + block_rows);
      for (int64_t i = 0; !raw && i < end - block; i++) prepare(block, i);
      compute(block, end, 0, 1);
    }
    return out_of_memory ? LLMC_NO_MEMORY : LLMC_OK;
  }
  // Few rows are prepared here, before the threads start: cheaper than a barrier.
  const bool prepare_alone = !raw && num_rows <= 16;
  for (int64_t i = 0; prepare_alone && i < num_rows; i++) prepare(0, i);
#pragma omp parallel num_threads(threads)
  {
    const int64_t thread = omp_get_thread_num(), team = omp_get_num_threads();  // OpenMP may give fewer than asked
    for (int64_t block = 0; block < num_rows; block += block_rows) {
      const int64_t end = std::min(num_rows, block + block_rows);
      if (!raw && !prepare_alone) {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < end - block; i++) prepare(block, i);
      }
      compute(block, end, thread, team);
      if (end < num_rows) {
#pragma omp barrier
      }
    }
  }
  return out_of_memory ? LLMC_NO_MEMORY : LLMC_OK;
}

template <class D, int Bits>
int32_t run_quantized(const MatmulCall& call) {
#if LLMC_AMX
  if constexpr (std::is_same_v<D, BF16>) {
    // One or two rows go through vector registers faster than through tiles, in the same order.
    if (call.jobs[call.num_jobs - 1].end > QuantizedEngine<BF16>::kMaxRows)
      return amx_permission() ? run<BF16, AmxQuantizedEngine, AmxQuantizedDriver<Bits>>(call) : LLMC_NO_HARDWARE;
  }
#endif
  return run<D, QuantizedEngine<D>, QuantizedDriver<D, Bits>>(call);
}

template <class D>
int32_t run_quantized(const MatmulCall& call) {
  return call.bits == 8 ? run_quantized<D, 8>(call) : run_quantized<D, 4>(call);
}

}  // namespace

int64_t packed_bytes(int64_t n, int64_t k, int32_t dtype) {
  const int64_t panels = (n + LLMC_PACK_N - 1) / LLMC_PACK_N;
  if (dtype == LLMC_FLOAT32) return panels * k * LLMC_PACK_N * 4;
  return panels * round_up(k, LLMC_PACK_K) * LLMC_PACK_N * 2;
}

int64_t quantized_bytes(int64_t n, int64_t k, int32_t bits) {
  return (n + LLMC_PACK_N - 1) / LLMC_PACK_N * round_up(k, LLMC_PACK_K) * LLMC_PACK_N * bits / 8;
}

int num_threads_for(int32_t wanted, int64_t bytes, int64_t products) {
  // A parallel region costs some microseconds: below these sizes one thread is done sooner.
  if (bytes < (96 << 10) && products < (2 << 20)) return 1;
  if (omp_in_parallel()) return 1;
  return std::max(1, wanted > 0 ? wanted : omp_get_max_threads());
}

int32_t matmul(const MatmulCall& call) {
  if (call.num_jobs == 0 || call.n == 0 || call.jobs[call.num_jobs - 1].end == 0) return LLMC_OK;
  switch (call.dtype) {
    case LLMC_FLOAT32:
      if (call.bits) return run_quantized<F32>(call);
      return run<F32, FmaEngine<F32>, VectorDriver<F32, FmaEngine<F32>>>(call);
    case LLMC_FLOAT16:
      if (call.bits) return run_quantized<F16>(call);
      return run<F16, FmaEngine<F16>, VectorDriver<F16, FmaEngine<F16>>>(call);
    case LLMC_BFLOAT16:
      if (call.bits) return run_quantized<BF16>(call);
#if LLMC_AMX
      if (!amx_permission()) return LLMC_NO_HARDWARE;
      return run<BF16, AmxEngine, AmxDriver>(call);
#elif defined(__AVX512BF16__)
      return run<BF16, PairEngine, VectorDriver<BF16, PairEngine>>(call);
#else
      return run<BF16, FmaEngine<BF16>, VectorDriver<BF16, FmaEngine<BF16>>>(call);
#endif
    default:
      return LLMC_BAD_DTYPE;
  }
}

}  // namespace llmc
