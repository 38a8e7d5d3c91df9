"Every notebook runs: the library's with nbdev_test, the experiments' with papermill in a smoke configuration."
import os
import re
import shutil

import nbformat
import pytest
from conftest import BIN, EXPERIMENTS, LIBRARY, NOTEBOOKS, ROOT, notebook_name, run


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    "Share one folder, so that notebooks read each other's records as they do for a user."
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "results"


def test_exports_are_in_sync(tmp_path):
    "`nbdev_export` in a copy of the project gives the modules that are here."
    shutil.copy(ROOT / "settings.ini", tmp_path)
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs", ignore=shutil.ignore_patterns("*checkpoints*"))
    (tmp_path / "sdmad_nb").mkdir()
    shutil.copy(ROOT / "sdmad_nb" / "__init__.py", tmp_path / "sdmad_nb")
    done = run(BIN / "nbdev_export", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    here, fresh = ({path.name: path.read_text(encoding="utf-8") for path in (root / "sdmad_nb").glob("*.py")}
                   for root in (ROOT, tmp_path))
    stale = sorted(name for name in here.keys() | fresh.keys() if here.get(name) != fresh.get(name))
    assert not stale, f"run nbdev_export: {', '.join(stale)} in sdmad_nb/ differ from what the notebooks export"


@pytest.mark.parametrize("notebook", LIBRARY, ids=notebook_name)
def test_library_notebook(notebook):
    "`nbdev_test` runs the notebook without an error."
    done = run(BIN / "nbdev_test", "--path", notebook)
    assert done.returncode == 0 and "Success." in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("notebook", EXPERIMENTS, ids=notebook_name)
def test_experiment_notebook(notebook, tmp_path, results):
    "`papermill -p smoke True` runs the notebook without an error, and knows the parameters."
    done = run(BIN / "papermill", notebook, tmp_path / notebook.name, "-p", "smoke", "True", "-p", "results", results, "--no-progress-bar")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "unknown parameter" not in done.stderr, done.stderr
    if not re.match(r"run_fusion_(table|fig)\d", notebook.stem): return
    folder = results / f"{notebook.stem.removeprefix('run_')}-smoke"
    assert {path.suffix for path in folder.iterdir()} == {".png", ".svg", ".csv", ".md"}
    assert "(demo data" in (folder / "table.md").read_text(encoding="utf-8").splitlines()[0]


@pytest.mark.parametrize("notebook", EXPERIMENTS, ids=notebook_name)
def test_experiment_is_ready_for_papermill(notebook):
    "One `parameters` cell, a line that keeps a bare `nbdev_test` from running it, and in run_*.ipynb no outputs."
    cells = nbformat.read(notebook, as_version=4).cells
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1, "papermill silently runs the defaults unless exactly one cell has the tag `parameters`"
    for line in tagged[0].source.splitlines():
        assert line.count("=") <= 1, f"one `=` a line, or `papermill --help-notebook` loses the parameter: {line}"
    assert "- skip_exec: true" in cells[0].source.splitlines(), "the first cell lacks the line `- skip_exec: true`"
    if not notebook.name.startswith("run_"): return  # train_demo_clip keeps the outputs of the run that made the weights
    with_output = [cell.id for cell in cells if cell.cell_type == "code" and (cell.outputs or cell.execution_count)]
    assert not with_output, f"run `nbstripout --keep-id {notebook.relative_to(ROOT)}`: cells {with_output} have outputs"


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=notebook_name)
def test_notebook_is_readable(notebook):
    "Short cells, a title, one sentence, and the kernel that every installation has."
    book = nbformat.read(notebook, as_version=4)
    nbformat.validate(book)
    assert book.metadata.kernelspec.name == "python3"
    start = [line for line in book.cells[0].source.splitlines() if line.strip()]
    assert start[0].startswith("# ") and start[1].startswith("> "), "begin with `# Title` and `> one sentence`"
    long = {cell.id: count for cell in book.cells if cell.cell_type == "code"
            and (count := len(cell.source.splitlines())) > 30}
    assert not long, f"cells with more than 30 lines: {long}"
