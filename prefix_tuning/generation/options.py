"""The options of one call of `generate`: they are resolved as in transformers, and here is what follows from them.

Options come from the call itself, from the GenerationConfig that it is given, and from the model's own generation_config.
"""

import copy

import torch
from transformers import GenerationConfig

from prefix_tuning.base_model.loading import ends_of

_DEFAULT_NEW_TOKENS = 20  # transformers' own, where neither max_new_tokens nor max_length is set

_RULED_OUT = ("inputs_embeds", "assistant_model", "prompt_lookup_num_tokens", "guidance_scale", "prefill_chunk_size")

# With these alone, a call of `generate` that continues an earlier one returns what a single call would have returned: they
# depend on the scores of the next token or on the whole text. Without this list, users of other options would get wrong
# answers: min_new_tokens, for example, would be counted anew in each call.
_CONTINUABLE = {
    "do_sample", "temperature", "top_k", "top_p", "top_h", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff",
    "renormalize_logits", "remove_invalid_values", "repetition_penalty", "no_repeat_ngram_size", "bad_words_ids",
    "sequence_bias", "suppress_tokens", "max_new_tokens", "pad_token_id", "bos_token_id", "eos_token_id", "use_cache",
    "return_dict_in_generate", "output_attentions", "output_hidden_states", "output_scores", "output_logits", "tokenizer",
    "transformers_version",
}  # fmt: skip

# These look for tokens in the text so far, and some releases of transformers take padding for text. Each has the value with
# which it has no effect.
_LOOK_FOR_TOKENS = {
    "repetition_penalty": 1, "encoder_repetition_penalty": 1, "no_repeat_ngram_size": 0, "encoder_no_repeat_ngram_size": 0,
}  # fmt: skip

# Without sampling, these have no effect. Each has the value with which it would have none either.
_FOR_SAMPLING = {
    "temperature": 1.0, "top_k": 50, "top_p": 1.0, "typical_p": 1.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
}  # fmt: skip


def resolve_options(own: GenerationConfig, given: GenerationConfig | None, options: dict) -> tuple[GenerationConfig, dict]:
    """The settings of a call: from its `options`, else from the configuration `given` to it, else from the model's `own`.

    Returns a new GenerationConfig, and the options that are no settings. Raises ValueError where the model's own names a
    kind of cache: `generate` would create such a cache beside the one that holds the prefix.
    """
    if own.cache_implementation:
        raise ValueError("give cache_implementation to `generate`, not to the model's generation_config")
    settings, named = copy.deepcopy(given or own), set(options)
    options = settings.update(**options)
    for name, value in vars(own).items():
        if getattr(settings, name, None) is None:
            setattr(settings, name, value)
    if not settings.do_sample:
        # Of what nobody has asked for, `generate` would log that it is ignored.
        for name, neutral in _FOR_SAMPLING.items():
            if name not in named and getattr(given, name, None) is None:
                setattr(settings, name, neutral)
    if settings.guidance_scale == 1:  # it has no effect
        settings.guidance_scale = None
    return settings, options


def check_options(settings: GenerationConfig, options: dict) -> None:
    """Raises ValueError for options that do not work with a prefix. It needs input_ids, and a cache that can hold it."""
    for name in _RULED_OUT:
        if options.get(name) is not None or getattr(settings, name, None) is not None:
            raise ValueError(f"{name} does not go with a prefix")
    if getattr(settings, "is_assistant", None):
        raise ValueError("a PrefixBloom cannot be an assistant_model: give its base, whose drafts serve as well")
    if settings.use_cache is False or settings.cache_implementation not in (None, "dynamic", "static"):
        raise ValueError("a prefix needs a dynamic or a static cache: see use_cache or cache_implementation")


def guess_mask(input_ids: torch.Tensor, settings: GenerationConfig) -> torch.Tensor:
    """The attention mask where none is given, as transformers guesses it: tokens with pad_token_id are padding, unless that
    is an end token too. Takes and returns (rows, tokens), int64.
    """
    pad = settings.pad_token_id
    if pad is None or pad in ends_of(settings):
        return torch.ones_like(input_ids)
    return input_ids.ne(pad).long()


def depends_on_padding(settings: GenerationConfig, pad: int) -> bool:
    """Whether an answer would change if its prompt were padded, with token `pad`, in a batch with longer ones.

    min_length counts padding as text. And where padding is an end token, a penalty on tokens of the text falls on the end of
    the answer too.
    """
    looks = any(getattr(settings, name, None) not in (None, neutral) for name, neutral in _LOOK_FOR_TOKENS.items())
    return bool(settings.min_length) or (looks and pad in ends_of(settings))


def new_tokens(settings: GenerationConfig, tokens: int) -> int:
    """The largest number of new tokens after a text of `tokens`."""
    return settings.max_new_tokens or (settings.max_length or tokens + _DEFAULT_NEW_TOKENS) - tokens


def copies_of_a_row(settings: GenerationConfig) -> int:
    """How often `generate` repeats each row, for beams or for several sequences."""
    return max(settings.num_beams or 1, settings.num_return_sequences or 1)


def is_continuable(settings: GenerationConfig, options: dict) -> bool:
    """Whether several calls of `generate`, each of which continues the one before, return what a single call would."""
    given = {name for name, value in (vars(settings) | options).items() if value is not None and name[0] != "_"}
    given -= {name for name in ("num_beams", "num_return_sequences") if getattr(settings, name) == 1}
    return settings.max_new_tokens is not None and given <= _CONTINUABLE
