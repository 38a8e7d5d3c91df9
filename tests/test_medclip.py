"""MedCLIP in its real size: the authors' file is loaded whole or refused, and the features are those of a direct computation.

No weights are downloaded: a checkpoint of the real layout with random weights stands in for the published one.
"""
import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REAL
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as transform
from transformers import AutoTokenizer, BertModel, SwinModel

from sdmad_nb import medclip
from sdmad_nb.data.folder import DataError
from sdmad_nb.methods.medclip import (BERT_NAME, BIO_CLINICAL_BERT, MEDCLIP_URL, SWIN, load_medclip, made_up_vocabulary, medclip_features,
                              medclip_images, medclip_pixels, medclip_text_features, medclip_texts, medclip_tokens, open_medclip,
                              place_weights, random_medclip, save_medclip)
from sdmad_nb.core.signs import SignSet, restrict

SENTENCES = ["Enlarged ventricles", "a T2-weighted scan of the brain with a dark spot", "edema", "a normal brain (no finding)"]
SIGNS = SignSet("brain", ("a normal {object}", "a healthy {object} without any finding"),
                {"Lesion": ("a bright spot", "a dark spot near the skull"), "Dural thickening": ("a thick dura",)},
                ("a scan of the {object} with {sign}", "{sign}"))


def linear(name, wide, narrow): return {f"{name}.weight": (wide, narrow), f"{name}.bias": (wide,)}


def norm(name, width): return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def swin_layout():  # {name: shape}
    "List Swin-T's tensors as transformers 4.24 names them."
    layout = {"embeddings.patch_embeddings.projection.weight": (96, 3, 4, 4), "embeddings.patch_embeddings.projection.bias": (96,),
              **norm("embeddings.norm", 96), **norm("layernorm", 768)}
    for stage, (depth, heads) in enumerate(((2, 3), (2, 6), (6, 12), (2, 24))):
        width = 96 * 2**stage
        for block in range(depth):
            at = f"encoder.layers.{stage}.blocks.{block}."
            for part in ("query", "key", "value"): layout |= linear(f"{at}attention.self.{part}", width, width)
            layout |= {f"{at}attention.self.relative_position_bias_table": (13 * 13, heads), f"{at}attention.self.relative_position_index": (49, 49)}
            layout |= linear(f"{at}attention.output.dense", width, width) | linear(f"{at}intermediate.dense", 4 * width, width)
            layout |= linear(f"{at}output.dense", width, 4 * width) | norm(f"{at}layernorm_before", width) | norm(f"{at}layernorm_after", width)
        if stage == 3: continue
        layout |= {f"encoder.layers.{stage}.downsample.reduction.weight": (2 * width, 4 * width)}
        layout |= norm(f"encoder.layers.{stage}.downsample.norm", 4 * width)
    return layout


def bert_layout():  # {name: shape}
    "List the tensors of BERT-base with the cased vocabulary as transformers 4.24 names them."
    layout = {"embeddings.position_ids": (1, 512), "embeddings.word_embeddings.weight": (28996, 768), **norm("embeddings.LayerNorm", 768),
              "embeddings.position_embeddings.weight": (512, 768), "embeddings.token_type_embeddings.weight": (2, 768)}
    for number in range(12):
        at = f"encoder.layer.{number}."
        for part in ("self.query", "self.key", "self.value", "output.dense"): layout |= linear(f"{at}attention.{part}", 768, 768)
        layout |= norm(f"{at}attention.output.LayerNorm", 768) | norm(f"{at}output.LayerNorm", 768)
        layout |= linear(f"{at}intermediate.dense", 3072, 768) | linear(f"{at}output.dense", 768, 3072)
    return layout | linear("pooler.dense", 768, 768)


def authors_layout():  # {name: shape}, as in the published file
    "Put both towers together."
    towers = ("vision_model", swin_layout()), ("text_model", bert_layout())
    layout = {f"{tower}.model.{name}": shape for tower, parts in towers for name, shape in parts.items()}
    return layout | {"logit_scale": (), **{f"{tower}.projection_head.weight": (512, 768) for tower, _ in towers}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    "Write a random MedCLIP as the authors do."
    return save_medclip(random_medclip(seed=3), tmp_path_factory.mktemp("medclip"))


@pytest.fixture(scope="module")
def state(folder): return torch.load(folder / "pytorch_model.bin", weights_only=True)


@pytest.fixture(scope="module")
def model(folder): return load_medclip(folder)


@pytest.fixture(scope="module")
def reference(folder, state, tmp_path_factory):
    "Let transformers itself read both towers from the authors' names, and the tokenizer from a folder like BioClinicalBERT's."
    towers = {}
    for part, config, kind in (("vision_model", {"model_type": "swin"}, SwinModel),  # Swin-T and BERT-base are the defaults
                               ("text_model", {"model_type": "bert", "vocab_size": 28996}, BertModel)):
        place, prefix = tmp_path_factory.mktemp(part), f"{part}.model."
        (place / "config.json").write_text(json.dumps(config))
        (place / "vocab.txt").write_text((folder / "vocab.txt").read_text())
        weights = {name.removeprefix(prefix): value for name, value in state.items()
                   if name.startswith(prefix) and not name.endswith(("position_ids", "relative_position_index"))}
        save_file(weights, place / "model.safetensors", {"format": "pt"})
        towers[part] = kind.from_pretrained(place).eval()
    return SimpleNamespace(**towers, tokenizer=AutoTokenizer.from_pretrained(place))


@pytest.fixture
def pictures(tmp_path):
    "Write a grey picture, a coloured one and a small one, none of them square."
    kinds = (("L", (300, 421)), ("RGB", (640, 333)), ("L", (100, 61)))
    for number, (mode, (width, height)) in enumerate(kinds):
        rows, columns = np.mgrid[:height, :width]
        waves = [127 + 120 * np.sin(rows / (9 + 4 * band) + columns / (5 + number)) for band in range(len(mode))]
        Image.fromarray(np.stack(waves, axis=-1).astype(np.uint8).squeeze()).save(tmp_path / f"{number}.png")
    return [tmp_path / f"{number}.png" for number in range(3)]


def test_layout_is_the_authors(state):
    assert {name: tuple(value.shape) for name, value in state.items()} == authors_layout()


def test_round_trip(folder, state, model):
    "Every number of the file is in the model, and another seed or another vocabulary is another model."
    assert len(list(model.network.parameters())) == 421
    torch.testing.assert_close(medclip.authors_state(model.network), state, rtol=0, atol=0)
    again = random_medclip(seed=3)
    assert model.fingerprint == again.fingerprint
    words = [*made_up_vocabulary()[:-1], "word"]
    assert open_medclip(again.network, words).fingerprint != again.fingerprint != random_medclip(seed=4).fingerprint


def test_architectures_are_those_of_transformers(reference):
    for tower, written in ((reference.vision_model, SWIN), (reference.text_model, BIO_CLINICAL_BERT)):
        theirs = {name: getattr(tower.config, name) for name in written}
        assert {name: list(value) if isinstance(value, tuple) else value for name, value in theirs.items()} == written


def test_file_and_safetensors_in_half_precision(state, model, folder, tmp_path):
    "A file by its own name is read too, and numbers in half precision become single precision."
    half = {name: value.half().contiguous() if value.is_floating_point() else value for name, value in state.items()}
    save_file(half, tmp_path / "mine.safetensors")
    (tmp_path / "vocab.txt").write_bytes((folder / "vocab.txt").read_bytes())
    read = load_medclip(str(tmp_path / "mine.safetensors"))
    assert all(weight.dtype == torch.float32 for weight in read.network.parameters())
    torch.testing.assert_close(dict(read.network.named_parameters()), dict(model.network.named_parameters()), rtol=1e-3, atol=1e-3)


def test_images_are_those_of_transformers(model, reference, state, pictures):
    "Padding, resizing and normalising by other functions, and Swin with the weights as transformers reads them."
    pixels = []
    for file in pictures:
        image = Image.open(file).convert("L")
        across, down = (max(224, *image.size) - side for side in image.size)
        square = transform.pad(image, [across // 2, down // 2, across - across // 2, down - down // 2])
        values = transform.resize(square, [224, 224], transform.InterpolationMode.BICUBIC)
        values = transform.to_dtype(transform.to_image(values), torch.float32, scale=True)
        pixels.append(transform.normalize(values, [0.5862785803043838], [0.27950088968644304]).repeat(3, 1, 1))
        torch.testing.assert_close(medclip_pixels(Image.open(file)), pixels[-1])
    with torch.no_grad(): pooled = reference.vision_model(torch.stack(pixels)).last_hidden_state.mean(1)
    expected = F.normalize(pooled @ state["vision_model.projection_head.weight"].T, dim=1)
    torch.testing.assert_close(medclip_images(model, pictures), expected, rtol=1e-4, atol=1e-5)


def test_images_in_batches(model, pictures):
    whole = medclip_images(model, pictures)
    assert whole.shape == (3, 512) and not whole.requires_grad and (whole @ whole.T).fill_diagonal_(0).max() < 0.9999
    torch.testing.assert_close(whole, torch.cat([medclip_images(model, [file]) for file in pictures]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole, medclip_images(model, iter(pictures), batch_size=2), rtol=1e-4, atol=1e-5)
    with pytest.raises(DataError, match="lost.png"): medclip_images(model, [pictures[0].with_name("lost.png")])


def test_tokens_are_those_of_transformers(model, reference):
    "Small letters, start, end and padding as AutoTokenizer gives them for a repository without a tokenizer's configuration."
    theirs = reference.tokenizer(SENTENCES, padding=True, return_tensors="pt")
    ids, mask = medclip_tokens(model, SENTENCES)
    assert torch.equal(ids, theirs.input_ids) and torch.equal(mask, theirs.attention_mask)
    assert torch.equal(medclip_tokens(model, [text.upper() for text in SENTENCES])[0], ids) and len(set(mask.sum(1).tolist())) > 2


@pytest.mark.parametrize("count_padding", [True, False])
def test_texts_are_those_of_transformers(count_padding, model, reference, state):
    "The mean of blocks 1, 2 and 12 over all tokens, written out; without padding each sentence is encoded alone."
    def direct(texts):
        inputs = reference.tokenizer(texts, padding=True, return_tensors="pt")
        with torch.no_grad(): hidden = reference.text_model(**inputs, output_hidden_states=True).hidden_states
        assert len(hidden) == 13
        return torch.stack([hidden[1], hidden[2], hidden[12]]).mean(2).mean(0) @ state["text_model.projection_head.weight"].T

    expected = direct(SENTENCES) if count_padding else torch.cat([direct([text]) for text in SENTENCES])
    found = medclip_texts(model, SENTENCES, count_padding=count_padding)
    torch.testing.assert_close(found, F.normalize(expected, dim=1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, medclip_texts(model, iter(SENTENCES), 3, count_padding), rtol=1e-4, atol=1e-5)
    single = torch.cat([medclip_texts(model, [text], count_padding=count_padding) for text in SENTENCES])
    assert torch.allclose(found, single, rtol=1e-4, atol=1e-5) is not count_padding


@pytest.mark.parametrize("count_padding", [True, False])
def test_a_sign_does_not_depend_on_other_signs(count_padding, model):
    features, anchor = medclip_text_features(model, SIGNS, count_padding)
    assert features.shape == (3, 512) and anchor.shape == (512,)
    part, same = medclip_text_features(model, restrict(SIGNS, ["Dural thickening"]), count_padding)
    torch.testing.assert_close(part[0], features[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(same, anchor, rtol=1e-4, atol=1e-5)
    texts = medclip_texts(model, ["a scan of the brain with a thick dura", "a thick dura"], count_padding=count_padding)
    torch.testing.assert_close(part[0], F.normalize(texts.sum(0), dim=0), rtol=1e-4, atol=1e-5)


def test_long_prompt_is_refused_before_the_work(model, monkeypatch):
    signs = SignSet("brain", SIGNS.normal, {"Lesion": ("spot " * 40,)}, SIGNS.templates)
    monkeypatch.setattr(medclip, "medclip_texts", lambda *words, **more: pytest.fail("work was started"))
    with pytest.raises(ValueError, match="tokens but MedCLIP reads 77: shorten the sign.*spot"): medclip_text_features(model, signs)


QUERY, POSITIONS = "vision_model.model.encoder.layers.2.blocks.5.attention.self.query.weight", "text_model.model.embeddings.position_ids"
INDEX, HEAD = QUERY.replace("query.weight", "relative_position_index"), "text_model.projection_head"


def without(state, part): return {name: value for name, value in state.items() if part not in name}


FAULTS = {  # what is done to the authors' weights, and what is said of it
    "renamed": (lambda state: without(state, QUERY) | {"vision.query": state[QUERY]}, "vision.query has no place; .*query.weight is missing"),
    "missing": (lambda state: without(state, QUERY), "query.weight is missing"),
    "no temperature": (lambda state: without(state, "logit_scale"), "logit_scale is missing"),
    "extra": (lambda state: state | {f"{HEAD}.bias": torch.zeros(512)}, "projection_head.bias has no place"),
    "twice": (lambda state: state | {medclip.current_name(QUERY, ()): state[QUERY]}, "(there twice|has no place)"),
    "shape": (lambda state: state | {QUERY: state[QUERY][:-1]}, r"query.weight is \(383, 384\) and not \(384, 384\)"),
    "turned": (lambda state: state | {f"{HEAD}.weight": state[f"{HEAD}.weight"].T}, r"\(768, 512\) and not \(512, 768\)"),
    "other positions": (lambda state: state | {POSITIONS: state[POSITIONS] + 1}, "position_ids has other values"),
    "other index": (lambda state: state | {INDEX: state[INDEX].T.contiguous()}, "relative_position_index has other values"),
    "image tower alone": (lambda state: without(state, "text_model"), "is missing.* more"),
    "other prefix": (lambda state: {f"module.{name}": value for name, value in state.items()}, "module.* has no place.* more"),
    "ResNet": (lambda state: without(state, "vision_model") | {"vision_model.model.layer1.0.conv1.weight": torch.zeros(1)}, "ResNet-50"),
    "empty": (lambda state: {}, "is missing.* more"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_wrong_weights_are_refused(fault, state, model):
    "Whatever does not fit is named, with the remedy, and nothing is half loaded."
    change, words = FAULTS[fault]
    with pytest.raises(ValueError, match=f"^weights.bin .*{words}") as raised: place_weights(model.network, change(state), "weights.bin")
    assert MEDCLIP_URL in str(raised.value) and "\n" not in str(raised.value) and len(str(raised.value)) < 700
    torch.testing.assert_close(medclip.authors_state(model.network), state, rtol=0, atol=0)


@pytest.mark.parametrize("buffers", [(POSITIONS,), (INDEX,), (POSITIONS, INDEX)])
def test_buffers_may_be_absent(buffers, state, model):
    "Files from a later transformers, or those from which users have deleted position_ids, are whole."
    place_weights(model.network, {name: value for name, value in state.items() if name not in buffers}, "weights.bin")
    torch.testing.assert_close(medclip.authors_state(model.network), state, rtol=0, atol=0)


@pytest.fixture
def broken(folder, tmp_path):
    "A folder with the vocabulary, for a file of weights that is put there."
    (tmp_path / "vocab.txt").write_bytes((folder / "vocab.txt").read_bytes())
    return tmp_path


@pytest.mark.parametrize("content", [[torch.ones(2)], {"state_dict": {"a": torch.ones(2)}}, {"a": 1}, SimpleNamespace(a=1), torch.nn.Linear(2, 2)],
                         ids=["list", "nested", "number", "object", "module"])
def test_foreign_objects_are_refused(content, broken):
    torch.save(content, broken / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin (is cut off or is not|holds something else)") as raised: load_medclip(broken)
    assert MEDCLIP_URL in str(raised.value) and "\n" not in str(raised.value)


def test_nothing_is_executed(broken):
    "A pickle that would write a file does not."
    class Trap:
        def __reduce__(self): return exec, (f"open({str(broken / 'written')!r}, 'w')",)

    torch.save({"a": Trap()}, broken / "pytorch_model.bin")
    with pytest.raises(ValueError, match="pytorch_model.bin"): load_medclip(broken)
    assert not (broken / "written").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
def test_cut_off_files_are_refused(name, folder, broken):
    if name.endswith("bin"):
        with (folder / name).open("rb") as whole: (broken / name).write_bytes(whole.read(10**6))
    else:
        save_file({"a": torch.ones(1000)}, broken / name)
        (broken / name).write_bytes((broken / name).read_bytes()[:500])
    with pytest.raises(ValueError, match=f"{name} is cut off.*again") as raised: load_medclip(broken)
    assert MEDCLIP_URL in str(raised.value)


def test_missing_weights(tmp_path):
    for path in (tmp_path, tmp_path / "nowhere", tmp_path / "pytorch_model.bin"):
        with pytest.raises(FileNotFoundError, match="no weights of MedCLIP.*unpack") as raised: load_medclip(path)
        assert MEDCLIP_URL in str(raised.value) and str(path) in str(raised.value)


def hub(monkeypatch, download):
    "Put a stand-in in the place of the hub."
    real = medclip.medclip_package
    stand_in = SimpleNamespace(hf_hub_download=download)
    monkeypatch.setattr(medclip, "medclip_package", lambda name: stand_in if name == "huggingface_hub" else real(name))


def test_missing_vocabulary(tmp_path, monkeypatch):
    "It is asked for before the weights are read: these could not be."
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    def offline(*_): raise ConnectionError("no route\nto the hub")

    hub(monkeypatch, offline)
    with pytest.raises(FileNotFoundError, match=f"vocab.txt is missing.*no route to the hub.*copy vocab.txt of .*{BERT_NAME}"): load_medclip(tmp_path)


def test_vocabulary_from_the_hub(folder, tmp_path, monkeypatch):
    def download(*names):
        assert names == (BERT_NAME, "vocab.txt")
        return str(folder / "vocab.txt")

    hub(monkeypatch, download)
    assert medclip.vocabulary_file(tmp_path) == folder / "vocab.txt"


@pytest.mark.parametrize("count", [30522, 28995])
def test_another_models_vocabulary(count, broken):
    words = (broken / "vocab.txt").read_text().splitlines() + [f"more{number}" for number in range(2000)]
    (broken / "vocab.txt").write_text("\n".join(words[:count]) + "\n")
    (broken / "pytorch_model.bin").write_bytes(b"not read")
    with pytest.raises(ValueError, match=f"vocab.txt is not the vocabulary of {BERT_NAME}.*copy"): load_medclip(broken)


def test_without_transformers(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"MedCLIP needs the package transformers: pip install 'sdmad_nb\[medclip\]'"): load_medclip(folder)
    with pytest.raises(ImportError, match=r"sdmad_nb\[medclip\]"): random_medclip()


def test_module_is_imported_without_transformers():
    code = "import sys; sys.modules.update(transformers=None, tokenizers=None); import sdmad_nb.methods.medclip"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_cache(model, pictures, tmp_path, monkeypatch, capsys):
    "Each picture is encoded once, whatever its name and place in the list; damaged and foreign files are made anew."
    seen = []
    monkeypatch.setattr(medclip, "medclip_images", lambda model, images, size: (seen.extend(images), medclip_images(model, images, size))[1])
    copy = tmp_path / "copy.png"
    copy.write_bytes(pictures[0].read_bytes())
    made = medclip_features(model, [*pictures, copy], tmp_path / "cache", batch_size=2)
    torch.testing.assert_close(made, medclip_images(model, [*pictures, copy]), rtol=1e-4, atol=1e-5)
    assert len(seen) == 3 and torch.equal(made[0], made[3])
    files = sorted((tmp_path / "cache").rglob("*.*"))
    assert [file.parent.name for file in files] == [f"{model.fingerprint}-medclip"] * 3 and not seen.clear()
    assert torch.equal(medclip_features(model, pictures[::-1], tmp_path / "cache"), made[[2, 1, 0]]) and not seen
    files[0].write_bytes(files[0].read_bytes()[:90])
    save_file({"feature": torch.ones(3)}, files[1])
    save_file({"tokens": torch.ones(512)}, files[2])
    capsys.readouterr()
    torch.testing.assert_close(medclip_features(model, pictures, tmp_path / "cache"), made[:3], rtol=1e-4, atol=1e-5)
    said = capsys.readouterr().out
    assert len(seen) == 3 and all(f"cache file {file.name} is damaged: computing it again" in said for file in files)
    other = medclip_features(random_medclip(seed=4), pictures, tmp_path / "cache")
    assert len(seen) == 6 and not torch.allclose(other, made[:3], atol=1e-3)


def test_authors_example():
    "With the published weights, the two texts of the authors' notebook score as two users report (issue 29 of their repository)."
    folder = REAL / "medclip"  # pytorch_model.bin, vocab.txt, and example_data/view1_frontal.jpg of the authors' repository
    if not (folder / "pytorch_model.bin").is_file(): pytest.skip(f"no weights of MedCLIP in {folder}")
    model = load_medclip(folder)
    if not (folder / "view1_frontal.jpg").is_file(): pytest.skip(f"the weights fit; no view1_frontal.jpg in {folder}")
    texts = medclip_texts(model, ["lungs remain severely hyperinflated with upper lobe emphysema",
                                  "opacity left costophrenic angle is new since prior exam ___ represent some loculated fluid cavitation unlikely"])
    scale = model.network.logit_scale.clamp(0, 4.6052).exp()  # as the authors hold it
    logits = scale * medclip_images(model, [folder / "view1_frontal.jpg"]) @ texts.T
    torch.testing.assert_close(logits, torch.tensor([[0.1729, 0.3899]]), rtol=0, atol=0.005)
