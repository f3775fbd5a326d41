#include "aoti_tensor.h"
#include "quantized_linear.h"

LLMC_SHIM AOTITorchError aoti_torch_cpu_llmc_quantized_linear(AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle scales,
                                                              AtenTensorHandle* bias, int64_t out_features, int64_t group,
                                                              AtenTensorHandle* ret) {
  using namespace llmc;
  const TensorView tx(x), tw(weight), ts(scales);
  if (!tx.ok || !tw.ok || !ts.ok || tx.dim < 1 || tx.dim > 8 || out_features < 1) return AOTI_TORCH_FAILURE;
  const int64_t last = tx.dim - 1, k = tx.sizes[last], m = tx.rows_before(last);
  if (k < 1 || !tw.quantized(out_features, k) || !ts.scales(out_features, k, group, tx.element())) return AOTI_TORCH_FAILURE;
  int64_t x_stride = 0;
  if (!tx.even_rows(&x_stride)) return AOTI_TORCH_FAILURE;
  const void* bias_data = nullptr;
  if (bias && *bias) {
    const TensorView tb(*bias);
    if (!tb.ok || tb.dim != 1 || tb.sizes[0] != out_features || !tb.contiguous() || tb.dtype != tx.dtype) return AOTI_TORCH_FAILURE;
    bias_data = tb.data;
  }
  int64_t sizes[8];
  for (int64_t i = 0; i < last; i++) sizes[i] = tx.sizes[i];
  sizes[last] = out_features;
  AtenTensorHandle made = nullptr;
  if (empty_contiguous(tx.dim, sizes, tx.dtype, &made)) return AOTI_TORCH_FAILURE;

  LlmcQuantizedLinearArgs args = {};
  args.struct_bytes = sizeof(args);
  args.x = tx.data;
  args.weight = tw.data;
  args.scales = ts.data;
  args.bias = bias_data;
  args.y = TensorView(made).data;
  args.m = m;
  args.n = out_features;
  args.k = k;
  args.x_stride = x_stride;
  args.y_stride = out_features;
  args.group = group;
  args.bits = tw.quantized_bits();
  args.dtype = tx.element();
  return give(llmc_quantized_linear(&args), made, ret);
}
