"""MedCLIP in its real size, with random weights: the authors' file is loaded whole or refused."""
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import REAL
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import BertConfig, BertModel, SwinConfig, SwinModel

from sdmad_nb.methods import medclip
from sdmad_nb.methods.medclip import load_medclip

QUERY = "vision_model.model.encoder.layers.2.blocks.5.attention.self.query.weight"
HEAD = "vision_model.projection_head.weight"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "Write random encoders with the names of 2022, positions included, beside a vocabulary of the right size."
    folder = tmp_path_factory.mktemp("medclip")
    state = {"logit_scale": torch.tensor(2.66), "text_model.model.embeddings.position_ids": torch.arange(512)[None],
             QUERY.replace("query.weight", "relative_position_index"): torch.zeros(49, 49)}
    with torch.random.fork_rng(), torch.no_grad():
        towers = {"vision": SwinModel(SwinConfig()).eval(), "text": BertModel(BertConfig(vocab_size=28996)).eval()}
        for part, tower in towers.items():
            for weight in tower.parameters(): weight.add_(torch.rand_like(weight), alpha=0.04)  # no two are alike
            tower.save_pretrained(folder / part)
            weights = load_file(folder / part / "model.safetensors")
            state |= {f"{part}_model.model.{name}": value for name, value in weights.items()}
            state[f"{part}_model.projection_head.weight"] = torch.randn(512, 768)
    torch.save(state, folder / "pytorch_model.bin")
    unused = [f"[unused{number}]" for number in range(28996)]
    words = ["[PAD]", *unused[1:100], "[UNK]", "[CLS]", "[SEP]", "[MASK]", "brain", "a", "dark", "spot", "t", "##2"]
    (folder / "vocab.txt").write_text("\n".join([*words, *unused[len(words):]]) + "\n")
    return SimpleNamespace(folder=folder, state=state, **towers)


def test_features_are_those_of_the_encoders_that_were_written(made):
    "Image features, and the mean of blocks 1, 2 and 12 over all tokens; the file has names that are Swin's no more."
    model, state = load_medclip(made.folder), made.state
    pixels, tokens = torch.randn(2, 3, 224, 224), model.tokenize(["A dark spot", "a brain", "T2"])
    assert tokens["input_ids"].tolist() == [[101, 105, 106, 107, 102], [101, 105, 104, 102, 0], [101, 108, 109, 102, 0]]
    with torch.no_grad():
        patches = made.vision(pixels).last_hidden_state.mean(1)
        hidden = made.text(**tokens, output_hidden_states=True).hidden_states
    means = torch.stack([hidden[1], hidden[2], hidden[12]]).mean(2).mean(0)
    assert QUERY in state and len(state) == 421 + 2
    for found, pooled, head in ((model.encode_images(pixels), patches, state[HEAD]),
                                (model.encode_texts(tokens), means, state[HEAD.replace("vision", "text")])):
        torch.testing.assert_close(found, F.normalize(pooled @ head.T, dim=1), rtol=1e-4, atol=1e-5)


def without(state, part): return {name: value for name, value in state.items() if part not in name}


@pytest.mark.parametrize("change, says", [
    (lambda s: without(s, QUERY) | {"vision_model.model.query": s[QUERY]}, "query has no place"),
    (lambda s: without(s, QUERY), "q.*weight is missing"),
    (lambda s: s | {HEAD.replace("weight", "bias"): torch.zeros(512)}, "projection_head.bias has no place"),
    (lambda s: s | {QUERY: s[QUERY][:-1]}, r"is \(383, 384\) and not \(384, 384\)"),
    (lambda s: s | {HEAD: s[HEAD].T}, r"projection_head.weight is \(768, 512\) and not \(512, 768\)"),
    (lambda s: {"vision_model.model.layer1.0.conv1.weight": torch.zeros(1)}, "conv1.weight has no place")])
def test_wrong_weights_are_found(change, says, made):
    faults = medclip._load_part("vision_model.", SwinModel, SwinConfig(), change(made.state), "cpu")[1]
    assert any(re.search(says, fault) for fault in faults)


def test_a_file_that_does_not_fit_is_refused_whole(made, monkeypatch):
    monkeypatch.setattr(medclip, "_read_weights", lambda file: without(made.state, QUERY) | {"extra": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"bin does not fit MedCLIP \(.*is missing.*2 in all\): fetch medclip"):
        load_medclip(made.folder)


class Trap:
    def __reduce__(self): return exec, ("open('written', 'w')",)


@pytest.mark.parametrize("content", [[torch.ones(2)], {"table": {"a": torch.ones(2)}}, {"a": 1}, Trap(), None])
def test_foreign_objects_are_refused(content, tmp_path, monkeypatch):
    "So is a file that is cut off, and nothing in it is executed."
    monkeypatch.chdir(tmp_path)
    torch.save(content, file := tmp_path / "weights.bin")
    if content is None: file.write_bytes(file.read_bytes()[:99])
    with pytest.raises(ValueError, match="weights.bin is packed, cut off .*: fetch"): medclip._read_weights(file)
    assert not (tmp_path / "written").exists()


def test_wrong_vocabulary(made, tmp_path):
    "It is read before the weights: these could not be."
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    words = (made.folder / "vocab.txt").read_text().splitlines()
    for wrong in (None, words[:-1], words[1:] + ["more"]):
        if wrong: (tmp_path / "vocab.txt").write_text("\n".join(wrong) + "\n")
        with pytest.raises(ValueError, match="vocab.txt is missing or not.*copy vocab.txt"): load_medclip(tmp_path)


def test_without_transformers(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r"transformers: pip install 'sdmad_nb\[medclip\]'"): load_medclip(made.folder)
    code = "import sys; sys.modules.update(transformers=None, tokenizers=None); import sdmad_nb.methods.medclip"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_authors_example():
    "With the published weights, two texts of the authors' notebook score as two users report (issue 29 of theirs)."
    folder = REAL / "medclip"  # pytorch_model.bin, vocab.txt, and example_data/view1_frontal.jpg of their repository
    if not (folder / "view1_frontal.jpg").is_file(): pytest.skip(f"no weights of MedCLIP, or no picture, in {folder}")
    texts = ("lungs remain severely hyperinflated with upper lobe emphysema", "opacity left costophrenic angle is new "
             "since prior exam ___ represent some loculated fluid cavitation unlikely")
    model = load_medclip(folder)
    image = model.encode_images(medclip._prepare(Image.open(folder / "view1_frontal.jpg"))[None])
    scale = torch.load(folder / "pytorch_model.bin", weights_only=True)["logit_scale"].clamp(0, 4.6052).exp()
    logits = scale * image @ model.encode_texts(model.tokenize(texts)).T
    torch.testing.assert_close(logits, torch.tensor([[0.1729, 0.3899]]), rtol=0, atol=0.005)
