"What would be released: the sdist and the wheel, and how little is loaded before it is needed."
import importlib.metadata
import os
import re
import shutil
import sys
import tarfile
import zipfile
from email import message_from_string

import pytest
from conftest import ROOT, run
from test_project import SETTINGS, tracked

SOURCES = ["settings.ini", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff",
           "Makefile", "data_links.md", "constraints.txt"]
FOLDERS = ["sdmad_nb", "nbs", "tests", "docs"]
EXTRAS = {name.removesuffix("_requirements"): SETTINGS[name].split() for name in SETTINGS if name.endswith("_requirements")}


@pytest.fixture(scope="session")
def released(tmp_path_factory):
    "Build the sdist from a copy of the sources, and the wheel from the sdist; return both files."
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES: shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
    for name in FOLDERS: shutil.copytree(ROOT / name, source / name, ignore=ignored)
    done = run(sys.executable, "-m", "build", "--no-isolation", cwd=source)
    assert done.returncode == 0, done.stdout + done.stderr
    [sdist], [wheel] = ((source / "dist").glob(pattern) for pattern in ("*.tar.gz", "*.whl"))
    return sdist, wheel


@pytest.fixture(scope="session")
def installed_wheel(released, tmp_path_factory):
    "Unpack the wheel into an empty folder as pip does; return the folder."
    target = tmp_path_factory.mktemp("site")
    done = run(sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "install", "--no-deps", "--no-index",
               "--target", target, released[1])
    assert done.returncode == 0, done.stderr
    return target


def metadata(wheel):
    "Read what a wheel says of itself."
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return message_from_string(archive.read(name).decode("utf-8"))


def test_names_and_versions(released):
    import sdmad_nb
    version = SETTINGS["version"]
    assert [path.name for path in released] == [f"sdmad_nb-{version}.tar.gz", f"sdmad_nb-{version}-py3-none-any.whl"]
    assert metadata(released[1])["Version"] == version == sdmad_nb.__version__
    assert metadata(released[1])["Requires-Python"] == f">={SETTINGS['min_python']}"


def test_twine_finds_no_fault(released):
    done = run(sys.executable, "-m", "twine", "check", "--strict", *released)
    assert done.returncode == 0 and done.stdout.count("PASSED") == 2, done.stdout + done.stderr


def test_the_description_links_to_the_repository(released):
    "What the checkout's README points at by a relative path is not beside it on a page of packages."
    text = metadata(released[1]).get_payload()
    assert "(nbs/" not in text and f"]({SETTINGS['git_url']}/blob/{SETTINGS['branch']}/nbs/00_overview.ipynb)" in text
    assert f"]({SETTINGS['git_url']}/raw/{SETTINGS['branch']}/nbs/figures/table2.png)" in text


def test_extras_are_those_of_the_settings(released):
    said = metadata(released[1])
    assert {"prepare", "medclip", "docs", "dev"} <= set(EXTRAS) == set(said.get_all("Provides-Extra"))
    def parts(requirement):  # -> name, its limits in any order
        name, *limits = re.split(r"(?=[<>=!~])|,", re.sub(r"[ ()]", "", requirement))
        return name.lower().replace("_", "-"), frozenset(filter(None, limits))
    declared = said.get_all("Requires-Dist")
    for extra, wanted in {"": SETTINGS["requirements"].split(), **EXTRAS}.items():
        marked = [re.sub(r";.*", "", line) for line in declared
                  if (re.findall(r"extra == ['\"](\w+)['\"]", line) or [""]) == [extra]]
        assert set(map(parts, marked)) == set(map(parts, wanted)), extra


def test_dev_brings_all_that_the_tests_need():
    tested = EXTRAS.keys() - {"small", "wide"}  # the training of a backbone and a cluster: their tests are skipped without them
    missing = {extra: sorted(set(EXTRAS[extra]) - set(EXTRAS["dev"])) for extra in tested}
    assert not any(missing.values()), f"add to dev_requirements in settings.ini: {missing}"


def test_sdist_has_what_is_committed(released):
    "Sources, notebooks, tests and what they read; files for git and for CI aside."
    with tarfile.open(released[0]) as archive: names = {name.partition("/")[2] for name in archive.getnames()}
    assert set(SOURCES) <= names and "tests/test_house.py" in names
    committed = {path.relative_to(ROOT).as_posix() for path in tracked()}
    assert {name for name in committed if name[0] != "."} <= names


def test_constraints_are_within_the_bounds():
    "What has been tested is what is allowed, and each requirement was tested."
    from packaging.requirements import Requirement
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    tested = dict(line.split("==") for line in lines if line[0] != "#")
    wanted = [Requirement(word) for word in SETTINGS["requirements"].split()]
    assert {one.name for one in wanted} == set(tested)
    assert [one.name for one in wanted if tested[one.name] not in one.specifier] == []


def test_wheel_has_every_module_and_asset(installed_wheel):
    def files(root): return {path.relative_to(root).as_posix() for path in (root / "sdmad_nb").rglob("*")
                             if path.is_file() and "__pycache__" not in path.parts}

    assert files(installed_wheel) == files(ROOT)


def test_wheel_works_outside_the_checkout(installed_wheel, tmp_path):
    "Import every module from the wheel, with the heavy dependencies borrowed from this environment, and read an asset."
    code = ("import importlib, pathlib, pkgutil, sdmad_nb\n"
            f"assert pathlib.Path(sdmad_nb.__file__).is_relative_to({str(installed_wheel)!r}), sdmad_nb.__file__\n"
            "for module in pkgutil.walk_packages(sdmad_nb.__path__, 'sdmad_nb.'): importlib.import_module(module.name)\n"
            "from sdmad_nb.core.signs import preset_names, preset_path, read_signs\n"
            f"assert preset_path('fastmri_plus').is_relative_to({str(installed_wheel)!r})\n"
            "assert all(read_signs(preset_path(name)).texts for name in preset_names())\n"
            "print(len(preset_names()), 'presets')")
    environment = {**os.environ, "PYTHONPATH": str(installed_wheel), "SDMAD_CACHE": str(tmp_path / "cache")}
    done = run(sys.executable, "-c", code, cwd=tmp_path, env=environment)
    assert done.returncode == 0 and done.stdout.endswith("presets\n"), done.stderr


def test_the_hook_is_installed():
    points = importlib.metadata.entry_points(group="papermill.engine")
    assert [point.value for point in points if point.name == "sdmad_nb"][:1] == ["sdmad_nb.app.papermill_engine:engine"]


@pytest.mark.parametrize("module", ["sdmad_nb", "sdmad_nb.data.prepare", "sdmad_nb.app.papermill_engine"])
def test_import_is_light(module):
    "What takes seconds to import is not imported by what is imported often: the package, the command, papermill's hook."
    heavy = ("torch", "torchvision", "open_clip", "transformers", "nilearn", "matplotlib", "sklearn", "skimage", "scipy")
    done = run(sys.executable, "-c", f"import sys, {module}; print(*(name for name in {heavy} if name in sys.modules))")
    assert done.returncode == 0 and done.stdout.split() == [], done.stdout + done.stderr


def test_help_of_prepare_is_light():
    code = ("import sys; from sdmad_nb.app.command_line import shell\n"
            "assert shell(['prepare', '--help']) == 0\n"
            "assert 'torch' not in sys.modules")
    done = run(sys.executable, "-c", code)
    assert done.returncode == 0 and "fastmri-plus" in done.stdout, done.stderr
