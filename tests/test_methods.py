"Every method keeps the one contract: fitted on a few shots, it predicts any image, and is kept in one small file."
import gc
import weakref
from contextlib import nullcontext
from dataclasses import fields, replace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from sdmad_nb.core.clip import Features, fingerprint, freeze_clip
from sdmad_nb.core.config import Config
from sdmad_nb.core.detector import Prediction, Support, predict, save
from sdmad_nb.core.signs import SignSet, restrict
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


ODD = {"one finding": (LABELS[:, :1], restrict(SIGNS, ["dot"])),
       "no negative shot": (torch.cat([torch.ones(7, 1), LABELS[:, 1:]], 1), SIGNS), "one shot in all": (LABELS[:1], SIGNS),
       "equal signs": (LABELS, replace(SIGNS, signs={**SIGNS.signs, "line": SIGNS.signs["dot"]})),
       "one contains another": (torch.cat([LABELS[:, :2].amax(1, keepdim=True), LABELS[:, 1:]], 1), SIGNS)}


@pytest.mark.parametrize("labels, signs", ODD.values(), ids=ODD)
def test_the_unmixed_reading_of_odd_shots(clip, labels, signs):
    "Every score is finite and every decision defined; a shot with the lowest score of a finding that all have gets no."
    features = Features(clip, [picture(row, bool(LABELS[row].any())) for row in range(len(labels))])
    detector = find_method("sd-mad-unmixed").fit(Support(features, labels), clip, signs, Config(epochs=2))
    said = detector.predict(features)
    assert said.scores.shape == said.labels.shape == labels.shape and said.labels.dtype == torch.bool
    assert all(part.isfinite().all() for part in (said.scores, said.finding_maps, said.anomaly, detector.thresholds))
    assert (said.scores > detector.thresholds)[said.labels].all()
    for c in range(labels.shape[1]):
        if labels[:, c].all() or len(labels) == 1: assert not said.labels[said.scores[:, c].argmin(), c]


class Elsewhere(torch.Tensor):
    "Say that it is on another device, the one that `torch` calls meta; its values are in `here`."
    @staticmethod
    def __new__(cls, here):
        layout = dict(strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype)
        made = torch.Tensor._make_wrapper_subclass(cls, here.shape, **layout, device="meta")
        made.here = here
        return made

    __torch_function__, __torch_dispatch__ = torch._C._disabled_torch_function_impl, classmethod(lambda *_: NotImplemented)

    def __getitem__(self, rows): return super().__getitem__(torch.tensor(rows) if isinstance(rows, list) else rows)
    def new_tensor(self, value): return torch.tensor(value, dtype=self.dtype, device=self.device)
    def tolist(self): return self.here.tolist()


class PretendedDevice(TorchDispatchMode):
    "Compute on the CPU what is said to be elsewhere, and refuse to mix both in one operation, as a GPU does."
    def __torch_dispatch__(self, operation, types, values=(), options=None):
        options, name = options or {}, operation.overloadpacket.__name__
        tensors = [one for one in tree_leaves((values, options)) if isinstance(one, torch.Tensor)]
        device = options.get("device") or next((one.device for one in tensors if one.is_meta), torch.device("cpu"))
        if name in ("index", "index_put", "index_put_") and values[0].is_meta:  # only there may the indices be on the CPU
            bound = [values[0], *values[2:]]
        else: bound = tensors
        if len({one.device for one in bound if torch.is_tensor(one) and one.dim()}) > 1 and name not in ("_to_copy", "copy_"):
            raise RuntimeError(f"{name}: tensors on more than one device")
        assert all(isinstance(one, Elsewhere) for one in tensors if one.is_meta), f"{name}: a tensor that has no values"
        if "device" in options: options = {**options, "device": torch.device("cpu")}
        made = operation(*tree_map_only(Elsewhere, lambda one: one.here, values),
                         **tree_map_only(Elsewhere, lambda one: one.here, options))
        if name.endswith("_") and not name.startswith("__"): return values[0]  # changed in place
        return tree_map_only(torch.Tensor, Elsewhere, made) if device.type == "meta" else made


@pytest.fixture
def there(monkeypatch):
    "The small CLIP on a device that is not there, and what torch does not hand to a dispatch mode."
    for name in ("tensor", "as_tensor"):
        def make(value, device=None, make=getattr(torch, name), **options):
            made = make(value, **options)
            return made if device is None else made.to(device)
        monkeypatch.setattr(torch, name, make)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    clip = small_clip()
    with PretendedDevice(): clip.model.to("meta")
    return clip


@pytest.mark.parametrize("name", find_methods())
def test_training_and_prediction_stay_on_one_device(name, clip, there):
    "As if on a GPU, each step of training too; the numbers are those of the CPU."
    pictures, method = [picture(20, True), picture(21, False)], find_method(name)
    expected = fit(method, support_of(clip), clip)
    with PretendedDevice():
        detector = fit(method, support_of(there), there)
        said = detector.predict(Features(there, pictures))
        assert all(value.is_meta for value in detector.state_dict().values()), "something that was learned is left behind"
    assert {value.device.type for value in given(said).values()} == {"cpu"}, "a prediction comes back from the GPU"
    assert detector.history == pytest.approx(expected.history, rel=1e-4)
    check_equal(expected.predict(Features(clip, pictures)), said, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["sd-mad", "mvfa", "fusion", "sign-maps", "dra"])
def test_a_module_that_was_left_behind_is_noticed(name, there, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, *_: module)
    with PretendedDevice(), pytest.raises(RuntimeError, match="more than one device"):
        fit(find_method(name), support_of(there), there)
