#include "grouped_linear.h"

#include <cstdlib>
#include <memory>

#include "linear/cpu/matmul.h"

namespace {

struct Free {
  void operator()(void* p) const { free(p); }
};
template <class T>
std::unique_ptr<T[], Free> allocate(int64_t count) {
  return std::unique_ptr<T[], Free>(static_cast<T*>(calloc(count, sizeof(T))));
}

}  // namespace

int32_t llmc_grouped_linear(const LlmcGroupedLinearArgs* a) {
  if (!a || a->struct_bytes != (int64_t)sizeof(LlmcGroupedLinearArgs)) return LLMC_BAD_STRUCT;
  if (a->dtype < LLMC_FLOAT32 || a->dtype > LLMC_BFLOAT16) return LLMC_BAD_DTYPE;
  if (a->m < 0 || a->n < 1 || a->k < 1 || a->num_experts < 1 || a->num_threads < 0) return LLMC_BAD_SHAPE;
  if (a->m > 1 && (a->x_stride < 0 || a->y_stride < a->n)) return LLMC_BAD_SHAPE;
  for (int64_t i = 0; i < a->m; i++)
    if (a->expert_ids[i] < 0 || a->expert_ids[i] >= a->num_experts) return LLMC_BAD_INDEX;
  if (a->m == 0) return LLMC_OK;

  // Counting sort of the rows by expert; equal experts keep their order.
  auto start = allocate<int64_t>(a->num_experts + 1);
  auto rows = allocate<int64_t>(a->m);
  auto jobs = allocate<llmc::MatmulJob>(a->num_experts);
  if (!start || !rows || !jobs) return LLMC_NO_MEMORY;
  for (int64_t i = 0; i < a->m; i++) start[a->expert_ids[i] + 1]++;
  for (int64_t e = 0; e < a->num_experts; e++) start[e + 1] += start[e];

  const int64_t expert_bytes = llmc::packed_bytes(a->n, a->k, a->dtype), item = a->dtype == LLMC_FLOAT32 ? 4 : 2;
  int64_t num_jobs = 0;
  for (int64_t e = 0; e < a->num_experts; e++) {
    if (start[e] == start[e + 1]) continue;
    const char* bias = a->bias ? static_cast<const char*>(a->bias) + e * a->n * item : nullptr;
    jobs[num_jobs++] = {static_cast<const char*>(a->weight) + e * expert_bytes, bias, start[e], start[e + 1]};
  }
  for (int64_t i = 0; i < a->m; i++) rows[start[a->expert_ids[i]]++] = i;  // start[e] ends where expert e's rows end

  llmc::MatmulCall call = {};
  call.x = a->x;
  call.x_stride = a->x_stride;
  call.rows = rows.get();
  call.y = a->y;
  call.y_stride = a->y_stride;
  call.n = a->n;
  call.k = a->k;
  call.dtype = a->dtype;
  call.num_threads = a->num_threads;
  call.jobs = jobs.get();
  call.num_jobs = num_jobs;
  return llmc::matmul(call);
}
