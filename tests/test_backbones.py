"""The real CLIP architectures go through the same code as the demo's, and what does not fit is refused.

No weights are downloaded: a checkpoint file with made-up weights in half precision stands in for the published one.
"""
import json
import math
import pickle
import time
import zipfile
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import huggingface_hub
import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, safe_open, save_file
from torch.nn import functional as F

from sdmad_nb.app.sdmad import SDMAD
from sdmad_nb.core.adapters import make_adapters
from sdmad_nb.core.clip import Features, encode_prompts, freeze_clip, image_features, run_blocks, text_features
from sdmad_nb.core.config import Config, resolve_layers, torch_generator
from sdmad_nb.core.detector import AdaptedDetector, Support, load, predict, save
from sdmad_nb.core.signs import SignSet, normal_prompts, sign_prompts, write_signs
from sdmad_nb.data import backbones
from sdmad_nb.data.backbones import _read_torchscript, backbone_seen, check_clip, list_backbones, load_clip, load_demo_clip, resize_input
from sdmad_nb.data.cache import Cache
from sdmad_nb.data.images import ImageFiles

BIOMEDCLIP = "hf-hub:microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"
ASSETS = Path(backbones.__file__).parent.parent / "assets"
LABELS = torch.eye(2)
SIGNS = SignSet("brain", ("a normal {object}", "a healthy {object}"),
                {"Lesion": ("a bright spot", "a dark spot"), "Dural thickening": ("a thick dura",)},
                ("a scan of the {object} with {sign}", "{sign}"))


def made_up(state):  # tensors without content -> tensors in half precision, whole numbers as they are counted
    "Fill a state from one pool of numbers: drawing 400 million takes longer than the test."
    pool = (0.03 * torch.randn(2**20 + 7, generator=torch_generator(0, "weights"))).half()
    pool = pool.repeat(1 + max(value.numel() for value in state.values()) // 2**20)

    def fill(key, value, place):
        if not value.is_floating_point(): return torch.arange(value.numel()).reshape(value.shape)
        if value.ndim == 0: return torch.tensor(math.log(100)).half()
        norm_or_bias = value.ndim == 1 and not key.endswith("class_embedding")
        if norm_or_bias: return torch.full(value.shape, float(key.endswith("weight"))).half()
        return pool[place:place + value.numel()].clone().view(value.shape)

    return {key: fill(key, value, place) for place, (key, value) in enumerate(state.items())}


def write_checkpoint(name, path):  # the state that was written
    "Write a checkpoint for an open_clip name, as safetensors or in torch's own format."
    with torch.device("meta"): model = open_clip.create_model(name, device="meta", pretrained_text=False)
    state = made_up(model.state_dict())
    (save_file if path.suffix == ".safetensors" else torch.save)(state, path)
    return state


def write_images(folder):  # two files
    "Write small pictures that are not square."
    files = [folder / f"{number}.png" for number in range(2)]
    for number, file in enumerate(files):
        pixels = np.random.default_rng(number).integers(0, 256, (70, 90, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
    return files


def check_caches(clip, files, features, first):
    "Compare what was kept on disk with open_clip's own encoders."
    still = make_adapters(clip, Config(lam=1.0))
    with torch.no_grad():
        pixels = torch.stack([clip.preprocess(Image.open(file)) for file in files])
        whole = F.normalize(clip.model.encode_image(pixels), dim=-1)
        torch.testing.assert_close(image_features(clip, features.tokens(first), first, still.image), whole, rtol=0, atol=0)
        groups = [clip.tokenizer(list(group)) for group in (*sign_prompts(SIGNS), normal_prompts(SIGNS))]
        means = F.normalize(torch.stack([F.normalize(clip.model.encode_text(ids), dim=-1).mean(0) for ids in groups]), dim=-1)
        sign_features, anchor = text_features(clip, encode_prompts(clip, SIGNS), still.text)
    # not to the last bit: here each sign is a batch of its own, and its mean is summed in another order
    torch.testing.assert_close(torch.cat([sign_features, anchor[None]]), means, rtol=1e-4, atol=1e-5)


def check_whole_method(loaded, layers, folder):  # the fitted detector
    "Fill the cache, take one training step, predict; check what each may and may not do."
    assert resolve_layers("quarters", loaded.depth) == layers
    clip, files = replace(loaded, cache=Cache(folder / "cache")), write_images(folder)
    features = Features(clip, ImageFiles(files))
    check_caches(clip, files, features, layers[0])
    fitted = AdaptedDetector.fit(Support(features, LABELS), clip, SIGNS, Config(epochs=1))
    assert tuple(fitted.adapters.image) == layers and math.isfinite(fitted.history[0])
    assert all(weight.grad.isfinite().all() and weight.grad.any() for weight in fitted.adapters.parameters())
    assert all(weight.grad is None and not weight.requires_grad for weight in clip.model.parameters())
    again = freeze_clip(clip.name, clip.model, clip.tokenizer)
    assert again.fingerprint == clip.fingerprint, "a weight of CLIP has changed"
    said = predict(fitted, features[[1]])
    assert said.scores.shape == (1, 2) and said.scores.isfinite().all() and said.finding_maps.shape[1] == 2
    return fitted


ARCHITECTURES = {  # name: image size, depth, widths of image and text blocks, joint width, patches to a side, layers
    "ViT-B-16-quickgelu": (224, 12, 768, 512, 512, 14, (3, 6, 9, 12)),
    "ViT-L-14-quickgelu": (240, 24, 1024, 768, 768, 17, (6, 12, 18, 24)),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_openai_architecture(name, tmp_path):
    "A checkpoint of a real architecture is loaded, resized, cached, trained on and judged with."
    size, depth, width, text_width, joint, side, layers = ARCHITECTURES[name]
    path = tmp_path / ("weights.pt" if depth == 12 else "weights.safetensors")
    state = write_checkpoint(name, path)
    backbone = load_clip(name, str(path), size)
    path.unlink()
    visual, stored = backbone.model.visual, state["visual.positional_embedding"].float()
    assert (backbone.image_size, backbone.depth, backbone.image.grid) == (size, depth, (side, side))
    assert (backbone.image.width, backbone.text.width, visual.proj.shape[1]) == (width, text_width, joint)
    assert type(visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    torch.testing.assert_close(visual.proj.data, state["visual.proj"].float(), rtol=0, atol=0)
    old = math.isqrt(len(stored) - 1)
    grid = F.interpolate(stored[1:].T.reshape(1, width, old, old), (side, side), mode="bicubic", antialias=True)
    positions = stored if old == side else torch.cat([stored[:1], grid.reshape(width, -1).T])
    torch.testing.assert_close(visual.positional_embedding.data, positions)
    del state
    images = torch.rand(1, 3, size, size, generator=torch_generator(0, "images"))
    dropped = size - side * visual.patch_size[0]  # pixels at the right and lower edge that fill no patch
    assert dropped == size % visual.patch_size[0] == (2 if size == 240 else 0)
    cut = images.clone()
    cut[..., size - dropped:, :], cut[..., size - dropped:] = 0, 0
    torch.testing.assert_close(backbone.image.stem(cut), backbone.image.stem(images), rtol=0, atol=0)
    check_whole_method(backbone, layers, tmp_path)


def write_biomedclip(folder):
    "Write a folder as BiomedCLIP's: its configuration, made-up weights, and a vocabulary of a few words."
    bert = {"architectures": ["BertModel"], "model_type": "bert", "hidden_size": 768, "num_hidden_layers": 12,
            "num_attention_heads": 12, "intermediate_size": 3072, "vocab_size": 30522, "max_position_embeddings": 512,
            "hidden_act": "gelu", "pad_token_id": 0, "type_vocab_size": 2, "layer_norm_eps": 1e-12}
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "brain", "scan", "of", "the", "with", "bright", "dark",
             "spot", "thick", "dura", "normal", "##s"]
    names = {"hf_model_name": str(folder), "hf_tokenizer_name": str(folder), "context_length": 256,
             "hf_proj_type": "mlp", "hf_pooler_type": "cls_last_hidden_state_pooler"}
    vision = {"timm_model_name": "vit_base_patch16_224", "timm_model_pretrained": False, "timm_pool": "",
              "timm_proj": "linear", "image_size": 224}
    config = {"model_cfg": {"embed_dim": 512, "vision_cfg": vision, "text_cfg": names},
              "preprocess_cfg": {"mean": [0.48, 0.46, 0.41], "std": [0.27, 0.26, 0.28]}}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(bert))
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer", "do_lower_case": True}))
    (folder / "open_clip_config.json").write_text(json.dumps(config))


def test_biomedclip_architecture(tmp_path):
    "timm's ViT-B/16 and a BERT, from a folder; a folder without weights is refused, not filled with random ones."
    folder = tmp_path / "biomedclip"
    write_biomedclip(folder)
    with pytest.raises(ValueError, match="local-dir:.* cannot be loaded .*weights.*could not be loaded"):
        load_clip(f"local-dir:{folder}")
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    config["text_cfg"]["hf_model_pretrained"] = False
    with torch.device("meta"): model = open_clip.model.CustomTextCLIP(**config)
    save_file(made_up(model.state_dict()), folder / "open_clip_model.safetensors")
    backbone = load_clip(f"local-dir:{folder}")
    assert (backbone.image_size, backbone.depth, backbone.image.grid) == (224, 12, (14, 14))
    assert (backbone.image.width, backbone.text.width) == (768, 768)
    assert type(backbone.image).__name__ == "_TimmImageTower" and type(backbone.text).__name__ == "_HuggingFaceTextTower"
    assert backbone.preprocess.transforms[-1].mean == [0.48, 0.46, 0.41], "its own normalisation"
    assert backbone.tokenizer(["a brain"]).shape == (1, 256)
    check_whole_method(backbone, (3, 6, 9, 12), tmp_path)
    resize_input(backbone.model, 240)
    larger = freeze_clip(backbone.name, backbone.model, backbone.tokenizer)
    assert larger.image.grid == (15, 15) and larger.fingerprint != backbone.fingerprint
    with torch.no_grad():
        images = torch.rand(1, 3, 240, 240, generator=torch_generator(0, "images"))
        tokens = run_blocks(larger, larger.image.stem(images), 0, 12)
        torch.testing.assert_close(larger.image.head(tokens), larger.model.encode_image(images), rtol=0, atol=0)


TINY = dict(embed_dim=24, vision_cfg=dict(image_size=64, layers=6, width=96, head_width=32, patch_size=8),
            text_cfg=dict(context_length=77, vocab_size=49408, width=48, heads=3, layers=3))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    "Teach open_clip three names, tiny, tiny-quickgelu and tiny-wide; return a folder with a checkpoint of each."
    folder = tmp_path_factory.mktemp("tiny")
    wide = {**TINY, "vision_cfg": {**TINY["vision_cfg"], "width": 128}}
    for name, config in (("tiny", TINY), ("tiny-quickgelu", {**TINY, "quick_gelu": True}), ("tiny-wide", wide)):
        (folder / f"{name}.json").write_text(json.dumps(config))
        open_clip.add_model_config(folder / f"{name}.json")
        write_checkpoint(name, folder / f"{name}.pt")
        write_checkpoint(name, folder / f"{name}.safetensors")
    return folder


@pytest.mark.parametrize("image_size", [0, 75])
def test_another_width_depth_and_patch_size(image_size, tiny, tmp_path):
    "Nothing of the demo's shape is assumed, from the pixels to a saved detector."
    backbone = load_clip("tiny-quickgelu", tiny / "tiny-quickgelu.safetensors", image_size)
    side = (image_size or 64) // 8
    assert (backbone.depth, backbone.image.width, backbone.image.grid) == (6, 96, (side, side))
    fitted = check_whole_method(backbone, (2, 3, 4, 6), tmp_path)
    assert fitted.adapters.image[2].down.weight.shape == (72, 96) and fitted.adapters.text.up.weight.shape == (48, 36)
    features = Features(backbone, ImageFiles(write_images(tmp_path)))
    trained = AdaptedDetector.fit(Support(features, LABELS), backbone, SIGNS, Config(epochs=20))
    assert trained.history[-1] < trained.history[0]
    again = load(save(trained, tmp_path / "detector.safetensors"), backbone, AdaptedDetector)
    ours, theirs = predict(trained, features), predict(again, features)
    assert torch.equal(ours.scores, theirs.scores) and torch.equal(ours.labels, theirs.labels)


class Tree(torch.nn.Module):
    "A module whose tensors have the given names, as OpenAI's archives have."
    def __init__(self, state):
        super().__init__()
        groups = {}
        for key, value in state.items():
            name, _, rest = key.partition(".")
            if rest: groups.setdefault(name, {})[rest] = value
            else: self.register_buffer(name, value)
        for name, group in groups.items(): self.add_module(name, Tree(group))

    def forward(self, x): return x


@pytest.fixture(scope="module")
def archive(tiny):  # and its state
    "Write a TorchScript archive with the tensors of tiny-quickgelu beside OpenAI's three sizes."
    state = torch.load(tiny / "tiny-quickgelu.pt")
    sizes = {name: torch.tensor(7) for name in ("input_resolution", "context_length", "vocab_size")}
    path = tiny / "archive.pt"
    torch.jit.save(torch.jit.script(Tree({**state, **sizes})), path)
    assert any("/code/" in name for name in zipfile.ZipFile(path).namelist())
    return path, state


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning")
def test_openai_archive(tiny, archive):
    "OpenAI's own files need QuickGELU, and load with it."
    path, state = archive
    with pytest.raises(ValueError, match="'tiny' lacks QuickGELU.*use backbone 'tiny-quickgelu'"):
        load_clip("tiny", path)
    backbone = load_clip("tiny-quickgelu", path, image_size=72)
    torch.testing.assert_close(backbone.model.visual.proj, state["visual.proj"].float(), rtol=0, atol=0)
    assert backbone.image.grid == (9, 9)
    refused(("tiny-wide", path), "tiny-wide", "archive.pt")


@pytest.mark.filterwarnings("ignore:`torch.jit:FutureWarning", "ignore:`torch.jit:DeprecationWarning",
                            "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("compiled", [torch.jit.script, lambda model: torch.jit.trace(
    model, (torch.rand(1, 3, 64, 64), torch.zeros(1, 77, dtype=torch.long)), check_trace=False)], ids=["script", "trace"])
def test_an_archive_is_read_as_torch_reads_it(compiled, tmp_path):
    "A whole CLIP, scripted and traced: the same names in the same order, the same types and the same numbers."
    torch.jit.save(compiled(open_clip.model.CLIP(**TINY).eval()), tmp_path / "clip.pt")
    ours, theirs = _read_torchscript(tmp_path / "clip.pt"), torch.jit.load(tmp_path / "clip.pt").state_dict()
    assert list(ours) == list(theirs) and len(ours) > 100
    for name, value in theirs.items(): torch.testing.assert_close(ours[name], value, rtol=0, atol=0, check_stride=True)


class Attack:
    "A pickle that would write a file while it is read."
    def __init__(self, file): self.file = file

    def __reduce__(self): return exec, (f"open({str(self.file)!r}, 'w').close()",)


def test_nothing_in_a_checkpoint_is_run(tiny, archive, tmp_path):
    "Neither in a TorchScript archive, whether or not its pickle has tensors too, nor in torch's own format."
    target, (path, state) = tmp_path / "was here", archive
    with zipfile.ZipFile(path) as old: parts = {name: old.read(name) for name in old.namelist()}
    name = next(name for name in parts if name.endswith("/data.pkl"))
    for content in (pickle.dumps(Attack(target)), pickle.dumps(Attack(target))[:-1] + parts[name], b"\x80\x02]."):
        with zipfile.ZipFile(tmp_path / "archive.pt", "w") as new:
            for part, value in {**parts, name: content}.items(): new.writestr(part, value)
        refused(("tiny-quickgelu", tmp_path / "archive.pt"), "archive.pt does not fit", "or is damaged")
    torch.save({**state, "text_projection": Attack(target)}, tmp_path / "plain.pt")
    refused(("tiny-quickgelu", tmp_path / "plain.pt"), "plain.pt does not fit", "or is damaged")
    assert not target.exists()


@pytest.mark.parametrize("place", ["text_cfg", "vision_cfg", "preprocess"])
def test_a_folder_that_would_run_code_is_refused(place, tmp_path):
    "Before a tokenizer or a model is made."
    folder = tmp_path / "biomedclip"
    write_biomedclip(folder)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"].setdefault(place, {})["tokenizer_kwargs"] = [{"trust_remote_code": True}]
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["evil.Evil", None]}}))
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'was here')!r}, 'w').close()")
    refused((f"local-dir:{folder}",), str(folder), "would run Python code of its own (trust_remote_code")
    assert not (tmp_path / "was here").exists()


def test_quickgelu_of_published_weights():
    "A tag is accepted with its activation; with the other one the message names a model that is right for it."
    for name, tag, right in (("ViT-L-14", "openai", "ViT-L-14-quickgelu"), ("ViT-B-16", "openai", "ViT-B-16-quickgelu"),
                             ("ViT-L-14-336", "openai", "ViT-L-14-336-quickgelu"),
                             ("ViT-B-32-quickgelu", "laion2b_s34b_b79k", "ViT-B-32")):
        message = refused((name, tag), f"{name!r} ", "QuickGELU", f"use backbone {right!r}")
        assert open_clip.get_pretrained_cfg(right, tag) and "\n" not in message


def refused(arguments, *says, kind=ValueError):  # the message
    "Check that a backbone is refused at once, in one sentence that says what it should."
    started = time.perf_counter()
    with pytest.raises(kind) as caught: load_clip(*arguments)
    message = str(caught.value)
    assert all(text in message for text in says), message
    assert "\n" not in message and not message.endswith(".") and ". " not in message, f"one sentence: {message}"
    assert time.perf_counter() - started < 15, "at once"
    return message


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_checkpoint_that_does_not_fit(suffix, tiny, tmp_path):
    "Another architecture's checkpoint, a truncated one and a text: the message names file and backbone."
    other, whole = tiny / f"tiny-wide.{suffix}", (tiny / f"tiny.{suffix}").read_bytes()
    assert "size mismatch for" in refused(("tiny", other), other.name, "'tiny'", "choose the backbone it was made for")
    for name, content in (("cut", whole[:len(whole) // 2]), ("stub", whole[:100]), ("text", b"not a checkpoint\n" * 9),
                          ("empty", b"")):
        path = tmp_path / f"{name}.{suffix}"
        path.write_bytes(content)
        refused(("tiny", path), str(path), "'tiny'", "damaged")


def test_what_is_in_no_checkpoint(tiny, tmp_path):
    "A dictionary without weights, and a file of the right form for a backbone that open_clip does not know."
    torch.save({"epoch": 3}, tmp_path / "epoch.pt")
    refused(("tiny", tmp_path / "epoch.pt"), "epoch.pt", "'tiny'")
    refused(("tinny", tiny / "tiny.pt"), "'tinny' is unknown", "ViT-L-14-quickgelu")


def test_names_and_tags_that_do_not_exist():
    refused(("ViT-B-16", "opemai"), "'opemai' is neither a file nor a tag of 'ViT-B-16'", "openai")
    refused(("ViT-B-16", "weights/mine.pt"), "'weights/mine.pt' is neither a file nor a tag")
    refused(("ViT-B-16",), "needs weights", "openai")
    refused((BIOMEDCLIP, "openai"), "brings its own weights")
    refused(("local-dir:nowhere",), "'local-dir:nowhere'", "open_clip_config.json")


def test_without_a_connection(monkeypatch):
    "A hub id or a tag ends in a sentence that says what to do."
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refused((BIOMEDCLIP,), BIOMEDCLIP, "could not be fetched", "use local-dir:folder", kind=ConnectionError)
    refused(("ViT-L-14-quickgelu", "openai"), "'openai'", "'ViT-L-14-quickgelu'", "Failed to download", "pass its path as pretrained",
            kind=ConnectionError)


def test_published_weights_are_asked_of_open_clip(tiny, monkeypatch):
    "By name and tag, which is never looked for as a file; a stand-in answers in the place of the download."
    asked, create = [], open_clip.create_model
    def answer(name, pretrained=None, **options):
        asked.append((name, pretrained))
        return create("tiny-quickgelu", pretrained=str(tiny / "tiny-quickgelu.pt"), **options)
    monkeypatch.setattr(open_clip, "create_model", answer)
    assert load_clip("ViT-L-14-quickgelu", "openai").depth == 6 and asked == [("ViT-L-14-quickgelu", "openai")]


@pytest.mark.parametrize("name, image_size, says", [("RN50-quickgelu", 0, "ModifiedResNet has no transformer blocks"),
                                                    ("RN50-quickgelu", 240, "ModifiedResNet has no transformer blocks"),
                                                    ("coca_ViT-B-32", 0, "cannot be opened behind its last block")])
def test_encoders_that_cannot_be_opened(name, image_size, says):
    refused((name, "random", image_size), says)


def test_an_image_smaller_than_a_patch(tiny):
    refused(("tiny", tiny / "tiny.pt", 7), "image_size is 7", "at least 8")


@pytest.fixture(scope="module")
def small(): return load_clip("small")


def test_the_packaged_small_backbone(small, tmp_path):
    "It is cut at four places, and what is cached is what open_clip's own encoders give."
    assert (small.name, small.depth, small.grid, small.image_size) == ("small", 4, (14, 14), 224)
    assert small.preprocess.transforms[-1].mean == [0.5] * 3, "the stem's own normalisation"
    check_whole_method(small, (1, 2, 3, 4), tmp_path)
    refused(("small", "openai"), "the small backbone has its own weights", "leave pretrained")
    refused(("small", "", 240), "the small backbone has its own weights", "image_size")


def test_what_the_small_backbone_has_read(small):
    "No word is a zero vector, and words that no caption used mean something."
    assert small.model.token_embedding.weight.norm(dim=1).min() > 0.1
    words = ["horse", "donkey", "invoice", "intracranial haemorrhage", "bleeding in the brain", "a broken bone"]
    with torch.no_grad(): vectors = F.normalize(small.model.encode_text(small.tokenizer(words)), dim=-1)
    near = vectors @ vectors.T
    assert near[0, 1] > near[0, 2] and near[3, 4] > near[3, 5]


def test_the_small_backbone_in_the_tool(tmp_path):
    "A model that was fitted on it is kept and opened again."
    folder = tmp_path / "data"
    (folder / "images").mkdir(parents=True)
    files = [file.rename(folder / "images" / file.name) for file in write_images(folder)]
    lines = [f"images/{file.name},{number},{number},{1 - number}" for number, file in enumerate(files)]
    (folder / "labels.csv").write_text("\n".join(["image,patient,Lesion,Dural thickening", *lines]) + "\n")
    write_signs(SIGNS, folder / "signs.json")
    model = SDMAD.fit(folder, config=Config(backbone="small", epochs=1), device="cpu")
    again = SDMAD.load(model.save(tmp_path / "model.safetensors"))
    assert again.detector.clip.name == "small"
    assert model.predict(files).equals(again.predict(files))


@pytest.mark.parametrize("name", ["small", "demo"])
@pytest.mark.parametrize("damage", ["missing", "cut", "flipped", "other", "old"])
def test_a_damaged_packaged_backbone(name, damage, tmp_path):
    "A file that is not there, cut off, changed in one bit, no backbone, or of another version: a sentence with the remedy."
    path, whole = tmp_path / f"{name}_clip.safetensors", ASSETS / f"{name}_clip.safetensors"
    if damage == "cut": path.write_bytes(whole.read_bytes()[:100_000])
    if damage == "flipped": path.write_bytes(whole.read_bytes()[:-1] + bytes([whole.read_bytes()[-1] ^ 1]))
    if damage == "other": save_file({"a": torch.zeros(2)}, path)
    if damage == "old":
        with safe_open(whole, "pt") as stored: notes = stored.metadata()
        state = load_file(whole)
        state["text_projection"] = state["text_projection"][:, :-1].contiguous()
        save_file(state, path, notes)
    kind = FileNotFoundError if damage == "missing" else ValueError
    with pytest.raises(kind, match=f"{path.name} is .*install the package again, or run nbs/train_{name}_clip.ipynb") as caught:
        load_demo_clip(path)
    assert "\n" not in str(caught.value)


LISTED = list_backbones()


def describe(architecture, folder):  # configuration of an open_clip model
    "Read an architecture of the list: of open_clip or with an image encoder of timm, and with BiomedCLIP's text encoder after +BERT."
    name, bert = architecture.removesuffix("+BERT"), architecture.endswith("+BERT")
    write_biomedclip(folder / architecture)
    biomedclip = json.loads((folder / architecture / "open_clip_config.json").read_text())["model_cfg"]
    config = deepcopy(open_clip.get_model_config(name) or {**biomedclip, "vision_cfg": {**biomedclip["vision_cfg"], "timm_model_name": name}})
    if bert: config["text_cfg"] = {**biomedclip["text_cfg"], "hf_model_pretrained": False}
    return config, open_clip.model.CustomTextCLIP if config.pop("custom_text", bert) else open_clip.model.CLIP


def shrink(config, monkeypatch):
    "Leave two narrow blocks of each tower, and all their kinds of layer."
    config["embed_dim"], text, vision = 64, config["text_cfg"], config["vision_cfg"]
    if "timm_model_name" in vision:
        monkeypatch.setattr(timm, "create_model", partial(timm.create_model, depth=2, embed_dim=64, num_heads=2))
    else: vision |= dict(layers=2, width=64, head_width=32)
    if "hf_model_name" not in text:
        text |= dict(layers=2, width=64, heads=2)
        return
    file = Path(text["hf_model_name"]) / "config.json"
    small = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    file.write_text(json.dumps(json.loads(file.read_text()) | small))


@pytest.mark.parametrize("architecture", sorted(set(LISTED.architecture) - {"", "demo", "small"}))
def test_which_architectures_of_the_list_open(architecture, tmp_path, monkeypatch):
    "The columns `tested` and `parameters` say what opens and what is counted; what opens gives open_clip's own features."
    rows = LISTED[LISTED.architecture == architecture]
    config, kind = describe(architecture, tmp_path)
    with torch.device("meta"): whole = kind(**config)
    counted = str(round(sum(weight.numel() for weight in whole.parameters()) / 1e6))
    assert set(rows.parameters) <= {counted, "not checked"}
    if set(rows.tested) == {"no"}:
        with pytest.raises(ValueError, match="has no transformer blocks|cannot be opened"): freeze_clip("listed", whole, None, device="meta")
        return
    assert set(rows.tested) == {"yes"}
    shrink(config, monkeypatch)
    opened = freeze_clip("listed", kind(**config), None)
    images = torch.rand(1, 3, opened.image_size, opened.image_size, generator=torch_generator(0, "images"))
    ids = torch.randint(1, 1000, (2, config["text_cfg"]["context_length"]), generator=torch_generator(0, "words"))
    with torch.no_grad():
        tokens = run_blocks(opened, opened.image.stem(images), 0, opened.depth)
        torch.testing.assert_close(opened.image.head(tokens), opened.model.encode_image(images), rtol=0, atol=0)
        torch.testing.assert_close(opened.text.head(opened.text.last(ids)), opened.model.encode_text(ids))
        assert opened.image.project(tokens[:, -math.prod(opened.grid):]).shape == (1, math.prod(opened.grid), 64)


def test_the_list_of_backbones():
    "Each row is complete, what it names can be loaded, and what has no architecture was not tested."
    assert not (LISTED.drop(columns=["backbone", "pretrained", "architecture", "how"]) == "").any(axis=None)
    assert LISTED.name.is_unique and set(LISTED.tested) == {"yes", "no"} and set(LISTED[LISTED.architecture == ""].tested) == {"no"}
    assert (LISTED.source.str.startswith("https://") | LISTED.backbone.isin(["demo", "small"])).all()
    for row in LISTED.itertuples():
        assert row.backbone or row.how, f"{row.name}: neither a name nor what to do"
        if row.backbone and not row.pretrained.endswith(".pt"): check_clip(row.backbone, row.pretrained)
    for name in ("demo", "small"):
        [row] = LISTED[LISTED.name == name].itertuples()
        packaged = load_clip(name)
        size = sum(weight.numel() for weight in packaged.model.parameters())
        assert (row.pixels, row.parameters) == (str(packaged.image_size), str(round(size / 1e6)))
    for row in LISTED[LISTED.backbone != ""].itertuples():
        assert backbone_seen(Config(backbone=row.backbone, pretrained=row.pretrained)) == row.seen
