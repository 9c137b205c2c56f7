"""Answers: transformers' own `generate`, with the prefix as past_key_values."""

import torch
from transformers import BloomForCausalLM, PreTrainedTokenizerBase, TextStreamer

from prefix_tuning.bloom import fingerprint, load_base, prefix_cache, resolve_device, resolve_dtype
from prefix_tuning.checkpoint import base_of, check_base, load_prefix, portable_name
from prefix_tuning.config import InferConfig, UserError
from prefix_tuning.data import prompt_of


def generate(
    model: BloomForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    prefix: torch.Tensor | None,
    batch_size: int = 64,
    **options,
) -> list[str]:
    """Completes each prompt and returns the completions, without special tokens, in the order of the prompts.

    prefix: (layers, 2, heads, tokens, head_dim), or None for the base alone. options: those of transformers' `generate`,
    e.g. max_new_tokens, do_sample, temperature, streamer (with one prompt).
    """
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))  # similar lengths, little padding
    answers = [""] * len(prompts)
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        texts = [prompts[index] for index in indices]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", split_special_tokens=True)
        input_ids, mask, cache = inputs.input_ids.to(model.device), inputs.attention_mask.to(model.device), None
        if prefix is not None:
            # The prefix stands before the padding; ALiBi counts only attended positions, so nothing shifts.
            mask = torch.cat((mask.new_ones(len(indices), prefix.shape[3]), mask), dim=1)
            cache = prefix_cache(prefix, len(indices), model.dtype)
        output = model.generate(
            input_ids, attention_mask=mask, past_key_values=cache, pad_token_id=tokenizer.pad_token_id, **options
        )
        replies = tokenizer.batch_decode(output[:, input_ids.shape[1] :], skip_special_tokens=True)
        for index, reply in zip(indices, replies, strict=True):
            answers[index] = reply
    return answers


def answer(config: InferConfig, question: str) -> None:
    """Streams the answer to one question to stdout, by the frozen base as well if `config.compare`."""
    device = resolve_device(config.device)
    prefix, noted = load_prefix(config.prefix)
    base_name = config.model_name_or_path or base_of(config.prefix, noted["name_or_path"])
    model, tokenizer = load_base(base_name, resolve_dtype(config.precision, device), device)
    base = {"name_or_path": portable_name(base_name), **fingerprint(model, tokenizer)}
    check_base(prefix.shape, noted, base, config.prefix, config.force)
    prompt = prompt_of(question)
    prompt_length = len(tokenizer(prompt, split_special_tokens=True).input_ids)
    if config.max_length and config.max_length <= prompt_length:
        raise UserError(f"--max_length {config.max_length} leaves no room for an answer; the question takes {prompt_length}")
    options = {"max_length": config.max_length} if config.max_length else {"max_new_tokens": config.max_new_tokens or 128}
    if config.do_sample:
        options |= {"temperature": config.temperature, "top_p": config.top_p, "top_k": config.top_k}
    for title, used in (("frozen base", None), ("with prefix", prefix.to(device))):
        if used is None and not config.compare:
            continue
        if config.compare:
            print(f"{title:12s} ", end="", flush=True)
        torch.manual_seed(config.seed)
        streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        generate(model, tokenizer, [prompt], used, do_sample=config.do_sample, streamer=streamer, **options)
