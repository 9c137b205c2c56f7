import pytest
import torch
from conftest import prefix_config, random_bloom
from peft import PeftModel

from prefix_tuning import demo
from prefix_tuning.checkpoint import save_adapter
from prefix_tuning.data import prompt_of
from prefix_tuning.encoder import PrefixEncoder
from prefix_tuning.generation import generate

QUESTIONS = ["法国的首都是哪里？", "3加5等于多少？", "请把“苹果”翻译成英文，谢谢！", "？"]
PROMPTS = [prompt_of(question) for question in QUESTIONS]


@pytest.mark.parametrize("projection", [True, False])
def test_greedy_text_equals_pefts_for_the_saved_prefix(tmp_path, tokenizer, projection):
    model = random_bloom()
    torch.manual_seed(1)
    encoder = PrefixEncoder(prefix_config(model, projection=projection))
    save_adapter(tmp_path, encoder.bake(), encoder.config, {"name_or_path": demo.MODEL})
    ours = generate(model, tokenizer, PROMPTS, encoder.bake(), max_new_tokens=12, do_sample=False)
    theirs = PeftModel.from_pretrained(model, tmp_path).eval()
    for prompt, answer in zip(PROMPTS, ours, strict=True):
        inputs = tokenizer(prompt, return_tensors="pt")
        output = theirs.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=3)
        assert tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True) == answer


@pytest.mark.parametrize("with_prefix", [True, False])
def test_a_batch_answers_as_each_row_alone(tokenizer, with_prefix):
    model = random_bloom()
    torch.manual_seed(1)
    prefix = PrefixEncoder(prefix_config(model)).bake() if with_prefix else None
    options = {"max_new_tokens": 12, "do_sample": False}
    together = generate(model, tokenizer, PROMPTS, prefix, batch_size=3, **options)
    assert together == [generate(model, tokenizer, [prompt], prefix, **options)[0] for prompt in PROMPTS]


def test_greedy_text_equals_stepping_the_model_by_hand(tokenizer):
    """The plainest twin: the whole row again for each token, the prefix's pairs computed anew."""
    from prefix_tuning.bloom import prefix_cache

    model = random_bloom()
    torch.manual_seed(1)
    prefix = PrefixEncoder(prefix_config(model)).bake()
    ids = tokenizer(PROMPTS[0]).input_ids
    start = len(ids)
    for _ in range(12):
        mask = torch.ones(1, prefix.shape[3] + len(ids), dtype=torch.long)
        cache = prefix_cache([prefix.to(model.dtype)])[0]
        ids.append(model(torch.tensor([ids]), past_key_values=cache, attention_mask=mask).logits[0, -1].argmax().item())
        if ids[-1] == tokenizer.eos_token_id:
            break
    expected = tokenizer.decode(ids[start:], skip_special_tokens=True)
    assert generate(model, tokenizer, PROMPTS[:1], prefix, max_new_tokens=12, do_sample=False) == [expected]
