"""Shipped models: packed small, found by name, and never mixed up.

The model here is a stand-in that was trained for a moment.
"""

import json
import os
import shutil
import subprocess
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from planting import patch
import torch
from PIL import Image

import flextok_edu.apps.card as apps_card
import flextok_edu.apps.explore as apps_explore
import flextok_edu.apps.generate as apps_generate
import flextok_edu.apps.measure as apps_measure
import flextok_edu.apps.models as apps_models
import flextok_edu.apps.options as apps_options
import flextok_edu.apps.page as apps_page
import flextok_edu.apps.train as apps_train
import flextok_edu.apps.zoo as apps_zoo
import flextok_edu.evaluation.growing as growing
import flextok_edu.engine.hub as engine_hub
import flextok_edu.engine.models as engine_models
from flextok_edu.ar import ARModel
from flextok_edu.engine.binding import check_tokenizer, tokenizer_identity
from flextok_edu.engine.config import EvalConfig, Preset, preset
from flextok_edu.engine.files import weights_hash
from flextok_edu.engine.limits import from_dict
from flextok_edu.engine.models import save_model
from flextok_edu.data.learned import Learned, hash_keys, load_learned, save_learned
from flextok_edu.engine.marks import is_ours
from flextok_edu.evaluation.report import load_report
from flextok_edu.data.features import AttributeClassifier
from flextok_edu.apps.run import run
from flextok_edu.apps.run_config import RunConfig
from flextok_edu.tokenizer import FlexTok
from flextok_edu.vae import VAE

ROOT = Path(__file__).resolve().parent.parent


def status(main, *argv):
    try:
        main(list(argv))
    except SystemExit as leave:
        return leave.code
    return 0


def changed(folder, **facts):
    """Other facts in a config.json."""
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **facts}))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo") / "run"
    run(RunConfig(out=str(folder), device="cpu", compile="off", steps=3, images=12, train_images=60))
    return folder


@pytest.fixture(scope="module")
def packed(trained):
    return apps_zoo.pack(trained, "standin", trained.parent / "shipped", same=0.0)


@pytest.fixture
def shipped(packed, monkeypatch):
    patch(monkeypatch, engine_hub, "shipped_models", lambda: {"standin": packed})
    return packed


def test_half_the_bytes(trained):
    vae = VAE.from_pretrained(trained / "vae")
    small = apps_zoo.halved(vae)
    weights = {n for n, _ in vae.named_parameters()}
    assert all(small[n].dtype == torch.float16 for n in weights) and all(
        small[n].dtype == x.dtype for n, x in vae.state_dict().items() if n not in weights
    )
    with torch.no_grad():
        next(vae.parameters()).fill_(1e6)
    with pytest.raises(ValueError, match="float16"):
        apps_zoo.halved(vae)


def test_they_know_each_other(shipped, trained):
    tok, ar, vae = (
        FlexTok.from_pretrained("standin"),
        ARModel.from_pretrained("standin"),
        VAE.from_pretrained("standin"),
    )
    check_tokenizer(ar, tok)
    assert weights_hash(vae) == weights_hash(tok.vae) and not tok.training
    assert (
        ar.tokenizer_identity
        == tokenizer_identity(tok)
        != tokenizer_identity(FlexTok.from_pretrained(trained / "tokenizer"))
    )
    assert {w.dtype for m in (tok, ar, vae) for w in m.parameters()} == {torch.float32}
    assert isinstance(AttributeClassifier.from_pretrained("standin"), AttributeClassifier)
    with pytest.raises(ValueError, match="trained with VAE"):
        FlexTok.from_pretrained("standin", vae=VAE.from_pretrained(trained / "vae"))
    with pytest.raises(ValueError, match="ids of tokenizer"):
        ARModel.from_pretrained("standin", tokenizer=FlexTok.from_pretrained(trained / "tokenizer"))
    with pytest.raises(ValueError, match="ids of tokenizer"):
        check_tokenizer(ar, FlexTok.from_pretrained(trained / "tokenizer"))


def test_the_same_tokens(shipped, trained):
    """Rounding changes hardly an id, and the picture by less than a thousandth."""
    images = torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    a, b = FlexTok.from_pretrained(trained / "tokenizer"), FlexTok.from_pretrained("standin")
    assert (a.tokenize(images) == b.tokenize(images)).float().mean() > 0.95
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
    assert apps_models.open_tokenizer("standin").vae is not None


def test_a_part_that_is_not_there(shipped, monkeypatch, tmp_path):
    shutil.copytree(shipped / "vae", tmp_path / "half" / "vae")
    patch(monkeypatch, engine_hub, "shipped_models", lambda: {"half": tmp_path / "half"})
    assert VAE.from_pretrained("half")
    with pytest.raises(FileNotFoundError, match="has no ar; it has: vae"):
        ARModel.from_pretrained("half")


def test_an_ar_model_beside_a_stranger(packed, tmp_path, monkeypatch):
    """Without a tokenizer given, a shipped AR model is held against the one beside it."""
    shutil.copytree(packed, tmp_path / "mixed")
    patch(monkeypatch, engine_hub, "shipped_models", lambda: {"mixed": tmp_path / "mixed"})
    assert ARModel.from_pretrained("mixed")
    changed(tmp_path / "mixed" / "ar", tokenizer="0123456789abcdef")
    with pytest.raises(ValueError, match="0123456789abcdef"):
        ARModel.from_pretrained("mixed")


def test_a_classifier_goes_to_a_folder_and_back(shipped, tmp_path):
    reader = AttributeClassifier.from_pretrained("standin")
    reader.save_pretrained(tmp_path)
    assert weights_hash(AttributeClassifier.from_pretrained(tmp_path)) == weights_hash(reader)


def test_a_damaged_file(packed, tmp_path, monkeypatch):
    shutil.copytree(packed, tmp_path / "bad")
    patch(monkeypatch, engine_hub, "shipped_models", lambda: {"bad": tmp_path / "bad"})
    weights = tmp_path / "bad" / "vae" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-9] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="bad/vae.*not the ones that config.json describes"):
        FlexTok.from_pretrained("bad")
    weights.write_bytes(bytes(data)[:1000])
    with pytest.raises(ValueError, match="bad/vae/model.safetensors is damaged"):
        VAE.from_pretrained("bad")


def test_again(trained, tmp_path):
    """With again=True a new one takes the place of the old, and one that is refused leaves it where it was;
    nothing else is left behind.
    """
    parts = {p: trained / p for p in ("vae", "tokenizer")}
    place = apps_zoo.pack(parts, "a", tmp_path, "first", same=0.0)
    with pytest.raises(ValueError, match="more than 0.1"):
        apps_zoo.pack(parts, "a", tmp_path, "second", same=0.0, limit=0.1, again=True)
    assert "first" in (place / "README.md").read_text()
    apps_zoo.pack(parts, "a", tmp_path, "third", same=0.0, again=True)
    card = (place / "README.md").read_text()
    assert "third" in card and "first" not in card and [f.name for f in tmp_path.iterdir()] == ["a"]
    assert "flextok_demo" not in card and "ar_guidance" not in card, "it has no AR model"


@pytest.mark.parametrize(
    "change, error",
    (
        ({"limit": 1.0}, "more than 1"),
        ({"same": 1.01}, "stay the same"),
        ({"name": "standin"}, "there already"),
    ),
    ids=("large", "changed", "taken"),
)
def test_refused(packed, trained, change, error):
    """And nothing is left behind."""
    before = sorted(packed.parent.iterdir())
    with pytest.raises(ValueError, match=error):
        apps_zoo.pack(trained, **({"name": "new", "zoo": packed.parent, "same": 0.0} | change))
    assert sorted(packed.parent.iterdir()) == before


def test_strangers_are_not_packed(trained, tmp_path):
    """A tokenizer beside another VAE, an AR model beside another tokenizer, parts that are none, nothing."""
    shutil.copytree(trained, tmp_path / "run")
    go = tmp_path / "run"
    changed(go / "ar", tokenizer="0123456789abcdef")
    with pytest.raises(ValueError, match="writes ids of tokenizer 0123456789abcdef"):
        apps_zoo.pack(go, "a", tmp_path / "zoo", same=0.0)
    vae = VAE.from_pretrained(trained / "vae")
    with torch.no_grad():
        next(vae.parameters()).mul_(1.01)
    save_model(go / "vae", vae, vae.config)
    with pytest.raises(ValueError, match="do not belong together"):
        apps_zoo.pack(go, "a", tmp_path / "zoo", same=0.0)
    with pytest.raises(ValueError, match="no part 'encoder'"):
        apps_zoo.pack({"vae": trained / "vae", "encoder": trained / "tokenizer"}, "a", tmp_path / "zoo")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        apps_zoo.pack({"vae": tmp_path / "nowhere"}, "a", tmp_path / "zoo")
    with pytest.raises(ValueError, match="no tokenizer"):
        apps_zoo.pack({"vae": trained / "vae", "ar": trained / "ar"}, "a", tmp_path / "zoo")
    shutil.rmtree(go / "vae")
    with pytest.raises(ValueError, match="no finished VAE"):
        apps_zoo.pack(go, "a", tmp_path / "zoo", same=0.0)
    assert not (tmp_path / "zoo").exists() or not list((tmp_path / "zoo").iterdir())


@pytest.mark.parametrize(
    "dtype, error",
    ((torch.float8_e4m3fn, "of the ids stay the same"), (None, "the pictures change")),
    ids=("coarse", "wrong"),
)
def test_what_rounding_does_is_looked_at(trained, tmp_path, monkeypatch, dtype, error):
    """A rounding that is too coarse, and one that forgets the VAE's output: hashes fit, pictures do not."""

    def bad(model, state=None):
        out = {n: x.clone() for n, x in (model.state_dict() if state is None else state).items()}
        if dtype:
            return {n: x.to(dtype).float() if x.is_floating_point() else x for n, x in out.items()}
        if isinstance(model, VAE):
            out["decoder.conv_out.bias"].fill_(0.5)
        return out

    patch(monkeypatch, apps_zoo, "halved", bad)
    with pytest.raises(ValueError, match=error):
        apps_zoo.pack(
            {p: trained / p for p in ("vae", "tokenizer")},
            "a",
            tmp_path,
            images=torch.rand(8, 3, 32, 32) * 2 - 1,
            same=0.9,
        )
    assert not list(tmp_path.iterdir())


def test_what_is_written_is_read_back(trained, tmp_path, monkeypatch):
    """A file that is not what was meant to be written does not become a model."""

    def spoiled(folder, model, config, **facts):
        save_model(folder, model, config, **facts)
        if Path(folder).name == "tokenizer":
            changed(Path(folder), vae="0123456789abcdef")

    patch(monkeypatch, engine_models, "save_model", spoiled)
    with pytest.raises(ValueError, match="was trained with VAE 0123456789abcdef"):
        apps_zoo.pack({p: trained / p for p in ("vae", "tokenizer")}, "a", tmp_path, same=0.0)
    assert not list(tmp_path.iterdir())


def test_a_failure_leaves_nothing(trained, tmp_path, monkeypatch):
    def fail(*given):
        raise OSError("disk full")

    patch(monkeypatch, apps_card, "model_card", fail)
    with pytest.raises(OSError, match="disk full"):
        apps_zoo.pack({"vae": trained / "vae"}, "a", tmp_path)
    assert not list(tmp_path.iterdir())


def test_too_large_is_known_before(trained, tmp_path, monkeypatch):
    patch(monkeypatch, apps_zoo, "_write_parts", lambda *given: pytest.fail("it was written"))
    with pytest.raises(ValueError, match="more than 1: train"):
        apps_zoo.pack(trained, "a", tmp_path / "zoo", limit=1.0)


@pytest.mark.parametrize("name", ("", ".a", "a/b", "../a", "-a"))
def test_names_that_are_none(trained, tmp_path, name):
    with pytest.raises(ValueError, match="name of a shipped model|is there already"):
        apps_zoo.pack(trained, name, tmp_path)


def test_from_separate_trainings(trained, tmp_path, monkeypatch):
    """What `flextok_train` leaves, each part in its own folder with its own run.json; and how it is best
    decoded, said afterwards.
    """
    for argv in (
        ["vae", "--set", "train_vae.lr=0.0007", "vae_loss.perceptual=0", "vae_loss.adversarial=0"],
        ["tokenizer", "--vae", "{}/vae"],
        ["ar", "--tokenizer", "{}/tokenizer"],
    ):
        argv = [a.format(tmp_path) for a in argv]
        apps_train.train_main(
            [
                *argv,
                "--steps",
                "2",
                "--train-images",
                "40",
                "--device",
                "cpu",
                "--seed",
                "5",
                "--compile",
                "off",
                "--out",
                str(tmp_path / argv[0]),
            ]
        )
    parts = {p: tmp_path / p for p in ("vae", "tokenizer", "ar")} | {"classifier": trained / "classifier"}
    packed = apps_zoo.pack(
        parts,
        "apart",
        tmp_path / "zoo",
        same=0.0,
        evaluate=EvalConfig(images=10, samples=6, steps=3, guidance=1.5),
    )
    facts = json.loads((packed / "model.json").read_text())
    assert (
        facts["made"]["vae"]["seed"] == facts["made"]["ar"]["seed"] == 5
        and facts["made"]["tokenizer"]["command"] == "flextok_train tokenizer"
        and facts["made"]["tokenizer"]["images"]
    )
    assert (
        facts["preset"]["train_vae"]["lr"] == 0.0007
        and facts["preset"]["train_tokenizer"]["steps"] == 2
        and facts["preset"]["train_ar"]["steps"] == 2
        and facts["preset"]["evaluate"]["steps"] == 3
    )
    patch(monkeypatch, engine_hub, "shipped_models", lambda: {"apart": packed})
    assert (
        status(apps_explore.demo_main, "--out", str(tmp_path / "demo"), "--images", "10", "--device", "cpu")
        == 0
    )
    page, card = (tmp_path / "demo" / "report.html").read_text(), load_report(tmp_path / "demo").card
    assert (
        card["steps"] == 3
        and card["guidance"] == 1.5
        and card["images"] == 10
        and card["train_hash"] == facts["made"]["tokenizer"]["images"]
        and "seed 5" in card["trained_on"]
    )
    assert (
        facts["vae_trained_against"] == card["vae_trained_against"] == "nothing but pixels"
        and "nothing but pixels" in (packed / "README.md").read_text()
    ), "as its own training said"
    assert (
        {found["rule"] for found in card["learned"].values()} == {"scenes"}
        and card["floor"].startswith("other held-out scenes")
        and load_learned(packed / "vae").count == 40
    )
    assert page.count("data:image/png") == 4 and "# apart" in page and "Intended use" in page
    assert card["weights"]["tokenizer"] == weights_hash(FlexTok.from_pretrained("apart")) and card["weights"][
        "ar"
    ] == weights_hash(ARModel.from_pretrained("apart"))


def test_commands_take_a_shipped_model_by_its_name(shipped, tmp_path, monkeypatch):
    """Its preset says how it is decoded and measured; the AR model's tokenizer need not be named."""
    made = json.loads((shipped / "model.json").read_text())["preset"]
    assert apps_models.preset_of(
        apps_measure.EvalOptions(tokenizer="standin", out="x"), None, "standin"
    ) == from_dict(Preset, made)
    assert (
        apps_models.preset_of(
            apps_measure.EvalOptions(tokenizer="standin", out="x", preset="tiny"), None, "standin"
        ).name
        == "tiny"
    )
    assert (
        status(
            apps_measure.eval_main,
            "standin",
            "--ar",
            "standin",
            "--classifier",
            "standin",
            "--out",
            str(tmp_path / "table"),
            "--device",
            "cpu",
        )
        == 0
    )
    card = load_report(tmp_path / "table").card
    assert card["images"] == made["evaluate"]["images"] == 12 and card["steps"] == made["evaluate"]["steps"]
    facts = json.loads((shipped / "model.json").read_text())
    own = from_dict(
        EvalConfig, {**made["evaluate"], "steps": 3, "guidance": 1.5, "ar_guidance": 2.5, "temperature": 0.5}
    )
    patch(
        monkeypatch,
        apps_models,
        "training_preset",
        lambda model: replace(from_dict(Preset, facts["preset"]), evaluate=own),
    )
    asked = []

    def grown(ar, tok, labels, counts, choice, look, seeds):
        asked.append((look.steps, look.guidance, choice.guidance, choice.temperature))
        yield from ((torch.zeros(len(labels), k), torch.zeros(len(labels), 3, 32, 32)) for k in counts)

    patch(monkeypatch, growing, "grow", grown)
    for more in ([], ["--steps", "1", "--ar-guidance", "1"], ["--guidance", "1", "--temperature", "0"]):
        assert (
            status(
                apps_generate.generate_main,
                "0",
                "--ar",
                "standin",
                "--budgets",
                "1",
                "--out",
                str(tmp_path / "new"),
                "--device",
                "cpu",
                *more,
            )
            == 0
        )
    assert (
        asked == [(3, 1.5, 2.5, 0.5), (1, 1.5, 1.0, 0.5), (3, 1.0, 2.5, 0.0)]
        and (tmp_path / "new" / "sheet.png").exists()
    )


def test_the_card(packed):
    card = (packed / "README.md").read_text()
    own = json.loads((packed / "tokenizer" / "config.json").read_text())
    assert (
        "license: apache-2.0" in card
        and own["loaded"] in card
        and "equal ids" in card
        and "tokens" in card
        and "before rounding" in card
        and "torch 2" in card
        and "| 3 x 64 |" in card
    )
    assert "Apache-2.0" in card and "Limits" in card and "Intended use" in card
    logs = {part: json.loads((packed / part / "log.json").read_text()) for part in apps_card.PARTS}
    assert all(rows and len(rows) <= 301 for rows in logs.values())
    assert (
        len(apps_zoo._thin([{"step": i, "loss": 1 / 3} for i in range(1000)])) <= 301
        and apps_zoo._thin([{"step": i} for i in range(1000)])[-1]["step"] == 999
    )
    assert [row["step"] for row in apps_zoo._thin([{"step": i} for i in range(5)])] == [
        0,
        1,
        2,
        3,
        4,
    ] and apps_zoo._thin([]) == []


def test_a_table_of_other_weights(trained, packed, tmp_path):
    """A table is packed if it was measured on these weights, before or after rounding; another would be a
    lie.
    """
    parts, report = {p: trained / p for p in ("vae", "tokenizer")}, load_report(trained)
    tok = FlexTok.from_pretrained(packed / "tokenizer", vae=VAE.from_pretrained(packed / "vae"))
    now = replace(report, card=report.card | {"weights": {"tokenizer": weights_hash(tok)}})
    folder = apps_zoo.pack(parts, "now", tmp_path, same=0.0, report=now)
    assert (
        "of these weights" in (folder / "README.md").read_text()
        and load_report(folder).rows == report.rows
        and not list(folder.glob("*scores*"))
    )
    with pytest.raises(ValueError, match="measured on tokenizer 0123456789abcdef"):
        apps_zoo.pack(
            parts,
            "then",
            tmp_path,
            same=0.0,
            report=replace(report, card=report.card | {"weights": {"tokenizer": "0123456789abcdef"}}),
        )


@pytest.mark.parametrize(
    "text, found",
    (("1,4,16,all", [1, 4, 16]), ("all,1", [16, 1]), ("2", [2]), ("all", [16]), ("1 2", [1, 2])),
)
def test_budgets(text, found):
    assert apps_explore.parse_budgets(text, 16) == found


@pytest.mark.parametrize("text", ("", ",", "0", "17", "-1", "most", "1.5", "²"))
def test_no_budgets(text):
    with pytest.raises(apps_options.UsageError):
        apps_explore.parse_budgets(text, 16)


def test_reconstruct(shipped, tmp_path, capsys):
    """Pictures of any size and kind become strips; a broken one is left out and said; nothing readable is an
    error.
    """
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (50, 90, 3), dtype=np.uint8)).save(tmp_path / "wide.jpg")
    Image.fromarray(rng.integers(0, 255, (70, 40, 4), dtype=np.uint8)).save(tmp_path / "tall.png")
    (tmp_path / "broken.jpg").write_bytes(b"not a picture")
    files = [str(tmp_path / n) for n in ("wide.jpg", "tall.png", "broken.jpg")]
    rest = (
        "--model",
        "standin",
        "--budgets",
        "1,all",
        "--out",
        str(tmp_path / "strip.png"),
        "--device",
        "cpu",
    )
    assert status(apps_explore.reconstruct_main, *files[:2], *rest) == 0
    two = Image.open(tmp_path / "strip.png").size
    assert is_ours(tmp_path / "strip.png"), "so it may be replaced by the next"
    assert status(apps_explore.reconstruct_main, *files, *rest) == 1, "one could not be read"
    assert Image.open(tmp_path / "strip.png").size == two
    assert (
        status(apps_explore.reconstruct_main, files[2], *rest) == 1
        and "cannot be read" in capsys.readouterr().err
    )
    assert (
        status(apps_explore.reconstruct_main, "nowhere.jpg", *rest) == 1
        and "nowhere.jpg" in capsys.readouterr().err
    )
    assert status(apps_explore.reconstruct_main, files[0], "--model", "standin", "--budgets", "99") == 2
    kept = (tmp_path / "tall.png").read_bytes()
    for wrong in (["--out", files[1]], ["--out", "strip.jpg"], ["--steps", "0"], ["--guidance", "nan"]):
        assert status(apps_explore.reconstruct_main, files[1], "--model", "standin", *wrong) == 2, wrong
    assert (tmp_path / "tall.png").read_bytes() == kept
    assert (
        status(apps_explore.reconstruct_main, files[0], *rest[:-4], "--out", files[1], "--device", "cpu") == 2
    ), "a picture of somebody else's, though not one that is read"
    assert (tmp_path / "tall.png").read_bytes() == kept and "--force" in capsys.readouterr().err
    assert (
        status(
            apps_explore.reconstruct_main,
            files[1],
            *rest[:-4],
            "--out",
            files[1],
            "--force",
            "--device",
            "cpu",
        )
        == 2
    ), "not even by force: it is read"
    assert (tmp_path / "tall.png").read_bytes() == kept
    assert status(
        apps_explore.reconstruct_main, files[0], *rest[:-4], "--out", files[1], "--force", "--device", "cpu"
    ) == 0 and is_ours(files[1])
    assert (
        status(
            apps_explore.reconstruct_main, files[0], "--model", "standin", "--set", "tokenizer.registers=4"
        )
        == 2
    ), "an option that would do nothing"


def test_the_strip_shows_what_it_says(shipped, tmp_path, monkeypatch):
    """One row a photo; original, VAE alone, and one column for each budget, from the same ids, with the
    model's own settings.
    """
    rows = []
    draw = apps_page.picture_rows
    patch(monkeypatch, apps_page, "picture_rows", lambda *given: rows.append(given) or draw(*given))
    x = torch.randint(0, 255, (3, 32, 32), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    Image.fromarray(x.permute(1, 2, 0).numpy()).save(tmp_path / "a.png")
    apps_explore.reconstruct(
        apps_explore.ReconstructOptions(
            images=(str(tmp_path / "a.png"),),
            model="standin",
            budgets="1,all",
            out=str(tmp_path / "s.png"),
            device="cpu",
            seed=4,
        )
    )
    (pictures,), names, _, title, tops, _ = rows[0]
    tok, usual = FlexTok.from_pretrained("standin"), preset("micro").evaluate
    original = x[None] / 127.5 - 1
    with torch.no_grad():
        wanted = [
            original,
            tok.vae.decode(tok.vae.encode(original)),
            *(
                tok.detokenize(
                    tok.tokenize(original)[:, :k], steps=usual.steps, guidance=usual.guidance, seed=4
                )
                for k in (1, 16)
            ),
        ]
    torch.testing.assert_close(pictures, torch.cat(wanted), atol=1e-5, rtol=0)
    assert (
        tops == ["original", "VAE alone", "1 token", "16 tokens"]
        and names == ["a"]
        and f"{usual.steps} steps" in title
    )


def test_no_demo(shipped, tmp_path, capsys, monkeypatch):
    """Refused before anything is measured: a model that is none, no time, another run's folder, a part or the
    preset missing.
    """
    out = ("--out", str(tmp_path / "demo"), "--device", "cpu")
    assert (
        status(apps_explore.demo_main, "--model", "nothing", *out) == 2
        and "standin" in capsys.readouterr().err
    )
    for wrong in (["--minutes", "0"], ["--minutes", "nan"], ["--images", "0"], ["--images", "1"]):
        assert status(apps_explore.demo_main, *wrong, *out) == 2, wrong
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "run.json").write_text("{}")
    assert status(apps_explore.demo_main, *out) == 1 and "training run" in capsys.readouterr().err
    (tmp_path / "demo" / "run.json").unlink()
    (tmp_path / "demo" / "quality.png").write_bytes(b"a picture of mine")
    assert status(apps_explore.demo_main, *out) == 1 and "--force" in capsys.readouterr().err
    assert (tmp_path / "demo" / "quality.png").read_bytes() == b"a picture of mine"
    (tmp_path / "demo" / "quality.png").unlink()
    shutil.copytree(shipped, tmp_path / "other")
    patch(monkeypatch, engine_hub, "shipped_models", lambda: {"other": tmp_path / "other"})
    (tmp_path / "other" / "model.json").write_text(json.dumps({"preset": None, "made": {}}))
    assert status(apps_explore.demo_main, *out) == 1 and "does not know the preset" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "other" / "classifier")
    assert status(apps_explore.demo_main, *out) == 1 and "no classifier" in capsys.readouterr().err
    assert not list((tmp_path / "demo").iterdir())
    patch(monkeypatch, engine_hub, "shipped_models", dict)
    assert status(apps_explore.demo_main, *out) == 2 and "no model comes with" in capsys.readouterr().err


def test_as_many_as_fit(shipped, monkeypatch):
    """Twice the time, about twice the pictures; never fewer than the least."""
    tok, now = FlexTok.from_pretrained("standin"), [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(
        tok, "detokenize", lambda ids, **how: now.__setitem__(0, now[0] + 0.01 * len(ids)) or ids
    )
    few = torch.zeros(8, 3, 32, 32)
    a, b = (apps_explore.images_that_fit(tok, few, 6, 1.0, seconds) for seconds in (60, 120))
    assert abs(b - 2 * a) <= 10 and a * 0.01 * 5 * 1.5 < 60 < a * 0.01 * 5 * 4, (
        "five token counts; half as many samples"
    )
    assert apps_explore.images_that_fit(tok, few, 6, 1.0, -5.0) == 16


def test_from_a_wheel(packed, tmp_path):
    """Wheel and source archive carry the shipped files; installed from the wheel, a model is found by name in
    a clean process that has no network.
    """
    clone, unpacked = tmp_path / "clone", tmp_path / "unpacked"
    shutil.copytree(
        ROOT / "flextok_edu", clone / "flextok_edu", ignore=shutil.ignore_patterns("zoo", "__pycache__")
    )
    for name in ("setup.py", "settings.ini", "README.md", "MANIFEST.in", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, clone)
    shutil.copytree(packed, clone / "flextok_edu" / "zoo" / "standin")
    result = subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "--formats=zip", "bdist_wheel"],
        cwd=clone,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    files = {
        f"flextok_edu/zoo/standin/{f.relative_to(packed).as_posix()}"
        for f in packed.rglob("*")
        if f.is_file()
    }
    (wheel,), (source,) = (clone / "dist").glob("*.whl"), (clone / "dist").glob("*.zip")
    assert len(files) > 10 and files <= set(zipfile.ZipFile(wheel).namelist())
    assert files <= {n.split("/", 1)[1] for n in zipfile.ZipFile(source).namelist()}
    entry = next(
        zipfile.ZipFile(wheel).read(n).decode()
        for n in zipfile.ZipFile(wheel).namelist()
        if n.endswith("entry_points.txt")
    )
    assert (
        "flextok_reconstruct = flextok_edu.apps.explore:reconstruct_main" in entry
        and "flextok_demo = flextok_edu.apps.explore:demo_main" in entry
    )
    zipfile.ZipFile(wheel).extractall(unpacked)
    ask = (
        f"import sys; sys.path.insert(0, {str(unpacked)!r})\nimport flextok_edu; assert "
        f"flextok_edu.__file__.startswith({str(unpacked)!r})\nfrom flextok_edu.ar import ARModel\nfrom "
        "flextok_edu.engine.files import weights_hash\nfrom flextok_edu.tokenizer import "
        "FlexTok\nARModel.from_pretrained('standin'); "
        "print(weights_hash(FlexTok.from_pretrained('standin')))"
    )
    result = subprocess.run(
        [sys.executable, "-I", "-c", ask],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    tok = FlexTok.from_pretrained(packed / "tokenizer")
    assert result.stdout.strip() == weights_hash(tok), result.stderr[-2000:]


# --- what a card says, and what it does not do
# ------------------------------------------------------------------------


def test_what_was_learned_goes_along(trained, packed, tmp_path):
    """A record beside each part, or one beside all of them, is packed, stands on the card, and a part without
    one says so.
    """
    shutil.copytree(trained, tmp_path / "run")
    for file in (tmp_path / "run").rglob("learned.*"):
        file.unlink()
    bare = (
        apps_zoo.pack(
            {p: tmp_path / "run" / p for p in ("vae", "tokenizer")}, "bare", tmp_path / "zoo", same=0.0
        )
        / "README.md"
    ).read_text()
    assert "- vae: unknown" in bare and "- tokenizer: unknown" in bare
    learned = Learned(
        "one in eight",
        "photos | of `mine` <b>",
        3,
        hash_keys(torch.tensor([-5, 0, 7])),
        torch.tensor([-5, 0, 7]),
    )
    save_learned(tmp_path / "run" / "vae", learned)
    place = apps_zoo.pack(
        {p: tmp_path / "run" / p for p in ("vae", "tokenizer")}, "known", tmp_path / "zoo", same=0.0
    )
    back, card = load_learned(place / "vae"), (place / "README.md").read_text()
    assert (
        back.facts == learned.facts
        and torch.equal(back.keys, learned.keys)
        and load_learned(place / "tokenizer") is None
    )
    assert (
        "- vae: 3 pictures (photos \\| of \\`mine\\` \\<b\\>), rule: one in eight" in card
        and "- tokenizer: unknown" in card
    )


def test_labels_are_no_markup(trained, tmp_path):
    """What a stranger wrote into run.json does not become a table, a link, a tag or a line of its own in the
    card.
    """
    shutil.copytree(trained, tmp_path / "run")
    told = json.loads((trained / "run.json").read_text())
    evil = "a|b`c <script>alert(1)</script> [x](http://y)\n## Free money\n\x1b[31m $1$ caf\udce9"
    told["asked"]["data"], told["preset"]["name"], told["versions"] = evil, evil, {"to|rch": "2\n# x"}
    (tmp_path / "run" / "run.json").write_text(json.dumps(told))
    card = (apps_zoo.pack(tmp_path / "run", "evil", tmp_path / "zoo", same=0.0) / "README.md").read_text(
        encoding="utf-8"
    )
    outside = card.split("## Measured")[0]
    for bad in ("<script>", "\n## Free", "[x](", "\x1b", "a|b", "$1$", "\n# x"):
        assert bad not in outside, bad
    assert "Free money" in outside and [
        line.count(" | ") for line in outside.splitlines() if line.startswith("| vae")
    ] == [7]
    assert (
        apps_card.markdown("plain words, 64 px: /usr/share/x-1.png")
        == "plain words, 64 px: /usr/share/x-1.png"
    )


def test_the_card_says_what_was_done(trained, tmp_path):
    """No averages, nothing but pixels: the card follows the presets of the parts."""
    shutil.copytree(trained, tmp_path / "run")
    told = json.loads((trained / "run.json").read_text())
    card = (apps_zoo.pack(tmp_path / "run", "as_is", tmp_path / "zoo", same=0.0) / "README.md").read_text()
    assert "exponential averages" in card and "a critic" in card and "efficientnet" in card
    for part in ("vae", "tokenizer", "ar"):
        told["preset"][f"train_{part}"]["ema"] = 0.0
    told["preset"]["vae_loss"] |= {"perceptual": 0.0, "adversarial": 0.0}
    (tmp_path / "run" / "run.json").write_text(json.dumps(told))
    place = apps_zoo.pack(tmp_path / "run", "changed", tmp_path / "zoo", same=0.0)
    card, facts = (place / "README.md").read_text(), json.loads((place / "model.json").read_text())
    assert "exponential averages" not in card and "of the last step" in card and "nothing but pixels" in card
    assert facts["vae_trained_against"] == "nothing but pixels" and facts["weights_are"] == "of the last step"
    (tmp_path / "run" / "run.json").unlink()
    assert (
        "weights are unknown"
        in (
            apps_zoo.pack(
                tmp_path / "run",
                "nobody_knows",
                tmp_path / "zoo",
                same=0.0,
                images=torch.rand(8, 3, 32, 32) * 2 - 1,
            )
            / "README.md"
        ).read_text()
    )


def test_a_description_that_cannot_be_true(packed, tmp_path, monkeypatch):
    """Sizes of a stranger's model.json and config.json are refused before anything of that size is made, in
    words.
    """
    place = tmp_path / "stranger"
    shutil.copytree(packed, place)
    patch(monkeypatch, engine_hub, "shipped_models", lambda: {"stranger": place})
    good = json.loads((place / "model.json").read_text())

    def described(**changes):
        (place / "model.json").write_text(json.dumps(good | changes))

    for keys, value in (
        (("tokenizer", "registers"), 10**9),
        (("tokenizer", "encoder", "depth"), 10**9),
        (("vae", "channels"), [2**40]),
        (("evaluate", "steps"), -1),
        (("image_size",), 1.5),
    ):
        preset_ = json.loads(json.dumps(good["preset"]))
        inner = preset_
        for key in keys[:-1]:
            inner = inner[key]
        inner[keys[-1]] = value
        described(preset=preset_)
        with pytest.raises(ValueError, match="model.json"):
            apps_card.read_facts(place)
        assert (
            status(
                apps_explore.demo_main,
                "--model",
                "stranger",
                "--out",
                str(tmp_path / "demo"),
                "--device",
                "cpu",
            )
            == 1
        )
    for changes in (
        {"made": []},
        {"made": {"vae": {"seed": "0"}}},
        {"preset": "tiny"},
        {"rounding": {"a": None}},
    ):
        described(**changes)
        with pytest.raises(ValueError, match="model.json"):
            apps_card.read_facts(place)
    (place / "model.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        apps_card.read_facts(place)
    (place / "vae" / "config.json").write_text(
        (place / "vae" / "config.json").read_text().replace('"layers": 1', '"layers": 1000000000')
    )
    with pytest.raises(ValueError):
        VAE.from_pretrained("stranger")


@pytest.mark.parametrize(
    "told",
    (
        '{"preset": {"name": "own"}, "asked": 3, "data": [], "recipe": "x", "versions": {"torch": 2}}',
        '{"preset": {"registers": 10}}',
        '{"preset": {"tokenizer": {"registers": 1e99}}}',
        "[1]",
        '{"preset": 4}',
        "[" * 9999,
        "",
    ),
)
def test_a_damaged_record_of_a_training(tmp_path, told):
    """What cannot be known is unknown, what cannot be is refused in words."""
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "run.json").write_text(told)
    try:
        facts = apps_zoo._history({"vae": tmp_path / "vae"}, None)
    except ValueError as error:
        assert str(error) and "own" not in told
    else:
        assert (
            facts["preset"] == {"name": "own"}
            and facts["made"]["vae"]["data"] is None
            and facts["made"]["vae"]["versions"] is None
        )


@pytest.mark.parametrize(
    "name",
    ("$5_to_$10.png", "a^b_{c.png", "\\frac{.png", "中文.png", os.fsdecode(b"caf\xe9.png"), "tab\there.png"),
)
def test_any_file_name(shipped, tmp_path, name):
    """Dollars, braces, Chinese and bytes that are no text are file names like any other."""
    try:
        Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "plain.png")
        os.rename(tmp_path / "plain.png", tmp_path / name)
    except (OSError, UnicodeError):
        pytest.skip("this file system cannot hold the name")
    assert (
        status(
            apps_explore.reconstruct_main,
            str(tmp_path / name),
            "--model",
            "standin",
            "--budgets",
            "1",
            "--out",
            str(tmp_path / "out.png"),
            "--device",
            "cpu",
        )
        == 0
    )
    assert is_ours(tmp_path / "out.png")
