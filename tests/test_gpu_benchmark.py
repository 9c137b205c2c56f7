"""benchmarks/gpu.py needs a GPU for its figures. That the program works is tested here, on a CPU and at toy size."""

import importlib
import json
import os
import subprocess
import sys
import time

import pytest
from checkout import HERE

TOY = ["--device", "cpu", "--size", "toy"]


@pytest.fixture
def gpu(monkeypatch):
    """The program as a module."""
    monkeypatch.setattr(sys, "path", [str(HERE / "benchmarks"), *sys.path])
    return importlib.import_module("gpu")


def figures_of(folder) -> list[dict]:
    """The figures of gpu.json, after a check that each of them is a line of the table."""
    record = json.loads((folder / "gpu.json").read_text("utf-8"))
    assert record["machine"].keys() == {"device", "CUDA", "torch", "transformers", "peft"}
    lines = (folder / "gpu.md").read_text("utf-8").splitlines()[3:]
    for line, figure in zip(lines, record["figures"], strict=True):
        assert line.startswith(f"| {figure['part']} | {figure['what']} | ") and line.replace("\\|", "").count("|") == 4
        assert ("**failed**" in line) == ("error" in figure)
    return record["figures"]


def test_all_parts_run_at_toy_size(tmp_path, gpu):
    command = [sys.executable, str(HERE / "benchmarks" / "gpu.py"), "--output", str(tmp_path), *TOY]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    subprocess.run(command, check=True, env=environment, capture_output=True)
    figures = figures_of(tmp_path)
    assert not [figure for figure in figures if "error" in figure]
    assert all(figure["result"] for figure in figures)
    assert {figure["part"] for figure in figures} == gpu.PARTS.keys()
    assert (tmp_path / "profile.txt").read_text("utf-8").count("aten::") > 10


def test_whatever_fails_is_a_line_and_the_rest_remains(tmp_path, gpu, monkeypatch):
    def dies(job):
        yield "before", lambda: {"figure": 1}
        yield "a shape", lambda: {}["unknown"]
        yield "after", lambda: {"figure": 2}
        os._exit(3)

    def hangs(job):
        yield "before", lambda: {"figure": 3}
        time.sleep(600)

    def breaks(job):
        yield "before", lambda: {"figure": 4}
        raise ValueError("a | b")

    def main(*flags):
        gpu.main(["--output", str(tmp_path), *TOY, *flags])
        return [(figure["part"], figure["what"], figure.get("error")) for figure in figures_of(tmp_path)]

    monkeypatch.setattr(gpu, "PARTS", {"dies": (dies, 1), "hangs": (hangs, 1), "breaks": (breaks, 1)})
    figures = main("--minutes", "0.1")
    assert figures == [
        ("dies", "before", None),
        ("dies", "a shape", "KeyError: 'unknown'"),
        ("dies", "after", None),
        ("dies", "the rest", "the process ended with exit code 3; see gpu.log"),
        ("hangs", "before", None),
        ("hangs", "the rest", "stopped at its limit of 3 s"),
        ("breaks", "before", None),
        ("breaks", "after before", "ValueError: a | b"),
    ]
    # Parts that run again replace their lines; those of other parts stay.
    again = main("--minutes", "0", "--parts", "breaks")
    assert again == [*figures[:6], ("breaks", "the rest", "stopped at its limit of 0 s")]
