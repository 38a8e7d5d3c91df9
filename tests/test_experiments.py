"Every experiment notebook runs with papermill in its smoke configuration."
import re

import nbformat
import pytest
from conftest import BIN, EXPERIMENTS, ROOT, notebook_name, run


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    "Share one folder, so that notebooks read each other's records as they do for a user."
    return tmp_path_factory.mktemp("results")


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
