"""Puts small faults into a module, one at a time, and counts those that its tests notice.

    python tests/benchmarks/mutants.py model.encoder data.rows training.state

Each mutant runs in a forked child, which imports the package anew with the mutated module in it: first the tests of that
module, then, if they pass, those that use it most. Strings, annotations, decorators, and what only words a message (within
raise, print or an f-string) are left alone.
"""

import argparse
import ast
import contextlib
import copy
import gc
import importlib.util
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
# pytest's arguments, a list for each stage. No test that starts processes: they would import the real module.
TESTS = {
    "model.encoder": ["tests/model/test_encoder.py", "tests/model/test_bloom.py tests/files/test_prefixes.py"],
    "model.batch": ["tests/model/test_batch.py", "tests/model/test_bloom.py"],
    "model.attention": ["tests/model/test_attention.py tests/model/test_bloom.py"],
    "model.bloom": [
        "tests/model/test_bloom.py tests/model/test_attention.py",
        "tests/training/test_start.py -k text_prefix",
    ],
    "base_model.loading": ["tests/base_model/test_loading.py", "tests/test_strangers.py -k pickled|code"],
    "base_model.identity": ["tests/base_model/test_identity.py", "tests/base_model/test_sharding.py -k kind"],
    "data.columns": ["tests/data/test_columns.py", "tests/data/test_readers.py tests/data/test_rows.py"],
    "data.readers": ["tests/data/test_readers.py", "tests/data/test_rows.py"],
    "data.rows": ["tests/data/test_rows.py", "tests/data/test_readers.py"],
    "files.writing": ["tests/files/test_writing.py", "tests/training/test_run.py -k one_run"],
    "files.reading": ["tests/files/test_reading.py", "tests/files/test_prefixes.py"],
    "files.prefixes": ["tests/files/test_prefixes.py tests/files/test_reading.py", "tests/training -k peft_loads|its_file"],
    "files.checkpoint_format": [
        "tests/files/test_checkpoint_format.py",
        "tests/training/test_resume.py -k set_aside|any_step",
    ],
    "training.state": [
        "tests/training/test_state.py",
        "tests/training/test_resume.py tests/training/test_checkpoints.py tests/training/test_metrics.py"
        " -k any_step|tie|best_prefix|early",
    ],
}
SECONDS = 120  # for one stage; a mutant that takes longer, because its loop never ends, is noticed
SWAPS = {ast.Lt: ast.LtE, ast.Gt: ast.GtE, ast.Eq: ast.NotEq, ast.Is: ast.IsNot, ast.In: ast.NotIn, ast.Add: ast.Sub}
SWAPS |= {ast.Mult: ast.Div, ast.BitOr: ast.BitAnd, ast.And: ast.Or}
SWAPS |= {other: one for one, other in SWAPS.items()}
SWAPS |= {ast.FloorDiv: ast.Div, ast.Pow: ast.Mult, ast.Mod: ast.Mult}


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in the place of a node."""
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
                if keyword.arg:
                    yield ast.Call(function, arguments, [other for other in keywords if other is not keyword])
        case ast.AugAssign(target, op, value):
            yield ast.AugAssign(target, SWAPS[type(op)](), value)
            yield ast.Pass()
        case ast.Expr(ast.Call()) | ast.Raise() | ast.Assign([ast.Attribute() | ast.Subscript()]):
            yield ast.Pass()
        case ast.Return(ast.AST()):
            yield ast.Return(None)
        case ast.If(test) | ast.IfExp(test) if not isinstance(test, ast.Compare | ast.UnaryOp):
            changed = copy.copy(node)
            changed.test = ast.UnaryOp(ast.Not(), test)
            yield changed


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str))


def mutants(node: ast.AST) -> Iterator[str]:
    """Puts one fault after the other into the tree, in place, and yields what it is while it is there."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        places = [(value, index) for index in range(len(value))] if isinstance(value, list) else [(vars(node), field)]
        for holder, key in places:
            child = holder[key]
            if not isinstance(child, ast.AST):
                continue
            for variant in variants(child):
                holder[key] = ast.fix_missing_locations(ast.copy_location(variant, child))
                yield f"{child.lineno}:{child.col_offset}: {first_line(child)}  ->  {first_line(variant)}"
            holder[key] = child
            worded = isinstance(child, ast.Call) and getattr(child.func, "id", "") == "print"
            if not isinstance(child, ast.Raise | ast.JoinedStr) and not worded:
                yield from mutants(child)


def first_line(node: ast.AST) -> str:
    return ast.unparse(node).split("\n")[0]


def passes(tests: str, tree: ast.AST, module: str, folder: str) -> bool:
    """Runs tests in a child that imports one module from a syntax tree."""
    child = os.fork()
    if not child:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_DATA, (8 * 2**30,) * 2)
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
            os.dup2(nothing.fileno(), 2)
        sys.meta_path.insert(0, Finder(module, tree))
        os._exit(pytest.main(arguments(tests, folder)))
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return status == 0
        time.sleep(0.02)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


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
    for name in [*sys.modules]:
        if name.split(".")[0] in ("prefix_tuning", "tests", "helpers"):
            del sys.modules[name]


def run(module: str, lines: list[int] | None, sample: int | None, folder: str) -> None:
    import_others(TESTS[module], folder)
    gc.freeze()  # the children share what is here
    tree = ast.parse((ROOT / "prefix_tuning" / f"{module.replace('.', '/')}.py").read_text("utf-8"))
    for tests in TESTS[module]:
        if not passes(tests, tree, module, folder):
            raise SystemExit(f"{tests}: fails without a mutant")
    found = [each for each in enumerate(mutants(tree)) if lines is None or int(each[1].split(":")[0]) in lines]
    chosen = random.Random(0).sample(found, len(found))[:sample]
    survivors = 0
    for number, what in enumerate(mutants(tree)):
        if (number, what) in chosen and all(passes(tests, tree, module, folder) for tests in TESTS[module]):
            survivors += 1
            print(f"{module}:{what}", flush=True)
    share = 1 - survivors / len(chosen)
    print(f"{module}: {len(chosen)} of {len(found)} mutants, {survivors} not noticed: {share:.1%} killed", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="+", choices=TESTS)
    parser.add_argument("--lines", type=int, nargs="+", help="only mutants of these lines")
    parser.add_argument("--sample", type=int, help="of each module only so many mutants, the same ones each time")
    args = parser.parse_args()
    os.chdir(ROOT)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        for module in args.modules:
            run(module, args.lines, args.sample, folder)


if __name__ == "__main__":
    main()
