import pytest
import torch

from prefix_tuning.devices import resolve_dtype
from prefix_tuning.model.cpu import attends_in_bf16, bf16_units

LIMITS = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")


@pytest.fixture
def limit(monkeypatch):
    """Sets neither of the two variables."""
    for name in LIMITS:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch.setenv


@pytest.mark.parametrize(
    "found, units, head_dims",
    [
        ({"avx2": True}, None, []),
        ({"avx512_bf16": True}, "avx512", [128]),
        ({"avx512_bf16": True, "amx_bf16": True}, "amx", [32, 64, 128]),
        ({"amx_bf16": True, "avx512_bf16": False}, "amx", [32, 64, 128]),
    ],
)
def test_attention_is_in_bf16_where_the_units_make_it_faster(monkeypatch, limit, found, units, head_dims):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert bf16_units() == units
    assert [head_dim for head_dim in (32, 64, 128) if attends_in_bf16(head_dim)] == head_dims


@pytest.mark.parametrize("variable", LIMITS)
@pytest.mark.parametrize(
    "value, units",
    [
        ("AVX2", None),
        ("avx512_core", None),
        ("AVX512_CORE_BF16", "avx512"),
        ("AVX512_CORE_FP16", "avx512"),
        ("AVX512_CORE_AMX", "amx"),
        ("DEFAULT", "amx"),
    ],
)
def test_units_that_onednn_is_told_not_to_use_do_not_count(monkeypatch, limit, variable, value, units):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True, "amx_bf16": True})
    limit(variable, value)
    assert bf16_units() == units
    assert resolve_dtype("auto", torch.device("cpu")) == (torch.bfloat16 if units else torch.float32)
