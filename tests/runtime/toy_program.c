/* A stand-in for a model image: the AOTInductor C interface over the toy program of toy_program.py, in a page that compiles in half
 * a second. Like generated code it steals its inputs, takes constants by handle, reports errors by AOTInductorGetLastError, and
 * leaves libtorch's C interface to be found at load. */
#include <stdbool.h>
#include <stdint.h>
#include <stdlib.h>

typedef void* Handle;
typedef struct {
  const char* name;
  Handle handle;
} Pair;

int32_t aoti_torch_get_data_ptr(Handle, void**);
int32_t aoti_torch_get_sizes(Handle, int64_t**);
int32_t aoti_torch_delete_tensor_object(Handle);
int32_t aoti_torch_empty_strided(int64_t, const int64_t*, const int64_t*, int32_t, int32_t, int32_t, Handle*);

enum { VOCAB = 32, DIM = 16, BLOCK = 16, INPUTS = 9 };
static const char* const kNames[] = {"c_embed", "c_head"};
static const char* const kOriginal[] = {"embed", "head"};
static __thread const char* last_error = "";

static int32_t fail(const char* why) {
  last_error = why;
  return 1;
}

int32_t AOTInductorGetLastError(const char** message) {
  *message = last_error;
  return 0;
}
int32_t AOTInductorModelContainerCreateWithDevice(Handle* container, size_t num_models, const char* device, const char* cubins) {
  (void)num_models, (void)device, (void)cubins;
  *container = calloc(2, sizeof(float*));
  return 0;
}
int32_t AOTInductorModelContainerDelete(Handle container) {
  free(container);
  return 0;
}
int32_t AOTInductorModelContainerGetNumInputs(Handle container, size_t* count) {
  (void)container;
  *count = INPUTS;
  return 0;
}
int32_t AOTInductorModelContainerGetNumConstants(Handle container, size_t* count) {
  (void)container;
  *count = 2;
  return 0;
}
int32_t AOTInductorModelContainerGetConstantName(Handle container, size_t index, const char** name) {
  (void)container;
  *name = kNames[index];
  return 0;
}
int32_t AOTInductorModelContainerGetConstantOriginalFQN(Handle container, size_t index, const char** name) {
  (void)container;
  *name = kOriginal[index];
  return 0;
}
int32_t AOTInductorModelContainerGetConstantFromFolded(Handle container, size_t index, bool* folded) {
  (void)container, (void)index;
  *folded = false;
  return 0;
}
int32_t AOTInductorModelContainerGetConstantDataSize(Handle container, size_t index, size_t* size) {
  (void)container, (void)index;
  *size = VOCAB * DIM * sizeof(float);
  return 0;
}
int32_t AOTInductorModelContainerUpdateUserManagedConstantBufferPairs(Handle container, const Pair* pairs, size_t count, bool inactive,
                                                                      bool full) {
  if (count != 2 || inactive || !full) return fail("the constants are not all there");
  for (size_t i = 0; i < count; i++) {
    int which = pairs[i].name[2] == 'h';
    if (aoti_torch_get_data_ptr(pairs[i].handle, &((void**)container)[which])) return fail("a constant without data");
  }
  return 0;
}

int32_t AOTInductorModelContainerRunSingleThreaded(Handle container, Handle* inputs, size_t num_inputs, Handle* outputs,
                                                   size_t num_outputs, Handle stream, Handle proxy) {
  (void)stream, (void)proxy;
  const float *embed = ((float**)container)[0], *head = ((float**)container)[1];
  void* data[INPUTS];
  int64_t* sizes;
  int64_t num_tokens = 0, num_rows = 0;
  if (num_inputs != INPUTS || num_outputs != 1) return fail("9 inputs and 1 output are expected");
  for (int i = 0; i < INPUTS; i++) aoti_torch_get_data_ptr(inputs[i], &data[i]);
  aoti_torch_get_sizes(inputs[0], &sizes);
  num_tokens = sizes[0];
  aoti_torch_get_sizes(inputs[2], &sizes);
  num_rows = sizes[0];
  aoti_torch_get_sizes(inputs[4], &sizes);
  const int64_t num_blocks = sizes[2]; /* of a row of the table */
  const int64_t *ids = data[0], *positions = data[1], *rows = data[2], *slots = data[3];
  const int32_t *tables = data[4], *query_start_loc = data[6];
  float* k_cache = data[7];
  const char* wrong = NULL;
  for (int64_t t = 0; t < num_tokens; t++) {
    if (ids[t] < 0 || ids[t] >= VOCAB) {
      wrong = "index out of bounds: 0 <= id < 32\nframe #0: a line nobody wants to read";
      break;
    }
    for (int d = 0; d < DIM; d++) k_cache[slots[t] * DIM + d] = embed[ids[t] * DIM + d];
  }
  if (wrong == NULL) {
    const int64_t shape[] = {num_rows, VOCAB}, strides[] = {VOCAB, 1};
    void* logits;
    aoti_torch_empty_strided(2, shape, strides, 6, 0, 0, &outputs[0]);
    aoti_torch_get_data_ptr(outputs[0], &logits);
    for (int64_t r = 0; r < num_rows; r++) {
      int64_t t = rows[r];
      int64_t seq = 0; /* whose token t is: the block before may lie anywhere */
      while (query_start_loc[seq + 1] <= t) seq++;
      int64_t at = positions[t] - (positions[t] > 0);
      const float* before = &k_cache[(tables[seq * num_blocks + at / BLOCK] * BLOCK + at % BLOCK) * DIM];
      for (int v = 0; v < VOCAB; v++) {
        float sum = 0;
        for (int d = 0; d < DIM; d++) sum += (embed[ids[t] * DIM + d] + 0.5f * before[d]) * head[v * DIM + d];
        ((float*)logits)[r * VOCAB + v] = sum;
      }
    }
  }
  for (int i = 0; i < INPUTS; i++) aoti_torch_delete_tensor_object(inputs[i]);
  return wrong == NULL ? 0 : fail(wrong);
}
