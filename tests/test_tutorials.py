"The tutorials: what is stored in them, and the panel of the third in a browser, as if by hand."
import os
import re
import secrets
import shutil
import socket
import subprocess
import time
from importlib.util import find_spec
from urllib.request import Request, urlopen

import nbformat
import pytest
from conftest import BIN, NOTEBOOKS, ROOT, notebook_name

TUTORIALS = [path for path in NOTEBOOKS if path.parent.name == "tutorials"]


@pytest.mark.parametrize("notebook", TUTORIALS, ids=notebook_name)
def test_a_tutorial_can_be_read_without_running_it(notebook):
    "Every cell was run in order, without an error; pictures are kept, paths of a machine and widgets' states are not."
    book = nbformat.read(notebook, as_version=4)
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"] and "widgets" not in book.metadata
    assert any("image/png" in output.get("data", {}) for output in outputs)
    shown = [{"text/plain": output.get("text", ""), **output.get("data", {})} for output in outputs]
    texts = [str(text) for one in shown for kind, text in one.items() if kind.startswith("text/")]
    assert not re.search(r"(?<![\w.])/(?:home|Users|root|work|tmp|mnt|private|var)/\w", " ".join(texts))
    asserts = re.findall(r"\bassert\b|\brefused\(|\btest_fail\(", "\n".join(cell.source for cell in cells))
    assert len(asserts) >= 5, "a tutorial asserts what it says"


def test_the_shell_lines_that_a_tutorial_begins_with_are_those_that_it_runs():
    cells = nbformat.read(ROOT / "nbs" / "tutorials" / "2_your_own_folder.ipynb", as_version=4).cells
    lines = re.search(r"```sh\n(.*?)```", cells[0].source, re.S)[1].splitlines()
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    assert len(lines) == 4 and all(f'run("{line}") == 0' in code for line in lines)


def test_the_readme_leads_to_every_tutorial():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(TUTORIALS) == 6 and all(f"(nbs/{notebook_name(path)}.ipynb)" in readme for path in TUTORIALS)


# In a browser

CHROMIUM, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
NEEDED = {"chromium": CHROMIUM, "chromedriver (Debian: chromium-driver)": DRIVER, "selenium": find_spec("selenium")}
MISSING = [name for name, there in NEEDED.items() if not there]


@pytest.fixture
def lab(tmp_path):
    "Run JupyterLab on a free port with a copy of the notebook; return the address of the notebook."
    book = nbformat.read(ROOT / "nbs" / "tutorials" / "3_better_signs.ipynb", as_version=4)
    for cell in book.cells:
        if cell.cell_type == "code": cell.outputs, cell.execution_count = [], None  # what is seen was run here
    nbformat.write(book, tmp_path / "3_better_signs.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token, address = secrets.token_hex(16), f"http://127.0.0.1:{port}"
    folders = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR",
               "JUPYTERLAB_WORKSPACES_DIR")
    environment = {key: value for key, value in os.environ.items() if key != "MPLBACKEND"}
    environment |= {name: str(tmp_path / name.lower()) for name in folders} | {"TQDM_DISABLE": "1"}
    options = ("--no-browser", "--allow-root", f"--port={port}", "--ip=127.0.0.1", f"--IdentityProvider.token={token}",
               "--LabApp.expose_app_in_browser=True", f"--ServerApp.root_dir={tmp_path}")
    with (tmp_path / "lab.log").open("w") as log:
        server = subprocess.Popen([BIN / "jupyter", "lab", *options], cwd=tmp_path, env=environment,
                                  stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        status = Request(f"{address}/api/status", headers={"Authorization": f"token {token}"})
        try:
            wait(lambda: server.poll() is None and urlopen(status, timeout=2), 60)
            yield f"{address}/lab/tree/3_better_signs.ipynb?token={token}"
        finally:
            server.terminate()
            server.wait(10)


def wait(ready, seconds, every=0.25):  # what `ready` returned; AssertionError when it takes too long
    "Ask again and again; a question that cannot be answered yet is one that is not answered yet."
    end, problem = time.monotonic() + seconds, None
    while time.monotonic() < end:
        try:
            if answer := ready(): return answer
        except Exception as error: problem = error  # the page or the server is not there yet
        time.sleep(every)
    raise AssertionError(f"not after {seconds} s: {problem}")


@pytest.fixture
def browser(tmp_path):
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service
    options = ChromeOptions()
    options.binary_location = CHROMIUM
    for word in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu",
                 "--window-size=1300,1100", f"--user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(word)
    driver = Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


READY = "return jupyterapp.shell.currentWidget.sessionContext.session.kernel.status == 'idle'"
RUN_ALL = """jupyterapp.commands.execute('notebook:run-all-cells').then(() => {
    window.ran = jupyterapp.shell.currentWidget.content.widgets
        .filter(cell => cell.model.type == 'code').map(cell => cell.model.toJSON()) })"""


@pytest.mark.skipif(bool(MISSING), reason=f"the browser test needs {', '.join(MISSING)}")
def test_typing_another_sign_changes_score_and_map(lab, browser, tmp_path):
    "In JupyterLab: run all cells, choose a finding, type a sign, leave the field, and read the panel."
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select
    find = lambda css: browser.find_elements("css selector", f".jp-OutputArea-output .jupyter-widgets{css}")

    def row():  # the finding's cells: score as fitted, now, change, decision as fitted, now
        line = next(line for line in find(" tr") if line.text.startswith("Enlarged ventricles"))
        return [cell.text for cell in line.find_elements("tag name", "td")]

    browser.get(lab)
    wait(lambda: browser.execute_script(READY), 60)
    browser.execute_script(RUN_ALL)
    cells = wait(lambda: browser.execute_script("return window.ran"), 600)  # ends with the first error too
    failed = [part for cell in cells for part in cell["outputs"] if part["output_type"] == "error"]
    assert all(cell["execution_count"] for cell in cells), failed or cells
    browser.execute_script("arguments[0].scrollIntoView()", wait(lambda: find(" textarea"), 60)[0])
    wait(lambda: find(" button"), 60)[0].click()  # all as fitted
    Select(find(" select")[1]).select_by_visible_text("Enlarged ventricles")
    field, picture = find(" textarea")[0], lambda: find(".widget-image")[0].get_attribute("src")
    wait(lambda: "ventricles" in field.get_attribute("value") and float(row()[2]) == 0, 60)
    first, seen = row(), picture()
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys("ventricles of normal size", Keys.TAB)
    wait(lambda: row() != first, 60)
    browser.execute_script("arguments[0].scrollIntoView()", find(" select")[0])
    browser.save_screenshot(tmp_path / "panel.png")
    fitted, now, change, *_ = map(float, row()[:3])
    assert fitted == float(first[0]) and now < 2 / 3 * fitted and abs(now - fitted - change) < 0.002
    assert picture() != seen
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys("a {thing}", Keys.TAB)
    assert wait(lambda: [part for part in find(".widget-html") if "remove braces" in part.text], 60)
    assert row()[1] == f"{now:.3f}"
