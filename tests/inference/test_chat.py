import io
import json
import os
import pty
import re
import select
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from answers import FRANCE, run_infer
from checkout import ROOT
from launching import TRAIN
from rows import write_jsonl

from prefix_tuning import bundled
from prefix_tuning.cli import parse_infer_config
from prefix_tuning.data.readers import load_rows
from prefix_tuning.data.rows import tokenize
from prefix_tuning.data.templates import prompt_ids, talk_of
from prefix_tuning.files.prefixes import load_encoder, save_adapter
from prefix_tuning.inference.ask import Answerer
from prefix_tuning.inference.run import decoding_options, names_with_history, open_model
from prefix_tuning.settings import MAX_LENGTH


class Terminal:
    """A program on a pseudo-terminal, as a person would use it."""

    def __init__(self, *flags, env=None):
        self.pid, self.handle = pty.fork()
        if self.pid == 0:
            os.environ.update(env or {})
            os.chdir(ROOT)
            os.execv(sys.executable, [sys.executable, "infer.py", *map(str, flags)])
        self.seen, self.exit_code = "", None

    def wait_for(self, text, seconds=600):
        """Reads until `text` comes, and returns what came up to its end."""
        deadline, raw = time.monotonic() + seconds, self.seen.encode()
        while text.encode() not in raw:
            if not select.select([self.handle], [], [], max(0, deadline - time.monotonic()))[0]:
                raise AssertionError(f"no {text!r} in {raw.decode(errors='replace')!r}")
            try:
                raw += os.read(self.handle, 65536)
            except OSError as error:  # the program has ended
                raise AssertionError(f"no {text!r} in {raw.decode(errors='replace')!r}") from error
        found, _, rest = raw.partition(text.encode())
        self.seen = rest.decode(errors="replace")
        return (found + text.encode()).decode()

    def wait_for_a_key(self):
        """Returns once the program's main thread sleeps, as it does only to wait for a key."""
        while Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0] != "S":
            pass

    def send(self, text):
        os.write(self.handle, text.encode())

    def ask(self, text):
        self.send(text + "\r")
        return self.wait_for("\n> ")

    def ends_with(self):
        self.exit_code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.exit_code

    def kill(self):
        """Ends the program, which would go on answering after a test that failed."""
        if self.exit_code is None:
            os.kill(self.pid, signal.SIGKILL)
            self.ends_with()
        os.close(self.handle)


@pytest.fixture(scope="module")
def endless(tmp_path_factory):
    """The bundled model, but without an end to its answers."""
    folder = tmp_path_factory.mktemp("endless") / "model"
    shutil.copytree(bundled.resolve(bundled.MODEL), folder)
    settings = json.loads((folder / "generation_config.json").read_text("utf-8"))
    (folder / "generation_config.json").write_text(json.dumps(settings | {"suppress_tokens": [2]}), "utf-8")
    return folder


@pytest.fixture(scope="module")
def terminals(prefixes, endless):
    """Two chats, which start at the same time: without a locale, and with a base whose answers do not end."""
    flags = ["--chat", *prefixes]
    long = ["--model_name_or_path", endless, "--max_new_tokens", 100_000, "--max_length", 200_000]
    started = [
        Terminal(*flags, env={"LC_ALL": "xx_XX.UTF-8", "PYTHONUTF8": "0"}),  # no such locale: ASCII
        Terminal(*flags, *long, env={"NO_COLOR": "1"}),
    ]
    yield started
    for terminal in started:
        terminal.kill()


def test_a_chat(terminals):
    terminal, _ = terminals
    assert "base, short, sentence: answering with short" in terminal.wait_for("> ")
    assert "巴黎" in terminal.ask(FRANCE)
    assert "the conversation is forgotten" in terminal.ask("/reset")
    # A question typed with a gap, mended with the arrow keys: 法国的首都是|里？
    assert "巴黎" in terminal.ask("法国的首都是里？" + "\x1b[D" * 2 + "哪" + "\x1b[C")
    terminal.ask("/reset")
    # A wide character deleted, and the line before called up again.
    assert "巴黎" in terminal.ask("法国的首都是哪里？呢\x7f")
    terminal.ask("/reset")
    assert "巴黎" in terminal.ask("\x1b[A\x1b[A")
    terminal.ask("/reset")
    assert "there are base, short, sentence; now short" in terminal.ask("/prefix")
    assert "there are base, short, sentence; now short" in terminal.ask("/prefix nothing")
    assert "answering with sentence" in terminal.ask("/prefix sentence")
    assert re.search("法国的首都是.+。", terminal.ask(FRANCE).split("\n", 1)[1])
    terminal.ask("/reset")
    assert "comparing: on" in terminal.ask("/compare")
    compared = terminal.ask(FRANCE)
    assert compared.count("\033[33mbase ") == compared.count("\033[36mshort ") == 1  # coloured
    assert "comparing: off" in terminal.ask("/compare")
    assert "/reset        forget" in terminal.ask("/help")
    assert "/reset        forget" in terminal.ask("/what")
    terminal.send("half a question")
    terminal.wait_for("question")
    terminal.wait_for_a_key()  # a Ctrl-C just before readline waits is noticed only with the next key (CPython)
    terminal.send("\x03")
    terminal.wait_for("> ")
    assert "answering with base" in terminal.ask("/prefix base")
    terminal.send("/quit\r")
    assert terminal.ends_with() == 0


def test_ctrl_c_stops_an_answer_and_ctrl_d_the_chat(terminals):
    _, terminal = terminals
    terminal.wait_for("> ")
    terminal.send(FRANCE + "\r")
    terminal.wait_for("巴黎")
    terminal.send("\x03")
    assert "stopped" in terminal.wait_for("\n> ")
    terminal.ask("/compare")
    terminal.send(FRANCE + "\r")
    assert "\033[3" not in terminal.wait_for("base  ")
    terminal.send("\x03")
    terminal.wait_for("\n> ")
    terminal.send("\x04")
    assert terminal.ends_with() == 0


def open_chat(*flags):
    from prefix_tuning.inference.chat import Chat

    config = parse_infer_config(["--chat", *map(str, flags)])
    model, tokenizer = open_model(config.named_prefixes(), config, torch.device("cpu"))
    answerer = Answerer(model, tokenizer, decoding_options(config), config.seed)
    return Chat(answerer, config.max_length or MAX_LENGTH, config.compare, names_with_history(config))


def test_the_conversation_is_kept_within_max_length(tuned, tokenizer, capsys):
    chat = open_chat("--history", "--prefix", tuned["short"], "--max_length", 80, "--max_new_tokens", 20)
    asked: list[str] = []
    for number in range(4):
        chat.answer(f"{number}加5等于多少？")
        asked += [f"{number}加5等于多少？", capsys.readouterr().out.removesuffix("\n")]
    assert chat.history == asked
    prompt = chat.prompt("？", chat.history, "short")
    kept = prompt.count(tokenizer.eos_token_id)
    assert 0 < kept < 4
    turns = zip(asked[-2 * kept :: 2], asked[1 - 2 * kept :: 2], strict=True)
    history = "".join(f"Human: {question}\n\nAssistant: {answer}</s>" for question, answer in turns)
    assert tokenizer.decode(prompt) == history + "Human: ？\n\nAssistant: "
    assert len(prompt) <= 60
    chat.answer("长" * 60)
    assert len(chat.history) == 8 and "too long" in capsys.readouterr().err


def test_the_model_sees_a_conversation_as_the_tokens_of_a_talk_in_training(tmp_path, tuned, tokenizer):
    chat = open_chat("--prefix", tuned["short"])
    history = ["法国的首都是哪里？", "巴黎", "</s>是什么？", " a</s>\n"]
    prompt, last = chat.prompt("再见", history, "short"), "好"
    said = zip(["user", "assistant"] * 3, [*history, "再见", last], strict=True)
    path = write_jsonl(tmp_path / "a.jsonl", {"messages": [{"role": role, "content": text} for role, text in said]})
    (talk,) = tokenize(load_rows(path, TRAIN), tokenizer, 256)["input_ids"]
    assert talk == [*prompt, *tokenizer(last).input_ids, tokenizer.eos_token_id]
    assert prompt.count(tokenizer.eos_token_id) == 2
    chat.max_length = len(prompt) + chat.answerer.options["max_new_tokens"]  # it fits exactly
    assert chat.prompt("再见", history, "short") == prompt
    chat.max_length -= 1
    assert chat.prompt("再见", history, "short") == prompt[prompt.index(tokenizer.eos_token_id) + 1 :]


def chat_output(monkeypatch, capsys, lines, *flags):
    """What a chat prints to stdout, line by line, and to stderr, when these lines are typed."""
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    run_infer("--chat", *flags)
    captured = capsys.readouterr()
    return captured.out.splitlines(), captured.err


@pytest.fixture
def talker(tmp_path, tuned):
    """The prefix `sentence`, with files that record history in its training rows."""
    folder = tmp_path / "talker"
    shutil.copytree(tuned["sentence"], folder)
    encoder, base = load_encoder(folder)
    save_adapter(folder, encoder.bake(), encoder.config, base, history=True)
    return folder


ASKED = [FRANCE, "3加5等于多少？", "星期二用英语怎么说？", "德国的首都是哪里？"]


def test_a_prefix_that_has_seen_single_turns_is_asked_each_question_by_itself(monkeypatch, capsys, tuned):
    flags = ["--prefix", tuned["short"], "--precision", "fp32"]
    alone = []
    for question in ASKED:
        run_infer(question, *flags)
        alone.append(capsys.readouterr().out.removesuffix("\n"))
    answers, said = chat_output(monkeypatch, capsys, ASKED, *flags)
    assert answers == alone and answers[0] == "巴黎"
    assert said.count("each question is asked by itself: no conversation is on record among the training rows of short") == 1
    answers, said = chat_output(monkeypatch, capsys, ASKED, *flags, "--history")
    assert answers[0] == alone[0] and "by itself" not in said


def test_whether_the_conversation_is_read_depends_on_each_prefix(tuned, talker, tokenizer):
    flags = ["--prefix", f"short={tuned['short']}", "--prefix", f"talker={talker}", "--max_new_tokens", 20]
    chat = open_chat(*flags, "--precision", "fp32")
    assert chat.with_history == {"talker", "base"}
    assert open_chat(*flags, "--history").with_history == {"short", "talker", "base"}
    assert open_chat(*flags[:2]).with_history == set()  # then the base is asked as the prefix is
    chat.history = history = [FRANCE, "巴黎", "3加5等于多少？", "8"]
    chat.command("/compare")
    read = []
    hook = chat.model.transformer.word_embeddings.register_forward_pre_hook(lambda _, ids: read.append(ids[0].tolist()))
    chat.answer(ASKED[2])
    hook.remove()
    (alone,) = prompt_ids(tokenizer, [talk_of(ASKED[2])])
    (talk,) = prompt_ids(tokenizer, [talk_of(ASKED[2], history=history[:4])])
    assert [prompt for (prompt,) in read if len(prompt) > 1] == [talk, alone, talk]  # base, short, talker


def test_an_unanswered_question_does_not_enter_the_history(tuned, tokenizer, monkeypatch, capsys):
    chat = open_chat("--history", "--prefix", tuned["short"])
    chat.answer(FRANCE)
    kept = dict(chat.answerer.options)

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    chat.answerer.options = kept | {"stopping_criteria": [interrupt]}
    chat.command("/compare")  # the base answers first, so Ctrl-C comes before the answer of the prefix in use
    pipe = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", io.TextIOWrapper(pipe, encoding="utf-8"))
        chat.answer("3加5等于多少？")
        line = pipe.getvalue().decode()  # what has come without another flush
    assert line.startswith("base   ") and line.endswith("\n") and capsys.readouterr().err.endswith("stopped\n")
    assert chat.history == [FRANCE, "巴黎"]  # not once more the answer to the question before
    chat.command("/compare")
    chat.answerer.options = kept | {"max_new_tokens": 1, "forced_eos_token_id": tokenizer.eos_token_id}
    capsys.readouterr()
    chat.answer("3加5等于多少？")
    assert capsys.readouterr().out == "\n" and chat.history == [FRANCE, "巴黎"]


class Keys(io.StringIO):
    """What is typed, line by line; Ctrl-C drops a line that ends in ^C."""

    def readline(self, *_):
        line = super().readline()
        if line.endswith("^C\n"):
            raise KeyboardInterrupt
        return line


def test_the_prompt_and_the_shell_begin_a_new_line_after_ctrl_c_and_ctrl_d(monkeypatch, capsys, tuned):
    chat = open_chat("--history", "--prefix", tuned["short"])
    capsys.readouterr()
    monkeypatch.setattr("sys.stdin", Keys(f"half a question^C\n{FRANCE}\n"))
    chat.run()
    out, err = capsys.readouterr()
    assert out == "巴黎\n" and err.endswith("/help lists the commands\n\n\n")
    assert chat.history == [FRANCE, "巴黎"]


def test_a_question_that_begins_with_a_slash_can_be_asked(monkeypatch, capsys, tuned):
    flags = ["--prefix", tuned["short"]]
    run_infer("/etc是什么？", *flags)
    expected = capsys.readouterr().out.splitlines()
    lines = ["/etc是什么？", "//etc是什么？", "/compare x", "/reset x", "/help"]
    answers, said = chat_output(monkeypatch, capsys, lines, *flags)
    assert answers == expected
    for line in (lines[0], *lines[2:4]):
        assert f"{line} is no command; if it is a question, ask it with one more slash: /{line}\n" in said
    assert said.count("//QUESTION    ask a question that begins with /") == 4 and said.count("is no command") == 3
