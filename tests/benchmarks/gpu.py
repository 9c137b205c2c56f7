"""Checks and measures on one GPU, in 9 minutes, what this project says about it: numbers, speed, largest pass, a profile.

    python tests/benchmarks/gpu.py --output DIR
    python tests/benchmarks/gpu.py --output DIR --parts large-1b4           this part again; DIR keeps the others
    python tests/benchmarks/gpu.py --output DIR --device cpu --size toy     all at toy size: does the program still work?

After every figure DIR/gpu.json and the table DIR/gpu.md are written anew. A check that fails is a line with its error;
its traceback is in DIR/gpu.log. Each part is a process with its own time limit, the most important part first. A check
that aborts or hangs costs only the rest of its part. Time that a part does not need goes to the parts after it.

Models with the shapes of speed.py have random weights, and the rows are those of speed.py. On a CPU there is no fp16,
no torch.compile and no running out of memory.
"""

import argparse
import contextlib
import gc
import importlib.metadata
import json
import os
import platform
import signal
import sys
import time
import traceback
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the package
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the modules that tests share

import torch
from gpu_fast import answers, fast, large, profile
from gpu_job import Job, one_line
from gpu_right import decoders, right, runs

# The parts, the most important first, and their limits in seconds, of 9 minutes together.
PARTS = {
    "right": (right, 80),
    "decoders": (decoders, 60),
    "runs": (runs, 130),
    "fast-1b4": (partial(fast, full_shape="1b4"), 80),
    "fast-qwen3-0.6b": (partial(fast, full_shape="qwen3-0.6b"), 70),
    "answers-1b4": (answers, 60),
    "large-1b4": (large, 40),
    "profile-1b4": (profile, 20),
}


def attempt(check) -> dict:
    """What a check returns, or the error that it raises, and the seconds that it took."""
    started = time.monotonic()
    try:
        return {"result": check(), "seconds": round(time.monotonic() - started, 1)}
    except Exception as error:
        traceback.print_exc()
        return {"error": one_line(error)}


def work(part: str, job: Job, connection) -> None:
    """The work of a part's process. It leads a process group, so that the processes that it starts end with it."""
    os.setsid()
    # Later calls of gc.collect() need not look at the imported modules.
    gc.freeze()
    with open(job.folder / "gpu.log", "a", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    print(f"\n=== {part}", flush=True)
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft")}
    device = torch.cuda.get_device_name() if job.on_cuda else f"CPU {platform.machine()}"
    connection.send({"machine": {"device": device, "CUDA": str(torch.version.cuda), **versions}})
    what = "the start"
    try:
        for what, check in PARTS[part][0](job):
            # This also frees the memory of the check before.
            job.reset_peak()
            connection.send({"part": part, "what": what, **attempt(check)})
    except Exception as error:
        traceback.print_exc()
        connection.send({"part": part, "what": f"after {what}", "error": one_line(error)})


def measure(part: str, job: Job, limit: float, note) -> None:
    """Runs a part in a process, for at most `limit` seconds, and calls note() with each of its figures."""
    receiver, sender = job.processes.Pipe(duplex=False)
    child = job.processes.Process(target=work, args=(part, job, sender))
    end, rest = time.monotonic() + limit, {"part": part, "what": "the rest"}
    child.start()
    sender.close()
    try:
        while receiver.poll(max(0, end - time.monotonic())):
            note(receiver.recv())
        note({**rest, "error": f"stopped at its limit of {limit:.0f} s"})
    except EOFError:
        child.join(10)
        if child.exitcode != 0:
            note({**rest, "error": f"the process ended with exit code {child.exitcode}; see gpu.log"})
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.kill()
        child.join()


def as_text(value: float | int | str) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def as_table(record: dict) -> str:
    """The record as a table in Markdown."""
    lines = [("all", "machine", {"result": record["machine"]})] if record["machine"] else []
    lines += [(figure["part"], figure["what"], figure) for figure in record["figures"]]
    table = "| part | what | result |\n|---|---|---|\n"
    for part, what, figure in lines:
        values = ", ".join(f"{name} {as_text(value)}" for name, value in figure.get("result", {}).items())
        cells = (part, what, f"**failed**: {figure['error']}" if "error" in figure else values)
        table += "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"
    return table


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--minutes", type=float, default=9, help="for all parts together")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--size", choices=("full", "toy"), default="full")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    job, file = Job(args.device, args.size == "toy", args.output.resolve()), args.output / "gpu.json"
    record = json.loads(file.read_text("utf-8")) if file.exists() else {"machine": {}, "figures": []}
    record["figures"] = [figure for figure in record["figures"] if figure["part"] not in args.parts]

    def note(figure: dict) -> None:
        if "machine" in figure:
            record.update(figure)
        else:
            record["figures"].append(figure)
            record["figures"].sort(key=lambda figure: list(PARTS).index(figure["part"]))
        file.write_text(json.dumps(record, indent=1, ensure_ascii=False), "utf-8")
        (args.output / "gpu.md").write_text(as_table(record), "utf-8")

    end, parts = time.monotonic() + 60 * args.minutes, [part for part in PARTS if part in args.parts]
    while parts:
        shares = [PARTS[part][1] for part in parts]
        measure(parts.pop(0), job, max(0, end - time.monotonic()) * shares[0] / sum(shares), note)
    print((args.output / "gpu.md").read_text("utf-8"))


if __name__ == "__main__":
    main()
