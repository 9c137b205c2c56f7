"""Puts small faults into modules, one at a time, and counts those that their tests notice.

    python tests/benchmarks/mutants.py model.encoder data.rows training.state
    python tests/benchmarks/mutants.py training --sample 60
    python tests/benchmarks/mutants.py model training generation evaluation plain --device

A room, such as `training`, stands for all modules in its folder, and `top` for those in no folder. Each mutant runs in a
forked child, which imports the package anew with the mutated module in it, and so does every Python that its tests start:
first the tests of that module, then, if they pass, those that use it most. Left alone are strings, annotations, decorators,
the wording of messages (within raise, print or an f-string), and the `strict` of a zip, which only checks our own code.
"""

import argparse
import ast
import contextlib
import copy
import gc
import importlib.util
import math
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.machinery import SourceFileLoader
from itertools import groupby
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
DEVICE = "tests/on_pretended_device.py"
# pytest's arguments: one string is one stage, the quick ones first. A stage that starts a process takes 5 s more.
TESTS = {
    "bundled": ["tests/test_bundled.py"],
    "cli": [
        "tests/test_cli.py -k printed|drops|default_of_prefix|is_called",
        "tests/study/test_settings.py tests/study/claims/test_settings.py -k not no_torch",
        "tests/test_cli.py",
        "tests/inference/test_run.py tests/inference/test_chat.py tests/test_faults.py tests/test_distributed.py"
        " -k pipe|stops_an_answer|lets_the_step|error_that_one|refused_once",
    ],
    "command": ["tests/test_cli.py", "tests/test_faults.py"],
    "cores": ["tests/test_cores.py"],
    "devices": ["tests/test_devices.py", "tests/training/test_run.py -k what_takes_most"],
    "distributed": [
        "tests/test_distributed.py -k forks|single_process|logs|store",
        "tests/base_model/test_sharding.py",
        "tests/test_distributed.py -k killed_process|error_that_one|refused_once",
    ],
    "errors": ["tests/test_errors.py", "tests/files/test_reading.py"],
    "evaluation": ["tests/test_evaluation.py", "tests/training/test_evaluation.py", DEVICE],
    "parser": ["tests/test_parser.py", "tests/test_cli.py -k printed|drops|default_of_prefix|80|is_called"],
    "plain": ["tests/test_plain.py", DEVICE],
    "screen": ["tests/test_screen.py", "tests/test_cli.py tests/inference/test_answer_file.py -k full|closed"],
    "settings": [
        "tests/test_settings.py tests/test_parser.py",
        "tests/data/test_splits.py -k twentieth",
        "tests/training/test_settings.py",
    ],
    "signals": ["tests/test_signals.py", "tests/training/test_steps.py tests/training/test_run.py -k signal"],
    "text": ["tests/test_text.py", "tests/inference/test_ask.py -k wide"],
    "model.encoder": ["tests/model/test_encoder.py", "tests/model/test_bloom.py tests/files/test_prefixes.py"],
    "model.batch": ["tests/model/test_batch.py", "tests/model/test_bloom.py", DEVICE],
    "model.cpu": ["tests/model/test_cpu.py"],
    "model.distillation": ["tests/model/test_distillation.py", DEVICE],
    "model.attention": ["tests/model/test_attention.py tests/model/test_bloom.py", DEVICE],
    "model.bloom": [
        "tests/model/test_bloom.py tests/model/test_attention.py",
        "tests/training/test_start.py -k text_prefix",
        DEVICE,
    ],
    "model.decoder": ["tests/model/test_decoder.py", "tests/generation/test_decoders.py tests/training/test_decoders.py"],
    "base_model.identity": [
        "tests/base_model/test_identity.py tests/base_model/test_special_tokens.py",
        "tests/base_model/test_sharding.py tests/test_distributed.py -k headless-tied|share_the_base",
        DEVICE,
    ],
    "base_model.loading": [
        "tests/base_model/test_loading.py tests/base_model/test_layers.py",
        "tests/base_model/test_special_tokens.py",
        "tests/test_strangers.py -k pickled|code",
        DEVICE,
    ],
    "base_model.sharding": ["tests/base_model/test_sharding.py", "tests/test_distributed.py -k gradients|alone_is_told"],
    "data.templates": ["tests/data/test_templates.py"],
    "data.columns": ["tests/data/test_columns.py", "tests/data/test_readers.py tests/data/test_rows.py"],
    "data.readers": ["tests/data/test_readers.py", "tests/data/test_rows.py"],
    "data.splits": ["tests/data/test_splits.py"],
    "data.rows": ["tests/data/test_rows.py", "tests/data/test_readers.py"],
    "files.writing": ["tests/files/test_writing.py", "tests/training/test_run.py -k one_run|cannot_be_made"],
    "files.reading": ["tests/files/test_reading.py", "tests/files/test_prefixes.py"],
    "files.prefixes": [
        "tests/files/test_prefixes.py tests/files/test_reading.py",
        "tests/training/test_run.py tests/training/test_start.py -k peft_loads|its_file",
        "tests/generation/test_prefix_bloom.py -k recorded_of",
    ],
    "generation.batches": ["tests/generation/test_batches.py", DEVICE],
    "generation.cache": ["tests/generation/test_cache.py -k not compiled"],
    "generation.options": ["tests/generation/test_options.py", "tests/generation/test_prefix_bloom.py"],
    "generation.prefix_bloom": ["tests/generation/test_prefix_bloom.py", DEVICE],
    "generation.sampling": ["tests/generation/test_sampling.py", DEVICE],
    "inference.answer_file": [
        "tests/inference/test_answer_file.py -k not full_disk and not killed",
        "tests/inference/test_settings.py -k output",
    ],
    "inference.ask": ["tests/inference/test_ask.py"],
    "inference.chat": [
        "tests/inference/test_chat.py -k not a_chat and not an_answer",
        "tests/inference/test_run.py -k stdin",
    ],
    "inference.run": [
        "tests/inference/test_ask.py tests/inference/test_score.py",
        "tests/inference/test_run.py tests/inference/test_settings.py -k another|share|stdin|decoding|counted|conversation",
    ],
    "inference.score": ["tests/inference/test_score.py"],
    "inference.settings": ["tests/inference/test_settings.py tests/test_settings.py"],
    "training.checkpoints": [
        "tests/training/test_checkpoint_format.py tests/training/test_checkpoints.py",
        "tests/training/test_evaluation.py -k signal|memory|set_aside|earlier",
        "tests/training/test_resume.py",
    ],
    "training.learning_rate": ["tests/training/test_learning_rate.py"],
    "training.loop": [
        "tests/training/test_loop.py -k not compiled",
        DEVICE,
        "tests/training/test_checkpoints.py tests/training/test_run.py -k best_prefix|trainers|no_number",
    ],
    "training.metrics": ["tests/training/test_metrics.py", "tests/training/test_report.py -k tensorboard_shows"],
    "training.output": [
        "tests/training/test_output.py -k description|summary",
        "tests/training/test_report.py -k not push",
        "tests/training/test_learning_rate.py tests/training/test_run.py -k drawn|files|no_number|one_run|does_not_fit",
    ],
    "training.run": [
        "tests/training/test_start.py",
        "tests/training/test_run.py -k files|no_number|one_run|no_steps|fails|made|same_seed|keeps|says_what_it",
        "tests/training/test_learning_rate.py tests/training/test_resume.py tests/training/test_metrics.py"
        " -k searches|over_already|latest|overwritten|early|more_epochs",
        "tests/training/test_run.py tests/data/test_splits.py -k what_takes_most|without_memory|talks",
        DEVICE,
    ],
    "training.teacher": ["tests/training/test_teacher.py"],
    "training.settings": [
        "tests/training/test_settings.py tests/test_settings.py",
        "tests/data/test_splits.py tests/training/test_report.py -k flag|not_installed",
    ],
    "training.start": [
        "tests/training/test_start.py",
        DEVICE,
    ],
    "training.state": [
        "tests/training/test_state.py",
        DEVICE,
        "tests/training/test_resume.py tests/training/test_checkpoints.py tests/training/test_metrics.py"
        " -k any_step|tie|best_prefix|early",
    ],
    "training.steps": ["tests/training/test_steps.py"],
}
ROOMS: dict[str, list[str]] = {}
for name in TESTS:
    ROOMS.setdefault(name.partition(".")[0] if "." in name else "top", []).append(name)
# A mutant may loop forever. A stage may take TIMES times as long as without a mutant, plus SECONDS seconds.
TIMES, SECONDS = 5, 20
SWAPS = {ast.Lt: ast.LtE, ast.Gt: ast.GtE, ast.Eq: ast.NotEq, ast.Is: ast.IsNot, ast.In: ast.NotIn, ast.Add: ast.Sub}
SWAPS |= {ast.Mult: ast.Div, ast.BitOr: ast.BitAnd, ast.And: ast.Or}
SWAPS |= {other: one for one, other in SWAPS.items()}
SWAPS |= {ast.FloorDiv: ast.Div, ast.Pow: ast.Mult, ast.Mod: ast.Mult}


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that may replace a node."""
    match node:
        case ast.Compare(left, [op], right) if type(op) in SWAPS:
            yield ast.Compare(left, [SWAPS[type(op)]()], right)
        case ast.BinOp(left, op, right) if type(op) in SWAPS and not any(is_text(side) for side in (left, right)):
            yield ast.BinOp(left, SWAPS[type(op)](), right)
        case ast.BoolOp(op, values):
            yield ast.BoolOp(SWAPS[type(op)](), values)
        case ast.UnaryOp(ast.Not() | ast.USub(), operand):
            yield operand
        case ast.Constant(bool() as value):
            yield ast.Constant(not value)
        case ast.Constant(int() | float() as value):
            yield ast.Constant(value + 1)
        case ast.Call(function, arguments, keywords):
            for keyword in keywords:
                if keyword.arg not in (None, "strict"):
                    yield ast.Call(function, arguments, [other for other in keywords if other is not keyword])
        case ast.AugAssign(target, op, value):
            yield ast.AugAssign(target, SWAPS[type(op)](), value)
            yield ast.Pass()
        case ast.Expr(ast.Call()) | ast.Raise() | ast.Assign([ast.Attribute() | ast.Subscript()]):
            yield ast.Pass()
        case ast.Return(ast.AST() as value) if not (isinstance(value, ast.Constant) and value.value is None):
            yield ast.Return(None)
        case ast.If(test) | ast.IfExp(test) if not isinstance(test, ast.Compare | ast.UnaryOp):
            changed = copy.copy(node)
            changed.test = ast.UnaryOp(ast.Not(), test)
            yield changed


def device_variants(node: ast.AST) -> Iterator[ast.AST]:
    """A call without its device, so a tensor is not made or moved there; and a tensor without its `.cpu()`."""
    match node:
        case ast.Call(ast.Attribute(tensor, "cpu"), []):
            yield tensor
        case ast.Call(function, arguments, keywords):
            owner, _, name = ast.unparse(function).rpartition(".")
            kept = [argument for argument in arguments if not is_device(argument)]
            if name == "to" and not kept:
                yield function.value
            elif len(kept) < len(arguments) and (name == "to" or owner.split(".")[0] == "torch"):
                yield ast.Call(function, kept, keywords)
            others = [keyword for keyword in keywords if keyword.arg != "device"]
            if len(others) < len(keywords):
                yield ast.Call(function, arguments, others)


def is_device(node: ast.AST) -> bool:
    return ast.unparse(node).lower().split(".")[-1] == "device"


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


Variants = Callable[[ast.AST], Iterator[ast.AST]]


def mutants(node: ast.AST, variants: Variants) -> Iterator[str]:
    """Puts one fault after the other into the tree, in place, and yields its description while it is there."""
    if isinstance(node, ast.keyword) and node.arg == "strict":
        return
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        slots = [(value, index) for index in range(len(value))] if isinstance(value, list) else [(vars(node), field)]
        for holder, key in slots:
            child = holder[key]
            if not isinstance(child, ast.AST):
                continue
            for variant in variants(child):
                holder[key] = ast.fix_missing_locations(ast.copy_location(variant, child))
                yield f"{child.lineno}:{child.col_offset}: {first_line(child)}  ->  {first_line(variant)}"
            holder[key] = child
            worded = isinstance(child, ast.Call) and getattr(child.func, "id", "") == "print"
            if not isinstance(child, ast.Raise | ast.JoinedStr) and not worded:
                yield from mutants(child, variants)


def first_line(node: ast.AST) -> str:
    return ast.unparse(node).split("\n")[0]


def passes(tests: str, tree: ast.AST, module: str, folder: str, seconds: float = math.inf) -> bool:
    """Runs tests in a child that imports one module from a syntax tree. False also if they take more than `seconds`."""
    child = os.fork()
    if not child:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_DATA, (8 * 2**30,) * 2)
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
        sys.meta_path.insert(0, Finder(module, tree))
        mutate_processes(module, tree, Path(folder))
        os._exit(pytest.main(arguments(tests, folder), plugins=[TrainedOnce(Path(folder, "tuned"))]))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def mutate_processes(module: str, tree: ast.AST, folder: Path) -> None:
    """Lets each new Python that this process starts import the module from the tree, too."""
    source = folder / "mutant.txt"
    source.write_text(ast.unparse(tree), "utf-8")
    (folder / "sitecustomize.py").write_text(
        f"import ast, pathlib, sys\nsys.path.append({str(HERE)!r})\nimport mutants\n"
        f"tree = ast.parse(pathlib.Path({str(source)!r}).read_text('utf-8'))\n"
        f"sys.meta_path.insert(0, mutants.Finder({module!r}, tree))\n",
        "utf-8",
    )
    os.environ["PYTHONPATH"] = os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])


class TrainedOnce:
    """The prefixes of the fixture `tuned`: trained in the first child that needs them, in which nothing is mutated."""

    def __init__(self, kept: Path):
        self.kept = kept

    @pytest.hookimpl(tryfirst=True)
    def pytest_fixture_setup(self, fixturedef):
        if fixturedef.argname != "tuned":
            return
        train = fixturedef.func

        def tuned(tmp_path_factory):
            if not self.kept.exists():
                for name, folder in train(tmp_path_factory).items():
                    shutil.copytree(folder, self.kept / name)
            return {name: self.kept / name for name in ("short", "sentence")}

        fixturedef.func = tuned


def arguments(tests: str, folder: str) -> list[str]:
    files, _, chosen = tests.partition(" -k ")
    return [
        *("-x", "-q", "-n", "0", "-p", "no:randomly", "-p", "no:cacheprovider", f"--basetemp={folder}/tests"),
        *files.split(),
        *("-k", chosen.replace("|", " or ").replace("not or ", "not ")),
    ]


class Finder:
    """Imports one module from a syntax tree."""

    def __init__(self, module: str, tree: ast.AST):
        self.name, self.tree = f"prefix_tuning.{module}", tree

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        file, tree = ROOT / f"{name.replace('.', '/')}.py", self.tree

        class Loader(SourceFileLoader):
            def get_code(self, fullname):
                return compile(tree, file, "exec")

        return importlib.util.spec_from_file_location(name, file, loader=Loader(name, str(file)))


def import_others(tests: list[str], folder: str) -> None:
    """Imports all that the tests import, and forgets what is ours."""
    with open(os.devnull, "w") as nothing, contextlib.redirect_stdout(nothing):
        for each in tests:
            pytest.main([*arguments(each, folder), "--collect-only"])
    for name, module in [*sys.modules.items()]:
        file = Path(getattr(module, "__file__", None) or "/")
        if file.is_relative_to(ROOT) and ".venv" not in file.parts and name != "__main__":
            del sys.modules[name]


def tree_of(module: str) -> ast.Module:
    return ast.parse((ROOT / "prefix_tuning" / f"{module.replace('.', '/')}.py").read_text("utf-8"))


def survivors(module: str, variants: Variants, numbers: set[int], stages: list[str], folder: str) -> Iterator[str]:
    """Descriptions of the mutants that no test of the module notices, among those with these numbers."""
    import_others(stages, folder)
    gc.freeze()  # the children share what is here
    tree, limits = tree_of(module), {}
    for tests in stages:
        begun = time.monotonic()
        if not passes(tests, tree, module, folder):
            raise SystemExit(f"{module}: {tests}: fails without a mutant")
        limits[tests] = SECONDS + TIMES * (time.monotonic() - begun)
    for number, what in enumerate(mutants(tree, variants)):
        if number in numbers and all(passes(tests, tree, module, folder, limit) for tests, limit in limits.items()):
            yield f"{module}:{what}"


def run(name: str, args: argparse.Namespace, folder: str) -> None:
    """Prints the survivors of a module or a room, and the share that was killed."""
    faults = device_variants if args.device else variants
    found = [
        (module, number)
        for module in ROOMS.get(name, [name])
        for number, what in enumerate(mutants(tree_of(module), faults))
        if args.lines is None or int(what.split(":")[0]) in args.lines
    ]
    chosen = sorted(random.Random(0).sample(found, len(found))[: args.sample])
    survived = 0
    for module, mutants_of_module in groupby(chosen, key=lambda mutant: mutant[0]):
        stages = [DEVICE] if args.device else TESTS[module]
        for survivor in survivors(module, faults, {number for _, number in mutants_of_module}, stages, folder):
            survived += 1
            print(survivor, flush=True)
    share = 1 - survived / max(1, len(chosen))
    print(f"{name}: {len(chosen)} of {len(found)} mutants, {survived} not noticed: {share:.1%} killed", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=[*ROOMS, *TESTS], metavar="MODULE_OR_ROOM")
    parser.add_argument("--lines", type=int, nargs="+", help="only mutants of these lines")
    parser.add_argument("--sample", type=int, help="this many mutants of each module or room, the same ones each time")
    parser.add_argument(
        "--device", action="store_true", help="other faults, on the pretended device: a tensor is not moved there"
    )
    args = parser.parse_args()
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        for name in args.names:
            run(name, args, folder)


if __name__ == "__main__":
    main()
