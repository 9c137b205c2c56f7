"""The frozen base as a run gets it: loaded, checked, with special tokens that fit its tokenizer, and with wrapped layers."""

import functools
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import register_fsdp_forward_method
from torch.utils.checkpoint import checkpoint
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from prefix_tuning import bundled
from prefix_tuning.base_model.sharding import load_sharded
from prefix_tuning.distributed import note
from prefix_tuning.errors import UserError, reason_of
from prefix_tuning.files.names import ADAPTER_CONFIG_FILE
from prefix_tuning.model.batch import Batch
from prefix_tuning.model.bloom import Bloom, PackedModel
from prefix_tuning.model.decoder import FAMILIES, as_packed, layers_of, packed_attention


def load_base(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    parts: int | None = None,
    gradient_checkpointing: bool = False,
    torch_compile: bool = False,
) -> tuple[PackedModel, PreTrainedTokenizerBase]:
    """Loads a base and its tokenizer by bundled name, hub name or path, and freezes the base.

    parts: number of processes that share one copy of the weights, each with its own part (sharding.py); None: this process
    loads all of them. The two flags are those of `wrap_layers`.

    Returns the model in `dtype` on `device`, in eval mode, with requires_grad False for every parameter; and the tokenizer,
    which pads on the left, with EOS if it has no PAD. In the model's generation_config, the tokenizer's EOS ends an answer.

    An adapter in the model's folder is ignored, and a line on stderr says so. No code that comes with a model is run:
    trust_remote_code is off, and transformers reads pickled weights with torch.load's weights_only.

    Raises UserError if there is no such model, if it is broken or of a family that model/ does not know, if its config.json
    or a flag asks for something that model/ does not compute, or if its tokenizer does not fit it.
    """
    path = bundled.resolve(name)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        _check_forward(name, config)
        tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", trust_remote_code=False)
        _check_tokenizer(name, tokenizer, config.vocab_size)
        model = load_sharded(path, config, dtype, device, parts) if parts else _load_whole(name, path, config, dtype, device)
    except UserError:
        raise
    except Exception as error:  # transformers and tokenizers raise many classes for broken files
        raise UserError(f"--model_name_or_path {name} cannot be loaded: {str(error).strip()[:300]}") from error
    if _has_file(path, ADAPTER_CONFIG_FILE):
        hint = "merge it into the weights if it belongs to them"
        note(f"{name}: the adapter beside its weights ({ADAPTER_CONFIG_FILE}) is ignored; {hint}")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is masked, so any token will do
    align_special_tokens(model.generation_config, tokenizer, name)
    wrap_layers(model, gradient_checkpointing, torch_compile)
    return model, tokenizer


def _check_forward(name: str, config: PreTrainedConfig) -> None:
    """Raises UserError for a family or a setting with which the packed forward would compute something else than
    transformers' own.
    """
    family, is_bloom = config.model_type, config.model_type == "bloom"
    if not (is_bloom or family in FAMILIES):
        known = ", ".join(["bloom", *sorted(FAMILIES)])
        raise UserError(f"--model_name_or_path {name} is a {family} model; this program tunes {known}")
    if not is_bloom and getattr(config, "quantization_config", None):
        raise UserError(f"--model_name_or_path {name}: its weights are quantised, which is tested for Bloom alone")
    if is_bloom and config.slow_but_exact and config.pretraining_tp > 1:
        fault = 'slow_but_exact, with which transformers leaves out two biases of every layer; set "slow_but_exact": false'
    elif not getattr(config, "is_causal", True):
        fault = 'attention to later tokens; set "is_causal": true'
    else:
        return
    raise UserError(f"--model_name_or_path {name}: its config.json asks for {fault}")


def _check_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raises UserError unless this tokenizer can be used with a base that has embeddings for `vocab_size` tokens."""
    if not tokenizer.is_fast:
        fault = "has no tokenizer.json; save it in that form"
    elif tokenizer.eos_token_id is None:
        fault = "has no EOS token, with which every answer ends; name one as eos_token in tokenizer_config.json"
    elif (tokens := max(_ids_in_texts(tokenizer)) + 1) > vocab_size:
        fault = f"has {tokens} tokens, but the base has embeddings for {vocab_size}; use the one that belongs to it"
    else:
        return
    raise UserError(f"--model_name_or_path {name}: its tokenizer {fault}")


def _ids_in_texts(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that a row or a question can have: all but the special ones that nothing adds to a text.

    Gemma 3's tokenizer, for example, has a token for an image, and its text models have no embedding for it. Text that looks
    like a special token is tokenised as text (data/rows.py).
    """
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    added = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}
    return set(tokenizer.get_vocab().values()) - special | added


def _load_whole(name: str, path: str, config: PreTrainedConfig, dtype: torch.dtype, device: torch.device) -> PackedModel:
    """The frozen model, read by transformers."""
    # If PEFT is installed, transformers attaches an adapter that it finds beside the weights. The base must not depend on
    # what is installed, so transformers is told to look for adapters in a folder that no base has.
    nowhere = {"subfolder": "no-adapter"}
    family: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with _without_adapter(path) as folder:
        loaded: Any = family.from_pretrained(folder, dtype=dtype, output_loading_info=True, adapter_kwargs=nowhere)
    model, report = loaded
    model.name_or_path = path
    safetensors = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    if not any(_has_file(path, file, local_files_only=True) for file in safetensors):
        note(f"{name}: its weights are a pickled .bin file; safetensors is the safer format")
    if missing := sorted(report["missing_keys"]):
        raise UserError(f"--model_name_or_path {name} lacks {len(missing)} of its weights, such as {missing[0]}")
    return as_packed(model.requires_grad_(False).eval().to(device))


@contextmanager
def _without_adapter(path: str) -> Iterator[str]:
    """A folder that has all files of a base's folder but its adapter, or the path itself if it has none.

    Earlier releases of transformers, such as 5.17, look for an adapter in a local folder whatever the subfolder is.
    """
    if not Path(path, ADAPTER_CONFIG_FILE).exists():
        yield path
        return
    with tempfile.TemporaryDirectory() as view:
        for file in Path(path).absolute().iterdir():
            if file.name != ADAPTER_CONFIG_FILE:
                Path(view, file.name).symlink_to(file)
        yield view


def _has_file(path: str, file: str, local_files_only: bool = False) -> bool:
    """Whether a file lies beside a model's weights: in its folder, in the hub's local cache, or else on the hub."""
    quietly = ("gated_repo", "missing_entries", "connection_errors")
    options: Any = {f"_raise_exceptions_for_{kind}": False for kind in quietly}
    return cached_file(path, file, local_files_only=local_files_only, **options) is not None


# --- special tokens: which of them end an answer, and which one pads ---
#
# Training ends every answer with the tokenizer's EOS (data/rows.py), but `generate` waits for the end tokens that the
# base's generation_config names. If these were others, a prefix would learn to say one token while `generate` waits for
# another, and no answer would end.


def align_special_tokens(settings: GenerationConfig, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Makes the tokenizer's EOS end answers, and pads with its PAD, or with EOS if there is no PAD at all.

    name: of the base, for the line on stderr.
    """
    if tokenizer.eos_token_id is not None:
        add_end(settings, tokenizer.eos_token_id, f"{name}: its tokenizer")
    if tokenizer.pad_token_id is not None:
        settings.pad_token_id = tokenizer.pad_token_id
    elif settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.eos_token_id


def add_end(settings: GenerationConfig, token_id: int, whose: str) -> None:
    """Makes a token end answers. If only other tokens did so far, a line on stderr says that now all of them do.

    whose: what ends its texts with that token, for the line.
    """
    ends = ends_of(settings)
    if token_id in ends:
        return
    if ends:
        others = ", ".join(map(str, ends))
        note(f"{whose} ends a text with token {token_id}, the base's generation_config with {others}: each ends an answer")
    settings.eos_token_id = [token_id, *ends] if ends else token_id


def ends_of(settings: GenerationConfig) -> list[int]:
    """The ids of the tokens that end an answer."""
    ends = settings.eos_token_id
    return [ends] if isinstance(ends, int) else list(ends or [])


# --- what wraps a layer: compilation, gradient checkpointing, the gathering of sharded weights ---


def wrap_layers(model: PackedModel, gradient_checkpointing: bool, torch_compile: bool) -> None:
    """Wraps in each layer the method that the packed forward calls, in place. Call it once; a sharded Bloom always needs it.

    gradient_checkpointing keeps only a layer's input for the backward pass and computes the layer again there: the same
    bits, less memory, a third more work. torch_compile fuses the operations between the matmuls.
    """
    method = "forward_packed" if isinstance(model, Bloom) else "forward"
    for layer in layers_of(model):
        # From the inside out: checkpointing runs the compiled layer again, and both passes need the gathered weights.
        if torch_compile:
            setattr(layer, method, _compiled_for_training(getattr(layer, method)))
        if gradient_checkpointing:
            again = functools.partial(
                checkpoint,
                getattr(layer, method),
                use_reentrant=False,
                preserve_rng_state=False,
                context_fn=functools.partial(_contexts, model.config),
            )
            setattr(layer, method, again)
        # A sharded layer gathers its weights for `forward` by itself. Where it is not sharded, this is a no-op.
        if method != "forward":
            register_fsdp_forward_method(layer, method)


def _contexts(config: PreTrainedConfig) -> tuple[AbstractContextManager, AbstractContextManager]:
    """Where a layer runs at first, and where it runs again in the backward pass, when `packed_hidden` has long returned."""
    return nullcontext(), packed_attention(config)


def _compiled_for_training(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A layer's `forward`, compiled once for all lengths. Without gradients, as in evaluation, it runs uncompiled, because
    torch would compile it a second time for that.
    """
    own, layer = forward.__func__, forward.__self__  # type: ignore[attr-defined]
    return functools.partial(_run_compiled, torch.compile(own, dynamic=True), own, layer)


def _run_compiled(compiled: Callable, plain: Callable, layer: nn.Module, *inputs: Any, **options: Any) -> torch.Tensor:
    return (compiled if torch.is_grad_enabled() else plain)(layer, *inputs, **options)


def compile_now(model: PackedModel, batches: Iterable[Batch], prefix: torch.Tensor) -> float:
    """Makes wrapped layers compile by computing gradients, which are thrown away. Returns the seconds it took.

    prefix: (layers, 2, heads, tokens, head_dim). Raises UserError if torch finds no working compiler.
    """
    started = time.perf_counter()
    leaf = prefix.clone().requires_grad_()
    try:
        for batch in batches:
            model.label_losses(batch.to(model.device), leaf).sum().backward()
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise UserError(f"--torch_compile does not work here: {reason_of(error)}; leave the flag out") from error
    return time.perf_counter() - started
