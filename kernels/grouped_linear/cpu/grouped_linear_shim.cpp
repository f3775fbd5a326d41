#include "aoti_tensor.h"
#include "grouped_linear.h"

LLMC_SHIM AOTITorchError aoti_torch_cpu_llmc_grouped_linear(AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle expert_ids,
                                                            AtenTensorHandle* bias, int64_t out_features, AtenTensorHandle* ret) {
  using namespace llmc;
  const TensorView tx(x), tw(weight), te(expert_ids);
  if (!tx.ok || !tw.ok || !te.ok || tx.dim != 2 || te.dim != 1 || tw.dim < 1 || out_features < 1) return AOTI_TORCH_FAILURE;
  const int64_t m = tx.sizes[0], k = tx.sizes[1], num_experts = tw.sizes[0];
  if (k < 1 || num_experts < 1 || !tw.packed(out_features, k, tx.element(), 1)) return AOTI_TORCH_FAILURE;
  if (tx.strides[1] != 1 && k != 1) return AOTI_TORCH_FAILURE;
  if (te.dtype != aoti_torch_dtype_int64() || te.sizes[0] != m || !te.contiguous()) return AOTI_TORCH_FAILURE;
  const void* bias_data = nullptr;
  if (bias && *bias) {
    const TensorView tb(*bias);
    if (!tb.ok || tb.dim != 2 || tb.sizes[0] != num_experts || tb.sizes[1] != out_features) return AOTI_TORCH_FAILURE;
    if (!tb.contiguous() || tb.dtype != tx.dtype) return AOTI_TORCH_FAILURE;
    bias_data = tb.data;
  }
  const int64_t sizes[2] = {m, out_features};
  AtenTensorHandle made = nullptr;
  if (empty_contiguous(2, sizes, tx.dtype, &made)) return AOTI_TORCH_FAILURE;

  LlmcGroupedLinearArgs args = {};
  args.struct_bytes = sizeof(args);
  args.x = tx.data;
  args.weight = tw.data;
  args.expert_ids = static_cast<const int64_t*>(te.data);
  args.bias = bias_data;
  args.y = TensorView(made).data;
  args.m = m;
  args.n = out_features;
  args.k = k;
  args.num_experts = num_experts;
  args.x_stride = m > 1 ? tx.strides[0] : k;
  args.y_stride = out_features;
  args.dtype = tx.element();
  return give(llmc_grouped_linear(&args), made, ret);
}
