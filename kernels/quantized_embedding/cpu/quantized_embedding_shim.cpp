#include "aoti_tensor.h"
#include "quantized_embedding.h"

LLMC_SHIM AOTITorchError aoti_torch_cpu_llmc_quantized_embedding(AtenTensorHandle ids, AtenTensorHandle weight, AtenTensorHandle scales,
                                                                 int64_t embedding_dim, int64_t group, AtenTensorHandle* ret) {
  using namespace llmc;
  const TensorView ti(ids), tw(weight), ts(scales);
  if (!ti.ok || !tw.ok || !ts.ok || ti.dim > 7 || embedding_dim < 1) return AOTI_TORCH_FAILURE;
  if (ti.dtype != aoti_torch_dtype_int64() || !ti.contiguous() || tw.dim < 1 || ts.element() < 0) return AOTI_TORCH_FAILURE;
  const int64_t num_rows = tw.sizes[0] * LLMC_PACK_N;
  if (!tw.quantized(num_rows, embedding_dim) || !ts.scales(num_rows, embedding_dim, group, ts.element())) return AOTI_TORCH_FAILURE;
  int64_t sizes[8];
  for (int64_t i = 0; i < ti.dim; i++) sizes[i] = ti.sizes[i];
  sizes[ti.dim] = embedding_dim;
  AtenTensorHandle made = nullptr;
  if (empty_contiguous(ti.dim + 1, sizes, ts.dtype, &made)) return AOTI_TORCH_FAILURE;

  LlmcQuantizedEmbeddingArgs args = {};
  args.struct_bytes = sizeof(args);
  args.ids = static_cast<const int64_t*>(ti.data);
  args.weight = tw.data;
  args.scales = ts.data;
  args.y = TensorView(made).data;
  args.count = ti.rows_before(ti.dim);
  args.num_rows = num_rows;
  args.k = embedding_dim;
  args.y_stride = embedding_dim;
  args.group = group;
  args.bits = tw.quantized_bits();
  args.dtype = ts.element();
  return give(llmc_quantized_embedding(&args), made, ret);
}
