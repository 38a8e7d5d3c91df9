"Every table and figure by one command, records that survive a kill, and what Table 1 refuses and measures on real masks."
import json
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest
from conftest import BIN, REAL, ROOT, run

from sdmad_nb.lab.anomaly import run_anomaly_method
from sdmad_nb.core.config import Config
from sdmad_nb.lab.experiments import prepare_questions, prepare_study, run_methods
from sdmad_nb.lab.questions import answer, ask, printed_table

EXPERIMENTS = ("table1", "table2", "table3", "fig3", "fig4")


def make_tables(results):
    "Call make the way a user does, with the environment that runs this test."
    venv = BIN.parent
    return run("make", "-o", f"{venv}/.installed", "tables", f"VENV={venv}", "SLICES=5", "SMOKE=True", f"RESULTS={results}")


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_tables_leaves_everything_and_reads_it_again(tmp_path):
    done = make_tables(tmp_path)
    assert done.returncode == 0, done.stderr
    for name in EXPERIMENTS:
        kinds = {path.suffix for path in (tmp_path / f"{name}-smoke").iterdir()}
        assert {".png", ".svg"} <= kinds and (name == "fig4" or {".csv", ".md"} <= kinds), name
        assert list((tmp_path / name).glob(f"run_{name}*.ipynb")), f"{name} has no executed notebook"
    records = {path: path.read_bytes() for path in (tmp_path / "runs").glob("*.json")}
    methods = {json.loads(text)["method"] for text in records.values()}
    assert {"clip", "coop", "sd-mad", "sd-mad-no-ss", "brightness", "clip-map", "memory-bank", "mvfa", "sd-mad-mvfa"} <= methods
    tables = {name: (tmp_path / f"{name}-smoke" / "table.md").read_text(encoding="utf-8") for name in EXPERIMENTS[:4]}
    assert all("demo data" in text.splitlines()[0].lower() for text in tables.values())
    assert make_tables(tmp_path).returncode == 0
    assert {path: path.read_bytes() for path in (tmp_path / "runs").glob("*.json")} == records, "a second run computed something again"
    assert tables == {name: (tmp_path / f"{name}-smoke" / "table.md").read_text(encoding="utf-8") for name in tables}


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_fusion_runs_every_notebook_of_its_paper():
    done = run("make", "-n", "-o", f"{BIN.parent}/.installed", "fusion", f"VENV={BIN.parent}", "SMOKE=True", "RESULTS=there")
    named = [re.search(r"run_fusion_(\w+)", done.stdout)[1], *re.search(r"printf '%s\\n' (.*) \|", done.stdout)[1].split()]
    assert sorted(named) == sorted(path.stem.removeprefix("run_fusion_") for path in (ROOT / "nbs").glob("run_fusion_[tf][ai][bg]*.ipynb")) and len(named) == 6
    assert "-p smoke True -p results there" in done.stdout


def test_the_pictures_read_the_records_of_the_tables(tmp_path):
    "Their files are looked at in test_experiments.py."
    smoke = lambda name: run(BIN / "papermill", f"nbs/run_fusion_{name}.ipynb", tmp_path / f"{name}.ipynb", "-p", "smoke", "True", "-p", "results", tmp_path)
    done = smoke("table1")
    assert done.returncode == 0, done.stderr
    records = {path: path.read_bytes() for path in (tmp_path / "runs").glob("*.json")}
    assert {record["method"]: record["config"]["batch_size"] for record in map(json.loads, records.values())} == {
        "clip-map": 22, "winclip": 22, "winclip-plus": 22, "april-gan": 22, "mvfa": 8, "fusion": 22}, "MVFA is trained as in run_table1"
    assert smoke("fig6").returncode == 0
    assert {path: path.read_bytes() for path in (tmp_path / "runs").glob("*.json")} == records, "a row was computed twice"


WORK = """
import sys
from sdmad_nb.core.config import Config
from sdmad_nb.lab.experiments import prepare_study, run_methods
study = prepare_study(Config(epochs=3), "demo", 5, small=True)
print("ready", flush=True)
run_methods(study, [0, 1, 2], sys.argv[1], ["clip", "coop", "sd-mad-no-ss", "sd-mad"])
"""


def test_killed_again_and_again_the_records_are_the_same(tmp_path):
    "SIGKILL at different moments: no half record, and in the end the numbers of an undisturbed run."
    prepare_study(Config(epochs=3), "demo", 5, small=True)  # the demo's images and tokens are there
    done = subprocess.run([sys.executable, "-c", WORK, tmp_path / "calm"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for wait in (0.05, 0.6, 1.5):
        process = subprocess.Popen([sys.executable, "-c", WORK, tmp_path / "killed"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert process.stdout.readline() == "ready\n"
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        for path in (tmp_path / "killed").glob("*.json"): json.loads(path.read_text(encoding="utf-8"))
    early = {path.name: path.read_bytes() for path in (tmp_path / "killed").glob("*.json")}
    assert subprocess.run([sys.executable, "-c", WORK, tmp_path / "killed"], cwd=ROOT, capture_output=True).returncode == 0
    calm, killed = ({path.name: json.loads(path.read_text(encoding="utf-8")) for path in (tmp_path / name).glob("*.json")} for name in ("calm", "killed"))
    assert calm.keys() == killed.keys() and len(calm) == 12
    for name in calm: assert calm[name]["metrics"] == killed[name]["metrics"] and calm[name]["split"] == killed[name]["split"], name
    assert all((tmp_path / "killed" / name).read_bytes() == text for name, text in early.items()), "a finished record was written again"


@pytest.mark.parametrize("parameters, words", [
    (dict(lam=1.5), "'lam' is 1.5"),
    (dict(shots=999), "too few images to draw 999 per category"),
    (dict(prompts="poems"), "'prompts' is 'poems'"),
    (dict(paper="Brain"), "paper is 'Brain': use one of BrainMRI"),
    (dict(faults="[peeking]"), "'mvfa_faults' > entry 1 is 'peeking'"),
])
def test_table1_refuses_a_wrong_value_before_it_computes(tmp_path, parameters, words):
    chosen = [word for name, value in {"results": tmp_path, "smoke": True, **parameters}.items() for word in ("-y", f"{name}: {value}")]
    done = run(BIN / "papermill", "nbs/run_table1.ipynb", *chosen)
    assert done.returncode != 0 and words in re.sub(r"\x1b\[\d*m", "", done.stderr), done.stderr[-2000:]
    assert not list(tmp_path.glob("runs/*.json"))


def test_figure4_refuses_wrong_shots_before_it_computes(tmp_path):
    done = run(BIN / "papermill", "nbs/run_fusion_fig4.ipynb", "-y", "shot_counts: [2, 2]", "-p", "results", tmp_path)
    assert done.returncode != 0 and "shot_counts is [2, 2] but must be a list of different whole numbers" in re.sub(r"\x1b\[\d*m", "", done.stderr), done.stderr[-2000:]
    assert not list(tmp_path.glob("runs/*.json"))


def test_fusion_questions_refuse_shots_layers_and_the_paper_beside_other_data(tmp_path):
    base = dict(experiment="fusion_fig4", seeds=[0], results=str(tmp_path), smoke=True)
    with pytest.raises(ValueError, match="too few images to draw 99"): ask(config=Config(shots=99), **base)
    with pytest.raises(ValueError, match="between 1 and 8"): ask(config=Config(shots=2, layers=(4, 9)), **base)
    with pytest.raises(ValueError, match="between 1 and 8"): ask(config=Config(shots=2), levels=[3, 99], **base)
    with pytest.raises(ValueError, match="paper is 'BrainMRI' but the data has 'synthetic findings'"): ask(config=Config(shots=2), paper="BrainMRI", **base)
    without_masks(tmp_path / "plain")
    with pytest.raises(ValueError, match="paper is 'LiverCT' but the data has 'any finding' and not 'Liver tumour'"):
        ask(config=Config(shots=2), data=str(tmp_path / "plain"), pixels=False, paper="LiverCT", **base)
    with pytest.raises(ValueError, match="plain has no mask"): ask(config=Config(shots=2), data=str(tmp_path / "plain"), **base)
    assert not list(tmp_path.glob("runs/*"))


def test_papers_numbers_stand_beside_the_bmad_set_of_that_name(tmp_path):
    "The small demo, written as BMAD's brain set is prepared: one finding of that name."
    table = without_masks(tmp_path / "brain")
    names = [name for name in table if name not in ("image", "patient", "split")]
    one = table[["image", "patient"]].assign(**{"Brain tumour": table[names].max(axis=1)})
    one.to_csv(tmp_path / "brain" / "labels.csv", index=False)
    question = ask("t", Config(shots=1, epochs=1, batch_size=22), [0], str(tmp_path / "brain"), signs="bmad_brain", results=str(tmp_path), pixels=False, draws=5, paper="BrainMRI")
    long = pd.DataFrame([{"method": "fusion", "metric": "image/auroc", "value": 0.5}])
    assert printed_table(1, question, long).loc["FusionCLIP-AD"].tolist() == [92.77, "50.0"]


@pytest.mark.parametrize("method", ["winclip-plus", "fusion"])
def test_without_a_cache_the_numbers_are_the_same(tmp_path, method):
    config = Config(shots=1, epochs=1, batch_size=22, learning_rate=1e-3, augment="mvfa")
    with_files, without = (answer(ask("t", config, [0], results=str(tmp_path / str(cache)), smoke=True, draws=5, levels="quarters", cache=cache), [method])[0] for cache in (True, False))
    assert with_files["identity"] == without["identity"] and with_files["drawn"] == without["drawn"]
    for level in ("image", "pixel", "inside"):
        for name in ("auroc", "ap"): assert with_files["metrics"][level][name] == pytest.approx(without["metrics"][level][name], abs=2e-3)
    np.testing.assert_allclose(with_files["outputs"]["scores"], without["outputs"]["scores"], rtol=1e-2, atol=1e-3)


def without_masks(folder):
    "Copy the small demo without its masks and boxes."
    study = prepare_study(Config(), "demo", 5, small=True)
    shutil.copytree(study.dataset.folder, folder)
    shutil.rmtree(folder / "masks")
    (folder / "boxes.csv").unlink()
    table = pd.read_csv(folder / "labels.csv").drop(columns="mask")
    table.to_csv(folder / "labels.csv", index=False)
    return table


def test_data_without_masks_is_refused_or_judged_by_images_alone(tmp_path):
    without_masks(tmp_path / "plain")
    with pytest.raises(ValueError, match="plain has no mask .* set pixels to False"): prepare_questions(Config(shots=2), str(tmp_path / "plain"), 5)
    [study] = prepare_questions(Config(shots=2, epochs=1, batch_size=4, learning_rate=1e-3), str(tmp_path / "plain"), 5, pixels=False)
    record = run_anomaly_method(study, "mvfa", 0, tmp_path / "runs", pixels=False, draws=10)
    assert set(record["metrics"]) == {"image"} and 0 <= record["metrics"]["image"]["auroc"] <= 1 and record["outputs"]["maps"] == {}


def test_one_finding_is_sent_to_table1_and_one_kind_of_image_is_refused(tmp_path):
    table = without_masks(tmp_path / "single")
    names = [name for name in table if name not in ("image", "patient", "split")]
    table.drop(columns=names[1:]).to_csv(tmp_path / "single" / "labels.csv", index=False)
    with pytest.raises(ValueError, match="has one finding, .*run_table1"): prepare_study(Config(), str(tmp_path / "single"), 5, "fastmri_plus", findings=2)
    ill = table[table[names].any(axis=1)]
    ill.to_csv(tmp_path / "single" / "labels.csv", index=False)
    with pytest.raises(ValueError, match="all .* are abnormal"):
        prepare_questions(Config(shots=1, normal_shots=0), str(tmp_path / "single"), 5, "fastmri_plus", pixels=False)


@pytest.mark.skipif(not (REAL / "openms_flair").is_dir(), reason="the real FLAIR images are not here")
def test_real_masks_one_patient_held_out_at_a_time(tmp_path):
    studies = prepare_questions(Config(shots=2, epochs=2, batch_size=8, learning_rate=1e-3), str(REAL / "openms_flair"), 5, each_patient=True)
    assert [study.dataset.name for study in studies] == [f"openms_flair-patient{number}" for number in ("07", "19", "26")]
    records = {name: [run_anomaly_method(study, name, 0, tmp_path, draws=10) for study in studies] for name in ("brightness", "memory-bank", "sd-mad-mvfa")}
    for record in records["brightness"]:
        patient = record["data"].split("-")[1].removeprefix("patient")
        assert all(f"p{patient}_" in name for name in record["split"]["test"]) and not any(f"p{patient}_" in name for name in record["split"]["train"])
    mean = lambda name, level: np.mean([record["metrics"][level]["auroc"] for record in records[name]])
    assert mean("brightness", "pixel") > 0.9 and mean("brightness", "pixel") > mean("brightness", "inside") + 0.02, "background counts as easy negatives"
    assert all(0.5 < mean(name, "pixel") < 1 for name in records)
