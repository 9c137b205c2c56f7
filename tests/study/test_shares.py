import torch
from models import examples_of, random_bloom, random_prefix

from prefix_tuning.generation.cache import CACHE
from prefix_tuning.model.batch import pack
from prefix_tuning.model.bloom import prefix_cache
from prefix_tuning.study.shares import attention_shares


@torch.no_grad()
def test_shares_are_those_of_transformers_own_attention_weights(studied, batches):
    """To 1e-5 they are means of output_attentions, row by row: over label positions, and over rows at each distance."""
    model, eager = studied
    prefix, length = model.prefixes["short"], 16
    answers, by_position = [], {}
    for batch in batches["short"]:
        start = 0
        for ids in batch.input_ids.split(batch.lengths):
            cache, mask = prefix_cache([prefix])
            mask = torch.cat((mask, torch.ones(1, len(ids), dtype=torch.long)), dim=1)
            weights = torch.cat(eager(ids[None], **{CACHE: cache}, attention_mask=mask, output_attentions=True).attentions)
            share = weights[..., :length].sum(dim=-1)  # (layers, heads, tokens)
            mine = (batch.label_positions >= start) & (batch.label_positions < start + len(ids))
            answers.append(share[:, :, batch.label_positions[mine] - start])
            for position in range(len(ids)):
                by_position.setdefault(position, []).append(share[:, :, position])
            start += len(ids)
    found = attention_shares(model, batches["short"], prefix)
    expected = torch.cat(answers, dim=2).mean(dim=2)
    torch.testing.assert_close(torch.tensor(found["share"]), expected, atol=1e-5, rtol=0)
    enough = [torch.stack(shares).mean(dim=0) for shares in by_position.values() if len(shares) >= 5]
    torch.testing.assert_close(torch.tensor(found["by_distance"]), torch.stack(enough, dim=2), atol=1e-5, rtol=0)
    assert expected.max() > 0.3
    if model.config.model_type == "bloom":
        assert found["slopes"] == [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
        assert expected[1:3, 4].max() < 0.05  # the steepest head of the middle layers sees little
    else:
        assert found["slopes"] is None


def test_far_from_the_prefix_a_mean_is_shown_of_five_rows_or_of_all_if_there_are_fewer():
    model = random_bloom()
    prefix = random_prefix(model)
    for lengths, shown in (([4, 6, 9, 9, 9, 9, 12], 9), ([4, 6, 9, 9, 9, 9, 9, 12], 9), ([4, 7, 12], 4), ([12], 12)):
        found = attention_shares(model, list(pack(examples_of(lengths), max_tokens=20)), prefix)
        assert torch.tensor(found["by_distance"]).shape == (3, 6, shown)
