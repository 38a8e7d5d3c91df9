"Sphinx's settings for the site that build.py makes. Nothing in it needs a connection: not to build, read or search it."
from configparser import ConfigParser
from importlib.util import find_spec
from pathlib import Path

here = Path(__file__).resolve().parent
settings = ConfigParser(delimiters=["="])
settings.read(here.parent / "settings.ini", encoding="utf-8")
settings = settings["DEFAULT"]

project, author, version = settings["lib_name"], settings["author"], settings["version"]
project_copyright = settings["copyright"]
html_title = f"{project} {version}"
extensions = ["myst_nb", "sphinx.ext.mathjax"]

# Notebooks are shown as they are stored. Progress bars are the only thing that they have on stderr.
nb_execution_mode = "off"
nb_output_stderr = "remove"
nb_merge_streams = True
nb_render_markdown_format = "myst"
nb_ipywidgets_js = {}
myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence", "html_image"]
myst_heading_anchors = 4

# All of MathJax that equations need, in one file, with its glyphs as curves: no fonts, and nothing is loaded later.
mathjax_path = "tex-svg.js"
html_static_path = [
    str(Path(find_spec("sphinx-mathjax-offline").origin).parent / "static" / "mathjax" / mathjax_path),
    str(here / "site.css")]
html_css_files = ["site.css"]

html_theme = "furo"
html_copy_source = html_show_sourcelink = False
smartquotes = False
python_maximum_signature_line_length = 100
python_use_unqualified_type_names = True
add_module_names = False
