"Scans in, scans out: one rule from a file to grey values, whichever command reads it, and nothing dropped in silence."
import io
import shutil
import unicodedata
from contextlib import redirect_stderr, redirect_stdout
from copy import copy
from dataclasses import replace
from types import SimpleNamespace

import nibabel
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from test_prepare import command, write_scan

from sdmad_nb import SDMAD, Config
from sdmad_nb.app.command_line import shell
from sdmad_nb.app.pictures import to_picture
from sdmad_nb.data.folder import read_dataset
from sdmad_nb.data.images import DataError, ImageReader, Pixels, load_rgb
from sdmad_nb.data.open_data import open_data
from sdmad_nb.data.support import FilesAhead
from sdmad_nb.data.writer import read_preparation

Y, X = np.mgrid[:96, :96]
BODY, LESION = np.hypot(X - 48, Y - 48) < 36, np.hypot(X - 60, Y - 40) < 7
SCENE = np.where(LESION, 1600.0, np.where(BODY, np.random.default_rng(0).normal(900, 30, (96, 96)), 0.0))
HOLED = np.where(np.hypot(X - 50, Y - 50) < 1, np.nan, SCENE - 1000).astype(np.float32)
HOT = np.where((X == 3) & (Y == 3), 65535, SCENE)
DEEP = {"grey.png": SCENE.astype(np.uint16), "offset.png": (SCENE + 200).astype(np.uint16),
        "hot.png": HOT.astype(np.uint16), "float.tif": (SCENE - 1000).astype(np.float32),
        "int.tif": (SCENE - 1000).astype(np.int32), "holed.tif": HOLED}


def sdmad(*words):  # exit code, standard output and standard error, as of a process
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as errors:
        code = shell([str(word) for word in words])
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=errors.getvalue())


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    dataset, _ = open_data("demo", 5, small=True)
    file = tmp_path_factory.mktemp("scans") / "mine.safetensors"
    SDMAD.fit(dataset.folder, shots=1, config=Config(backbone="demo", epochs=2)).save(file)
    return dataset, file


def save_deep(folder):
    folder.mkdir(parents=True)
    for name, values in DEEP.items(): Image.fromarray(values).save(folder / name)


@pytest.mark.parametrize("scale", ["auto", "window:-1000,700", "percentile:0,100"])
def test_a_deep_picture_has_the_same_pixels_prepared_and_predicted(tmp_path, scale):
    save_deep(tmp_path / "mine/lesion")
    Image.fromarray((SCENE / 8).astype(np.uint8)).save(tmp_path / "mine/lesion/eight bits.png")
    write_scan(tmp_path / "mine/normal/scan.dcm")
    assert command("own-folder", tmp_path / "mine", tmp_path / "out", "--scale", scale, "--salt", "s") == 0
    dataset = read_dataset(tmp_path / "out")
    assert dataset.pixels == Pixels(scale)
    prepared = {np.asarray(load_rgb(path)).tobytes() for path in dataset.paths}  # of equal ones the first is kept
    reader, files = ImageReader(dataset.pixels), (tmp_path / "mine").rglob("*.*")
    assert prepared == {to_picture(file, reader=reader).tobytes() for file in files}


@pytest.mark.parametrize("name", DEEP)
def test_air_is_darker_than_the_body_and_the_lesion_is_brightest(tmp_path, name):
    save_deep(tmp_path / "deep")
    shown = np.asarray(load_rgb(tmp_path / "deep" / name))[..., 0].astype(int)
    air, body, lesion = (np.median(shown[place]) for place in (~BODY, BODY & ~LESION, LESION))
    assert air + 100 < body < lesion - 50 and (shown[48:53, 30:40] > 0).all()  # a hole touches only itself


def test_a_volume_is_predicted_slice_by_slice_and_its_maps_come_back_in_its_geometry(fitted, tmp_path):
    dataset, model = fitted
    cut = lambda path: load_rgb(path).convert("L").resize((24, 56)).crop((4, 8, 20, 48))  # (40, 16), inside the head
    values = np.stack([np.asarray(cut(path), np.float32) for path in dataset.paths[:4]], axis=1)
    nibabel.save(nibabel.Nifti1Image(values, np.array([[0, 3, 0, 5], [-1, 0, 0, 7], [0, 0, 1, 2], [0, 0, 0, 1.0]])),
                 tmp_path / "head.nii.gz")  # sagittal slices, three millimetres apart
    write_scan(tmp_path / "scan.dcm"), (tmp_path / "notes.txt").write_text("no image")
    maps, out = tmp_path.with_name("maps"), tmp_path.with_name("out.csv")
    done = sdmad("predict", model, tmp_path, "--heatmaps", maps, "-o", out)
    assert done.returncode == 0 and "left out: " in done.stderr and "notes.txt is no image" in done.stderr, done.stderr
    table = pd.read_csv(out)
    assert table.image.value_counts().to_dict() == {"head.nii.gz": 16, "scan.dcm": 1}
    assert table.slice[:16].tolist() == list(range(16))
    scan, made = nibabel.load(tmp_path / "head.nii.gz"), nibabel.load(maps / "head-Craniotomy.nii.gz")
    assert made.shape == scan.shape and np.array_equal(made.affine, scan.affine) and np.isfinite(made.get_fdata()).all()
    assert (maps / "0007-head_007.png").is_file()


def many_files(folder):  # pictures and scans, of which one is cut off
    for seed in range(72):
        path = folder / f"{seed:02}.{('png', 'jpg', 'dcm')[seed % 3]}"
        if seed % 3 == 2: write_scan(path, seed)
        else: Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 24), np.uint8)).save(path)
    (folder / "40.jpg").write_bytes((folder / "40.jpg").read_bytes()[:200])
    return folder


def many_slices(folder):  # of which five are empty
    values = np.random.default_rng(0).random((20, 24, 72), np.float32)
    values[..., 40:45] = 0
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), folder / "volume.nii.gz")
    return folder


def many_arrays(folder): return [*np.random.default_rng(0).integers(0, 255, (72, 20, 24), np.uint8)]


@pytest.mark.parametrize("make, here", [(many_files, 0), (many_slices, 0), (many_arrays, 72)])
def test_images_that_other_processes_read_are_the_same(fitted, tmp_path, monkeypatch, make, here):
    "In the same order, and with the same sentences; what is in memory already is prepared where it is."
    def as_table(model, batch, *_):
        return pd.DataFrame([(one.name, one.number, pixels.numpy().tobytes()) for _, one, _, pixels in batch])

    def predict(workers):  # -> table, number of images that this process has read
        monkeypatch.setattr(FilesAhead, "workers", workers), read.clear()
        return model.predict(images, 10, skip_bad=True), len(read)

    model, images, read = SDMAD.load(fitted[1]), make(tmp_path), []
    monkeypatch.setattr("sdmad_nb.app.sdmad._predict_batch", as_table)
    monkeypatch.setattr("sdmad_nb.app.sdmad.to_picture", lambda *given: read.append(given) or to_picture(*given))
    (alone, counted), (ahead, counted_ahead) = predict(0), predict(2)
    assert ahead.equals(alone) and ahead.attrs == alone.attrs and (counted, counted_ahead) == (72, here)
    assert len(alone) + sum(map(len, alone.attrs.values())) == 72
    if make is not many_files: return
    assert "40.jpg" in ahead.attrs["skipped"][0]
    with pytest.raises(DataError, match="40.jpg"): model.predict(images)


def test_one_odd_file_does_not_stop_a_folder(tmp_path, capsys):
    for seed, finding in enumerate(("normal", "spot", "spot")):
        write_scan(tmp_path / f"mine/{finding}/sound{seed}.dcm", seed, f"p{seed}")
    volume = nibabel.Nifti1Image(np.random.default_rng(0).random((9, 8, 3), np.float32), np.eye(4))
    data = bytearray(volume.to_bytes())
    data[280:296] = bytes(16)  # the first row of the affine
    (tmp_path / "mine/spot/flat.nii").write_bytes(data)
    assert command("own-folder", tmp_path / "mine", tmp_path / "out") == 1
    assert "flat.nii has an affine whose axes span no space" in capsys.readouterr().err
    assert command("own-folder", tmp_path / "mine", tmp_path / "out", "--skip-broken") == 0
    assert len(read_dataset(tmp_path / "out")) == 3
    assert read_preparation(tmp_path / "out")["left_out"]["files that cannot be opened"]


def test_contradictory_pictures_name_their_sources_and_can_be_left_out(tmp_path, capsys):
    for seed, name in enumerate(("spot/a.dcm", "spot/b.dcm", "normal/c.dcm")):
        write_scan(tmp_path / "mine" / name, seed)
    shutil.copy(tmp_path / "mine/spot/a.dcm", tmp_path / "mine/normal/twin.dcm")
    assert command("own-folder", tmp_path / "mine", tmp_path / "out") == 1
    assert "spot/a.dcm" in (said := capsys.readouterr().err) and "normal/twin.dcm" in said
    assert command("own-folder", tmp_path / "mine", tmp_path / "out", "--skip-broken") == 0
    assert len(read_dataset(tmp_path / "out")) == 2


def test_a_corrected_source_is_read_again(tmp_path, capsys):
    for seed, name in enumerate(("spot/a.png", "spot/b.png", "normal/c.png", "normal/twin.png")):
        (tmp_path / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(0 if "twin" in name else seed).integers(0, 255, (20, 20), np.uint8)
        Image.fromarray(noise).save(tmp_path / "mine" / name)
    words = ["own-folder", tmp_path / "mine", tmp_path / "out"]
    assert command(*words) == 1 and "contradictory" in capsys.readouterr().err
    noise = Image.fromarray(np.random.default_rng(9).integers(0, 255, (20, 20), np.uint8))
    noise.save(tmp_path / "mine/normal/twin.png")
    assert command(*words) == 0 and len(read_dataset(tmp_path / "out")) == 4
    noise.rotate(90).save(tmp_path / "mine/spot/a.png")
    assert command(*words) == 0 and "1 sources have changed" in capsys.readouterr().out
    assert (tmp_path / "out/images/spot/a.png").read_bytes() == (tmp_path / "mine/spot/a.png").read_bytes()


def test_names_in_either_unicode_form_are_the_same_file(tmp_path):
    (tmp_path / "mine").mkdir()
    for seed, name in enumerate(("müde", "wach")):
        noise = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 20), np.uint8))
        noise.save(tmp_path / "mine" / f"{unicodedata.normalize('NFD', name)}.png")
    (tmp_path / "t.csv").write_text("image,tired\nmüde.png,1\nwach.png,0\n", encoding="utf-8")
    options = ["--labels", tmp_path / "t.csv", "--category-columns", "tired"]
    assert command("own-folder", tmp_path / "mine", tmp_path / "out", *options) == 0
    table = (tmp_path / "out/labels.csv").read_text(encoding="utf-8")
    (tmp_path / "out/labels.csv").write_text(unicodedata.normalize("NFC", table), encoding="utf-8")
    assert len(read_dataset(tmp_path / "out")) == 2


def test_a_model_knows_the_images_and_the_patients_that_it_has_learned_from(fitted, tmp_path):
    dataset, _ = fitted
    model = SDMAD.fit(dataset.folder, config=Config(backbone="demo", epochs=1), method="linear-probe")
    assert not any(name in str(model.origin) for name in dataset.patients)
    again = tmp_path / "again"
    shutil.copytree(dataset.folder, again)
    for image in dataset.images: load_rgb(again / image).save(again / image, compress_level=1)  # other bytes
    done = sdmad("evaluate", model.save(tmp_path / "all.safetensors"), again)
    assert done.returncode == 1 and "that the model has not learned from" in done.stderr
    for image in dataset.images: load_rgb(again / image).rotate(90).save(again / image)  # other slices, as it were
    done = sdmad("evaluate", tmp_path / "all.safetensors", again)
    assert done.returncode == 0 and "have names of patients that the model has learned from" in done.stderr


def test_a_test_set_that_lacks_a_finding_is_measured_for_the_rest(fitted, tmp_path):
    dataset, model = fitted
    shutil.copytree(dataset.folder, tmp_path / "fewer")
    table = pd.read_csv(tmp_path / "fewer/labels.csv", dtype=str)
    table["Craniotomy"] = "0"
    table.to_csv(tmp_path / "fewer/labels.csv", index=False)
    done = sdmad("evaluate", model, tmp_path / "fewer")
    found = pd.read_csv(io.StringIO(done.stdout)).set_index("metric").value
    assert done.returncode == 0 and "no tested image has 'Craniotomy'" in done.stderr
    assert np.isnan(found["AUROC Craniotomy"]) and found[["macro-AUROC", "mAP", "Hamming"]].notna().all()


def test_what_fit_refuses_predict_refuses(fitted, tmp_path):
    _, model = fitted
    for name, picture in {"blank.png": Image.new("L", (50, 50), 9), "dot.png": Image.new("L", (1, 1))}.items():
        picture.save(tmp_path / name)
        done = sdmad("predict", model, tmp_path / name)
        assert done.returncode == 1 and name in done.stderr and done.stdout == "", done.stderr
    done = sdmad("predict", model, tmp_path / "blank.png", "--batch-size", "-1")
    assert done.returncode == 2 and "--batch-size" in done.stderr


def test_a_model_file_does_not_choose_a_backbone_from_a_hub_or_a_folder(fitted, tmp_path):
    "The folder holds nothing, and is not looked at before the user has named it."
    dataset, model = fitted
    detector = copy(SDMAD.load(model).detector)
    detector.config = replace(detector.config, backbone=f"local-dir:{tmp_path / 'theirs'}", pretrained="")
    SDMAD(detector).save(tmp_path / "theirs.safetensors")
    for words in (["predict", tmp_path / "theirs.safetensors", dataset.path(0)],
                  ["evaluate", tmp_path / "theirs.safetensors", dataset.folder]):
        done = sdmad(*words)
        assert done.returncode == 1 and "theirs.safetensors asks for backbone" in done.stderr
        done = sdmad(*words, "--backbone", f"local-dir:{tmp_path / 'theirs'}")
        assert done.returncode == 1 and "cannot be loaded" in done.stderr, "it is named, and then missed"
        done = sdmad(*words, "--backbone", "demo")
        assert done.returncode == 1 and "name that one, or none" in done.stderr


def test_a_name_that_a_spreadsheet_would_run_is_harmless_in_the_table(fitted, tmp_path):
    dataset, model = fitted
    for name in ("=1+1.png", "+a.png", "@b.png", "plain.png"): shutil.copy(dataset.path(0), tmp_path / name)
    table = pd.read_csv(io.StringIO(sdmad("predict", model, tmp_path).stdout))
    assert sorted(table.image) == ["'+a.png", "'=1+1.png", "'@b.png", "plain.png"] and table.abnormal.dtype == float


def test_where_nothing_can_be_written_or_predicted_no_work_starts(fitted, tmp_path):
    dataset, model = fitted
    for words in (["fit", "nowhere", "-o", tmp_path], ["predict", "nowhere", "x.png", "-o", tmp_path],
                  ["predict", "nowhere", "x.png", "--heatmaps", model], ["evaluate", "nowhere", "demo", "-o", tmp_path]):
        done = sdmad(*words)
        assert done.returncode == 1 and "folder: choose another name" in done.stderr, done.stderr
    nibabel.save(nibabel.Nifti1Image(np.zeros((20, 20, 4), np.float32), np.eye(4)), tmp_path / "empty.nii")
    done = sdmad("predict", model, tmp_path / "empty.nii", "-o", tmp_path / "out.csv")
    assert done.returncode == 1 and "there is no image to predict: slice 0 of" in done.stderr, done.stderr
    assert not (tmp_path / "out.csv").exists()
