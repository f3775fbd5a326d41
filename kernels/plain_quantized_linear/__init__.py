"""plain_quantized_linear: schema, reference, fake rule, and how a matrix is brought into its form."""

from .reference import SCHEMA, dequantize_plain, plain_quantized_linear_fake, plain_quantized_linear_reference, quantize_plain

reference, fake = plain_quantized_linear_reference, plain_quantized_linear_fake

__all__ = [
    "SCHEMA",
    "dequantize_plain",
    "fake",
    "plain_quantized_linear_fake",
    "plain_quantized_linear_reference",
    "quantize_plain",
    "reference",
]
