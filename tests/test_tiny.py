"""The weights that come with the package do what their card says. (Bounds well below the measured values: these are few pictures.)"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flextok_edu.ar import ARModel, check_tokenizer, sample_images, tokenizer_hash
from flextok_edu.core import Preset, from_dict, from_uint8, preset, shipped_models
from flextok_edu.data import ToyScenes
from flextok_edu.evaluate import load_report, token_counts
from flextok_edu.features import AttributeClassifier, read_accuracy
from flextok_edu.tokenizer import FlexTok
from flextok_edu.vae import VAE

ROOT = Path(__file__).resolve().parent.parent
PLACE = ROOT / "flextok_edu" / "zoo" / "tiny"


@pytest.fixture(scope="module")
def parts():
    tok = FlexTok.from_pretrained("tiny")
    return tok, ARModel.from_pretrained("tiny"), AttributeClassifier.from_pretrained("tiny")


@pytest.fixture(scope="module")
def usual():
    return from_dict(Preset, json.loads((PLACE / "model.json").read_text())["preset"]).evaluate


def test_small_and_whole():
    """All shipped models together in 25 MB, each with card, table, logs and the facts of its training."""
    assert "tiny" in shipped_models() and sum(f.stat().st_size for f in (ROOT / "flextok_edu" / "zoo").rglob("*") if f.is_file()) < 25e6
    facts = json.loads((PLACE / "model.json").read_text())
    for part in ("vae", "tokenizer", "ar", "classifier"):
        assert len(json.loads((PLACE / part / "log.json").read_text())) > 20 and facts["made"][part]["seed"] == 0 and facts["made"][part]["versions"]["torch"]
        assert json.loads((PLACE / part / "config.json").read_text())["stage"]["seconds"] > 60
    assert from_dict(Preset, facts["preset"]) == preset("tiny"), "the preset is what was trained"


@torch.no_grad()
def test_pictures_get_better(parts, usual):
    tok, _, reader = parts
    images, labels = ToyScenes("val", 64, 2, seed=0, length=144).render(progress=False)
    images = from_uint8(images)
    ids, errors, read = tok.tokenize(images), [], {}
    for k in token_counts(32):
        pictures = tok.detokenize(ids[:, :k], usual.steps, usual.guidance)
        errors.append(float((pictures - images).abs().mean() / 2))
        read[k] = read_accuracy(reader, pictures, labels)
    assert errors == sorted(errors, reverse=True) and errors[-1] < .5 * errors[0], errors
    assert read[1]["place"] > .9 and read[32]["place"] > .97 and read[8]["colour"] > .6 and read[32]["colour"] > .85 and read[1]["kind"] > .2 and read[8]["kind"] > .6 and read[32]["kind"] > .8, read
    alone = tok.vae.decode(tok.vae.encode(images)).clamp(-1, 1)
    assert float((alone - images).abs().mean() / 2) < .02 and read_accuracy(reader, alone, labels)["kind"] > .95


@torch.no_grad()
def test_new_pictures_are_of_their_class(parts, usual):
    tok, ar, reader = parts
    check_tokenizer(ar, tok)
    wanted = torch.arange(96) % 12
    truth = torch.zeros(96, 4, dtype=torch.int64)
    truth[:, 0] = wanted
    pictures = sample_images(ar, tok, wanted, 32, usual.steps, usual.guidance, usual.ar_guidance, usual.temperature)
    assert read_accuracy(reader, pictures, truth)["kind"] > .5


def test_the_table_is_of_these_weights(parts, usual):
    """Measured by flextok_eval on exactly these weights, 5,000 scenes; strictly better at every doubling, as the README says."""
    report = load_report(PLACE)
    rows = [r for r in report.rows if r["what"] == "tokens"]
    assert [r["tokens"] for r in rows] == [1, 2, 4, 8, 16, 32] and {r["n"] for r in rows} == {5000}
    distance = next(k for k in rows[0] if k.startswith("frechet_scenes"))
    for key, sign in (("mae", -1), ("psnr", 1), (distance, -1)):
        values = [sign * r[key] for r in rows]
        assert all(a < b for a, b in zip(values, values[1:])), (key, values)
    assert report.card["weights"]["tokenizer"] == tokenizer_hash(parts[0])
    assert (report.card["steps"], report.card["guidance"]) == (usual.steps, usual.guidance)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{rows[-1]['mae']:.4f}" in readme and f"{rows[0]['mae']:.4f}" in readme


def test_found_without_a_network(tmp_path):
    """In a clean process and another folder; the VAE alone as well."""
    ask = "from flextok_edu.vae import VAE\nfrom flextok_edu.tokenizer import FlexTok\nfrom flextok_edu.core import weights_hash\nprint(weights_hash(VAE.from_pretrained('tiny')) == weights_hash(FlexTok.from_pretrained('tiny').vae))"
    result = subprocess.run([sys.executable, "-c", ask], cwd=tmp_path, capture_output=True, text=True, timeout=300, env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)})
    assert result.stdout.strip() == "True", result.stderr[-2000:]
    assert VAE.from_pretrained("tiny").config == preset("tiny").vae
