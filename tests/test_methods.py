"Every method keeps the one contract: fitted on a few shots, it predicts any image, and is kept in one small file."
import copy
import gc
import weakref
from dataclasses import fields

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode

from sdmad_nb.core import decisions, scores
from sdmad_nb.core.clip import Features, fingerprint, freeze_clip
from sdmad_nb.core.config import Config
from sdmad_nb.core.detector import Prediction, Support, predict, save
from sdmad_nb.core.signs import SignSet
from sdmad_nb.methods.registry import find_method, find_methods, load_detector

SIDE = 56  # pixels, the input of the small CLIP
LABELS = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [0, 1, 1], [0, 0, 0], [0, 0, 0]]).float()
LEADING = {"anomaly": (), "scores": (3,), "labels": (3,), "anomaly_map": (), "finding_maps": (3,)}  # behind the images
SIGNS = SignSet(object="plate", normal=("a plain {object}", "a clean {object}"),
                signs={"dot": ("a bright dot", "a spot"), "line": ("a line", "a scratch"), "rim": ("a thick rim",)},
                templates=("a photo of the {object} with {sign}", "a {object} showing {sign}"))


class Pictures(list):
    "A list that can be referred to weakly, so that a test sees whether anything still holds it."


def picture(number, abnormal):
    "Draw noise, with a bright square where the picture is abnormal; wider than high, as scans may be."
    pixels = np.random.default_rng(number).integers(0, 150, (50, 60, 3), dtype=np.uint8)
    if abnormal: pixels[10:25, 12:30] += 100
    return Image.fromarray(pixels)


def small_clip():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.model.CLIP(embed_dim=32, quick_gelu=True, text_cfg=dict(width=32, heads=2, layers=2),
                                     vision_cfg=dict(image_size=SIDE, layers=4, width=64, head_width=32, patch_size=14))
    return freeze_clip("tiny", model, open_clip.get_tokenizer("ViT-B-32"))


@pytest.fixture(scope="module")
def clip(): return small_clip()


def support_of(clip, rows=range(7)):
    "Make a support set of shots with several findings, of which one has no known mask, and of normal ones."
    labels, masks = LABELS[list(rows)], torch.zeros(len(rows), SIDE, SIDE)
    masks[labels.any(1), 11:28, 11:28] = 1
    known = torch.tensor([row != 2 for row in rows])
    return Support(Features(clip, Pictures(picture(row, LABELS[row].any()) for row in rows)), labels, masks, known)


def fit(method, support, clip):
    "Fit a method; skip the test, with the reason, where what the method says it needs is not here."
    oracle = {"test": support} if method.oracle else {}
    try: return method.fit(support, clip, SIGNS, Config(epochs=2), **oracle)
    except (ImportError, ValueError) as error:
        if not method.note: raise
        pytest.skip(str(error))


def given(prediction):
    "Collect what a prediction holds."
    return {part.name: value for part in fields(prediction) if (value := getattr(prediction, part.name)) is not None}


def check_form(prediction, names, count):
    "Exactly the promised fields are there, finite and of the promised shapes."
    values = given(prediction)
    assert set(values) == set(names)
    for name, value in values.items():
        leading = (count, *LEADING[name])
        assert value.shape[:len(leading)] == leading and value.ndim == len(leading) + 2 * ("map" in name), name
        assert value.dtype == (torch.bool if name == "labels" else torch.float32) and value.isfinite().all(), name
        assert value.device.type == "cpu" and not value.requires_grad, name
    assert len({value.shape[-2:] for name, value in values.items() if "map" in name}) <= 1, "maps of one size"


def check_equal(one, other, **tolerance):
    for name, value in given(one).items():
        torch.testing.assert_close(getattr(other, name), value, **tolerance, msg=lambda text: f"{name}: {text}")


def check_needs(method, clip):
    "A method fits without normal images, and without abnormal ones, or has said that it needs them."
    for rows, kind in ((range(5), {"normal", "both"}), (range(5, 7), {"both"})):
        if kind & set(method.needs):
            with pytest.raises(ValueError, match="add (at least one|the other kind)"):
                fit(method, support_of(clip, rows), clip)
        else:
            detector = fit(method, support_of(clip, rows), clip)
            check_form(detector.predict(Features(clip, [picture(8, True)])), method.gives, 1)


@pytest.mark.parametrize("name", find_methods())
def test_a_method_keeps_the_contract(name, clip, tmp_path):
    "Fit, predict a batch, one by one and one new picture, save and load; CLIP and the shots are left alone."
    method, before, support = find_method(name), fingerprint(clip.model, ""), support_of(clip)
    shots = weakref.ref(support.features.images)
    detector = fit(method, support, clip)
    del support
    gc.collect()
    assert shots() is None, "the detector holds on to the images of the shots"
    kept = [key for key, value in detector.state_dict().items() if value.shape[-2:] == (SIDE, SIDE)]
    assert not kept, "the detector's file holds images"

    images = Features(clip, [picture(20 + number, number % 2) for number in range(5)])
    together = predict(detector, images, batch_size=5)
    check_form(together, method.gives, 5)
    check_equal(together, Prediction.cat([detector.predict(images[[row]]) for row in range(5)]), rtol=1e-4, atol=1e-5)
    spared = predict(detector, images, maps=False)
    check_form(spared, [field for field in method.gives if "map" not in field], 5)
    check_equal(spared, together)
    check_form(detector.predict(Features(clip, [picture(30, True)])), method.gives, 1)

    for length in range(0, 64, 8):  # of the notes: it decides where the numbers lie in memory, not what they are
        file = save(detector, tmp_path / f"{length}.safetensors", {"note": "x" * length})
        again = load_detector(file, clip)
        assert type(again) is type(detector) and again.method == name
        check_equal(together, predict(again, images, batch_size=5), rtol=0, atol=0)
    check_needs(method, clip)
    assert fingerprint(clip.model, "") == before, "a weight of CLIP has changed"
    assert all(weight.grad is None and not weight.requires_grad for weight in clip.model.parameters())


def pretend(value, memo):
    "Copy a tensor as one of the same shape and type on a GPU that is not there."
    if id(value) not in memo:
        fake = torch.empty(value.shape, dtype=value.dtype, device="cuda")
        memo[id(value)] = torch.nn.Parameter(fake, value.requires_grad) if isinstance(value, torch.nn.Parameter) else fake
    return memo[id(value)]


def all_similarities(images, signs, category, keep=None, anchor=None):
    "Stand in for the one function whose shapes depend on values, which fake tensors have not: all signs are kept."
    found = scores.cosine_similarity(images, signs) if anchor is None else scores.sign_margins(images, signs, anchor)
    return found + (0 if keep is None else 0 * keep), category.long(), 3 + (keep is None)


@pytest.mark.parametrize("name", find_methods())
def test_a_prediction_stays_on_one_device(name, clip, monkeypatch):
    "Fake tensors compute shapes, types and devices alone, as if on a GPU, and refuse to mix devices."
    detector, method = fit(find_method(name), support_of(clip), clip), find_method(name)
    monkeypatch.setattr(scores, "_sign_similarities", all_similarities)
    monkeypatch.setattr(decisions, "check_signs", lambda signs, category: len(detector.signs.categories))
    for kind in (torch.Tensor, torch.nn.Parameter): monkeypatch.setattr(kind, "__deepcopy__", pretend)
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda value: True)  # checks of values pass
    with FakeTensorMode():
        there = copy.deepcopy(detector)
        assert there.clip.device.type == "cuda"
        said = given(there.predict(Features(there.clip, torch.zeros(2, 3, SIDE, SIDE))))
    assert set(said) == set(method.gives) and all(len(value) == 2 for value in said.values())
    assert {value.device.type for value in said.values()} == {"cpu"}, "a prediction comes back from the GPU"


def test_a_tensor_that_was_left_behind_is_noticed(clip, monkeypatch):
    detector = fit(find_method("sd-mad"), support_of(clip), clip)
    for kind in (torch.Tensor, torch.nn.Parameter): monkeypatch.setattr(kind, "__deepcopy__", pretend)
    with FakeTensorMode():
        there = copy.deepcopy(detector)
        there.adapters.image[1].down.weight = torch.nn.Parameter(torch.empty_like(there.adapters.image[1].down.weight, device="cpu"))
        with pytest.raises(RuntimeError, match="device"): there.predict(Features(there.clip, torch.zeros(2, 3, SIDE, SIDE)))
