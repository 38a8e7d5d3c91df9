"Bad input: whatever happens to the files of a data-set folder, reading it ends in a clear error or in a right result."
import csv
import io
import itertools
import json
import os
import re
import struct
import sys
import threading
import time
import zlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image, ImageOps

from sdmad_nb.data.folder import DataError, DataSet, draw_split, load_mask, load_rgb, read_dataset, read_split, validate, write_split
from sdmad_nb.lab.experiments import open_data
from sdmad_nb.core.signs import SignError, SignSet, read_signs, write_signs

TRIED = {"labels.csv": 200, "boxes.csv": 150, "signs.json": 220, "image": 280, "mask": 120}  # mutations of each kind of file
SECONDS = 10  # in which every answer must come
PATIENCE = settings(deadline=None, derandomize=True, database=None, max_examples=60,
                    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])

# ---------------------------------------------------------------------------------------------- a sound data set

CATEGORIES = ("spot", "dark stripe", "Ödem, severe")
ROWS = [  # image, patient, three labels, split, mask; each picture has a size of its own
    ("images/a0.png", "a", "1", "0", "0", "train", "masks/a0.png"), ("images/a1.jpg", "a", "0", "0", "0", "train", ""),
    ("images/b0.png", "b", "0", "1", "0", "train", "masks/b0.png"), ("images/b1.jpeg", "b", "0", "1", "1", "train", ""),
    ("images/c0.png", "c", "0", "0", "1", "test", "masks/c0.png"), ("images/c1.jpg", "c", "1", "1", "0", "test", ""),
    ("images/d0.png", "Núñez", "0", "0", "0", "test", ""), ("images/d1.jpg", "Núñez", "1", "0", "1", "test", "masks/d1.png"),
    ("images/e0.png", "e, junior", "0", "0", "0", "", ""), ("images/e1.jpg", "e, junior", "0", "1", "0", "", ""),
    ("images/f0.png", "f", "0", "0", "1", "", ""), ("images/f1.png", "f", "1", "1", "1", "", ""),
]
BOXES = [("images/a0.png", "spot", "2", "3", "5", "6"), ("images/b0.png", "dark stripe", "0", "0", "26", "25"),
         ("images/b1.jpeg", CATEGORIES[2], "1.5", "2.25", "4", "0.5"), ("images/c1.jpg", "spot", "0", "10", "9", "9")]
HEADER, BOX_HEADER = ("image", "patient", *CATEGORIES, "split", "mask"), ("image", "category", "x", "y", "width", "height")
TABLES = {"labels.csv": [HEADER, *ROWS], "boxes.csv": [BOX_HEADER, *BOXES]}
SIGNS = {"object": "plate", "normal": ["a flawless {object}", "a clean plate"],
         "templates": ["a photo of the {object} with {sign}", "a {object} showing {sign}"],
         "signs": {"spot": ["a bright spot"], "dark stripe": ["a stripe", "a dark line"], CATEGORIES[2]: ["a thick, pale rim"]},
         "candidates": {"spot": ["a bright spot", "a white dot"], "dark stripe": ["a stripe", "a dark line", "a band"],
                        CATEGORIES[2]: ["a thick, pale rim", "a swollen rim"]}, "note": "made up"}


def size_of(number): return 24 + 2 * (number % 6), 25 + number  # width and height of the picture in one row


def noise(number, colour=False):
    "Make a picture that is like no other."
    width, height = size_of(number)
    shape = (height, width, 3) if colour else (height, width)
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8))


def as_bytes(image, format="PNG", **options):
    image.save(held := io.BytesIO(), format, **options)
    return held.getvalue()


def as_csv(rows, **style):
    csv.writer(held := io.StringIO(), **{"lineterminator": "\n", **style}).writerows(rows)
    return held.getvalue()


def make_set(folder):
    "Write a sound data set of twelve pictures, PNG and JPEG, grey and coloured."
    for part in ("images", "masks"): (folder / part).mkdir(parents=True)
    for number, (image, *_, mask) in enumerate(ROWS):
        form = "PNG" if image.endswith("png") else "JPEG"
        (folder / image).write_bytes(as_bytes(noise(number, colour=number % 4 > 1), form))
        if mask: noise(number).point(lambda value: 255 * (value > 127)).save(folder / mask)
    for name, rows in TABLES.items(): (folder / name).write_text(as_csv(rows), encoding="utf-8")
    (folder / "signs.json").write_text(json.dumps(SIGNS, ensure_ascii=False, indent=1), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "A folder that every test leaves as it was, with a file beside it that no reading may open."
    folder = make_set(tmp_path_factory.mktemp("mutations") / "around" / "set")
    (folder.parent / "outside.png").write_bytes(as_bytes(noise(99)))
    (folder.parent / "outside.csv").write_bytes((folder / "boxes.csv").read_bytes())
    before = {path: facts[-1] for path, facts in snapshot(folder.parent).items()}
    yield folder
    assert {path: facts[-1] for path, facts in snapshot(folder.parent).items()} == before


class replaced:
    "Put other bytes, or whatever `make` makes, in the place of a file for a while."
    def __init__(self, path, data=None, make=None):
        self.path, self.data, self.make = path, data, make

    def __enter__(self):
        self.before = self.path.read_bytes() if self.path.exists() else None
        self.time = self.path.stat() if self.path.exists() else None
        if self.data is not None: return self.path.write_bytes(self.data)
        self.path.unlink(missing_ok=True)
        self.make(self.path)

    def __exit__(self, *error):
        if self.path.is_dir() and not self.path.is_symlink(): self.path.rmdir()
        elif os.path.lexists(self.path) and self.data is None: self.path.unlink()
        if self.before is None: self.path.unlink(missing_ok=True)
        else:
            self.path.write_bytes(self.before)
            os.utime(self.path, ns=(self.time.st_atime_ns, self.time.st_mtime_ns))


# ---------------------------------------------------------------------------------------------- watching

OPENED, CHANGED, WATCHED = [], [], threading.Event()  # files that were opened, changes to the disk, whether to listen
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = {"os.chmod", "os.link", "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.truncate", "os.utime"}


def listen(event, words):
    "Note what Python does to the disk; an audit hook cannot be taken off again, so it sleeps between looks."
    if not WATCHED.is_set(): return
    if event == "open" and isinstance(words[0], (str, bytes)): OPENED.append(os.fsdecode(words[0]))
    if event in CHANGES or event == "open" and words[2] & WRITING: CHANGED.append((event, words[0]))


sys.addaudithook(listen)


def snapshot(root):
    "Remember kind, time and bytes of everything below a folder."
    def facts(path): return path.lstat().st_mode, path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else b""
    return {str(path): facts(path) for path in root.rglob("*")}


def within(call, *words, **named):
    "Call a function and return what it returned and what it raised; fail where it takes too long."
    held = []
    def work():
        try: held.append((call(*words, **named), None))
        except BaseException as error: held.append((None, error))  # also what no caller would catch: it must not come
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(SECONDS)
    assert held, f"{call.__name__} still works after {SECONDS} s"
    return held[0]


def reads(call, *words, **named):
    "As `within`, and nothing on the disk may have changed."
    OPENED.clear(), CHANGED.clear(), WATCHED.set()
    try: answer = within(call, *words, **named)
    finally: WATCHED.clear()
    assert not CHANGED, f"{call.__name__} changed the disk: {CHANGED}"
    assert not [name for name in OPENED if "outside" in Path(name).name], f"{call.__name__} opened {OPENED}"
    return answer


# ---------------------------------------------------------------------------------------------- judging

FILES = r"labels\.csv|boxes\.csv|signs\.json|images?\b|masks?\b|folder|no such folder|preparation"


def check_fault(fault):
    "A fault names its file and, behind a colon, the remedy."
    assert isinstance(fault, str) and re.search(FILES, fault), f"names no file: {fault!r}"
    rest = re.sub(r"^(labels|boxes)\.csv(, (line \d+|header))?: ", "", fault)
    assert re.search(r": [^:]*[a-z]{3}", rest), f"names no remedy: {fault!r}"


def table(path):
    "Read a CSV file by its rule, without the csv module: the cells of every row that is not empty."
    text, rows, row = path.read_bytes().decode("utf-8-sig"), [], []
    for match in re.finditer(r'(?:"((?:[^"]|"")*)"|([^,\r\n]*))(,|\r\n|\r|\n|\Z)', text):
        quoted, plain, end = match.groups()
        row.append((plain if quoted is None else quoted.replace('""', '"')).strip())
        if end == ",": continue
        if any(row): rows.append(row)
        row = []
    return rows


def unchanged(path):
    "Say whether a file still means what it meant: the same cells, or the same JSON with its keys in the same order."
    try:
        if path.name in TABLES: return table(path) == [list(row) for row in TABLES[path.name]]
        def pairs(items): return items
        found = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=pairs)
        return found == json.loads(json.dumps(SIGNS), object_pairs_hook=pairs)
    except (ValueError, RecursionError): return False


def check_boxes(folder, sizes, categories):
    "Every box of a sound folder lies in its image."
    if not (folder / "boxes.csv").exists(): return
    header, *rows = table(folder / "boxes.csv")
    assert sorted(header) == sorted(BOX_HEADER)
    for row in rows:
        box = dict(zip(header, row, strict=True))
        x, y, width, height = (float(box[name]) for name in ("x", "y", "width", "height"))
        assert box["category"] in categories and 0 <= x < x + width <= sizes[box["image"]][0], box
        assert 0 <= y < y + height <= sizes[box["image"]][1], box


def check_pictures(folder, images, patients, masks):
    "Every image is inside the folder, can be seen and has one owner, and its mask has its size; return the sizes."
    sizes, owner = {}, {}
    for image, patient, mask in zip(images, patients, masks):
        with Image.open(folder / image) as picture: upright = ImageOps.exif_transpose(picture)
        assert (folder / image).resolve().is_relative_to(folder) and min(upright.size) >= 8, image
        assert owner.setdefault(upright.convert("RGB").tobytes(), patient) == patient, image
        sizes[image] = upright.size
        if mask: assert load_mask(folder / mask).shape == upright.size[::-1], mask
    return sizes


def check_right(folder, dataset):
    "What was read is what stands in the files, row by row."
    header, *rows = table(folder / "labels.csv")
    cells = {name: tuple(column) for name, column in zip(header, zip(*rows, strict=True), strict=True)}
    categories = tuple(name for name in header if name not in ("image", "patient", "split", "mask"))
    assert len(cells) == len(header) and "" not in cells and categories == dataset.categories and len(rows) == len(dataset)
    assert (cells["image"], cells["patient"]) == (dataset.images, dataset.patients) and all(dataset.patients)
    assert len({os.path.normpath(image) for image in dataset.images}) == len(rows)
    assert dataset.labels.shape == (len(rows), len(categories)) and dataset.labels.dtype == np.uint8
    for c, category in enumerate(categories):
        assert "".join(cells[category]) == "".join(map(str, dataset.labels[:, c])) and len(set(cells[category])) == 2
    assert dataset.split is None and not any(cells.get("split", ())) or \
        tuple(part or "" for part in dataset.split) == cells["split"] and set(cells["split"]) <= {"", "train", "test"}
    masks = cells.get("mask", ("",) * len(rows))
    assert dataset.masks == (masks if any(masks) else None) and len(dataset.content) == 64
    check_boxes(folder, check_pictures(folder, dataset.images, dataset.patients, masks), categories)


def judge(folder, strict=False):  # strict: a fault would be a false alarm
    "Check and read a folder; return its faults, [] where the result is right."
    faults, error = reads(validate, folder, progress=False)
    if error: raise error
    dataset, error = reads(read_dataset, folder, progress=False)
    assert isinstance(faults, list) and not (strict and faults), f"sound, but {faults}"
    if not faults:
        if error: raise error
        check_right(folder.resolve(), dataset)
    else:
        assert type(error) is DataError and list(error.faults) == faults and str(error), error
        for fault in faults: check_fault(fault)
    return faults


def judge_signs(path):
    "Read signs: all that stands in the file, or one SignError. Return the message or ''."
    found, error = reads(read_signs, path)
    if error:
        assert type(error) is SignError, f"read_signs raised {error!r:.300}"
        assert str(error).startswith((str(path), "cannot read")), error
        assert re.search(r": [^:]*[a-z]{3}", str(error).replace(str(path), "")), error
        return str(error)
    written = json.loads(path.read_text(encoding="utf-8-sig"))
    assert isinstance(found, SignSet) and found.object == written["object"] and list(found.normal) == written["normal"]
    assert {name: list(texts) for name, texts in found.signs.items()} == written["signs"]
    assert len(found.texts) == len(found.category) == sum(map(len, written["signs"].values()))
    assert read_signs(write_signs(found, path.parents[2] / "again.json")) == found
    return ""


def judge_open(folder):
    "Open a folder as the experiments do: data and signs that fit, or one error of the library. Return it or None."
    opened, error = reads(open_data, str(folder))
    if error:
        assert type(error) in (DataError, SignError), f"open_data raised {error!r:.300}"
        assert re.search(": [^:]*[a-z]{3}", str(error)), error
        return error
    check_right(folder.resolve(), opened[0])
    assert set(opened[0].categories) <= set(opened[1].categories)


# ---------------------------------------------------------------------------------------------- mutations

def pick(generator, choices):
    return list(choices)[int(generator.integers(len(choices)))]


BYTES = ("flip a bit", "delete", "insert", "one byte", "double", "turn round", "cut off", "begin late", "zero", "zero the rest",
         "splice", "append", "twice")


def bytes_changed(change, data, i, j, more, generator):  # i:j a slice of the data, more a slice of another file
    "Change bytes as a bad disk or a broken download does."
    if change == "flip a bit": return data[:i] + bytes([data[i] ^ 1 << int(generator.integers(8))]) + data[i + 1:]
    if change == "delete": return data[:i] + data[j:]
    if change == "insert": return data[:i] + generator.bytes(j - i) + data[i:]
    if change == "one byte": return data[:i] + pick(generator, [b"\0", b"\xff", b'"', b",", b"\n", b"\\", b"9"]) + data[i + 1:]
    if change == "double": return data[:j] + data[i:]
    if change == "turn round": return data[:i] + data[i:j][::-1] + data[j:]
    if change == "cut off": return data[:i]
    if change == "begin late": return data[i:]
    if change == "zero": return data[:i] + bytes(j - i) + data[j:]
    if change == "zero the rest": return data[:i] + bytes(len(data) - i)
    if change == "splice": return data[:i] + more + data[j:]
    if change == "append": return data + more
    if change == "twice": return data + data


TEXT = ("separator", "line end", "encoding", "two marks", "quotes", "look-alike", "upper case", "wide digits", "another number",
        "no line end", "blank lines")
LOOKALIKES = dict(zip("aeopcixyk10", "аеорсіхукl0"))  # Latin letter: the Cyrillic one
ENCODINGS = ["utf-16", "utf-16-le", "utf-32", "latin-1", "cp1252", "utf-8-sig", "utf-7"]
LINE_ENDS = ["\r\n", "\r", "\n\n", " \n", "\v", "\u2028", "\n\r", ""]


def text_changed(change, text, generator):  # -> text, or bytes in another encoding
    "Change text as editors and spreadsheets do."
    if change == "separator": return text.replace(",", pick(generator, [";", "\t", "|", ",,", ", ", "，"]))
    if change == "line end": return text.replace("\n", pick(generator, LINE_ENDS))
    if change == "encoding": return text.encode(pick(generator, ENCODINGS), "replace")
    if change == "two marks": return "\ufeff\ufeff" + text
    if change == "quotes": return text.replace('"', pick(generator, ["'", "“", '""', ""]))
    if change == "look-alike": return text.replace(letter := pick(generator, LOOKALIKES), LOOKALIKES[letter])
    if change == "upper case": return text.upper()
    if change == "wide digits": return text.translate({ord("1"): "１", ord("0"): "０"})
    if change == "another number": return re.sub(r"\b\d+\b", pick(generator, ["NaN", "inf", "-1", "1e400", "1.0"]), text, count=3)
    if change == "no line end": return text.rstrip("\n")
    if change == "blank lines": return "\n , \n" + text + "\n\n,,\n"


CELLS = ["", " ", "NaN", "nan", "inf", "-inf", "-1", "-0", "1e400", "1e-400", "1_0", "0x1", "２", "٣", "True", "01", "1.0",
         "+1", "0", "1", "2", "5", '"', "'", "\0", "a\rb", "a\nb", "=1+1", "..", "../outside.png", "/etc/passwd", "C:\\x.png",
         "images\\a0.png", "images/a0.png", "./images/b0.png", "images//c0.png", "images", "masks/a0.png", "train", "Test",
         "spot", "ѕpot", "spot ", "Spot", "Ödem, severe", "O\u0308dem, severe", "\u200b", "\u202e", "x" * 200_000, "1" * 5000,
         "9" * 400, "image", "patient", "mask"]
ROW_CHANGES = ("cell", "cell", "cell", "column name", "column of one", "no such row", "row twice", "cell too many",
               "cell too few", "no such column", "column twice", "columns moved", "rows moved", "spaces", "only the header",
               "two cells swapped", "all in quotes")


def rows_changed(change, rows, generator):
    "Change the rows of a table and write it again."
    rows = [list(row) for row in rows]
    r, c = int(generator.integers(len(rows))), int(generator.integers(len(rows[0])))
    order = generator.permutation(len(rows[0]))
    if change == "cell": rows[r][c] = pick(generator, CELLS)
    if change == "column name": rows[0][c] = pick(generator, CELLS)
    if change == "column of one": rows[1:] = [[*row[:c], rows[r][c], *row[c + 1:]] for row in rows[1:]]
    if change == "no such row": del rows[r]
    if change == "row twice": rows.insert(r, rows[r])
    if change == "cell too many": rows[r].insert(c, pick(generator, CELLS))
    if change == "cell too few": del rows[r][c]
    if change == "no such column": rows = [[*row[:c], *row[c + 1:]] for row in rows]
    if change == "column twice": rows = [[*row, row[c]] for row in rows]
    if change == "columns moved": rows = [[row[i] for i in order] for row in rows]
    if change == "rows moved": rows[1:] = [rows[1 + i] for i in generator.permutation(len(rows) - 1)]
    if change == "spaces": rows = [[f" {cell}\t" for cell in row] for row in rows]
    if change == "only the header": rows = rows[:1]
    if change == "two cells swapped": rows[r][c], rows[-1][c] = rows[-1][c], rows[r][c]
    return as_csv(rows, quoting=csv.QUOTE_ALL if change == "all in quotes" else csv.QUOTE_MINIMAL)


NESTED = 60_000
RAW = ["NaN", "Infinity", "-Infinity", "1e400", "-1", "0", "1" * 5000, "null", "true", "[]", "{}", "[[]]", "[null]", '""', '" "',
       '"x"', '["x"]', '["x", " X"]', '["{object} with {sign}"]', '["{finding}"]', '["{object"]', '["}{"]', '["%s"]',
       '["\\ud800"]', '["\\u0000"]', '"\\ud83d"', "'x'", "[1, 2]", '{"spot": ["a bright spot"]}', '{"ѕpot": ["x"]}',
       '{"": ["x"]}', "1 2", '{"\\udfff": ["x"]}', '["' + "x" * 200_000 + '"]', "[" * NESTED, "undefined",
       "[" * NESTED + "]" * NESTED, '{"a":' * NESTED + "1" + "}" * NESTED]
JSON_CHANGES = ("value", "value", "value", "another file", "new key", "no such key", "renamed", "moved", "from another place",
                "key twice", "category twice", "comma", "comment")
HOLE = "\ue000"  # where `RAW` text is put


def places(value):
    "List every holder and key inside JSON values."
    pairs = list(value.items()) if isinstance(value, dict) else list(enumerate(value)) if isinstance(value, list) else []
    return [(value, key) for key, _ in pairs] + [place for _, part in pairs for place in places(part)]


def json_changed(change, values, generator):
    "Change JSON values and write them again; the text need not be JSON any more."
    values = json.loads(json.dumps(values))
    holder, key = pick(generator, places(values))
    raw, named = pick(generator, RAW), isinstance(key, str)
    if change == "value": holder[key] = HOLE
    if change == "another file": values = HOLE
    if change == "new key": values[pick(generator, ["Signs", "categories", "", "note", "signs "])] = HOLE
    if change == "no such key": del holder[key]
    other_names = [key.upper(), key + " ", key.replace("s", "ѕ"), ""] if named else []
    if change == "renamed" and named: holder[pick(generator, other_names)] = holder.pop(key)
    if change == "moved" and named: holder[key] = holder.pop(key)
    if change == "from another place":
        there, name = pick(generator, places(values))
        holder[key] = json.loads(json.dumps(there[name]))
    text = json.dumps(values, ensure_ascii=generator.random() < 0.5, indent=pick(generator, [None, 1, 2]))
    text = text.replace(json.dumps(HOLE), raw).replace(f'"{HOLE}"', raw)
    if change == "key twice": text = text.replace("{", f'{{"{pick(generator, ["object", "signs", "normal"])}": {raw}, ', 1)
    if change == "category twice": text = re.sub(r'("signs"|"candidates"): {', r'\1: {"spot": ["a bright spot"], ', text)
    if change == "comma": text = re.sub(r"([\]}])", r",\1", text, count=1)
    if change == "comment": text = text.replace("{", "{ // words\n", 1)
    return text



def png_parts(data):
    "Take a PNG apart: [(kind, bytes)]."
    parts, at = [], 8
    while at < len(data):
        length, = struct.unpack_from(">I", data, at)
        parts.append((data[at + 4:at + 8], data[at + 8:at + 8 + length]))
        at += 12 + length
    return parts


def png_whole(parts):
    "Put a PNG together, with sound checksums."
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts)


def png(width, height, depth, colour, lines, *parts):  # colour: PNG's number; lines: unfiltered bytes; parts: further chunks
    "Write a PNG by hand."
    header = struct.pack(">II5B", width, height, depth, colour, 0, 0, 0)
    return png_whole([(b"IHDR", header), *parts, (b"IDAT", zlib.compress(lines)), (b"IEND", b"")])


LYING = Image.Exif()
LYING[0x0112] = 6  # orientation: the camera lay on its side
EXIF = LYING.tobytes()
BOMB = zlib.compress(bytes(2**24))
PNG_CHUNKS = [
    (b"tRNS", b""), (b"tRNS", b"\0"), (b"tRNS", b"\1\2"), (b"tRNS", bytes(6)), (b"tRNS", bytes(300)), (b"PLTE", b""),
    (b"PLTE", bytes(3)), (b"PLTE", bytes(7)), (b"PLTE", bytes(999)), (b"gAMA", b""), (b"gAMA", bytes(4)), (b"cHRM", bytes(3)),
    (b"pHYs", b"\0"), (b"pHYs", bytes(9)), (b"sRGB", b""), (b"iCCP", b"x\0\0" + BOMB), (b"iCCP", b""), (b"zTXt", b"x\0\0" + BOMB),
    (b"zTXt", b"x\0\7"), (b"iTXt", b"x\0\1\0\0\0" + BOMB), (b"iTXt", b"x"), (b"tEXt", b"Title\0words"), (b"tEXt", bytes(70_000)),
    (b"eXIf", EXIF.removeprefix(b"Exif\0\0")), (b"eXIf", b"II*\0\xff\xff\xff\xff"), (b"eXIf", b"MM"), (b"eXIf", EXIF[:-3]),
    (b"acTL", struct.pack(">II", 1, 0)), (b"acTL", struct.pack(">II", 9, 0)), (b"acTL", b"\0"), (b"fcTL", bytes(26)),
    (b"fdAT", bytes(9)), (b"IEND", b""), (b"CgBI", bytes(4)), (b"IHDR", bytes(13)), (b"JUNK", bytes(5)), (b"juNk", bytes(5))]
PNG_FIELDS = [  # of the header: place, format, values
    (0, ">I", (0, 1, 7, 23, 9999, 30000, 2**31 - 1, 2**32 - 1)), (4, ">I", (0, 1, 24, 9000, 2**31)), (10, "B", (1,)),
    (8, "B", (0, 1, 2, 4, 3, 16, 255)), (9, "B", (0, 2, 3, 4, 6, 7)), (12, "B", (1, 2))]
PNG_CHANGES = ("header", "header", "flip inside", "drop", "double", "order", "add", "add", "add late", "pixels", "in pieces",
               "pressed harder")


def field_changed(body, fields, generator):
    "Put another number into a header."
    (at, form, values), held = pick(generator, fields), bytearray(body)
    struct.pack_into(form, held, at, pick(generator, values))
    return bytes(held)


def flipped(body, generator):
    "Flip one bit."
    return bytes_changed("flip a bit", body, int(generator.integers(len(body))), 0, b"", generator) if body else body


def png_changed(change, data, generator):
    "Change the inside of a PNG and give it sound checksums."
    parts = png_parts(data)
    k = int(generator.integers(len(parts)))
    kind, body = parts[k]
    if change == "header": parts[0] = (b"IHDR", field_changed(parts[0][1], PNG_FIELDS, generator))
    if change == "flip inside": parts[k] = (kind, flipped(body, generator))
    if change == "drop": del parts[k]
    if change == "double": parts.insert(k, parts[k])
    if change == "order": parts = [parts[i] for i in generator.permutation(len(parts))]
    if change == "add": parts.insert(1, pick(generator, PNG_CHUNKS))
    if change == "add late": parts.insert(2, pick(generator, PNG_CHUNKS))
    if change == "pixels":
        lines = zlib.decompress(parts[1][1])
        parts[1] = (b"IDAT", zlib.compress(pick(generator, [
            lines[:-9], lines + bytes(99), bytes(len(lines)), b"\5" + lines[1:], b"\xff" * len(lines), bytes(2**24), b""])))
    if change == "in pieces": parts[1:2] = [(b"IDAT", parts[1][1][i:i + 9]) for i in range(0, len(parts[1][1]), 9)]
    if change == "pressed harder": parts[1] = (b"IDAT", zlib.compress(zlib.decompress(parts[1][1]), int(generator.integers(10))))
    return png_whole(parts)



def jpeg_parts(data):
    "Take a JPEG apart: [(marker, bytes)], and the rest that begins with the scan."
    parts, at = [], 2
    while data[at + 1] != 0xDA:
        length, = struct.unpack_from(">H", data, at + 2)
        parts.append((data[at + 1], data[at + 4:at + 2 + length]))
        at += 2 + length
    return parts, data[at:]


def jpeg_whole(parts, rest):
    return b"\xff\xd8" + b"".join(struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body for marker, body in parts) + rest


JPEG_SEGMENTS = [
    (0xE1, EXIF), (0xE1, b"Exif\0\0"), (0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff"), (0xE1, EXIF[:-3]), (0xEE, b"Adobe"),
    (0xE1, b"http://ns.adobe.com/xap/1.0/\0<"), (0xEE, b"Adobe\0d\0\0\0\0\0"), (0xEE, b"Adobe\0d\0\0\0\0\2"),
    (0xE2, b"MPF\0II*\0\x08\0\0\0\0\0"), (0xE2, b"MPF\0"), (0xE2, b"ICC_PROFILE\0\1\2x"), (0xE2, b"ICC_PROFILE\0"),
    (0xED, b"Photoshop 3.0\0" + b"8BIM\x03\xed\0\0\0\0\xff\xff"), (0xE0, b"JFIF"), (0xE0, b""), (0xFE, b"x" * 65_533),
    (0xDD, b"\0\1"), (0xDD, b""), (0xDB, b""), (0xDB, bytes(65)), (0xC4, b""), (0xC4, bytes(17)), (0xC0, b""), (0xC2, bytes(9)),
    (0xCC, b"\0")]
JPEG_FIELDS = [  # of the frame header, as `PNG_FIELDS`
    (1, ">H", (0, 1, 9, 300, 65_500)), (3, ">H", (0, 1, 9, 300, 65_500)), (0, "B", (0, 1, 12, 16)),
    (5, "B", (0, 1, 2, 3, 4, 255)), (7, "B", (0, 0x12, 0x22, 0x44, 255)), (8, "B", (1, 2, 9))]
JPEG_CHANGES = ("frame", "frame", "flip inside", "drop", "double", "order", "add", "add", "add", "progressive", "no scan")


def jpeg_changed(change, data, generator):
    "Change the inside of a JPEG."
    parts, rest = jpeg_parts(data)
    k = int(generator.integers(len(parts)))
    marker, body = parts[k]
    if change == "frame":
        f = next(i for i, (marker, _) in enumerate(parts) if 0xC0 <= marker <= 0xC2)
        parts[f] = (parts[f][0], field_changed(parts[f][1], JPEG_FIELDS, generator))
    if change == "flip inside": parts[k] = (marker, flipped(body, generator))
    if change == "drop": del parts[k]
    if change == "double": parts.insert(k, parts[k])
    if change == "order": parts = [parts[i] for i in generator.permutation(len(parts))]
    if change == "add": parts.insert(int(generator.integers(2)), pick(generator, JPEG_SEGMENTS))
    if change == "progressive": parts = [(0xC2 if marker == 0xC0 else marker, body) for marker, body in parts]
    if change == "no scan": rest = b"\xff\xd9"
    return jpeg_whole(parts, rest)



def changed(data, others, generator):  # -> name of the change, bytes
    "Mutate a file, sometimes as bytes and sometimes by the rules of its kind."
    i, other = int(generator.integers(len(data))), pick(generator, others)
    if generator.random() < 0.4:
        j, k = min(len(data), i + int(generator.integers(1, 40))), int(generator.integers(len(other)))
        name, more = pick(generator, BYTES), other[k:k + int(generator.integers(1, len(other)))]
        return name, bytes_changed(name, data, i, j, more, generator)
    if data.startswith(b"\x89PNG"): return "PNG " + (name := pick(generator, PNG_CHANGES)), png_changed(name, data, generator)
    if data.startswith(b"\xff\xd8"): return "JPEG " + (name := pick(generator, JPEG_CHANGES)), jpeg_changed(name, data, generator)
    text = data.decode("utf-8")
    if generator.random() < 0.35: text = text_changed(name := pick(generator, TEXT), text, generator)
    elif data.startswith(b"{"): text = json_changed(name := pick(generator, JSON_CHANGES), json.loads(text), generator)
    else: text = rows_changed(name := pick(generator, ROW_CHANGES), csv.reader(io.StringIO(text)), generator)
    return name, text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")


def mutations(data, others, count, *seed):
    "Yield `count` numbered mutations that differ from the original."
    for number in range(count):
        tries = (changed(data, others, np.random.default_rng([number, again, *seed])) for again in itertools.count())
        yield number, *next((name, after) for name, after in tries if after != data)


def all_right(kind, tried, tally, wrong):
    "Print what came of the mutations of one kind, and fail with all that went wrong."
    print(f"{kind}: {tried} mutations, {dict(tally)}, {len(wrong)} wrong")
    assert not wrong, f"{len(wrong)} of {tried} wrong:\n" + "\n".join(wrong)
    assert tried == TRIED[kind] and min(tally["sound"], tally["faults"]) >= 5, "one outcome only tests little"


def test_the_base_is_sound(base):
    "Without a change there is no fault, and the mutations are as many as the issue asks for."
    assert judge(base, strict=True) == [] and judge_signs(base / "signs.json") == "" and judge_open(base) is None
    assert sum(TRIED.values()) >= 600 and all(count >= 100 for count in TRIED.values())


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("kind", TRIED)
def test_mutated_file(base, kind):
    "Whatever happens to one file of the folder: all readers agree, and nothing is written."
    names = {"image": [row[0] for row in ROWS[:8]], "mask": [row[6] for row in ROWS if row[6]]}.get(kind, [kind])
    others = [(base / name).read_bytes() for name in (*TABLES, "signs.json", "images/a0.png", "images/f1.png", "images/a1.jpg")]
    tally, wrong, count = Counter(), [], 0
    known = {noise(n, colour=n % 4 > 1).convert("RGB").tobytes() for n in range(len(ROWS))}
    for part, name in enumerate(names):
        path = base / name
        for number, change, data in mutations(path.read_bytes(), others, TRIED[kind] // len(names), len(kind), part):
            count += 1
            with replaced(path, data):
                before = snapshot(base.parent)
                try: tally.update(outcomes(base, path, kind, change, data, known))
                except Exception as error: wrong.append(f"{name} {number}, {change}: {type(error).__name__}: {str(error)[:300]}")
                if snapshot(base.parent) != before: wrong.append(f"{name} {number}, {change}: the disk is not as it was")
    all_right(kind, count, tally, wrong)


def outcomes(folder, path, kind, change, data, known):
    "Read a folder with one mutated file in every way; name what came of it."
    faults = judge(folder, strict=path.parent == folder and unchanged(path))
    yield "faults" if faults else "sound"
    error = judge_open(folder)
    if kind == "signs.json": yield "SignError" if judge_signs(path) else "SignSet"
    if kind != "signs.json": assert bool(error) == bool(faults), f"validate says {faults}, open_data {error}"
    elif error and not faults: yield "passes validate, refused by read_signs"
    elif faults and not error: yield "passes read_signs, refused by validate"
    if kind == "image" and not faults: check_pixels(path, change in BYTES and data.startswith(b"\x89PNG") and known)


def check_pixels(path, known):  # known: RGB bytes of sound pictures, where damage cannot go unseen because of checksums
    "The pixels that are used are those that Pillow sees."
    with Image.open(path) as picture: upright = ImageOps.exif_transpose(picture)
    assert load_rgb(path).size == upright.size and load_rgb(path).mode == "RGB"
    plain = upright.mode in ("1", "L", "RGB", "CMYK") and "transparency" not in upright.info
    if plain: assert load_rgb(path).tobytes() == upright.convert("RGB").tobytes()
    if known: assert load_rgb(path).tobytes() in known, "a damaged PNG was accepted"


# ---------------------------------------------------------------------------------------------- images with a name

RGB16 = np.random.default_rng(5).integers(0, 65_536, (16, 16, 3)).astype(">u2")
GREY16 = np.arange(256, dtype=np.uint16).reshape(16, 16) * 16  # 12 of 16 bits
PHOTO = Image.fromarray(np.add.outer(np.arange(0, 200, 5), np.arange(32)).astype(np.uint8))  # smooth, 32 x 40
CMYK = as_bytes(PHOTO.convert("CMYK"), "JPEG", quality=95)
TEXT_CHUNK = (b"tEXt", b"Comment\0" + b"words " * 500_000)


def noise_in(mode): return noise(20, colour=True).convert(mode)  # 28 x 45


def without_adobe(data):
    parts, rest = jpeg_parts(data)
    return jpeg_whole([part for part in parts if part[0] != 0xEE], rest)


def claims(width, height):
    "Write a small PNG whose header claims another size."
    return png(width, height, 8, 0, bytes(4096))


def lines16(values): return b"".join(b"\0" + row.tobytes() for row in values)


PICTURES = {  # bytes under the name images/f0.png: words of the fault, or the size that is right
    "zero bytes": (b"", "is empty (0 bytes)"),
    "PNG cut in half": (as_bytes(noise(20))[:600], "is cut off or damaged"),
    "PNG cut in its header": (as_bytes(noise(20))[:20], "is cut off or damaged"),
    "PNG cut after its pixels": (as_bytes(noise(20))[:-12], "is cut off or damaged"),
    "PNG cut before its last byte": (as_bytes(noise(20))[:-1], (28, 45)),
    "PNG with too few lines": (png(16, 16, 8, 0, bytes(range(17 * 8))), "is cut off or damaged"),
    "JPEG cut in half": (as_bytes(noise(20), "JPEG")[:900], "is cut off or damaged"),
    "only zeros": (bytes(900), "is not a PNG or JPEG image"),
    "JPEG": (as_bytes(noise(20), "JPEG"), (28, 45)),
    "progressive JPEG": (as_bytes(noise(20, True), "JPEG", progressive=True), (28, 45)),
    "BMP": (as_bytes(noise(20), "BMP"), "is not a PNG or JPEG image"),
    "TIFF": (as_bytes(noise(20), "TIFF"), "is not a PNG or JPEG image"),
    "WebP": (as_bytes(noise(20, True), "WEBP"), "is not a PNG or JPEG image"),
    "1 x 1": (as_bytes(Image.new("L", (1, 1))), "has 1 x 1 pixels: give one of at least 8 x 8"),
    "7 x 100": (as_bytes(noise(20).resize((7, 100))), "has 7 x 100 pixels"),
    "8 x 8": (as_bytes(noise(20).crop((0, 0, 8, 8))), (8, 8)),
    "0 x 0": (claims(0, 0), "image images/f0.png is"),
    "constant grey": (as_bytes(Image.new("L", (30, 30), 128)), "is nearly empty (0 pixels differ from grey 128)"),
    "black JPEG": (as_bytes(Image.new("RGB", (30, 30)), "JPEG"), "is nearly empty"),
    "CMYK with Adobe's marker": (CMYK, (32, 40)),
    "CMYK without": (without_adobe(CMYK), (32, 40)),
    "16-bit grey": (as_bytes(Image.fromarray(GREY16)), (16, 16)),
    "16-bit colour": (png(16, 16, 16, 2, lines16(RGB16)), (16, 16)),
    "16-bit grey with transparency": (png(16, 16, 16, 4, lines16(RGB16[..., :2])), (16, 16)),
    "1 bit": (as_bytes(noise_in("1")), (28, 45)),
    "2 bits": (png(16, 16, 2, 0, b"".join(b"\0" + np.random.default_rng(i).bytes(4) for i in range(16))), (16, 16)),
    "palette": (as_bytes(noise_in("P")), (28, 45)),
    "palette, one colour transparent": (as_bytes(noise_in("P"), transparency=3), (28, 45)),
    "palette, colours half transparent": (as_bytes(noise_in("P"), transparency=bytes(range(200))), (28, 45)),
    "LA": (as_bytes(noise_in("LA")), (28, 45)),
    "RGBA": (as_bytes(noise_in("RGBA")), (28, 45)),
    "RGBA, all of it transparent": (as_bytes(Image.new("RGBA", (30, 30), (200, 100, 50, 0))), "is nearly empty"),
    "grey with one transparent value": (as_bytes(noise_in("L"), transparency=7), (28, 45)),
    "animated PNG": (as_bytes(noise(20), save_all=True, append_images=[noise(26)]), "has 2 frames"),
    "animated GIF": (as_bytes(noise(20), "GIF", save_all=True, append_images=[noise(26)]), "is not a PNG or JPEG image"),
    "30000 x 30000": (claims(30_000, 30_000), "has too many pixels: make it smaller"),
    "10000 x 10000": (claims(10_000, 10_000), "of 10000 x 10000 pixels: save one frame of at most"),
    "2 billion x 1": (claims(2**31 - 1, 1), "image images/f0.png "),
    "4 billion x 4 billion": (claims(2**32 - 1, 2**32 - 1), "image images/f0.png "),
    "3 MB of text": (png_whole([*png_parts(as_bytes(noise(20)))[:1], TEXT_CHUNK, *png_parts(as_bytes(noise(20)))[1:]]), (28, 45)),
    "16 MB of packed text": (png_whole([*png_parts(as_bytes(noise(20)))[:1], (b"zTXt", b"x\0\0" + BOMB),
                                        *png_parts(as_bytes(noise(20)))[1:]]), "is cut off or damaged"),
    "JPEG on its side": (as_bytes(noise(20), "JPEG", exif=LYING), (45, 28)),
    "PNG on its side": (as_bytes(noise(20), exif=LYING), (45, 28)),
    "MPO": (as_bytes(noise(20, True), "MPO", save_all=True, append_images=[noise(26, True)]), (28, 45)),
    "SVG": (b'<svg xmlns="http://www.w3.org/2000/svg" width="30" height="30"/>', "is not a PNG or JPEG image"),
    "HTML": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>", "is not a PNG or JPEG image"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "is not a PNG or JPEG image"),
    "the same picture twice": (as_bytes(noise(11, True)), (34, 36)),
    "the picture of another patient": (as_bytes(noise(0), compress_level=1), "has the same pixels as images/a0.png (line 2)"),
}


def check_answer(faults, name, expected):
    "There is one fault, about the right row, or none."
    if not isinstance(expected, str): return None if faults == [] else pytest.fail(f"sound, but {faults}")
    assert len(faults) == 1 and name in faults[0] and expected in faults[0], faults


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", PICTURES)
def test_picture(base, name):
    "Each kind of picture is read as it should look, or refused in one sentence."
    (data, expected), path = PICTURES[name], base / "images/f0.png"
    with replaced(path, data):
        check_answer(judge(base), "labels.csv, line 12: image images/f0.png ", expected)
        if isinstance(expected, str): return
        check_pixels(path, False)
        assert load_rgb(path).size == expected and not judge_open(base)


def seen(base, data):
    "Read some bytes as the picture images/f0.png."
    with replaced(base / "images/f0.png", data): return np.asarray(load_rgb(base / "images/f0.png")).astype(int)


def test_right_pixels(base):
    "Every mode keeps its picture: upright, the first frame, black where it is transparent, 16 bits by their maximum."
    grey, lying = np.asarray(noise(20)), as_bytes(noise(20), exif=LYING)
    np.testing.assert_array_equal(seen(base, lying)[..., 0], np.rot90(grey, -1))
    np.testing.assert_array_equal(seen(base, as_bytes(Image.fromarray(GREY16)))[..., 1], np.round(GREY16 / GREY16.max() * 255))
    np.testing.assert_array_equal(seen(base, PICTURES["16-bit colour"][0]), RGB16 >> 8)
    for data in (CMYK, without_adobe(CMYK)):
        assert abs(seen(base, data)[..., 2] - np.asarray(PHOTO)).mean() < 4
    for name, bare in (("MPO", noise(20, True)), ("JPEG", noise(20).convert("RGB"))):
        assert np.corrcoef(seen(base, PICTURES[name][0]).ravel(), np.asarray(bare).ravel())[0, 1] > 0.5, name
    np.testing.assert_array_equal(seen(base, PICTURES["1 bit"][0])[..., 0], 255 * np.asarray(noise_in("1")))
    clear = seen(base, as_bytes(noise_in("L"), transparency=7))
    np.testing.assert_array_equal(clear[..., 0], np.where(np.asarray(noise_in("L")) == 7, 0, noise_in("L")))


BOTH = noise(6).point(lambda value: 255 * (value > 99))
MASKS = {  # bytes under the name masks/a0.png, whose image has 24 x 25 pixels: words of the fault, or None
    "zero bytes": (b"", "is empty (0 bytes)"),
    "truncated": (as_bytes(noise(0))[:90], "is cut off or damaged"),
    "0 and 1": (as_bytes(Image.fromarray(np.eye(25, 24, dtype=np.uint8))), "holds 1 beside 0 and 255"),
    "grey": (as_bytes(noise(0)), "beside 0 and 255: write 255 where the finding is"),
    "JPEG with its ripples": (as_bytes(noise(0).point(lambda value: 255 * (value > 127)), "JPEG"), "beside 0 and 255"),
    "red": (as_bytes(Image.new("RGB", (24, 25), "red")), "holds 76 beside 0 and 255"),
    "another size": (as_bytes(BOTH.resize((25, 24), 0)), "has 25 x 24 pixels but its image"),
    "1 x 1": (as_bytes(Image.new("L", (1, 1))), "has 1 x 1 pixels but its image"),
    "animated": (as_bytes(BOTH, save_all=True, append_images=[Image.new("L", BOTH.size)]), "has 2 frames"),
    "30000 x 30000": (claims(30_000, 30_000), "has too many pixels"),
    "HTML": (b"<html></html>", "is not a PNG or JPEG image"),
    "1 bit": (as_bytes(Image.new("1", (24, 25), 1)), None),
    "palette of black and white": (as_bytes(Image.new("L", (24, 25), 255).convert("P")), None),
    "RGB": (as_bytes(Image.new("RGB", (24, 25), "white")), None),
    "16 bits": (as_bytes(Image.fromarray(np.full((25, 24), 65_535, np.uint16))), None),
    "all 0": (as_bytes(Image.new("L", (24, 25))), None),
    "all 255": (as_bytes(Image.new("L", (24, 25), 255)), None),
    "lying, marked as such": (as_bytes(Image.new("L", (25, 24), 255), exif=LYING), None),
    "upright, marked as lying": (as_bytes(Image.new("L", (24, 25), 255), exif=LYING), "has 25 x 24 pixels but its image"),
}


@pytest.mark.parametrize("name", MASKS)
def test_mask(base, name):
    "Each kind of mask is read as black and white of the image's size, or refused in one sentence."
    (data, expected), path = MASKS[name], base / "masks/a0.png"
    with replaced(path, data):
        check_answer(judge(base), "labels.csv, line 2: mask masks/a0.png ", expected)
        if expected is None: assert load_mask(path).all() or name == "all 0" and not load_mask(path).any()


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_mask_of_a_lying_image(base, format):
    "A picture that lies on its side needs a mask of its upright size."
    lying = as_bytes(noise(0).rotate(90, expand=True), format, exif=LYING)
    with replaced(base / "images/a0.png", lying):
        assert judge(base) == []
        with replaced(base / "masks/a0.png", as_bytes(Image.new("L", (25, 24), 255))):
            check_answer(judge(base), "line 2: mask masks/a0.png", "has 25 x 24 pixels but its image")


# ---------------------------------------------------------------------------------------------- what is no file

needs_links = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a system with links and pipes")


def link_to(target): return lambda path: path.symlink_to(target)


THINGS = {  # what stands at images/f0.png: words of the fault, or None
    "nothing": (lambda path: None, "is missing: add the file"),
    "a folder": (lambda path: path.mkdir(), "is missing"),
    "a pipe": (lambda path: os.mkfifo(path), "is missing"),
    "a link to a picture inside": (lambda path: path.symlink_to("f1.png"), None),
    "a link to a folder inside": (lambda path: path.symlink_to("../masks"), "is missing"),
    "a link to nothing": (lambda path: path.symlink_to("nothing.png"), "is missing"),
    "a link to itself": (lambda path: path.symlink_to(path.name), "is missing"),
    "a link that leads out": (lambda path: path.symlink_to("../../outside.png"), "leaves the folder by a link"),
    "an absolute link that leads out": (lambda path: path.symlink_to(path.parents[2] / "outside.png"), "leaves the folder by"),
    "an absolute link that stays": (lambda path: path.symlink_to(path.with_name("f1.png")), None),
    "a link to the folder above": (lambda path: path.symlink_to("../.."), "leaves the folder by a link"),
    "a link to a device": (lambda path: path.symlink_to("/dev/null"), "leaves the folder by a link"),
}


@needs_links
@pytest.mark.parametrize("name", THINGS)
def test_thing_that_is_no_picture(base, name):
    "A link inside the folder is read; everything else is refused, and nothing outside is opened."
    make, expected = THINGS[name]
    with replaced(base / "images/f0.png", make=make):
        check_answer(judge(base), "line 12: image images/f0.png ", expected)


@needs_links
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["images/f0.png", "labels.csv", "boxes.csv", "signs.json"])
def test_file_without_rights(base, name):
    "A file that may not be read is named."
    with replaced(base / name, (base / name).read_bytes()):
        (base / name).chmod(0)
        faults = judge(base)
        (base / name).chmod(0o644)
        assert len(faults) == 1 and name in faults[0] and "cannot be read" in faults[0]


def release(path):
    "Let go whoever waits for a pipe."
    for _ in range(9):
        try: os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
        except OSError: return
        time.sleep(0.05)


@needs_links
@pytest.mark.parametrize("name", ["labels.csv", "boxes.csv", "signs.json"])
@pytest.mark.parametrize("thing", ["a folder", "a pipe", "a link to nothing", "a link that leads out"])
def test_table_that_is_no_file(base, monkeypatch, name, thing):
    "Instead of a table there is something that cannot be read: a fault, and no waiting."
    monkeypatch.setattr(sys.modules[__name__], "SECONDS", 2)
    make = link_to("../outside.csv") if "leads out" in thing else THINGS[thing][0]
    with replaced(base / name, make=make):
        try: faults = judge(base)
        finally: release(base / name)
        assert any(name in fault and ("leads out" not in thing or "link" in fault) for fault in faults), faults


PATHS = {  # what a cell of labels.csv says: words of the fault
    "../outside.png": "leaves the folder by '..'", "images/../../outside.png": "leaves the folder by '..'", "..": "'..'",
    "images/../images/f0.png": "leaves the folder by '..'", "images\\..\\..\\outside.png": "leaves the folder by '..'",
    "/etc/passwd": "is an absolute path", "//server/share/x.png": "is an absolute path", "C:\\x.png": "is an absolute path",
    "C:x.png": "is an absolute path", "\\\\server\\share\\x.png": "is an absolute path", "images\\f0.png": "has a backslash",
    "images/f0.png\0": "has a zero byte", "\0": "has a zero byte", "x" * 300 + ".png": "is missing", "x/" * 2100: "is missing",
    "images": "is missing", ".": "is missing", "images/f0.png/x": "is missing", "~/x.png": "is missing",
    "$HOME/x.png": "is missing", "images/*.png": "is missing", "file:images/f0.png": "is missing", "images/F0.PNG": "is missing",
    "https://example.org/x.png": "is missing", "images/f0.png?": "is missing", "images/\ud7ff.png": "is missing",
    "labels.csv": "is not a PNG or JPEG image", "outside": "is missing",
}


@pytest.mark.parametrize("column", ["image", "mask"])
@pytest.mark.parametrize("name", PATHS, ids=lambda name: ascii(name[:30]))
def test_path_that_does_not_lead_to_a_picture(base, name, column):
    "A path that leaves the folder, or leads nowhere, is one fault of its row; nothing outside is opened."
    rows = [HEADER, *ROWS]
    rows[11] = [name, *ROWS[10][1:]] if column == "image" else [*ROWS[10][:-1], name]
    with replaced(base / "labels.csv", as_csv(rows).encode()):
        check_answer(judge(base), f"labels.csv, line 12: {column} {name if name.isprintable() else ''}", PATHS[name])


ALIASES = ["./images/f0.png", "images//f0.png", "images/./f0.png", "images/f0.png/", " images/f0.png "]
NAMES = ["a\nb.png", "a,b.png", 'a"b.png', "'.png", "🧠.png", "a  b.png", "Ünï/ço̲dé.png", "ｗｉｄｅ.png", "%41.png",
         "#1.png", "-x.png", ".png", "x", "a;b.png", "a:b.png", "x" * 200 + ".png", "a\tb.png",
         "…​.png", "PNG.JPG", "images.csv", "..png", "a..b/c...png"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not allow such names")
@pytest.mark.parametrize("name", NAMES, ids=lambda name: ascii(name[:30]))
def test_unusual_name(base, name):
    "Line ends, commas, quotes and any alphabet are fine in a file's name, also in boxes.csv."
    path = base / "odd" / name
    path.parent.mkdir(parents=True)
    rows, boxes = [[(f"odd/{name}" if cell == "images/f0.png" else cell) for cell in row] for row in ROWS], [*BOXES]
    boxes.append((f"odd/{name}", "spot", "1", "1", "2", "2"))
    path.write_bytes((base / "images/f0.png").read_bytes())
    try:
        with replaced(base / "labels.csv", as_csv([HEADER, *rows]).encode()), \
                replaced(base / "boxes.csv", as_csv([BOX_HEADER, *boxes]).encode()):
            assert judge(base) == [] and not judge_open(base)
            assert f"odd/{name}" in read_dataset(base, progress=False).images
    finally:
        path.unlink()
        for folder in [folder for folder in path.parents if folder.is_relative_to(base / "odd")]: folder.rmdir()


@pytest.mark.parametrize("name", ALIASES)
def test_another_way_to_write_a_path(base, name):
    "A picture is found under every spelling of its path, and under two of them it is in the table twice."
    for rows, word in (([*ROWS[:10], (name, *ROWS[10][1:])], None), ([*ROWS, (name, *ROWS[10][1:])], "is already in line 12")):
        with replaced(base / "labels.csv", as_csv([HEADER, *rows]).encode()):
            check_answer(judge(base), f"image {name.strip()} ", word)


@pytest.mark.parametrize("name", ["a\nlabels.csv, line 1: all is well.png", "\x1b[2Jx.png", "\u202egnp.x", "a\rb.png"], ids=ascii)
@pytest.mark.parametrize("column", range(4))
def test_fault_is_one_printable_line(base, name, column):
    "A name from somebody else's table cannot end a line of the message or steer the terminal."
    rows = [list(row) for row in ROWS]
    rows[10][column] = name
    with replaced(base / "labels.csv", as_csv([HEADER, *rows], quoting=csv.QUOTE_ALL).encode()):
        faults = judge(base)
    assert len(faults) == (0 if column == 1 else 1) and all(fault.isprintable() for fault in faults), faults


FOLDERS = {"no folder": "nowhere", "a file": "set/labels.csv", "an empty one": "set/images", "a long name": "x" * 5000,
           "a zero byte": "a\0b", "nobody's home": "~nobody-of-this-name/x"}


@pytest.mark.parametrize("name", FOLDERS)
def test_what_is_no_data_set(base, name):
    "A folder that is none is a fault, too."
    folder = FOLDERS[name] if "home" in name else base.parent / FOLDERS[name]
    assert len(judge(folder)) == 1
    error = judge_open(folder)
    assert error is not None


# ---------------------------------------------------------------------------------------------- signs with a name

WORDS = {  # text of signs.json: words of the SignError
    "deep list": ("[" * NESTED, ""), "deep list that closes": ("[" * NESTED + "]" * NESTED, ""),
    "deep object": ('{"signs":' * NESTED, ""), "number of 5000 digits": ('{"object": ' + "7" * 5000 + "}", ""),
    "half a character": (json.dumps({**SIGNS, "normal": ["a \ud800 plate"]}), "normal"),
    "half a character in a name": (json.dumps({**SIGNS, "object": "\udfff"}), "object"),
    "empty": ("", "not JSON"), "a list": ("[]", "object"), "a number": ("1e400", "object"), "null": ("null", "object"),
    "NaN": ('{"signs": NaN}', "signs is nan"), "key twice": ('{"object": "a", ' + json.dumps(SIGNS)[1:], '"object" stands twice'),
    "candidates null": (json.dumps({**SIGNS, "candidates": None}), "candidates is None"),
    "nested texts": (json.dumps({**SIGNS, "normal": [["a"]]}), "normal, entry 1"),
}


@pytest.mark.parametrize("name", WORDS)
def test_signs_that_are_none(base, name):
    "Signs that nobody can read end in a SignError that says where."
    text, words = WORDS[name]
    with replaced(base / "signs.json", text.encode()):
        message = judge_signs(base / "signs.json")
        assert message and words in message and len(message) < 2000
        judge(base)
        assert type(judge_open(base)) is SignError


@pytest.mark.parametrize("name", [name for name in WORDS if name not in ("half a character", "half a character in a name")])
def test_validate_refuses_them_too(base, name):
    "What `validate` calls sound can be opened."
    with replaced(base / "signs.json", WORDS[name][0].encode()):
        faults = judge(base)
        assert faults and all("signs.json" in fault for fault in faults)


def test_signs_with_a_mark(base):
    "Signs that an editor has saved with a byte-order mark are read like a table with one."
    data = (base / "signs.json").read_bytes()
    with replaced(base / "signs.json", b"\xef\xbb\xbf" + data):
        assert judge_signs(base / "signs.json") == "" and judge_open(base) is None
        assert judge(base) == []


# ---------------------------------------------------------------------------------------------- any table

NEVER = st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="/\\:\ufeff")  # what no name of a file may hold
CELL = st.text(st.one_of(NEVER, st.sampled_from(',"; \n\'=')), min_size=1, max_size=12).map(str.strip).filter(bool)
COLUMN = CELL.filter(lambda name: name not in ("image", "patient", "split", "mask"))
RANDOM = st.randoms(use_true_random=False)
PNGS = [as_bytes(noise(number).crop((0, 0, 9, 9))) for number in range(12)]


@st.composite
def tables(draw):  # -> categories, and rows of image, patient, split and labels
    "Make up any table that is sound."
    categories = draw(st.lists(COLUMN, min_size=1, max_size=4, unique=True))
    count = draw(st.integers(2, 12))
    columns = [draw(st.lists(st.sampled_from("01"), min_size=count, max_size=count).filter(lambda cells: len(set(cells)) == 2))
               for _ in categories]
    people, parts = st.sampled_from(draw(st.lists(CELL, min_size=1, max_size=5))), st.sampled_from(["", "train", "test"])
    return categories, [(f"{draw(CELL)}{number}.png", draw(people), draw(parts), *labels)
                        for number, labels in enumerate(zip(*columns))]


def write_table(folder, categories, rows, **style):
    for number, (image, *_) in enumerate(rows):
        (folder / image).write_bytes(PNGS[number])
    header = ["image", "patient", "split", *categories]
    (folder / "labels.csv").write_bytes(as_csv([header, *rows], **style).encode("utf-8"))


@PATIENCE
@given(tables(), st.sampled_from(["\n", "\r\n"]), st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]), RANDOM)
def test_any_table_reads_back(tmp_path_factory, held, end, quoting, random):
    "Any names in any alphabet read back as they were written, and in the order in which they were written."
    (categories, rows), folder = held, tmp_path_factory.mktemp("table")
    for moved in (rows, random.sample(rows, len(rows))):
        write_table(folder, categories, moved, lineterminator=end, quoting=quoting)
        assert judge(folder, strict=True) == []
        dataset = read_dataset(folder, progress=False)
        assert dataset.categories == tuple(categories) and dataset.images == tuple(row[0] for row in moved)
        assert dataset.patients == tuple(row[1] for row in moved)
        assert dataset.split == (tuple(row[2] or None for row in moved) if any(row[2] for row in moved) else None)
        assert dataset.labels.tolist() == [[int(cell) for cell in row[3:]] for row in moved]


# ---------------------------------------------------------------------------------------------- splits


@st.composite
def datasets(draw):
    "Make up a data set in memory."
    count, categories = draw(st.integers(2, 12)), draw(st.integers(1, 4))
    labels = np.array(draw(st.lists(st.lists(st.integers(0, 1), min_size=categories, max_size=categories),
                                    min_size=count, max_size=count)), np.uint8)
    people = [f"p{draw(st.integers(0, count))}" for _ in range(count)]
    split = [draw(st.sampled_from(["train", "test", None])) for _ in range(count)] if draw(st.booleans()) else None
    images = draw(st.lists(CELL, min_size=count, max_size=count, unique=True))
    return DataSet(Path("made-up"), "made-up", tuple(images), tuple(people), tuple(f"kind {c}" for c in range(categories)),
                   labels, split and tuple(split))


def enough(dataset, shots, normal_shots):  # -> {name: images that may be drawn}, {name: how many are wanted}
    "Count what there is to draw from."
    allowed = np.array([dataset.split is None or dataset.split[i] == "train" for i in range(len(dataset))])
    found = {name: int(dataset.labels[allowed, c].sum()) for c, name in enumerate(dataset.categories)}
    normals = list(allowed[~dataset.labels.any(1)])
    wanted = (shots if normals else 0) if normal_shots is None else normal_shots
    return {**found, "normal": sum(normals)}, {**dict.fromkeys(found, shots), "normal": wanted}


def left_over(dataset, train, level):
    "List the images that may be tested, given the support."
    owner = dict(zip(dataset.images, dataset.patients))
    taken = {owner[name] for name in train} if level == "patient" else set()
    return tuple(name for i, name in enumerate(dataset.images) if name not in train and owner[name] not in taken
                 and (dataset.split is None or dataset.split[i] == "test"))


def check_split(dataset, split, shots, normal_shots):
    "A drawn split has its shots, nobody on both sides, and tests all others."
    rows = {name: row for name, row in zip(dataset.images, dataset.labels)}
    owner = dict(zip(dataset.images, dataset.patients))
    assert set(split.train).isdisjoint(split.test) and split.test == left_over(dataset, split.train, split.level) != ()
    if split.level == "patient": assert not {owner[name] for name in split.train} & {owner[name] for name in split.test}
    shown = np.sum([rows[name] for name in split.train], axis=0)
    assert (shown >= shots).all() and len(split.train) == len(set(split.train))
    assert sum(not rows[name].any() for name in split.train) == enough(dataset, shots, normal_shots)[1]["normal"]
    if dataset.split: assert all(dataset.split[dataset.images.index(name)] == "train" for name in split.train)


def check_refusal(dataset, message, shots, normal_shots):
    "A split is refused for a reason that is true: a category with its count, or nobody is left to test."
    found, wanted = enough(dataset, shots, normal_shots)
    short = {name for name in found if found[name] < wanted[name]}
    assert bool(short) == ("too few images" in message) and bool(short) != ("no image left to test" in message), message
    for name in short - {"normal"}: assert f"'{name}' has {found[name]}" in message
    if "normal" in short: assert f"normal images are {found['normal']} of {wanted['normal']}" in message


@settings(PATIENCE, max_examples=300)
@given(datasets(), st.integers(1, 3), st.sampled_from([None, 0, 1, 2]), st.sampled_from(["patient", "image"]),
       st.integers(0, 2**40), RANDOM)
def test_draw_split(dataset, shots, normal_shots, level, seed, random):
    "A draw keeps its promises or says which category has too few images; the order of the rows does not matter."
    order = random.sample(range(len(dataset)), len(dataset))
    def moved(values): return values and tuple(values[i] for i in order)
    other = replace(dataset, images=moved(dataset.images), patients=moved(dataset.patients), labels=dataset.labels[order],
                    split=moved(dataset.split))
    try: split = draw_split(dataset, shots, seed, normal_shots, level)
    except DataError as error:
        check_refusal(dataset, str(error), shots, normal_shots)
        with pytest.raises(DataError): draw_split(other, shots, seed, normal_shots, level)
        return
    check_split(dataset, split, shots, normal_shots)
    again = draw_split(other, shots, seed, normal_shots, level)
    assert set(again.train) == set(split.train) and set(again.test) == set(split.test)
    assert draw_split(dataset, shots, seed, normal_shots, level) == split


@PATIENCE
@given(datasets(), st.integers(0, 9), st.sampled_from(["patient", "image"]))
def test_split_round_trip(tmp_path_factory, dataset, seed, level):
    "A split file gives back the split, and writing it twice changes nothing."
    try: split = draw_split(dataset, 1, seed, level=level)
    except DataError: return
    path = tmp_path_factory.mktemp("split") / "split.json"
    write_split(split, path)
    before = snapshot(path.parent)
    assert read_split(path, dataset) == split and write_split(split, path) == path
    assert snapshot(path.parent) == before


def judge_split(path, dataset):
    "Read a split file: what stands in it, if it fits the data set, or a DataError. Return whether it was refused."
    split, error = reads(read_split, path, dataset)
    if error:
        assert type(error) is DataError and (str(path) in str(error) or "made-up" in str(error)), f"{error!r:.300}"
        return True
    written = json.loads(path.read_text(encoding="utf-8"))
    assert list(split.train) == written["train"] and set(split.train) <= set(dataset.images)
    assert list(split.test) == (written.get("test") or list(left_over(dataset, split.train, split.level)))
    assert (split.shots, split.seed, split.level) == (written.get("shots"), written.get("seed"), written.get("level", "patient"))
    assert set(split.train).isdisjoint(split.test) and set(split.test) <= set(dataset.images)
    assert len(set(split.train + split.test)) == len(split.train + split.test)
    owner, rows = dict(zip(dataset.images, dataset.patients)), dict(zip(dataset.images, dataset.labels))
    assert split.level == "image" or not {owner[name] for name in split.train} & {owner[name] for name in split.test}
    assert np.any([rows[name] for name in split.train], axis=0).all()
    return False


def test_mutated_split(base, tmp_path):
    "A changed split file is refused, or it is another split that fits the data set."
    dataset = replace(read_dataset(base, progress=False), name="made-up")
    path = write_split(draw_split(dataset, 1, 0), tmp_path / "split.json")
    whole, tally, wrong = path.read_bytes(), Counter(), []
    for number, change, data in mutations(whole, [(base / name).read_bytes() for name in ("labels.csv", "signs.json")], 250, 9):
        path.write_bytes(data)
        try: tally["faults" if judge_split(path, dataset) else "sound"] += 1
        except Exception as error: wrong.append(f"{number}, {change}: {type(error).__name__}: {str(error)[:300]}")
    print(f"split file: 250 mutations, {dict(tally)}, {len(wrong)} wrong")
    assert not wrong, f"{len(wrong)} wrong:\n" + "\n".join(wrong)
    assert min(tally["faults"], tally["sound"]) >= 5
