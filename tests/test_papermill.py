"The real papermill command on a small project of its own: it needs no output path for an experiment, and only there."
import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios

import nbformat
import papermill
import pytest
from conftest import BIN, EXPERIMENTS, notebook_name, run
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

from sdmad_nb.app.papermill_engine import engine

RUNS = [path for path in EXPERIMENTS if path.name.startswith("run_")]
PAPERMILL = str(BIN / "papermill")
WORKING = "import sys\nprint('working', file=sys.stderr)"  # stands for a progress bar in a cell


def write_notebook(path, *sources):
    "Write a notebook whose first cell carries the tag `parameters`."
    cells = [new_code_cell(source) for source in sources]
    cells[0].metadata["tags"] = ["parameters"]
    kernel = {"display_name": "python3", "language": "python", "name": "python3"}
    nbformat.write(new_notebook(cells=[new_markdown_cell("# Tiny"), *cells], metadata={"kernelspec": kernel}), path)


@pytest.fixture
def project(tmp_path):
    "Make a project with an experiment, one that fails, and a notebook that is no experiment."
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = sdmad_nb\n")
    (tmp_path / "nbs").mkdir()
    for name in ("run_tiny.ipynb", "other.ipynb"):
        write_notebook(tmp_path / "nbs" / name, "slice = 0\nresults = ''", "print('slice', slice)", WORKING)
    write_notebook(tmp_path / "nbs" / "run_fails.ipynb", "slice = 0", "print('before')", "1 / 0", "print('after')")
    return tmp_path


def printed(path):
    "Return what the cells of an executed notebook printed."
    outputs = [output for cell in nbformat.read(path, as_version=4).cells for output in cell.get("outputs", [])]
    return "".join(output.text for output in outputs if output.get("name") == "stdout")


def on_terminal(*command, cwd):  # (exit code, what the terminal showed)
    "Run a command that believes to be on a terminal."
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))  # lines, columns
    process = subprocess.Popen(command, cwd=cwd, stdin=theirs, stdout=theirs, stderr=theirs, close_fds=True)
    os.close(theirs)
    shown = b""
    while True:
        try: part = os.read(ours, 4096)
        except OSError: break  # Linux says so when the last process has closed the terminal
        if not part: break
        shown += part
    os.close(ours)
    return process.wait(), shown.decode(errors="replace")


def test_on_a_terminal(project):
    code, shown = on_terminal(PAPERMILL, "nbs/run_tiny.ipynb", "-p", "slice", "5", cwd=project)
    assert code == 0, shown
    assert "results/tiny/run_tiny-slice5.ipynb" in shown
    assert "Executing: 100%" in shown and "working" in shown
    assert printed(project / "results/tiny/run_tiny-slice5.ipynb") == "slice 5\n"


@pytest.mark.parametrize("stdin, stdout, module", [("null", "file", False), ("pipe", "pipe", False),
                                                   ("pipe", "file", True), ("null", "pipe", True)])
def test_without_a_terminal(project, stdin, stdout, module):
    command = [sys.executable, "-m", "papermill"] if module else [PAPERMILL]
    with open(project / "out.txt", "w") as file:
        done = subprocess.run([*command, "nbs/run_tiny.ipynb", "-p", "slice", "5"], cwd=project, text=True,
                              stdout=file if stdout == "file" else subprocess.PIPE, stderr=subprocess.PIPE,
                              **({"input": ""} if stdin == "pipe" else {"stdin": subprocess.DEVNULL}))
    assert done.returncode == 0, done.stderr
    assert "Output Notebook: results/tiny/run_tiny-slice5.ipynb" in done.stderr and "100%" in done.stderr
    assert "working" not in done.stderr
    assert printed(project / "results/tiny/run_tiny-slice5.ipynb") == "slice 5\n"
    assert not (done.stdout or "") + (project / "out.txt").read_text()  # no notebook's JSON


def test_from_another_folder(project):
    done = run(PAPERMILL, "run_tiny.ipynb", "--prepare-only", cwd=project / "nbs")
    assert done.returncode == 0 and (project / "results/tiny/run_tiny.ipynb").is_file(), done.stderr
    names = sorted(path.name for path in (project / "nbs").iterdir())
    assert names == ["other.ipynb", "run_fails.ipynb", "run_tiny.ipynb"]


def test_a_failing_cell(project):
    done = run(PAPERMILL, "nbs/run_fails.ipynb", cwd=project)
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr
    text = printed(project / "results/fails/run_fails.ipynb")
    assert "before" in text and "after" not in text


def test_results_elsewhere(project):
    done = run(PAPERMILL, "nbs/run_tiny.ipynb", "-p", "results", "out", "--prepare-only", cwd=project)
    assert done.returncode == 0 and (project / "out/tiny/run_tiny.ipynb").is_file(), done.stderr
    (project / "file").write_text("")
    done = run(PAPERMILL, "nbs/run_tiny.ipynb", "-p", "results", "file", cwd=project)
    assert done.returncode == 1 and "Traceback" not in done.stderr and "-p results FOLDER" in done.stderr


def test_a_given_output_path_is_used(project):
    done = run(PAPERMILL, "nbs/run_tiny.ipynb", "mine.ipynb", "--prepare-only", cwd=project)
    assert done.returncode == 0 and (project / "mine.ipynb").is_file()
    done = run(PAPERMILL, "nbs/run_tiny.ipynb", "-", "--prepare-only", cwd=project)
    assert done.returncode == 0 and json.loads(done.stdout)["nbformat"] == 4
    assert not (project / "results").exists()


def test_other_notebooks_are_left_alone(project):
    code, shown = on_terminal(PAPERMILL, "nbs/other.ipynb", cwd=project)
    assert code == 2 and "OUTPUT_PATH" in shown
    done = run(PAPERMILL, "nbs/other.ipynb", "--prepare-only", cwd=project)
    assert done.returncode == 0 and json.loads(done.stdout)["nbformat"] == 4
    (project / "settings.ini").write_text("[DEFAULT]\nlib_name = another\n")
    code, shown = on_terminal(PAPERMILL, "nbs/run_tiny.ipynb", cwd=project)
    assert code == 2 and "OUTPUT_PATH" in shown
    assert not (project / "results").exists()


def test_questions_are_left_alone(project):
    for words, answer in ((["--version"], "papermill"), (["--help"], "OUTPUT_PATH"),
                          (["nbs/run_tiny.ipynb", "--help-notebook"], "slice")):
        done = run(PAPERMILL, *words, cwd=project)
        assert done.returncode == 0 and answer in done.stdout, done.stderr
    assert not (project / "results").exists()


@pytest.mark.parametrize("words", [["-p", "slcie", "5"], ["-y", "slcie: 5"], ["-p", "slice", "5", "-f", "file.yaml"],
                                   ["mine.ipynb", "-r", "slcie", "5"]], ids=" ".join)
def test_a_misspelt_parameter_is_refused(project, words):
    "Before a cell has run, in one sentence, whichever option gives it and wherever the executed notebook should go."
    (project / "file.yaml").write_text("slcie: 5")
    done = run(PAPERMILL, "nbs/run_tiny.ipynb", *words, cwd=project)
    last = done.stderr.strip().splitlines()[-1]
    assert done.returncode == 1 and "no parameter 'slcie', the nearest is 'slice'" in last, done.stderr
    assert "Traceback" not in done.stderr and not list(project.rglob("*-slcie*.ipynb")) + list(project.glob("mine.ipynb"))


def test_paths_can_be_injected_and_other_notebooks_take_any_parameter(project):
    for words in (["nbs/run_tiny.ipynb", "--inject-paths"], ["nbs/other.ipynb", "mine.ipynb", "-p", "slcie", "5"]):
        done = run(PAPERMILL, *words, cwd=project)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("notebook", RUNS, ids=notebook_name)
def test_parameters_of_an_experiment_are_explained_and_checked(notebook):
    "`papermill --help-notebook` shows a type and a help for each; a name that is none of them is refused."
    told = papermill.inspect_notebook(str(notebook))
    assert told and all(one["inferred_type_name"] != "None" and one["help"].strip() for one in told.values()), told
    book = parameterize_notebook(load_notebook_node(str(notebook)), {**dict.fromkeys(told, 0), "reslts": 0})
    with pytest.raises(SystemExit, match="no parameter 'reslts', the nearest is 'results'"):
        engine.execute_notebook(book, "python3")


def test_papermill_as_a_library(project):
    code = "import sys; import papermill; print(sys.argv[1:])"
    done = run(sys.executable, "-c", code, "nbs/run_tiny.ipynb", cwd=project)
    assert done.stdout.strip() == "['nbs/run_tiny.ipynb']" and not (project / "results").exists()


def test_an_error_of_ours_leaves_papermill_alone(project):
    (project / "settings.ini").write_bytes(b"\xff")  # not UTF-8
    done = run(PAPERMILL, "nbs/run_tiny.ipynb", "--prepare-only", cwd=project)
    assert done.returncode == 0 and json.loads(done.stdout)["nbformat"] == 4
    assert "sdmad_nb left the command line as it was" in done.stderr and "Traceback" not in done.stderr


def test_the_hook_is_light():
    code = "import sys, sdmad_nb.app.papermill_engine; print({'torch', 'numpy', 'papermill'} & {*sys.modules})"
    assert run(sys.executable, "-c", code).stdout.strip() == "set()"
