"What the tests share: where things are, a share of the cores, and a count of the notebooks that ran."
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent  # `papermill`, `nbdev_test`, ... of the environment that runs pytest
NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb")
                   if not any(part[0] in "_." for part in path.relative_to(ROOT / "nbs").parts))  # what nbdev sees
EXPERIMENTS = [path for path in NOTEBOOKS if '"parameters"' in path.read_text(encoding="utf-8")]  # run by papermill
LIBRARY = [path for path in NOTEBOOKS if path not in EXPERIMENTS]

# public sets (data_links.md), where they are
REAL = Path(os.environ.get("SDMAD_REAL_DATA") or ROOT.parent / "shared" / "data")

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test downloads weights; a missing file should fail at once
os.environ.setdefault("MPLBACKEND", "agg")
if "PYTEST_XDIST_WORKER" in os.environ:  # `pytest -n`: each has its share of the cores, and threads of one do not wait for another's
    threads = str(max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"])))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"): os.environ.setdefault(name, threads)


@pytest.fixture(autouse=True)
def fresh_torch():
    "Leave torch's default number type as it was: notebooks share this process."
    yield
    if "torch" in sys.modules: sys.modules["torch"].set_default_dtype(sys.modules["torch"].float32)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    "A file's tests share what its fixtures make, so one process takes all; library notebooks fill the gaps one by one."
    from xdist.scheduler import LoadFileScheduling

    class Gaps(LoadFileScheduling):
        def _split_scope(self, nodeid):
            return nodeid if "::test_library_notebook[" in nodeid else super()._split_scope(nodeid)
    return Gaps(config, log)


def notebook_name(path): return path.relative_to(ROOT / "nbs").with_suffix("").as_posix()  # such as tutorials/1_one_image


def run(*command, **kwargs):  # a finished process with text in stdout and stderr; keywords as subprocess.run has them
    "Run a command without a terminal and return what it said."
    kwargs = {"cwd": ROOT, "stdin": subprocess.DEVNULL, "capture_output": True, "text": True, **kwargs}
    return subprocess.run([str(word) for word in command], **kwargs)


def pytest_terminal_summary(terminalreporter):
    "Say how many notebooks and how many other tests passed."
    passed = [report.nodeid for report in terminalreporter.stats.get("passed", []) if report.when == "call"]
    library = sum("::test_library_notebook[" in name for name in passed)
    experiments = sum("::test_experiment_notebook[" in name for name in passed)
    terminalreporter.write_line(
        f"passed: {library} of {len(LIBRARY)} library notebooks (nbdev_test), {experiments} of {len(EXPERIMENTS)} experiment "
        f"notebooks (papermill, smoke), {len(passed) - library - experiments} other tests")
