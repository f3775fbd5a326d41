#include "silu_mul/cpu/gated_shim.h"

LLMC_SHIM AOTITorchError aoti_torch_cpu_llmc_gelu_mul(AtenTensorHandle gate, AtenTensorHandle up, int32_t tanh, AtenTensorHandle* ret) {
  return llmc::gated(gate, up, tanh ? LLMC_GELU_TANH : LLMC_GELU, ret);
}
