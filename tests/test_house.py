"The house: arrows between its rooms point downwards, a name is defined once, and nothing is larger than it should be."
import ast
import re

import nbformat
import pytest
from conftest import EXPERIMENTS, LIBRARY, ROOT, notebook_name

ROOMS = ("core", "data", "methods", "lab", "app")  # each may import those before it
MODULES = sorted(path for path in (ROOT / "sdmad_nb").rglob("*.py") if path.name != "_modidx.py")


def room(path): return path.relative_to(ROOT / "sdmad_nb").parts[0]


def imported_rooms(path):  # rooms of this package that a module imports from, inside functions too
    "Read the import statements of a module."
    package = ["sdmad_nb", *path.relative_to(ROOT / "sdmad_nb").parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            base = package[:len(package) + 1 - node.level] if node.level else []
            names = [".".join([*base, *filter(None, [node.module])])]
        for name in names:
            parts = name.split(".")
            if parts[0] == "sdmad_nb" and len(parts) > 1: yield parts[1]


@pytest.mark.parametrize("path", [path for path in MODULES if path.parent != ROOT / "sdmad_nb"],
                         ids=lambda path: f"{path.parent.name}.{path.stem}")
def test_arrows_point_downwards(path):
    allowed = {*ROOMS[:ROOMS.index(room(path)) + 1], "assets"}
    assert set(imported_rooms(path)) <= allowed, f"{path.name} of {room(path)} may import {allowed} only"


@pytest.mark.parametrize("notebook", [path for path in EXPERIMENTS if path.name.startswith("run_")], ids=notebook_name)
def test_experiments_use_what_is_public(notebook):
    "An experiment reads the library as any user does: no name with a leading underscore."
    code = "\n".join(cell.source for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code")
    imports = re.findall(r"^from sdmad_nb\S* import (?:\(([^)]*)\)|(.+))$", code, re.M)
    names = {name.strip() for pair in imports for name in ",".join(pair).split(",")}
    assert not [name for name in names if name.startswith("_")]


def exported_names(notebook):  # of functions and classes
    "Read the definitions in the exported cells of a notebook."
    for cell in nbformat.read(notebook, as_version=4).cells:
        if cell.cell_type != "code" or not cell.source.startswith("#| export"): continue
        for node in ast.parse(cell.source).body:
            patched = any(getattr(mark, "id", "") == "patch" for mark in getattr(node, "decorator_list", ()))
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not patched and not node.name.startswith("_"):
                yield node.name


def test_a_name_is_defined_in_one_notebook():
    places = {}
    for notebook in LIBRARY:
        for name in exported_names(notebook): places.setdefault(name, []).append(notebook_name(notebook))
    twice = {name: where for name, where in places.items() if len(where) > 1}
    assert not twice, f"defined more than once: {twice}"


def test_lines_are_short():
    long = [f"{path.relative_to(ROOT)}:{number}" for path in MODULES
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1) if len(line) > 120]
    assert not long, f"more than 120 characters: {long}"


def test_functions_have_few_parameters():
    "Ten at most, those of the notebooks' parameter cells aside."
    wide = []
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"): continue
            count = len([*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs])
            if count - (bool(node.args.args) and node.args.args[0].arg in ("self", "cls")) > 10: wide.append(node.name)
    assert not wide, f"more than ten parameters: {wide}"


def test_the_core_is_small():
    notebooks = sorted((ROOT / "nbs" / "core").glob("*.ipynb"))
    lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in MODULES if room(path) == "core")
    assert len(notebooks) <= 8 and lines <= 1250, f"{len(notebooks)} notebooks, {lines} lines"


def test_the_way_in_is_short():
    "From the overview to Eq. (8) a reader passes at most 250 cells."
    order = ["00_overview", *sorted(notebook_name(path) for path in LIBRARY if path.parent.name == "core")]
    cells = [len(nbformat.read(ROOT / "nbs" / f"{name}.ipynb", as_version=4).cells) for name in order]
    until = order.index(next(name for name in order if name.endswith("_scores")))
    assert sum(cells[:until]) <= 250, dict(zip(order, cells))
