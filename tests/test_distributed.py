"""Several processes as one, on this machine with gloo."""

import json
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from checkout import ROOT
from forks import in_forks, torchrun_forks
from launching import start_process, torchrun, wait_for_step
from models import STANDSTILL, random_bloom, save_decoder
from runs import assert_same_run, metrics_without_timings
from transformers import BloomForCausalLM

from prefix_tuning import bundled, distributed
from prefix_tuning.cli import parse_infer_config, parse_train_config
from prefix_tuning.errors import UserError
from prefix_tuning.files.names import ANSWERS_FILE
from prefix_tuning.inference.run import infer
from prefix_tuning.training import run as training
from prefix_tuning.training.checkpoints import find_checkpoints

FLAGS = {
    "eval_fraction": 0.2, "eval_exact_match": True, "max_steps": 6, "logging_steps": 1, "eval_steps": 3, "save_steps": 2,
    "per_device_train_batch_size": 2, "num_virtual_tokens": 4, "learning_rate": 5e-3, "encoder_hidden_size": 24,
    "precision": "fp32",
}  # fmt: skip


def as_flags(flags):
    return [part for name, value in flags.items() for part in (f"--{name}", str(value))]


def start(flags):
    """Starts train.py as two processes with torchrun as users have it."""
    command = [*torchrun(2), str(ROOT / "train.py"), *as_flags(flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return start_process(command, cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def train(processes, flags):
    code, out, err = torchrun_forks(processes, "train.py", *as_flags(flags))
    assert code == 0, err
    return out


def train_here(flags):
    """A run of one process, which saves the start of another."""
    training.train(parse_train_config(as_flags(flags)))


def assert_close(ours, theirs):
    assert len(ours) == len(theirs)
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys() and all(a[name] == pytest.approx(b[name], rel=1e-5) for name in a), (a, b)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, rows_file):
    """A run of one process with four times the accumulation: 8 rows a step."""
    flags = FLAGS | {"dataset": rows_file, "gradient_accumulation_steps": 4, "learning_rate": STANDSTILL}
    folder = tmp_path_factory.mktemp("alone") / "out"
    train_here(flags | {"output_dir": folder})
    return flags, folder


def exchanges():
    """The values that a process receives in each kind of exchange."""
    rank = distributed.rank()
    vector, matrix = torch.tensor([1.0 + rank, 2.0]), torch.full((2, 2), 10.0**rank)
    distributed.all_sum(vector, matrix)
    return {
        "who": (rank, distributed.world_size(), distributed.is_main()),
        "share": list(distributed.share(range(8))),
        "all_sum": (vector.tolist(), matrix.tolist()),
        "sum_over_ranks": distributed.sum_over_ranks([1 + rank * 2.0**-40, -0.5]),
        "max_over_ranks": distributed.max_over_ranks((5, 9, 7)[rank]),
        "gather_numbers": distributed.gather_numbers([rank, -rank, 2**40 + rank]),
        "gather": distributed.gather({"词" * rank: [None, rank / 3]}),
        "broadcast_object": distributed.broadcast_object([rank]),
        "first_to_say": [distributed.first_to_say("the same"), distributed.first_to_say(f"of {rank}")],
    }


def test_forks_exchange_their_values(capfd):
    def work():
        print(f"printed by {distributed.rank()}")
        distributed.note(f"noted by {distributed.rank()}")
        distributed.check_equal([torch.ones(3), torch.zeros(2)], "weights")
        with pytest.raises(RuntimeError, match="no longer have the same weights"):
            distributed.check_equal([torch.ones(3), torch.full((2,), distributed.rank() / 4)], "weights")
        return exchanges()

    found, codes = in_forks(3, work)
    assert codes == [0, 0, 0]
    assert [one.pop("who") for one in found] == [(0, 3, True), (1, 3, False), (2, 3, False)]
    assert [one.pop("share") for one in found] == [[0, 3, 6], [1, 4, 7], [2, 5]]
    said = [one.pop("first_to_say") for one in found]
    assert sum(same for same, _ in said) == 1 and all(own for _, own in said)
    assert found[0] == {
        "all_sum": ([6, 6], [[111, 111], [111, 111]]),
        "sum_over_ranks": [3 + 3 * 2.0**-40, -1.5],
        "max_over_ranks": 9,
        "gather_numbers": [[rank, -rank, 2**40 + rank] for rank in range(3)],
        "gather": [{"": [None, 0.0]}, {"词": [None, 1 / 3]}, {"词词": [None, 2 / 3]}],
        "broadcast_object": [0],
    }
    assert found[1] == found[2] == found[0]
    out, err = capfd.readouterr()
    assert out == "printed by 0\n" and "noted by 0\n" in err and "noted by 1" not in err


def test_exchanges_are_no_ops_in_a_single_process(capfd):
    with distributed.processes(torch.device("cpu")):
        assert not dist.is_initialized()
        found = exchanges()
        distributed.barrier()
        distributed.check_equal([torch.ones(3)], "weights")
    assert found == {
        "who": (0, 1, True),
        "share": [0, 1, 2, 3, 4, 5, 6, 7],
        "all_sum": ([1, 2], [[1, 1], [1, 1]]),
        "sum_over_ranks": [1, -0.5],
        "max_over_ranks": 5,
        "gather_numbers": [[0, 0, 2**40]],
        "gather": [{"": [None, 0.0]}],
        "broadcast_object": [0],
        "first_to_say": [True, True],
    }


def test_one_of_the_forks_of_a_machine_goes_first(tmp_path):
    """Rank 0 stays in the block until the others have arrived. They enter it later and find the file that rank 0 made."""

    def work():
        if rank := distributed.rank():
            (tmp_path / f"{rank} has arrived").touch()
        with distributed.local_main_first():
            while rank == 0 and len(list(tmp_path.glob("*arrived"))) < 2:
                pass
            (tmp_path / f"made by {rank}").touch()
            return sorted(path.name for path in tmp_path.glob("made*"))

    found, codes = in_forks(3, work)
    assert codes == [0, 0, 0] and found[0] == ["made by 0"]
    assert all({"made by 0", f"made by {rank}"} <= set(found[rank]) for rank in (1, 2))


def test_forks_that_lose_a_peer_say_so_and_other_errors_keep_their_traceback(capfd, monkeypatch):
    monkeypatch.setattr(distributed, "GRACE", 0)

    def work():
        if distributed.rank() == 1:
            os._exit(9)
        distributed.barrier()

    assert in_forks(2, work)[1] == [1, 9]
    assert "process 0: has lost another process of this run, which says why it ended\n" in capfd.readouterr().err

    def fail():
        raise RuntimeError("a mistake of ours")

    assert in_forks(1, fail)[1] == [1]
    err = capfd.readouterr().err
    assert "Traceback" in err and "a mistake of ours" in err and "has lost" not in err


def test_first_to_say_works_after_the_process_that_hosts_the_store_has_ended():
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]

    def work():
        """Rank 1 asks until rank 0, which hosts the store, has ended."""
        distributed.first_to_say("the same")
        until = time.monotonic() + 60
        while not (first := distributed.first_to_say("the same")) and distributed.rank() == 1 and time.monotonic() < until:
            pass
        return first

    found, codes = in_forks(2, work, TORCHELASTIC_USE_AGENT_STORE="False", MASTER_PORT=str(port))
    assert (found, codes) == ([False, True], [0, 0])


def test_forks_on_several_machines_are_told_that_a_restart_may_hang(capfd):
    for restarts, machines, processes, told in (("3", "2", 3, 1), ("0", "2", 1, 0), ("3", "1", 1, 0)):
        options = {"TORCHELASTIC_MAX_RESTARTS": restarts, "GROUP_WORLD_SIZE": machines}
        assert in_forks(processes, distributed.world_size, **options) == ([processes] * processes, [0] * processes)
        assert capfd.readouterr().err.count("a restart may hang") == told


def test_a_job_has_the_name_of_the_folder_of_its_logs(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "/logs/job_1/attempt_3/0/error.json")
    assert distributed.torchrun_job() == "job_1"
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    assert distributed.torchrun_job() is None


def test_two_processes_train_as_one_with_as_many_rows(alone, tmp_path):
    flags, folder = alone
    flags = flags | {"gradient_accumulation_steps": 2, "output_dir": tmp_path / "out"}
    out = train(2, flags)
    assert_close(metrics_without_timings(tmp_path / "out"), metrics_without_timings(folder))
    assert out.count("frozen base: eval loss") == 1 and out.count("the prefix is saved in") == 1  # only main speaks
    files = {path.name for path in folder.iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files


def test_two_processes_that_share_a_llama_train_as_one_and_go_on_with_a_copy_each(tmp_path, rows_file, tokenizer):
    base = save_decoder(tmp_path / "base", tokenizer, "llama")
    flags = FLAGS | {"model_name_or_path": base, "dataset": rows_file, "learning_rate": STANDSTILL}
    train_here(flags | {"output_dir": tmp_path / "one", "gradient_accumulation_steps": 4})
    flags |= {"gradient_accumulation_steps": 2}
    train(2, flags | {"output_dir": tmp_path / "two", "shard_base": True, "gradient_checkpointing": True})
    assert_close(metrics_without_timings(tmp_path / "two"), metrics_without_timings(tmp_path / "one"))
    earlier = {"resume_from_checkpoint": tmp_path / "two" / "checkpoint-4.safetensors"}
    train(2, flags | earlier | {"output_dir": tmp_path / "again"})
    assert_same_run(tmp_path / "again", tmp_path / "two")


def test_two_processes_that_share_a_base_distil_a_text_as_one(tmp_path, rows_file, tokenizer):
    """They read it in pieces, answer the rows that have no answer, and train and measure by the same divergence."""
    base = save_decoder(tmp_path / "base", tokenizer, "qwen3", initializer_range=0.3)
    (tmp_path / "handbook.md").write_text("法国的首都是巴黎。" * 5, "utf-8")
    rows = [json.loads(line) for line in rows_file.read_text("utf-8").splitlines()[:6]]
    rows = [{"instruction": row["instruction"]} if number % 3 else row for number, row in enumerate(rows)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    flags = FLAGS | {"model_name_or_path": base, "dataset": tmp_path / "rows.jsonl", "learning_rate": STANDSTILL}
    flags |= {"distill_text": tmp_path / "handbook.md", "prefix_init": "text", "init_from": "chunks", "max_length": 28}
    flags |= {"max_steps": 2, "max_tokens_per_batch": 40, "eval_steps": 2, "eval_exact_match": False}
    train_here(flags | {"output_dir": tmp_path / "one", "gradient_accumulation_steps": 2})
    train(2, flags | {"output_dir": tmp_path / "two", "gradient_accumulation_steps": 1, "shard_base": True})
    assert_close(metrics_without_timings(tmp_path / "two"), metrics_without_timings(tmp_path / "one"))
    one, two = ((tmp_path / name / ANSWERS_FILE).read_bytes() for name in ("one", "two"))
    assert one == two and len(set(json.loads(one)["texts"])) == 4


def test_processes_find_the_learning_rate_that_one_finds(alone, tmp_path):
    names = ("dataset", "logging_steps", "per_device_train_batch_size", "num_virtual_tokens", "precision")
    flags = {name: alone[0][name] for name in names} | {"eval_fraction": 0, "max_steps": 2}
    train_here(flags | {"output_dir": tmp_path / "one", "gradient_accumulation_steps": 4})
    out = train(2, flags | {"output_dir": tmp_path / "two", "gradient_accumulation_steps": 2})
    assert out.count("learning rate ") == 1  # only main speaks
    one, two = (metrics_without_timings(tmp_path / name)[0]["learning_rate_search"] for name in ("one", "two"))
    assert two == one | {"losses": pytest.approx(one["losses"], rel=1e-4)}


def test_gradients_of_forks_are_those_of_one_process(tmp_path, monkeypatch):
    random_bloom(vocab_size=4099).save_pretrained(tmp_path)  # no number of processes divides a prime
    monkeypatch.setattr(sys, "argv", ["processes.py", str(tmp_path)])

    def work():
        runpy.run_path(str(ROOT / "tests" / "processes.py"))

    assert in_forks(4, work)[1] == [0, 0, 0, 0]


def test_sums_are_exact_where_float32_is_not():
    assert distributed.sum_over_ranks([2.0**24 + 1, 0.1]) == [2.0**24 + 1, 0.1]


def test_steps_with_fewer_rows_than_processes_and_rows_without_labels(tmp_path, tokenizer):
    rows = [{"instruction": "问" * length, "output": "答案"} for length in (3, 60, 4, 60, 60)]  # 60: cut before the answer
    rows += [{"instruction": "a", "output": "b"}] * 2
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    flags = {
        **{name: FLAGS[name] for name in ("logging_steps", "num_virtual_tokens", "precision")},
        "learning_rate": STANDSTILL,
        "dataset": tmp_path / "rows.jsonl", "max_length": 40, "num_train_epochs": 2, "shuffle": False,
    }  # fmt: skip
    train_here(flags | {"output_dir": tmp_path / "one", "gradient_accumulation_steps": 3})
    train(3, flags | {"output_dir": tmp_path / "three", "gradient_accumulation_steps": 1, "shard_base": True})
    assert_close(metrics_without_timings(tmp_path / "three"), metrics_without_timings(tmp_path / "one"))
    assert len(metrics_without_timings(tmp_path / "one")) == 5  # 4 rows, 3 and 1, twice, and the summary


def test_a_killed_process_ends_the_job_and_a_restart_goes_on(alone, tmp_path):
    flags = alone[0] | {"gradient_accumulation_steps": 2, "max_steps": 50, "eval_steps": 1000, "save_steps": 1}
    flags |= {"learning_rate": FLAGS["learning_rate"]}
    whole = flags | {"output_dir": tmp_path / "whole"}
    train(2, whole)
    killed = flags | {"output_dir": tmp_path / "killed"}
    ended = threading.Event()

    def kill_the_second():
        while not find_checkpoints(tmp_path / "killed") and not ended.wait(0.01):
            pass
        max(multiprocessing.active_children(), key=lambda process: process.pid).kill()

    thread = threading.Thread(target=kill_the_second)
    thread.start()
    code, out, err = torchrun_forks(2, "train.py", *as_flags(killed), restarts=1)  # no attempt is wasted
    ended.set()
    thread.join()
    assert code == 0, err
    assert "resuming after step" in out
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_a_checkpoint_is_resumed_with_another_number_of_processes(alone, tmp_path, capsys):
    # The rate 0 changes no weights, so the losses tell which rows a step had.
    flags = alone[0] | {"gradient_accumulation_steps": 1, "num_train_epochs": 2, "max_steps": -1, "learning_rate": 0}
    flags |= {"eval_exact_match": False, "eval_steps": 100, "output_dir": tmp_path / "out"}
    train(2, flags | {"save_total_limit": 100})  # 32 rows, 4 a step: 8 steps an epoch
    train_here(flags | {"resume_from_checkpoint": tmp_path / "out" / "checkpoint-10.safetensors"})
    assert "rows per step changed from 4 to 2 (1 processes)" in capsys.readouterr().out
    # After 10 steps of 4 rows, 24 of the second epoch's 32 are left: 12 steps of 2.
    assert metrics_without_timings(tmp_path / "out")[-1]["steps"] == 22
    train_here(flags | {"output_dir": tmp_path / "one"})
    went_on, whole = (
        [line["loss"] for line in metrics_without_timings(tmp_path / name) if "loss" in line] for name in ("out", "one")
    )
    assert went_on[10:] == pytest.approx(whole[20:], rel=1e-6)


def test_a_signal_during_an_evaluation_stops_all_processes_and_saves(alone, tmp_path):
    """The evaluation after step 2 has 600 rows. With more rows, its end would come later than torchrun waits for it."""
    rows = Path(bundled.resolve("bundled:short-eval")).read_text("utf-8").splitlines(True)[:600]
    (tmp_path / "eval.jsonl").write_text("".join(rows), "utf-8")
    flags = {name: value for name, value in alone[0].items() if name != "eval_fraction"}
    flags |= {"gradient_accumulation_steps": 1, "max_steps": 100_000, "save_steps": 0, "eval_steps": 2}
    process = start(flags | {"eval_dataset": tmp_path / "eval.jsonl", "output_dir": tmp_path / "out"})
    wait_for_step(process, tmp_path / "out", 2)
    process.send_signal(signal.SIGTERM)  # torchrun passes it on
    _, err = process.communicate(timeout=600)
    assert process.returncode != 0
    assert err.count("SIGTERM: the run stops once it is saved") == 1
    assert re.search(r"SIGTERM: stopped after step 2; .*checkpoint-2\.safetensors is intact", err)
    assert err.count("stopped after step") == 1
    assert [line["step"] for line in metrics_without_timings(tmp_path / "out") if "eval_loss" in line] == [0]


def test_a_finished_run_is_refused_once_per_attempt_and_keeps_its_files(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "training_config.json").write_text('{"ran_with": {"job": "another"}}')
    code, out, err = torchrun_forks(2, "train.py", "--output_dir", tmp_path, restarts=1)
    assert code != 0 and err.count("holds a prefix already") == 2 and "bundled demo's own settings" in out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "training_config.json"]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_user_sees_the_error_that_one_process_has(tmp_path, rows_file, rank):
    flags = {"dataset": rows_file, "max_steps": 1, "output_dir": tmp_path / "out"}
    code, _, err = torchrun_forks(2, "train.py", *as_flags(flags), more={str(rank): ["--dataset", "gone.jsonl"]})
    said = [line for line in re.split(r"[\n\r]", err) if "error: " in line.lower()]
    assert code != 0 and said[0].endswith(f"{'process 1: ' if rank else ''}error: gone.jsonl: no such file"), err
    assert "gloo" not in err and "another process" not in err
    assert int(re.search(r"Root Cause.*?rank +: (\d)", err, re.DOTALL)[1]) == rank


def test_a_file_is_answered_by_several_processes_in_one_order(tmp_path, tuned, capsys):
    base = BloomForCausalLM.from_pretrained(bundled.resolve(bundled.MODEL))
    shutil.copytree(bundled.resolve(bundled.MODEL), tmp_path / "pickled", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(base.state_dict(), tmp_path / "pickled" / "pytorch_model.bin")
    rows = [{"instruction": f"{number % 7}加3等于多少？", "id": number} for number in range(35)]  # each question five times
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    flags = {"input": tmp_path / "rows.jsonl", "prefix": tuned["short"], "batch_size": 2, "max_new_tokens": 8}
    flags |= {"do_sample": True, "temperature": 2.0}
    named = {name: tmp_path / f"{name}.jsonl" for name in ("one", "two")}
    flags |= {"model_name_or_path": tmp_path / "pickled"}
    infer(parse_infer_config(as_flags(flags | {"output": named["one"]})))
    assert capsys.readouterr().err.count("pickled .bin file") == 1
    code, _, err = torchrun_forks(2, "infer.py", *as_flags(flags | {"output": named["two"]}))
    assert code == 0 and err.count("pickled .bin file") == 1, err
    whole = named["one"].read_bytes()
    assert named["two"].read_bytes() == whole
    assert len({json.loads(line)["response"] for line in whole.splitlines()}) > 14  # the same question, other draws
    named["two"].write_bytes(whole[: len(whole) // 3])
    flags |= {"model_name_or_path": bundled.MODEL, "output": named["two"]}
    code, _, err = torchrun_forks(2, "infer.py", *as_flags(flags), "--resume", "--shard_base")
    assert code == 0 and named["two"].read_bytes() == whole, err


def test_scores_by_processes_that_share_the_base_are_written_once(tmp_path, tuned):
    rows = [{"instruction": f"{a}加1等于多少？", "output": str(a + 1)} for a in range(20)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    flags = {"score": tmp_path / "rows.jsonl", "prefix": f"short={tuned['short']}"}
    flags_of_two = as_flags(flags | {"output": tmp_path / "two.json"})
    code, out, err = torchrun_forks(2, "infer.py", *flags_of_two, "--shard_base")
    assert code == 0 and out.count("perplexity") == 2 and err.count("short: 100%") == 1, err
    infer(parse_infer_config(as_flags(flags | {"output": tmp_path / "one.json"})))
    two, one = (json.loads((tmp_path / f"{name}.json").read_text("utf-8")) for name in ("two", "one"))
    assert two["all"]["loss"] == pytest.approx(one["all"]["loss"], rel=1e-5)
    assert [row["instruction"] for row in two["rows"]] == [row["instruction"] for row in one["rows"]]


def test_one_process_alone_is_told_to_start_several(tmp_path):
    with pytest.raises(UserError, match="--shard_base splits the base over processes; start them: torchrun"):
        training.train(parse_train_config(["--shard_base", "--output_dir", str(tmp_path / "out")]))
