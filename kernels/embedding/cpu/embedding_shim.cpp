#include "aoti_tensor.h"
#include "embedding.h"

LLMC_SHIM AOTITorchError aoti_torch_cpu_llmc_embedding(AtenTensorHandle ids, AtenTensorHandle weight, int64_t embedding_dim,
                                                       AtenTensorHandle* ret) {
  using namespace llmc;
  const TensorView ti(ids), tw(weight);
  if (!ti.ok || !tw.ok || ti.dim > 7 || embedding_dim < 1) return AOTI_TORCH_FAILURE;
  if (ti.dtype != aoti_torch_dtype_int64() || !ti.contiguous()) return AOTI_TORCH_FAILURE;
  if (!tw.packed(-1, embedding_dim, tw.element())) return AOTI_TORCH_FAILURE;
  int64_t sizes[8];
  for (int64_t i = 0; i < ti.dim; i++) sizes[i] = ti.sizes[i];
  sizes[ti.dim] = embedding_dim;
  AtenTensorHandle made = nullptr;
  if (empty_contiguous(ti.dim + 1, sizes, tw.dtype, &made)) return AOTI_TORCH_FAILURE;

  LlmcEmbeddingArgs args = {};
  args.struct_bytes = sizeof(args);
  args.ids = static_cast<const int64_t*>(ti.data);
  args.weight = tw.data;
  args.y = TensorView(made).data;
  args.count = ti.rows_before(ti.dim);
  args.num_rows = tw.sizes[0] * LLMC_PACK_N;
  args.k = embedding_dim;
  args.y_stride = embedding_dim;
  args.dtype = tw.element();
  return give(llmc_embedding(&args), made, ret);
}
