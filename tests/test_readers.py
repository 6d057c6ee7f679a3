"""Readers of scenes, prompts read back, and the judge."""

import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from planting import patch, planted

import flextok_edu.evaluation.prompts as prompts
import flextok_edu.evaluation.readers as readers
from flextok_edu.data.features import AttributeClassifier, train_classifier
from flextok_edu.data.scenes import ATTRIBUTES, KINDS, PLACE_NAMES, ToyScenes, draw
from flextok_edu.engine.config import StageConfig
from flextok_edu.engine.tensors import from_uint8
from flextok_edu.evaluation.readers import ALL_ATTRIBUTES, VALUES, ReaderConfig, SceneReader, train_reader
from flextok_edu.flow import SamplingConfig

ROOT = Path(__file__).resolve().parent.parent
SMALL = {body: ReaderConfig(body, 32, 2) for body in readers.BODIES}


class Oracle(AttributeClassifier):
    "Reads what the first pixels of a picture say: one value an attribute."

    def __init__(self):
        super().__init__(ALL_ATTRIBUTES)

    def read(self, images, batch=250):
        return images[:, 0, 0, :7].round().long()


class Tok:
    "Decodes ids to a picture that says them; from token 7 on everything is right."

    length, vocabulary, token_counts = 8, 12, (1, 2, 4, 8)

    def __init__(self):
        self.calls = []

    def detokenize(self, ids, sampling=None, *, first_index=0):
        self.calls.append((len(ids), ids.shape[1], first_index, sampling.seed))
        images = torch.full((len(ids), 3, 8, 8), -9.0)
        images[:, 0, 0, : ids.shape[1]] = ids.float()[:, :8]
        return images


# --- the checks
# ------------------------------------------------------------------------------------------------


def check_labels_say_what_the_caption_says():
    assert list(ALL_ATTRIBUTES) == list(VALUES) and all(
        len(VALUES[n]) == k for n, k in ALL_ATTRIBUTES.items()
    )
    for level in (2, 3):
        scenes = ToyScenes("val", 64, level, length=200)
        for i in range(200):
            scene = scenes.scene(i)
            values = {name: VALUES[name][label] for name, label in zip(VALUES, readers.scene_labels(scene))}
            second = scene.caption.split(", ")[1]
            told = f"a small {values['second_colour']} {values['second_kind']} {values['relation']} it"
            assert second == told and f"{values['colour']} {values['kind']} " in scene.caption
            assert prompts.wanted_attributes(scene.caption) == values


def check_images_and_labels_belong_together():
    scenes = ToyScenes("train", 32, 2, seed=3, length=40)
    data = readers.labelled_scenes(scenes, start=10, count=20)
    assert data.labels.shape == (20, 7) and data.scenes and data.rule == "scenes"
    for i in (0, 19):
        assert torch.equal(from_uint8(data.images[i]), scenes[10 + i].image)
        assert tuple(data.labels[i].tolist()) == readers.scene_labels(scenes.scene(10 + i))


def check_the_loss_weighs_kinds():
    for build, weights in (
        (lambda: SceneReader(SMALL["dilated"]), [3, 1, 1, 1, 3, 1, 1]),
        (AttributeClassifier, [3, 1, 1, 1]),
    ):
        model, images = build().eval(), torch.rand(6, 3, 64, 64) * 2 - 1
        labels = torch.stack([torch.arange(6) % n for n in model.sizes.values()], 1)
        expected = sum(w * e for w, e in zip(weights, model.losses(images, labels)))
        assert torch.allclose(model.loss(images, labels), expected)


def check_judge_counts_only_what_is_asked():
    wanted = [{"kind": "boat"}, {"kind": "boat", "colour": "red"}, {}, {"relation": "above", "colour": "red"}]
    images = torch.full((4, 3, 8, 8), 5.0)
    images[1, 0, 0, :2] = torch.tensor([float(KINDS.index("boat")), 0.0])
    images[3, 0, 0, :7] = torch.tensor([1.0, 0, 0, 0, 0, 0, 0])
    found = prompts.judged(Oracle(), images, wanted)
    nan = math.nan
    for name, expected in {
        "kind": [0, 1, nan, nan],
        "colour": [nan, 1, nan, 1],
        "relation": [nan, nan, nan, 1],
        "place": [nan] * 4,
        "main": [nan, 1, nan, nan],
        "all": [0, 1, nan, 1],
    }.items():
        assert torch.equal(
            found[name].nan_to_num(7), torch.tensor(expected, dtype=torch.float32).nan_to_num(7)
        ), name


def check_judge_by_tokens():
    tok, ids = (
        Tok(),
        torch.tensor([[2, 0, 1, 1, 3, 3, 0, 0], [2, 1, 1, 1, 3, 3, 0, 0], [4, 0, 1, 1, 3, 3, 0, 0]]),
    )
    wanted = [{"kind": "boat", "colour": "red", "relation": "above"}] * 3
    rows = prompts.judge_prompts(Oracle(), tok, ids, wanted, batch=2, steps=3)
    assert [row["tokens"] for row in rows] == [1, 2, 4, 8]
    assert [round(row["kind"], 3) for row in rows] == [0.667] * 4
    assert [round(row["main"], 3) for row in rows] == [0.0, 0.333, 0.333, 0.333]
    assert [round(row["all"], 3) for row in rows] == [0, 0, 0, 0.333]
    assert rows[0]["place_n"] == 0 and math.isnan(rows[0]["place"]) and rows[0]["kind_n"] == 3
    assert rows[0]["kind_low"], rows[0]["kind_high"] == prompts.wilson(2, 3)
    assert tok.calls[:2] == [(2, 1, 0, 0), (1, 1, 2, 0)], "the noise of picture 2 has number 2"
    tok.calls.clear()
    prompts.judge_prompts(Oracle(), tok, ids, wanted, (4,), SamplingConfig(seed=(7, 8, 9)), batch=2)
    assert tok.calls == [(2, 4, 0, (7, 8)), (1, 4, 2, (9,))], "each list has its own noise"


def check_intervals():
    for right, n, low, high in ((0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)):
        a, b = prompts.wilson(right, n)  # published: Newcombe 1998, table I, method 3
        assert abs(a - low) < 1e-3 and abs(b - high) < 1e-3
    hits = torch.tensor([1.0, 0, 1, math.nan, 1])
    assert prompts.share(hits) == (0.75, *prompts.wilson(3, 4), 4)
    assert prompts.share(hits, torch.arange(5)) == prompts.share(hits), "one picture a prompt: independent"
    each = torch.tensor([1.0, 0.0] * 10).repeat_interleave(30)
    low, high = prompts.share(each, torch.arange(20).repeat_interleave(30))[1:3]
    assert 0.25 < low < 0.33 and 0.67 < high < 0.75, "twenty prompts, not six hundred pictures"
    assert all(math.isnan(x) for x in prompts.share(torch.tensor([math.nan]))[:3])


def check_words():
    assert prompts.wanted_attributes("") == {} and prompts.wanted_attributes("A Red Star") == {
        "kind": "star",
        "colour": "red",
    }
    assert prompts.wanted_attributes("a boat under water") == {"kind": "boat", "place": "deep"}
    assert prompts.wanted_attributes("an orange fish, a small star left of it, a small car below it") == {
        "kind": "fish",
        "colour": "orange",
        "second_kind": "star",
        "relation": "left of",
    }
    for prompt, words in (
        ("a red dragon", "the word 'dragon'"),
        ("a red boot", "did you mean 'boat'"),
        ("a boat at night, a small star on the sea", "'sea' here"),
        ("a boat, a star, a dragon", "'dragon'"),
        ("a red boat and a yellow star", "two values of colour"),
        ("ein Boot", "'ein'"),
        ("7 boats", "'7'"),
    ):
        with pytest.raises(ValueError, match=words):
            prompts.wanted_attributes(prompt)
    with pytest.warns(UserWarning, match="dragon"):
        found = prompts.wanted_attributes("a red dragon on the sea", strict=False)
    assert found == {"colour": "red", "place": "sea"}
    with pytest.raises(ValueError, match="two values"):
        prompts.wanted_attributes("a red boat and a blue dragon", strict=False)


PAIRS = [
    (
        check_labels_say_what_the_caption_says,
        lambda m: m.setattr(readers, "RELATIONS", ("above", "right of", "left of", "below")),
    ),
    (
        check_labels_say_what_the_caption_says,
        lambda m: patch(
            m, readers, "scene_labels", lambda s, f=readers.scene_labels: f(s)[:4] + f(s)[:1] + f(s)[5:]
        ),
    ),
    (
        check_images_and_labels_belong_together,
        lambda m: patch(
            m, readers, "labelled_scenes", lambda s, start, count, f=readers.labelled_scenes: f(s, 0, count)
        ),
    ),
    (
        check_the_loss_weighs_kinds,
        lambda m: m.setattr(SceneReader, "weighted", staticmethod(AttributeClassifier.weighted)),
    ),
    (
        check_judge_counts_only_what_is_asked,
        lambda m: patch(
            m, prompts, "wanted_labels", lambda w, a, f=prompts.wanted_labels: f(w, a).clamp(min=0)
        ),
    ),
    (check_judge_by_tokens, lambda m: m.setattr(prompts, "_seeded", lambda s, part: s)),
    (
        check_judge_by_tokens,
        lambda m: m.setattr(
            Tok,
            "detokenize",
            lambda self, ids, f=Tok.detokenize, **k: f(self, torch.cat([ids, ids], 1)[:, :8], **k),
        ),
    ),
    (
        check_intervals,
        lambda m: patch(
            m,
            prompts,
            "wilson",
            lambda right, n, z=1.96: (right / n - z * math.sqrt(right / n * (1 - right / n) / n), 1),
        ),
    ),
    (
        check_intervals,
        lambda m: patch(m, prompts, "share", lambda hits, groups=None, f=prompts.share: f(hits)),
    ),
    (check_words, lambda m: m.setitem(prompts._SECOND, "sea", ("relation", "below"))),
    (check_words, lambda m: m.setitem(prompts._MAIN, "dragon", ("kind", "fish"))),
]
for i, (_, bug) in enumerate(PAIRS):
    bug.__name__ = f"bug_{i}"


test_passes, test_caught = planted(PAIRS)


# --- readers in files
# ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", readers.BODIES)
def test_a_reader_comes_back(body, tmp_path):
    torch.manual_seed(1)
    model = SceneReader(SMALL[body]).eval()
    images = torch.rand(5, 3, 64, 64) * 2 - 1
    model.save_pretrained(tmp_path)
    again = SceneReader.from_pretrained(tmp_path)
    assert again.config == model.config and list(again.sizes) == list(ALL_ATTRIBUTES)
    for a, b in zip(model(images), again(images)):
        assert torch.equal(a, b)
    assert model.read(images).shape == (5, 7) and model(images[:1])[6].shape == (1, 4)
    assert model.read(torch.rand(2, 3, 96, 96)).shape == (2, 7), "another size"


@pytest.mark.parametrize(
    "change,words",
    [
        ({"body": "lstm"}, "body"),
        ({"body": "attention", "width": 40}, "no multiple of 32"),
        ({"depth": 0}, "depth"),
        ({"attributes": ["kind", "taste"]}, "attributes"),
        ({"attributes": ["kind"]}, "do not fit"),
        ({"width": 64}, "do not fit"),
        ({"depth": 3}, "do not fit"),
    ],
)
def test_a_folder_that_says_something_else(tmp_path, change, words):
    SceneReader(SMALL["dilated"]).save_pretrained(tmp_path)
    facts = json.loads((tmp_path / "config.json").read_text())
    facts["config"] |= change
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match=words):
        SceneReader.from_pretrained(tmp_path)


def test_a_classifier_is_no_reader(tmp_path):
    AttributeClassifier().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="'classifier'.*not 'reader'"):
        SceneReader.from_pretrained(tmp_path)


def test_heads_of_ones_own_come_back_and_old_folders_load(tmp_path):
    model = AttributeClassifier({"kind": 5, "taste": 3}).eval()
    model.save_pretrained(tmp_path / "own")
    again = AttributeClassifier.from_pretrained(tmp_path / "own")
    assert again.sizes == {"kind": 5, "taste": 3}
    for heads, words in (([1], "an object"), ({"kind": 0}, "heads"), ({"kind": 9, "taste": 3}, "do not fit")):
        facts = json.loads((tmp_path / "own" / "config.json").read_text()) | {"heads": heads}
        (tmp_path / "own" / "config.json").write_text(json.dumps(facts))
        with pytest.raises(ValueError, match=words):
            AttributeClassifier.from_pretrained(tmp_path / "own")
    for shipped in ("tiny", "mini"):
        assert AttributeClassifier.from_pretrained(shipped).sizes == ATTRIBUTES


def test_training_a_reader():
    data = readers.labelled_scenes(ToyScenes("train", 32, 2, length=64))
    config = StageConfig(steps=30, batch=16, lr=3e-3, warmup=5, ema=0.8)
    for reader in SMALL.values():
        model, log = train_reader(data, reader, config, progress=False, every=1)
        assert not model.training and model.config == reader
        assert {"kind", "second_kind", "relation"} <= log[0].keys()
        assert sum(r["classifier"] for r in log[-5:]) < 0.8 * sum(r["classifier"] for r in log[:5])
    again, _ = train_reader(data, reader, config, progress=False)
    other, _ = train_reader(data, reader, config, progress=False, seed=1)
    assert torch.equal(again.heads.weight, model.heads.weight) and not torch.equal(
        other.heads.weight, model.heads.weight
    )
    with pytest.raises(ValueError, match="has 7 columns of labels"):
        train_classifier(data, config, progress=False)


def test_scenes_without_a_second_object():
    with pytest.raises(ValueError, match="no second object .* level 2 or 3"):
        readers.labelled_scenes(ToyScenes("val", 32, 1, length=3))


def test_wishes_that_nobody_reads():
    with pytest.raises(ValueError, match="nobody reads 'relation'"):
        prompts.wanted_labels([{"relation": "above"}], tuple(ATTRIBUTES))
    with pytest.raises(ValueError, match="kind 'dragon' is none of"):
        prompts.wanted_labels([{"kind": "dragon"}])
    assert prompts.wanted_labels([]).shape == (0, 7)
    with pytest.raises(ValueError, match="one for each"):
        prompts.judged(Oracle(), torch.zeros(2, 3, 8, 8), [{}])
    with pytest.raises(ValueError, match="one for each"):
        prompts.judge_prompts(Oracle(), Tok(), torch.zeros(2, 8, dtype=torch.int64), [{}])
    with pytest.raises(ValueError, match="must lie in 1 .. that"):
        prompts.judge_prompts(Oracle(), Tok(), torch.zeros(1, 4, dtype=torch.int64), [{}], counts=(8,))


def test_long_and_odd_prompts():
    with pytest.raises(ValueError) as error:
        prompts.wanted_attributes("dragon " * 20_000)
    assert len(str(error.value)) < 500
    with pytest.raises(ValueError):
        prompts.wanted_attributes("a \x1b[31mred boat")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert prompts.wanted_attributes(" , ,, ") == {}


def test_a_reader_that_could_not_be_read_back_is_not_made():
    with pytest.raises(ValueError, match="no multiple of 32"):
        SceneReader(ReaderConfig("attention", 80, 2))
    assert SceneReader(ReaderConfig("dilated", 80, 1)).config.width == 80


def test_scenes_drawn_apart_are_drawn_as_told():
    """Pictures and labels belong together, wherever one starts, and the things stay those of the scene."""
    scenes = ToyScenes("val", 32, 2, length=30)
    apart = readers.labelled_scenes(scenes, 10, 20, apart=True)
    assert "apart" in apart.source and len(apart.images) == 20
    for i in (0, 19):
        scene = readers.scene_apart(scenes, 10 + i)
        picture = torch.from_numpy(draw(scene, 32).copy()).permute(2, 0, 1)
        assert torch.equal(apart.images[i], picture) and tuple(
            apart.labels[i].tolist()
        ) == readers.scene_labels(scene)
        own = scenes.scene(10 + i)
        assert [t.kind for t in scene.things] == [t.kind for t in own.things] and scene.things[
            1:
        ] == own.things[1:]
    labels = readers.labelled_scenes(ToyScenes("val", 32, 2, length=400), apart=True).labels
    sea = labels[:, 2] == PLACE_NAMES.index("sea")
    boats = labels[:, 0] == KINDS.index("boat")
    assert float((sea & boats).sum() / boats.sum()) < 0.35, "0.6 of the boats of ToyScenes are on the sea"


def test_a_judge_is_trained_by_its_tool(tmp_path):
    code = "import train_judge; train_judge.SCENES = 64; train_judge.HELD_OUT = 32; train_judge.main(%r, '3')"
    env = {**os.environ, "PYTHONPATH": f"{ROOT / 'tools'}{os.pathsep}{ROOT}", "TQDM_DISABLE": "1"}
    out = subprocess.run(
        [sys.executable, "-c", code % str(tmp_path / "judge")], env=env, capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr[-2000:]
    assert (
        out.stdout.count("second_kind") == 2
        and SceneReader.from_pretrained(tmp_path / "judge").config.body == "attention"
    )
