"Damaged and crafted model files: each is refused in one sentence that names the file, soon and with little memory."
import json
import resource
import time

import numpy as np
import pytest
import torch
from open_clip.model import CLIP
from safetensors.torch import load_file, safe_open, save_file

from sdmad_nb import SDMAD, Config
from sdmad_nb.core.detector import _digest
from sdmad_nb.data.backbones import load_clip
from sdmad_nb.data.open_data import open_data
from sdmad_nb.methods.registry import load_detector

METHODS = ("sd-mad", "linear-probe", "tip-adapter", "constant-shots", "coop", "clip-map", "memory-bank", "winclip-plus", "fusion",
           "fusion-fixed", "mvfa", "sign-maps")


@pytest.fixture(scope="module")
def files(tmp_path_factory):  # function of a method -> its model file, fitted once
    folder, made, (dataset, _) = tmp_path_factory.mktemp("models"), {}, open_data("demo", 5, small=True)
    def of(method):
        if method not in made:
            model = SDMAD.fit(dataset.folder, 1, method=method, config=Config(backbone="demo", epochs=1))
            made[method] = model.save(folder / f"{method}.safetensors")
        return made[method]
    return of


@pytest.fixture(scope="module")
def clip(): return load_clip()


def read(file):
    with safe_open(file, "pt") as stored: return json.loads(stored.metadata()["sdmad"]), load_file(file)


def forge(file, header, state):  # with a digest that is right
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(state, file, {"sdmad": text, "sha256": _digest(text, state)})


def refused(file, load=SDMAD.load):
    "Load a file that must be refused, in seconds of the processor; an earlier peak of memory can hide a small one."
    start, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError) as told: load(file)
    seconds, more = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    sentence = str(told.value)
    assert str(file) in sentence and len(sentence) < 2000, sentence[:2000]
    assert seconds < 2 and more < 500 * 1024, f"{seconds:.1f} s, {more / 1024:.0f} MB"


def test_a_sound_file_is_loaded(files):
    for method in METHODS: assert SDMAD.load(files(method)).method.name == method


@pytest.mark.parametrize("share", [0, 1e-4, 0.005, 0.02, 0.3, 0.7, 0.999])
def test_a_file_that_is_cut_off(files, tmp_path, share):
    data = files("sd-mad").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(data[:int(share * len(data))])
    refused(tmp_path / "cut.safetensors")


def test_a_file_with_a_flipped_bit(files, tmp_path):
    data, generator = files("sd-mad").read_bytes(), np.random.default_rng(0)
    length = int.from_bytes(data[:8], "little")
    for place in [*range(8), *generator.integers(8, length, 20), *generator.integers(length, len(data), 10)]:
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(generator.integers(8))
        (tmp_path / "flipped.safetensors").write_bytes(flipped)
        refused(tmp_path / "flipped.safetensors")


RAW = {"nothing": b"", "no safetensors": b"x" * 100, "a header beyond the file": (2**40).to_bytes(8, "little") + b"{}",
       "a deep header": (200_000).to_bytes(8, "little") + b"[" * 200_000,
       "a foreign file": b'\x02\0\0\0\0\0\0\0{}', "a long picture": b"\x89PNG" * 100_000}


@pytest.mark.parametrize("data", RAW.values(), ids=RAW)
def test_what_is_no_model_file(tmp_path, data):
    (tmp_path / "raw.safetensors").write_bytes(data)
    refused(tmp_path / "raw.safetensors")


def set_in(*path, to):  # a change of the header
    def change(header):
        for part in path[:-1]: header = header[part]
        header[path[-1]] = to
    return change


MANY = [f"s{i}" for i in range(400_000)]
HEADERS = {
    **{f"{name} of {value}": set_in("config", name, to=value) for name, value in [
        ("bottleneck", 2_000_000), ("bottleneck", -1), ("bottleneck", 4096), ("image_size", 100_000), ("lam", float("nan")),
        ("lam", 2), ("layers", [[1]]), ("layers", [10**30]), ("layers", "x" * 10**6), ("prompt_length", 10**9), ("seed", "1"),
        ("backbone", "unknown"), ("backbone", 7), ("pretrained", "random"), ("epochs", 1e308), ("colour", 1)]},
    "a backbone without weights": lambda header: header["config"].update(backbone="ViT-bigG-14", pretrained="random"),
    "no configuration": set_in("config", to=None), "a list of choices": set_in("config", to=[1]),
    **{f"method {name!r:.20}": set_in("method", to=name) for name in ("unknown", "", "a/../b", "x" * 10**6, "linear-probe", 7)},
    "another format": set_in("format", to="x" * 10**6), "no signs": set_in("signs", to={}),
    "many signs": set_in("signs", "signs", to={"spot": MANY}), "half a character": set_in("signs", "note", to="\ud800"),
    "signs of a wrong type": set_in("signs", "signs", to=[["a"]]), "a sign less": lambda header: next(iter(
        header["signs"]["signs"].values())).pop(), "a finding less": lambda header: header["signs"]["signs"].popitem(),
    "another backbone": set_in("fingerprint", to="0" * 16), "a fingerprint of a wrong type": set_in("fingerprint", to=[1]),
    **{f"notes {value}": set_in("notes", to=value) for value in (7, "x", [1], None)},
    **{f"{name} of the origin is {value}": set_in("notes", "origin", name, to=value) for name, value in [
        ("hashes", 7), ("hashes", [7]), ("patients", [[1]]), ("salt", 5), ("limit", "wide"), ("limit", float("nan")),
        ("pixels", 3), ("pixels", {"scale": "loud"}), ("pixels", {"size": "x"}), ("colour", 1)]},
    **{f"calibration {value}": set_in("notes", "calibration", to=value) for value in (
        7, {"threshold": 1}, {"threshold": "x", "sensitivity": 0.9, "slope": 1, "intercept": 0},
        {"threshold": float("nan"), "sensitivity": 0.9, "slope": 1.0, "intercept": 0.0})},
}


@pytest.mark.parametrize("change", HEADERS.values(), ids=[name[:60] for name in HEADERS])
def test_a_crafted_header(files, tmp_path, change):
    header, state = read(files("sd-mad"))
    change(header)
    forge(tmp_path / "crafted.safetensors", header, state)
    refused(tmp_path / "crafted.safetensors")


@pytest.mark.parametrize("text", ["", "7", "[]", "null", "{", "[" * 100_000, '{"a":' * 50_000, "1" * 10_000, " " * 2**25,
                                  '{"format": "sdmad_nb detector 3", "config": ' + "[" * 900 + "]" * 900 + "}"],
                         ids=["empty", "a number", "a list", "null", "half", "deep lists", "deep objects", "a long number",
                              "long", "deep configuration"])
def test_a_header_that_is_no_description(files, tmp_path, text):
    forge(tmp_path / "crafted.safetensors", text, read(files("sd-mad"))[1])
    refused(tmp_path / "crafted.safetensors")


FREE = {"winclip-plus": ("patches", "windows2", "windows3")}
CHANGES = {"half": lambda value: value.half(), "double": lambda value: value.double(),
           "integers": lambda value: value.to(torch.int32), "eight bits": lambda value: value.to(torch.float8_e4m3fn),
           "not a number": lambda value: torch.full_like(value, torch.nan) if value.is_floating_point() else value.int(),
           "one row more": lambda value: torch.cat([value, value[:1]]) if value.dim() else value.expand(2).clone(),
           "one axis more": lambda value: value[None].contiguous(), "empty": lambda value: value.new_zeros(0)}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("method", METHODS)
def test_a_crafted_tensor(files, clip, tmp_path, method, change):
    "One tensor at a time; the number of patches and of shots in a memory is free, and so are its rows."
    (header, state), file = read(files(method)), tmp_path / "crafted.safetensors"
    for name, value in state.items():
        if name in FREE.get(method, ()) and change is CHANGES["one row more"]: continue
        forge(file, header, {**state, name: change(value)})
        refused(file, lambda path: load_detector(path, clip))


@pytest.mark.parametrize("method", METHODS)
def test_a_tensor_too_many_or_too_few(files, clip, tmp_path, method):
    (header, state), file = read(files(method)), tmp_path / "crafted.safetensors"
    for crafted in ({**state, "more": torch.zeros(1)}, *({k: v for k, v in state.items() if k != name} for name in state)):
        forge(file, header, crafted)
        refused(file, lambda path: load_detector(path, clip))


def test_a_backbone_whose_folder_has_moved_is_named_where_it_lies(files, tmp_path):
    shape = dict(embed_dim=32, vision_cfg=dict(image_size=56, layers=4, width=64, head_width=32, patch_size=14),
                 text_cfg=dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=2), quick_gelu=True)
    for name in ("here", "other"):
        (folder := tmp_path / name).mkdir()
        torch.manual_seed(len(name))
        state = {key: value.contiguous() for key, value in CLIP(**shape).state_dict().items()}
        save_file(state, folder / "open_clip_model.safetensors")
        (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": shape, "preprocess_cfg": {}}))
    dataset, _ = open_data("demo", 5, small=True)
    config = Config(epochs=1, backbone=f"local-dir:{tmp_path / 'here'}")
    model = SDMAD.fit(dataset.folder, 1, config=config)
    file, moved = model.save(tmp_path / "mine.safetensors"), (tmp_path / "here").rename(tmp_path / "there")
    with pytest.raises(ValueError, match="only where you name it.*or the place where it lies now"): SDMAD.load(file)
    again = SDMAD.load(file, backbone=f"local-dir:{moved}")
    assert again.predict(dataset.paths[:2]).equals(model.predict(dataset.paths[:2]))
    with pytest.raises(ValueError, match="mine.safetensors was fitted on backbone"):
        SDMAD.load(file, backbone=f"local-dir:{tmp_path / 'other'}")
