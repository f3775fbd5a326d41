#include "all_reduce.h"
#include "aoti_tensor.h"

LLMC_SHIM AOTITorchError aoti_torch_cpu_llmc_all_reduce(AtenTensorHandle x, int64_t ranks, AtenTensorHandle* ret) {
  const llmc::TensorView tx(x);
  if (!tx.ok || tx.dim < 1 || tx.dim > 8 || tx.element() < 0 || !tx.contiguous()) return AOTI_TORCH_FAILURE;
  AtenTensorHandle made = nullptr;
  if (llmc::empty_contiguous(tx.dim, tx.sizes, tx.dtype, &made)) return AOTI_TORCH_FAILURE;
  LlmcAllReduceArgs args = {};
  args.struct_bytes = sizeof(args);
  args.x = tx.data;
  args.y = llmc::TensorView(made).data;
  args.n = tx.rows_before(tx.dim);
  args.ranks = ranks;
  args.dtype = tx.element();
  return llmc::give(llmc_all_reduce(&args), made, ret);
}
