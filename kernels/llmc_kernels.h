/* Every C entry point of the kernels shared object. */
#ifndef LLMC_KERNELS_H
#define LLMC_KERNELS_H

#include "all_reduce/cpu/all_reduce.h"
#include "embedding/cpu/embedding.h"
#include "grouped_linear/cpu/grouped_linear.h"
#include "linear/cpu/linear.h"
#include "lora_add/cpu/lora_add.h"
#include "paged_attention/cpu/paged_attention.h"
#include "quantized_embedding/cpu/quantized_embedding.h"
#include "quantized_linear/cpu/quantized_linear.h"
#include "rms_norm/cpu/rms_norm.h"
#include "rope_kv_write/cpu/rope_kv_write.h"
#include "silu_mul/cpu/silu_mul.h"

#endif
