"""What the bundled base knows, facts/*.json, and the quiz that asks for it. build.py makes the base from the same facts.

A facts file is a list of relations, such as country -> capital. Each has statements (surface forms for pre-training),
questions, the full sentence that answers them, and the facts themselves, subject -> object.
"""

import json
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from prefix_tuning.generation.batches import complete
from prefix_tuning.generation.prefix_bloom import PrefixBloom


def load_relations() -> list[dict]:
    """All relations of facts/*.json, in a fixed order."""
    files = sorted(Path(__file__).parent.glob("facts/*.json"))
    return [relation for path in files for relation in json.loads(path.read_text("utf-8"))]


def quiz_questions(relation: dict) -> list[tuple[str, tuple[str, str]]]:
    """For each fact of a relation: a prompt in one of the base's own quiz forms, and the two right answers, the bare one and
    the full sentence, both without full stop.
    """
    question, sentence = relation["questions"][0], relation["sentence"]
    return [
        (f"问：{question.format(s=subject)}答：", (answer, sentence.format(s=subject, o=answer).rstrip("。")))
        for subject, answer in relation["facts"].items()
    ]


def quiz(
    model: PrefixBloom, tokenizer: PreTrainedTokenizerBase, questions: list[tuple[str, tuple[str, str]]], prefix_name: str
) -> float:
    """The share of `quiz_questions` whose greedy answer, up to its full stop, is right. prefix_name: "base": no prefix."""
    prompts, answers = zip(*questions, strict=True)
    ids = tokenizer(list(prompts), split_special_tokens=True).input_ids
    replies = complete(model, tokenizer, ids, prefix_name, max_new_tokens=24, do_sample=False)
    return sum(reply.partition("。")[0] in right for reply, right in zip(replies, answers, strict=True)) / len(questions)
