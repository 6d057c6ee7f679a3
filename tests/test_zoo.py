"""Shipped models: packed small, found by name, and never mixed up. The model here is a stand-in that was trained for a moment."""
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import flextok_edu.commands as commands
import flextok_edu.core as core
import flextok_edu.zoo as zoo
from flextok_edu.ar import ARModel, check_tokenizer
from flextok_edu.core import weights_hash
from flextok_edu.features import AttributeClassifier
from flextok_edu.pipeline import RunConfig, run
from flextok_edu.tokenizer import FlexTok
from flextok_edu.vae import VAE


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo") / "run"
    run(RunConfig(out=str(folder), device="cpu", compile="off", steps=3, images=12, train_images=60))
    return folder


@pytest.fixture(scope="module")
def packed(trained):
    return zoo.pack(trained, "standin", trained.parent / "shipped", same=0.)


@pytest.fixture
def shipped(packed, monkeypatch):
    for module in (core, commands, zoo):
        monkeypatch.setattr(module, "shipped_models", lambda: {"standin": packed})
    return packed


def test_half_the_bytes(trained):
    vae = VAE.from_pretrained(trained / "vae")
    small = zoo.halved(vae)
    weights = {n for n, _ in vae.named_parameters()}
    assert all(small[n].dtype == torch.float16 for n in weights) and all(small[n].dtype == x.dtype for n, x in vae.state_dict().items() if n not in weights)
    with torch.no_grad():
        next(vae.parameters()).fill_(1e6)
    with pytest.raises(ValueError, match="float16"):
        zoo.halved(vae)


def test_they_know_each_other(shipped, trained):
    tok, ar, vae = FlexTok.from_pretrained("standin"), ARModel.from_pretrained("standin"), VAE.from_pretrained("standin")
    check_tokenizer(ar, tok)
    assert weights_hash(vae) == weights_hash(tok.vae) and not tok.training
    assert {w.dtype for m in (tok, ar, vae) for w in m.parameters()} == {torch.float32}
    assert isinstance(AttributeClassifier.from_pretrained("standin"), AttributeClassifier)
    with pytest.raises(ValueError, match="trained with VAE"):
        FlexTok.from_pretrained("standin", vae=VAE.from_pretrained(trained / "vae"))
    with pytest.raises(ValueError, match="ids of tokenizer"):
        check_tokenizer(ar, FlexTok.from_pretrained(trained / "tokenizer"))


def test_the_same_tokens(shipped, trained):
    """Rounding changes hardly an id, and the picture by less than a thousandth."""
    images = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    a, b = FlexTok.from_pretrained(trained / "tokenizer"), FlexTok.from_pretrained("standin")
    assert (a.tokenize(images) == b.tokenize(images)).float().mean() > .95
    assert (a.vae.decode(a.vae.encode(images)) - b.vae.decode(b.vae.encode(images))).abs().mean() < 2e-3


def test_names(shipped, tmp_path, monkeypatch):
    """A plain word is a shipped model, a path is a folder, and what is neither says what there is."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(shipped / "vae", tmp_path / "standin" / "vae")
    shutil.copytree(shipped / "vae", tmp_path / "other")
    assert VAE.from_pretrained("standin") and VAE.from_pretrained("./other")
    with pytest.raises(FileNotFoundError, match="holds no finished model|no finished"):
        VAE.from_pretrained("./standin")
    with pytest.raises(FileNotFoundError, match="standin"):
        VAE.from_pretrained("stanndin")
    assert commands.open_tokenizer("standin").vae is not None


def test_a_part_that_is_not_there(shipped, monkeypatch, tmp_path):
    shutil.copytree(shipped / "vae", tmp_path / "half" / "vae")
    monkeypatch.setattr(core, "shipped_models", lambda: {"half": tmp_path / "half"})
    assert VAE.from_pretrained("half")
    with pytest.raises(FileNotFoundError, match="has no ar; it has: vae"):
        ARModel.from_pretrained("half")


def test_a_damaged_file(packed, tmp_path, monkeypatch):
    shutil.copytree(packed, tmp_path / "bad")
    monkeypatch.setattr(core, "shipped_models", lambda: {"bad": tmp_path / "bad"})
    weights = tmp_path / "bad" / "vae" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-9] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="not the ones that config.json describes"):
        FlexTok.from_pretrained("bad")


@pytest.mark.parametrize("change, error", (({"limit": 1.}, "more than 1"), ({"same": 1.01}, "stay the same"), ({"name": "standin"}, "there already")), ids=("large", "changed", "taken"))
def test_refused(packed, trained, change, error):
    """And nothing is left behind."""
    before = sorted(packed.parent.iterdir())
    with pytest.raises(ValueError, match=error):
        zoo.pack(trained, **({"name": "new", "zoo": packed.parent, "same": 0.} | change))
    assert sorted(packed.parent.iterdir()) == before


def test_strangers_are_not_packed(trained, packed, tmp_path):
    """A tokenizer beside another VAE, an AR model beside another tokenizer, no VAE at all."""
    shutil.copytree(trained, tmp_path / "run")
    run(RunConfig(out=str(tmp_path / "second"), device="cpu", compile="off", steps=2, images=12, train_images=60, seed=1))
    shutil.rmtree(tmp_path / "run" / "ar")
    shutil.copytree(tmp_path / "second" / "ar", tmp_path / "run" / "ar")
    with pytest.raises(ValueError, match="writes ids of tokenizer"):
        zoo.pack(tmp_path / "run", "a", tmp_path / "zoo", same=0.)
    shutil.rmtree(tmp_path / "run" / "vae")
    shutil.copytree(tmp_path / "second" / "vae", tmp_path / "run" / "vae")
    with pytest.raises(ValueError, match="do not belong together"):
        zoo.pack(tmp_path / "run", "a", tmp_path / "zoo", same=0.)
    shutil.rmtree(tmp_path / "run" / "vae")
    with pytest.raises(ValueError, match="no finished VAE"):
        zoo.pack(tmp_path / "run", "a", tmp_path / "zoo", same=0.)


def test_the_card(packed):
    card = (packed / "README.md").read_text()
    own = json.loads((packed / "tokenizer" / "config.json").read_text())
    assert "license: apache-2.0" in card and own["loaded"] in card and "equal ids" in card and "tokens" in card
    logs = {part: json.loads((packed / part / "log.json").read_text()) for part in zoo.PARTS}
    assert all(rows and len(rows) <= 301 for rows in logs.values())
    assert len(zoo._thin([{"step": i, "loss": 1 / 3} for i in range(1000)])) <= 301 and zoo._thin([{"step": i} for i in range(1000)])[-1]["step"] == 999


@pytest.mark.parametrize("text, found", (("1,4,16,all", [1, 4, 16, 16]), ("2", [2]), ("all", [16]), ("1 2", [1, 2])))
def test_budgets(text, found):
    assert zoo.parse_budgets(text, 16) == found


@pytest.mark.parametrize("text", ("", "0", "17", "-1", "most", "1.5"))
def test_no_budgets(text):
    with pytest.raises(commands.UsageError):
        zoo.parse_budgets(text, 16)


def status(main, *argv):
    try:
        main(list(argv))
    except SystemExit as leave:
        return leave.code
    return 0


def test_reconstruct(shipped, tmp_path, capsys):
    """Pictures of any size and kind become strips; a broken one is left out and said; nothing readable is an error."""
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (50, 90, 3), dtype=np.uint8)).save(tmp_path / "wide.jpg")
    Image.fromarray(rng.integers(0, 255, (70, 40, 4), dtype=np.uint8)).save(tmp_path / "tall.png")
    (tmp_path / "broken.jpg").write_bytes(b"not a picture")
    files = [str(tmp_path / n) for n in ("wide.jpg", "tall.png", "broken.jpg")]
    rest = ("--model", "standin", "--budgets", "1,all", "--out", str(tmp_path / "strip.png"), "--device", "cpu")
    assert status(zoo.reconstruct_main, *files[:2], *rest) == 0
    two = Image.open(tmp_path / "strip.png").size
    assert status(zoo.reconstruct_main, *files, *rest) == 1, "one could not be read"
    assert Image.open(tmp_path / "strip.png").size == two
    assert status(zoo.reconstruct_main, files[2], *rest) == 1 and "cannot be read" in capsys.readouterr().err
    assert status(zoo.reconstruct_main, "nowhere.jpg", *rest) == 1 and "nowhere.jpg" in capsys.readouterr().err
    assert status(zoo.reconstruct_main, files[0], "--model", "standin", "--budgets", "99") == 2


def test_demo(shipped, tmp_path, capsys):
    assert status(zoo.demo_main, "--model", "standin", "--out", str(tmp_path / "demo"), "--images", "12", "--device", "cpu") == 0
    page, table = (tmp_path / "demo" / "report.html").read_text(), json.loads((tmp_path / "demo" / "table.json").read_text())
    stored = json.loads((shipped / "model.json").read_text())
    assert "data:image/png" in page and table["card"]["train_hash"] == stored["trained_on"]["train"] and table["card"]["images"] == 12
    assert table["card"]["weights"]["tokenizer"] == weights_hash(FlexTok.from_pretrained("standin"))
    assert status(zoo.demo_main, "--model", "nothing", "--out", str(tmp_path / "d")) == 2 and "standin" in capsys.readouterr().err
    (tmp_path / "demo" / "run.json").write_text("{}")
    assert status(zoo.demo_main, "--model", "standin", "--out", str(tmp_path / "demo"), "--images", "12") == 1
