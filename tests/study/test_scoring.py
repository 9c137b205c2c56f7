import pytest
import torch
from datasets import Dataset
from models import examples_of, random_decoder, random_prefix

from prefix_tuning.data.readers import load_rows
from prefix_tuning.data.rows import take, tokenize
from prefix_tuning.evaluation import answer_turns, evaluate_rows, expected_answers, last_turn, matching
from prefix_tuning.generation.cache import CACHE
from prefix_tuning.model.batch import pack
from prefix_tuning.model.bloom import prefix_cache
from prefix_tuning.study.scoring import interval, label_logits, label_rows, pack_rows, score_prefix, spaced


@pytest.mark.parametrize("name", ["short", "sentence"])
def test_a_score_is_what_evaluation_finds_by_generating(tuned_model, tokenizer, name):
    """Exact match without a generated token equals exact match of greedy answers; the loss is evaluate_rows's to 1e-5."""
    rows = load_rows(f"bundled:{name}-eval", ("train",)).select(range(60))
    tokenized = tokenize(rows, tokenizer, 256)
    prefix = tuned_model.prefixes[name]
    found = score_prefix(tuned_model, pack_rows(tokenized, max_tokens=300), prefix)
    turns = [last_turn(example) for example in take(tokenized, range(60))]
    answers = answer_turns(tuned_model, tokenizer, turns, prefix, 1000)
    assert found.exact_match == matching(answers, expected_answers(tokenizer, turns)) / len(turns)
    assert 0 < found.exact_match < 1
    assert found.loss == pytest.approx(evaluate_rows(tuned_model, tokenized, prefix, 1000)[0], abs=1e-5)


def test_the_base_alone_is_scored_too(base, tokenizer):
    tokenized = tokenize(load_rows("bundled:short-eval", ("train",)).select(range(20)), tokenizer, 256)
    found = score_prefix(base, pack_rows(tokenized, 1000), None)
    assert found.exact_match == 0 and found.loss == pytest.approx(evaluate_rows(base, tokenized, None, 1000)[0])


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3", "cohere", "granite", "gemma2", "phi"])
def test_logits_of_other_families_are_those_of_transformers(family):
    """Cohere and Granite scale them, Gemma 2 caps them, and Phi's head has a bias."""
    model = random_decoder(family)
    (batch,), prefix = pack(examples_of([9, 4], vocab_size=99), 100), random_prefix(model)
    rows = [model(ids[None], **{CACHE: prefix_cache([prefix])[0]}).logits[0] for ids in batch.input_ids.split(batch.lengths)]
    expected = torch.cat(rows)[batch.label_positions]
    torch.testing.assert_close(label_logits(model, batch, prefix), expected, atol=1e-4, rtol=1e-4)
    score = score_prefix(model, [batch], prefix)
    assert score.loss == pytest.approx(torch.nn.functional.cross_entropy(expected, batch.labels).item(), rel=1e-5)


def test_labels_know_their_rows():
    examples = examples_of([9, 4, 6], prompt_share=0.5)
    batch = next(pack(examples, 100))
    counts = [
        sum(label != -100 for label in example.labels[1:]) for example in sorted(examples, key=lambda e: -len(e.labels))
    ]
    assert torch.bincount(label_rows(batch), minlength=3).tolist() == counts


def test_an_interval_is_wilson_s():
    """Wilson 1927; the numbers are those of statsmodels' proportion_confint(count, nobs, method="wilson")."""
    assert interval(0.95, 40) == pytest.approx((0.8350, 0.9862), abs=1e-4)
    assert interval(1, 200) == pytest.approx((0.9812, 1), abs=1e-4) and interval(0, 20)[0] == pytest.approx(0)


def test_spaced_rows_reach_to_the_end():
    """Also where 100 rows cannot be divided evenly: for 60 of them, a step of 100 // 60 = 1 would end at row 59."""
    rows = Dataset.from_dict({"number": list(range(100))})
    for count in (1, 7, 60, 99):
        found = spaced(rows, count)["number"]
        gaps = {after - before for before, after in zip(found, [*found[1:], 100], strict=True)}
        assert len(found) == count and found[0] == 0 and max(gaps) - min(gaps) <= 1
    assert spaced(rows, 101)["number"] == rows["number"]
