"""The format version: the number that says how to read an artifact.

History, one dated line per version:
    1  2026-11  first format: manifest.json, images by hash, packed weights hashed per chunk, tokenizer files, detached signature.
    2  2026-11  recipe ops quantize and quantize_scales; manifest field quantization (absent in version 1, which reads as
                null); a source may name its shape, for weights that are bound when served.
    3  2026-11  programs for a GPU: executor "plans" and entries[].plans, images of role "cubin", target.gpu, requirements.cuda
                (absent before, which reads as none).
                images of role "tensor_runtime", in place of "aoti_shim" where a program needs no libtorch (requirements.torch null).
                manifest field pooling, for artifacts that embed (absent before, which reads as null: they generate).
                entries[].sampling, plans that sample (absent before, which reads as none).
                manifest field kv_quantization and kv.dtype int8 and uint8, for caches of eight bits (absent before, which reads as null).
                manifest field tensor_parallel_size and entries step.rank<i> (absent before, which reads as 1).
                manifest field lora and inputs lora_slots and lora_pool (absent before, which reads as null).
                executor "tvm" and requirements.tvm (absent before, which reads as none).
                recipe op dequantize, for checkpoints that are quantised already.
                recipe op in_rows, for quantised weights of a GPU.
                dtype float8_e4m3fn and recipe ops quantize_fp8 and quantize_fp8_scales; quantization.scheme fp8, whose group is 0.
                tokenizer.reply_formats, a file (absent before, which reads as null: from the chat template).
                canaries[].close_token_ids, tokens as good as the expected one (absent before, which reads as null).
                quantization.calibration, for integers that were fitted to a text (absent before, which reads as null).
"""

from __future__ import annotations

FORMAT_VERSION = 3  # what this llmc writes
OLDEST_READABLE = 1  # what it still reads
