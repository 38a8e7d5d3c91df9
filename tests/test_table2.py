"Table 2 from the command line, from end to end: what it leaves, what it reads again, and what it refuses."
import json
import math
import os
import shutil
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import BIN, REAL, ROOT, run

from sdmad_nb.core.config import Config
from sdmad_nb.data.folder import draw_split
from sdmad_nb.lab.experiments import prepare_study, run_methods


def table2(results, **parameters):
    "Run the notebook in its smoke configuration, the way a user calls it."
    words = [word for name, value in {"smoke": True, "results": results, **parameters}.items() for word in ("-p", name, value)]
    return run(BIN / "papermill", "nbs/run_table2.ipynb", *words)


def printed(results):
    "Collect what the executed notebook printed."
    [notebook] = (Path(results) / "table2").glob("run_table2*.ipynb")
    cells = nbformat.read(notebook, as_version=4).cells
    return "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    results = tmp_path_factory.mktemp("table2")
    done = table2(results)
    assert done.returncode == 0, done.stderr
    return results


def test_table2_leaves_records_tables_and_figures(finished):
    folder = finished / "table2-smoke"
    records = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in (finished / "runs").glob("*.json")}
    assert {record["method"] for record in records.values()} == {
        "nothing", "constant-shots", "constant-oracle", "clip", "linear-probe", "tip-adapter", "tip-adapter-f", "coop", "sd-mad-no-ss", "sd-mad"}
    for record in records.values():
        assert {"config", "metrics", "split", "versions", "seconds", "peak_memory_mb"} <= record.keys()
        assert set(record["split"]["train"]).isdisjoint(record["split"]["test"])
        assert 0 <= record["metrics"]["subset_accuracy"] <= record["metrics"]["hamming"] <= 1
    long = pd.read_csv(folder / "table.csv")
    assert {"dataset", "method", "seed", "metric", "value"} <= set(long.columns)
    text = (folder / "table.md").read_text(encoding="utf-8")
    assert "demo data" in text.splitlines()[0] and "MedCLIP" in text and "SD-MAD (no SS)" in text and "Hamming (%)" in text
    assert {".png", ".svg"} <= {path.suffix for path in folder.iterdir()}


def test_second_run_reads_records_and_repairs_what_is_damaged(finished, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(finished, results)
    records = sorted((results / "runs").glob("*.json"))
    damaged = next(path for path in records if "sd_mad-" in path.name)
    before = {path: path.read_bytes() for path in records}
    damaged.write_bytes(damaged.read_bytes()[:200])
    done = table2(results)
    assert done.returncode == 0, done.stderr
    assert "recomputing" in printed(results) and damaged.name in printed(results)
    for path in records:
        if path != damaged: assert path.read_bytes() == before[path], "an existing record is read, not written again"
    again, first = json.loads(damaged.read_text()), json.loads(before[damaged])
    assert again["metrics"] == first["metrics"] and again["outputs"] == first["outputs"], "the same seed gives the same numbers"


def test_wrong_parameter_ends_in_one_sentence(tmp_path):
    done = table2(tmp_path, slice=3)
    assert done.returncode == 1
    assert "slice is 3: the demo has slices [0, 5, 10]" in done.stderr.strip().splitlines()[-1]
    assert not list(tmp_path.rglob("*.json")) and not list(tmp_path.rglob("table.*"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_results_without_write_permission(tmp_path):
    tmp_path.chmod(0o500)
    done = table2(tmp_path / "results")
    assert done.returncode == 1 and "cannot be written" in done.stderr


@pytest.mark.parametrize("change, says", [
    (dict(slice=3), "slice is 3"), (dict(data="no/such/folder"), "is not a data-set folder"), (dict(device="gpu"), "device is 'gpu'"),
    (dict(signs="my_signs"), "neither a file nor one of the presets"),
    (dict(config=dict(backbone="ViT-Z")), "backbone 'ViT-Z' is unknown"), (dict(config=dict(lam=1.5)), "'lam' is 1.5"),
    (dict(config=dict(backbone="ViT-L-14", pretrained="openai")), "use backbone 'ViT-L-14-quickgelu'"),
    (dict(config=dict(layers=[2, 99])), "between 1 and 8"), (dict(config=dict(layers=3)), "'layers' is 3")])
def test_wrong_choices_are_refused_before_work_starts(change, says, tmp_path, monkeypatch):
    monkeypatch.setenv("SDMAD_CACHE", str(tmp_path))
    with pytest.raises(ValueError) as caught:
        prepare_study(**{"data": "demo", "slice": 5, "small": True, **change, "config": Config(**change.get("config", {}))})
    assert says in str(caught.value) and "\n" not in str(caught.value).strip()


def test_more_shots_than_images(tmp_path, monkeypatch):
    monkeypatch.setenv("SDMAD_CACHE", str(tmp_path / "cache"))
    with pytest.raises(ValueError, match="500"): prepare_study(Config(shots=500), "demo", 5, small=True)
    assert not list((tmp_path / "cache").rglob("*.safetensors")), "refused before the first forward pass"


def test_data_with_faults_names_them_all(tmp_path):
    (tmp_path / "labels.csv").write_text("image,patient,Craniotomy\nimages/a.png,p1,2\nimages/b.png,p2,1\n")
    with pytest.raises(ValueError) as caught: prepare_study(Config(), str(tmp_path), 5, "fastmri_plus")
    assert all(word in str(caught.value) for word in ("images/a.png", "images/b.png", "line 2"))


@pytest.mark.parametrize("name", ["idrid_codras", "openms_flair", "nih1000_64px"])
def test_real_images_go_through(name, tmp_path, monkeypatch):
    "Real labels and pixels; one step of training, because this tests the path and not the score."
    if not (REAL / name / "labels.csv").is_file(): pytest.skip(f"{REAL / name} is not there: set SDMAD_REAL_DATA to the folder that holds it")
    monkeypatch.setenv("SDMAD_CACHE", str(tmp_path / "cache"))
    study = prepare_study(Config(epochs=1, split_level="image" if name == "openms_flair" else "patient"), str(REAL / name), 5)
    methods = ["nothing", "clip", "sd-mad-no-ss", "sd-mad"]
    records = run_methods(study, [0], tmp_path / "results", methods)
    assert [record["method"] for record in records] == methods
    for record in records:
        metrics, positives, tested = record["metrics"], record["split"]["positives"], len(record["split"]["test"])
        assert 0 <= metrics["subset_accuracy"] <= metrics["hamming"] + 1e-9 <= 1 + 1e-9, "Table 2: decisions on every finding of an image"
        assert list(metrics["auroc"]) == list(study.dataset.categories), "Table 3: one score for each category"
        for value, count in zip(metrics["auroc"].values(), positives):
            assert 0 <= value <= 1 if 0 < count < tested else math.isnan(value)
        assert np.isclose(metrics["macro_auroc"], np.nanmean(list(metrics["auroc"].values())))
    assert set(records[0]["metrics"]["auroc"].values()) == {0.5}, "who never looks at an image cannot rank them"


def test_split_file_of_the_user_is_used_for_every_seed(tmp_path, monkeypatch):
    monkeypatch.setenv("SDMAD_CACHE", str(tmp_path / "cache"))
    study = prepare_study(Config(), "demo", 5, small=True)
    mine = tmp_path / "mine.json"
    drawn = draw_split(study.dataset, 2, 7)
    mine.write_text(json.dumps({"train": drawn.train, "shots": 2}))
    study = prepare_study(Config(epochs=1), "demo", 5, small=True, split=str(mine))
    records = run_methods(study, [0, 1], tmp_path / "results", ["clip"])
    assert all(record["split"]["train"] == list(drawn.train) and record["config"]["shots"] == 2 for record in records)
    assert all(record["split"]["test"] == list(drawn.test) for record in records)
    mine.write_text(json.dumps({"train": drawn.train[:1]}))
    with pytest.raises(ValueError, match='no image of "train" has'): prepare_study(Config(), "demo", 5, small=True, split=str(mine))
