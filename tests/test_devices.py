import os
from types import SimpleNamespace

import pytest
import torch
from models import examples_of, random_bloom, random_decoder, random_prefix

from prefix_tuning.devices import (
    activation_bytes_per_token,
    describe_dtype,
    is_out_of_memory,
    out_of_memory_explained,
    peak_memory_mb,
    reproducible,
    resolve_device,
    resolve_dtype,
    suggested_max_tokens,
)
from prefix_tuning.errors import UserError
from prefix_tuning.model.batch import pack


def test_device_and_precision():
    cpu = torch.device("cpu")
    assert resolve_dtype("fp32", cpu) == torch.float32
    assert resolve_dtype("bf16", cpu) == torch.bfloat16
    with pytest.raises(UserError, match="fp16 needs CUDA"):
        resolve_dtype("fp16", cpu)
    assert resolve_device("cpu") == cpu
    for name in ("nonsense", "meta"):
        with pytest.raises(UserError, match=f"--device {name}"):
            resolve_device(name)
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device cuda"):
            resolve_device("cuda")


def test_several_processes_take_a_cuda_device_each_and_share_no_other(monkeypatch):
    """Without such devices, the test can only see which of them the error names as missing."""
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("there are such devices here")
    monkeypatch.setenv("LOCAL_RANK", "1")
    for processes in ("1", "2"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert resolve_device("auto") == torch.device("cpu")
        assert resolve_device("cpu") == torch.device("cpu")
        with pytest.raises(UserError, match="--device cuda:1 is not available"):
            resolve_device("cuda")
    with pytest.raises(UserError, match="--device mps cannot be shared"):
        resolve_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto") == torch.device("cpu")
    for variable in ("LOCAL_WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(variable)
    for name in ("auto", "mps"):
        with pytest.raises(UserError, match="--device mps is not available"):
            resolve_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UserError, match="--device cuda:0 is not available"):
        resolve_device("auto")


def test_on_cuda_the_precision_is_what_the_device_has_units_for(monkeypatch):
    cuda = torch.device("cuda")
    for major, dtype in ((7, torch.float16), (8, torch.bfloat16), (9, torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, major=major: SimpleNamespace(major=major))
        assert resolve_dtype("auto", cuda) == dtype
    assert resolve_dtype("fp16", cuda) == torch.float16
    assert resolve_dtype("fp32", cuda) == torch.float32


@pytest.mark.parametrize("units", [{}, {"avx512_bf16": True}, {"amx_bf16": True, "avx512_bf16": False}])
def test_on_a_cpu_bfloat16_is_chosen_where_there_are_units_for_it(monkeypatch, units):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, **units})
    for name in ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    cpu, dtype = torch.device("cpu"), torch.bfloat16 if units else torch.float32
    assert resolve_dtype("auto", cpu) == dtype and resolve_dtype("auto", torch.device("mps")) == torch.float32
    reason = "which has bfloat16 units" if units else "where torch uses no bfloat16 units"
    assert describe_dtype(dtype, "auto", cpu) == f"{dtype} on cpu, {reason}"
    assert describe_dtype(torch.float32, "fp32", cpu) == "torch.float32 on cpu"


def test_tokens_of_a_pass_stay_within_the_memory_meant_for_it():
    model = random_bloom()
    assert activation_bytes_per_token(model) == 10 * 48 * 3 * 4
    assert activation_bytes_per_token(model.bfloat16()) == (6 * 2 + 4 * 4) * 48 * 3  # attention is float32 there
    assert suggested_max_tokens(model, gathers=False) == 1024  # a small model
    model = random_bloom()
    model.config.n_layer = 100
    assert suggested_max_tokens(model, gathers=False) == 640
    # Only the configuration is asked for the number of layers.
    model.config.n_layer = 1000
    held = 10 * 48 * 1000 * 4
    assert suggested_max_tokens(model, gathers=False) == 2**29 // held < 640
    elsewhere = model.to("meta")  # any device but a CPU
    assert suggested_max_tokens(elsewhere, gathers=False) == 2**31 // held > 640
    assert suggested_max_tokens(elsewhere, gathers=True) == 2**33 // held
    model.config.n_layer = 2**30
    assert suggested_max_tokens(elsewhere, gathers=False) == 1


def bytes_kept_per_token(model, length):
    """What autograd keeps of a pass over 2 rows of this length, but for the weights."""
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage, tensor  # alive, so that no other tensor gets its address
        return tensor

    (batch,) = pack(examples_of([length] * 2, vocab_size=99), 10_000)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        losses = model.label_losses(batch, random_prefix(model).requires_grad_())
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found = sum(storage.nbytes() for pointer, (storage, _) in kept.items() if pointer not in weights)
    assert losses.requires_grad
    return found / (2 * length)


@pytest.mark.parametrize("family", ["bloom", "llama", "gemma2", "mixtral"])
def test_the_memory_of_a_pass_is_estimated_to_a_factor_of_one_and_a_half(family):
    """Of models whose parts are as large as in practice, in relation to each other."""
    shape = {"hidden_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24, "intermediate_size": 384}
    model = random_bloom(hidden_size=96, n_head=4) if family == "bloom" else random_decoder(family, **shape)
    for length in (32, 512):
        estimate = activation_bytes_per_token(model, longest=5 + length)
        assert 2 / 3 < bytes_kept_per_token(model, length) / estimate < 1.5


def test_running_out_of_memory_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as cpu:
        torch.empty(2**60)
    assert all(is_out_of_memory(error) for error in (cpu.value, MemoryError(), torch.OutOfMemoryError()))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


def test_running_out_of_memory_is_a_user_error_and_other_errors_are_bugs():
    def inside(error):
        with out_of_memory_explained(torch.device("cpu"), lambda: "lower --batch_size"):
            raise error

    for error in (MemoryError(), torch.OutOfMemoryError(), RuntimeError("can't allocate memory: you tried")):
        with pytest.raises(UserError, match="cpu ran out of memory; lower --batch_size"):
            inside(error)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        inside(RuntimeError("shapes do not match"))


def test_the_peak_of_memory_is_in_mebibytes(monkeypatch):
    # 128 MiB. In kibibytes the peak would be a number above 2**17.
    torch.ones(2**25)
    assert 128 < peak_memory_mb(torch.device("cpu")) < 2**17
    assert isinstance(peak_memory_mb(torch.device("cpu")), int)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 3 * 2**20 + 5)
    assert peak_memory_mb(torch.device("cuda")) == 3
    monkeypatch.setattr("sys.platform", "win32")
    assert peak_memory_mb(torch.device("cpu")) is None


def test_only_cuda_is_told_to_repeat_itself_and_only_inside(monkeypatch):
    def state():
        fill = torch.utils.deterministic.fill_uninitialized_memory
        return torch.get_deterministic_debug_mode(), fill, os.environ.get("CUBLAS_WORKSPACE_CONFIG")

    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = state()
    with reproducible(torch.device("cpu")):
        assert state() == before
    with pytest.raises(KeyError), reproducible(torch.device("cuda")):
        # 2: what has no deterministic kernel is an error.
        assert state() == (2, False, ":4096:8")
        raise KeyError
    assert state() == (*before[:2], ":4096:8")
    # What the process itself has set stays.
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with reproducible(torch.device("cuda")):
        assert state()[2] == ":16:8"
