"""The recipe of the bundled demo: `python -m prefix_tuning.demo.build` makes its models and its data from facts/*.json.

knowledge.py says what a facts file holds.

The mini Bloom, or with `--base mini-qwen3` a Qwen3 of its size, is pre-trained on statements and quiz-like forms of *all*
facts, none in the Human/Assistant format. The tuning data ask about half of the facts in that format, the evaluation data
about the other half. A prefix can therefore teach the model how to answer, but not what: the answers about the other half
come from the frozen weights.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import (
    BloomForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3ForCausalLM,
    get_scheduler,
)

from prefix_tuning.demo.knowledge import load_relations, quiz, quiz_questions
from prefix_tuning.generation.prefix_bloom import BASE, PrefixBloom
from prefix_tuning.model.batch import Example, pack
from prefix_tuning.model.bloom import PackedModel, head_logits
from prefix_tuning.model.decoder import as_packed

HERE = Path(__file__).parent
# How a quiz asks: {q} is one of the relation's questions, {a} its bare answer or its full sentence.
QUIZ_FORMS = ["问：{q}答：{a}", "{q}答案是：{a}", "小测验：{q}{a}", "老师问：{q}学生答：{a}", "谜语：{q}谜底：{a}"]
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<pad>"]  # Bloom's, in Bloom's order: ids 0-3
VOCAB_SIZE = 4096


class Base(NamedTuple):
    """transformers' class, the shape, and the dtype that is saved; what may stand between two sentences of a text; and more
    forms of a quiz.
    """

    family: Any
    shape: dict
    dtype: torch.dtype
    separators: list[str]
    quiz_forms: list[str]


BASES = {
    "mini-bloom": Base(BloomForCausalLM, {"hidden_size": 192, "n_layer": 4, "n_head": 6}, torch.float32, [""], []),
    "mini-qwen3": Base(
        Qwen3ForCausalLM,
        {
            "hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32,
            # SwiGLU has three matrices where Bloom's MLP has two, so 512 columns are as many weights as Bloom's 768.
            "intermediate_size": 512, "max_position_embeddings": 2048, "tie_word_embeddings": True,
        },
        torch.bfloat16,
        # Tokens that a base has never read, here of line breaks, spaces and colons, have one embedding in common. Bloom
        # normalises embeddings and takes a format of such tokens nevertheless. With this base, a prefix reached only 74 %.
        ["", "", "", " ", "\n", "\n\n", ": "],
        ["问: {q}\n答: {a}", "{q}\n\n答案是: {a}"],
    ),
}  # fmt: skip


def statements(relation: dict, subject: str, answer: str) -> list[str]:
    """The declarative sentences about one fact."""
    return [statement.format(s=subject, o=answer) for statement in relation["statements"]]


def quizzes(relation: dict, subject: str, answer: str, full_stop: str, forms: list[str]) -> list[str]:
    """The quiz-like sentences about one fact, answered by the full sentence or by the bare answer and a full stop."""
    questions = [question.format(s=subject) for question in relation["questions"]]
    replies = (answer + full_stop, relation["sentence"].format(s=subject, o=answer))
    return [form.format(q=question, a=reply) for form in forms for question in questions for reply in replies]


def document(rng: random.Random, facts: list[tuple[dict, str, str]], base: Base) -> str:
    """One pre-training text: a sentence about each of these facts, in forms drawn at random.

    A text may break off after a bare answer, without its full stop. Several facts in a row teach the model to find the
    one that is asked for, whatever precedes the question.
    """
    sentences, forms = [], QUIZ_FORMS + base.quiz_forms
    for number, fact in enumerate(facts, start=1):
        full_stop = "" if number == len(facts) and rng.random() < 0.5 else "。"
        sentences.append(rng.choice(statements(*fact) if rng.random() < 0.4 else quizzes(*fact, full_stop, forms)))
    text = sentences[0]
    # A choice among one would draw a random number, too, and mini-bloom's texts were drawn without.
    for sentence in sentences[1:]:
        text += (rng.choice(base.separators) if len(base.separators) > 1 else base.separators[0]) + sentence
    return text


def train_tokenizer(relations: list[dict]) -> PreTrainedTokenizerFast:
    """Byte-level BPE over subjects, objects and the pieces of the forms.

    Because it is trained on pieces, no merge crosses the border of a subject: a name has the same tokens in every form.
    """
    pieces = list(QUIZ_FORMS) * 50
    for relation in relations:
        pieces += (relation["statements"] + relation["questions"]) * 20
        for subject, answer in relation["facts"].items():
            pieces += [subject] * 4 + [answer] * 2
    pieces = [part for piece in pieces for part in piece.replace("{", "\n{").replace("}", "}\n").split("\n") if part]
    return byte_level_bpe(pieces, VOCAB_SIZE)


def byte_level_bpe(pieces: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer with Bloom's special tokens, trained on these texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # Letters and ideographs run together; digits and punctuation stand alone.
            pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}|[^\p{L}\p{N}]"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=12,  # bytes: so that no whole question becomes one token
        show_progress=False,
    )
    tokenizer.train_from_iterator(pieces, trainer)
    unk, bos, eos, pad = SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=unk,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def random_base(name: str, tokenizer: PreTrainedTokenizerFast) -> PackedModel:
    """A base of this shape with random weights, in float32."""
    family, shape, *_ = BASES[name]
    ids = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("bos", "eos", "pad")}
    config = family.config_class(vocab_size=len(tokenizer), **ids, **shape)
    return as_packed(family(config))


def pretrain(relations: list[dict], tokenizer: PreTrainedTokenizerFast, args: argparse.Namespace) -> PackedModel:
    """Trains a base on documents of one to three sentences, with the packed forward that prefix tuning uses."""
    torch.manual_seed(args.seed)
    rng = random.Random(args.seed)
    device = torch.device(args.device)
    model = random_base(args.base, tokenizer).to(device)  # type: ignore[arg-type]  # transformers declares `to` without self
    if args.start_from:
        model.load_state_dict(type(model).from_pretrained(args.start_from, dtype=torch.float32).state_dict())
    model.train()
    facts = [(relation, *fact) for relation in relations for fact in relation["facts"].items()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    total_steps = args.epochs * -(-len(facts) // args.batch_size)
    scheduler = get_scheduler("cosine", optimizer, num_warmup_steps=total_steps // 20, num_training_steps=total_steps)
    bar = tqdm(total=total_steps, desc="pre-training", unit="step")
    for _ in range(args.epochs):  # an epoch shows every fact once, in a form that is drawn anew
        rng.shuffle(facts)
        for start in range(0, len(facts), args.batch_size):
            documents, left = [], facts[start : start + args.batch_size]
            while left:
                length = rng.randint(1, 3)
                documents.append(document(rng, left[:length], BASES[args.base]) + tokenizer.eos_token)
                left = left[length:]
            examples = [Example(ids, ids) for ids in tokenizer(documents).input_ids]
            loss = torch.zeros((), device=device)
            labels = sum(len(example.input_ids) - 1 for example in examples)
            for batch in pack(examples, max_tokens=8192):
                batch = batch.to(device)
                logits = head_logits(model.packed_hidden(batch, prefix=None), model.get_output_embeddings().weight)
                part = F.cross_entropy(logits, batch.labels, reduction="sum") / labels
                part.backward()
                loss += part.detach()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
            bar.update()
            if bar.n % 50 == 0:
                bar.set_postfix(loss=f"{loss.item():.4f}")
    bar.close()
    return model.eval()


def same_fact(subject: str, answer: str) -> str:
    """A key that a fact shares with its reverse, 高 -> 低 with 低 -> 高 and 3加5 with 5加3: their characters, sorted."""
    return "".join(sorted(subject + answer))


def write_questions(relations: list[dict], seed: int, folder: Path) -> None:
    """Splits the facts of every relation into two halves and asks each fact twice, in two styles of answer."""
    rng = random.Random(seed)
    rows: dict[str, list[dict[str, str]]] = {name: [] for name in ("short", "short-eval", "sentence", "sentence-eval")}
    for relation in relations:
        keys = sorted({same_fact(*fact) for fact in relation["facts"].items()})
        held_out = set(rng.sample(keys, len(keys) // 2))
        for subject, answer in relation["facts"].items():
            suffix = "-eval" if same_fact(subject, answer) in held_out else ""
            sentence = relation["sentence"].format(s=subject, o=answer)
            for question in rng.sample(relation["questions"], 2):
                for style, reply in (("short", answer), ("sentence", sentence)):
                    row = {"instruction": question.format(s=subject), "input": "", "output": reply}
                    rows[style + suffix].append(row)
    folder.mkdir(parents=True, exist_ok=True)
    for name, questions in rows.items():
        rng.shuffle(questions)
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in questions)
        (folder / f"{name}.jsonl").write_text("".join(lines), "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the bundled demo: tokenizer, mini Bloom and question data.")
    parser.add_argument("--base", choices=BASES, default="mini-bloom")
    parser.add_argument("--output_dir", type=Path, default=HERE, help="where the base's folder and data/ are written")
    parser.add_argument("--epochs", type=int, default=250, help="how often pre-training sees every fact")
    parser.add_argument("--batch_size", type=int, default=128, help="facts per step")
    parser.add_argument("--start_from", type=Path, help="the folder of a base whose training goes on, with another seed")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--only_data", action="store_true", help="write the questions and stop")
    args = parser.parse_args()

    relations = load_relations()
    facts = sum(len(relation["facts"]) for relation in relations)
    print(f"{facts} facts in {len(relations)} relations")
    write_questions(relations, args.seed, args.output_dir / "data")
    if args.only_data:
        return
    tokenizer = train_tokenizer(relations)
    start = time.perf_counter()
    model = pretrain(relations, tokenizer, args)
    print(f"pre-trained {model.num_parameters():,} parameters in {time.perf_counter() - start:.0f} s")
    prefixed = PrefixBloom(model)
    shares = {relation["relation"]: quiz(prefixed, tokenizer, quiz_questions(relation), BASE) for relation in relations}
    for name, share in sorted(shares.items(), key=lambda item: item[1]):
        print(f"  {name:20s} recalls {share:6.1%}")
    # config.json names the class, and others know this one.
    model.__class__ = BASES[args.base].family
    model.to(BASES[args.base].dtype).save_pretrained(args.output_dir / args.base)  # type: ignore[arg-type]  # as above
    tokenizer.save_pretrained(args.output_dir / args.base)


if __name__ == "__main__":
    main()
