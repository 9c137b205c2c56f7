"""The special tokens of a base and of its tokenizer: which of them end an answer, and which one pads.

Training ends every answer with the tokenizer's EOS (data/rows.py), and `generate` waits for the ends that the base's
generation_config names. Where the two differ, a prefix learns to say the one while `generate` waits for the other, and no
answer ends.
"""

from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from prefix_tuning.distributed import note


def ends_of(settings: GenerationConfig) -> list[int]:
    """The ids of the tokens that end an answer."""
    ends = settings.eos_token_id
    return [ends] if isinstance(ends, int) else list(ends or [])


def align_special_tokens(settings: GenerationConfig, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Makes the tokenizer's EOS one of the ends, and its PAD (else its EOS) what pads. name: of the base, for the line."""
    if tokenizer.eos_token_id is not None:
        add_end(settings, tokenizer.eos_token_id, f"{name}: its tokenizer")
    if tokenizer.pad_token_id is not None:
        settings.pad_token_id = tokenizer.pad_token_id
    elif settings.pad_token_id is None:
        settings.pad_token_id = tokenizer.eos_token_id


def add_end(settings: GenerationConfig, token_id: int, whose: str) -> None:
    """Makes a token one of the ends. If there are only others, a line on stderr says that all of them are ends.

    whose: what ends its texts with that token, for the line.
    """
    ends = ends_of(settings)
    if token_id in ends:
        return
    if ends:
        others = ", ".join(map(str, ends))
        note(f"{whose} ends a text with token {token_id}, the base's generation_config with {others}: each ends an answer")
    settings.eos_token_id = [token_id, *ends] if ends else token_id


def recorded_end(fingerprint: dict[str, Any]) -> int | None:
    """The EOS of the tokenizer that a prefix was trained with, by the fingerprint in its file; None if that names none."""
    special_tokens = fingerprint.get("special_tokens")
    eos = special_tokens.get("eos") if isinstance(special_tokens, dict) else None
    return eos if type(eos) is int else None
