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
            patched = "patch" in map(ast.unparse, (getattr(mark, "func", mark) for mark in getattr(node, "decorator_list", ())))
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not patched and not node.name.startswith("_"):
                yield node.name


def test_a_name_is_defined_in_one_notebook():
    places = {}
    for notebook in LIBRARY:
        for name in exported_names(notebook): places.setdefault(name, []).append(notebook_name(notebook))
    twice = {name: where for name, where in places.items() if len(where) > 1}
    assert not twice, f"defined more than once: {twice}"


def test_lines_are_short():
    "What nbdev writes itself, the module's docstring and its list of names, aside."
    long = []
    for path in MODULES:
        source = path.read_text(encoding="utf-8")
        start = source.count("\n", 0, source.find("\n]" if "__all__" not in source else "]", source.find("__all__"))) + 1
        long += [f"{path.relative_to(ROOT)}:{number}" for number, line in enumerate(source.splitlines(), 1)
                 if len(line) > 120 and number > start]
    assert not long, f"more than 120 characters: {long}"


def test_lines_of_notebooks_are_short():
    "In code and in prose alike, rows of tables aside."
    long = [f"{path.relative_to(ROOT)}, cell {number}" for path in sorted((ROOT / "nbs").rglob("*.ipynb"))
            for number, cell in enumerate(nbformat.read(path, 4).cells)
            for line in cell.source.splitlines() if len(line) > 120 and not line.startswith("|")]
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
    "The paper's method and a second reading in 1,182 lines; nbdev's markers and blank lines aside."
    notebooks = sorted((ROOT / "nbs" / "core").glob("*.ipynb"))
    lines = [line for path in MODULES if room(path) == "core" for line in path.read_text(encoding="utf-8").splitlines()]
    written = [line for line in lines if line.strip() and not line.startswith(("# %%", "# AUTOGENERATED"))]
    assert len(notebooks) <= 9 and len(written) <= 1182, f"{len(notebooks)} notebooks, {len(written)} lines"


def test_the_way_in_is_short():
    "A reader of the core passes at most 250 cells before the decisions of Eq. (8); the checks come last and can wait."
    passed = 0
    for notebook in sorted((ROOT / "nbs" / "core").glob("*.ipynb")):
        cells = nbformat.read(notebook, as_version=4).cells
        for cell in cells:
            headings = re.findall(r"^## (.*)", cell.source, re.M) if cell.cell_type == "markdown" else []
            if any(heading.startswith(("Checks", "What is refused")) for heading in headings): break
            if any("Eq. (8)" in heading for heading in headings): return
            passed += 1
        assert passed <= 250, f"{passed} cells up to {notebook.name}"
    raise AssertionError("no notebook of the core has a heading on Eq. (8)")
