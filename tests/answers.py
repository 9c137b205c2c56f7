"""Questions, and answers by infer.py, by `generate` and by plain forwards."""

import re

import pytest
import torch
from transformers.generation.streamers import BaseStreamer

from prefix_tuning.cli import parse_infer_config
from prefix_tuning.data.templates import prompt_of
from prefix_tuning.errors import UserError
from prefix_tuning.generation import batches
from prefix_tuning.inference.run import infer
from prefix_tuning.model.bloom import prefix_cache

QUESTIONS = ["法国的首都是哪里？", "3加5等于多少？", "请把“苹果”翻译成英文，谢谢！", "？"]
PROMPTS = [prompt_of(question) for question in QUESTIONS]
GREEDY = {"max_new_tokens": 12, "do_sample": False}


def complete(model, tokenizer, prompts, *arguments, **options):
    """`batches.complete` of texts."""
    ids = tokenizer(list(prompts), split_special_tokens=True).input_ids if prompts else []
    return batches.complete(model, tokenizer, ids, *arguments, **options)


def logits_after(base, prefix, ids):
    mask = torch.ones(1, prefix.shape[3] + len(ids), dtype=torch.long)
    return base(torch.tensor([ids]), prefix_cache([prefix])[0], mask).logits[0, -1]


@torch.no_grad()
def decode(tokenizer, prompt, logits_of, max_new_tokens=GREEDY["max_new_tokens"]):
    """The greedy answer by forward passes over the whole text, each anew. logits_of: takes ids (1, T)."""
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    start = ids.shape[1]
    while ids.shape[1] < start + max_new_tokens and ids[0, -1] != tokenizer.eos_token_id:
        ids = torch.cat((ids, logits_of(ids)[:, -1:].argmax(-1)), dim=1)
    return tokenizer.decode(ids[0, start:], skip_special_tokens=True)


class Heard(BaseStreamer):
    """A streamer that keeps the ids of each piece."""

    def __init__(self):
        self.ids = []

    def put(self, value):
        self.ids.append(value.flatten())

    def end(self):
        pass


FRANCE = "法国的首都是哪里？"


def run_infer(*flags):
    infer(parse_infer_config([str(flag) for flag in flags]))


def refuses(message, *flags):
    with pytest.raises(UserError, match=re.escape(message)):
        run_infer(*flags)
