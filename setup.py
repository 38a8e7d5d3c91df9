"Packaging, read from settings.ini (nbdev keeps its settings there)."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]
extras = {name[: -len("_requirements")]: settings[name].split() for name in settings if name.endswith("_requirements")}
readme = here / "README.md"

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.is_file() else settings["description"],
    long_description_content_type="text/markdown",
    keywords=settings["keywords"].split(),
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    license="Apache-2.0",
    packages=find_packages(include=["sdmad_nb", "sdmad_nb.*"]),
    package_data={"sdmad_nb": ["assets/**/*"]},
    python_requires=f">={settings['min_python']}",
    install_requires=settings["requirements"].split(),
    extras_require=extras,
    # papermill loads it at every start: see nbs/14_papermill.ipynb
    entry_points={"papermill.engine": ["sdmad_nb = sdmad_nb.papermill_engine:engine"]},
    zip_safe=False,
)
