"""The bf16 units of x86 CPUs, and whether attention uses them."""

import os

import torch

# oneDNN multiplies torch's matrices on x86 CPUs. If an environment variable limits it to one of these instruction sets, it
# does not use bf16 units.
OLDER_THAN_BF16 = ("SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX512_CORE", "AVX512_CORE_VNNI")
OLDER_THAN_AMX = (*OLDER_THAN_BF16, "AVX512_CORE_BF16", "AVX10_1_512", "AVX512_CORE_FP16")


def bf16_units() -> str | None:
    """What multiplies bfloat16 matrices: amx (about 8 times as fast as float32), avx512 (2 times), or None: neither."""
    limit = (os.environ.get("ONEDNN_MAX_CPU_ISA") or os.environ.get("DNNL_MAX_CPU_ISA") or "").upper()
    found = torch.cpu.get_capabilities()
    if found.get("amx_bf16") and limit not in OLDER_THAN_AMX:
        return "amx"
    if (found.get("avx512_bf16") or found.get("amx_bf16")) and limit not in OLDER_THAN_BF16:
        return "avx512"
    return None


def attends_in_bf16(head_dim: int) -> bool:
    """Whether a base in bf16 computes attention row by row in bf16 on this CPU (model/attention.py), or in float32.

    Milliseconds for one row in one layer, forward + backward, on 2 cores:

        heads x head_dim, tokens      AVX512: float32    bf16             AMX: float32    bf16
        8 x 32, 77                    0.10 + 0.20        0.14 + 0.34      0.15 + 0.29     0.12 + 0.19
        8 x 32, 256                   0.65 + 1.25        0.76 + 1.56      0.61 + 1.21     0.39 + 0.54
        16 x 64, 77                   0.31 + 0.60        0.39 + 0.58
        16 x 64, 150                  0.85 + 1.79        0.98 + 1.74      0.70 + 1.77     0.30 + 0.55
        16 x 64, 256                  2.10 + 4.52        2.38 + 3.52      1.78 + 3.71     0.87 + 1.17
        16 x 128, 256                 3.69 + 9.52        3.85 + 5.57      2.66 + 6.16     1.09 + 1.58

    bf16 also saves the way to float32 and back, and keeps half as much for the backward pass.
    """
    units = bf16_units()
    return units == "amx" or (units == "avx512" and head_dim >= 128)
