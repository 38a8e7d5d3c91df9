"The project around the notebooks: settings, README, and what is committed."
import ast
import importlib.metadata
import re
import sys
from configparser import ConfigParser

import pytest
from conftest import NOTEBOOKS, ROOT, run
from readme import picture, readme

config = ConfigParser(delimiters=["="])
config.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = config["DEFAULT"]


def tracked():
    "List the files that are committed or about to be."
    done = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if done.returncode: pytest.skip("not a git checkout")
    return sorted(path for name in done.stdout.split("\0") if name and (path := ROOT / name).is_file())


def test_versions_agree():
    import sdmad_nb
    assert sdmad_nb.__version__ == SETTINGS["version"] == importlib.metadata.version("sdmad_nb")
    assert f"## {SETTINGS['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_nbdev_keeps_what_papermill_needs():
    assert SETTINGS["allowed_cell_metadata_keys"] == "tags" and SETTINGS["clear_all"] == "False"
    assert SETTINGS["update_pyproject"] == "False" and SETTINGS["tst_flags"].split() == ["slow", "gpu"]


def test_requirements_are_read_whole():
    names = {re.split(r"[<>=!~]", word)[0] for word in SETTINGS["requirements"].split()}
    wanted = {"torch", "open_clip_torch", "jupyterlab", "papermill", "nbdev", "seaborn", "scikit-learn", "pillow"}
    assert wanted <= names and not any("#" in name for name in names)


def packages(requirements):
    "Name what requirements bring, as it is imported."
    found = set()
    for requirement in requirements.split():
        files = importlib.metadata.files(re.split(r"[<>=!~\[]", requirement)[0]) or []
        found |= {file.parts[0].removesuffix(".py") for file in files}
    return found


def test_every_import_is_a_requirement():
    "What a module imports is required, whatever else brings it along; what only a function imports may be an extra."
    known = {"sdmad_nb", *sys.stdlib_module_names} | packages(SETTINGS["requirements"])
    extras = known | {name for key in ("prepare", "hf", "medclip") for name in packages(SETTINGS[f"{key}_requirements"])}
    missing = set()
    for module in (ROOT / "sdmad_nb").rglob("*.py"):
        tree = ast.parse(module.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            allowed = known if node in tree.body else extras
            missing |= {f"{module.name}: {name}" for name in names if name.split(".")[0] not in allowed}
    assert not missing, f"add to `requirements` in settings.ini: {sorted(missing)}"


def test_progress_bars_are_text():
    "Bars of `tqdm.auto` become widgets in a notebook: unreadable in a saved one, and papermill shows nothing of them."
    users = [path.name for path in [*(ROOT / "sdmad_nb").rglob("*.py"), *NOTEBOOKS]
             if re.search(r"tqdm\.(auto|notebook|autonotebook)", path.read_text(encoding="utf-8"))]
    assert not users, f"write `from tqdm import tqdm` in {users}"


def test_readme_is_made_from_the_index():
    assert (ROOT / "README.md").read_text(encoding="utf-8") == readme(), "run make readme"
    assert (ROOT / "nbs" / "figures" / "overview.png").read_bytes() == picture(), "run make readme"
    assert len(readme().splitlines()) <= 130, "the README is what a person reads first: results have a page of their own"


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "data_links.md", "CHANGELOG.md"])
def test_links_lead_somewhere(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    links = re.findall(r"\]\((?![a-z]+:|#)([^)#\s]+)", text) + re.findall(r'src="(?![a-z]+:)([^"]+)"', text)
    lost = [link for link in links if not (ROOT / link).exists()]
    assert not lost, f"{page} links to what is not there: {lost}"


def test_nothing_of_this_machine_is_committed():
    "No absolute path of the machine that a file was made on, and no package index's address."
    paths = r"(?<![\w.~$}*-])/(?:home|Users|root|work|tmp|mnt|private)/[\w.]|[A-Z]:\\\\?Users"
    index = r"https?://[^\s/\"]*(?:p[y]pi|artifactory|devpi|nexus)|(?:extra-)?index-[u]rl|--find-[l]inks"
    bad = re.compile(f"{paths}|{index}")
    found = []
    for path in tracked():
        if path.suffix in (".png", ".svg", ".safetensors", ".gz", ".pdf"): continue
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            line = re.sub(r'"image/(png|jpeg)": "[^"]*"', "", line)
            if match := bad.search(line): found.append(f"{path.relative_to(ROOT)}:{number}: {match[0]}")
    assert not found, "\n".join(found)


def test_committed_files_are_small():
    sizes = {path.relative_to(ROOT).as_posix(): path.stat().st_size / 2**20 for path in tracked()}
    assert not {name: size for name, size in sizes.items() if size > (25 if "assets" in name else 4)}


def test_license_is_whole():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "Version 2.0, January 2004" in text
    assert all(f"\n   {number}. " in text for number in range(1, 10)) and "END OF TERMS AND CONDITIONS" in text
