"The shell command and the five lines of Python, as somebody uses them who has not read the library."
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from importlib.metadata import version
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import BIN, REAL, ROOT, run
from PIL import Image
from safetensors.torch import load_file, safe_open, save_file

from sdmad_nb import SDMAD, Config
from sdmad_nb.app.command_line import _going_on, _unfinished, shell
from sdmad_nb.core.signs import write_signs
from sdmad_nb.data.open_data import open_data

SDMAD_COMMAND = str(BIN / "sdmad")


def sdmad(*words):  # exit code, standard output and standard error, as of a process
    "Run the command in this process, which has imported torch already."
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as errors:
        code = shell([str(word) for word in words])
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=errors.getvalue())


def read_csv(text): return pd.read_csv(io.StringIO(text))


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    "Fit once, by the command itself, on the small demo."
    folder = tmp_path_factory.mktemp("tool")
    dataset, _ = open_data("demo", 5, small=True)
    done = run(SDMAD_COMMAND, "fit", dataset.folder, "-o", folder / "mine.safetensors", "--shots", "1", "--epochs", "5",
               "--sensitivity", "0.8", "--backbone", "demo")
    assert done.returncode == 0, done.stderr
    assert "learned Craniotomy" in done.stderr and done.stdout == "" and "leave out" not in done.stderr, "no terminal, no bars"
    assert "has only ever seen synthetic heads" in done.stderr
    return dataset, folder / "mine.safetensors"


def test_predict_writes_a_table_to_a_file_or_to_standard_output(fitted, tmp_path):
    dataset, model = fitted
    done = sdmad("predict", model, dataset.folder, "-o", tmp_path / "out.csv", "--batch-size", "7")
    assert done.returncode == 0, done.stderr
    table = pd.read_csv(tmp_path / "out.csv")
    assert table.image.tolist() == list(dataset.images)
    drawn = sdmad("predict", model, *dataset.paths[:5], "--heatmaps", tmp_path / "maps", "--batch-size", "3")
    assert drawn.returncode == 0 and len(list((tmp_path / "maps").glob("*.png"))) == 5, drawn.stderr
    assert table[list(dataset.categories)].isin([True, False]).all(axis=None) and np.isfinite(table.abnormal).all()
    printed = run(SDMAD_COMMAND, "predict", model, *dataset.paths[:3])
    assert printed.returncode == 0 and printed.stdout.splitlines()[0].startswith("image,abnormal")
    few = read_csv(printed.stdout).drop(columns="image")
    pd.testing.assert_frame_equal(few, table[:3].drop(columns="image"), atol=1e-5)


@pytest.mark.parametrize("method, decides", [("linear-probe", True), ("fusion", False)])
def test_other_methods_are_fitted_used_and_tested_by_the_same_commands(fitted, tmp_path, method, decides):
    dataset, _ = fitted
    model = tmp_path / "other.safetensors"
    done = sdmad("fit", dataset.folder, "--shots", "2", "--method", method, "-o", model, "--epochs", "5",
                 "--backbone", "demo")
    assert done.returncode == 0 and done.stdout == "", done.stderr
    done = sdmad("predict", model, *dataset.paths[:3])
    assert done.returncode == 0, done.stderr
    table, maps = read_csv(done.stdout), tmp_path / "maps"
    assert np.isfinite(table.abnormal).all() and ("Craniotomy" in table) == decides and "sign 1" not in table
    done = sdmad("predict", model, *dataset.paths[:3], "-o", tmp_path / "out.csv", "--heatmaps", maps)
    if decides: assert done.returncode == 1 and "Linear probe draws no maps" in done.stderr
    else: assert done.returncode == 0 and len(list(maps.iterdir())) == 3, done.stderr
    assert (tmp_path / "out.csv").exists() == (not decides)
    done = sdmad("evaluate", model, dataset.folder)
    metrics = read_csv(done.stdout).set_index("metric")
    assert done.returncode == 0 and 0 <= metrics.value["abnormal AUROC"] <= 1
    assert ("Hamming" in metrics.index) == decides
    pd.testing.assert_frame_equal(metrics, SDMAD.load(model).evaluate(dataset.folder), atol=1e-4)
    assert ("stands for each finding's" in done.stderr) == ("gives no decisions" in done.stderr) == (not decides)


def test_what_the_backbone_has_seen_goes_with_everything(fitted, tmp_path):
    "In the terminal, in the model, beside the table, on the pictures; and warnings name the command for a large CLIP."
    dataset, file = fitted
    seen, large = "The backbone demo has only ever seen synthetic heads", "--backbone ViT-L-14-quickgelu --pretrained openai"
    with safe_open(file, "pt") as stored: assert seen in json.loads(stored.metadata()["sdmad"])["notes"]["seen"]
    done, model = sdmad("predict", file, dataset.path(0), "-o", tmp_path / "out.csv"), SDMAD.load(file)
    said = json.loads((tmp_path / "out.csv.json").read_text())
    assert seen in done.stderr and seen in said["seen"] and said["model"] == file.name and said["method"] == "sd-mad-unmixed"
    assert seen in model.explain(dataset.path(0)).plot().flat[0].figure.get_supxlabel()
    assert seen in sdmad("evaluate", file, dataset.folder).stderr
    sdmad("predict", file, dataset.path(0), "-o", os.devnull)
    assert not os.path.exists(f"{os.devnull}.json")
    signs = replace(model.detector.signs, signs={name: ["a quixotic rim"] for name in dataset.categories}, candidates={})
    write_signs(signs, tmp_path / "signs.json")
    for name, warned in (("demo", True), ("small", False)):
        done = sdmad("fit", dataset.folder, "--shots", 1, "--method", "nothing", "--signs", tmp_path / "signs.json",
                     "--backbone", name, "-o", tmp_path / "x.safetensors")
        assert done.returncode == 0 and f"The backbone {name} has" in done.stderr, done.stderr
        assert (f"warning: {len(signs.signs)} of" in done.stderr and "such as 'quixotic'" in done.stderr) == warned
        assert (large in done.stderr) == warned
    done = sdmad("evaluate", tmp_path / "x.safetensors", dataset.folder)  # no image is looked at
    assert re.search(f"warning: the interval of .*abnormal AUROC.* does not lie above 50 %.*{large}", done.stderr), done.stderr


def test_the_model_that_is_named_beside_a_table_has_made_it(fitted, tmp_path, monkeypatch):
    "Its file may have been replaced in the meantime."
    def replaced(*given):
        yield from _going_on(*given)
        model.write_bytes(b"another model")

    dataset, model = fitted[0], tmp_path / "mine.safetensors"
    shutil.copy(fitted[1], model)
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    monkeypatch.setattr("sdmad_nb.app.command_line._going_on", replaced)
    done = sdmad("predict", model, dataset.path(0), "-o", tmp_path / "out.csv")
    assert done.returncode == 0 and json.loads((tmp_path / "out.csv.json").read_text())["sha256"] == digest, done.stderr


def test_methods_are_listed(fitted):
    done = sdmad("methods")
    assert done.returncode == 0 and done.stdout.split()[:4] == ["name", "title", "gives", "needs"]
    assert {"sd-mad", "linear-probe", "fusion"} <= {line.split()[0] for line in done.stdout.splitlines()}
    assert "oracle" not in done.stdout


def test_backbones_are_listed(tmp_path):
    "On standard output in two lines each, or as a table with all that is known."
    done = sdmad("backbones", "--modality", "chest")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[0].split() == ["name", "modality", "pixels", "parameters", "access", "licence", "tested"]
    assert lines[1].startswith("CheXzero  ") and "    --backbone ViT-L-14-quickgelu --pretrained openai; the paper's" in done.stdout
    assert "eye" not in {line.split()[1] for line in lines[1::2]} and "terms at the source" in done.stderr
    done = sdmad("backbones", "-o", tmp_path / "list.csv")
    assert done.returncode == 0 and {"seen", "source", "date"} <= set(pd.read_csv(tmp_path / "list.csv"))
    done = sdmad("backbones", "--modality", "chst")
    assert done.returncode == 1 and done.stdout == "" and "for 'chst', but for 'chest': choose one of" in done.stderr


def test_maps_are_measured_where_they_are_asked_for(fitted):
    dataset, model = fitted
    done = sdmad("evaluate", model, dataset.folder, "--maps")
    assert done.returncode == 0, done.stderr
    assert {"pixel AUROC", "box IoU", "Hamming"} <= set(read_csv(done.stdout).metric)


def test_calibrated_decisions_come_with_probabilities(fitted, tmp_path):
    dataset, model = fitted
    done = sdmad("predict", model, dataset.folder, "-o", tmp_path / "out.csv", "--calibrated")
    assert done.returncode == 0, done.stderr
    table, calibration = pd.read_csv(tmp_path / "out.csv"), SDMAD.load(model).calibration
    assert calibration.sensitivity == 0.8 and calibration.positives > 0
    edge = calibration.probabilities(calibration.threshold)
    for name in dataset.categories:  # one threshold on the margin is one threshold on the probability
        far = (table[f"{name} probability"] - edge).abs() > 1e-4
        assert (table[name] == (table[f"{name} probability"] >= edge))[far].all()
    SDMAD(SDMAD.load(model).detector).save(tmp_path / "plain.safetensors")
    done = sdmad("predict", tmp_path / "plain.safetensors", dataset.path(0), "--calibrated")
    assert done.returncode == 1 and "without calibration" in done.stderr and done.stdout == ""


def test_images_of_every_size_and_mode_are_predicted_together(fitted, tmp_path):
    "And each as it would be alone: what is beside it in a batch does not matter."
    dataset, model = fitted
    model, image = SDMAD.load(model), Image.open(dataset.path(0))
    image.convert("L").save(tmp_path / "grey.png"), image.convert("RGBA").save(tmp_path / "alpha.png")
    image.convert("P").save(tmp_path / "palette.png"), image.resize((90, 50)).save(tmp_path / "small.jpg")
    Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 256).save(tmp_path / "deep.png")
    together = model.predict(tmp_path)
    assert len(together) == 5
    for name, row in together.set_index("image").iterrows():
        assert np.isclose(model.predict(tmp_path / name).abnormal[0], row.abnormal, atol=1e-5), name
    same = together.set_index("image").abnormal
    assert np.allclose(same[["alpha.png", "palette.png", "deep.png"]], same["grey.png"], atol=0.02)


def test_other_findings_and_a_finding_without_signs_are_refused(fitted, tmp_path):
    dataset, model = fitted
    shutil.copytree(dataset.folder, tmp_path / "other")
    labels = (tmp_path / "other" / "labels.csv")
    labels.write_text(labels.read_text().replace("Craniotomy", "Crack", 1))
    done = sdmad("evaluate", model, tmp_path / "other")
    assert done.returncode == 1 and "Crack" in done.stderr and "Traceback" not in done.stderr, done.stderr
    done = sdmad("fit", tmp_path / "other", "-o", tmp_path / "x.safetensors", "--shots", "1")
    assert done.returncode == 1 and "Crack" in done.stderr and "sign" in done.stderr, done.stderr
    assert not (tmp_path / "x.safetensors").exists()


def test_evaluate_says_what_the_object_says(fitted):
    dataset, model = fitted
    done = sdmad("evaluate", model, dataset.folder)
    assert done.returncode == 0, done.stderr
    shell, python = read_csv(done.stdout).set_index("metric"), SDMAD.load(model).evaluate(dataset.folder)
    pd.testing.assert_frame_equal(shell, python, atol=1e-4)


@pytest.mark.parametrize("words, code, says", [
    (["predict", "MODEL", "nowhere.png"], 1, "nowhere.png cannot be read"),
    (["predict", "none.safetensors", "IMAGE"], 1, "none.safetensors does not exist"),
    (["predict", "IMAGE", "IMAGE"], 1, "is not a detector of this project"),
    (["evaluate", "MODEL", "EMPTY"], 1, "EMPTY"),
    (["predict", "MODEL", "EMPTY"], 1, "has no file ending in"),
    (["fit", "EMPTY", "-o", "x.safetensors"], 1, "is not a data-set folder"),
    (["fit", "demo", "-o", "no/folder/x.safetensors"], 1, "its folder does not exist"),
    (["fit", "demo", "-o", "x.safetensors", "--method", "linear-prob"], 1, "did you mean 'linear-probe'?"),
    (["fit", "demo"], 2, "-o"), (["explode"], 2, "No such command"),
])
def test_what_is_wrong_is_said_in_a_sentence(fitted, tmp_path, words, code, says):
    dataset, model = fitted
    (tmp_path / "EMPTY").mkdir()
    known = {"MODEL": model, "IMAGE": dataset.path(0), "EMPTY": tmp_path / "EMPTY"}
    done = sdmad(*(known.get(word, word) for word in words))
    assert done.returncode == code and says in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert done.stdout == ""


def test_bad_images_are_skipped_only_when_asked_and_nothing_is_half_written(fitted, tmp_path):
    dataset, model = fitted
    (tmp_path / "torn.png").write_bytes(dataset.path(0).read_bytes()[:500])
    Image.linear_gradient("L").convert("RGBA").resize((50, 90)).save(tmp_path / "other.png")
    images, out = [dataset.path(0), tmp_path / "torn.png", tmp_path / "other.png"], tmp_path / "out.csv"
    done = sdmad("predict", model, *images, "-o", out)
    assert done.returncode == 1 and "torn.png" in done.stderr and not out.exists()
    done = sdmad("predict", model, *images, "-o", out, "--skip-bad")
    assert done.returncode == 3 and "skipped: image" in done.stderr and len(pd.read_csv(out)) == 2


def test_interrupted_it_leaves_no_file_and_goes_on_from_there(fitted, tmp_path, monkeypatch):
    "Ctrl-C, then SIGKILL and a line that was cut; in the end the table of an undisturbed call, and each image once."
    dataset, model = fitted
    monkeypatch.setenv("SDMAD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "torn.png").write_bytes(dataset.path(0).read_bytes()[:500])
    many = [tmp_path / "torn.png", *(str(dataset.path(i % len(dataset))) for i in range(160))]
    out, command = tmp_path / "there" / "out.csv", ["predict", model, *many, "--batch-size", "4", "--skip-bad"]
    for code, said in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        process = subprocess.Popen([SDMAD_COMMAND, *command, "-o", out], cwd=ROOT, stderr=subprocess.PIPE, text=True,
                                   preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a background job ignores Ctrl-C
        lines = lambda: sum(file.read_bytes().count(b"\n") for file in tmp_path.glob("cache/predict/*"))
        before = lines()
        while lines() < before + 2 and process.poll() is None: time.sleep(0.02)
        process.send_signal(code)
        assert process.wait(timeout=60) == said and not out.exists()
        assert said != 130 or ("goes on from there" in process.stderr.read() and not [*out.parent.iterdir()])
    [file] = tmp_path.glob("cache/predict/*")
    done = file.read_bytes().count(b"\n")
    file.write_text("\n".join(["", *file.read_text().split("\n")[:0:-1], '{"0": {"text": "half a li', ""]))  # in any order
    again, whole = sdmad(*command, "-o", out), sdmad(*command)
    assert again.returncode == whole.returncode == 3 and f"going on after the first {4 * done} images" in again.stderr
    assert out.read_text() == whole.stdout and len(pd.read_csv(out)) == 160 and again.stderr.count("torn.png") == 1
    assert "going on" not in whole.stderr and not [*tmp_path.glob("cache/predict/*")], "what was finished is forgotten"


def test_two_predictions_at_once_share_what_is_done(tmp_path):
    "Whoever goes on after both takes each batch once, whoever has written it."
    def tables(shown, size, calibrated, skipped, left_out, start, show):
        for first in range(start * size, len(shown), size): yield pd.DataFrame({"image": [*shown[first:first + size]]})

    def going(): return _going_on(SimpleNamespace(stream=tables), tmp_path / "it", "abcdefg", 2, False, None, [], None)

    whole, first, second = [*going()], going(), going()  # seven images in four batches
    assert [next(first), next(first)] == whole[:2] and [next(second) for _ in range(3)] == whole[:3]
    assert next(first) == whole[2] and [*going()] == whole
    assert [*first] == [*second] == whole[3:], "the file is gone"


def test_other_versions_and_devices_begin_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("SDMAD_CACHE", str(tmp_path))
    names = {_unfinished([], SimpleNamespace(device=device, dtype="fp32"), []) for device in ("cpu", "cuda")}
    monkeypatch.setattr("sdmad_nb.app.command_line.version", {"sdmad_nb": version("sdmad_nb"), "torch": "another"}.get)
    assert len({*names, _unfinished([], SimpleNamespace(device="cpu", dtype="fp32"), [])}) == 3


def test_a_sign_file_is_begun_filled_in_and_checked(fitted, tmp_path):
    "From the header of labels.csv alone; nothing in the file is about other images."
    (tmp_path / "labels.csv").write_text('\ufeffimage,patient,"Mass, left",effusion,mask\r\n', encoding="utf-8")
    begun = sdmad("signs", "new", tmp_path, "--object", "chest X-ray")
    assert begun.returncode == 0 and "- Mass, left\n- effusion\n" in begun.stdout and "chest X-ray" in begun.stdout
    file = tmp_path / "signs.json"
    values = json.loads(file.read_text(encoding="utf-8"))
    assert values["signs"] == {"Mass, left": [], "effusion": []} and len(values["templates"]) == 15
    assert not {"brain", "retina", "fundus", "MR"} & set(file.read_text(encoding="utf-8").split())
    again = sdmad("signs", "new", tmp_path, "--object", "brain")
    assert again.returncode == 1 and "is there already" in again.stderr and json.loads(file.read_text()) == values
    for words in (["signs", "check", tmp_path], ["fit", tmp_path, "-o", tmp_path / "x.safetensors"]):
        done = sdmad(*words)
        assert done.returncode == 1 and "'effusion' is []: write at least one" in done.stderr and done.stdout == ""
    answer = json.loads("{" + begun.stdout.partition("\n{")[2])  # the form that a language model is asked for
    candidates = {name: [f"a dark {name} shape", "a bright rim", "a grey veil"] for name in answer}
    signs = {name: texts[:2] for name, texts in candidates.items()}
    file.write_text(json.dumps({**values, "candidates": candidates, "signs": signs}))
    done = sdmad("signs", "check", tmp_path, "-o", tmp_path / "signs.png", "--backbone", "demo")
    assert done.returncode == 0 and Image.open(tmp_path / "signs.png").size > (500, 300), done.stderr
    assert "never seen: Mass, left" in done.stdout and "an abnormal photo of the [chest] [X-ray] with" in done.stdout
    assert done.stdout.count("  1.00 to ") == 2 and "2 would be dropped" in done.stdout  # the rim, of both
    file.write_text(json.dumps({**values, "signs": {**signs, "effusion": ["word " * 80, "veil " * 90]}}))
    done = sdmad("signs", "check", tmp_path)
    assert done.returncode == 1 and done.stderr.count("tokens in its prompts: shorten it") == 2 and done.stdout == ""


COMMANDS = [[], ["fit"], ["predict"], ["evaluate"], ["demo"], ["methods"], ["backbones"], ["signs"], ["signs", "new"],
            ["signs", "check"], ["prepare"], *(["prepare", name] for name in (
                "fastmri-plus", "bmad", "chestxray14", "oct2017", "own-folder"))]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_is_whole(words):
    "Every option and command has its sentence, nothing is cut off, and no other way to start a command is named."
    done = sdmad(*words, "--help")
    said = done.stdout.partition("\n\n")[2]  # behind the usage
    assert done.returncode == 0 and "...\n" not in said and "python -m" not in said, said
    for section in ("Options:", "Commands:", "Arguments:"):
        lines = said.partition(section)[2].partition("\n\n")[0].splitlines()[1:]
        entries = [line for line in lines if not line.startswith("   ")]
        assert all(re.match(r"  \S+(?: \S+)*  +\S", line) for line in entries), f"without a sentence: {entries}"


@pytest.mark.parametrize("words", [["--help"], ["fit", "--help"], ["prepare", "--help"], ["signs", "new", "--help"]])
def test_help_does_not_wait_for_torch(words):
    "Asked of the modules that were imported, not of a clock."
    code = f"code = shell({words}); sys.exit(code or 'torch' in sys.modules)"
    done = run(sys.executable, "-c", f"import sys; from sdmad_nb.app.command_line import shell; {code}")
    assert done.returncode == 0 and "sdmad" in done.stdout, done.stderr


def test_another_backbone_and_an_altered_file_are_refused(fitted, tmp_path):
    _, model = fitted
    with safe_open(model, "pt") as stored: header = json.loads(stored.metadata()["sdmad"])
    state, altered = load_file(model), tmp_path / "altered.safetensors"
    save_file(state, altered, {"sdmad": json.dumps({**header, "fingerprint": "0" * 16})})
    with pytest.raises(ValueError, match="altered.safetensors .*was changed after it was saved"): SDMAD.load(altered)
    rest = {name: value for name, value in state.items() if "down" not in name}
    save_file(rest, altered, {"sdmad": json.dumps(header)})
    with pytest.raises(ValueError, match="altered.safetensors .*was changed after it was saved"): SDMAD.load(altered)
    (tmp_path / "pickle.safetensors").write_bytes(b"\x80\x04\x95" + os.urandom(200))
    with pytest.raises(ValueError, match="is not a detector"): SDMAD.load(tmp_path / "pickle.safetensors")


def test_memory_stays_flat_over_many_images(fitted):
    "Twenty times the images: the peak of what Python allocates for them does not grow with their number."
    dataset, file = fitted
    model, peaks = SDMAD.load(file), []
    for count in (8, 160):
        tracemalloc.start()
        rows = sum(len(table) for table in model.stream([dataset.path(i % 8) for i in range(count)], batch_size=8))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert rows == count
    assert peaks[1] < 1.5 * peaks[0] + 2**20


@pytest.mark.skipif(not (REAL / "idrid_codras").is_dir(), reason="the real fundus images are not here")
def test_five_lines_on_real_fundus_images(tmp_path):
    model = SDMAD.fit(REAL / "idrid_codras", shots=1, config=Config(epochs=2))
    images = open_data(str(REAL / "idrid_codras"))[0].paths[:3]
    assert len(model.predict(images)) == 3
    assert model.explain(images[0]).save(tmp_path / "why.png").stat().st_size > 1000
    assert SDMAD.load(model.save(tmp_path / "fundus.safetensors")).categories == model.categories
