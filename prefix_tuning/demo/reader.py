"""The recipe of mini-reader, a base that can read: `python -m prefix_tuning.demo.reader` trains it on made-up sheets.

It answers questions about a sheet in front of it that it has never seen (sheets.py). Reading is learnt in two stages. A base
that begins with the second one is still guessing after 2,000 steps.

1. Repeats: words drawn at random, twice in the same order. At each word of the second half, the base has to find the same
   word in the first half and copy what follows it (an induction head, Olsson et al. 2022, https://arxiv.org/abs/2209.11895).
   Each of these words is a label, which is why this comes first.
2. Sheets, of four statements at first, that grow to 40 as the base gets better. Early sheets often have bare statements or
   bare questions, `城市王芳昆明。` and `城市王芳`, where the value follows the name at once. In sentences it does not, and
   from 10 statements on name and column have to be found together.
"""

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from prefix_tuning.data.templates import prompt_ids, talk_of
from prefix_tuning.demo.build import HERE, byte_level_bpe
from prefix_tuning.demo.sheets import COLUMNS, MOST, NAMES, QUESTIONS, STATEMENTS, Pair, draw_facts, sheet_of, write_sheet
from prefix_tuning.model.batch import IGNORED, Batch, Example, pack
from prefix_tuning.model.bloom import PackedModel, head_logits
from prefix_tuning.model.decoder import as_packed

WORDS = [*NAMES, *COLUMNS, *(value for values in COLUMNS.values() for value in values)]
BARE_STATEMENT, BARE_QUESTION = "{c}{n}{v}。\n", "{c}{n}"
FEWEST = 10  # statements of the sheets that the base is tested on; the most are MOST
SEED = 42  # of the bundled base and sheet
# This share of right answers begins the second stage, and then lets the sheets grow. Of repeats at most 92 % can be right,
# because nothing tells where the second half begins.
ENOUGH = 0.9


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each word of WORDS and for every other character."""
    characters = sorted(set("".join((*WORDS, *STATEMENTS, *QUESTIONS))))
    return byte_level_bpe([*characters, *WORDS, "Human", "Assistant"] * 4, vocab_size=4096)


def repeats(tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> list[Example]:
    """Texts of stage 1, all of one length. The words of the second half are labels."""
    words, length = [word for (word,) in tokenizer(WORDS).input_ids], rng.randint(6, 24)
    halves = [rng.choices(words, k=length) for _ in range(1280 // length)]
    return [Example(half * 2, [IGNORED] * length + half) for half in halves]


def growing_sheets(tokenizer: PreTrainedTokenizerBase, rng: random.Random, most: int) -> list[Example]:
    """Texts of stage 2: sheets of a third of `most` to `most` statements, and questions about them. The answers are labels.

    A question may be asked twice. If each fact was asked once, the base would learn to leave out what it has answered.
    """
    examples = []
    for _ in range(max(2, 200 // most)):
        facts = draw_facts(rng, rng.randint(max(2, most // 3), most), min(len(COLUMNS), max(1, most // 5)))
        bare_statements, bare_questions = (rng.random() < 2 / most for _ in range(2))
        text = sheet_of(rng, facts, (BARE_STATEMENT,) if bare_statements else STATEMENTS)
        example = Example(ids := tokenizer(text).input_ids, [IGNORED] * len(ids))
        asked = rng.choices(list(facts), k=2 * len(facts))
        if bare_questions:
            prompts = tokenizer([BARE_QUESTION.format(n=name, c=column) for name, column in asked]).input_ids
        else:
            prompts = questions_of(tokenizer, rng, asked)
        for pair, prompt in zip(asked, prompts, strict=True):
            answer = answer_of(tokenizer, facts[pair])
            example.input_ids += prompt + answer
            example.labels += [IGNORED] * len(prompt) + answer
        examples.append(example)
    return examples


def questions_of(tokenizer: PreTrainedTokenizerBase, rng: random.Random, asked: Sequence[Pair]) -> list[list[int]]:
    """The token ids of a prompt for each of these names and columns."""
    return prompt_ids(tokenizer, [talk_of(rng.choice(QUESTIONS).format(n=name, c=column)) for name, column in asked])


def answer_of(tokenizer: PreTrainedTokenizerBase, value: str) -> list[int]:
    return [*tokenizer(value).input_ids, tokenizer.eos_token_id]


class Progress:
    """Which texts come next. right: the share of right answers in the latest steps."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int):
        self.tokenizer, self.seed, self.repeating, self.statements, self.right = tokenizer, seed, True, 4.0, 0.0

    def texts(self, step: int) -> list[Example]:
        rng = random.Random(f"{self.seed} {step}")
        if self.repeating:
            return repeats(self.tokenizer, rng)
        return growing_sheets(self.tokenizer, rng, round(self.statements))

    def note(self, right: float) -> None:
        self.right += 0.05 * (right - self.right)
        if self.right < ENOUGH:
            return
        if self.repeating:
            self.repeating, self.right = False, 0.0
        else:
            self.statements = min(MOST, self.statements + 0.1)


def pretrain(tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> PackedModel:
    torch.manual_seed(args.seed)
    ids = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("bos", "eos", "pad")}
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=341, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=4, head_dim=32, max_position_embeddings=2048, tie_word_embeddings=True, **ids,
    )  # fmt: skip
    model = as_packed(Qwen3ForCausalLM(config))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    # A constant rate, which falls to zero over the last third.
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 100, 3 * (1 - step / args.steps))
    )
    progress = Progress(tokenizer, args.seed)
    bar = tqdm(range(args.steps), desc="pre-training", unit="step", mininterval=5)
    for step in bar:
        examples, right, answers = progress.texts(step), 0, 0
        labels = sum(label != IGNORED for example in examples for label in example.labels)
        for batch in pack(examples, max_tokens=4096):
            logits = label_logits(model, batch)
            (F.cross_entropy(logits, batch.labels, reduction="sum") / labels).backward()
            hits = (logits.argmax(dim=-1) == batch.labels)[batch.labels != tokenizer.eos_token_id]
            right, answers = right + int(hits.sum()), answers + len(hits)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        progress.note(right / answers)
        if step % 50 == 0:
            bar.set_postfix(
                repeating=progress.repeating, statements=round(progress.statements), right=f"{progress.right:.1%}"
            )
    return model.eval()


def label_logits(model: PackedModel, batch: Batch) -> torch.Tensor:
    """(N, V), with a gradient for the weights of the model."""
    return head_logits(*model.head_inputs(model.packed_hidden(batch, prefix=None)))


@torch.no_grad()
def share_right(model: PackedModel, tokenizer: PreTrainedTokenizerBase, with_sheet: bool, sheets_read: int = 64) -> float:
    """The share of right answers about new sheets of FEWEST to MOST statements. Each is asked about 8 facts, one question
    at a time.
    """
    rng, right, asked = random.Random("held out"), 0, 0
    for _ in range(sheets_read):
        facts = draw_facts(rng, rng.randint(FEWEST, MOST))
        sheet = tokenizer(sheet_of(rng, facts)).input_ids if with_sheet else []
        pairs = rng.sample(list(facts), 8)
        prompts = questions_of(tokenizer, rng, pairs)
        examples = []
        for pair, prompt in zip(pairs, prompts, strict=True):
            answer = answer_of(tokenizer, facts[pair])
            examples.append(Example([*sheet, *prompt, *answer], [IGNORED] * len(sheet + prompt) + answer))
        for batch in pack(examples, max_tokens=4096):
            answers = (label_logits(model, batch).argmax(dim=-1) == batch.labels).view(batch.rows, -1)
            right, asked = right + int(answers.all(dim=1).sum()), asked + batch.rows
    return right / asked


def main() -> None:
    parser = argparse.ArgumentParser(description="Build mini-reader, a sheet and questions about it.")
    parser.add_argument("--output_dir", type=Path, default=HERE, help="where the base's folder and data/ are written")
    parser.add_argument("--steps", type=int, default=2800)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--only_data", action="store_true", help="write the sheet and its questions, and stop")
    args = parser.parse_args()

    folder = args.output_dir / "data"
    folder.mkdir(parents=True, exist_ok=True)
    write_sheet(args.seed, folder)
    if args.only_data:
        return
    tokenizer = train_tokenizer()
    model = pretrain(tokenizer, args)
    model.bfloat16().float()  # as it is saved
    shares = [share_right(model, tokenizer, with_sheet) for with_sheet in (True, False)]
    print(f"{model.num_parameters():,} parameters; right about new sheets: {shares[0]:.1%}, without them {shares[1]:.1%}")
    model.__class__ = Qwen3ForCausalLM  # type: ignore[assignment]  # config.json names the class; others know this one
    model.bfloat16().save_pretrained(args.output_dir / "mini-reader")
    tokenizer.save_pretrained(args.output_dir / "mini-reader")


if __name__ == "__main__":
    main()
