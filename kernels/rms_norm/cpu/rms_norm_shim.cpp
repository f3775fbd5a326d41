#include "aoti_tensor.h"
#include "rms_norm.h"

namespace {

using namespace llmc;

AOTITorchError norm(AtenTensorHandle x, AtenTensorHandle residual, AtenTensorHandle weight, double eps, double offset, int32_t round_first,
                    AtenTensorHandle* normal, AtenTensorHandle* summed) {
  const TensorView tx(x), tw(weight);
  LlmcRmsNormArgs args = {};
  args.struct_bytes = sizeof(args);
  if (!tx.ok || !tw.ok || tx.dim < 1 || tx.dim > 8 || tx.element() < 0 || tw.element() < 0) return AOTI_TORCH_FAILURE;
  args.n = tx.sizes[tx.dim - 1];
  args.m = tx.rows_before(tx.dim - 1);
  if (tw.dim != 1 || tw.sizes[0] != args.n || !tw.contiguous() || !tx.even_rows(&args.x_stride)) return AOTI_TORCH_FAILURE;
  if (residual) {
    const TensorView tr(residual);
    if (!tr.ok || tr.dim != tx.dim || tr.dtype != tx.dtype || !tr.even_rows(&args.residual_stride)) return AOTI_TORCH_FAILURE;
    for (int64_t i = 0; i < tx.dim; i++)
      if (tr.sizes[i] != tx.sizes[i]) return AOTI_TORCH_FAILURE;
    args.residual = tr.data;
  }
  AtenTensorHandle y = nullptr, s = nullptr;
  if (empty_contiguous(tx.dim, tx.sizes, tx.dtype, &y)) return AOTI_TORCH_FAILURE;
  if (residual && empty_contiguous(tx.dim, tx.sizes, tx.dtype, &s)) {
    aoti_torch_delete_tensor_object(y);
    return AOTI_TORCH_FAILURE;
  }
  args.x = tx.data;
  args.weight = tw.data;
  args.y = TensorView(y).data;
  args.sum = s ? TensorView(s).data : nullptr;
  args.eps = eps;
  args.offset = offset;
  args.round_first = round_first;
  args.dtype = tx.element();
  args.weight_dtype = tw.element();
  const int32_t code = args.m == 0 ? LLMC_OK : llmc_rms_norm(&args);
  if (s && give(code, s, summed)) {
    aoti_torch_delete_tensor_object(y);
    return AOTI_TORCH_FAILURE;
  }
  return give(code, y, normal);
}

}  // namespace

LLMC_SHIM AOTITorchError aoti_torch_cpu_llmc_rms_norm(AtenTensorHandle x, AtenTensorHandle weight, double eps, double offset,
                                                      int32_t round_first, AtenTensorHandle* ret) {
  return norm(x, nullptr, weight, eps, offset, round_first, ret, nullptr);
}

LLMC_SHIM AOTITorchError aoti_torch_cpu_llmc_add_rms_norm(AtenTensorHandle x, AtenTensorHandle residual, AtenTensorHandle weight, double eps,
                                                          double offset, int32_t round_first, AtenTensorHandle* ret0,
                                                          AtenTensorHandle* ret1) {
  return norm(x, residual, weight, eps, offset, round_first, ret0, ret1);
}
