import copy
import inspect
import json
import logging
import pickle

import accelerate
import pytest
import torch
import torch.nn.functional as F
from answers import GREEDY, PROMPTS, QUESTIONS, Heard, complete, decode, logits_after
from models import prefix_config, random_bloom, random_prefix
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BloomForCausalLM, DynamicCache, StaticCache, StoppingCriteriaList, TextStreamer, pipeline

from prefix_tuning import PrefixBloom, bundled, load_prefix
from prefix_tuning.base_model.identity import fingerprint
from prefix_tuning.base_model.loading import load_base
from prefix_tuning.errors import UserError
from prefix_tuning.files.prefixes import SavedPrefix, load_encoder, recorded_history, save_adapter
from prefix_tuning.generation.cache import CACHE
from prefix_tuning.model.encoder import PrefixEncoder


def step_by_hand(base, prefix, ids, steps, choose):
    ids, start = list(ids), len(ids)
    while len(ids) < start + steps and ids[-1] != 2:
        ids.append(choose(logits_after(base, prefix, ids), ids))
    return ids[start:]


def penalized(logits, ids, penalty):
    seen = torch.tensor(sorted(set(ids)))
    logits = logits.clone()
    logits[seen] = torch.where(logits[seen] < 0, logits[seen] * penalty, logits[seen] / penalty)
    return logits


def drawn(logits, temperature, top_k, top_p):
    logits = logits / temperature
    logits[logits < logits.topk(top_k).values[-1]] = -torch.inf
    ordered, indices = logits.sort()
    logits[indices[ordered.softmax(0).cumsum(0) <= 1 - top_p]] = -torch.inf
    return torch.multinomial(logits.softmax(0).unsqueeze(0), 1).item()


SAMPLING = {"temperature": 0.8, "top_k": 40, "top_p": 0.9}


@pytest.mark.parametrize(
    "options, choose",
    [
        ({}, lambda logits, ids: logits.argmax().item()),
        ({"cache_implementation": "static"}, lambda logits, ids: logits.argmax().item()),
        ({"repetition_penalty": 1.5}, lambda logits, ids: penalized(logits, ids, 1.5).argmax().item()),
        ({"do_sample": True, **SAMPLING}, lambda logits, ids: drawn(logits, **SAMPLING)),
        (
            {"do_sample": True, "repetition_penalty": 1.2, **SAMPLING},
            lambda logits, ids: drawn(penalized(logits, ids, 1.2), **SAMPLING),
        ),
    ],
    ids=["greedy", "static cache", "repetition penalty", "sampling", "sampling with penalty"],
)
@pytest.mark.parametrize("name", ["five", "base"])
def test_decoding_equals_stepping_the_model_by_hand(base, random_model, tokenizer, name, options, choose):
    prefix = random_model.prefixes.get(name, random_model.prefixes["five"][:, :, :, :0])
    for prompt in PROMPTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        ids = inputs.input_ids[0].tolist()
        torch.manual_seed(7)
        expected = step_by_hand(base, prefix, ids, 12, choose)
        torch.manual_seed(7)
        output = random_model.generate(**inputs, prefix_name=name, pad_token_id=3, **(GREEDY | options))
        assert output[0, len(ids) :].tolist() == expected


def test_beams_equal_a_search_by_hand(base, random_model, tokenizer):
    prefix = random_model.prefixes["nine"]
    for question in QUESTIONS[:2]:
        ids = tokenizer(question).input_ids
        beams = [(0.0, ids)]
        for _ in range(3):
            grown = []
            for score, beam in beams:
                logs = logits_after(base, prefix, beam).log_softmax(0)
                grown += [(score + logs[token].item(), [*beam, token]) for token in logs.topk(8).indices.tolist()]
            beams = sorted(grown, reverse=True)[:4]
        assert all(2 not in beam for _, beam in beams)  # an ended beam would need more care than this search takes
        inputs = {
            "input_ids": torch.tensor([ids]),
            "prefix_name": "nine",
            "max_new_tokens": 3,
            "do_sample": False,
            "num_beams": 4,
        }
        output = random_model.generate(**inputs, num_return_sequences=2, pad_token_id=3)
        assert output.tolist() == [beam for _, beam in beams[:2]]


def test_one_call_takes_a_prefix_for_every_row(tuned_model, tokenizer):
    inputs = tokenizer([PROMPTS[0]] * 3, return_tensors="pt")
    output = tuned_model.generate(**inputs, prefix_name=["short", "sentence", "base"], pad_token_id=3, **GREEDY)
    short, sentence, base = tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    assert short == "巴黎" and "巴黎" in sentence and len(sentence) > 4 and "巴黎" not in base


def test_memory_holds_the_base_once(base):
    weights = {name: tensor.data_ptr() for name, tensor in base.state_dict().items()}
    model = PrefixBloom(base)
    for number in range(5):
        model.attach(str(number), random_prefix(base, seed=number))
    assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == weights
    assert sum(tensor.numel() for tensor in model.prefixes.values()) == 5 * 4 * 2 * 192 * 5


def test_the_users_model_stays_as_it_is(tokenizer):
    base = BloomForCausalLM.from_pretrained(bundled.resolve(bundled.MODEL))
    before = copy.deepcopy(base.state_dict())
    kinds = [type(module) for module in base.modules()]
    inputs = tokenizer("小测验：", return_tensors="pt")
    plain = base.generate(**inputs, pad_token_id=3, **GREEDY)
    model = PrefixBloom(base)
    model.attach("five", random_prefix(base))
    changed = model.generate(**inputs, pad_token_id=3, **GREEDY)
    assert not torch.equal(changed, plain)
    assert torch.equal(base.generate(**inputs, pad_token_id=3, **GREEDY), plain)
    assert [type(module) for module in base.modules()] == kinds and type(base) is BloomForCausalLM
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())
    model.detach("five")
    assert torch.equal(model.generate(**inputs, pad_token_id=3, **GREEDY), plain)
    assert not set(vars(base)) & {"prefixes", "active"}


def test_prefixes_are_attached_used_and_detached_by_name(base):
    model = PrefixBloom(base)
    assert model.active == "base"
    model.attach("a", random_prefix(base))
    model.attach("b", random_prefix(base, seed=2))
    assert model.active == "a"
    model.use("b")
    model.detach("b")
    assert model.active == "base" and list(model.prefixes) == ["a"]
    for action in (model.use, model.detach):
        with pytest.raises(ValueError, match="no prefix 'b'; there are"):
            action("b")
    ids = torch.tensor([[5, 6], [7, 8]])
    with pytest.raises(ValueError, match="3 prefixes are named for 2 rows"):
        model.generate(ids, prefix_name=["a", "a", "base"])
    with pytest.raises(ValueError, match="name of the base"):
        model.attach("base", random_prefix(base))
    with pytest.raises(ValueError, match="use_cache"):
        model.generate(ids, use_cache=False)
    with pytest.raises(UserError, match="a prefix for 3 layers"):
        model.attach("c", random_prefix(base)[:3])


def test_an_attached_prefix_keeps_no_graph(base):
    encoder = PrefixEncoder(prefix_config(base))
    model = PrefixBloom(base)
    model.attach("a", encoder.bake())
    model.attach("b", encoder())
    assert encoder().requires_grad and not any(prefix.requires_grad for prefix in model.prefixes.values())


def test_unknown_names_are_errors_everywhere(base, tokenizer):
    model = PrefixBloom(base)
    model.attach("a", random_prefix(base))
    ids = torch.tensor([[5, 6]])
    _, filled = model.prepend(torch.ones_like(ids), "a")
    for name in ("b", "", ["b"], [None]):
        for ask in (
            lambda name: model.generate(ids, prefix_name=name),
            lambda name: model(ids, prefix_name=name),
            lambda name: model.prepend(torch.ones_like(ids), name),
            lambda name: complete(model, tokenizer, ["？"], prefix_name=name, max_new_tokens=1),
            lambda name: model.use(name),
        ):
            with pytest.raises(ValueError, match="no prefix"):
                ask(name)
    with pytest.raises(ValueError, match="no prefix 'b'"):
        complete(model, tokenizer, [], prefix_name="b", max_new_tokens=1)
    with pytest.raises(ValueError, match="2 prefixes are named for 1 rows"):
        complete(model, tokenizer, ["？"], prefix_name=["a", "a"], max_new_tokens=1)
    for ask in (model, model.generate):
        with pytest.raises(ValueError, match="leave out prefix_name"):
            ask(ids, past_key_values=filled, prefix_name="b")
    for name in (None, ["base"], ["a"]):
        with pytest.raises(ValueError, match="no prefix"):
            model.use(name)
    assert model.active == "a"


NO_PREFIXES = {
    "one axis too few": lambda prefix: prefix[0],
    "one axis too many": lambda prefix: prefix[None],
    "keys alone": lambda prefix: prefix[:, :1],
    "NaN": lambda prefix: prefix.masked_fill(prefix == prefix.max(), torch.nan),
    "infinity": lambda prefix: prefix.masked_fill(prefix == prefix.max(), torch.inf),
    "integers": lambda prefix: prefix.long(),
}


@pytest.mark.parametrize("spoil", NO_PREFIXES.values(), ids=NO_PREFIXES)
def test_what_is_no_prefix_is_not_attached(base, spoil):
    model = PrefixBloom(base)
    with pytest.raises(ValueError, match="a prefix is"):
        model.attach("a", spoil(random_prefix(base)))
    with pytest.raises(TypeError, match="name of a prefix"):
        model.attach(None, random_prefix(base))
    assert model.names == ["base"] and model.active == "base"


def test_a_prefix_of_another_base_is_refused(base, tmp_path, tokenizer):
    model = PrefixBloom(base, tokenizer)
    save_adapter(tmp_path, random_prefix(base), prefix_config(base), fingerprint(random_bloom(), tokenizer))
    with pytest.raises(UserError, match="not the same weights"):
        model.attach("a", load_prefix(str(tmp_path)))
    model.attach("a", load_prefix(str(tmp_path)), force=True)


def test_forward_is_pefts(base, tmp_path, tokenizer):
    prefix = random_prefix(base)
    save_adapter(tmp_path, prefix, prefix_config(base), {"name_or_path": bundled.MODEL})
    model = PrefixBloom(base)
    model.attach("a", prefix)
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    labels = inputs.input_ids.masked_fill(inputs.attention_mask == 0, -100)
    with torch.no_grad():
        ours, alone = model(**inputs, labels=labels), model(**inputs, labels=labels, prefix_name="base")
        plain = base(**inputs, labels=labels)
        theirs = PeftModel.from_pretrained(base, tmp_path).eval()(**inputs, labels=labels)
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-5)
    real = inputs.attention_mask.bool()
    assert torch.allclose(ours.logits[real], theirs.logits[real], atol=1e-4)
    assert torch.allclose(alone.logits[real], plain.logits[real], atol=1e-4)


def test_forward_takes_embeddings_instead_of_ids(random_model):
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with torch.no_grad():
        embeds = random_model.transformer.word_embeddings(ids)
        assert torch.equal(random_model(inputs_embeds=embeds).logits, random_model(ids).logits)


def test_it_continues_from_past_key_values(random_model, tokenizer):
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    whole = random_model.generate(
        **inputs, prefix_name="five", pad_token_id=3, min_new_tokens=8, max_new_tokens=8, do_sample=False
    )
    mask, cache = random_model.prepend(inputs.attention_mask, "five")
    with torch.no_grad():
        first = random_model(inputs.input_ids, cache, mask).logits[:, -1:].argmax(-1)
    assert isinstance(cache, DynamicCache)
    mask = F.pad(mask, (0, 1), value=1)
    rest = random_model.generate(
        first,
        attention_mask=mask,
        past_key_values=cache,
        pad_token_id=3,
        min_new_tokens=7,
        max_new_tokens=7,
        do_sample=False,
    )
    assert torch.equal(torch.cat((inputs.input_ids, rest), dim=1), whole)


def empty_caches(model):
    return [DynamicCache(), DynamicCache(config=model.config), StaticCache(model.config, max_cache_len=64)]


def test_an_empty_cache_gets_the_prefix(tuned_model, tokenizer):
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    for names in ({}, {"prefix_name": "sentence"}, {"prefix_name": "base"}):
        expected = tuned_model.generate(**inputs, **names, **GREEDY)
        with torch.no_grad():
            logits = tuned_model(**inputs, **names).logits
        for cache in empty_caches(tuned_model):
            assert torch.equal(tuned_model.generate(**inputs, past_key_values=cache, **names, **GREEDY), expected)
            if isinstance(cache, StaticCache):
                cache.reset()  # and again it is empty
                if names.get("prefix_name") != "base":
                    assert torch.equal(tuned_model.generate(**inputs, past_key_values=cache, **names, **GREEDY), expected)
        for cache in empty_caches(tuned_model):
            with torch.no_grad():
                assert torch.allclose(tuned_model(**inputs, past_key_values=cache, **names).logits, logits, atol=1e-4)
    beams = GREEDY | {"num_beams": 3}
    with_cache = tuned_model.generate(**inputs, past_key_values=DynamicCache(), **beams)
    assert torch.equal(with_cache, tuned_model.generate(**inputs, **beams))


def test_a_static_cache_needs_room_for_prefix_text_and_answer_alone(random_model):
    ids, options = torch.tensor([[5, 6, 7]]), GREEDY | {"min_new_tokens": 12}
    expected = random_model.generate(ids, **options)
    enough = 5 + 3 + 12 - 1  # the last token is never put into it

    def cache_of(room):
        return StaticCache(random_model.config, max_cache_len=room)

    assert torch.equal(random_model.generate(ids, past_key_values=cache_of(enough), **options), expected)
    for room in (1, enough - 1):
        with pytest.raises(ValueError, match=f"have room for {room} tokens; prefix, text and answer need {enough}"):
            random_model.generate(ids, past_key_values=cache_of(room), **options)
    with torch.no_grad():
        logits = random_model(ids).logits
        for room in (8, 9):  # a pass needs prefix and text
            assert torch.allclose(random_model(ids, past_key_values=cache_of(room)).logits, logits, atol=1e-4)


def test_a_cache_without_a_prefix_is_for_the_base(tuned_model, base, tokenizer):
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    said = base.generate(**inputs, return_dict_in_generate=True, **GREEDY)
    text = torch.cat((said.sequences, tokenizer("\n\n" + PROMPTS[1], return_tensors="pt").input_ids), dim=1)
    new = text[:, said.past_key_values.get_seq_length() :]
    for names in ({}, {"prefix_name": "short"}, {"prefix_name": ["short"]}):
        with pytest.raises(ValueError, match="hold text but no prefix"):
            tuned_model.generate(text, past_key_values=copy.deepcopy(said.past_key_values), **names, **GREEDY)
        with pytest.raises(ValueError, match="hold text but no prefix"):
            tuned_model(new, past_key_values=copy.deepcopy(said.past_key_values), **names)
    with torch.no_grad():
        plain = base(new, past_key_values=copy.deepcopy(said.past_key_values)).logits
        ours = tuned_model(new, past_key_values=copy.deepcopy(said.past_key_values), prefix_name="base").logits
    assert torch.allclose(ours, plain, atol=1e-4)
    options = GREEDY | {"output_logits": True, "return_dict_in_generate": True}
    ours = tuned_model.generate(text, past_key_values=copy.deepcopy(said.past_key_values), prefix_name="base", **options)
    theirs = base.generate(text, past_key_values=said.past_key_values, **options)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert torch.allclose(torch.stack(ours.logits), torch.stack(theirs.logits), atol=1e-4)
    cache, beams = DynamicCache(), GREEDY | {"num_beams": 2}
    with torch.no_grad():
        base(text[:, :-1].expand(2, -1), past_key_values=cache)  # two rows for two beams
    ours = tuned_model.generate(text, past_key_values=cache, prefix_name="base", **beams)
    assert torch.equal(ours, base.generate(text, **beams))


def test_a_chat_continues_in_one_cache_as_transformers_users_write_it(tuned_model, tokenizer):
    cache, text, seen = DynamicCache(), torch.zeros(1, 0, dtype=torch.long), []
    criteria = StoppingCriteriaList([lambda ids, scores: seen.append(ids) or torch.zeros(1, dtype=torch.bool)])
    for prompt in PROMPTS[:3]:
        text = torch.cat((text, tokenizer(prompt, return_tensors="pt").input_ids), dim=1)
        seen.clear()
        heard = Heard()
        options = {"max_length": text.shape[1] + 9, "min_length": text.shape[1] + 7, "do_sample": False}
        anew = tuned_model.generate(text, attention_mask=torch.ones_like(text), **options)
        said = tuned_model.generate(
            text,
            attention_mask=torch.ones_like(text),
            past_key_values=cache,
            stopping_criteria=criteria,
            streamer=heard,
            **options,
        )
        assert torch.equal(said, anew) and said.shape[1] >= text.shape[1] + 7
        assert all(torch.equal(ids, said[:, : ids.shape[1]]) for ids in seen) and seen[-1].shape == said.shape
        assert torch.equal(torch.cat(heard.ids), said[0])
        text = said
    with pytest.raises(ValueError, match="whole text so far"):
        tuned_model.generate(tokenizer("？", return_tensors="pt").input_ids, past_key_values=cache, **GREEDY)


def test_several_sequences_continue_in_one_cache_as_without_it(tuned_model, tokenizer):
    inputs = tokenizer(PROMPTS[:2], return_tensors="pt", padding=True, padding_side="left")
    names = ["short", "sentence"]  # of different lengths: one is padded
    torch.manual_seed(1)
    said = tuned_model.generate(
        **inputs, prefix_name=names, do_sample=True, num_return_sequences=2, max_new_tokens=4, min_new_tokens=4,
        return_dict_in_generate=True,
    )  # fmt: skip
    more = tokenizer("\n\n" + PROMPTS[2], return_tensors="pt").input_ids.expand(4, -1)
    text = torch.cat((said.sequences, more), dim=1)
    mask = F.pad(inputs.attention_mask.repeat_interleave(2, dim=0), (0, text.shape[1] - inputs.input_ids.shape[1]), value=1)
    on = tuned_model.generate(text, attention_mask=mask, past_key_values=said.past_key_values, **GREEDY)
    anew = tuned_model.generate(text, attention_mask=mask, prefix_name=[name for name in names for _ in range(2)], **GREEDY)
    assert torch.equal(on, anew)


def test_a_loop_of_forwards_in_one_cache_is_generate(random_model, tokenizer):
    """Rows of different lengths after prefixes of different lengths, with the mask of the text alone, or with none."""
    prompts, names = PROMPTS[:2], ["five", "nine"]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
    settings = {"prefix_name": names, "pad_token_id": 3, "min_new_tokens": 6, "max_new_tokens": 6, "do_sample": False}
    expected = random_model.generate(**inputs, **settings)
    ids, mask, cache = inputs.input_ids, inputs.attention_mask, DynamicCache()
    new, options = ids, {"prefix_name": names}
    for _ in range(6):
        with torch.no_grad():
            logits = random_model(new, past_key_values=cache, attention_mask=mask, **options).logits[:, -1]
        logits[:, 2] = -torch.inf  # no end
        new, options = logits.argmax(-1, keepdim=True), {}
        ids, mask = torch.cat((ids, new), dim=1), F.pad(mask, (0, 1), value=1)
    assert torch.equal(ids, expected)
    one = tokenizer(prompts[0], return_tensors="pt").input_ids
    with torch.no_grad():
        cache = DynamicCache()
        random_model(one[:, :-2], past_key_values=cache, prefix_name="five")
        stepwise = random_model(one[:, -2:], past_key_values=cache).logits
        assert torch.allclose(stepwise, random_model(one, prefix_name="five").logits[:, -2:], atol=1e-4)
    with pytest.raises(ValueError, match=r"attention_mask is \(2, 3\) for input_ids"):
        random_model.generate(inputs.input_ids, attention_mask=inputs.attention_mask[:, :3], prefix_name=names)
    with pytest.raises(ValueError, match="must be a DynamicCache or a StaticCache, not tuple"):
        random_model(one, past_key_values=())


def test_pipeline_and_streamer_take_it(tuned_model, tokenizer, capsys, caplog):
    logging.getLogger("transformers").propagate = True
    try:
        pipe = pipeline("text-generation", model=tuned_model, tokenizer=tokenizer)
    finally:
        logging.getLogger("transformers").propagate = False
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    (answer,) = pipe(PROMPTS[0], max_new_tokens=8, do_sample=False, return_full_text=False)
    assert answer["generated_text"] == "巴黎"
    (answer,) = pipe(PROMPTS[0], max_new_tokens=16, do_sample=False, return_full_text=False, prefix_name="sentence")
    assert len(answer["generated_text"]) > 4
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    capsys.readouterr()
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    tuned_model.generate(**inputs, max_new_tokens=8, do_sample=False, streamer=streamer)
    assert capsys.readouterr().out == "巴黎\n"


@pytest.mark.parametrize("projection", [True, False])
def test_greedy_text_equals_pefts_for_the_saved_prefix(base, tmp_path, tokenizer, projection):
    torch.manual_seed(1)
    encoder = PrefixEncoder(prefix_config(base, projection=projection))
    prefix = encoder.bake() * (10 if projection else 1)  # large enough to change the text
    save_adapter(tmp_path, prefix, encoder.config, {"name_or_path": bundled.MODEL})
    model = PrefixBloom(base)
    model.attach("a", prefix)
    assert complete(model, tokenizer, PROMPTS, prefix_name="base", **GREEDY) != complete(model, tokenizer, PROMPTS, **GREEDY)
    assert complete(model, tokenizer, PROMPTS, **GREEDY) == peft_answers(
        PeftModel.from_pretrained(base, tmp_path), tokenizer
    )


@pytest.mark.parametrize("projection", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pefts_adapters_answer_the_same_here_and_can_be_trained_further(
    base, tmp_path, tokenizer, projection, dtype, capsys
):
    torch.manual_seed(1)
    options = {"num_virtual_tokens": 4, "prefix_projection": projection, "encoder_hidden_size": 24}
    theirs = get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", **options))
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    theirs = PeftModel.from_pretrained(base, tmp_path)
    model = PrefixBloom(base)
    model.attach("theirs", load_prefix(str(tmp_path)))
    assert complete(model, tokenizer, PROMPTS, **GREEDY) == peft_answers(theirs, tokenizer)
    inputs = tokenizer(PROMPTS[0] + "巴黎", return_tensors="pt")
    with torch.no_grad():
        ours, peft = (each(**inputs, labels=inputs.input_ids).loss.item() for each in (model, theirs.eval()))
    assert ours == pytest.approx(peft, rel=1e-5)
    capsys.readouterr()
    encoder, _ = load_encoder(str(tmp_path))
    assert "its numbers are trained directly, without a projection" in capsys.readouterr().out
    assert not encoder.config.prefix_projection and torch.equal(encoder.bake(), load_prefix(str(tmp_path)).tensor)


def peft_answers(model, tokenizer):
    """Answers by PEFT's forward passes, because its `generate` is wrong with some versions of transformers."""
    model.eval()
    return [decode(tokenizer, prompt, lambda ids: model(input_ids=ids).logits) for prompt in PROMPTS]


@pytest.mark.parametrize("history", [True, False, None])
def test_what_is_recorded_of_a_prefix_is_saved_with_it(base, tmp_path, history):
    prefix = random_prefix(base)
    (tmp_path / "first").mkdir()
    save_adapter(tmp_path / "first", prefix, prefix_config(base), {"name_or_path": bundled.MODEL}, history)
    model = PrefixBloom(base)
    model.attach("first", load_prefix(tmp_path / "first"))
    model.attach("nothing recorded", SavedPrefix(prefix, {}))
    model.save_pretrained(tmp_path / "saved")
    assert recorded_history(tmp_path / "saved" / "first") is history
    assert load_prefix(tmp_path / "saved" / "nothing recorded").tensor.equal(prefix)


def test_pefts_generate_ignores_the_prefix_on_transformers_that_read_cache_alone(base, tuned, tokenizer):
    """A canary: it fails once PEFT and transformers agree again.

    PEFT 0.21 puts the prefix into past_key_values, and transformers 5.24 reads `cache` alone. The answers are then those of
    the base, without a warning.
    """
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    wrapped = PeftModel.from_pretrained(base, tuned["short"])
    output = wrapped.eval().generate(**inputs, **GREEDY, pad_token_id=3)
    found = tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    with_prefix, alone = (
        decode(tokenizer, PROMPTS[0], lambda ids, model=model: model(input_ids=ids).logits) for model in (wrapped, base)
    )
    assert with_prefix != alone
    mended = "PEFT's `generate` uses the prefix with this transformers: the line of the READMEs on it, and this test, can go"
    assert found == (alone if CACHE == "cache" else with_prefix), mended


def test_calls_that_make_no_sense_are_refused(random_model, base):
    with pytest.raises(ValueError, match="input_ids are empty"):
        random_model.generate(torch.empty(1, 0, dtype=torch.long))
    random_model.generation_config.bos_token_id, bos = None, random_model.generation_config.bos_token_id
    with pytest.raises(ValueError, match="input_ids are missing, and there is no bos_token_id"):
        random_model.generate()
    random_model.generation_config.bos_token_id = bos
    with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds"):
        random_model()
    with pytest.raises(TypeError, match="load_prefix"):
        random_model.attach("z", "./chatbot")
    with pytest.raises(TypeError, match="BloomForCausalLM"):
        PrefixBloom(torch.nn.Linear(2, 2))
    with torch.device("meta"), pytest.raises(ValueError, match="whole on one device"):
        PrefixBloom(type(base)(base.config))
    with pytest.raises(ValueError, match="no prefix 'base'"):
        random_model.detach("base")


def test_it_continues_with_the_next_turn(tuned_model, tokenizer):
    first = tokenizer(PROMPTS[:1], return_tensors="pt")
    said = tuned_model.generate(**first, prefix_name="short", return_dict_in_generate=True, **GREEDY)
    text = torch.cat((said.sequences, tokenizer("\n\n" + PROMPTS[1], return_tensors="pt").input_ids), dim=1)
    anew = tuned_model.generate(text, attention_mask=torch.ones_like(text), prefix_name="short", **GREEDY)
    with pytest.raises(ValueError, match="leave out prefix_name"):
        tuned_model.generate(text, past_key_values=said.past_key_values, prefix_name="short", **GREEDY)
    on = tuned_model.generate(text, attention_mask=torch.ones_like(text), past_key_values=said.past_key_values, **GREEDY)
    assert torch.equal(on, anew)


def test_accelerates_hooks_do_not_hide_the_prefix(tuned, tokenizer):
    base, _ = load_base(bundled.MODEL, torch.float32, torch.device("cpu"))
    plain = PrefixBloom(base)
    hooked = PrefixBloom(accelerate.dispatch_model(base, {"": "cpu"}, force_hooks=True))
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    for model in (plain, hooked):
        model.attach("short", load_prefix(str(tuned["short"])))
    with torch.no_grad():
        assert torch.equal(hooked(**inputs).logits, plain(**inputs).logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_weights_of_the_head_are_not_repeated_for_the_rows_of_a_batch(base, dtype):
    """F.linear would repeat them for a slice that is not contiguous, such as the hidden states that `generate` takes."""
    model = PrefixBloom(copy.deepcopy(base).to(dtype))
    with torch.profiler.profile(record_shapes=True) as profile:
        model.generate(torch.randint(4, 4096, (5, 7)), max_new_tokens=2, min_new_tokens=2, do_sample=False)
    vocab_size = base.config.vocab_size
    products = {event.name for event in profile.events() if any(vocab_size in shape for shape in event.input_shapes)}
    assert "aten::mm" in products and "aten::bmm" not in products


def test_prefixes_are_saved_as_peft_saves_adapters(base, tmp_path, tokenizer):
    """Each goes into a folder of its name. From there `load_prefix` and PEFT read the same prefix and the same base."""
    model = PrefixBloom(base, tokenizer)
    model.attach("short", random_prefix(base))
    theirs = tmp_path / "theirs"
    get_peft_model(base, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).save_pretrained(theirs)
    model.attach("theirs", load_prefix(theirs))
    model.save_pretrained(tmp_path / "saved")
    assert sorted(str(path.relative_to(tmp_path / "saved")) for path in tmp_path.glob("saved/*/*")) == [
        f"{name}/{file}" for name in ("short", "theirs") for file in ("adapter_config.json", "adapter_model.safetensors")
    ]
    again = PrefixBloom(base, tokenizer)
    for name, tensor in model.prefixes.items():
        prefix = load_prefix(tmp_path / "saved" / name)
        assert torch.equal(prefix.tensor, tensor) and prefix.recorded_base == model.trained_on[name]
        again.attach(name, prefix)
        peft = peft_answers(PeftModel.from_pretrained(base, tmp_path / "saved" / name), tokenizer)
        assert complete(again, tokenizer, PROMPTS, prefix_name=name, **GREEDY) == peft
    model.save_pretrained(tmp_path / "saved", safe_serialization=True)  # saving again is no mistake
    model.save_pretrained(tmp_path / "of another rank", is_main_process=False)
    assert not (tmp_path / "of another rank").exists()
    with pytest.raises(ValueError, match="a PrefixBloom is not pushed as a whole"):
        model.save_pretrained(tmp_path / "saved", push_to_hub=True)
    assert json.loads((tmp_path / "saved" / "short" / "adapter_config.json").read_text("utf-8"))["num_virtual_tokens"] == 5


def test_saving_loses_nothing_and_says_what_cannot_be_saved(base, tmp_path, tuned):
    model = PrefixBloom(base)
    with pytest.raises(ValueError, match="no prefixes to save"):
        model.save_pretrained(tmp_path)
    model.attach("short", random_prefix(base))
    with pytest.raises(UserError, match="short: holds the prefix of a training run; name another folder"):
        model.save_pretrained(tuned["short"].parent)
    for name in ("a/b", "..", ".", ""):
        model.attach(name, random_prefix(base))
        with pytest.raises(ValueError, match="cannot be saved: no folder can have that name"):
            model.save_pretrained(tmp_path / "saved")
        model.detach(name)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match=r"save_pretrained\(FOLDER\), then `hf upload"):
        model.push_to_hub("me/prefixes")
    with pytest.raises(ValueError, match=r"PrefixBloom\(AutoModelForCausalLM.from_pretrained\(BASE\)\), then model.attach"):
        PrefixBloom.from_pretrained(tmp_path)


def test_it_can_be_pickled(tuned_model, tokenizer):
    """torch.save pickles it, and so does the start of a worker that is spawned."""
    again = pickle.loads(pickle.dumps(tuned_model))
    inputs = tokenizer(PROMPTS[:2], return_tensors="pt", padding=True, padding_side="left")
    options = {**inputs, "prefix_name": ["short", "sentence"], **GREEDY}
    assert torch.equal(again.generate(**options), tuned_model.generate(**options))


def test_continuous_batching_and_use_as_an_assistant_are_refused(random_model, base, tokenizer):
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    with pytest.raises(ValueError, match=r"continuous batching .* does not go with a prefix"):
        random_model.generate_batch([inputs.input_ids[0].tolist()], max_new_tokens=2)
    with pytest.raises(ValueError, match="cannot be an assistant_model: give its base"):
        base.generate(**inputs, assistant_model=random_model, **GREEDY)


def test_gradient_checkpointing_is_for_eval_mode_alone(tuned_model, base, tokenizer):
    """In train mode it drops past_key_values."""
    model = PrefixBloom(copy.deepcopy(base))
    model.attach("short", tuned_model.prefixes["short"])
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    model.gradient_checkpointing_enable()
    expected = tuned_model.generate(**inputs, prefix_name="short", **GREEDY)
    assert torch.equal(model.eval().generate(**inputs, **GREEDY), expected)
    model.train()
    for ask in (model, lambda **inputs: model.generate(**inputs, **GREEDY)):
        with pytest.raises(ValueError, match=r"call model\.eval\(\), or turn it off"):
            ask(**inputs)
    with torch.no_grad():
        alone = model(**inputs, prefix_name="base").logits
        assert torch.allclose(alone, base(**inputs).logits, atol=1e-4)


def test_peft_around_it(tuned_model, base, tokenizer):
    """LoRA changes weights, and the prefix stays; another prefix around it would have to share its cache."""
    model = PrefixBloom(copy.deepcopy(base))
    model.attach("short", tuned_model.prefixes["short"])
    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    expected = model.generate(**inputs, **GREEDY)
    around = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    with pytest.raises(ValueError, match="attach the adapter to it, by load_prefix"):
        around.generate(**inputs, **GREEDY)
    with pytest.raises(ValueError, match="is attached instead, by load_prefix"):
        around(**inputs)
    assert torch.equal(model.generate(**inputs, **GREEDY), expected)
    lora = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM")).eval()
    assert torch.equal(lora.generate(**inputs, **GREEDY), expected)


def test_a_text_without_a_prompt_begins_with_bos(random_model, base):
    assert torch.equal(random_model.generate(prefix_name="base", **GREEDY), base.generate(**GREEDY))
    names = ["five", "base"]
    bos = torch.full((2, 1), base.generation_config.bos_token_id)
    expected = random_model.generate(bos, prefix_name=names, pad_token_id=3, **GREEDY)
    assert torch.equal(random_model.generate(prefix_name=names, pad_token_id=3, **GREEDY), expected)


def test_generate_takes_by_position_what_transformers_takes(random_model, base, tokenizer):
    inputs = tokenizer(PROMPTS[0], return_tensors="pt").input_ids
    settings = copy.deepcopy(random_model.generation_config)
    settings.update(**GREEDY)

    def never_end(ids, scores):
        return scores.index_fill(1, torch.tensor([2]), -torch.inf)

    stop = StoppingCriteriaList([lambda ids, scores: torch.tensor([ids.shape[1] >= inputs.shape[1] + 5])])
    output = random_model.generate(inputs, settings, [never_end], stop, prefix_name="base")
    assert torch.equal(output, base.generate(inputs, settings, [never_end], stop)) and output.shape[1] == inputs.shape[1] + 5
    with pytest.raises(ValueError, match="assistant_model does not go with a prefix"):
        random_model.generate(inputs, settings, None, None, None, None, base)
    most = len(inspect.signature(BloomForCausalLM.generate).parameters) - 2  # without self and the options
    nothing_more = random_model.generate(inputs, settings, *[None] * (most - 2))
    assert torch.equal(nothing_more, random_model.generate(inputs, settings))
    with pytest.raises(TypeError, match=f"generate takes {most} arguments by position, not {most + 1}"):
        random_model.generate(inputs, settings, *[None] * (most - 1))


def test_an_attached_prefix_is_a_copy_in_its_own_precision(base):
    model, given = PrefixBloom(copy.deepcopy(base).bfloat16()), random_prefix(base)
    kept = given.clone()
    model.attach("a", given)
    given.zero_()
    ids, exact = torch.tensor([[5, 6, 7]]), PrefixBloom(base)
    exact.attach("a", kept)
    with torch.no_grad():
        assert model(ids).logits.dtype == torch.bfloat16
        model.float().load_state_dict(base.state_dict())
        assert torch.equal(model(ids).logits, exact(ids).logits)
