// The C interface by which llmc's runtime runs what TVM compiled, and so needs nothing of TVM's Python.
//
// The image holds Relax's bytecode; TVM's runtime library interprets it. Only TVM FFI's C header is used.
#include <tvm/ffi/c_api.h>

#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "tensor.h"

using llmc_tvm::data;
using llmc_tvm::step_threads;
using llmc_tvm::tensor;

namespace {

constexpr size_t kAlignment = 64;      // of every tensor: TVM's code loads whole vectors
constexpr int64_t kNaiveAllocator = 1;  // the pooled one keeps a buffer of every size ever asked for, and a step's sizes vary

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
