/* rms_norm and add_rms_norm: rows normalised by their root mean square, with or without a sum before. C interface. */
#ifndef LLMC_RMS_NORM_H
#define LLMC_RMS_NORM_H

#include "llmc_types.h"

typedef struct {
  int64_t struct_bytes; /* sizeof(LlmcRmsNormArgs) */
  const void* x;        /* [m, n], rows x_stride elements apart */
  const void* residual; /* [m, n], rows residual_stride apart, added to x and rounded before the norm; NULL: none */
  const void* weight;   /* [n], contiguous */
  void* y;              /* [m, n], contiguous */
  void* sum;            /* [m, n], contiguous: x + residual; NULL exactly when residual is */
  int64_t m, n, x_stride, residual_stride;
  double eps, offset;    /* y = x / sqrt(mean(x^2) + eps) * (offset + weight) */
  int32_t round_first;   /* nonzero: the quotient is rounded to dtype before the weight is applied */
  int32_t dtype;         /* of x, residual, y and sum */
  int32_t weight_dtype;
  int32_t num_threads; /* 0: as many as OpenMP would take */
} LlmcRmsNormArgs;

/* The order in which a row's squares are summed depends on n alone. x may be y or sum. */
LLMC_API int32_t llmc_rms_norm(const LlmcRmsNormArgs* args);

#endif
