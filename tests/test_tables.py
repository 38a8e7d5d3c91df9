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

from sdmad_nb.anomaly import run_anomaly_method
from sdmad_nb.config import Config
from sdmad_nb.experiments import prepare_questions, prepare_study, run_methods

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


WORK = """
import sys
from sdmad_nb.config import Config
from sdmad_nb.experiments import prepare_study, run_methods
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
    (dict(lam=1.5), "lam is 1.5 but must be a number in [0, 1]"),
    (dict(shots=999), "too few images to draw 999 per category"),
    (dict(prompts="poems"), "prompts is 'poems'"),
    (dict(paper="Brain"), "paper is 'Brain': use one of BrainMRI"),
    (dict(faults="[peeking]"), "mvfa_faults is ('peeking',)"),
])
def test_table1_refuses_a_wrong_value_before_it_computes(tmp_path, parameters, words):
    chosen = [word for name, value in {"results": tmp_path, "smoke": True, **parameters}.items() for word in ("-y", f"{name}: {value}")]
    done = run(BIN / "papermill", "nbs/run_table1.ipynb", *chosen)
    assert done.returncode != 0 and words in re.sub(r"\x1b\[\d*m", "", done.stderr), done.stderr[-2000:]
    assert not list(tmp_path.glob("runs/*.json"))


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
