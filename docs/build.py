"Build the documentation site from the notebooks and the modules: `make docs`, or python docs/build.py FOLDER."
import ast
import importlib
import inspect
import os
import re
import shutil
import sys
import tempfile
from configparser import ConfigParser
from dataclasses import is_dataclass
from pathlib import Path
from typing import Annotated, get_origin

import nbformat
from fastcore.docments import docments
from sphinx.cmd.build import main as sphinx

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / "nbs"
NOTEBOOKS = {path.relative_to(NBS).with_suffix("").as_posix(): path for path in sorted(NBS.rglob("*.ipynb"))
             if not any(part[0] in "_." for part in path.relative_to(NBS).parts)}  # by the names of their pages
ROOMS = ("core", "data", "methods", "lab", "app")
MODULES = [f"{room}.{path.stem}" for room in ROOMS for path in sorted((ROOT / "sdmad_nb" / room).glob("[!_]*.py"))]
PAGES = ("data_links.md", "CONTRIBUTING.md", "CHANGELOG.md")
EMPTY = inspect.Parameter.empty
MARK = re.compile(r"[\\*_{}\[\]<>$#~]")  # what Markdown could take for markup
NAME = re.compile(r"(?<![\w`\[/}])`([A-Za-z_0-9][\w./]*)`(?![`\]])")  # `name`, alone in backticks and in no link
sys.path.insert(0, str(ROOT))  # the modules of this checkout, whatever is installed


def public(name):  # of a module
    "Yield the names that a module defines and exports."
    module = importlib.import_module(f"sdmad_nb.{name}")
    for word in module.__all__:
        if getattr(getattr(module, word), "__module__", module.__name__) == module.__name__ or word in constants(name):
            yield word, getattr(module, word)


def constants(name):  # of a module
    "Find the source of what a module assigns, by the names that are assigned."
    text = (ROOT / "sdmad_nb" / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8")
    lines, found = text.splitlines(), {}
    for node in ast.parse(text).body:
        if not isinstance(node, ast.Assign): continue
        for target in node.targets:
            for word in target.elts if isinstance(target, ast.Tuple) else [target]:
                if isinstance(word, ast.Name): found[word.id] = "\n".join(lines[node.lineno - 1:node.end_lineno])
    return found


# Links

def moved(text, folder):  # folder of the text in the checkout: "nbs", "nbs/tutorials" or ""
    "Lead relative links to pages of the site, or to the repository where the site has no such page."
    settings = ConfigParser(delimiters=["="])
    settings.read(ROOT / "settings.ini", encoding="utf-8")
    def new(match):
        path = os.path.normpath(os.path.join(folder, match[1]))
        if path in PAGES or path.startswith("nbs/"):
            return f"]({os.path.relpath(path.removeprefix('nbs/'), folder.removeprefix('nbs').lstrip('/') or '.')}"
        if not (ROOT / path).exists(): return match[0]  # Sphinx will say so
        return f"]({settings['DEFAULT']['git_url']}/blob/{settings['DEFAULT']['branch']}/{path}"
    return re.sub(r"\]\((?![a-z]+:|[#/])([^)#\s]+)", new, text)


def link_table():  # {what stands in backticks: role or link}
    "Say where names lead: a public name of a module to its entry, a notebook's name to the notebook."
    owners = {word: (name, thing) for name in MODULES for word, thing in public(name)}
    arguments = {word for _, thing in owners.values() if callable(thing) for word in inspect.signature(thing).parameters}
    links = {word: f"{{py:obj}}`{word} <sdmad_nb.{name}.{word}>`" for word, (name, _) in owners.items() if word not in arguments}
    return links | {name: f"[`{name}`](/{name}.ipynb)" for name in NOTEBOOKS}


def linked(text, links):
    "Put links on the names in backticks, but for code blocks and headings."
    parts = re.split(r"(^```.*?^```|^#.*?$)", text, flags=re.M | re.S)
    return "".join(part if i % 2 else NAME.sub(lambda match: links.get(match[1], match[0]), part)
                   for i, part in enumerate(parts))


def escaped(text):
    "Keep Markdown from seeing markup outside of backticks."
    return "".join(part if i % 2 else MARK.sub(r"\\\g<0>", part) for i, part in enumerate(re.split(r"(`[^`]*`)", text)))


def table_of(rows):  # -> lines
    "Write rows as a Markdown table without its empty columns; the first row is its head."
    kept = [column for column in range(len(rows[0])) if any(row[column] for row in rows[1:])]
    lines = ["| " + " | ".join(row[column].replace("|", "\\|") for column in kept) + " |" for row in rows]
    return [lines[0], "|---" * len(kept) + "|", *lines[1:], ""]


# Notebooks

def shown(cell):  # -> cell without its directives, or None
    "Do what a cell's `#|` lines say."
    directives = [line[2:].strip() for line in cell.source.splitlines() if line.startswith("#|")]
    cell.source = re.sub(r"^#\|.*\n?", "", cell.source, flags=re.M).strip("\n")
    if "hide" in directives or not cell.source: return None
    if "echo: false" in directives: cell.metadata.tags = ["remove-input"]
    for output in cell.get("outputs", []): output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)  # needs a kernel
    return cell


def notebook(path, links):
    "Make the page of a notebook: what a reader should see, with links to the names in it."
    book = nbformat.read(path, as_version=4)
    book.cells[0].source = re.sub(r"^- \w+: \w+\n", "", book.cells[0].source, flags=re.M)  # nbdev's front matter
    book.cells = [cell for cell in map(shown, book.cells) if cell]
    for cell in book.cells:
        if cell.cell_type == "markdown": cell.source = linked(moved(cell.source, path.parent.relative_to(ROOT).as_posix()), links)
    return book


def contents():
    "List the notebooks as tables of contents, by the folders that they are in and by nothing that is said of them."
    inside = lambda folder: [name for name in NOTEBOOKS if name.startswith(f"{folder}/")]
    top = [name for name in NOTEBOOKS if "/" not in name and name != "index"]
    experiments = [name for name in top if name.startswith(("run_", "train_"))]
    groups = {"Start here": [name for name in top if name not in experiments], "Tutorials": inside("tutorials"),
              **{room.capitalize(): inside(room) for room in ROOMS}, "Experiments": experiments, "Questions": inside("questions"),
              "Reference": ["api/index"], "Project": [page.removesuffix(".md") for page in PAGES]}
    return "\n\n".join("\n".join([":::{toctree}", ":hidden:", f":caption: {caption}", "", *names, ":::"])
                       for caption, names in groups.items())


# Modules

def short(value):  # of a default
    "Write a default as one would type it, and long ones in short."
    if value is EMPTY: return ""
    if isinstance(value, tuple) and len(repr(value)) > 40: return f"({value[0]!r}, ...)"
    return "..." if "object at" in repr(value) or repr(value).startswith("<") else repr(value)


def type_name(annotation):
    "Write a type as the source has it."
    if annotation in (None, type(None), EMPTY): return ""  # docments takes the type of a default
    if get_origin(annotation) is Annotated: annotation = annotation.__origin__  # without the limits of a schema
    if isinstance(annotation, type) and not hasattr(annotation, "__args__"): return f"`{annotation.__name__}`"
    return f"`{annotation if isinstance(annotation, str) else str(annotation).replace('typing.', '')}`"


class Written(str):
    "A text that is its own repr."
    __repr__ = str.__str__


def signature(function):
    "Write the names and defaults of the arguments; their types are in the table."
    items = [item.replace(annotation=EMPTY, default=EMPTY if item.default is EMPTY else Written(short(item.default)))
             for item in inspect.signature(function).parameters.values() if item.name != "self"]
    return str(inspect.Signature(items))


def arguments(function):  # -> {name: what docments says}
    "Read the comments behind arguments; a field's may stand in the class that it is inherited from."
    found = docments(function, full=True, returns=not isinstance(function, type))
    for base in function.__mro__[1:] if is_dataclass(function) else ():
        for name, item in docments(base, full=True, returns=False).items() if is_dataclass(base) else ():
            found[name].docment = found[name].docment or item.docment
    return found


def table(function, links):  # -> lines; none where there is nothing to say
    "Make the table of arguments from the comments behind them."
    rows = []
    for name, item in arguments(function).items():
        default = "" if name == "return" else short(item.default)
        row = ["*returns*" if name == "return" else f"`{name}`", type_name(item.anno), default and f"`{default}`",
               linked(escaped(" ".join((item.docment or "").split())), links)]
        if name != "self" and (any(row[1:]) or name != "return"): rows.append(row)
    if not any(kind or meaning for _, kind, _, meaning in rows): return []
    return table_of([["argument", "type", "default", "meaning"], *rows])


def directive(kind, title, module, body, colons=3):
    "Write one of Sphinx's Python directives."
    fence = ":" * colons
    return [f"{fence}{{py:{kind}}} {title}", f":module: {module}", "", *body, fence, ""]


def described(thing, links):  # -> lines
    "Write the sentence of a function or class, and its table."
    return [linked(escaped(inspect.cleandoc(thing.__doc__ or "")), links), "", *table(thing, links)]


def methods(owner, module, links):
    "Write the public methods of a class."
    lines = []
    for name, item in vars(owner).items():
        if name.startswith("_") and name != "__call__": continue
        if isinstance(item, property):
            lines += directive("property", f"{owner.__name__}.{name}", module, [escaped(item.__doc__ or "")])
        elif inspect.isfunction(item):
            lines += directive("method", f"{owner.__name__}.{name}{signature(item)}", module, described(item, links))
    return lines


def entry(name, word, thing, links):  # -> lines
    "Write what the reference says of one name."
    module = f"sdmad_nb.{name}"
    if inspect.isclass(thing):
        return directive("class", word + signature(thing), module, described(thing, links) + methods(thing, module, links), 4)
    if callable(thing): return directive("function", word + signature(thing), module, described(thing, links))
    return directive("data", word, module, ["```python", *constants(name)[word].splitlines()[:30], "```"])


def module_page(name, links):
    "Make the page of a module: each public name with its signature, its sentence and its table."
    module = importlib.import_module(f"sdmad_nb.{name}")
    source = re.search(r"File to edit: (?:\.\./)+nbs/(.+)\.ipynb", inspect.getsource(module))[1]
    lines = [f"# sdmad_nb.{name}", "", f":::{{py:module}} sdmad_nb.{name}", ":::", "",
             escaped(inspect.getdoc(module) or ""), "", f"Written, explained and tested in [`{source}`](/{source}.ipynb).", ""]
    for word, thing in public(name): lines += entry(name, word, thing, links)
    return "\n".join(lines)


def reference():
    "Make the page that lists the modules."
    rows = [[f"[`sdmad_nb.{name}`](/api/{name}.md)", escaped(inspect.getdoc(importlib.import_module(f"sdmad_nb.{name}")) or "")]
            for name in MODULES]
    head = ["# Modules", "", "Each module is exported from the notebook that explains it. What an argument means stands behind it "
            "in the source, and the tables are made of that. All names are in the {ref}`index <genindex>`.", ""]
    tree = [":::{toctree}", ":hidden:", "", *MODULES, ":::", ""]
    return "\n".join([*head, *table_of([["module", "what it is for"], *rows]), *tree])


# The site

def write_pages(folder):
    "Write everything that Sphinx reads."
    links = link_table()
    shutil.copytree(ROOT / "nbs" / "figures", folder / "figures", ignore=shutil.ignore_patterns("*.md"))
    for name, path in NOTEBOOKS.items():
        book = notebook(path, links)
        if name == "index": book.cells.append(nbformat.v4.new_markdown_cell(contents(), id="contents"))
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        nbformat.write(book, folder / f"{name}.ipynb")
    for page in PAGES:
        text = moved((ROOT / page).read_text(encoding="utf-8"), "")
        (folder / page).write_text(linked(text, links), encoding="utf-8")
    (folder / "api").mkdir()
    (folder / "api" / "index.md").write_text(reference(), encoding="utf-8")
    for name in MODULES: (folder / "api" / f"{name}.md").write_text(module_page(name, links), encoding="utf-8")


def build(out):  # -> Sphinx's exit status; a link that leads nowhere is an error
    "Build the site whole, and put it in the place of an earlier one."
    with tempfile.TemporaryDirectory() as work:
        source, doctrees, made = (Path(work) / name for name in ("source", "doctrees", "site"))
        source.mkdir()
        write_pages(source)
        status = sphinx(["-b", "html", "-W", "--keep-going", "-q", "-j", "auto", "-c", str(ROOT / "docs"),
                         "-d", str(doctrees), str(source), str(made)])
        if status: return status
        if (out / "searchindex.js").is_file(): shutil.rmtree(out)
        shutil.copytree(made, out, dirs_exist_ok=True)
        return 0


if __name__ == "__main__":
    out = Path(sys.argv[1] if len(sys.argv) > 1 else ROOT / "_docs")
    status = build(out)
    if not status: print(f"open {out / 'index.html'}")
    sys.exit(status)
