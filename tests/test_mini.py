"""The shipped model of 128 px does what its card says, and lies in the package as it came from the GPU."""

import hashlib
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from flextok_edu.ar import ARModel
from flextok_edu.engine.binding import check_tokenizer, tokenizer_hash
from flextok_edu.engine.config import Preset, preset
from flextok_edu.engine.files import weights_hash
from flextok_edu.engine.limits import from_dict
from flextok_edu.engine.tensors import from_uint8
from flextok_edu.data.learned import load_learned
from flextok_edu.data.scenes import ToyScenes
from flextok_edu.evaluation.report import load_report
from flextok_edu.data.features import AttributeClassifier, read_accuracy
from flextok_edu.tokenizer import FlexTok
from flextok_edu.apps.card import read_facts
from flextok_edu.apps.stage_table import PARTS

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / "flextok_edu" / "zoo" / "mini"


@pytest.fixture(scope="module")
def tok():
    return FlexTok.from_pretrained("mini")


@pytest.fixture(scope="module")
def reader():
    return AttributeClassifier.from_pretrained("mini")


@pytest.fixture(scope="module")
def rows():  # of reconstructions: token count -> row
    return {r["tokens"]: r for r in load_report(PLACE).rows if r["what"] == "tokens"}


def test_it_is_whole():
    """The preset is what was trained, to the step; every part has a log, and says what it learned from and
    how long it took.
    """
    facts = read_facts(PLACE)
    assert from_dict(Preset, facts["preset"]) == preset("mini")
    assert (
        facts["weights_are"] == "EMA"
        and facts["rounding"]["equal_ids"] > 0.99
        and facts["rounding"]["vae_mae"] < 0.0002
    )
    for part in PARTS:
        stage, learned = (
            json.loads((PLACE / part / "config.json").read_text())["stage"],
            load_learned(PLACE / part),
        )
        plan = getattr(preset("mini"), f"train_{part}")
        assert (stage["steps"], stage["batch"]) == (plan.steps, plan.batch) and stage["seconds"] > 5
        assert (learned.rule, learned.count) == ("scenes", preset("mini").train_images)
        assert learned.hash == facts["made"][part]["images"] and "ea3e120" in facts["made"][part]["command"]
        assert len(json.loads((PLACE / part / "log.json").read_text())) > 100
    assert sum(f.stat().st_size for f in PLACE.rglob("*") if f.is_file()) < 45e6


def test_the_table_is_of_these_weights(tok, reader, rows):
    """Measured where it was trained, on exactly these weights; better with every doubling.

    Samples are read better, too.
    """
    report = load_report(PLACE)
    weights, usual = report.card["weights"], preset("mini").evaluate
    ar = ARModel.from_pretrained("mini", tokenizer=tok)
    assert weights["tokenizer"] == tokenizer_hash(tok) and weights["vae"] == weights_hash(tok.vae)
    assert weights["ar"] == weights_hash(ar) and weights["classifier"] == weights_hash(reader)
    assert (report.card["images"], report.card["steps"], report.card["guidance"]) == (
        5000,
        usual.steps,
        usual.guidance,
    )
    assert list(rows) == [1, 2, 4, 8, 16, 32, 64]
    for key, sign in (("mae", -1), ("psnr", 1), ("ssim", 1), ("acc_kind", 1)):
        values = [sign * r[key] for r in rows.values()]
        assert values == sorted(values), (key, values)
    assert rows[64]["mae"] < 0.011 and rows[2]["acc_kind"] > 0.8 and rows[64]["acc_kind"] > 0.995
    read = [r["acc_kind"] for r in report.rows if r["what"] == "samples"]
    assert len(read) == 7 and read == sorted(read) and read[-1] > 0.99


@torch.no_grad()
def test_pictures_get_better(tok, reader, rows):
    """Sixteen held-out scenes: the error falls, and is what the table says, within what sixteen can say."""
    images, labels = ToyScenes("val", 128, 2, seed=0, length=16).render()
    images, usual = from_uint8(images), preset("mini").evaluate
    ids, errors = tok.tokenize(images), {}
    for k in (1, 8, 64):
        pictures = tok.detokenize(ids[:, :k], steps=usual.steps, guidance=usual.guidance)
        each = (pictures - images).abs().flatten(1).mean(1) / 2
        errors[k] = float(each.mean())
        assert abs(errors[k] - rows[k]["mae"]) < 4 * float(each.std()) / 4, (k, errors[k], rows[k]["mae"])
    assert errors[1] > 2 * errors[8] and errors[8] > 1.5 * errors[64], errors
    read = read_accuracy(reader, pictures, labels)
    assert read["kind"] >= 15 / 16 and read["colour"] >= 15 / 16 and read["place"] == 1, read


@torch.no_grad()
def test_new_pictures(tok, reader):
    """A list of ids for each class, from this tokenizer's words, decodes to pictures that are read as asked
    for.
    """
    ar, usual = ARModel.from_pretrained("mini", tokenizer=tok), preset("mini").evaluate
    check_tokenizer(ar, tok)
    wanted = torch.arange(12)
    ids = ar.generate(wanted, 16, guidance=usual.ar_guidance, temperature=usual.temperature)
    assert ids.shape == (12, 16) and int(ids.max()) < tok.fsq.vocabulary
    pictures = tok.detokenize(ids, steps=usual.steps, guidance=usual.guidance)
    assert pictures.shape == (12, 3, 128, 128) and int((reader.read(pictures)[:, 0] == wanted).sum()) >= 10


def test_put_together_from_what_the_gpu_left(tmp_path, monkeypatch):
    """tools/ship_mini.py reads pieces of weights by the first word of their names, and refuses weights that
    were not measured.
    """
    from safetensors.torch import save_file

    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    tool = importlib.import_module("ship_mini")
    save_file({"vae.a": torch.ones(1), "tok.b.c": torch.ones(2)}, tmp_path / "weights_0.safetensors")
    save_file(
        {"tok.d": torch.ones(3), "ar.e": torch.ones(4), "classifier.f": torch.ones(5)},
        tmp_path / "weights_1.safetensors",
    )
    found = tool.weights(tmp_path)
    assert {part: {k: len(v) for k, v in state.items()} for part, state in found.items()} == {
        "vae": {"a": 1},
        "tok": {"b.c": 2, "d": 3},
        "ar": {"e": 4},
        "classifier": {"f": 5},
    }
    tok, reader, ar = (
        FlexTok.from_pretrained("mini"),
        AttributeClassifier.from_pretrained("mini"),
        ARModel.from_pretrained("mini"),
    )
    small = {
        f"{word}.{k}": v
        for word, state in (
            ("vae", tok.vae.state_dict()),
            ("tok", tok.own_state()),
            ("ar", ar.state_dict()),
            ("classifier", reader.state_dict()),
        )
        for k, v in state.items()
    }
    save_file({k: v.contiguous().clone() for k, v in small.items()}, tmp_path / "weights_0.safetensors")
    (tmp_path / "weights_1.safetensors").unlink()
    known = load_report(PLACE).card["weights"]
    (tmp_path / "logs.json").write_text(json.dumps({"hashes": {part: known[part] for part in PARTS}}))
    assert tool.models(tmp_path, preset("mini"))[2].tokenizer == known["tokenizer"]
    (tmp_path / "logs.json").write_text(json.dumps({"hashes": {part: known["vae"] for part in PARTS}}))
    with pytest.raises(ValueError, match="were measured"):
        tool.models(tmp_path, preset("mini"))
    sys.modules.pop("ship_mini")


def test_the_script_that_trained_it_is_kept_as_it_ran():
    """tools/ship_mini.py holds this file against the noted hash: no formatter may touch it."""
    text = (ROOT / "tools" / "mini_ea3e120.py").read_text()
    ran = text.replace("import json\n", "import json\nimport math\n", 1)
    noted = (ROOT / "flextok_edu" / "zoo" / "mini" / "model.json").read_text()
    assert hashlib.sha256(ran.encode()).hexdigest() in noted
