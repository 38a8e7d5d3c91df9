"The documentation site: it builds, is whole, and needs nothing from elsewhere."
import ast
import json
import re
import sys
from html.parser import HTMLParser
from importlib.util import find_spec
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from conftest import NOTEBOOKS, ROOT, notebook_name, run

MISSING = [name for name in ("sphinx", "myst_nb", "furo", "sphinx-mathjax-offline") if not find_spec(name)]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"the site needs {', '.join(MISSING)}: pip install -e .[docs]")
MODULES = sorted((ROOT / "sdmad_nb").glob("*/[!_]*.py"))


def module_name(path): return f"{path.parent.name}.{path.stem}"  # such as core.losses


class Page(HTMLParser):
    "What a page shows, where its links lead, and what it loads."
    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loads, self.words, self.skipped = {""}, [], [], [], ""
        self.feed(path.read_text(encoding="utf-8"))
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.ids |= {found[key] for key in ("id", "name") if found.get(key)}
        if tag == "a" and "href" in found: self.links.append(found["href"])
        if tag == "link" and found.get("rel") not in ("next", "prev", "index", "search"): self.loads.append(found["href"])
        self.loads += [found[key] for key in ("src", "srcset", "data") if found.get(key) and tag != "a"]
        if tag in ("script", "style"): self.skipped = tag

    def handle_endtag(self, tag):
        if tag == self.skipped: self.skipped = ""

    def handle_data(self, data):
        if not self.skipped: self.words.append(data)


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    "Build the site as `make docs` does; return its folder and its pages."
    out = tmp_path_factory.mktemp("site")
    done = run(sys.executable, ROOT / "docs" / "build.py", out)
    assert done.returncode == 0, done.stdout + done.stderr
    return out, {path.relative_to(out).as_posix(): Page(path) for path in out.rglob("*.html")}


def elsewhere(link): return bool(urlsplit(link).scheme or urlsplit(link).netloc) and not link.startswith("data:")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=notebook_name)
def test_every_notebook_has_a_page(site, notebook):
    "With its title and its code, without nbdev's directives and what they hide."
    page, book = site[1][f"{notebook_name(notebook)}.html"].text, nbformat.read(notebook, as_version=4)
    assert book.cells[0].source.splitlines()[0].removeprefix("# ").replace("`", "") in page
    told = sum(line.count("#| ") for cell in book.cells for line in cell.source.splitlines()
               if cell.cell_type == "markdown" or not line.startswith("#|"))  # a guide may speak of them, or write them
    assert page.count("#| ") == told and "- skip_exec" not in page
    for cell in book.cells:
        lines = [line for line in cell.source.splitlines() if not line.startswith("#|")]
        if cell.cell_type != "code" or not lines: continue
        unseen = cell.source.startswith(("#| hide", "#| echo: false"))
        line = " ".join(max(lines, key=len).split())
        others = "\n".join(other.source for other in book.cells if other is not cell)
        if unseen: assert line not in page or max(lines, key=len) in others, f"hidden, and yet shown: {line}"
        else: assert line.replace(" ", "") in page.replace(" ", ""), f"not shown: {line}"


def test_the_sidebar_files_notebooks_by_their_folders(site):
    "Whatever the index or a notebook says of another, with or without a slash: each stands once, under its own heading."
    sidebar = (site[0] / "index.html").read_text(encoding="utf-8").partition('class="sidebar-tree"')[2].partition("</aside>")[0]
    names, filed = {notebook_name(path) for path in NOTEBOOKS} - {"index"}, {}
    for part in sidebar.split('class="caption"')[1:]:
        caption = re.search(r'"caption-text">([^<]+)<', part)[1]
        for page in re.findall(r'href="([^"#]+)\.html"', part):
            if page in names: filed.setdefault(page, []).append(caption)
    top = lambda name: "Experiments" if name.startswith(("run_", "train_")) else "Start here"
    assert filed == {name: [name.partition("/")[0].capitalize() if "/" in name else top(name)] for name in names}


def test_every_public_name_is_in_the_reference(site):
    ids = set().union(*(page.ids for name, page in site[1].items() if name.startswith("api/")))
    names = {word: module.stem for module in MODULES for node in ast.parse(module.read_text(encoding="utf-8")).body
             if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__"
             for word in ast.literal_eval(node.value)}
    lost = [word for word in names if not any(name.startswith("sdmad_nb.") and name.endswith(f".{word}") for name in ids)]
    assert len(names) > 100 and not lost, f"not in the reference: {lost}"


def test_what_an_argument_means_is_in_the_reference(site):
    "The comment behind an argument is in its row, with its type and default."
    out, pages = site
    rows = [[re.sub("<[^>]*>", "", cell).strip() for cell in re.findall(r"<td>(.*?)</td>", row, flags=re.S)]
            for row in re.findall(r"<tr.*?</tr>", (out / "api" / "core.config.html").read_text(encoding="utf-8"), flags=re.S)]
    assert ["depth", "int", "number of transformer blocks of the backbone"] in rows
    assert ["shots", "int", "1", "K images per category. Tables 2-3: 1"] in rows  # a field of a dataclass
    assert "Turn a preset or a list into the numbers of the blocks" in pages["api/core.config.html"].text
    assert "sdmad_nb.core.adapters.ShiftAdapter.forward" in pages["api/core.adapters.html"].ids


def test_no_link_leads_nowhere(site):
    "Every link, picture and anchor inside the site is there."
    out, pages = site
    lost = []
    for name, page in pages.items():
        for link in page.links + page.loads:
            if elsewhere(link) or link.startswith("data:"): continue
            parts = urlsplit(link)
            target = (out / name).parent.joinpath(unquote(parts.path)) if parts.path else out / name
            if not target.is_file(): lost.append(f"{name}: {link}")
            elif target.suffix == ".html":
                there = pages[target.resolve().relative_to(out.resolve()).as_posix()]
                if unquote(parts.fragment) not in there.ids: lost.append(f"{name}: {link}")
    assert sum(len(page.links) for page in pages.values()) > 1000 and not lost, "\n".join(lost)


def test_nothing_is_loaded_from_elsewhere(site):
    "No script, style, font or picture: the site can be read, with its equations, without a connection."
    out, pages = site
    found = [f"{name}: {link}" for name, page in pages.items() for link in page.loads if elsewhere(link)]
    loads = re.compile(r"(?:url\(|@import)\s*[\"']?((?:https?:)?//[^\"')]*)")
    for path in out.rglob("*.css"):
        found += [f"{path.name}: {link}" for link in loads.findall(path.read_text(encoding="utf-8"))]
    assert not found, "\n".join(found)
    losses = (out / "core/04_losses.html").read_text(encoding="utf-8")
    assert losses.count('class="math') > 20 and re.search(r'src="(?:\.\./)*_static/tex-svg\.js', losses)
    assert (out / "_static" / "tex-svg.js").stat().st_size > 10**6


def test_search_works_without_a_server(site):
    "The index of words is a script beside the pages; words of prose, code and outputs are in it."
    out, pages = site
    index = json.loads((out / "searchindex.js").read_text(encoding="utf-8").removeprefix("Search.setIndex(").removesuffix(")"))
    assert {notebook_name(path) for path in NOTEBOOKS} | {f"api/{module_name(path)}" for path in MODULES} <= set(index["docnames"])
    documents = index["terms"]["craniotomi"]  # stems, as the search makes them of what is typed
    assert "data/02_phantom" in [index["docnames"][number] for number in ([documents] if isinstance(documents, int) else documents)]
    assert any(entry[4] == "cosine_distance" for entry in index["objects"]["sdmad_nb.core.losses"])
    assert any(load.startswith("searchindex.js") for load in pages["search.html"].loads)
