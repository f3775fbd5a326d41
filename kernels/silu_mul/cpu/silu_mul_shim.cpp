#include "gated_shim.h"

LLMC_SHIM AOTITorchError aoti_torch_cpu_llmc_silu_mul(AtenTensorHandle gate, AtenTensorHandle up, AtenTensorHandle* ret) {
  return llmc::gated(gate, up, LLMC_SILU, ret);
}
