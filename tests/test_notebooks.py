"Every library notebook runs with nbdev_test, the modules are what the notebooks export, and all notebooks are readable."
import shutil

import nbformat
import pytest
from conftest import BIN, LIBRARY, NOTEBOOKS, ROOT, notebook_name, run
from nbdev.test import test_nb as run_cells  # what the command nbdev_test calls for each notebook


def test_exports_are_in_sync(tmp_path):
    "`nbdev_export` in a copy of the project gives the modules that are here."
    shutil.copy(ROOT / "settings.ini", tmp_path)
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns("*checkpoints*"))
    (tmp_path / "sdmad_nb").mkdir()
    shutil.copy(ROOT / "sdmad_nb" / "__init__.py", tmp_path / "sdmad_nb")
    done = run(BIN / "nbdev_export", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    here, fresh = ({path.relative_to(root).as_posix(): path.read_text(encoding="utf-8")
                    for path in (root / "sdmad_nb").rglob("*.py")} for root in (ROOT, tmp_path))
    stale = sorted(name for name in here.keys() | fresh.keys() if here.get(name) != fresh.get(name))
    assert not stale, f"run nbdev_export: {', '.join(stale)} differ from what the notebooks export"


def test_the_command():
    "The command itself, on one notebook: the others run in this process, where torch is imported once."
    done = run(BIN / "nbdev_test", "--path", ROOT / "nbs" / "core" / "05_selection.ipynb")
    assert done.returncode == 0 and "Success." in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("notebook", LIBRARY, ids=notebook_name)
def test_library_notebook(notebook, monkeypatch, capfd):
    "Every cell of the notebook runs without an error, as nbdev_test runs it."
    monkeypatch.setenv("IN_TEST", "1")
    passed, _ = run_cells(notebook, skip_flags=["slow", "gpu"], basepath=ROOT)
    assert passed, "".join(capfd.readouterr())


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=notebook_name)
def test_notebook_is_readable(notebook):
    "Short cells, a title, one sentence, and the kernel that every installation has."
    book = nbformat.read(notebook, as_version=4)
    nbformat.validate(book)
    assert book.metadata.kernelspec.name == "python3"
    start = [line for line in book.cells[0].source.splitlines() if line.strip()]
    assert start[0].startswith("# ") and start[1].startswith("> "), "begin with `# Title` and `> one sentence`"
    assert not start[2].startswith("> "), "the sentence stands on one line: nbdev makes the module's docstring of it"
    long = {cell.id: count for cell in book.cells if cell.cell_type == "code"
            and (count := len(cell.source.splitlines())) > 30}
    assert not long, f"cells with more than 30 lines: {long}"
