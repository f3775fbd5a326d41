// The part of a model image that is not TVM's: llmc's kernels as extern packed functions, and a C interface to run a step.
//
// TVM's code calls the kernels by the names llmc_tvm_* through TVM FFI's C interface; the runtime of llmc calls llmc_tvm_open, _set,
// _run and _close, and so needs nothing of TVM's Python. Only TVM FFI's C header is used (tvm/ffi/c_api.h, dlpack/dlpack.h).
#include <tvm/ffi/c_api.h>

#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "llmc_kernels.h"

namespace {

constexpr size_t kAlignment = 64;      // of every tensor: TVM's code loads whole vectors
constexpr int64_t kNaiveAllocator = 1;  // the pooled one keeps a buffer of every size ever asked for, and a step's sizes vary
thread_local int32_t step_threads = 0;  // of the step that this thread runs

// ---- kernels ------------------------------------------------------------------------------------------------------------------

int fail(const char* what) {
  TVMFFIErrorSetRaisedFromCStr("ValueError", what);
  return -1;
}

// The tensor an argument holds; null if it is none, or not contiguous.
const DLTensor* tensor(const TVMFFIAny& value) {
  const DLTensor* found = nullptr;
  if (value.type_index == kTVMFFITensor) found = TVMFFITensorGetDLTensorPtr(value.v_obj);
  if (value.type_index == kTVMFFIDLTensorPtr) found = static_cast<const DLTensor*>(value.v_ptr);
  if (found == nullptr || found->dtype.lanes != 1) return nullptr;
  int64_t expected = 1;
  for (int32_t axis = found->ndim - 1; axis >= 0; axis--) {
    if (found->strides != nullptr && found->shape[axis] != 1 && found->strides[axis] != expected) return nullptr;
    expected *= found->shape[axis];
  }
  return found;
}

void* data(const DLTensor* t) { return static_cast<char*>(t->data) + t->byte_offset; }

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

// ---- running a step -----------------------------------------------------------------------------------------------------------

namespace {

thread_local std::string message;

struct Program {
  TVMFFIObjectHandle module = nullptr;  // the executable, with the library it came from
  TVMFFIObjectHandle machine = nullptr;
  TVMFFIObjectHandle step = nullptr;
  TVMFFIAny output = {};  // kept while the runtime reads it
  std::vector<TVMFFIAny> arguments;
};

TVMFFIAny nothing() {
  TVMFFIAny value;
  std::memset(&value, 0, sizeof(value));
  return value;
}

TVMFFIAny number(int64_t v) {
  TVMFFIAny value = nothing();
  value.type_index = kTVMFFIInt;
  value.v_int64 = v;
  return value;
}

TVMFFIAny text(const char* v) {
  TVMFFIAny value = nothing();
  value.type_index = kTVMFFIRawStr;
  value.v_c_str = v;
  return value;
}

TVMFFIAny object(TVMFFIObjectHandle handle, int32_t type_index) {
  TVMFFIAny value = nothing();
  value.type_index = type_index;
  value.v_obj = static_cast<TVMFFIObject*>(handle);
  return value;
}

void release(TVMFFIObjectHandle* handle) {
  if (*handle != nullptr) TVMFFIObjectDecRef(*handle);
  *handle = nullptr;
}

void release(TVMFFIAny* value) {
  if (value->type_index >= kTVMFFIStaticObjectBegin) TVMFFIObjectDecRef(value->v_obj);
  *value = nothing();
}

// Keep what TVM raised as this thread's message.
int raised(const char* doing) {
  TVMFFIObjectHandle error = nullptr;
  TVMFFIErrorMoveFromRaised(&error);
  message = doing;
  if (error != nullptr) {
    const TVMFFIByteArray& said = TVMFFIErrorGetCellPtr(error)->message;
    message += ": " + std::string(said.data, said.size);
    TVMFFIObjectDecRef(error);
  }
  return 1;
}

int refuse(const char* why) {
  message = why;
  return 1;
}

int global_function(const char* name, TVMFFIObjectHandle* out) {
  const TVMFFIByteArray spelled{name, std::strlen(name)};
  if (TVMFFIFunctionGetGlobal(&spelled, out)) return raised(name);
  if (*out == nullptr) {
    message = std::string("TVM's runtime has no function ") + name;
    return 1;
  }
  return 0;
}

// A function of a module, as an object that the caller releases.
int member(TVMFFIObjectHandle module, const char* name, TVMFFIObjectHandle* out) {
  TVMFFIObjectHandle getter = nullptr;
  if (global_function("ffi.ModuleGetFunction", &getter)) return 1;
  TVMFFIAny given[3] = {object(module, kTVMFFIModule), text(name), nothing()}, found = nothing();
  given[2].type_index = kTVMFFIBool;
  const int status = TVMFFIFunctionCall(getter, given, 3, &found);
  release(&getter);
  if (status) return raised(name);
  if (found.type_index != kTVMFFIFunction) {
    release(&found);
    message = std::string("the model image has no function ") + name;
    return 1;
  }
  *out = found.v_obj;
  return 0;
}

int call_member(TVMFFIObjectHandle module, const char* name, TVMFFIAny* given, int32_t count, TVMFFIAny* result) {
  TVMFFIObjectHandle function = nullptr;
  if (member(module, name, &function)) return 1;
  *result = nothing();
  const int status = TVMFFIFunctionCall(function, given, count, result);
  release(&function);
  return status ? raised(name) : 0;
}

int open_program(const char* path, int64_t num_arguments, Program* made) {
  TVMFFIObjectHandle loader = nullptr;
  if (global_function("ffi.Module.load_from_file.so", &loader)) return 1;
  TVMFFIAny file[2] = {text(path), text("so")}, found = nothing();
  const int status = TVMFFIFunctionCall(loader, file, 2, &found);
  release(&loader);
  if (status) return raised("loading the model image");
  if (found.type_index != kTVMFFIModule) return release(&found), refuse("the model image is no module of TVM's");
  made->module = found.v_obj;
  if (call_member(made->module, "vm_load_executable", nullptr, 0, &found)) return 1;
  if (found.type_index != kTVMFFIModule) return release(&found), refuse("the model image holds no executable of Relax's");
  made->machine = found.v_obj;
  TVMFFIAny device[3] = {number(kDLCPU), number(0), number(kNaiveAllocator)};
  if (call_member(made->machine, "vm_initialization", device, 3, &found)) return 1;
  release(&found);
  TVMFFIAny name = text("step");
  if (call_member(made->machine, "get_function_arity", &name, 1, &found)) return 1;
  if (found.type_index != kTVMFFIInt || found.v_int64 != num_arguments) {
    message = "the program takes " + std::to_string(found.v_int64) + " inputs and constants, the manifest names " + std::to_string(num_arguments);
    return 1;
  }
  made->arguments.assign(static_cast<size_t>(num_arguments), nothing());
  return member(made->machine, "step", &made->step);
}

void close_program(Program* program) {
  release(&program->output);
  for (TVMFFIAny& argument : program->arguments) release(&argument);
  release(&program->step);
  release(&program->machine);
  release(&program->module);
  delete program;
}

// A tensor over memory of the runtime's. What is small and not aligned is copied: a step's own arrays, never weights.
struct Borrowed {
  DLManagedTensor managed;
  std::vector<int64_t> sizes;    // shape, then strides
  void* copy = nullptr;
};

void forget(DLManagedTensor* managed) {
  Borrowed* borrowed = static_cast<Borrowed*>(managed->manager_ctx);
  std::free(borrowed->copy);
  delete borrowed;
}

constexpr size_t kLargestCopy = size_t{64} << 20;

}  // namespace

extern "C" {

// data: [shape], contiguous. code, bits: as DLPack counts them (kDLInt 0, kDLUInt 1, kDLFloat 2, kDLBfloat 4).
typedef struct {
  void* data;
  int32_t code, bits;
  int64_t dim;
  int64_t shape[8];
} LlmcTvmTensor;

#define LLMC_TVM_API __attribute__((visibility("default")))

// What the last call of this thread that failed said.
LLMC_TVM_API const char* llmc_tvm_message() { return message.c_str(); }

// Open the program in the image at `path`, which is this very image, mapped already.
LLMC_TVM_API int32_t llmc_tvm_open(const char* path, int64_t num_arguments, void** program) try {
  Program* made = new Program();
  const int status = open_program(path, num_arguments, made);
  if (status) {
    const std::string kept = message;
    close_program(made);
    message = kept;
    return status;
  }
  *program = made;
  return 0;
} catch (const std::bad_alloc&) {
  return refuse("no memory");
}

// Give an input or constant its tensor, until it is given another. The memory stays the caller's.
LLMC_TVM_API int32_t llmc_tvm_set(void* handle, int64_t index, const LlmcTvmTensor* given) try {
  Program* program = static_cast<Program*>(handle);
  if (index < 0 || index >= static_cast<int64_t>(program->arguments.size()) || given->dim < 0 || given->dim > 8) return refuse("no such input");
  Borrowed* made = new Borrowed();
  int64_t count = 1;
  made->sizes.resize(2 * given->dim);
  for (int64_t axis = given->dim - 1; axis >= 0; axis--) {
    made->sizes[axis] = given->shape[axis];
    made->sizes[given->dim + axis] = count;
    count *= given->shape[axis];
  }
  void* memory = given->data;
  if (reinterpret_cast<uintptr_t>(memory) % kAlignment) {
    const size_t bytes = (static_cast<size_t>(count) * given->bits / 8 + kAlignment - 1) / kAlignment * kAlignment;
    made->copy = bytes <= kLargestCopy ? std::aligned_alloc(kAlignment, bytes ? bytes : kAlignment) : nullptr;
    if (made->copy == nullptr) return delete made, refuse("a large tensor does not start at a multiple of 64 bytes");
    std::memcpy(made->copy, memory, static_cast<size_t>(count) * given->bits / 8);
    memory = made->copy;
  }
  DLTensor& t = made->managed.dl_tensor;
  t.data = memory;
  t.device = DLDevice{kDLCPU, 0};
  t.ndim = static_cast<int32_t>(given->dim);
  t.dtype = DLDataType{static_cast<uint8_t>(given->code), static_cast<uint8_t>(given->bits), 1};
  t.shape = made->sizes.data();
  t.strides = made->sizes.data() + given->dim;
  t.byte_offset = 0;
  made->managed.manager_ctx = made;
  made->managed.deleter = forget;
  TVMFFIObjectHandle object_handle = nullptr;
  if (TVMFFITensorFromDLPack(&made->managed, 0, 0, &object_handle)) return raised("an input");
  release(&program->arguments[static_cast<size_t>(index)]);
  program->arguments[static_cast<size_t>(index)] = object(object_handle, kTVMFFITensor);
  return 0;
} catch (const std::bad_alloc&) {
  return refuse("no memory");
}

// Run one step. `out` is valid until the next call.
LLMC_TVM_API int32_t llmc_tvm_run(void* handle, int32_t num_threads, LlmcTvmTensor* out) {
  Program* program = static_cast<Program*>(handle);
  release(&program->output);
  step_threads = num_threads;
  if (TVMFFIFunctionCall(program->step, program->arguments.data(), static_cast<int32_t>(program->arguments.size()), &program->output)) return raised("the step");
  const DLTensor* t = tensor(program->output);
  if (t == nullptr || t->ndim > 8) return refuse("the step gave no contiguous tensor");
  out->data = data(t);
  out->code = t->dtype.code;
  out->bits = t->dtype.bits;
  out->dim = t->ndim;
  for (int32_t axis = 0; axis < t->ndim; axis++) out->shape[axis] = t->shape[axis];
  return 0;
}

LLMC_TVM_API void llmc_tvm_close(void* handle) { close_program(static_cast<Program*>(handle)); }

}  // extern "C"
