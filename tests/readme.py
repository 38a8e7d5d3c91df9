"Make README.md from nbs/index.ipynb, and its picture from nbs/00_overview.ipynb: `make readme`."
import re
from base64 import b64decode
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"(\]\(|src=\")(?![a-z]+:|#|/)([^)\"]+)")  # relative targets of links and pictures


def from_root(match):
    "Write a link that is relative to nbs/ relative to the project's root."
    start, target = match.groups()
    return start + (target[len("../"):] if target.startswith("../") else f"nbs/{target}")


def readme():  # ValueError for an output that is a picture
    "Return README.md's text: the notebook as markdown, without its `#| hide` cells."
    book = nbformat.read(ROOT / "nbs" / "index.ipynb", as_version=4)
    book.cells = [cell for cell in book.cells if not cell.source.startswith("#| hide")]
    for cell in book.cells:
        if cell.cell_type == "markdown": cell.source = LINK.sub(from_root, cell.source)
        elif cell.source.startswith("#| echo: false"): cell.source = "#| echo: false"  # its output alone is shown
    text, resources = MarkdownExporter().from_notebook_node(book)
    if resources["outputs"]:
        raise ValueError("a picture that a cell draws cannot be shown in README.md: save it to a file and link to that")
    text = re.sub(r"```\w*\n#\| echo: false\n```\n", "", text)
    text = re.sub(r"^#\| .*\n", "", text, flags=re.M)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def picture():  # PNG bytes
    "Return the figure of the method, as the overview has drawn it."
    book = nbformat.read(ROOT / "nbs" / "00_overview.ipynb", as_version=4)
    outputs = [output for cell in book.cells if cell.cell_type == "code" for output in cell.outputs]
    return b64decode(next(output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})))


if __name__ == "__main__":
    (ROOT / "nbs" / "figures" / "overview.png").write_bytes(picture())
    (ROOT / "README.md").write_text(readme(), encoding="utf-8")
