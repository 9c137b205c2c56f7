"""PrefixBloom around other families than Bloom: every answer equals the one that plain forwards give its row alone."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from answers import Heard
from models import peft_model, random_decoder
from transformers import AutoModelForCausalLM, FalconConfig, GenerationConfig, pipeline

from prefix_tuning import PrefixBloom, load_prefix
from prefix_tuning.generation.batches import complete
from prefix_tuning.generation.cache import CACHE
from prefix_tuning.generation.sampling import row_draws
from prefix_tuning.model.bloom import empty_prefix, prefix_cache
from prefix_tuning.model.decoder import sliding_window
from prefix_tuning.model.encoder import PrefixConfig, PrefixEncoder, key_value_shape

# Rotation of all or some numbers of a head, soft caps with sliding windows, sinks. The windows are 64 tokens.
FAMILIES = ["llama", "qwen3", "gpt_neox", "gemma2", "gpt_oss"]
ROWS = [[5, 6, 7, 8, 9, 10, 11], [20, 21], [30, 31, 32, 33]]
NAMES = ["five", "nine", "base"]
NEW = 6


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    window = {"sliding_window": 64} if request.param in ("gemma2", "gpt_oss") else {"use_sliding_window": False}
    model = PrefixBloom(random_decoder(request.param, **window))
    layers, heads, head_dim = key_value_shape(model.config)
    for name, tokens in (("five", 5), ("nine", 9)):
        torch.manual_seed(tokens)
        model.attach(name, 3 * torch.randn(layers, 2, heads, tokens, head_dim))
    model.generation_config.eos_token_id = None
    return model


def logits_alone(model, ids, name):
    """transformers' own forward of one row, after a prefix of exactly its length."""
    prefix = model.prefixes.get(name, empty_prefix(model.config))
    plain = super(PrefixBloom, model).forward
    return plain(input_ids=torch.tensor([ids]), **{CACHE: prefix_cache([prefix])[0]}).logits[0]


def greedy_alone(model, ids, name):
    for _ in range(NEW):
        ids = [*ids, logits_alone(model, ids, name)[-1].argmax().item()]
    return ids


def padded(rows):
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def test_forward_of_a_batch_equals_each_row_alone(model):
    logits = model(**padded(ROWS), prefix_name=NAMES).logits
    for row, name, found in zip(ROWS, NAMES, logits, strict=True):
        torch.testing.assert_close(found[-len(row) :], logits_alone(model, row, name), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static", "disable_compile": True}])
def test_greedy_answers_equal_those_of_each_row_alone(model, options):
    expected = [greedy_alone(model, row, name)[-NEW:] for row, name in zip(ROWS, NAMES, strict=True)]
    assert len(set(map(tuple, expected))) == len(expected)  # the prefixes do show
    found = model.generate(**padded(ROWS), prefix_name=NAMES, max_new_tokens=NEW, do_sample=False, **options)
    assert found[:, -NEW:].tolist() == expected


@torch.no_grad()
def test_sampled_answers_are_drawn_from_the_logits_of_each_row_alone_and_streamed(model):
    sampling = {"do_sample": True, "temperature": 2.0, "top_k": 0, "max_new_tokens": NEW}
    keys, alone = [(7, number) for number in range(len(ROWS))], []
    for key, row, name in zip(keys, ROWS, NAMES, strict=True):
        ids = list(row)
        for step in range(NEW):
            with row_draws(GenerationConfig(do_sample=True), [key], step):
                probabilities = (logits_alone(model, ids, name)[-1:] / 2.0).softmax(-1)
                ids.append(torch.multinomial(probabilities, num_samples=1).item())
        alone.append(ids)
        heard = Heard()
        with row_draws(GenerationConfig(do_sample=True), [key]):
            model.generate(torch.tensor([row]), prefix_name=name, streamer=heard, **sampling)
        assert torch.cat(heard.ids).tolist() == ids and len(heard.ids) == 1 + NEW
    with row_draws(GenerationConfig(do_sample=True), keys):
        found = model.generate(**padded(ROWS), prefix_name=NAMES, **sampling)
    assert found[:, -NEW:].tolist() == [ids[-NEW:] for ids in alone]
    assert alone[0] != greedy_alone(model, ROWS[0], NAMES[0])


@torch.no_grad()
def test_beams_and_continued_caches_equal_each_row_alone(model):
    options = {"max_new_tokens": NEW, "do_sample": False, "num_beams": 3}
    found = model.generate(**padded(ROWS), prefix_name=NAMES, **options)[:, -NEW:]
    for row, name, answer in zip(ROWS, NAMES, found, strict=True):
        assert model.generate(torch.tensor([row]), prefix_name=name, **options)[0, -NEW:].tolist() == answer.tolist()
    # A cache of an earlier call, and the whole text so far.
    inputs = padded(ROWS)
    first = model.generate(**inputs, prefix_name=NAMES, max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    cache = first.cache if CACHE == "cache" else first.past_key_values
    mask = F.pad(inputs["attention_mask"], (0, 3), value=1)
    rest = model.generate(first.sequences, attention_mask=mask, max_new_tokens=NEW - 3, do_sample=False, **{CACHE: cache})
    whole = model.generate(**inputs, prefix_name=NAMES, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(rest, whole)


@torch.no_grad()
def test_a_copy_and_a_pickle_answer_the_same(model):
    asked = {**padded(ROWS[:1]), "prefix_name": "nine", "max_new_tokens": NEW, "do_sample": False}
    expected = model.generate(**asked)
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(again.generate(**asked), expected)


@torch.no_grad()
def test_rows_that_outgrow_a_sliding_window_are_answered_as_alone(tokenizer):
    """Layers with a window count the padding between prefix and text."""
    model = PrefixBloom(random_decoder("mistral", vocab_size=4096, eos_token_id=4095))
    torch.manual_seed(0)
    model.attach("five", 3 * torch.randn(3, 2, 2, 5, 12))
    model.generation_config.eos_token_id = None
    assert sliding_window(model.config) == 8
    outgrown = pytest.raises(ValueError, match="outgrow the model's window of 8 tokens")
    with outgrown:
        model.generate(**padded(ROWS), max_new_tokens=NEW)
    with outgrown:
        model(**padded(ROWS))
    short = padded([row[:3] for row in ROWS])
    cache = model(**short, use_cache=True)[CACHE]  # 5 + 3 tokens fit
    with outgrown:
        model(torch.tensor([[40]] * 3), attention_mask=F.pad(short["attention_mask"], (0, 1), value=1), **{CACHE: cache})
    options = {"max_new_tokens": NEW, "do_sample": False}
    alone = [greedy_alone(model, row, "five") for row in ROWS]
    expected = [tokenizer.decode(ids[-NEW:], skip_special_tokens=True) for ids in alone]
    assert complete(model, tokenizer, ROWS, "five", **options) == expected
    options |= {"cache_implementation": "static", "disable_compile": True}
    assert model.generate(torch.tensor(ROWS[:1]), **options)[0].tolist() == alone[0]


@torch.no_grad()
def test_a_batch_that_shrinks_gives_the_answers_of_each_row_alone(tokenizer):
    """Rows that have ended leave the batch, and the others go on from their part of the cache."""
    model = PrefixBloom(random_decoder("qwen3", vocab_size=4096, use_sliding_window=False, eos_token_id=None))
    for name, tokens in (("five", 5), ("nine", 9)):
        torch.manual_seed(tokens)
        model.attach(name, 3 * torch.randn(3, 2, 2, tokens, 12))
    rows = [[10 * row + token for token in range(2 + row % 4)] for row in range(1, 10)]
    names = [NAMES[row % 3] for row in range(9)]
    alone = [greedy_alone(model, *asked)[-NEW:] for asked in zip(rows, names, strict=True)]
    ends = model.generation_config.eos_token_id = sorted({answer[1] for answer in alone[:6]})
    cut = [answer[: 1 + next((at for at, token in enumerate(answer) if token in ends), NEW)] for answer in alone]
    assert min(map(len, cut)) < max(map(len, cut)) == NEW
    expected = [tokenizer.decode(answer, skip_special_tokens=True) for answer in cut]
    assert complete(model, tokenizer, rows, names, max_new_tokens=NEW, do_sample=False) == expected


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "gemma"])
def test_an_adapter_of_peft_gives_the_same_logits_here_and_there(family, tmp_path):
    base = random_decoder(family, use_sliding_window=False, **({"sliding_window": None} if family == "mistral" else {}))
    theirs = peft_model(copy.deepcopy(base), PrefixEncoder(PrefixConfig.of(base.config, 5)))
    theirs.save_pretrained(tmp_path)
    model = PrefixBloom(base)
    model.attach("theirs", load_prefix(tmp_path))
    ids = torch.tensor(ROWS[:1])
    torch.testing.assert_close(model(ids).logits, theirs(ids).logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(ids, prefix_name="base").logits, theirs(ids).logits, atol=1e-3)


def test_a_pipeline_takes_it(tokenizer, capfd):
    model = PrefixBloom(random_decoder("llama", vocab_size=4096))
    model.attach("five", 3 * torch.randn(3, 2, 2, 5, 12))
    asked = pipeline("text-generation", model=model, tokenizer=tokenizer)
    (found,) = asked("考试", max_new_tokens=NEW, do_sample=False, return_tensors=True)
    ids = tokenizer("考试").input_ids
    assert found["generated_token_ids"] == greedy_alone(model, ids, "five")
    assert "not supported" not in capfd.readouterr().err


def test_other_models_are_refused():
    with pytest.raises(TypeError, match="not FalconForCausalLM"):
        PrefixBloom(
            AutoModelForCausalLM.from_config(FalconConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
        )
