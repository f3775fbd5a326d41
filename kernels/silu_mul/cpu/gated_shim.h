// What the shims of silu_mul and gelu_mul share.
#pragma once

#include "aoti_tensor.h"
#include "silu_mul/cpu/silu_mul.h"

namespace llmc {

inline AOTITorchError gated(AtenTensorHandle gate, AtenTensorHandle up, int32_t activation, AtenTensorHandle* ret) {
  const TensorView tg(gate), tu(up);
  LlmcGatedArgs args = {};
  args.struct_bytes = sizeof(args);
  if (!tg.ok || !tu.ok || tg.dim < 1 || tg.dim > 8 || tg.element() < 0 || tu.dim != tg.dim || tu.dtype != tg.dtype) return AOTI_TORCH_FAILURE;
  for (int64_t i = 0; i < tg.dim; i++)
    if (tg.sizes[i] != tu.sizes[i]) return AOTI_TORCH_FAILURE;
  if (!tg.even_rows(&args.gate_stride) || !tu.even_rows(&args.up_stride)) return AOTI_TORCH_FAILURE;
  AtenTensorHandle made = nullptr;
  if (empty_contiguous(tg.dim, tg.sizes, tg.dtype, &made)) return AOTI_TORCH_FAILURE;
  args.gate = tg.data;
  args.up = tu.data;
  args.y = TensorView(made).data;
  args.m = tg.rows_before(tg.dim - 1);
  args.n = tg.sizes[tg.dim - 1];
  args.activation = activation;
  args.dtype = tg.element();
  return give(args.m == 0 ? LLMC_OK : llmc_gated(&args), made, ret);
}

}  // namespace llmc
