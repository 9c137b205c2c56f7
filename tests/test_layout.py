"""The layout of the package, read off its syntax trees: floors, no circle, no private name shared."""

import ast
import graphlib
import sys

import pytest
from checkout import ROOT

PACKAGE = ROOT / "prefix_tuning"
TREES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): ast.parse(path.read_text("utf-8"))
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.name != "__init__.py"
}
# From the ground up: one line is a floor, and one name is a part of it. A file imports from its own part and lower floors.
FLOORS = [
    ["errors"],
    ["bundled"],
    ["text", "screen"],
    ["files.names"],
    ["settings", "distributed", "signals"],
    ["model"],
    ["devices", "cores"],
    ["files", "data"],
    ["base_model"],
    ["generation"],
    ["evaluation"],
    ["training", "inference"],
    ["parser", "command"],
    ["demo.knowledge", "demo.sheets"],
    # The product's commands and its page. Beside them, research and the demo's recipes.
    ["cli", "plain", "study", "demo"],
]
PARTS = {part: floor for floor, parts in enumerate(FLOORS) for part in parts}
# A private name of transformers, which its HfArgumentParser reads off dataclasses.
FOREIGN = {"_argument_group_name"}


def part_of(module: str) -> str:
    """The part that a module belongs to: itself, or the folder it lies in."""
    return module if module in PARTS else module.split(".")[0]


def imports(tree: ast.AST) -> list[tuple[str, str]]:
    """Every module that a file imports, by its full name, and the name that it takes from it."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            found += [(node.module, alias.name) for alias in node.names]
    return found


def own_imports(tree: ast.AST) -> set[str]:
    """The modules of this package that a file imports."""
    names = {
        name.removeprefix("prefix_tuning.")
        for module, taken in imports(tree)
        for name in (module, f"{module}.{taken}")
        if module.split(".")[0] == "prefix_tuning"
    }
    return names & TREES.keys()


@pytest.mark.parametrize("module", TREES)
def test_a_file_imports_from_below_only(module):
    for other in own_imports(TREES[module]):
        here, there = part_of(module), part_of(other)
        assert here == there or PARTS[there] < PARTS[here] or {here, there} <= {"settings", "signals", "distributed"}


def test_there_is_no_circle():
    graphlib.TopologicalSorter({module: own_imports(tree) for module, tree in TREES.items()}).prepare()


def test_the_product_needs_neither_the_study_nor_the_demo_s_recipe():
    """Whatever the commands, the page and PrefixBloom import, at the top of a file or inside of a function."""
    needed, left = set(), {"cli", "plain", "generation.prefix_bloom", "files.prefixes"}
    while left:
        needed |= left
        left = {other for module in left for other in own_imports(TREES[module])} - needed
    assert {"training.run", "inference.run"} <= needed
    assert not [module for module in needed if module.split(".")[0] in ("study", "demo")]
    # One recipe may take from the other.
    recipes = {"demo.build", "demo.reader"}
    assert not [module for module in TREES if module not in recipes and recipes & own_imports(TREES[module])]


def test_the_mechanism_needs_nothing_but_torch_transformers_and_errors():
    allowed = {"torch", "transformers", *sys.stdlib_module_names}
    for module, tree in TREES.items():
        if part_of(module) == "model":
            assert {name.split(".")[0] for name, _ in imports(tree)} <= allowed | {"prefix_tuning"}
            assert own_imports(tree) <= {"errors", *(name for name in TREES if part_of(name) == "model")}


def private_names(tree: ast.AST) -> set[str]:
    """The private names that a file defines: functions, classes, variables, attributes."""
    names = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    names |= {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    return {name for name in names if name.strip("_") and name.startswith("_") and not name.startswith("__")}


def test_no_private_name_is_used_across_files():
    defined = {module: private_names(tree) for module, tree in TREES.items()}
    for module, tree in TREES.items():
        of_others = set().union(*(names for other, names in defined.items() if other != module)) - defined[module] - FOREIGN
        used = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        used |= {name for source, name in imports(tree) if source.startswith("prefix_tuning")}
        assert not used & of_others, module


def loaded_with(module: str) -> set[str]:
    """The libraries that load when a module is imported, by way of the modules of this package that load with it."""
    libraries, seen, left = set(), set(), {module}
    while left:
        seen |= left
        nodes = [node for name in left for node in TREES[name].body if isinstance(node, (ast.Import, ast.ImportFrom))]
        at_once = ast.Module(nodes, [])
        libraries |= {name.split(".")[0] for name, _ in imports(at_once)}
        left = own_imports(at_once) - seen
    return libraries - {"prefix_tuning"}


def test_only_what_reads_rows_waits_for_datasets():
    """`datasets` brings pyarrow and pandas along, half a second. Neither a question nor PrefixBloom needs them."""
    assert {"datasets", "pyarrow", "torch"} <= loaded_with("training.run")
    for module in ("inference.run", "inference.chat", "generation.prefix_bloom", "files.prefixes", "plain"):
        loaded = loaded_with(module)
        assert "torch" in loaded and not loaded & {"datasets", "pyarrow", "matplotlib"}, module


def test_folders_load_nothing_by_themselves():
    for path in PACKAGE.rglob("__init__.py"):
        assert path.parent == PACKAGE or not path.read_text("utf-8"), path
