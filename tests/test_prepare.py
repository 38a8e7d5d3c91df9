"Public sets and own images from the command line: counts, interruption, and what is refused."
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import h5py
import nbformat
import nibabel
import numpy as np
import pydicom
import pytest
from conftest import BIN, REAL, ROOT, run
from PIL import Image
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

from sdmad_nb import fastmri
from sdmad_nb.data.folder import DataError, read_dataset, validate
from sdmad_nb.data.pixels import dicom_frame, dicom_info, nifti_slices
from sdmad_nb.data.prepare import annotation_counts, fastmri_plus, main, read_annotations

LABELS, VOLUMES = REAL / "fastmri_plus" / "brain.csv", REAL / "fastmri_plus" / "brain_file_list.csv"
needs_labels = pytest.mark.skipif(not LABELS.is_file(), reason=f"fastMRI+'s {LABELS} is not there: data_links.md says where to get it; "
                                  "set SDMAD_REAL_DATA to the folder that holds fastmri_plus/")

# data_links.md: images with a finding, with two or more, then the six findings
EXPECTED = {0: [349, 67, 28, 54, 70, 23, 37, 220], 5: [164, 47, 43, 71, 50, 25, 31, 0], 10: [135, 36, 67, 64, 27, 13, 2, 0]}
NORMAL = 368  # volumes without a row, or with "Normal for age" alone


def prepare(*words, **kwargs):
    "Run the command the way a user does."
    return run(sys.executable, "-m", "sdmad_nb.data.prepare", *words, **kwargs)


def write_volume(path, seed, slices=(0, 5, 10), depth=16, side=320):
    "A fastMRI volume of the right name, layout and size; only the slices that are read hold data."
    rows = np.random.default_rng(seed).random((len(slices), 1, 40), dtype=np.float32)
    with h5py.File(path, "w") as file:
        data = file.create_dataset("reconstruction_rss", (depth, side, side), np.float32, chunks=(1, side, side), compression=1)
        for number, row in zip(slices, rows): data[number] = np.repeat(row, side // 40, axis=1).repeat(side, axis=0)


@needs_labels
def test_fastmri_plus_labels_have_the_published_counts():
    annotations = read_annotations(LABELS, VOLUMES)
    assert len(annotations.rows) == 8213 and len(annotations.volumes) == 1001
    table = annotation_counts(annotations)
    for slice, numbers in EXPECTED.items(): assert table.loc[slice].tolist()[2:4] + table.loc[slice].tolist()[5:] == numbers
    assert (table.normal == NORMAL).all()


@needs_labels
def test_fastmri_plus_is_prepared_with_the_published_counts(tmp_path):
    "All 1001 volumes but one, another that nobody reviewed, one broken: the folders hold exactly what the labels promise."
    images = tmp_path / "multicoil_train"
    images.mkdir()
    names = VOLUMES.read_text(encoding="utf-8").split()
    for seed, name in enumerate(names): write_volume(images / f"{name}.h5", seed)
    write_volume(images / "file_brain_AXFLAIR_999_1.h5", 5000)
    done = prepare("fastmri-plus", "--images", images, "--annotations", LABELS, "--file-list", VOLUMES, "--out", tmp_path / "data")
    assert done.returncode == 0, done.stderr
    for slice, (found, several, *each) in EXPECTED.items():
        folder = tmp_path / "data" / f"fastmri_plus-slice{slice}"
        dataset, record = read_dataset(folder), json.loads((folder / "preparation.json").read_text(encoding="utf-8"))
        assert dataset.labels.sum(0).tolist() == [number for number in each if number]
        assert (dataset.labels.any(1).sum(), (dataset.labels.sum(1) >= 2).sum()) == (found, several)
        assert (~dataset.labels.any(1)).sum() == NORMAL and len(set(dataset.patients)) == len(dataset) == record["counts"]["images"]
        assert record["left_out"]["volumes that were never reviewed"] == ["file_brain_AXFLAIR_999_1"]
        assert len(dataset) + len(record["left_out"]["slices with neither a wanted finding nor surely none"]) == 1001
        assert len(record["left_out"].get("boxes without an area", [])) == (slice == 10) and "boxes outside the image" not in record["left_out"]
        boxes = (folder / "boxes.csv").read_text(encoding="utf-8").splitlines()[1:]
        assert len(boxes) > found / 2 and not any(box.split(",")[-1] == "0.0" for box in boxes)
        assert f"{found} with a finding" in done.stdout and str(tmp_path) not in (folder / "preparation.json").read_text()


@needs_labels
def test_statistics_of_the_labels_alone(tmp_path):
    done = run(BIN / "papermill", "nbs/run_data.ipynb", "-p", "smoke", "True", "-p", "results", tmp_path, "-p", "annotations", LABELS,
               "-p", "file_list", VOLUMES)
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "data-smoke" / "fastmri_plus.csv").read_text(encoding="utf-8").splitlines()
    assert [int(line.split(",")[0]) for line in table[1:]] == [0, 5, 10] and table[2].split(",")[3:5] == ["164", "47"]
    [book] = (tmp_path / "data").glob("run_data*.ipynb")
    shown = "".join(str(output) for cell in nbformat.read(book, as_version=4).cells for output in cell.get("outputs", []))
    for share in ("79.4", "73.2", "74.4", "53.3", "22.0", "24.4"): assert share in shown, "the trivial scores of the labels"


# A small fastMRI+ to break


@pytest.fixture
def small(tmp_path):
    "Eight volumes, four of them with a finding at slice 5."
    names = [f"file_brain_AXFLAIR_200_{number}" for number in range(8)]
    (tmp_path / "volumes").mkdir()
    for seed, name in enumerate(names): write_volume(tmp_path / "volumes" / f"{name}.h5", seed, depth=12, side=40)
    rows = [f"{name},5,No,3,3,9,9,{'Craniotomy' if i % 2 else 'Dural thickening'}" for i, name in enumerate(names[:4])]
    (tmp_path / "brain.csv").write_text("\n".join(["file,slice,study_level,x,y,width,height,label", *rows]) + "\n")
    (tmp_path / "list.csv").write_text("\n".join(names) + "\n")
    return tmp_path


def command(small, *more):
    "The words of the small preparation."
    return ["fastmri-plus", "--images", small / "volumes", "--annotations", small / "brain.csv", "--file-list", small / "list.csv",
            "--out", small / "out", "--slices", 5, *more]


def tree(folder): return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_broken_volume_is_named_and_skipped_only_when_asked(small, capsys):
    broken = small / "volumes" / "file_brain_AXFLAIR_200_3.h5"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    done = prepare(*command(small))
    assert done.returncode == 1 and broken.name in done.stderr and "--skip-broken" in done.stderr and "Traceback" not in done.stderr
    assert "preparation has not finished" in validate(small / "out" / "fastmri_plus-slice5")[0]
    broken.write_bytes(whole)
    assert main([str(word) for word in command(small)]) == 0 and len(read_dataset(small / "out" / "fastmri_plus-slice5")) == 8
    broken.write_bytes(b"")
    refused([*command(small)[:-1], 10, "--skip-broken"], "no image has one of", capsys)  # nothing is marked at slice 10


def test_killed_again_and_again_it_ends_the_same(small):
    "SIGKILL at different moments: never a folder that validates, and in the end the same bytes as without."
    undisturbed = small / "undisturbed"
    fastmri_plus(small / "volumes", small / "brain.csv", small / "list.csv", undisturbed, slices=(5,), progress=False)
    folder = small / "out" / "fastmri_plus-slice5"
    for delay in (0.0, 0.02, 0.05, 0.1, 0.2):
        process = subprocess.Popen([sys.executable, "-m", "sdmad_nb.data.prepare", *map(str, command(small))], cwd=ROOT,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not folder.exists(): time.sleep(0.005)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if not (folder / "labels.csv").exists(): assert validate(folder), "an unfinished folder must not validate"
    assert prepare(*command(small)).returncode == 0
    assert tree(folder) == tree(undisturbed / "fastmri_plus-slice5") and validate(folder) == []


def test_ctrl_c_says_how_to_go_on(small, capsys, monkeypatch):
    "Interrupted at the third slice that is read; then the same command again."
    read = iter([fastmri.volume_slice] * 2)
    def interrupted(*arguments):
        function = next(read, None)
        if function is None: raise KeyboardInterrupt
        return function(*arguments)
    words = [str(word) for word in command(small)]
    with monkeypatch.context() as patch:
        patch.setattr(fastmri, "volume_slice", interrupted)
        assert main(words) == 130
    assert "the same command goes on from here" in capsys.readouterr().err
    assert validate(small / "out" / "fastmri_plus-slice5") == ["its preparation has not finished: run the same command again, it goes on where it stopped"]
    assert main(words) == 0 and len(read_dataset(small / "out" / "fastmri_plus-slice5")) == 8


def refused(words, says, capsys):
    "The command ends with 1 and one message."
    assert main([str(word) for word in words]) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and says in said, said


def test_wrong_options_are_refused_before_anything_is_written(small, capsys):
    (small / "elsewhere").mkdir()
    (small / "elsewhere" / "thesis.docx").write_text("x")
    for words, says in [(command(small, "--contrasts", "AXT2"), "AXT2"), (command(small, "--categories", "Tumour"), "Tumour"),
                        (command(small, "--normals", "all"), "normals is 'all'"),
                        (["own-folder", "--images", small / "volumes", "--out", small / "elsewhere"], "no file ending in"),
                        (["bmad", "--images", small / "volumes", "--out", small / "x", "--kind", "brain"], "no file ending in")]:
        refused(words, says, capsys)
    assert not (small / "out").exists() and len(list((small / "elsewhere").iterdir())) == 1
    for words, says in [(["fastmri-plus"], "--images"), (command(small)[:-1] + ["five"], "invalid int value: 'five'")]:
        with pytest.raises(SystemExit) as ended: main([str(word) for word in words])
        assert ended.value.code == 2 and says in capsys.readouterr().err


def test_target_that_is_not_ours_is_left_alone(tmp_path, capsys):
    images, taken, linked = tmp_path / "mine", tmp_path / "taken", tmp_path / "linked"
    for name in ("spot/a", "spot/b", "normal/c"):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(len(name) + ord(name[-1])).integers(0, 255, (20, 20), np.uint8)).save(images / f"{name}.png")
    for folder in (taken, linked, tmp_path / "outside"): folder.mkdir()
    (taken / "labels.csv").write_text("precious")
    (linked / "images").symlink_to(tmp_path / "outside")
    before = tree(tmp_path)
    for out, says in [(taken, "not empty"), (linked, "link"), (images / "out", "inside images"), (images / "spot" / "a.png", "is a file")]:
        refused(["own-folder", "--images", images, "--out", out], says, capsys)
    assert tree(tmp_path) == before


def test_whole_path_from_a_folder_to_table2(tmp_path):
    "Sub-folders, a preset's categories, and one command each: prepare, then Table 2."
    images, generator = tmp_path / "OCT", np.random.default_rng(0)
    for kind in ("CNV", "DME", "DRUSEN", "NORMAL"):
        for patient in range(6):
            (images / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 255, (48, 64), np.uint8)).save(images / kind / f"{kind}-{patient}-1.jpeg")
    assert prepare("oct2017", "--images", images, "--out", tmp_path / "oct").returncode == 0
    done = run(BIN / "papermill", "nbs/run_table2.ipynb", "-p", "smoke", "True", "-p", "data", tmp_path / "oct", "-p", "results",
               tmp_path / "results", env={**os.environ, "SDMAD_CACHE": str(tmp_path / "cache")})
    assert done.returncode == 0, done.stderr
    assert "oct" in (tmp_path / "results" / "table2-smoke" / "table.md").read_text(encoding="utf-8")


def spoil(data, generator):
    "Cut, flip, zero or repeat a piece of a file."
    data, start = bytearray(data), int(generator.integers(len(data)))
    end = min(len(data), start + int(generator.integers(1, 40)))
    how = generator.integers(5)
    if how == 0: del data[start:]
    elif how == 1: data[start] ^= 1 << generator.integers(8)
    elif how == 2: data[start:end] = bytes(end - start)
    elif how == 3: del data[start:end]
    else: data[start:start] = data[start:end]
    return bytes(data)


@pytest.mark.filterwarnings("ignore")  # pydicom warns of what it reads nevertheless
@pytest.mark.parametrize("kind", ["scan.dcm", "volume.nii", "volume.nii.gz"])
def test_mutated_scans_end_in_a_picture_or_a_sentence(kind, tmp_path):
    generator, file, tried = np.random.default_rng(0), tmp_path / kind, Counter()
    write_scan(file, generator) if kind == "scan.dcm" else nibabel.save(nibabel.Nifti1Image(generator.random((9, 8, 7)), np.eye(4)), file)
    whole = file.read_bytes()
    for _ in range(150):
        file.write_bytes(spoil(whole, generator))
        try:
            shown = [dicom_frame(file, n) for n in range(min(dicom_info(file)[0], 3))] if kind == "scan.dcm" else [s for _, s in nifti_slices(file)]
            assert all(picture.dtype == np.uint8 and picture.ndim in (2, 3) for picture in shown)
            tried["read"] += 1
        except DataError as error:
            assert str(file) in str(error) and ":" in str(error)
            tried["refused"] += 1
    print(kind, dict(tried))
    assert tried["refused"] > 5 and sum(tried.values()) == 150


def write_scan(file, generator):
    scan, meta = pydicom.Dataset(), FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID, meta.TransferSyntaxUID = "1.2.840.10008.5.1.4.1.1.2", generate_uid(), ExplicitVRLittleEndian
    scan.file_meta, scan.PatientID, scan.Rows, scan.Columns, scan.SamplesPerPixel = meta, "4711", 16, 16, 1
    scan.BitsAllocated, scan.BitsStored, scan.HighBit, scan.PixelRepresentation, scan.PhotometricInterpretation = 16, 16, 15, 0, "MONOCHROME2"
    scan.WindowCenter, scan.WindowWidth, scan.RescaleSlope, scan.RescaleIntercept = 40, 400, 1, -1024
    scan.PixelData = generator.integers(0, 2000, (16, 16)).astype(np.uint16).tobytes()
    scan.save_as(file, enforce_file_format=True)
