import copy
import hashlib
import json
import resource
from itertools import pairwise

import pytest
import tokenizers
from checkout import REAL_ROWS, needs_real_rows
from datasets import concatenate_datasets
from launching import TRAIN
from rows import GOOD, write_jsonl
from transformers import PreTrainedTokenizerFast

from prefix_tuning.data import readers
from prefix_tuning.data import rows as rows_module
from prefix_tuning.data.readers import load_rows
from prefix_tuning.data.rows import ASKED, cut_answers, digest, encode, read_questions, take, tokenize
from prefix_tuning.data.templates import Talk, part_ids, prompt_ids, prompt_of, talk_of
from prefix_tuning.errors import UserError
from prefix_tuning.model.batch import IGNORED


def notebook_process(example, tokenizer, max_length=256):
    """The notebook's own function, row by row: the twin that `tokenize` must agree with."""
    prompt = tokenizer("\n".join(["Human: " + example["instruction"], example["input"]]).strip() + "\n\nAssistant: ")
    response = tokenizer(example["output"] + tokenizer.eos_token)
    input_ids = prompt["input_ids"] + response["input_ids"]
    labels = [-100] * len(prompt["input_ids"]) + response["input_ids"]
    return input_ids[:max_length], labels[:max_length]


def agree_with_the_notebook(rows, tokenizer, max_length):
    expected = [notebook_process(row, tokenizer, max_length) for row in rows]
    expected = [pair for pair in expected if any(label != IGNORED for label in pair[1])]
    tokenized = tokenize(rows, tokenizer, max_length)
    found = take(tokenized, list(range(len(tokenized))))
    assert [(example.input_ids, example.labels) for example in found] == expected
    return len(rows) - len(tokenized)


@needs_real_rows
@pytest.mark.parametrize("file", ["train.jsonl", "test.jsonl"])
def test_ids_and_labels_equal_the_notebooks_on_all_real_rows(file, tokenizer):
    rows = load_rows(str(REAL_ROWS / file), TRAIN)
    agree_with_the_notebook(rows, tokenizer, 256)
    assert agree_with_the_notebook(rows, tokenizer, 24) > 0  # some rows lose all labels


def test_ids_and_labels_equal_the_notebooks(rows_file, tokenizer):
    rows = load_rows(str(rows_file), TRAIN)
    assert agree_with_the_notebook(rows, tokenizer, 256) == 0
    dropped = agree_with_the_notebook(rows, tokenizer, 26)
    assert 0 < dropped < len(rows)


def test_a_row_is_kept_if_there_is_room_for_one_label(rows_file, tokenizer):
    row = load_rows(str(rows_file), TRAIN).select([0])
    prompt = tokenizer(prompt_of(row[0]["instruction"], row[0]["input"])).input_ids
    assert [len(tokenize(row, tokenizer, len(prompt) + room)) for room in (-1, 0, 1)] == [0, 0, 1]


def test_tokenising_is_cached(rows_file, tokenizer):
    rows = load_rows(str(rows_file), TRAIN)
    first, second = (tokenize(rows, tokenizer, 64) for _ in range(2))
    assert first.cache_files == second.cache_files and first.cache_files
    assert tokenize(rows, tokenizer, 63).cache_files != first.cache_files


@pytest.mark.parametrize("kept", [0, 0.5, -1], ids=["empty", "half", "a byte less"])
def test_damaged_files_of_the_cache_are_made_anew(tmp_path, tokenizer, monkeypatch, kept):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = write_jsonl(tmp_path / "a.jsonl", *(GOOD | {"instruction": f"{number}加一等于几？"} for number in range(50)))
    rows = load_rows(path, TRAIN)
    expected = rows.to_list(), tokenize(rows, tokenizer, 64).to_list()
    files = [file for file in (tmp_path / "cache").rglob("*") if file.is_file() and file.stat().st_size]
    assert len(files) == 4 and len([file for file in files if file.suffix == ".arrow"]) == 2
    for file in files:
        content = file.read_bytes()
        file.unlink()  # a process that has it open keeps it
        file.write_bytes(content[: int(kept * len(content)) if kept >= 0 else kept])
        rows = load_rows(path, TRAIN)
        assert (rows.to_list(), tokenize(rows, tokenizer, 64).to_list()) == expected, file.name


def test_a_new_version_of_rows_or_tokens_makes_the_cache_anew(rows_file, tokenizer, monkeypatch):
    rows = load_rows(str(rows_file), TRAIN)
    first = tokenize(rows, tokenizer, 64)
    for part, version in ((rows_module, "TOKENS_VERSION"), (readers, "ROWS_VERSION")):
        with monkeypatch.context() as patch:
            patch.setattr(part, version, 10**6)
            again = load_rows(str(rows_file), TRAIN)
            assert (again.cache_files != rows.cache_files) == (part is readers)
            assert tokenize(again, tokenizer, 64).cache_files != first.cache_files


def test_the_cache_of_tokens_knows_the_eos_token(rows_file, tokenizer):
    rows = load_rows(str(rows_file), TRAIN)
    other = copy.deepcopy(tokenizer)
    other.eos_token = "<s>"
    for one in (tokenizer, other):
        assert {ids[-1] for ids in tokenize(rows, one, 256)["input_ids"]} == {one.eos_token_id}


def test_a_digest_covers_every_row_and_nothing_but_the_rows(tmp_path, tokenizer):
    rows = [GOOD | {"instruction": f"{number}加一等于几？"} for number in range(3000)]
    tokenized = tokenize(load_rows(write_jsonl(tmp_path / "a.jsonl", *rows), TRAIN), tokenizer, 64)
    rows[1], rows[2] = rows[2], rows[1]
    swapped = tokenize(load_rows(write_jsonl(tmp_path / "a.jsonl", *rows), TRAIN), tokenizer, 64)
    rows[1], rows[2] = rows[2], rows[1] | {"output": "三"}
    changed = tokenize(load_rows(write_jsonl(tmp_path / "a.jsonl", *rows), TRAIN), tokenizer, 64)
    label = tokenized.map(lambda row, index: {"labels": [7, *row["labels"][1:]]} if index == 1234 else {}, with_indices=True)
    assert len({digest(each) for each in (tokenized, swapped, changed, label, tokenized.select(range(2999)))}) == 5
    parts = concatenate_datasets([tokenized.select(range(700)), tokenized.select(range(700, 3000))])
    for same in (parts, tokenized.select(range(2999, -1, -1)).select(range(2999, -1, -1))):
        assert digest(same) == digest(tokenized)


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, tokenizer, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", *(GOOD | {"instruction": f"{number}加一等于几？"} for number in range(5000)))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", "/proc/nope")
    for name in (path, "nobody/no-such-set"):
        with pytest.raises(UserError, match=r"/proc/nope: .*HF_DATASETS_CACHE"):
            load_rows(name, TRAIN)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def with_files_of(size, call, *arguments):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
        try:
            return call(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    message = r"cache: prepared rows .*File too large; .*HF_DATASETS_CACHE"
    with pytest.raises(UserError, match=message):
        with_files_of(10_000, load_rows, path, TRAIN)
    rows = load_rows(path, TRAIN)
    with pytest.raises(UserError, match=message):
        with_files_of(500_000, tokenize, rows, tokenizer, 64)
    assert len(tokenize(rows, tokenizer, 64)) == 5000


def test_a_question_may_name_its_prefix(tmp_path):
    rows = [{"instruction": "你好", "more": 1}, {"instruction": "好", "input": "吗", "prefix": "b"}]
    rows += [{"instruction": "好", "input": None, "prefix": empty} for empty in (None, "")]
    found = list(read_questions(write_jsonl(tmp_path / "a.jsonl", *rows), ["a", "b"]))
    asked = [Talk(["你好"]), Talk(["好\n吗"]), Talk(["好"]), Talk(["好"])]
    assert found == list(zip(rows, asked, [None, "b", None, None], strict=True))
    for change, message in (
        ({"prefix": "c"}, "line 2: names the prefix 'c'; there are a, b"),
        ({"response": ""}, "line 2: has a column 'response' already"),
        ({"instruction": None}, "line 2: 'instruction' must be a text"),
    ):
        path = write_jsonl(tmp_path / "a.jsonl", rows[0], rows[1] | change)
        with pytest.raises(UserError, match=message):
            list(read_questions(path, ["a", "b"]))


def test_what_looks_like_a_special_token_in_a_row_is_plain_text(tmp_path, tokenizer):
    row = {"instruction": "a</s>b", "input": "<pad>", "output": "c</s>d"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row), "utf-8")
    tokenized = tokenize(load_rows(str(tmp_path / "rows.jsonl"), ("train",)), tokenizer, 256)
    (example,) = take(tokenized, [0])
    assert [token for token in example.input_ids if token in tokenizer.all_special_ids] == [tokenizer.eos_token_id]
    assert example.input_ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(example.input_ids[:-1]) == "Human: a</s>b\n<pad>\n\nAssistant: c</s>d"
    assert tokenizer.decode([label for label in example.labels if label != IGNORED]) == "c</s>d</s>"


def talk_rows(tmp_path, *talks):
    """Talks, each the texts of user and assistant in turn, or None and then the system's: as messages, and as our rows."""
    rows = []
    for texts in talks:
        roles = ["user", "assistant"] * len(texts)
        roles = ["system", *roles] if texts[0] is None else roles
        said = zip(roles, [text for text in texts if text is not None], strict=False)
        rows.append({"messages": [{"role": role, "content": text} for role, text in said]})
    return rows, load_rows(write_jsonl(tmp_path / "talks.jsonl", *rows), TRAIN)


# What a talk is as text, as a chat template of transformers.
TEMPLATE = """\
{%- set first = namespace(text='') -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}{%- set first.text = message.content + '\n' -%}
{%- elif message.role == 'user' -%}
{{- ('Human: ' + first.text + message.content) | trim + '\n\nAssistant: ' -}}{%- set first.text = '' -%}
{%- else -%}{% generation %}{{ message.content + eos_token }}{% endgeneration %}
{%- endif -%}
{%- endfor -%}"""
CHINESE = [
    ("法国的首都是哪里？", "巴黎"),
    ("法国的首都是哪里？", "巴黎", "德国呢？", "柏林。", "3加5？", "8"),
    (None, "请简短回答。", "法国的首都是哪里？", "巴黎"),
    (None, "请简短回答。", "法国的首都是哪里？", "巴黎", " 谢谢\n", "不客气！\n"),
]
ENGLISH = [("Hello", "Paris is a city"), (None, "Be brief", "Hello", "Paris", "And this city", "Paris is it")]


@pytest.mark.parametrize("language", ["Chinese", "English"])
def test_a_talk_is_what_a_chat_template_of_transformers_makes_of_it(tmp_path, tokenizer, language):
    """Segment by segment for all; as a whole where no token reaches from a prompt into its answer."""
    if language == "English":  # a tokenizer that has tokens such as " Paris", which begin with a prompt's last space
        texts = [text for texts in ENGLISH for text in texts if text]
        tokenizer = tokenizer.train_new_from_iterator(["Assistant: " + text for text in texts] * 9, 600)
    rows, loaded = talk_rows(tmp_path, *(CHINESE if language == "Chinese" else ENGLISH))
    examples = take(tokenize(loaded, tokenizer, 10**6), range(len(rows)))
    whole_is_equal = []
    for row, example in zip(rows, examples, strict=True):

        def render(messages, **options):
            return tokenizer.apply_chat_template(messages, chat_template=TEMPLATE, **options)

        said = row["messages"]
        text = render(said, tokenize=False)
        assert tokenizer.decode(example.input_ids) == text
        # The segments: prompts and answers, by what each message adds to the text.
        so_far = ["", *(render(said[:end], tokenize=False) for end in range(1, len(said) + 1))]
        segments = [after.removeprefix(before) for before, after in pairwise(so_far)]
        assert "".join(segments) == text
        ids, labels = [], []
        for message, segment in zip(said, segments, strict=True):
            part = tokenizer(segment).input_ids if segment else []  # a system's text comes with what the user says first
            ids += part
            labels += part if message["role"] == "assistant" else [IGNORED] * len(part)
        assert (example.input_ids, example.labels) == (ids, labels)
        whole = render(said, return_dict=True, return_assistant_tokens_mask=True)
        masked = [
            token if of_answer else IGNORED
            for token, of_answer in zip(whole["input_ids"], whole["assistant_masks"], strict=True)
        ]
        whole_is_equal.append((whole["input_ids"], masked) == (example.input_ids, example.labels))
    assert all(whole_is_equal) if language == "Chinese" else not any(whole_is_equal)


def test_a_talk_is_the_rows_of_its_turns_one_after_the_other(tmp_path, tokenizer):
    texts = ["法国？", "巴黎", "</s>", "a</s>b", "德国？", "柏林"]
    _, loaded = talk_rows(tmp_path, texts)
    (talk,) = take(tokenize(loaded, tokenizer, 256), [0])
    turns = [{"instruction": asked, "output": answer} for asked, answer in zip(texts[::2], texts[1::2], strict=True)]
    alone = take(tokenize(load_rows(write_jsonl(tmp_path / "a.jsonl", *turns), TRAIN), tokenizer, 256), range(3))
    assert talk.input_ids == [token for turn in alone for token in turn.input_ids]
    assert talk.labels == [label for turn in alone for label in turn.labels]
    assert talk.input_ids.count(tokenizer.eos_token_id) == talk.labels.count(tokenizer.eos_token_id) == 3


def test_a_talk_is_cut_between_turns_and_a_first_turn_like_any_row(tmp_path, tokenizer):
    texts = ["法国的首都是哪里？", "巴黎，人人都知道", "德国呢？", "柏林", "日本呢？", "东京"]
    _, loaded = talk_rows(tmp_path, texts)
    _, first_alone = talk_rows(tmp_path, texts[:2])
    (whole,) = take(tokenize(loaded, tokenizer, 256), [0])
    ends = [index + 1 for index, token in enumerate(whole.input_ids) if token == tokenizer.eos_token_id]
    prompt = len(tokenizer(prompt_of(texts[0])).input_ids)
    assert len(ends) == 3 and ends[-1] == len(whole.input_ids)
    for max_length in range(1, ends[-1] + 2):
        cut = tokenize(loaded, tokenizer, max_length)
        kept = max((end for end in ends if end <= max_length), default=max_length if max_length > prompt else 0)
        found = [(example.input_ids, example.labels) for example in (take(cut, [0]) if len(cut) else [])]
        assert found == ([(whole.input_ids[:kept], whole.labels[:kept])] if kept else [])
        if max_length <= ends[0]:
            assert cut.to_list() == tokenize(first_alone, tokenizer, max_length).to_list()


def test_answers_whose_weight_is_0_have_no_labels(tmp_path, tokenizer):
    rows, loaded = talk_rows(tmp_path, ["法国？", "巴黎", "德国？", "柏林", "日本？", "东京"])
    (whole,) = take(tokenize(loaded, tokenizer, 256), [0])
    for message, weight in zip(rows[0]["messages"], [None, 0, None, 1, None, 0], strict=True):
        message["weight"] = weight
    (weighed,) = take(tokenize(load_rows(write_jsonl(tmp_path / "a.jsonl", *rows), TRAIN), tokenizer, 256), [0])
    first, second, _ = (index + 1 for index, token in enumerate(whole.input_ids) if token == tokenizer.eos_token_id)
    assert weighed.input_ids == whole.input_ids[:second]
    assert weighed.labels == [IGNORED] * first + whole.labels[first:second]
    # Cut before its second turn, it has no label left.
    assert len(tokenize(load_rows(str(tmp_path / "a.jsonl"), TRAIN), tokenizer, second - 1)) == 0


def test_cut_answers_are_counted(tmp_path, tokenizer):
    _, loaded = talk_rows(tmp_path, ["法国？", "巴黎，人人都知道", "德国？", "柏林"], ["日本？", "东京"])
    talk, short = (len(ids) for ids in tokenize(loaded, tokenizer, 256)["input_ids"])
    first = len(tokenizer(prompt_of("法国？")).input_ids) + len(tokenizer("巴黎，人人都知道").input_ids) + 1
    prompt = len(tokenizer(prompt_of("日本？")).input_ids)
    assert prompt < short < first < talk
    for max_length, cut in ((talk, 0), (talk - 1, 1), (first, 1), (first - 1, 2), (short, 2), (short - 1, 3), (prompt, 3)):
        for _ in range(2):  # the second time from the cache
            assert cut_answers(encode(loaded, tokenizer, max_length)) == (cut, 3, talk)


def test_prompts_are_those_of_training_without_the_last_answer(tmp_path, tokenizer):
    talks = [*CHINESE, ("</s>", "b</s>", "c", "d")]
    _, loaded = talk_rows(tmp_path, *talks)
    prompts = prompt_ids(tokenizer, [talk_of(*(row[name] for name in ASKED)) for row in loaded])
    for prompt, example in zip(prompts, take(tokenize(loaded, tokenizer, 10**6), range(len(loaded))), strict=True):
        last = max(index for index, label in enumerate(example.labels) if label == IGNORED)
        assert prompt == example.input_ids[: last + 1]
    assert prompt_ids(tokenizer, []) == []
    assert talk_of("a") == Talk(["a"]) and talk_of("a", "b", ["c", "d"], "s") == Talk(["c", "d", "a\nb"], "s")


def test_a_digest_covers_the_history(tmp_path):
    one, other = (talk_rows(tmp_path, [text, "b", "c", "d"])[1] for text in "ax")
    assert digest(one) != digest(other)
    assert digest(one) == digest(talk_rows(tmp_path, ["a", "b", "c", "d"])[1])


def test_rows_and_tokens_have_not_changed_since_their_version_was_raised(tmp_path):
    """Else users would keep what is in their cache. If this fails, raise the version and put in the new hash."""
    said = [("system", "s"), ("user", "法国？"), ("assistant", "巴黎"), ("user", "b"), ("assistant", "c")]
    talk = [{"role": role, "content": text, "weight": int(text != "巴黎")} for role, text in said]
    files = [
        [{"question": "a", "input": "b", "answer": "c", "history": [["d", "e"]], "system": "f", "id": 1}],
        [{"question": "g", "context": "h", "answer": "长" * 30}],
        [{"messages": talk}],
    ]
    lines = []
    sources = [write_jsonl(tmp_path / f"{number}.jsonl", *rows) for number, rows in enumerate(files)]
    rows = concatenate_datasets([load_rows(source, TRAIN, say=lines.append) for source in sources])
    letters = sorted({*json.dumps(files, ensure_ascii=False), *"Human: Assistant:\n"})
    model = tokenizers.models.WordLevel({token: number for number, token in enumerate(["</s>", *letters])})
    by_letter = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model), eos_token="</s>")
    by_letter.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    tokens = encode(rows, by_letter, 40).to_list()
    assert max(len(row["input_ids"]) for row in tokens) == 40  # a token for each letter
    found = [json.dumps([rows.to_list(), [line.partition(": ")[2] for line in lines]]), json.dumps(tokens)]
    assert [hashlib.sha256(text.encode()).hexdigest()[:12] for text in found] == ["f80cfa3e7c29", "4aeb636d63cc"]
    assert (readers.ROWS_VERSION, rows_module.TOKENS_VERSION) == (2, 2)


def test_a_talk_begins_with_bos_once_if_the_tokenizer_adds_it(tokenizer):
    """As Llama's and Gemma's tokenizers do."""
    adding = copy.deepcopy(tokenizer)
    adding.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    talk = Talk(["你好", "您好！", "再见", "再见！"])
    (plain,), (found,) = part_ids(tokenizer, [talk]), part_ids(adding, [talk])
    assert found == [[tokenizer.bos_token_id, *plain[0]], *plain[1:]]
    assert prompt_ids(adding, [Talk(["你好"])]) == [adding(prompt_of("你好")).input_ids]
