"""A text or a longer prefix becomes a prefix: where a teacher comes from, what it answers, and what a run makes of it."""

import functools
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from answers import complete
from datasets import Dataset
from models import examples_of, random_bloom, random_decoder, relative, save_decoder
from rows import write_jsonl
from runs import LATEST, assert_same_run, metrics_of
from safetensors import safe_open
from safetensors.torch import load_file
from transformers.models.bloom import modeling_bloom

from prefix_tuning import PrefixBloom, bundled, load_prefix, plain
from prefix_tuning.base_model.loading import load_base
from prefix_tuning.data.templates import prompt_of
from prefix_tuning.errors import UserError
from prefix_tuning.files.names import ADAPTER_FILE, ANSWERS_FILE, CARD_FILE, CONFIG_FILE, ENCODER_FILE
from prefix_tuning.files.prefixes import load_encoder
from prefix_tuning.generation.cache import CACHE
from prefix_tuning.model.bloom import prefix_cache
from prefix_tuning.model.distillation import Distillation
from prefix_tuning.training import teacher as teachers
from prefix_tuning.training.loop import optimizer_step
from prefix_tuning.training.run import train
from prefix_tuning.training.settings import TrainConfig
from prefix_tuning.training.start import start_pairs
from prefix_tuning.training.state import TrainingState, make_optimizer, make_schedule
from prefix_tuning.training.steps import Steps
from prefix_tuning.training.teacher import Teacher, answer_rows, read_pairs, text_tokens

TEXT = "手册：法国的首都是巴黎，德国的首都是柏林。\n问题要用一个词来回答。\n"


@pytest.fixture
def handbook(tmp_path):
    path = tmp_path / "handbook.md"
    path.write_text(TEXT, "utf-8")
    return str(path)


@pytest.fixture
def distilling(quick_settings, handbook, tmp_path):
    """A quick run on the bundled base whose teacher is the handbook. Of its 12 rows, 9 have no answer."""
    lines = Path(quick_settings["dataset"]).read_text("utf-8").splitlines()[:12]
    rows = [json.loads(line) for line in lines]
    mixed = write_jsonl(tmp_path / "mixed.jsonl", *rows[:3], *({"instruction": row["instruction"]} for row in rows[3:]))
    own = {"model_name_or_path": bundled.MODEL, "distill_text": handbook, "dataset": mixed}
    return quick_settings | own | {"max_length": 48, "num_virtual_tokens": 4}


# --- where it comes from ---


@pytest.mark.parametrize("base", [random_bloom, *(functools.partial(random_decoder, name) for name in ("qwen3", "gemma2"))])
def test_a_text_is_read_in_pieces_within_the_tokens_of_a_pass(base):
    """Gemma 2's window of 8 tokens reaches over the edges of the pieces of 5."""
    model, ids = base(), torch.randint(4, 99, (23,)).tolist()
    sizes = []
    model.get_decoder().register_forward_pre_hook(
        lambda module, arguments, options: sizes.append(len((arguments or [options["input_ids"]])[0][0])), with_kwargs=True
    )
    whole, pieces = read_pairs(model, ids, 23), read_pairs(model, ids, 5)
    assert sizes == [23, 5, 5, 5, 5, 3] and whole.shape[3] == 23
    assert relative(pieces, whole) < 1e-5


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "cohere"])
def test_pairs_read_at_positions_that_end_before_the_row_continue_as_the_text_does(family):
    """A row that begins at position 4 attends to 11 pairs as it does at position 11, behind the text."""
    model, ids = random_decoder(family), torch.randint(4, 99, (16,))
    pairs = read_pairs(model, ids[:11].tolist(), 100, first_position=4 - 11)
    positions = torch.arange(4, 9).unsqueeze(0)
    moved = model(ids[None, 11:], position_ids=positions, **{CACHE: prefix_cache([pairs])[0]}).logits
    assert relative(moved, model(ids[None]).logits[:, 11:]) < 1e-5
    keys, kept = (x[:, 0] for x in (pairs, read_pairs(model, ids[:11].tolist(), 100)))
    assert relative(keys, kept) > 0.1


@pytest.mark.parametrize("base", [random_bloom, functools.partial(random_decoder, "qwen3")])
def test_a_start_takes_the_first_pairs_or_pairs_at_even_steps(base):
    model, ids = base(), torch.randint(4, 99, (10,)).tolist()
    assert torch.equal(start_pairs(model, ids, 3), read_pairs(model, ids[:3], 10))
    chunks = start_pairs(model, ids, 4, "chunks", max_tokens=3)
    assert relative(chunks, read_pairs(model, ids, 10, first_position=4 - 10)[:, :, :, [0, 2, 5, 7]]) < 1e-5
    # A shorter text is repeated.
    assert torch.equal(start_pairs(model, ids, 12, "chunks"), read_pairs(model, ids + ids[:2], 12))


def test_a_teacher_answers_as_the_base_does_with_the_text_in_front(tokenizer):
    base = random_bloom(initializer_range=0.3)
    ids = text_tokens(tokenizer, TEXT)
    teacher = Teacher(read_pairs(base, ids, 100), ids, {"sha256": ""})
    questions = [f"{number}加3等于多少？" for number in range(5)] + ["很长" * 60]
    row = {"input": "", "output": "", "system": "", "history": [], "weights": []}
    rows = Dataset.from_list([row | {"instruction": question} for question in questions])
    rows = rows.add_item(row | {"instruction": "一？", "output": "二"})
    (answered,), answers = answer_rows([rows], teacher, base, tokenizer, None, 40, 100, None)
    assert len(answers.texts) == 6 and answered["output"][6] == "二" and len({*answers.texts}) > 2
    for question, answer in zip(questions[:5], answers.texts, strict=False):
        prompt = tokenizer(prompt_of(question)).input_ids
        text = torch.tensor([ids + prompt])
        new = base.generate(text, do_sample=False, max_new_tokens=40 - 1 - len(prompt))[0, text.shape[1] :]
        assert answer == tokenizer.decode(new, skip_special_tokens=True).strip()
    # Kept answers are taken, if they are to the same questions, by the same teacher.
    kept = answers._replace(texts=list("abcdef"))
    (again,), _ = answer_rows([rows], teacher, base, tokenizer, None, 40, 100, kept)
    assert again["output"][:] == [*"abcdef", "二"]
    other = teacher._replace(record={"sha256": "x"})
    for changed in (
        (rows, other, kept),
        (rows.select(range(5)), teacher, kept),
        (rows, teacher, kept._replace(texts=["a"])),
    ):
        (again,), _ = answer_rows([changed[0]], changed[1], base, tokenizer, None, 40, 100, changed[2])
        assert again["output"][:5] == answers.texts[:5]


# --- what a run makes of it ---


def test_a_prefix_that_is_the_texts_pairs_has_nothing_to_learn(distilling, quick_settings, tokenizer, tmp_path):
    """The start of the untrained run is the teacher itself, and a shorter start is not."""
    start = {"prefix_init": "text", "prefix_projection": False, "eval_dataset": distilling["dataset"], "max_steps": 1}
    start |= {"learning_rate": 0.0, "max_tokens_per_batch": 60}
    length = len(text_tokens(tokenizer, TEXT))
    train(TrainConfig(**distilling | start | {"num_virtual_tokens": length, "eval_exact_match": True}))
    frozen, line, last = [line for line in metrics_of(distilling["output_dir"]) if "loss" in line or "eval_loss" in line]
    # The loss is a mean over labels of sums over 4,096 tokens; float32 rounds each summand to 6e-8 of it.
    assert frozen["eval_loss"] > 1e-3 and abs(line["loss"]) < 1e-5 and abs(last["eval_loss"]) < 1e-5
    # 9 of 12 answers are the teacher's own. The rows' own three are others than the base gives.
    assert "eval_perplexity" not in frozen and last["eval_exact_match"] == 0.75
    assert "teacher_exact_match" not in frozen
    # Where all rows bring their answers, the teacher's exact match is told, too.
    lines = Path(quick_settings["dataset"]).read_text("utf-8").splitlines()[:12]
    answered = write_jsonl(tmp_path / "answered.jsonl", *map(json.loads, lines))
    whole = {name: answered for name in ("dataset", "eval_dataset")} | {"overwrite_output_dir": True}
    train(TrainConfig(**distilling | start | whole | {"num_virtual_tokens": length, "eval_exact_match": True}))
    frozen, *_, last = [line for line in metrics_of(distilling["output_dir"]) if "eval_loss" in line]
    assert frozen["teacher_exact_match"] == last["eval_exact_match"]
    said = f"teacher's exact match on held-out rows: {last['eval_exact_match']:.4g}."
    assert said in Path(distilling["output_dir"], CARD_FILE).read_text("utf-8")
    short = {"num_virtual_tokens": 4, "overwrite_output_dir": True}
    losses = {}
    for init_from in ("first", "chunks"):
        train(TrainConfig(**distilling | start | short | {"init_from": init_from}))
        losses[init_from] = metrics_of(distilling["output_dir"])[1]["loss"]
    assert min(losses.values()) > 1e-4 and losses["first"] != losses["chunks"]


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_steps_are_those_of_a_plain_twin_in_float64(monkeypatch, alpha):
    """plain.py's loop, whose loss is written down with transformers' own forward after the text and after the prefix."""
    # transformers computes this softmax in float32, whatever the model's type is.
    monkeypatch.setattr(modeling_bloom.F, "softmax", lambda scores, dim, dtype: scores.softmax(dim))
    monkeypatch.setattr(plain, "DEVICE", "cpu")
    base, text = random_bloom(dtype=torch.float64), torch.randint(4, 99, (1, 17))
    examples = examples_of([7, 12, 30, 9, 5, 21] * 4)

    def loss_of(base, prefix, ids, labels):
        answer = labels[0, 1:] != -100
        after_text = base(torch.cat((text, ids), dim=1)).logits[0, text.shape[1] : -1]
        after_prefix = base(ids, plain.as_past_key_values(prefix, base)).logits[0, :-1]
        theirs, ours = (logits[answer].log_softmax(-1) for logits in (after_text, after_prefix))
        own = F.nll_loss(ours, labels[0, 1:][answer], reduction="sum")
        return (1 - alpha) * F.kl_div(ours, theirs, reduction="sum", log_target=True) + alpha * own

    monkeypatch.setattr(plain, "loss_of", loss_of)
    torch.manual_seed(0)
    twin = plain.new_encoder(base).double()
    torch.manual_seed(0)
    ours = plain.new_encoder(base).double()
    history = plain.train(base, twin, [tuple(torch.tensor([x]) for x in vars(example).values()) for example in examples])

    rows = Dataset.from_list([vars(example) for example in examples])
    steps = Steps(rows, plain.ACCUMULATION, total=3, max_tokens=60, seed=plain.SEED)
    optimizer, schedule = make_optimizer(ours, 0.0), make_schedule("linear", 0, 3)
    state = TrainingState(ours, optimizer, schedule, plain.MAX_GRAD_NORM, loss_scaling=False)
    state.progress.peak_learning_rate = plain.LEARNING_RATE
    objective = Distillation(base, read_pairs(base, text[0].tolist(), 5), alpha)
    for step, (loss, grad_norm) in zip(steps, history, strict=True):
        _, our_loss, our_norm = optimizer_step(objective, state, step)
        # transformers' GELU has the constant sqrt(2 / pi) with 8 digits.
        assert our_loss.item() == pytest.approx(loss, rel=1e-7) and our_norm.item() == pytest.approx(grad_norm, rel=1e-6)
    assert len(history) == 3 and relative(ours.bake(), twin.bake()) < 1e-6


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_longer_prefix_becomes_a_shorter_one(tuned, tuned_model, tokenizer, tmp_path, rows_file, precision, capsys):
    """From the 16 tokens of `short` to 6: the divergence on held-out rows falls, and answers become the teacher's."""
    asked = [{"instruction": json.loads(line)["instruction"]} for line in Path(rows_file).read_text("utf-8").splitlines()]
    flags = {"dataset": write_jsonl(tmp_path / "asked.jsonl", *asked), "eval_fraction": 0.2, "eval_exact_match": True}
    flags |= {"distill_prefix": str(tuned["short"]), "num_virtual_tokens": 6, "learning_rate": 1e-2, "max_steps": 12}
    flags |= {"eval_steps": 12, "output_dir": str(tmp_path / "out"), "precision": precision, "device": "cpu"}
    train(TrainConfig(**flags))
    frozen, last = [line for line in metrics_of(tmp_path / "out") if "eval_loss" in line]
    assert last["eval_loss"] < 0.6 * frozen["eval_loss"]
    out = capsys.readouterr().out
    assert "the teacher answers 40 rows that have no output; exact match compares with its answers" in out
    assert "(divergence from the teacher), exact match" in out
    answers = json.loads((tmp_path / "out" / ANSWERS_FILE).read_text("utf-8"))["texts"]
    if precision == "fp32":
        prompts = [prompt_of(row["instruction"]) for row in asked]
        expected = complete(tuned_model, tokenizer, prompts, prefix_name="short", max_new_tokens=64, do_sample=False)
        assert sorted(answers) == sorted(expected)


def test_a_resumed_distillation_has_the_same_bits_and_does_not_ask_again(distilling, tmp_path, monkeypatch, capsys):
    distilling |= {"max_steps": 4, "save_steps": 2, "eval_dataset": distilling["dataset"], "eval_steps": 2}
    distilling |= {"prefix_init": "text", "init_from": "chunks", "freeze_first_token": True, "learning_rate": None}
    folder = Path(distilling["output_dir"])
    train(TrainConfig(**distilling))
    with monkeypatch.context() as patch:
        patch.setattr(teachers, "answer_prompts", lambda *_: pytest.fail("the teacher was asked again"))
        earlier = {"resume_from_checkpoint": str(folder / "checkpoint-2.safetensors"), "output_dir": str(tmp_path / "again")}
        train(TrainConfig(**distilling | earlier))
    assert_same_run(tmp_path / "again", folder)
    assert (tmp_path / "again" / ANSWERS_FILE).read_bytes() == (folder / ANSWERS_FILE).read_bytes()
    # Another text is refused, and so is another kind of teacher; where the text lies does not matter.
    other = tmp_path / "other.md"
    other.write_text(TEXT + "。", "utf-8")
    with pytest.raises(UserError, match="another --distill_text"):
        train(TrainConfig(**distilling | LATEST | {"distill_text": str(other)}))
    with pytest.raises(UserError, match="--distill_text, and now without"):
        changed = {"distill_text": None, "distill_prefix": distilling["output_dir"], "init_text": "问"}
        train(TrainConfig(**distilling | LATEST | changed))
    other.write_text(TEXT, "utf-8")
    train(TrainConfig(**distilling | LATEST | {"distill_text": str(other)}))
    assert "the run is over already: it is at step 4" in capsys.readouterr().out


@pytest.mark.parametrize("projection", [True, False])
@pytest.mark.parametrize("init_from", ["first", "chunks"])
def test_a_start_from_the_distilled_text_may_keep_its_first_token(distilling, tmp_path, tokenizer, projection, init_from):
    start = {"prefix_init": "text", "init_from": init_from, "freeze_first_token": True, "prefix_projection": projection}
    train(TrainConfig(**distilling | start | {"weight_decay": 0.1}))
    base, _ = load_base(distilling["model_name_or_path"], torch.float32, torch.device("cpu"))
    begun, (ended, _) = start_pairs(base, text_tokens(tokenizer, TEXT), 4, init_from), load_prefix(distilling["output_dir"])
    assert torch.equal(ended[:, :, :, 0], begun[:, :, :, 0])
    assert (ended != begun)[:, :, :, 1:].flatten(0, 2).any(-1).any(0).all()
    # A run that goes on from it keeps it, too.
    again = {"prefix_from": distilling["output_dir"], "output_dir": str(tmp_path / "again")}
    train(TrainConfig(**distilling | again))
    further, _ = load_prefix(tmp_path / "again")
    assert torch.equal(further[:, :, :, 0], begun[:, :, :, 0]) and not torch.equal(further, ended)
    assert "first_token" in load_file(tmp_path / "again" / ENCODER_FILE)
    assert torch.equal(load_encoder(tmp_path / "again")[0].bake(), further)


def test_files_say_what_was_distilled(distilling, tmp_path, tokenizer):
    train(TrainConfig(**distilling | {"max_steps": 1}))
    folder = Path(distilling["output_dir"])
    with safe_open(folder / ADAPTER_FILE, framework="pt") as file:
        record = json.loads(file.metadata()["distilled"])
    expected = {"kind": "text", "name": "local:handbook.md", "tokens": len(text_tokens(tokenizer, TEXT))}
    assert {name: record[name] for name in expected} == expected and len(record["sha256"]) == 64
    settings = json.loads((folder / CONFIG_FILE).read_text("utf-8"))
    assert settings["distilled"] == record and settings["distill_text"] == "local:handbook.md"
    card = (folder / CARD_FILE).read_text("utf-8")
    assert f"the text handbook.md in front of each row ({record['tokens']} tokens, sha256 {record['sha256']})" in card
    # PrefixBloom keeps the record; a run whose teacher is that prefix has its own.
    model = PrefixBloom(load_base(distilling["model_name_or_path"], torch.float32, torch.device("cpu"))[0])
    model.attach("own", load_prefix(folder))
    model.save_pretrained(tmp_path / "prefixes")
    assert load_prefix(tmp_path / "prefixes" / "own").recorded_base["distilled"] == record
    more = {"distill_text": None, "distill_prefix": str(folder), "output_dir": str(tmp_path / "more"), "max_steps": 1}
    more |= {"dataset": str(write_jsonl(tmp_path / "answered.jsonl", {"instruction": "a", "output": "b"}))}
    train(TrainConfig(**distilling | more | {"distill_alpha": 0.25, "num_virtual_tokens": 2}))
    card = (tmp_path / "more" / CARD_FILE).read_text("utf-8")
    assert "the prefix out in front of each row (4 tokens" in card and "0.25 of the training loss" in card
    assert not (tmp_path / "more" / ANSWERS_FILE).exists()
    # A run without a teacher says nothing of one.
    train(TrainConfig(**distilling | more | {"distill_prefix": None, "overwrite_output_dir": True}))
    assert "Teacher" not in (tmp_path / "more" / CARD_FILE).read_text("utf-8")
    assert "distilled" not in load_prefix(tmp_path / "more").recorded_base


def test_what_cannot_be_distilled_is_one_line_before_any_training(distilling, tmp_path, tokenizer, rows_file):
    def refused(match, **changes):
        with pytest.raises(UserError, match=match):
            train(TrainConfig(**distilling | changes))
        assert not Path(distilling["output_dir"]).exists()

    def text(content):
        path = tmp_path / "text.md"
        path.write_bytes(content)
        return str(path)

    refused(r"--distill_text .*text\.md: is empty", distill_text=text(b"\xef\xbb\xbf \n"))
    refused(r"--distill_text .*text\.md: is not UTF-8 text: .*iconv -f GB18030", distill_text=text(TEXT.encode("gbk")))
    refused(r"mixed\.jsonl: 9 of 12 rows have no output, and --distill_alpha 0\.5 mixes in the", distill_alpha=0.5)
    refused("are not known as question", dataset=write_jsonl(tmp_path / "a.jsonl", {"frage": "a"}))
    base = save_decoder(tmp_path / "llama", tokenizer, "llama")
    long = r"long.md: has 465 tokens; with rows of --max_length 48 that is more than the 512 positions of the base"
    (tmp_path / "long.md").write_text("好 " * 232 + "好", "utf-8")
    refused(long, distill_text=str(tmp_path / "long.md"), model_name_or_path=base)
    other = tmp_path / "other"
    train(
        TrainConfig(
            **distilling | {"distill_text": None, "dataset": str(rows_file), "output_dir": str(other), "max_steps": 0}
        )
    )
    prefix = {"distill_text": None, "distill_prefix": str(other)}
    refused("other: a prefix for 4 layers of 6 x 32, but .*llama has", **prefix, model_name_or_path=base)
    random_bloom(hidden_size=192, n_layer=4).save_pretrained(tmp_path / "same-shape")
    tokenizer.save_pretrained(tmp_path / "same-shape")
    refused("not the same weights; use the right base", **prefix, model_name_or_path=str(tmp_path / "same-shape"))
    refused("nowhere: no such folder", **prefix | {"distill_prefix": str(tmp_path / "nowhere")})


def test_a_text_begins_with_bos_where_the_tokenizer_begins_so(distilling, tokenizer, monkeypatch):
    """And so does the start that is taken from it: BOS is where such a base sends spare attention."""
    seen = []
    monkeypatch.setattr(teachers, "beginning_of_text", lambda tokenizer: [7])
    real = teachers.read_pairs
    monkeypatch.setattr(teachers, "read_pairs", lambda base, ids, *more: (seen.append(ids), real(base, ids, *more))[1])
    train(TrainConfig(**distilling | {"max_steps": 0}))
    assert seen == [[7, *text_tokens(tokenizer, TEXT)]]
