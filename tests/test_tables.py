"Tables from end to end: what a command leaves, what is read again, what is survived, what is refused, and real images."
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import BIN, REAL, ROOT, run
from PIL import Image
from safetensors.torch import load_file

from sdmad_nb.core.config import Config
from sdmad_nb.core.detector import predict, save
from sdmad_nb.core.signs import preset_path, read_signs
from sdmad_nb.data.cache import Cache
from sdmad_nb.data.public_sets import chestxray14, oct2017
from sdmad_nb.data.splits import draw_split
from sdmad_nb.data.support import read_features, read_support
from sdmad_nb.lab.benchmark import each_patient, open_benchmark, run_all
from sdmad_nb.lab.experiment import long_table, open_experiment, printed_table
from sdmad_nb.lab.tables import FINDING_METRICS, metric_table
from sdmad_nb.methods.registry import find_method, load_detector

COMMAND = "run_table2.ipynb"


def papermill(results, notebook=COMMAND, **parameters):
    "Run a notebook in its smoke configuration, the way a user calls it."
    words = [word for name, value in {"smoke": True, **parameters}.items() for word in ("-y", f"{name}: {value}")]
    return run(BIN / "papermill", f"nbs/{notebook}", "-p", "results", results, *words)


def last_line(done): return re.sub(r"\x1b\[\d*m", "", done.stderr).strip().splitlines()[-1]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    results = tmp_path_factory.mktemp("table2")
    done = papermill(results)
    assert done.returncode == 0, done.stderr
    return results


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    "Copy the small demo without its masks and boxes."
    folder = tmp_path_factory.mktemp("data") / "plain"
    shutil.copytree(open_benchmark(Config(), small=True).dataset.folder, folder)
    shutil.rmtree(folder / "masks")
    (folder / "boxes.csv").unlink()
    pd.read_csv(folder / "labels.csv").drop(columns="mask").to_csv(folder / "labels.csv", index=False)
    return folder


def test_table2_leaves_records_tables_and_figures(finished):
    records = [json.loads(path.read_text(encoding="utf-8")) for path in (finished / "runs").glob("*.json")]
    assert {"nothing", "constant-oracle", "clip", "linear-probe", "coop", "sd-mad"} < {record["method"] for record in records}
    for record in records:
        assert set(record["split"]["train"]).isdisjoint(record["split"]["test"])
        assert 0 <= record["metrics"]["decisions"]["subset_accuracy"] <= record["metrics"]["decisions"]["hamming"] <= 1
    folder = finished / "table2-smoke"
    text = (folder / "table.md").read_text(encoding="utf-8")
    assert "demo data" in text.splitlines()[0] and {".png", ".svg"} <= {path.suffix for path in folder.iterdir()}
    assert all(name in text for name in ("Hamming", "macro-F1", "abnormal AUROC", "MedCLIP", "SD-MAD (no SS)"))
    assert list((finished / "table2").glob("run_table2*.ipynb")), "the executed notebook is beside the records"


def test_a_second_run_reads_records_and_repairs_what_is_damaged(finished, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(finished, results)
    records = sorted((results / "runs").glob("*.json"))
    damaged, before = next(path for path in records if "-clip-" in path.name), {path: path.read_bytes() for path in records}
    damaged.write_bytes(damaged.read_bytes()[:200])
    assert papermill(results).returncode == 0
    [notebook] = (results / "table2").glob("run_table2*.ipynb")
    printed = "".join(output.get("text", "") for cell in nbformat.read(notebook, as_version=4).cells
                      for output in cell.get("outputs", []))
    assert "recomputing" in printed and damaged.name in printed
    assert [path for path in records if path.read_bytes() != before[path]] == [damaged], "other records are only read"
    again, first = json.loads(damaged.read_text()), json.loads(before[damaged])
    assert again["metrics"] == first["metrics"] and again["outputs"] == first["outputs"]


@pytest.mark.parametrize("notebook, wrong, says", [
    (COMMAND, dict(slice=3), "slice is 3: the demo has slices"), (COMMAND, dict(seeds="[1, 1]"), "seeds is [1, 1]"),
    ("run_table1.ipynb", dict(shots=999), "too few images to draw 999 per category"),
    ("run_table1.ipynb", dict(paper="Brain"), "paper is 'Brain': use one of BrainMRI"),
    ("run_fusion_fig4.ipynb", dict(shot_counts="[2, 2]"), "must be a list of different whole numbers")])
def test_a_wrong_parameter_ends_in_one_sentence(tmp_path, notebook, wrong, says):
    done = papermill(tmp_path, notebook, smoke=False, **wrong)  # smoke takes a seed and few shots whatever is asked for
    assert done.returncode == 1 and says in last_line(done), done.stderr[-2000:]
    assert not list(tmp_path.rglob("*.json")) and not list(tmp_path.rglob("table.*"))


@pytest.mark.parametrize("change, says", [
    (dict(signs="my_signs"), "neither a file nor one of the presets"), (dict(data="no/such"), "is not a data-set folder"),
    (dict(config=Config(backbone="ViT-Z")), "backbone 'ViT-Z' is unknown"), (dict(config=Config(layers=[2, 99])), "and 8"),
    (dict(config=Config(backbone="ViT-L-14", pretrained="openai")), "use backbone 'ViT-L-14-quickgelu'")])
def test_wrong_choices_are_refused_before_work_starts(change, says, tmp_path, monkeypatch):
    monkeypatch.setenv("SDMAD_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        open_benchmark(**{"config": Config(), "small": True, **change})
    assert "\n" not in str(caught.value).strip() and not list(tmp_path.rglob("*.safetensors"))


WORK = """
import sys
from contextlib import ExitStack
from joblib import parallel_config
from sdmad_nb.core.config import Config
from sdmad_nb.lab.benchmark import open_benchmark, run_all
if __name__ == "__main__":
    benchmark, folder, jobs = open_benchmark(Config(epochs=3), small=True), sys.argv[1], int(sys.argv[2])
    with ExitStack() as cluster:
        if "dask" in sys.argv:
            from distributed import Client, LocalCluster
            there = cluster.enter_context(LocalCluster(n_workers=jobs, threads_per_worker=1, dashboard_address=None,
                                                               preload=["sdmad_nb.lab.benchmark"]))
            cluster.enter_context(Client(there)), cluster.enter_context(parallel_config("dask", scatter=[benchmark]))
        print("ready", flush=True)
        run_all([benchmark], ["clip", "linear-probe", "sd-mad"], [0, 1, 2], folder, jobs)
"""
RECORDS = "[!.]*.json"  # a process that is killed while it writes leaves .tmp-*.json, which is no record


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    "Write a script of nine runs; one thread in each process, so that numbers can be compared to the last digit."
    script, alone = tmp_path_factory.mktemp("work") / "work.py", {**os.environ, "OMP_NUM_THREADS": "1"}
    script.write_text(WORK)
    return lambda folder, *words: subprocess.Popen([sys.executable, script, folder, *words], cwd=ROOT, env=alone, text=True,
                                                   stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def calm(work, tmp_path_factory):
    folder = tmp_path_factory.mktemp("calm")
    assert work(folder, "1").wait() == 0
    return folder


def made(folder):  # {name: what a record says, but for the time that it took}
    "Read the records of nine runs, each of which was made once."
    logged = [line.split()[-1] for line in (folder / "runs.log").read_text(encoding="utf-8").splitlines()]
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob(RECORDS)}
    assert len(logged) == 9 and {*logged} == found.keys()
    taken = ("seconds", "sha256")
    return {name: {key: value for key, value in one.items() if key not in taken} for name, one in found.items()}


def test_processes_share_the_runs_and_a_killed_one_keeps_nobody_waiting(work, calm, tmp_path):
    "Three at once; SIGKILL for two of them at different moments. No half record, no run made twice, the same numbers."
    processes = [work(tmp_path, "1") for _ in range(3)]
    assert all(process.stdout.readline() == "ready\n" for process in processes)
    for process, wait in zip(processes, (0.3, 1)):
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
    early = {path: path.read_bytes() for path in tmp_path.glob(RECORDS)}
    for text in early.values(): json.loads(text)
    assert processes[2].wait(120) == 0 and made(tmp_path) == made(calm)
    assert all(path.read_bytes() == text for path, text in early.items())
    assert work(tmp_path, "1").wait() == 0 and len(made(tmp_path)) == 9, "a second time they are read"


@pytest.mark.parametrize("words", [("2",), ("2", "dask")], ids=["joblib", "dask"])
def test_runs_on_two_workers_are_the_same(work, calm, tmp_path, words):
    if "dask" in words: pytest.importorskip("distributed", reason="dask.distributed is not here: pip install -e .[wide]")
    assert work(tmp_path, *words).wait() == 0
    assert made(tmp_path) == made(calm)


def test_a_split_file_of_the_user_is_used_for_every_seed(tmp_path):
    drawn = draw_split(open_benchmark(Config(), small=True).dataset, Config(shots=2, seed=7))
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps({"train": drawn.train, "shots": 2}))
    benchmark = open_benchmark(Config(), small=True, split=str(mine))
    for record in run_all([benchmark], ["clip"], [0, 1], tmp_path / "results"):
        assert record["split"]["train"] == list(drawn.train) and record["config"]["shots"] == 2
        assert record["split"]["test"] == list(drawn.test)
    mine.write_text(json.dumps({"train": drawn.train[:1]}))
    with pytest.raises(ValueError, match='no image of "train" has'): open_benchmark(Config(), small=True, split=str(mine))


def test_without_a_cache_the_numbers_are_the_same(tmp_path):
    kept, fresh = (run_all([open_benchmark(Config(), small=True, cache=cache)], ["sd-mad"], [0], tmp_path / str(cache))[0]
                   for cache in (True, False))
    assert kept["config"] == fresh["config"] and kept["split"] == fresh["split"]
    np.testing.assert_allclose(kept["outputs"]["scores"], fresh["outputs"]["scores"], atol=1e-4)


@pytest.mark.parametrize("name", ["clip", "sd-mad"])
def test_half_precision_agrees(name, tmp_path):
    "Scores within 0.01 and at most one decision in 200 another, wherever the detector was fitted; kept values change nothing."
    one = open_benchmark(Config(epochs=5), small=True, cache=False)
    assert one.config.precision == "fp32", "the packaged backbones stay in single precision unless asked"
    half, method = replace(one.clip, dtype=torch.bfloat16, cache=Cache(tmp_path)), find_method(name)
    config, rows = method.configure(one.config), range(len(one.dataset))
    whole = method.fit(read_support(one.dataset, range(6), one.clip), one.clip, one.signs, config)
    loaded = load_detector(save(whole, tmp_path / "model.safetensors"), half)
    fitted = method.fit(read_support(one.dataset, range(6), half), half, one.signs, config)
    expected = predict(whole, read_features(one.dataset, rows, one.clip))
    for detector in (loaded, fitted):
        said, again = (predict(detector, read_features(one.dataset, rows, half)) for _ in range(2))
        torch.testing.assert_close(again.scores, said.scores, rtol=0, atol=0)
        torch.testing.assert_close(said.scores, expected.scores, rtol=0, atol=0.01)
        assert not torch.equal(said.scores, expected.scores) and said.scores.dtype == torch.float32
        assert (said.labels != expected.labels).float().mean() <= 0.005
    kept = {str(load_file(file)["value"].dtype) for file in tmp_path.rglob("*block*/*.safetensors")}
    assert kept == {"torch.bfloat16"} and all(value.dtype == torch.float32 for value in fitted.parameters())


def test_data_without_masks_is_refused_or_measured_by_images_alone(plain, tmp_path):
    benchmark = open_benchmark(Config(backbone="demo", shots=2, epochs=1, batch_size=4), str(plain), findings=0)
    arguments = "table1", "Table 1", [replace(benchmark, protocols=("image", "pixels"))], [0], str(tmp_path)
    with pytest.raises(ValueError, match="plain has no mask .* set pixels to False"): open_experiment(*arguments)
    [record] = run_all([replace(benchmark, protocols=("image",))], ["mvfa"], [0], tmp_path / "runs")
    assert set(record["metrics"]) == {"image"} and 0 <= record["metrics"]["image"]["auroc"] <= 1


def test_one_finding_is_sent_to_table1_and_one_kind_of_image_is_refused(plain, tmp_path):
    folder, table = shutil.copytree(plain, tmp_path / "single"), pd.read_csv(plain / "labels.csv")
    names = [name for name in table if name not in ("image", "patient", "split")]
    table.drop(columns=names[1:]).to_csv(folder / "labels.csv", index=False)
    with pytest.raises(ValueError, match="has one finding, .*run_table1"):
        open_benchmark(Config(), str(folder), signs="fastmri_plus", findings=2)
    table[table[names].any(axis=1)].to_csv(folder / "labels.csv", index=False)
    benchmark = open_benchmark(Config(backbone="demo", normal_shots=0), str(folder), signs="fastmri_plus", findings=0)
    with pytest.raises(ValueError, match="all .* are abnormal"):
        open_experiment("t", "T", [replace(benchmark, protocols=("image",))], [0], str(tmp_path))
    tables = open_benchmark(Config(backbone="demo", normal_shots=0), str(folder), signs="fastmri_plus", findings=2)
    [record] = run_all([tables], ["clip"], [0], tmp_path / "runs")
    assert "decisions" in record["metrics"] and "image" not in record["metrics"], "Table 2 does without normal images"


def test_the_papers_numbers_stand_beside_the_bmad_set_of_that_name(plain, tmp_path):
    "The small demo, written as BMAD's brain set is prepared: one finding of that name."
    folder, table = shutil.copytree(plain, tmp_path / "brain"), pd.read_csv(plain / "labels.csv")
    names = [name for name in table if name not in ("image", "patient", "split")]
    one = table[["image", "patient"]].assign(**{"Brain tumour": table[names].max(axis=1)})
    one.to_csv(folder / "labels.csv", index=False)
    benchmark = replace(open_benchmark(Config(backbone="demo"), str(folder), signs="bmad_brain", findings=0), protocols=("image",))
    experiment = open_experiment("t", "T", [benchmark], [0], str(tmp_path), paper="BrainMRI")
    long = pd.DataFrame([{"method": "fusion", "metric": "image/auroc", "value": 0.5}])
    assert printed_table(experiment, 1, long).loc["FusionCLIP-AD"].tolist() == [92.77, "50.0"]


def write_downloads(folder, preset):  # -> a prepared folder
    "Write noise in the layout of a public set: five images of each finding and of none, each of a patient of its own."
    numbers = [(name, patient) for name in (*read_signs(preset_path(preset)).categories, "") for patient in range(5)]
    places = {"oct2017": lambda name, i: f"{('train', 'test')[i % 2]}/{name or 'NORMAL'}/{name or 'NORMAL'}-{i}-1.png",
              "chestxray14": lambda name, i: f"images_001/images/{i:08}_000.png"}
    table = ["Image Index,Finding Labels,Patient ID"]
    for i, (name, _) in enumerate(numbers):
        path = folder / places[preset](name, i)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (24, 32), np.uint8)).save(path)
        table.append(f"{path.name},{name or 'No Finding'},{i}")
    entries = folder.with_suffix(".csv")
    entries.write_text("\n".join(table))
    out = folder.with_name(f"prepared-{preset}")
    return oct2017(folder, out) if preset == "oct2017" else chestxray14(folder, entries, out)


@pytest.mark.parametrize("preset", ["oct2017", "chestxray14"])
def test_sets_of_several_findings_go_through_tables_2_and_3(preset, tmp_path):
    "As downloaded, prepared and passed as -p data; the signs are found by the names of the findings."
    folder = write_downloads(tmp_path / "download", preset)
    (folder / "signs.json").unlink()
    for number in (2, 3):
        done = papermill(tmp_path, f"run_table{number}.ipynb", data=folder)
        assert done.returncode == 0, done.stderr[-2000:]
        text = (tmp_path / f"table{number}-smoke" / "table.md").read_text(encoding="utf-8")
        assert "demo data" not in text and "SD-MAD (no SS)" in text
    findings = read_signs(preset_path(preset)).categories
    assert all(f"| {name} |" in text for name in findings), "Table 3 has a row for each finding"
    records = [json.loads(path.read_text(encoding="utf-8")) for path in (tmp_path / "runs").glob("*-sd_mad-*.json")]
    assert len(records) == 1 and len(records[0]["outputs"]["keep"]) == len(read_signs(preset_path(preset)).texts)


@pytest.mark.parametrize("name", ["idrid_codras", "openms_flair", "nih1000_64px"])
def test_real_images_go_through(name, tmp_path, monkeypatch):
    "Real labels and pixels; one step of training, because this tests the way and not the score."
    if not (REAL / name / "labels.csv").is_file(): pytest.skip(f"{REAL / name} is not there: set SDMAD_REAL_DATA")
    monkeypatch.setenv("SDMAD_CACHE", str(tmp_path / "cache"))
    level = "image" if name == "openms_flair" else "patient"
    config = Config(backbone="demo", epochs=1, split_level=level)
    benchmark = open_benchmark(config, str(REAL / name))
    for record in run_all([benchmark], ["nothing", "sd-mad"], [0], tmp_path / "results"):
        metrics, tested = record["metrics"], len(record["split"]["test"])
        assert list(metrics["findings"]["auroc"]) == list(benchmark.dataset.categories)
        for value, count in zip(metrics["findings"]["auroc"].values(), record["split"]["positives"]):
            assert 0 <= value <= 1 if 0 < count < tested else math.isnan(value)
        assert record["method"] == "sd-mad" or set(metrics["findings"]["auroc"].values()) == {0.5}


@pytest.mark.skipif(not (REAL / "openms_flair").is_dir(), reason="the real FLAIR images are not here")
def test_real_masks_one_patient_held_out_at_a_time(tmp_path):
    opened = open_benchmark(Config(backbone="demo", shots=4), str(REAL / "openms_flair"), findings=0)  # of two patients
    benchmarks = each_patient(replace(opened, protocols=("image", "pixels"), draws=10))
    records = run_all(benchmarks, ["brightness", "memory-bank"], [0], tmp_path)
    for record in records:
        patient = record["data"].split("-")[1].removeprefix("patient")
        assert all(f"p{patient}_" in name for name in record["split"]["test"])
        assert not any(f"p{patient}_" in name for name in record["split"]["train"])
    mean = lambda name, level: np.mean([record["metrics"][level]["auroc"] for record in records if record["method"] == name])
    assert mean("brightness", "pixel") > max(0.9, mean("brightness", "inside") + 0.02), "background counts as easy negatives"
    long = long_table(open_experiment("t", "T", benchmarks, [0], str(tmp_path)), records)
    assert set(long.dataset) == {f"openms_flair-patient{number}" for number in ("07", "19", "26")}


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_runs_every_notebook_of_both_papers():
    commands = {name: run("make", "-n", "-o", f"{BIN.parent}/.installed", name, f"VENV={BIN.parent}", "SMOKE=True",
                          "RESULTS=there").stdout for name in ("tables", "fusion")}
    named = [re.search(r"run_fusion_(\w+)", commands["fusion"])[1],
             *re.search(r"printf '%s\\n' (.*) \|", commands["fusion"])[1].split()]
    there = [path.stem.removeprefix("run_fusion_") for path in (ROOT / "nbs").glob("run_fusion_[tf][ai][bg]*.ipynb")]
    assert sorted(named) == sorted(there) and all("-p smoke True -p results there" in text for text in commands.values())
    assert set(re.findall(r"run_(\w+)\.ipynb", commands["tables"])) == {"table1", "table2", "table3", "fig1", "fig3", "fig4"}


def test_the_numbers_of_the_readme_are_those_of_a_fresh_run(tmp_path):
    "Rows that take seconds, over all five draws: what the README shows is what the code gives, to the last digit shown."
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith(("| demo-slice5", "| dataset"))]
    shown = pd.DataFrame(lines[1:], columns=lines[0]).set_index("method")
    experiment = open_experiment("table2", "Table 2", [open_benchmark(Config(shots=1))], [0, 1, 2, 3, 4], str(tmp_path))
    records = experiment.run(["nothing", "constant-shots", "clip", "linear-probe"])
    fresh = metric_table(long_table(experiment, records), FINDING_METRICS, rows=("title",))
    assert list(fresh) == list(shown.columns[1:])
    for title, row in fresh.iterrows():
        for metric, cell in row.items():
            pairs = zip(re.findall(r"[\d.]+", cell), re.findall(r"[\d.]+", shown.loc[title, metric]), strict=True)
            assert all(abs(float(one) - float(other)) < 0.11 for one, other in pairs), (title, metric, cell, shown.loc[title, metric])
