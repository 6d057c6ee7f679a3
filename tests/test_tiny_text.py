"""The shipped model that is asked by text: it does what its card says, and the commands take it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the extra `text` is not installed")

from flextok_edu import ARModel, FlexTok
from flextok_edu.apps.generate import generate_main
from flextok_edu.apps.zoo_ar import pack_ar
from flextok_edu.data.text_encoders import text_encoder
from flextok_edu.engine.conditions import take
from flextok_edu.engine.hub import shipped_models, shipped_part
from flextok_edu.evaluation.priors import ARPrior
from flextok_edu.evaluation.prompts import judge_prompts, judged, wanted_attributes
from flextok_edu.evaluation.readers import SceneReader
from flextok_edu.evaluation.search import search
from flextok_edu.evaluation.verifiers import make_verifier
from flextok_edu.flow import SamplingConfig
from flextok_edu.text import read_texts

ROOT = Path(__file__).resolve().parent.parent
PLACE = shipped_models().get("tiny-text")
LOOK = {"steps": 5, "guidance": 2.0, "seed": 0}
SHORT = [
    *(
        "a red boat",
        "a yellow star",
        "a green tree",
        "a red house",
        "a pink flower",
        "an orange fish",
        "a red car",
    ),
    *(
        "a red mushroom",
        "a purple balloon",
        "a blue snowman",
        "a green cactus",
        "a yellow sun",
        "a white boat",
    ),
    *("a white star", "an orange tree", "a blue house", "a purple flower", "a blue fish", "a blue car"),
    *("a white mushroom", "a pink balloon", "a red snowman", "a purple cactus", "an orange sun"),
]


@pytest.fixture(scope="module")
def models():
    judge, reader = (SceneReader.from_pretrained(PLACE / part) for part in ("judge", "reader"))
    return FlexTok.from_pretrained("tiny-text"), ARModel.from_pretrained("tiny-text"), judge, reader


def test_it_is_there_and_small():
    size = sum(f.stat().st_size for f in PLACE.rglob("*") if f.is_file())
    assert size < 8e6 and (PLACE / "ar" / "model.safetensors").stat().st_size < 6.5e6
    facts = json.loads((PLACE / "model.json").read_text(encoding="utf-8"))
    assert facts["needs"] == "tiny" and len(facts["made"]["left_out"]) == 6
    assert shipped_part(PLACE, "tokenizer") == shipped_models()["tiny"] / "tokenizer"
    assert shipped_part(PLACE, "nonsense") is None
    assert facts["measured"], "its card has a table"


def test_it_reads_the_encoder_it_was_trained_with(models):
    tok, ar, _, _ = models
    c = ar.config.text
    assert c.identity == text_encoder(c.encoder).identity and ar.text.knows_null
    empty = read_texts(ar, [""])
    assert torch.allclose(ar.text.null_features[: empty.mask.sum()], empty.features[0], atol=2e-3), "float16"
    assert ar.tokenizer_identity == tok.identity == FlexTok.from_pretrained("tiny").identity


def test_short_prompts_come_true(models):
    """Kind and colour of 96 pictures, read by the judge; more tokens say more."""
    tok, ar, judge, _ = models
    prompts = SHORT * 4
    ids = ar.generate(read_texts(ar, prompts), guidance=2.0)
    rows = judge_prompts(judge, tok, ids, [wanted_attributes(p) for p in prompts], (1, 4, 32), **LOOK)
    main = [row["main"] for row in rows]
    assert main[0] < main[1] < main[2] and main[2] >= 0.8, main


def test_places_and_lights_come_true(models):
    tok, ar, judge, _ = models
    places = (
        "in a meadow",
        "on the sea",
        "in the sky",
        "in the sand",
        "in the snow",
        "on a street",
        "in a forest",
    )
    prompts = [
        f"a red house {p} {w}" for p in (*places, "under water") for w in ("by day", "at dusk", "at night")
    ]
    images = tok.detokenize(ar.generate(read_texts(ar, prompts), guidance=2.0), **LOOK)
    found = judged(judge, images, [wanted_attributes(p) for p in prompts])
    assert found["place"].mean() >= 0.95 and found["light"].mean() >= 0.95


def test_nothing_asked_is_anything(models):
    tok, ar, judge, _ = models
    ids = ar.generate(read_texts(ar, [""] * 24), seed=1)
    kinds = judge.read(tok.detokenize(ids, **LOOK))[:, 0]
    assert len(kinds.unique()) >= 6, "all kinds, not one"


def test_a_search_finds_what_is_rarely_drawn(models):
    """By its own verifier better than samples. (Six prompts are too few for the judge.)"""
    tok, ar, judge, reader = models
    prompts = [
        "a pink fish in the sky",
        "a purple house",
        "a green star",
        "a white car",
        "a blue cactus",
        "a red fish",
    ]
    wanted, cond = [wanted_attributes(p) for p in prompts], read_texts(ar, prompts)
    sample = tok.detokenize(ar.generate(cond, guidance=2.0), **LOOK)
    verifier = make_verifier("attributes", reader=reader, wanted=wanted)
    how = {"n": 10, "beams": 2, "candidates": 2, "sampling": SamplingConfig(steps=5, guidance=2.0)}
    best = search("best_of_n", ARPrior(ar, cond, guidance=2.0), tok, verifier, **how)
    before, after = (verifier.measure(x, best.ids, torch.arange(6)).mean() for x in (sample, best.images))
    assert after > before + 0.2 and best.decodes == 10, (before, after, best.decodes)
    assert torch.allclose(best.scores.mean(), after, atol=1e-4), "the scores are those of the pictures"
    together = search("beam", ARPrior(ar, cond, guidance=2.0), tok, verifier, **how)
    first = make_verifier("attributes", reader=reader, wanted=wanted[:1])
    alone = search("beam", ARPrior(ar, take(cond, [0]), guidance=2.0), tok, first, **how)
    assert torch.equal(alone.ids, together.ids[:1]), "a prompt does not depend on the others"
    assert together.decodes == 2 + 5 * 4, "the first step has one beam"


def test_the_command(tmp_path, capsys):
    words = ["a red boat on the sea at night", "", "--ar", "tiny-text", "--seeds", "3", "4", "--out"]
    generate_main([*words, str(tmp_path / "a"), "--budgets", "1", "8"])
    names = sorted(f.name for f in (tmp_path / "a").glob("0*.png"))
    assert len(names) == 8 and names[0] == "000_a_red_boat_on_the_sea_at_night_seed3_001.png"
    assert names[4] == "001_anything_seed3_001.png"
    few = ["--beams", "2", "--candidates", "2", "--budgets", "1", "2"]
    for method in ("beam", "lookahead", "best_of_n"):
        out = str(tmp_path / method)
        generate_main(["a red boat", "--ar", "tiny-text", "--search", method, *few, "--out", out])
        assert "pictures were decoded for each" in capsys.readouterr().out
        assert len(list((tmp_path / method).glob("000*.png"))) == 2


@pytest.mark.parametrize(
    "words,says",
    (
        (["a red boat", "--ar", "tiny"], "there is no class"),
        (["a red boaat", "--ar", "tiny-text", "--search", "beam", "--budgets", "1"], "did you mean 'boat'"),
        (["a boat", "--ar", "tiny-text", "--budgets", "-3"], "1 .. 32"),
        (["a \udcff boat", "--ar", "tiny-text"], "UTF-8"),
        (["--ar", "tiny-text"], "which texts"),
        (["a boat", "--ar", "tiny-text", "--tokenizer", "clipart"], "nonsense"),
        (["a boat", "--ar", "tiny-text", "--search", "beam", "--verifier", "x"], "no verifier 'x'"),
    ),
    ids=lambda words: "" if isinstance(words, str) else None,
)
def test_what_the_command_refuses(words, says, tmp_path, capsys):
    with pytest.raises(SystemExit):
        generate_main([*words, "--out", str(tmp_path / "x")])
    assert says in capsys.readouterr().err and not (tmp_path / "x").exists()


def test_packing_an_ar_model_alone(tmp_path):
    zoo = tmp_path / "zoo"
    (zoo).mkdir()
    (zoo / "tiny").symlink_to(shipped_models()["tiny"])
    place = pack_ar(
        shipped_models()["tiny"] / "ar", "again", zoo, "tiny", "for a test", [{"tokens": 1, "kind": 0.5}]
    )
    assert "| tokens | kind |" in (place / "README.md").read_text(encoding="utf-8")
    with pytest.raises(ValueError, match="again=True"):
        pack_ar(shipped_models()["tiny"] / "ar", "again", zoo, "tiny")
    with pytest.raises(ValueError, match="more than 0.1"):
        pack_ar(shipped_models()["tiny"] / "ar", "large", zoo, "tiny", limit=0.1)
    (zoo / "clipart").symlink_to(shipped_models()["clipart"])
    with pytest.raises(ValueError, match="nonsense"):
        pack_ar(shipped_models()["tiny"] / "ar", "wrong", zoo, "clipart")
    assert sorted(f.name for f in zoo.iterdir()) == ["again", "clipart", "tiny"], "nothing half written"


def test_nothing_of_it_is_needed_for_the_rest():
    """Without the extra, the class-conditional models work, and text says what is missing."""
    code = (
        "import sys; sys.modules['transformers'] = None\n"
        "import torch\nfrom flextok_edu import ARModel\n"
        "print(ARModel.from_pretrained('tiny').generate(torch.tensor([1]), 2).shape)\n"
        "from flextok_edu.text import read_texts\n"
        "try:\n    read_texts(ARModel.from_pretrained('tiny-text'), ['a boat'])\n"
        "except ImportError as error:\n    print(error)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert out.returncode == 0 and "torch.Size([1, 2])" in out.stdout and "flextok_edu[text]" in out.stdout


def test_a_list_of_seeds_is_a_seed_for_each():
    """And not one name for all: the noise of a picture is that of its own seed."""
    tok, ids = FlexTok.from_pretrained("tiny"), torch.arange(8).view(2, 4) * 31
    each = [tok.detokenize(ids[i : i + 1], steps=2, seed=s) for i, s in enumerate((5, 9))]
    for seeds in ([5, 9], (5, 9), torch.tensor([5, 9])):
        assert torch.allclose(tok.detokenize(ids, steps=2, seed=seeds), torch.cat(each), atol=1e-5)
    assert SamplingConfig(seed=[5, 9]) == SamplingConfig(seed=(5, 9))


def test_the_study_runs(tmp_path):
    """tools/generation_study.py: a search, what it found read again, everything in one file."""
    study = [sys.executable, str(ROOT / "tools" / "generation_study.py")]
    few = ["--samples", "4", "--most", "5"]
    for words in (["search", tmp_path, "rare", "2", *few], ["judge", tmp_path, *few]):
        subprocess.run([*study, *map(str, words)], check=True, capture_output=True, text=True)
    subprocess.run([*study, "collect", str(tmp_path), str(tmp_path / "all.json")], check=True)
    found = json.loads((tmp_path / "all.json").read_text())["searches"]["rare-2"]
    assert set(found) == {"sample", "best of 5"} and found["best of 5"]["decodes"] == 5
    for row in found.values():
        assert all(
            set(row[who]["all"]) <= {"0", "1"} and len(row[who]["all"]) == 4 for who in ("judge", "verifier")
        )
        assert set(row["judge"]["relation"]) == {"-"}, "nobody asked for it"
