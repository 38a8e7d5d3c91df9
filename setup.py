"Packaging, read from settings.ini (nbdev keeps its settings there)."
import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]
extras = {name[: -len("_requirements")]: settings[name].split() for name in settings if name.endswith("_requirements")}
readme = here / "README.md"


def described():
    "Return README.md with links and pictures that also lead somewhere away from the checkout."
    if not readme.is_file(): return settings["description"]
    def whole(match): return f"{match[1]}({settings['git_url']}/{'raw' if match[1][0] == '!' else 'blob'}/{settings['branch']}/"
    return re.sub(r"(!?\[[^\]]*\])\((?![a-z]+:|#)", whole, readme.read_text(encoding="utf-8"))


setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=described(),
    long_description_content_type="text/markdown",
    keywords=settings["keywords"].split(),
    author=settings["author"],
    author_email=settings["author_email"],
    url=settings["git_url"],
    license="Apache-2.0",
    classifiers=[
        "Development Status :: 3 - Alpha",
        f"Intended Audience :: {settings['audience']}",
        f"Natural Language :: {settings['language']}",
        "Programming Language :: Python :: 3 :: Only",
        *(f"Programming Language :: Python :: {version}" for version in settings["tested_python"].split()),
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Medical Science Apps.",
    ],
    packages=find_packages(include=["sdmad_nb", "sdmad_nb.*"]),
    package_data={"sdmad_nb": ["assets/**/*"]},
    python_requires=f">={settings['min_python']}",
    install_requires=settings["requirements"].split(),
    extras_require=extras,
    # papermill loads its engine at every start: see nbs/app/04_papermill_engine.ipynb
    entry_points={"papermill.engine": ["sdmad_nb = sdmad_nb.app.papermill_engine:engine"],
                  "console_scripts": [settings["console_scripts"]]},
    zip_safe=False,
)
