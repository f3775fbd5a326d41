// llmc's kernels as extern packed functions: TVM's code calls them by the names llmc_tvm_*.
//
// A function is found by the symbol __tvm_ffi_<name> and takes TVM FFI's calling convention (tvm/ffi/c_api.h, TVMFFISafeCallType);
// the last argument is the tensor to fill.
#include <cstring>

#include "llmc_kernels.h"
#include "tensor.h"

using llmc_tvm::data;
using llmc_tvm::step_threads;
using llmc_tvm::tensor;

namespace {

int fail(const char* what) {
  TVMFFIErrorSetRaisedFromCStr("ValueError", what);
  return -1;
}

bool is(const DLTensor* t, uint8_t code, uint8_t bits) { return t->dtype.code == code && t->dtype.bits == bits; }

// LLMC_FLOAT32 and the like; -1 for what kernels do not compute in.
int32_t element(const DLTensor* t) {
  if (is(t, kDLFloat, 32)) return LLMC_FLOAT32;
  if (is(t, kDLFloat, 16)) return LLMC_FLOAT16;
  if (is(t, kDLBfloat, 16)) return LLMC_BFLOAT16;
  return -1;
}

int32_t cache_element(const DLTensor* t) {
  if (is(t, kDLInt, 8)) return LLMC_INT8;
  if (is(t, kDLUInt, 8)) return LLMC_FP8_E4M3;
  return element(t);
}

// A float that travelled as the integer of its bits.
double from_bits(int64_t bits) {
  double value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

int64_t rows_of(const DLTensor* t) {
  int64_t rows = 1;
  for (int32_t axis = 0; axis + 1 < t->ndim; axis++) rows *= t->shape[axis];
  return rows;
}

int64_t columns_of(const DLTensor* t) { return t->shape[t->ndim - 1]; }

// Whether `w` is the packed form of [n, k] in `dtype` (docs/architecture.md, "Packed layout").
bool packed(const DLTensor* w, int64_t n, int64_t k, int32_t dtype) {
  if (element(w) != dtype || w->shape[0] != (n + LLMC_PACK_N - 1) / LLMC_PACK_N) return false;
  if (dtype == LLMC_FLOAT32) return w->ndim == 3 && w->shape[1] == k && w->shape[2] == LLMC_PACK_N;
  return w->ndim == 4 && w->shape[1] == (k + LLMC_PACK_K - 1) / LLMC_PACK_K * (LLMC_PACK_K / 2) && w->shape[2] == LLMC_PACK_N && w->shape[3] == 2;
}

int run_linear(const DLTensor* x, const DLTensor* weight, const DLTensor* bias, bool has_bias, const DLTensor* y) {
  if (!x || !weight || !y || (has_bias && !bias) || x->ndim < 1 || y->ndim != x->ndim) return fail("llmc.linear: expected contiguous tensors");
  LlmcLinearArgs args = {};
  args.struct_bytes = sizeof(args);
  args.m = rows_of(x);
  args.n = columns_of(y);
  args.k = columns_of(x);
  args.dtype = element(x);
  if (args.dtype < 0 || element(y) != args.dtype || rows_of(y) != args.m) return fail("llmc.linear: x and its result disagree");
  if (!packed(weight, args.n, args.k, args.dtype)) return fail("llmc.linear: the weight is not packed for these sizes");
  if (bias && (element(bias) != args.dtype || bias->ndim != 1 || bias->shape[0] != args.n)) return fail("llmc.linear: the bias does not fit");
  args.x = data(x);
  args.weight = data(weight);
  args.bias = bias ? data(bias) : nullptr;
  args.y = data(y);
  args.x_stride = args.k;
  args.y_stride = args.n;
  args.num_threads = step_threads;
  return llmc_linear(&args) == LLMC_OK ? 0 : fail("llmc.linear: the kernel refused its arguments");
}

}  // namespace

#define LLMC_TVM_FUNCTION(name) \
  extern "C" __attribute__((visibility("default"))) int __tvm_ffi_llmc_tvm_##name(void*, const TVMFFIAny* args, int32_t num_args, TVMFFIAny* result)

// (x [..., K], packed weight, y [..., N])
LLMC_TVM_FUNCTION(linear) {
  result->type_index = kTVMFFINone;
  if (num_args != 3) return fail("llmc.linear: expected 3 arguments");
  return run_linear(tensor(args[0]), tensor(args[1]), nullptr, false, tensor(args[2]));
}

// (x [..., K], packed weight, bias [N], y [..., N])
LLMC_TVM_FUNCTION(linear_bias) {
  result->type_index = kTVMFFINone;
  if (num_args != 4) return fail("llmc.linear: expected 4 arguments");
  return run_linear(tensor(args[0]), tensor(args[1]), tensor(args[2]), true, tensor(args[3]));
}

// (ids int64 [...], packed matrix, y [..., K])
LLMC_TVM_FUNCTION(embedding) {
  result->type_index = kTVMFFINone;
  const DLTensor* ids = num_args == 3 ? tensor(args[0]) : nullptr;
  const DLTensor* weight = num_args == 3 ? tensor(args[1]) : nullptr;
  const DLTensor* y = num_args == 3 ? tensor(args[2]) : nullptr;
  if (!ids || !weight || !y || !is(ids, kDLInt, 64) || y->ndim < 1) return fail("llmc.embedding: expected ids, a matrix and their rows");
  LlmcEmbeddingArgs call = {};
  call.struct_bytes = sizeof(call);
  call.count = rows_of(y);
  call.k = columns_of(y);
  call.dtype = element(y);
  call.num_rows = weight->shape[0] * LLMC_PACK_N;
  if (call.dtype < 0 || !packed(weight, call.num_rows, call.k, call.dtype)) return fail("llmc.embedding: the matrix is not packed for these sizes");
  call.ids = static_cast<const int64_t*>(data(ids));
  call.weight = data(weight);
  call.y = data(y);
  call.y_stride = call.k;
  call.num_threads = step_threads;
  int64_t count = 1;
  for (int32_t axis = 0; axis < ids->ndim; axis++) count *= ids->shape[axis];
  if (count != call.count) return fail("llmc.embedding: the result has not a row for every id");
  const int32_t status = llmc_embedding(&call);
  if (status == LLMC_BAD_INDEX) return fail("llmc.embedding: an id lies outside the matrix");
  return status == LLMC_OK ? 0 : fail("llmc.embedding: the kernel refused its arguments");
}

// (q, k, v, k_cache, v_cache, slot_mapping, block_tables, seq_lens, query_start_loc, group, scale, window, softcap, out)
LLMC_TVM_FUNCTION(paged_attention) {
  result->type_index = kTVMFFINone;
  if (num_args != 14) return fail("llmc.paged_attention: expected 14 arguments");
  const DLTensor* t[9];
  for (int i = 0; i < 9; i++)
    if ((t[i] = tensor(args[i])) == nullptr) return fail("llmc.paged_attention: expected contiguous tensors");
  const DLTensor *q = t[0], *k = t[1], *v = t[2], *k_cache = t[3], *v_cache = t[4], *slots = t[5], *tables = t[6], *lengths = t[7], *starts = t[8];
  const DLTensor* out = tensor(args[13]);
  for (int i = 9; i < 13; i++)
    if (args[i].type_index != kTVMFFIInt) return fail("llmc.paged_attention: expected group, scale, window and softcap as integers");
  const int64_t group = args[9].v_int64;
  const int32_t dtype = element(q);
  if (dtype < 0 || q->ndim != 3 || k->ndim != 3 || v->ndim != 3 || element(k) != dtype || element(v) != dtype) return fail("llmc.paged_attention: q, k and v must be [T, heads, head_dim] of one dtype");
  const int64_t T = q->shape[0], H = q->shape[1], D = q->shape[2], Hkv = k->shape[1];
  if (k->shape[0] != T || k->shape[2] != D || v->shape[0] != T || v->shape[1] != Hkv || v->shape[2] != D) return fail("llmc.paged_attention: q, k and v disagree in shape");
  if (!out || out->ndim != 3 || out->shape[0] != T || out->shape[1] != H || out->shape[2] != D || element(out) != dtype) return fail("llmc.paged_attention: the result is not of q's shape");
  const int32_t kv_dtype = cache_element(k_cache);
  const int64_t width = D + (kv_dtype == LLMC_INT8 ? 4 : 0);  // of a token in a tile, its scale included
  if (k_cache->ndim != 4 || v_cache->ndim != 4 || kv_dtype < 0 || cache_element(v_cache) != kv_dtype) return fail("llmc.paged_attention: caches must be [blocks, kv heads, block size, head_dim]");
  for (int axis = 0; axis < 4; axis++)
    if (k_cache->shape[axis] != v_cache->shape[axis]) return fail("llmc.paged_attention: the two caches disagree in shape");
  if (k_cache->shape[1] != Hkv || k_cache->shape[3] != width) return fail("llmc.paged_attention: the caches do not fit k and v");
  const int64_t B = lengths->ndim == 1 ? lengths->shape[0] : -1;
  if (!is(lengths, kDLInt, 32) || B < 0 || !is(starts, kDLInt, 32) || starts->ndim != 1 || starts->shape[0] != B + 1) return fail("llmc.paged_attention: seq_lens and query_start_loc must be int32 [B] and [B + 1]");
  if (!is(slots, kDLInt, 64) || slots->ndim != 2 || slots->shape[1] != T) return fail("llmc.paged_attention: slot_mapping must be int64 [groups, T]");
  if (!is(tables, kDLInt, 32) || tables->ndim != 3 || tables->shape[1] != B) return fail("llmc.paged_attention: block_tables must be int32 [groups, B, blocks]");
  if (group < 0 || group >= slots->shape[0] || group >= tables->shape[0]) return fail("llmc.paged_attention: no such KV group");

  llmc_paged_attention_args call = {};
  call.struct_size = sizeof(call);
  call.num_threads = step_threads;
  call.dtype = dtype;
  call.kv_dtype = kv_dtype;
  call.scale = static_cast<float>(from_bits(args[10].v_int64));
  call.softcap = static_cast<float>(from_bits(args[12].v_int64));
  call.window = args[11].v_int64;
  call.num_tokens = T;
  call.num_seqs = B;
  call.num_heads = H;
  call.num_kv_heads = Hkv;
  call.head_dim = D;
  call.num_blocks = k_cache->shape[0];
  call.block_size = k_cache->shape[2];
  call.max_blocks = tables->shape[2];
  call.q = data(q);
  call.k = data(k);
  call.v = data(v);
  call.k_cache = data(k_cache);
  call.v_cache = data(v_cache);
  call.slot_mapping = static_cast<const int64_t*>(data(slots)) + group * T;
  call.block_tables = static_cast<const int32_t*>(data(tables)) + group * B * call.max_blocks;
  call.seq_lens = static_cast<const int32_t*>(data(lengths));
  call.query_start_loc = static_cast<const int32_t*>(data(starts));
  call.out = data(out);
  call.q_token_stride = H * D;
  call.q_head_stride = call.k_head_stride = call.v_head_stride = D;
  call.k_token_stride = call.v_token_stride = Hkv * D;
  call.k_cache_head_stride = call.v_cache_head_stride = call.block_size * width;
  call.k_cache_block_stride = call.v_cache_block_stride = Hkv * call.block_size * width;
  call.block_table_stride = call.max_blocks;
  const int status = llmc_paged_attention(&call);
  return status == LLMC_PA_OK ? 0 : fail(llmc_paged_attention_message(status));
}
