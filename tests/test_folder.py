"Whatever happens to the files of a data-set folder, reading ends in a right result or in an error that names the file."
import csv
import io
import json
import os
import re
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image, ImageOps

from sdmad_nb.core.config import Config
from sdmad_nb.core.signs import SignError, name_fault, read_signs, write_signs
from sdmad_nb.data.folder import DataSet, read_boxes, read_dataset, validate
from sdmad_nb.data.images import DataError, decode, load_rgb
from sdmad_nb.data.open_data import open_data
from sdmad_nb.data.splits import draw_split, indices, read_split, write_split

CATEGORIES = ("spot", "dark stripe", "Ödem, severe")
LABELS = [("image", "patient", *CATEGORIES, "split", "mask"),
          ("images/a0.png", "a", 1, 0, 0, "train", "masks/a0.png"), ("images/a1.jpg", "a", 0, 0, 0, "train", ""),
          ("images/b0.png", "Núñez", 0, 1, 0, "train", "masks/b0.png"), ("images/c0.png", "c", 0, 0, 1, "test", ""),
          ("images/d0.png", "e, junior", 1, 1, 0, "test", ""), ("images/e0.png", "f", 0, 1, 1, "", "")]
BOXES = [("image", "category", "x", "y", "width", "height"), ("images/a0.png", "spot", 2, 3, 5, 6),
         ("images/b0.png", "dark stripe", 0, 0, 18, 22), ("images/d0.png", CATEGORIES[1], 1.5, 2.25, 4, 0.5)]
SIGNS = {"object": "plate", "normal": ["a flawless {object}"], "templates": ["a {object} with {sign}"], "note": "ours",
         "signs": {"spot": ["a bright spot"], "dark stripe": ["a stripe", "a line"], CATEGORIES[2]: ["a pale rim"]}}
SIGNS["candidates"] = {name: [*texts, "another"] for name, texts in SIGNS["signs"].items()}
NASTY = ["", " ", "NaN", "inf", "-1", "1e400", "2", "１", "null", "7" * 5000, "x" * 200_000, '"', '""', "\\", "\0", "\r",
         "\n", "\ufeff", "\ud800", '"\\ud800"', "\u202e", ",", ";", "[", "{", ":", "[]", "{}", '["x", " X"]', "[" * 999,
         "{sign}", "{finding}", "..", "../outside.png", "images", "images/a0.png", "./images/b0.png", "masks/a0.png",
         "train", "spot", "ѕpot", '"spot"', "image", "mask", "patient", "signs"]
PATHS = ["../outside.png", "images/../images/e0.png", "/etc/passwd", "//server/x.png", "C:\\x.png", "images\\e0.png",
         "\0", "x" * 300, "x/" * 2100, "images", ".", "labels.csv", "a\nlabels.csv, line 1.png", "\u202egnp"]
NO_LABELS = ["", "2", "-1", "1.0", "１", "yes", "True"]
WRONG_CELLS = [["", "images/a0.png", "./images/a0.png", "images//a0.png"], [""], *[NO_LABELS] * 3, ["Test", "0"], []]
few = settings(deadline=None, derandomize=True, database=None, max_examples=50)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")


def noise(seed, mode="L"):  # a picture like no other
    values = np.random.default_rng(seed).integers(0, 256, (20 + seed, 16 + seed, 3), np.uint8)
    return Image.fromarray(values).convert(mode)


def as_bytes(image, form="PNG", **options):
    image.save(held := io.BytesIO(), form, **options)
    return held.getvalue()


def as_csv(rows, **style):
    csv.writer(held := io.StringIO(), lineterminator="\n", **style).writerows(rows)
    return held.getvalue().encode()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    "A sound folder, with a picture beside it that no reading may take."
    folder = (tmp_path_factory.mktemp("fuzz") / "set").resolve()
    for part in ("images", "masks"): (folder / part).mkdir(parents=True)
    for seed, (image, *_, mask) in enumerate(LABELS[1:]):
        picture = noise(seed, "RGB" if seed % 2 else "L")
        (folder / image).write_bytes(as_bytes(picture, "PNG" if image.endswith("png") else "JPEG"))
        if mask: picture.point(lambda value: 255 * (value > 127)).save(folder / mask)
    (folder / "labels.csv").write_bytes(as_csv(LABELS)), (folder / "boxes.csv").write_bytes(as_csv(BOXES))
    (folder / "signs.json").write_text(json.dumps(SIGNS, ensure_ascii=False), encoding="utf-8")
    (folder / "images/notes.txt").write_text("a foreign file does no harm")
    (folder.parent / "outside.png").write_bytes(as_bytes(noise(99)))
    return folder


@contextmanager
def replaced(path, new):  # bytes, or a function that makes something else in the place of a file for a while
    before = path.read_bytes()
    path.unlink()
    path.write_bytes(new) if isinstance(new, bytes) else new(path)
    try: yield
    finally:
        if path.is_dir() and not path.is_symlink(): path.rmdir()
        path.unlink(missing_ok=True)
        path.write_bytes(before)


def message(folder, name, read=open_data):
    "Read a folder: '' after a look at the result, or the one error, which names the file and says what to do."
    try: dataset = read(str(folder))
    except (DataError, SignError) as error:
        assert name in str(error), (name, str(error))
        for fault in error.faults: assert re.search(r": [^:]*[a-z]{3}", fault) and fault.isprintable(), fault
        return str(error)
    check_right(folder, dataset[0] if read is open_data else dataset)
    return ""


def check_right(folder, dataset):
    "What was read is what stands in the files: each image keeps its labels, patient, mask and boxes."
    text = (folder / "labels.csv").read_bytes().decode("utf-8-sig")
    rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text, newline="")) if "".join(row).strip()]
    table, sizes = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]], {}
    assert len(table) == len(dataset) and set(rows[0]) - {*LABELS[0]} | {*CATEGORIES} >= set(dataset.categories)
    for i, row in enumerate(table):
        assert (dataset.images[i], dataset.patients[i]) == (row["image"], row["patient"]) and row["patient"]
        assert [row[name] for name in dataset.categories] == [str(label) for label in dataset.labels[i]]
        assert (dataset.split[i] or "" if dataset.split else "") == row.get("split", "") in ("", "train", "test")
        size = sizes[row["image"]] = ImageOps.exif_transpose(Image.open(folder / row["image"])).size
        assert (folder / row["image"]).resolve().is_relative_to(folder) and load_rgb(dataset.path(i)).size == size
        assert dataset.mask(i).shape == size[::-1] if row.get("mask") else dataset.mask(i) is None
    assert len({os.path.normpath(image) for image in dataset.images}) == len(dataset)
    for image, _, x, y, width, height in read_boxes(dataset).itertuples(index=False):
        assert 0 <= x < x + width <= sizes[image][0] and 0 <= y < y + height <= sizes[image][1]


def changes(text):
    "List texts in which one token of a table or of JSON is another, is gone or stands twice, or that are cut."
    tokens = re.findall(r'"[^"]*"|[\w./{} -]+|[^ ]', text)
    words = [*dict.fromkeys([*NASTY, *map(json.dumps, NASTY), *tokens])]
    one = ["".join([*tokens[:i], new, *tokens[i + 1:]]) for i, old in enumerate(tokens) for new in [*words, old * 2]]
    cut = ["".join(tokens[:i]) for i in range(len(tokens))]
    other = [text.encode(encoding, "replace") for encoding in ("utf-8-sig", "utf-16", "cp1252")]
    return [change.encode("utf-8", "surrogatepass") for change in one + cut] + other


@st.composite
def damaged(draw, data):  # -> bytes of a picture as a bad disk or a broken download leaves them
    i, length = draw(st.integers(0, len(data) - 1)), draw(st.integers(0, 40))
    piece = draw(st.binary(max_size=9) | st.just(bytes([data[i] ^ 1])))
    return data[:i] + draw(st.sampled_from([piece + data[i + 1:], piece + data[i + length:], b""]))


@pytest.mark.parametrize("name", ["labels.csv", "boxes.csv"])
def test_any_change_of_a_table(base, name):
    "A changed table is read rightly, or refused by its name."
    assert message(base, "") == "" and validate(base) == []
    @settings(few, max_examples=120)
    @given(st.sampled_from(changes((base / name).read_bytes().decode())))
    def check(data):
        with replaced(base / name, data): message(base, name)
    check()


def no_key_twice(items):
    assert len(dict(items)) == len(items)
    return dict(items)


def test_any_change_of_the_signs(tmp_path):
    "Changed signs are refused by the file's name, or are what the file says and can be written again."
    path = tmp_path / "signs.json"
    for data in changes(json.dumps(SIGNS, ensure_ascii=False))[::7]:
        path.write_bytes(data)
        try: signs = read_signs(path)
        except SignError as error: assert str(error).startswith(f"the signs {path} cannot") and len(str(error)) < 3000
        else:
            written = json.loads(data.decode("utf-8-sig"), object_pairs_hook=no_key_twice)
            assert {name: tuple(texts) for name, texts in written["signs"].items()} == signs.signs
            assert read_signs(write_signs(signs, path)) == signs


@pytest.mark.parametrize("name", ["images/a0.png", "images/a1.jpg", "masks/a0.png"])
def test_any_damage_of_a_picture(base, name):
    "A damaged picture is refused by its name, or is still a picture."
    @few
    @given(damaged((base / name).read_bytes()))
    def check(data):
        with replaced(base / name, data): message(base, name)
    check()


def test_a_png_keeps_its_pixels():
    "One wrong bit anywhere in a PNG is noticed, because it carries checksums, or it does not matter."
    smooth = Image.fromarray((np.hypot(*np.mgrid[-20:20, -20:20]) * 9).astype(np.uint8))
    data, seen = as_bytes(smooth), set()
    for i in range(len(data)):
        try: seen.add(decode(data[:i] + bytes([data[i] ^ 1]) + data[i + 1:], "image").tobytes())
        except DataError: pass
    assert seen == {smooth.tobytes()}


def linked(target): return lambda path: path.symlink_to(target)


LYING = Image.Exif()
LYING[0x0112] = 6  # orientation: the camera lay on its side
HUGE = as_bytes(noise(9))[:16] + b"\x00\x00\x75\x30" * 2 + as_bytes(noise(9))[24:]  # claims 30000 x 30000 pixels
GREY16 = as_bytes(Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 9))
PLACES = {  # what stands in the place of a file: words of the one fault, or "" where it is sound
    "images/e0.png": [
        (b"<html>404</html>", "not a PNG"), (HUGE, "e0.png "), (as_bytes(Image.new("L", (30, 30), 9)), "nearly empty"),
        (as_bytes(noise(0)), "same pixels as images/a0.png of patient 'a'"), (GREY16, ""), (lambda path: 0, "missing"),
        (as_bytes(noise(9, "CMYK"), "JPEG"), ""), (as_bytes(noise(9), exif=LYING), ""), (os.mkdir, "is missing"),
        (os.mkfifo, "is missing"), (linked("e0.png"), "is missing"), (linked("../../outside.png"), "by a link"),
        (linked("/dev/null"), "by a link"), (linked("../masks/a0.png"), "")],
    "masks/a0.png": [
        (as_bytes(Image.new("L", (16, 20), 1)), "holds 1 beside"), (as_bytes(noise(0)), "beside 0 and 255"),
        (as_bytes(Image.new("L", (20, 16))), "20 x 16 pixels but its image 16 x 20"),
        (as_bytes(Image.new("1", (16, 20), 1)), ""), (as_bytes(Image.new("L", (20, 16), 255), exif=LYING), "")],
    **{name: [(os.mkdir, "is missing"), (os.mkfifo, "is missing"), (b"\xff\xfe", "UTF-8" if "csv" in name else "utf-8"),
              (linked("../outside.png"), "by a link")] for name in ("labels.csv", "boxes.csv", "signs.json")}}


@pytest.mark.parametrize("name", PLACES)
def test_what_stands_in_the_place_of_a_file(base, name):
    for new, words in PLACES[name]:
        with replaced(base / name, new): found = message(base, name, read_dataset)
        assert words in found and bool(words) == bool(found) and "\n" not in found, (words, found)


@pytest.mark.parametrize("column", range(7))
def test_cell_that_is_a_fault_of_its_row(base, column):
    "A path that leaves the folder or leads nowhere, an image twice, no patient, a label that is not 0 or 1."
    for cell in [*PATHS, *WRONG_CELLS[column]] if column in (0, 6) else WRONG_CELLS[column]:
        rows = [list(row) for row in LABELS]
        rows[6][column] = cell
        with replaced(base / "labels.csv", as_csv(rows)): found = message(base, f"line {7 + cell.count(chr(10))}: ")
        assert found, cell


LETTERS = st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="/\\:\ufeff") | st.sampled_from(',"; \n\'=')
NAME = st.text(LETTERS, min_size=1, max_size=12).map(str.strip).filter(lambda name: name not in ("", "..", *LABELS[0]))


@few
@given(st.lists(NAME.filter(lambda name: not name_fault(name)), min_size=1, max_size=3, unique=True),
       st.lists(NAME, min_size=2, max_size=5), st.integers(0, 99))
def test_any_names_read_back(tmp_path_factory, categories, patients, seed):
    "Names in any alphabet read back as they were written, in any order of the rows."
    folder, rng = tmp_path_factory.mktemp("names"), np.random.default_rng(seed)
    rows = [(f"{patient}{i}.png", patient, *[int(i > 0)] * len(categories)) for i, patient in enumerate(patients)]
    rows = [rows[i] for i in rng.permutation(len(rows))]
    for number, (image, *_) in enumerate(rows): (folder / image).write_bytes(as_bytes(noise(number)))
    table = [("image", "patient", *categories), *rows]
    (folder / "labels.csv").write_bytes(as_csv(table, quoting=int(rng.integers(2))))
    dataset = read_dataset(folder, progress=False)
    assert dataset.categories == tuple(categories) and dataset.labels.tolist() == [list(row[2:]) for row in rows]
    assert list(zip(dataset.images, dataset.patients)) == [row[:2] for row in rows]


LEVELS = ["patient", "image"]


def reordered(dataset, order):
    images, patients = (tuple(values[i] for i in order) for values in (dataset.images, dataset.patients))
    split = dataset.split and tuple(dataset.split[i] for i in order)
    return replace(dataset, images=images, patients=patients, labels=dataset.labels[order], split=split)


@st.composite
def datasets(draw):  # in memory
    n, c, rng = draw(st.integers(2, 12)), draw(st.integers(1, 4)), np.random.default_rng(draw(st.integers(0, 999)))
    images, patients = (tuple(f"{name}{i}" for i in numbers) for name, numbers in
                        (("i", rng.permutation(n)), ("p", rng.integers(0, n, n))))
    split = tuple(rng.choice(["train", "test", None], n)) if draw(st.booleans()) else None
    labels = rng.integers(0, 2, (n, c)).astype(np.uint8)
    return DataSet(Path("x"), "x", images, patients, tuple("abcd"[:c]), labels, split)


@settings(few, max_examples=150)
@given(datasets(), st.integers(1, 2), st.integers(0, 9), st.sampled_from([-1, 0, 2]), st.sampled_from(LEVELS))
def test_draw(tmp_path_factory, dataset, shots, seed, normal_shots, level):
    "Each category has its shots, nobody is on both sides, the order of rows does not matter, a file keeps the draw."
    other = reordered(dataset, np.random.default_rng(seed).permutation(len(dataset)))
    config = Config(shots=shots, seed=seed, normal_shots=normal_shots, split_level=level)
    try: split = draw_split(dataset, config)
    except DataError:
        with pytest.raises(DataError): draw_split(other, config)
        return
    train, test, owners = indices(dataset, split.train), indices(dataset, split.test), np.array(dataset.patients)
    assert (dataset.labels[train].sum(0) >= shots).all() and not set(train) & set(test) and len(test)
    assert level == "image" or not set(owners[train]) & set(owners[test])
    if dataset.split: assert [{dataset.split[i] for i in rows} for rows in (train, test)] == [{"train"}, {"test"}]
    again = draw_split(other, config)
    assert set(again.train) == set(split.train) and set(again.test) == set(split.test)
    path = write_split(split, tmp_path_factory.mktemp("split") / "split.json")
    assert read_split(path, dataset) == split and write_split(split, path) == path


def test_any_change_of_a_split(base, tmp_path):
    "A changed split file is refused by its name, or it is another split that fits the data set."
    dataset = replace(read_dataset(base, progress=False), split=None)
    path = write_split(draw_split(dataset, Config(split_level="image")), tmp_path / "split.json")
    for data in changes(path.read_text(encoding="utf-8"))[::7]:
        path.write_bytes(data)
        try: split = read_split(path, dataset)
        except DataError as error: assert str(path) in str(error) and len(str(error)) < 3000
        else:
            assert split.level == "image" and split.test
            assert dataset.labels[indices(dataset, split.train)].any(0).all()
            assert len({*split.train, *split.test}) == len(split.train) + len(split.test)
            assert json.loads(data.decode("utf-8-sig"), object_pairs_hook=no_key_twice)["train"] == list(split.train)
