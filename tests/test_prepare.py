"Public sets and own images from the shell: counts, interruption, names that must not leak, and what is refused."
import signal
import subprocess
import time
from collections import Counter

import h5py
import nibabel
import numpy as np
import pydicom
import pytest
from conftest import BIN, REAL, ROOT, run
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from sdmad_nb.app.command_line import shell
from sdmad_nb.data import fastmri
from sdmad_nb.data.fastmri import fastmri_plus, label_rows, read_annotations
from sdmad_nb.data.folder import read_boxes, read_dataset, validate
from sdmad_nb.data.images import DataError, ImageReader
from sdmad_nb.data.phantom import CATEGORIES
from sdmad_nb.data.writer import counts, read_preparation

LABELS, VOLUMES = REAL / "fastmri_plus" / "brain.csv", REAL / "fastmri_plus" / "brain_file_list.csv"
needs_labels = pytest.mark.skipif(not LABELS.is_file(), reason=f"no {LABELS}: see data_links.md and SDMAD_REAL_DATA")

# slice: Hamming score of "nothing" and subset accuracy of the best constant (both in percent, without normal images);
# then, as in data_links.md, images with a finding, with two or more, normal ones, and with each of the six findings
EXPECTED = {0: [79.4, 53.3, 349, 67, 368, 28, 54, 70, 23, 37, 220],
            5: [73.2, 22.0, 164, 47, 368, 43, 71, 50, 25, 31, 0], 10: [74.4, 24.4, 135, 36, 368, 67, 64, 27, 13, 2, 0]}


def command(*words): return shell(["prepare", *map(str, words)])
def tree(folder): return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}


def write_volume(path, seed, side=40):
    columns = np.random.default_rng(seed).random((12, 1, side), dtype=np.float32)
    with h5py.File(path, "w") as file: file["reconstruction_rss"] = columns.repeat(side, axis=1)


def write_pictures(folder, names):
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 24), np.uint8)).save(folder / name)


def write_scan(path, seed=0, patient="4711"):
    path.parent.mkdir(parents=True, exist_ok=True)
    scan, meta = pydicom.Dataset(), FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = "1.2.840.10008.5.1.4.1.1.2", generate_uid()
    meta.TransferSyntaxUID, scan.file_meta = ExplicitVRLittleEndian, meta
    scan.PatientID, scan.PatientName, scan.PhotometricInterpretation = patient, "Doe^Jane", "MONOCHROME2"
    scan.Rows, scan.Columns, scan.SamplesPerPixel, scan.PixelRepresentation = 16, 16, 1, 0
    scan.BitsAllocated, scan.BitsStored, scan.HighBit, scan.RescaleSlope, scan.RescaleIntercept = 16, 16, 15, 1, -1024
    scan.PixelData = np.random.default_rng(seed).integers(0, 2000, (16, 16)).astype(np.uint16).tobytes()
    scan.save_as(path, enforce_file_format=True)


@needs_labels
def test_fastmri_plus_labels_have_the_published_counts():
    annotations = read_annotations(LABELS, VOLUMES)
    assert (len(annotations.rows), len(annotations.volumes)) == (8213, 1001)
    for slice, (nothing, constant, *numbers) in EXPECTED.items():
        assert list(counts(label_rows(annotations, slice)[0], CATEGORIES).values())[2:] == numbers
        sets = Counter(row.findings for row in label_rows(annotations, slice, normals="none")[0])
        seen, count = len(set().union(*sets)), sum(sets.values())
        share = sum(len(found) * times for found, times in sets.items()) / count / seen
        assert (round(100 * (1 - share), 1), round(100 * max(sets.values()) / count, 1)) == (nothing, constant)


@needs_labels
def test_fastmri_plus_prepares_what_its_labels_promise(tmp_path):
    "Every tenth volume of the real list, and one that nobody reviewed."
    annotations = read_annotations(LABELS, VOLUMES)
    names, strange = annotations.volumes[::10], "file_brain_AXFLAIR_999_1"
    for seed, name in enumerate([*names, strange]): write_volume(tmp_path / f"{name}.h5", seed, side=320)
    for folder in fastmri_plus(tmp_path, LABELS, VOLUMES, tmp_path.with_name("out")):
        promised = label_rows(annotations, int(folder.name.removeprefix("fastmri_plus-slice")))[0]
        promised, dataset = [row for row in promised if row.patient in names], read_dataset(folder)
        assert set(dataset.images) == {row.image for row in promised}
        assert dataset.labels.sum() == sum(len(row.findings) for row in promised)
        boxed = {row.image for row in promised if any(min(box[3:]) > 0 for box in row.boxes)}
        assert set(read_boxes(dataset)["image"]) == boxed
        assert read_preparation(folder)["left_out"]["volumes that were never reviewed"] == [strange]


@pytest.fixture
def small(tmp_path):
    "The words that prepare eight volumes, four of them with a finding at slice 5."
    (images := tmp_path / "volumes").mkdir()
    table, listed, names = tmp_path / "brain.csv", tmp_path / "list.csv", [f"a_b_c_{i}" for i in range(8)]
    for seed, name in enumerate(names): write_volume(images / f"{name}.h5", seed)
    rows = [f"{name},5,No,3,3,9,9,{'Craniotomy' if i % 2 else 'Dural thickening'}" for i, name in enumerate(names[:4])]
    table.write_text("\n".join(["file,slice,study_level,x,y,width,height,label", *rows]))
    listed.write_text("\n".join(names))
    return ["fastmri-plus", "--slices=5", images, table, listed]


def test_killed_again_and_again_it_ends_the_same(small, tmp_path):
    "SIGKILL at different moments: never a folder that validates, and in the end the same bytes as without."
    assert command(*small, tmp_path / "whole") == 0
    words, folder = [BIN / "sdmad", "prepare", *small, tmp_path / "out"], tmp_path / "out" / "fastmri_plus-slice5"
    for delay in (0.0, 0.02, 0.05, 0.1):
        process = subprocess.Popen([*map(str, words)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not folder.exists(): time.sleep(0.005)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert (folder / "labels.csv").exists() or validate(folder), "an unfinished folder must not validate"
    assert run(*words).returncode == 0
    assert tree(folder) == tree(tmp_path / "whole" / "fastmri_plus-slice5") and validate(folder) == []


def test_ctrl_c_says_how_to_go_on(small, tmp_path, capsys, monkeypatch):
    "Interrupted at the third slice that is read; then the same command again, and once more, which does nothing."
    read, folder = iter([fastmri._volume_slice] * 2), tmp_path / "out" / "fastmri_plus-slice5"
    def interrupted(*arguments):
        function = next(read, None)
        if function is None: raise KeyboardInterrupt
        return function(*arguments)
    with monkeypatch.context() as patch:
        patch.setattr(fastmri, "_volume_slice", interrupted)
        assert command(*small, tmp_path / "out") == 130
    assert "the same command goes on from here" in capsys.readouterr().err and "has not finished" in validate(folder)[0]
    assert command(*small, tmp_path / "out") == 0 and len(read_dataset(folder)) == 8
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert command(*small, tmp_path / "out") == 0 and all(path.stat().st_mtime_ns == times[path] for path in times)


def test_scans_and_pictures_become_the_same_bytes_without_names(tmp_path):
    "The same salt makes the same folder; another one other names, and the same pixels."
    write_pictures(tmp_path / "mine", ["spot/a.png", "spot/b.tif", "normal/c.bmp", "normal/d.jpg"])
    for seed, name in enumerate(("spot/Doe/IM1", "normal/Doe.dcm", "normal/e.dcm")):
        write_scan(tmp_path / "mine" / name, seed, patient="4712" if name == "normal/e.dcm" else "4711")
    volume = nibabel.Nifti1Image(np.random.default_rng(0).random((20, 24, 3)), np.diag([-1, 1, 2, 1.0]))
    nibabel.save(volume, tmp_path / "mine/spot/v.nii.gz")
    for out, salt in (("a", "s"), ("b", "s"), ("c", "t")):
        words = [tmp_path / "mine", tmp_path / out, "--slices", 0, 2, "--salt", salt]
        assert command("own-folder", *words) == 0
    first, again, other = (tree(tmp_path / name) for name in "abc")
    assert first == again and set(first) & set(other) == {"labels.csv", "preparation.json"}
    written = b" ".join(path.encode() + data for path, data in first.items())
    assert not any(name in written for name in (b"Doe", b"Jane", b"spot/"))
    patients = read_dataset(tmp_path / "a").patients
    assert sorted(map(patients.count, patients)) == [1] * 5 + [2] * 4  # two slices of the volume, two files of 4711
    pixels = [sorted(data for path, data in files.items() if path.startswith("images")) for files in (first, other)]
    assert len(pixels[0]) == 9 and pixels[0] == pixels[1]


def refused(capsys, says, *words):
    assert command(*words) == 1
    message = capsys.readouterr().err
    assert message.startswith("error: ") and says in message, message


def test_what_cannot_be_done_is_refused_before_anything_is_written(small, tmp_path, capsys):
    broken = tmp_path / "volumes" / "a_b_c_3.h5"
    (tmp_path / "empty").mkdir()
    whole, own = broken.read_bytes(), ["own-folder", tmp_path, tmp_path / "out"]
    broken.write_bytes(whole[:2000])
    refused(capsys, broken.name, *small, tmp_path / "out")
    broken.write_bytes(whole)
    for more, says in [(["--contrasts", "AXT2"], "AXT2"), (["--slices", 10], "no image has a finding")]:
        refused(capsys, says, small[0], *small[2:], tmp_path / "out", *more)  # without its own slices, which would add up
    for words, says in [([*own, "--plane", "top", "--size", 3], "size is 3"), ([own[0], tmp_path / "empty", own[2]], "no file ending in"),
                        ([*own, "--mask-column", "m"], "give --labels"), (["bmad", *own[1:]], "set kind to one of")]:
        refused(capsys, says, *words)
    for words, says in [(["fastmri-plus"], "IMAGES"), ([*small, "out", "--slices", "five"], "valid int")]:
        assert command(*words) == 2 and says in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def spoil(data, generator):
    "Cut, flip, zero, drop or repeat a piece of a file."
    start, length = int(generator.integers(len(data))), int(generator.integers(1, 40))
    piece, rest = data[start:start + length], data[start + length:]
    flipped = bytes([piece[0] ^ 1 << int(generator.integers(8))]) + piece[1:]
    return data[:start] + (b"", flipped + rest, bytes(len(piece)) + rest, rest, 2 * piece + rest)[generator.integers(5)]


@pytest.mark.filterwarnings("ignore")  # pydicom warns of what it reads nevertheless
@pytest.mark.parametrize("kind", ["scan.dcm", "volume.nii", "volume.nii.gz", "picture.png", "picture.tif"])
def test_mutated_files_end_in_a_picture_or_a_sentence(kind, tmp_path):
    generator, file, refusals = np.random.default_rng(0), tmp_path / kind, 0
    if kind == "scan.dcm": write_scan(file)
    elif kind.startswith("picture"): write_pictures(tmp_path, [kind])
    else: nibabel.save(nibabel.Nifti1Image(generator.random((9, 8, 7)), np.eye(4)), file)
    whole = file.read_bytes()
    for _ in range(120):
        file.write_bytes(spoil(whole, generator))
        reader = ImageReader()
        try: made = [reader.image(file, number) for number in range(min(reader.inspect(file).count, 3))]
        except DataError as error:
            assert str(file) in str(error) and ":" in str(error)
            refusals += 1
        else: assert all(isinstance(image, bytes) or (image.dtype == np.uint8 and image.ndim > 1) for image in made)
    assert refusals > 5
