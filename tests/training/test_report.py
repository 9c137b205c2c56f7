"""What a finished run shows: model card, curves, TensorBoard, the hub (a stand-in for it, on this machine)."""

import base64
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch
from checkout import ROOT
from forks import Fork
from launching import start_process
from models import save_decoder
from peft import AutoPeftModelForCausalLM, PeftConfig
from runs import metrics_of
from safetensors.torch import load_file

from prefix_tuning import bundled, load_prefix
from prefix_tuning.cli import parse_train_config
from prefix_tuning.errors import UserError
from prefix_tuning.files.names import ADAPTER_FILE, CARD_FILE, PLOT_FILE, SEARCH_FILE
from prefix_tuning.model.encoder import flatten
from prefix_tuning.training.output import create_repository, plot_curves, plot_search, what_was_learnt, write_card
from prefix_tuning.training.run import train
from prefix_tuning.training.settings import TrainConfig

pytestmark = pytest.mark.usefixtures("curves")
FLAGS = ["--max_steps", "4", "--logging_steps", "1", "--eval_steps", "2", "--save_steps", "2", "--eval_fraction", "0.2"]
FLAGS += ["--learning_rate", "0.01"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory, rows_file):
    folder = tmp_path_factory.mktemp("finished") / "out"
    flags = ["--dataset", str(rows_file), "--output_dir", str(folder)]
    train(parse_train_config([*FLAGS, *flags]))
    return folder


def test_the_card_says_what_was_trained_and_how_good_it_is(finished):
    front, card = (finished / "README.md").read_text("utf-8").removeprefix("---\n").split("\n---\n")
    assert "pipeline_tag: text-generation" in front and "library_name: peft" in front
    assert "# license: " in front and "\nlicense:" not in front  # the user's to choose
    assert "base_model" not in front  # a bundled model is no name of the hub
    first, *_, last = [record for record in metrics_of(finished) if "eval_loss" in record]
    assert f"| frozen base | {first['eval_loss']:.4g} | {first['eval_perplexity']:.4g} |" in card
    assert f"| this prefix, step 4 | {last['eval_loss']:.4g} |" in card
    assert "rows.jsonl, 32 rows; held out: 8 others" in card and "4 steps of 8 rows" in card
    assert f"the prefix itself has {load_file(finished / ADAPTER_FILE)['prompt_embeddings'].numel():,} numbers" in card
    assert "PeftModel.from_pretrained" in card and "infer.py" in card
    assert str(finished.parent) not in card and PeftConfig.from_pretrained(finished).peft_type == "PREFIX_TUNING"


def test_the_card_says_how_peft_finds_a_base_that_is_not_on_the_hub(finished, tmp_path):
    folder = shutil.copytree(finished, tmp_path / "copy")
    assert "Write the path of the base there, as `base_model_name_or_path`" in (folder / "README.md").read_text("utf-8")
    description = json.loads((folder / "adapter_config.json").read_text("utf-8"))
    description["base_model_name_or_path"] = bundled.resolve(bundled.MODEL)
    (folder / "adapter_config.json").write_text(json.dumps(description), "utf-8")
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert torch.equal(model.prompt_encoder["default"].embedding.weight, flatten(load_prefix(folder).tensor))


def test_a_readme_of_the_users_is_not_replaced(tmp_path, rows_file):
    (tmp_path / "README.md").write_text("# Mine", "utf-8")
    with pytest.raises(UserError, match=r"holds a README\.md"):
        train(parse_train_config([*FLAGS, "--dataset", str(rows_file), "--output_dir", str(tmp_path)]))
    assert (tmp_path / "README.md").read_text("utf-8") == "# Mine"


def test_a_base_of_the_hub_stands_in_the_cards_front(finished, tmp_path):
    settings = json.loads((finished / "training_config.json").read_text("utf-8"))
    settings |= {"model_name_or_path": "Langboat/bloom-1b4-zh", "eval_rows": 1200}
    (tmp_path / "training_config.json").write_text(json.dumps(settings), "utf-8")
    (tmp_path / "metrics.jsonl").write_text((finished / "metrics.jsonl").read_text("utf-8"), "utf-8")
    write_card(tmp_path)
    card = (tmp_path / "README.md").read_text("utf-8")
    assert "\nbase_model: Langboat/bloom-1b4-zh\n" in card and 'from_pretrained("Langboat/bloom-1b4-zh")' in card
    assert "AutoPeftModel" not in card  # it finds that base
    assert "held out: 1,200 others" in card


def test_the_card_tells_of_the_best_prefix_if_that_was_saved(finished, tmp_path):
    lines = metrics_of(finished)
    for line, loss in zip([line for line in lines if "eval_loss" in line][1:], (1.25, 1.75), strict=True):
        line["eval_loss"] = loss  # of steps 2 and 4
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    settings = json.loads((finished / "training_config.json").read_text("utf-8"))
    for save_best, shown in ((True, "| this prefix, step 2 | 1.25 |"), (False, "| this prefix, step 4 | 1.75 |")):
        (tmp_path / "training_config.json").write_text(json.dumps(settings | {"save_best": save_best}), "utf-8")
        write_card(tmp_path)
        card = (tmp_path / "README.md").read_text("utf-8")
        assert shown in card and card.count("| this prefix") == card.count("| frozen base") == 1
    rest = [line for line in lines if not line.get("frozen_base")]  # as where metrics.jsonl had lost its first lines
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rest), "utf-8")
    write_card(tmp_path)
    card = (tmp_path / "README.md").read_text("utf-8")
    assert "| this prefix, step 4 | 1.75 |" in card and "| frozen base" not in card


def test_curves_are_drawn_where_matplotlib_is_installed(finished, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    (tmp_path / "metrics.jsonl").write_text((finished / "metrics.jsonl").read_text("utf-8"), "utf-8")
    plot_curves(tmp_path)
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
    assert "![loss over steps](training.png)" in (finished / "README.md").read_text("utf-8")
    (tmp_path / "training.png").unlink()
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    plot_curves(tmp_path)
    assert not (tmp_path / "training.png").exists()


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are saved as pictures, by their file's name."""
    figure = pytest.importorskip("matplotlib.figure").Figure
    found, save = {}, figure.savefig

    def keep(self, file, **options):
        found[Path(file).name] = self
        save(self, file, **options)

    monkeypatch.setattr(figure, "savefig", keep)
    return found


def test_the_curves_are_the_figures_of_metrics(tmp_path, drawn):
    records = [{"step": 0, "frozen_base": True, "eval_loss": 3.0, "eval_exact_match": 0.0}, {"step": 2, "loss": 2.5}]
    records += [{"step": 4, "loss": None}, {"step": 4, "eval_loss": 2.0, "eval_exact_match": 0.5}, {"step": 6, "loss": 1.5}]
    found = {"rates": [1e-2, 1e-3, 1e-1], "losses": [2.0, 3.0, None], "steps": 8, "rate": 7e-3}
    records += [{"learning_rate_search": found}, {"summary": True}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    plot_curves(tmp_path)
    plot_search(tmp_path)
    left, right = drawn["training.png"].axes
    lines = {line.get_label(): [tuple(point) for point in line.get_xydata().tolist()] for line in left.lines}
    assert lines == {"training": [(2, 2.5), (6, 1.5)], "held out": [(0, 3), (4, 2)], "exact match": [(0, 0), (4, 0.5)]}
    assert (left.get_xlabel(), left.get_ylabel(), left.get_yscale()) == ("step", "loss (nats per token)", "log")
    assert (right.get_ylabel(), right.get_ylim()) == ("exact match", (0, 1))
    assert left.lines[2].get_transform() == right.transData  # on its own scale
    assert [text.get_text() for text in left.get_legend().get_texts()] == [*lines]
    (axes,) = drawn["learning_rate.png"].axes
    trials, taken = axes.lines
    assert trials.get_xydata().tolist() == [[1e-3, 3], [1e-2, 2]] and list(taken.get_xdata()) == [7e-3, 7e-3]
    assert (axes.get_xscale(), axes.get_xlabel()) == (
        "log",
        "learning rate",
    ) and "at the end of a trial" in axes.get_ylabel()
    assert axes.get_legend().get_texts()[0].get_text() == "taken: 0.007"
    for name, pixels in (("training.png", (960, 540)), ("learning_rate.png", (720, 480))):
        content = (tmp_path / name).read_bytes()
        assert content.startswith(b"\x89PNG") and struct.unpack(">II", content[16:24]) == pixels


def test_without_figures_there_is_no_picture(tmp_path, drawn):
    (tmp_path / "metrics.jsonl").write_text('{"summary": true}\n', "utf-8")
    for plot, name in ((plot_curves, PLOT_FILE), (plot_search, SEARCH_FILE)):
        (tmp_path / name).write_bytes(b"of an earlier run")
        plot(tmp_path)
        assert not drawn and not (tmp_path / name).exists()


def test_tensorboard_shows_the_metrics_and_goes_on_with_the_run(tmp_path, rows_file):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = [*FLAGS, "--dataset", str(rows_file), "--output_dir", str(tmp_path / "out")]
    flags += ["--report_to", "tensorboard"]
    for more in ([], ["--resume_from_checkpoint", str(tmp_path / "out" / "checkpoint-2.safetensors")]):
        train(parse_train_config([*flags, *more]))
        board = EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
        for name in ("loss", "eval_loss", "learning_rate", "grad_norm"):
            expected = [(record["step"], record[name]) for record in metrics_of(tmp_path / "out") if name in record]
            shown = [(event.step, event.value) for event in board.Scalars(name)]
            assert [step for step, _ in shown] == [step for step, _ in expected]
            assert [value for _, value in shown] == pytest.approx([value for _, value in expected], rel=1e-6)


def test_tensorboard_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        parse_train_config(["--report_to", "tensorboard"])
    assert parse_train_config([]).report_to == "none"


class Refusing(BaseHTTPRequestHandler):
    """Answers each upload with the server's `status`."""

    def log_message(self, *_):
        pass

    def do_POST(self):
        self.send_response(self.server.status)
        self.send_header("Content-Length", "0")
        self.end_headers()


def test_only_a_hub_that_knows_nobody_asks_for_a_login(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever).start()
        for server.status, hint in ((401, "log in with `hf auth login`"), (403, "log in with"), (500, "try again later")):
            with pytest.raises(UserError, match=f"^--push_to_hub prefix: .*; {hint}.*, or leave the flag out$"):
                create_repository("prefix")
        server.shutdown()
    with pytest.raises(UserError, match=r"refused; try again later"):  # no hub at all
        create_repository("prefix")


class Hub(BaseHTTPRequestHandler):
    """The part of the hub that an upload of small files talks to."""

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        hub = self.server
        if self.path == "/api/repos/create":
            hub.created.append(json.loads(body)["name"])
            self.answer({"url": f"{hub.url}/me/{hub.created[-1]}", "id": f"me/{hub.created[-1]}"})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            self.answer(
                {"files": [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in files]}
            )
        elif self.path.endswith("/commit/main") and not hub.broken:
            for line in body.decode().splitlines():
                operation = json.loads(line)
                if operation["key"] == "file":
                    hub.files[operation["value"]["path"]] = base64.b64decode(operation["value"]["content"])
            self.answer({"commitUrl": f"{hub.url}/me/prefix/commit/1", "commitOid": "1", "hookOutput": ""})
        else:
            self.answer({"error": "no room left"}, 507)

    def do_GET(self):
        self.answer({"error": "not found"}, 404)

    def answer(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.fixture
def hubs():
    """One that takes what it is sent, and one that is full."""
    servers = []
    for broken in (False, True):
        server = HTTPServer(("127.0.0.1", 0), Hub)
        server.url, server.created, server.files, server.broken = f"http://127.0.0.1:{server.server_port}", [], {}, broken
        threading.Thread(target=server.serve_forever).start()
        servers.append(server)
    yield servers
    for server in servers:
        server.shutdown()
        server.server_close()


def push(base, folder, rows_file, **environment):
    flags = [*FLAGS, "--dataset", str(rows_file), "--output_dir", str(folder), "--push_to_hub", "prefix"]
    flags += ["--model_name_or_path", base]
    environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()} | environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return start_process([sys.executable, str(ROOT / "train.py"), *flags], cwd=ROOT, env=environment, **pipes)


def test_a_finished_run_is_pushed_to_the_hub_without_its_checkpoints(hubs, tmp_path, rows_file, tokenizer):
    hub, broken = hubs
    online = {"HF_HUB_OFFLINE": "0", "HF_TOKEN": "hf_test"}
    base = save_decoder(tmp_path / "base", tokenizer, "llama")  # with fewer heads of keys and values than of queries
    process = push(base, tmp_path / "out", rows_file, HF_ENDPOINT=hub.url, **online)
    other = push(bundled.MODEL, tmp_path / "again", rows_file, HF_ENDPOINT=broken.url, **online)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert hub.created == ["prefix"] and "uploaded to the hub: me/prefix" in out
    local = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert {name for name in local if name.startswith("checkpoint")}
    assert hub.files == {name: content for name, content in local.items() if not name.startswith("checkpoint")}
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "prefix_encoder.safetensors"} <= set(hub.files)
    card, prefix = hub.files["README.md"].decode(), load_prefix(tmp_path / "out").tensor
    assert f"the prefix itself has {prefix.numel():,} numbers" in card
    assert "`AutoPeftModelForCausalLM` does not find this base by itself" in card
    _, err = other.communicate()
    assert other.returncode == 2 and "Traceback" not in err
    assert f"try again with `hf upload me/prefix {tmp_path / 'again'}`" in err.strip().splitlines()[-1]
    assert (tmp_path / "again" / "adapter_model.safetensors").exists()


def test_a_push_that_cannot_be_is_refused_before_the_training(tmp_path, rows_file):
    flags = [*FLAGS, "--dataset", rows_file, "--output_dir", tmp_path / "out", "--push_to_hub", "prefix"]
    program = Fork("train.py", *flags)  # offline, as these tests are
    _, err = program.communicate()
    assert program.returncode == 2 and "Traceback" not in err
    line = err.strip().splitlines()[-1]
    assert line.startswith("error: --push_to_hub prefix: ") and "offline" in line.lower()
    assert not (tmp_path / "out").exists()


def test_a_picture_of_an_earlier_run_does_not_stand_in_the_card(small_pass_settings):
    train(TrainConfig(**small_pass_settings))
    folder = Path(small_pass_settings["output_dir"])
    assert (folder / PLOT_FILE).exists() and PLOT_FILE in (folder / CARD_FILE).read_text("utf-8")
    train(TrainConfig(**small_pass_settings | {"overwrite_output_dir": True, "max_steps": 0}))
    assert not (folder / PLOT_FILE).exists() and PLOT_FILE not in (folder / CARD_FILE).read_text("utf-8")


def records(losses, held_out=(), matches=()):
    lines = [{"step": 10 * number, "loss": loss} for number, loss in enumerate(losses, start=1)]
    for number, loss in enumerate(held_out):
        match = {"eval_exact_match": matches[number]} if matches else {}
        lines.append({"step": 10 * number, "eval_loss": loss} | match | ({"frozen_base": True} if number == 0 else {}))
    return lines


def test_what_was_learnt_is_said_in_a_line():
    line = what_was_learnt(records([4, 2, 1], [5, 3, 2], [0.0, 0.5, 0.75]), save_best=False)
    assert line == "learnt: training loss 4.0000 -> 1.0000, held-out loss 5.0000 -> 2.0000, exact match 0.0% -> 75.0%"
    best = what_was_learnt(records([4, 2, 1], [5, 1, 2], [0.0, 0.5, 0.75]), save_best=True)
    assert best.endswith("held-out loss 5.0000 -> 1.0000, exact match 0.0% -> 50.0%")


def test_a_single_evaluation_shows_no_progress():
    only_after = [{"step": 1, "loss": 4.0}, {"step": 2, "loss": 1.0}, {"step": 2, "eval_loss": 2.0}]
    assert what_was_learnt(only_after, save_best=False) == "learnt: training loss 4.0000 -> 1.0000"


def test_a_run_that_learnt_nothing_says_so_and_what_to_try():
    line = what_was_learnt(records([13.834, 13.834], [13.9, 13.9]), save_best=False)
    assert line.startswith("nothing was learnt: training loss 13.8340 -> 13.8340, ") and "--learning_rate" in line
    searched = [{"learning_rate_search": {}}, *records([13.834, 13.834])]
    assert "--learning_rate" not in what_was_learnt(searched, save_best=False)
    assert what_was_learnt(records([4, 1], [5, 6]), save_best=False).startswith("learnt by heart only: ")
    assert what_was_learnt(records([4]), save_best=False) == (
        "too few steps to say what was learnt; --logging_steps 1 and held-out rows would tell"
    )
