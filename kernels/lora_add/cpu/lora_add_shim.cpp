#include "aoti_tensor.h"
#include "lora_add.h"

LLMC_SHIM AOTITorchError aoti_torch_cpu_llmc_lora_add(AtenTensorHandle y, AtenTensorHandle x, AtenTensorHandle slots, AtenTensorHandle pool,
                                                      int64_t rank, const int64_t* sizes, int64_t num_sizes, const int64_t* offsets,
                                                      int64_t num_offsets, AtenTensorHandle* ret) {
  const llmc::TensorView ty(y), tx(x), ts(slots), tp(pool);
  LlmcLoraAddArgs args = {};
  args.struct_bytes = sizeof(args);
  if (!ty.ok || !tx.ok || !ts.ok || !tp.ok || ty.dim < 2 || ty.dim > 8 || tx.dim != ty.dim || ty.element() < 0) return AOTI_TORCH_FAILURE;
  if (tx.dtype != ty.dtype || num_sizes != num_offsets || tp.dim != 2 || !tp.contiguous() || tp.element() < 0) return AOTI_TORCH_FAILURE;
  for (int64_t i = 0; i + 1 < ty.dim; i++)
    if (tx.sizes[i] != ty.sizes[i]) return AOTI_TORCH_FAILURE;
  args.m = ty.rows_before(ty.dim - 1);
  if (ts.dim != 1 || ts.dtype != aoti_torch_dtype_int32() || !ts.contiguous() || ts.sizes[0] != args.m) return AOTI_TORCH_FAILURE;
  if (!ty.even_rows(&args.y_stride) || !tx.even_rows(&args.x_stride)) return AOTI_TORCH_FAILURE;
  AtenTensorHandle made = nullptr;
  if (llmc::empty_contiguous(ty.dim, ty.sizes, ty.dtype, &made)) return AOTI_TORCH_FAILURE;
  args.y = ty.data;
  args.x = tx.data;
  args.slots = static_cast<const int32_t*>(ts.data);
  args.pool = tp.data;
  args.out = llmc::TensorView(made).data;
  args.sizes = sizes;
  args.offsets = offsets;
  args.n = ty.sizes[ty.dim - 1];
  args.k = tx.sizes[tx.dim - 1];
  args.num_slots = tp.sizes[0];
  args.slot_elements = tp.sizes[1];
  args.num_parts = num_sizes;
  args.rank = rank;
  args.dtype = ty.element();
  args.pool_dtype = tp.element();
  return llmc::give(llmc_lora_add(&args), made, ret);
}
