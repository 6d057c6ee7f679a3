"""The commands: end to end at micro, stopped and started again, and given nonsense."""

import ast
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import flextok_edu.apps.cli as apps_cli
import flextok_edu.apps.estimate as apps_estimate
import flextok_edu.apps.generate as apps_generate
import flextok_edu.apps.models as apps_models
import flextok_edu.apps.options as apps_options
import flextok_edu.apps.pace as apps_pace
import flextok_edu.apps.training as apps_training
from flextok_edu.ar import ARModel
from flextok_edu.engine.binding import check_tokenizer
from flextok_edu.apps.cli import command_line, read_settings
from flextok_edu.apps.options import UsageError, override, parse_settings
import flextok_edu.engine.distributed as engine_distributed
import flextok_edu.engine.tokenizers as engine_tokenizers
from flextok_edu.engine.config import preset
from flextok_edu.engine.files import weights_hash
from flextok_edu.data.scenes import KINDS, ToyScenes, draw
from flextok_edu.evaluation.report import load_report
from flextok_edu.tokenizer import FlexTok, with_decoder
from flextok_edu.vae import VAE

from planting import patch

ROOT = Path(__file__).resolve().parent.parent
DATA = ["--train-images", "40", "--device", "cpu"]
TINY = DATA + [
    "--compile",
    "off",
    "--set",
    "evaluate.images=12",
    "evaluate.samples=12",
    "train_vae.batch=8",
    "train_tokenizer.batch=8",
    "train_ar.batch=8",
    "vae.channels=16,16",
    "vae.groups=4",
    "tokenizer.encoder.width=64",
    "tokenizer.decoder.width=64",
    "tokenizer.decoder.depth=2",
    "ar.width=64",
    "ar.depth=1",
]

MODULES = {"cache": "tokenize", "detokenize": "generate", "eval": "measure", "compare": "measure"}
MODULES["decode"] = "encode"


def call(name, *argv):
    """A command in this process; its exit status."""
    try:
        module = import_module(f"flextok_edu.apps.{MODULES.get(name, name)}")
        getattr(module, f"{name}_main")([str(a) for a in argv])
    except SystemExit as leave:
        return leave.code
    return 0


def refused(capsys, status, text, name, *argv):
    """It ends with this status and one line that says why."""
    capsys.readouterr()
    assert call(name, *argv) == status
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith(f"flextok_{name}: ") and text in said[0], said


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A VAE, a tokenizer and an AR model after a few steps."""
    root = tmp_path_factory.mktemp("runs")
    assert call("train", "vae", "--out", root / "vae", "--steps", 4, *TINY) == 0
    assert call("train", "tokenizer", "--vae", root / "vae", "--out", root / "tok", "--steps", 4, *TINY) == 0
    assert call("train", "ar", "--tokenizer", root / "tok", "--out", root / "ar", "--steps", 3, *TINY) == 0
    return root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder with two classes, mixed sizes, and a broken file."""
    root, data = tmp_path_factory.mktemp("pictures"), ToyScenes("train", 64, 1, seed=1, length=24)
    for i in range(24):
        (root / ("day", "night")[i % 2]).mkdir(exist_ok=True)
        Image.fromarray(np.array(draw(data.scene(i), 40 + 3 * i))).save(
            root / ("day", "night")[i % 2] / f"{i}.png"
        )
    return root


def weights(folder):
    return json.loads((Path(folder) / "config.json").read_text())["weights"]


# --- settings
# --------------------------------------------------------------------------------------------------------


def test_every_number_of_every_preset_can_be_set():
    p = preset("micro")
    for name in apps_options.setting_names(p):
        value = asdict(p)
        for part in name.split("."):
            value = value[part]
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        assert override(p, {name: text}) == p, name
    assert override(p, json.loads(json.dumps(asdict(p)))) == p, "what json gives back is the same preset"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("train_tokenizer.learning_rate=1", "there is no setting 'train_tokenizer.learning_rate'"),
        ("tokeniser.registers=8", "did you mean tokenizer.registers"),
        ("registers=8", "did you mean tokenizer.registers"),
        ("train_vae.stepz=8", "did you mean train_vae.steps"),
        ("tokenizer.registers=many", "must be int"),
        ("train_vae.steps=1.5", "must be int"),
        ("train_vae.lr=nan", "must be float"),
        ("vae.attention=1", "must be bool"),
        ("vae=3", "is a group"),
        ("image_size.x=3", "there is no setting"),
        ("tokenizer.levels=8,x", "must be int"),
        ("train_vae.steps", "name=value"),
        ("=3", "name=value"),
    ],
)
def test_settings_that_are_none(text, expected):
    with pytest.raises(UsageError, match=expected):
        override(preset("micro"), parse_settings((text,)))


def test_a_config_of_ones_own(tmp_path, capsys):
    file = tmp_path / "mine.json"
    file.write_text(
        json.dumps({"options": {"seed": 3}, "preset": {"name": "micro", "train_vae": {"lr": 1, "steps": 2}}})
    )
    found = read_settings(file)
    assert (
        found.options["seed"] == 3
        and found.preset.train_vae.lr == 1.0
        and type(found.preset.train_vae.lr) is float
        and found.preset.train_vae.batch == preset("micro").train_vae.batch
    )
    options, base = apps_cli.command_line(
        apps_training.TrainOptions, "flextok_train", ["vae", "--config", str(file), "--seed", "4"]
    )
    assert options.seed == 4 and base == found.preset, "the command line goes before the file"
    for text, expected in (
        ('{"option": {}}', "did you mean options"),
        ('{"options": {"sede": 1}}', "did you mean seed"),
        ('{"options": {"seed": "x"}}', "must be int"),
        ('{"preset": {"train_vae": {"lrr": 1}}}', "did you mean train_vae.lr"),
        ("{", "no json"),
        ("[]", "must hold an object"),
        ('{"command": "flextok_cache latents"}', "is of flextok_cache latents"),
    ):
        file.write_text(text)
        refused(capsys, 2, expected, "train", "vae", "--config", file)


# --- training
# --------------------------------------------------------------------------------------------------------


def test_models_open_as_a_user_opens_them(trained):
    vae, tok = VAE.from_pretrained(trained / "vae"), FlexTok.from_pretrained(trained / "tok")
    assert weights_hash(tok.vae) == weights_hash(vae) == weights(trained / "vae")
    ARModel.from_pretrained(trained / "ar", tokenizer=tok)
    assert not list(trained.rglob("checkpoints")) and not list(trained.rglob(".*")), "nothing is left over"


@pytest.mark.parametrize("part, place", (("vae", "vae"), ("tokenizer", "tok"), ("ar", "ar")))
def test_models_are_known_by_their_kind(trained, tmp_path, part, place):
    """By the kind that config.json names, whatever its settings are called; an older file names none."""
    facts = json.loads((trained / place / "config.json").read_text())
    facts.pop("kind", None)

    def found(**says):
        (tmp_path / "config.json").write_text(json.dumps(says))
        try:
            return apps_models.find_model(str(tmp_path), part) == tmp_path
        except FileNotFoundError:
            return False

    kind = "flextok" if part == "tokenizer" else part
    assert found(**facts), "an older file"
    assert found(**facts, kind=kind) and found(weights=facts["weights"], config={"size": 3}, kind=kind)
    assert not found(**facts, kind="another") and not found(weights=facts["weights"], config={"size": 3})
    assert not found(kind=kind), "a configuration belongs to it"


@pytest.mark.parametrize("stage", ("vae", "tok", "ar"))
def test_a_run_from_its_own_json_gives_the_same_weights(trained, tmp_path, stage, capsys):
    assert call("train", "--config", trained / stage / "run.json", "--out", tmp_path / "again") == 0
    assert weights(tmp_path / "again") == weights(trained / stage)
    assert (
        call("train", "--config", tmp_path / "again" / "run.json", "--out", tmp_path / "again") == 0
        and "finished before" in capsys.readouterr().out
    )


def test_another_run_in_the_same_folder(trained, tmp_path, capsys):
    argv = ["vae", "--out", tmp_path / "vae", *TINY]
    assert call("train", *argv, "--steps", 2) == 0
    first = weights(tmp_path / "vae")
    refused(capsys, 1, "preset.train_vae.steps: 2 then, 3 now", "train", *argv, "--steps", 3)
    refused(capsys, 1, "seed: 0 then, 1 now", "train", *argv, "--steps", 2, "--seed", 1)
    assert call("train", *argv, "--steps", 3, "--fresh") == 0
    assert weights(tmp_path / "vae.old-1") == first and weights(tmp_path / "vae") != first, (
        "put aside, not deleted"
    )


PROGRAM = "import sys; from flextok_edu.apps.train import train_main; train_main(sys.argv[1:])"
LOUD = """
import sys
import flextok_edu.apps.train as apps_train
from flextok_edu.engine.distributed import Distributed
real = Distributed.micro_batches
def parts(self, step):
    print("in training", flush=True)
    return real(self, step)
Distributed.micro_batches = parts
apps_train.train_main(sys.argv[1:])
"""


@pytest.mark.skipif(os.name != "posix", reason="signals")
def test_killed_and_started_again(trained, tmp_path, capsys):
    """SIGTERM at a random moment of the training; the same command again; the weights of a run that nobody
    disturbed.
    """
    argv = ["tokenizer", "--vae", trained / "vae", "--steps", 40, *TINY]
    assert call("train", *argv, "--out", tmp_path / "calm") == 0
    child = subprocess.Popen(
        [sys.executable, "-c", LOUD, *map(str, argv), "--out", str(tmp_path / "hard")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert "40 steps of 8" in child.stdout.readline() and child.stdout.readline() == "in training\n"
    time.sleep(float(np.random.uniform(0.0, 0.8)))
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=300)
    if child.returncode:  # else it was faster than we
        assert (
            child.returncode == 143
            and "the same command goes on from there" in err
            and "Traceback" not in err
        ), err
        assert (
            list((tmp_path / "hard" / "checkpoints").iterdir())
            and not (tmp_path / "hard" / "config.json").exists()
        )
        capsys.readouterr()
        assert call("train", *argv, "--out", tmp_path / "hard") == 0
        assert "goes on after step" in capsys.readouterr().out
    assert weights(tmp_path / "hard") == weights(tmp_path / "calm")
    assert [
        {k: r[k] for k in ("step", "tokenizer")}
        for r in json.loads((tmp_path / "hard" / "log.json").read_text())
    ] == [
        {k: r[k] for k in ("step", "tokenizer")}
        for r in json.loads((tmp_path / "calm" / "log.json").read_text())
    ]


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("number, status", ((signal.SIGINT, 130), (signal.SIGTERM, 143)))
def test_exit_status_of_signals(trained, tmp_path, monkeypatch, capsys, number, status):
    """In the third step, from inside: the signal arrives while the loop runs."""
    real, count = engine_distributed.Distributed.micro_batches, []

    def micro_batches(self, step):
        count.append(step)
        if len(count) == 4:
            os.kill(os.getpid(), number)
        return real(self, step)

    monkeypatch.setattr(engine_distributed.Distributed, "micro_batches", micro_batches)
    argv = ["vae", "--out", tmp_path / "vae", "--steps", 6, *TINY]
    refused(capsys, status, "the same command goes on", "train", *argv)
    monkeypatch.undo()
    assert call("train", *argv) == 0 and "goes on after step" in capsys.readouterr().out
    before = signal.getsignal(signal.SIGTERM)
    assert before in (signal.SIG_DFL, None) or before.__module__ != "flextok_edu.apps.cli", (
        "the handler is put back"
    )


def test_micro_batches_and_recomputing_make_the_same_step(trained, tmp_path):
    assert (
        call(
            "train",
            "tokenizer",
            "--vae",
            trained / "vae",
            "--out",
            tmp_path / "tok",
            "--steps",
            4,
            "--micro",
            2,
            "--recompute",
            *TINY,
        )
        == 0
    )
    a, b = (FlexTok.from_pretrained(f).own_state() for f in (trained / "tok", tmp_path / "tok"))
    assert max(float((a[n].float() - b[n].float()).abs().max()) for n in a) < 1e-2


def test_a_decoder_goes_on_and_ids_stay(trained, tmp_path, capsys):
    """`flextok_train vae --vae`: encoder and scale as before, so a tokenizer takes the VAE by `with_decoder`;
    another VAE it refuses.
    """
    assert call("train", "vae", "--vae", trained / "vae", "--out", tmp_path / "vae", "--steps", 3, *TINY) == 0
    old, new = (VAE.from_pretrained(f) for f in (trained / "vae", tmp_path / "vae"))
    changed = {n for n, w in new.state_dict().items() if not torch.equal(w, old.state_dict()[n])}
    assert changed and all(n.startswith("decoder.") for n in changed)
    tok, images = FlexTok.from_pretrained(trained / "tok"), torch.rand(2, 3, 32, 32) * 2 - 1
    ids, picture = tok.tokenize(images), tok.detokenize(tok.tokenize(images), steps=2)
    with pytest.raises(ValueError, match="its tokens would mean nothing"):
        FlexTok.from_pretrained(trained / "tok", vae=new)
    assert torch.equal(with_decoder(tok, new).tokenize(images), ids) and not torch.equal(
        tok.detokenize(ids, steps=2), picture
    )
    tok.save_pretrained(tmp_path / "tok")
    assert torch.equal(FlexTok.from_pretrained(tmp_path / "tok", vae=new).tokenize(images), ids)
    shifted = VAE.from_pretrained(tmp_path / "vae")
    shifted.latent_std *= 2
    with pytest.raises(ValueError, match="makes other latents: latent_std"):
        with_decoder(tok, shifted)
    refused(
        capsys,
        1,
        "the VAE to go on with",
        "train",
        "vae",
        "--vae",
        trained / "vae",
        "--out",
        tmp_path / "other",
        "--steps",
        3,
        *TINY,
        "vae.layers=2",
    )


def test_a_trained_model_goes_on_with_other_pictures(trained, pictures, tmp_path, capsys):
    """`--part both` for the VAE, then `--tokenizer` beside `--vae`: begun from the old weights, ids of the
    new latents, and written down so.
    """
    argv = [
        "--data",
        pictures,
        "--seed",
        1,
        "--steps",
        3,
        *TINY[2:],
    ]  # another seed: what began anew would be far from the old weights

    def near(new, old):  # by a small part of the way to a new one
        torch.manual_seed(1)
        fresh = type(old)(old.config)

        def far(m):
            return sum(
                float((w - dict(old.named_parameters())[n]).detach().square().sum())
                for n, w in m.named_parameters()
                if n in dict(old.named_parameters())
            )

        return far(new) < 0.1 * far(fresh)

    assert (
        call("train", "vae", "--vae", trained / "vae", "--part", "both", "--out", tmp_path / "vae", *argv)
        == 0
    )
    old, new = (VAE.from_pretrained(f) for f in (trained / "vae", tmp_path / "vae"))
    moved = {n for n, w in new.state_dict().items() if not torch.equal(w, old.state_dict()[n])}
    assert {"latent_mean", "latent_std", "encoder.conv_in.weight", "decoder.latents_in.weight"} <= moved
    assert near(new, old)

    assert (
        call(
            "train",
            "tokenizer",
            "--tokenizer",
            trained / "tok",
            "--vae",
            tmp_path / "vae",
            "--part",
            "both",
            "--out",
            tmp_path / "both",
            *argv,
        )
        == 0
    )
    tok = FlexTok.from_pretrained(tmp_path / "both")
    first = FlexTok.from_pretrained(trained / "tok")
    tok.vae, its = None, tok.vae
    first.vae = None
    assert (
        weights_hash(its) == weights_hash(new)
        and near(tok, first)
        and weights_hash(tok) != weights_hash(first)
    )
    recipe = json.loads((tmp_path / "both" / "run.json").read_text())["recipe"]
    assert recipe["part"] == "both" and recipe["begun_from"] == weights_hash(
        FlexTok.from_pretrained(trained / "tok").own_state()
    )
    capsys.readouterr()
    assert (
        call(
            "train",
            "tokenizer",
            "--tokenizer",
            trained / "tok",
            "--vae",
            tmp_path / "vae",
            "--part",
            "both",
            "--out",
            tmp_path / "both",
            *argv,
        )
        == 0
    )
    assert "finished before" in capsys.readouterr().out

    assert (
        call("train", "tokenizer", "--tokenizer", trained / "tok", "--out", tmp_path / "decoder", *argv) == 0
    )
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    before, after = FlexTok.from_pretrained(trained / "tok"), FlexTok.from_pretrained(tmp_path / "decoder")
    assert torch.equal(before.tokenize(images), after.tokenize(images)), "the decoder alone: ids stay"
    assert not torch.equal(
        before.detokenize(before.tokenize(images), steps=2), after.detokenize(after.tokenize(images), steps=2)
    )
    refused(
        capsys,
        1,
        "makes other latents",
        "train",
        "tokenizer",
        "--tokenizer",
        trained / "tok",
        "--vae",
        tmp_path / "vae",
        "--out",
        tmp_path / "x",
        *argv,
    )
    refused(
        capsys,
        2,
        "--part encoder",
        "train",
        "tokenizer",
        "--tokenizer",
        trained / "tok",
        "--part",
        "encoder",
        "--out",
        tmp_path / "x",
        *argv,
    )
    for stage, other in (
        ("vae", []),
        ("tokenizer", ["--vae", trained / "vae"]),
        ("ar", ["--tokenizer", trained / "tok"]),
    ):
        refused(
            capsys,
            2,
            "--part both: say which",
            "train",
            stage,
            *other,
            "--part",
            "both",
            "--out",
            tmp_path / "x",
            *argv,
        )
    refused(
        capsys,
        1,
        "the tokenizer to go on with",
        "train",
        "tokenizer",
        "--tokenizer",
        trained / "tok",
        "--out",
        tmp_path / "x",
        *argv,
        "tokenizer.decoder.depth=1",
    )
    refused(
        capsys,
        1,
        "holds another run (begun_from",
        "train",
        "tokenizer",
        "--tokenizer",
        tmp_path / "decoder",
        "--vae",
        tmp_path / "vae",
        "--part",
        "both",
        "--out",
        tmp_path / "both",
        *argv,
    )


def test_an_ar_model_goes_on(trained, tmp_path, capsys):
    """On its own ids, or on those of another tokenizer; begun from the trained weights, which stay what they
    are.
    """
    argv = ["--steps", 2, *TINY]
    assert (
        call(
            "train",
            "tokenizer",
            "--tokenizer",
            trained / "tok",
            "--part",
            "both",
            "--out",
            tmp_path / "other",
            *argv,
        )
        == 0
    )
    for name, tok in (("same", trained / "tok"), ("moved", tmp_path / "other")):
        was = weights(trained / "ar")
        assert (
            call("train", "ar", "--ar", trained / "ar", "--tokenizer", tok, "--out", tmp_path / name, *argv)
            == 0
        )
        facts = json.loads((tmp_path / name / "run.json").read_text())["recipe"]
        assert facts["begun_from"] == was == weights(trained / "ar") and facts["after"] == weights_hash(
            FlexTok.from_pretrained(tok)
        )
        check_tokenizer(ARModel.from_pretrained(tmp_path / name), FlexTok.from_pretrained(tok))
        assert call("train", "ar", "--tokenizer", tok, "--out", tmp_path / f"{name}_anew", *argv) == 0

        def first(folder):
            return json.loads((folder / "log.json").read_text())[0]["ar"]

        assert first(tmp_path / name) < first(tmp_path / f"{name}_anew"), (
            "what it knew helps from the first step"
        )
    refused(
        capsys,
        2,
        "learns nothing from an AR model",
        "train",
        "vae",
        "--ar",
        trained / "ar",
        "--out",
        tmp_path / "x",
        *argv,
    )
    refused(
        capsys,
        2,
        "has no parts",
        "train",
        "ar",
        "--ar",
        trained / "ar",
        "--part",
        "both",
        "--tokenizer",
        trained / "tok",
        "--out",
        tmp_path / "x",
        *argv,
    )
    refused(
        capsys,
        1,
        "the AR model to go on with",
        "train",
        "ar",
        "--ar",
        trained / "ar",
        "--tokenizer",
        trained / "tok",
        "--out",
        tmp_path / "x",
        *argv,
        "ar.depth=2",
    )
    refused(
        capsys,
        1,
        "holds another run (begun_from",
        "train",
        "ar",
        "--tokenizer",
        trained / "tok",
        "--out",
        tmp_path / "same",
        *argv,
    )


def test_put_together_as_clipart_was(trained, tmp_path, monkeypatch):
    """tools/ship_clipart.py: the last training's weights, log and facts of all, begun from what the first
    began from.
    """
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    tool = importlib.import_module("ship_clipart")
    argv = ["--part", "both", "--steps", 2, *TINY]
    assert call("train", "tokenizer", "--tokenizer", trained / "tok", "--out", tmp_path / "a", *argv) == 0
    for last, name in ("ab", "bc"):
        assert (
            call("train", "tokenizer", "--tokenizer", tmp_path / last, "--out", tmp_path / name, *argv) == 0
        )
    tool.assemble([tmp_path / name for name in "abc"], tmp_path / "all")
    assert weights(tmp_path / "all") == weights(tmp_path / "c") != weights(tmp_path / "b")

    def held(name):
        # of the file, whatever config.json says
        return weights_hash(FlexTok.from_pretrained(tmp_path / name))

    assert held("all") == held("c") != held("b")

    def read(name):
        return json.loads((tmp_path / "all" / name).read_text())

    assert [r["step"] for r in read("log.json")] == [*range(6)] and (
        read("config.json")["stage"]["steps"],
        read("config.json")["stage"]["of_which_later_trainings"],
    ) == (6, 4)
    assert read("run.json")["command"].count("2 steps, lr") == 2
    assert read("run.json")["recipe"]["begun_from"] == weights(trained / "tok")


def test_put_together_as_tiny_was(trained, tmp_path, monkeypatch):
    """tools/ship_tiny.py: tokenizer and AR model know the VAE with the last decoder; ids are kept, logs and
    facts of all trainings.
    """
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    tool, runs = importlib.import_module("ship_tiny"), tmp_path / "runs"
    for name, source in (("vae", "vae"), ("tokenizer", "tok"), ("classifier", "ar")):
        shutil.copytree(trained / source, runs / name)
    for name, *argv in (
        ("vae2", "vae", "--vae", runs / "vae", "--steps", 3),
        ("vae3", "vae", "--vae", runs / "vae2", "--part", "both", "--steps", 2),
        ("vae4", "vae", "--vae", runs / "vae3", "--steps", 1),
        (
            "tokenizer2",
            "tokenizer",
            "--tokenizer",
            runs / "tokenizer",
            "--vae",
            runs / "vae3",
            "--part",
            "both",
            "--steps",
            2,
        ),
        ("ar", "ar", "--tokenizer", runs / "tokenizer2", "--steps", 2),
        ("tokenizer3", "tokenizer", "--tokenizer", runs / "tokenizer2", "--steps", 3),
        ("tokenizer4", "tokenizer", "--tokenizer", runs / "tokenizer3", "--part", "both", "--steps", 2),
        ("ar2", "ar", "--ar", runs / "ar", "--tokenizer", runs / "tokenizer4", "--steps", 1),
    ):
        assert call("train", *argv, "--out", runs / name, *TINY) == 0
    tool.assemble(runs, tmp_path / "all")
    tok, old = (
        FlexTok.from_pretrained(tmp_path / "all" / "tokenizer"),
        FlexTok.from_pretrained(runs / "tokenizer4"),
    )
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert torch.equal(tok.tokenize(images), old.tokenize(images)) and weights_hash(tok.vae) == weights_hash(
        VAE.from_pretrained(runs / "vae4")
    ) != weights_hash(old.vae)
    check_tokenizer(ARModel.from_pretrained(tmp_path / "all" / "ar"), tok)

    def read(part, name):
        return json.loads((tmp_path / "all" / part / name).read_text())

    for part, last, count, alone in (("vae", 9, 10, 4), ("tokenizer", 10, 11, 3), ("ar", 2, 3, None)):
        steps, stage = [row["step"] for row in read(part, "log.json")], read(part, "config.json")["stage"]
        assert (
            steps == sorted(set(steps))
            and steps[-1] == last
            and (stage["steps"], stage.get("of_which_decoder_alone")) == (count, alone)
        )
        assert ("--ar (1 steps" if part == "ar" else "part both (2 steps") in read(part, "run.json")[
            "command"
        ]
    assert all(
        (tmp_path / "all" / part / name).is_file()
        for part in ("vae", "tokenizer", "ar")
        for name in ("log.json", "run.json")
    )
    shutil.rmtree(runs / "ar2")
    assert (
        call(
            "train",
            "ar",
            "--ar",
            runs / "ar",
            "--tokenizer",
            runs / "tokenizer3",
            "--out",
            runs / "ar2",
            "--steps",
            1,
            *TINY,
        )
        == 0
    )
    with pytest.raises(ValueError, match="writes ids of tokenizer"):
        tool.assemble(runs, tmp_path / "mixed")


def test_two_processes(trained, tmp_path):
    """Under torchrun: one of them speaks and writes."""
    (tmp_path / "program.py").write_text(PROGRAM)
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            "2",
            str(tmp_path / "program.py"),
            *map(str, ["ar", "--tokenizer", trained / "tok", "--out", tmp_path / "ar", "--steps", 3, *TINY]),
        ],
        capture_output=True,
        text=True,
        timeout=400,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert result.stdout.count("3 steps of 8") == 1 and result.stdout.count("saved in") == 1
    a, b = (ARModel.from_pretrained(f).state_dict() for f in (trained / "ar", tmp_path / "ar"))
    assert max(float((a[n] - b[n]).abs().max()) for n in a) < 1e-3


def test_two_processes_measure_together(trained, tmp_path):
    """Under torchrun each decodes every other batch, one writes, and the numbers are those of one process."""
    sizes = [word for word in TINY if word not in ("--compile", "off")]
    words = [trained / "tok", "--ar", trained / "ar", "--metrics", "kid", "perplexity", *sizes]
    fives = """
import sys
from flextok_edu.apps.measure import eval_main
from flextok_edu.evaluation import evaluate, rows
for module in (evaluate, rows):  # twelve pictures in batches of five
    module.in_parts = lambda n, batch, of=module.in_parts: of(n, 5)
eval_main(sys.argv[1:])
"""
    (tmp_path / "program.py").write_text(fives)
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for name, launch in (("one", []), ("two", torchrun)):
        result = subprocess.run(
            [
                sys.executable,
                *launch,
                str(tmp_path / "program.py"),
                *map(str, [*words, "--out", tmp_path / name]),
            ],
            capture_output=True,
            text=True,
            timeout=400,
            cwd=ROOT,
            env=env,
        )
        assert result.returncode == 0, result.stderr[-2000:]
        assert result.stdout.count("table in") == 1
    one, two = (load_report(tmp_path / name) for name in ("one", "two"))
    assert [r["what"] for r in one.rows] == [r["what"] for r in two.rows]
    for a, b in zip(one.rows, two.rows):
        numbers = {k: v for k, v in a.items() if k != "what"}
        assert {k: b[k] for k in numbers} == pytest.approx(numbers, rel=1e-4, abs=1e-5, nan_ok=True), a[
            "what"
        ]
    for name, values in one.scores.items():  # in the order of the pictures
        assert torch.allclose(two.scores[name], values, rtol=1e-4, atol=1e-5), name
    assert two.card == one.card


def test_training_from_caches(trained, tmp_path, capsys):
    assert (
        call("cache", "latents", "--vae", trained / "vae", "--out", tmp_path / "latents", "--float32", *DATA)
        == 0
    )
    assert (
        call(
            "train",
            "tokenizer",
            "--vae",
            trained / "vae",
            "--cache",
            tmp_path / "latents",
            "--out",
            tmp_path / "tok",
            "--steps",
            4,
            *TINY,
        )
        == 0
    )
    assert weights(tmp_path / "tok") == weights(trained / "tok"), (
        "float32 latents of the same images in the same order"
    )
    assert call("cache", "tokens", "--tokenizer", trained / "tok", "--out", tmp_path / "tokens", *DATA) == 0
    assert (
        call(
            "cache",
            "tokens",
            "--tokenizer",
            trained / "tok",
            "--latents",
            tmp_path / "latents",
            "--out",
            tmp_path / "tokens2",
        )
        == 0
    )
    assert (
        call(
            "train",
            "ar",
            "--tokenizer",
            trained / "tok",
            "--cache",
            tmp_path / "tokens",
            "--out",
            tmp_path / "ar",
            "--steps",
            3,
            *TINY,
        )
        == 0
    )
    assert (
        call(
            "train",
            "ar",
            "--tokenizer",
            trained / "tok",
            "--cache",
            tmp_path / "tokens2",
            "--out",
            tmp_path / "ar2",
            "--steps",
            3,
            *TINY,
        )
        == 0
    )
    assert weights(tmp_path / "ar") == weights(tmp_path / "ar2") == weights(trained / "ar")
    assert json.loads((tmp_path / "ar2" / "config.json").read_text())["classes"] == list(KINDS)
    refused(
        capsys,
        1,
        "holds no cache",
        "train",
        "tokenizer",
        "--vae",
        trained / "vae",
        "--cache",
        tmp_path / "nothing",
        "--out",
        tmp_path / "x",
        *TINY,
    )
    refused(
        capsys,
        1,
        "not the one that you mean",
        "train",
        "ar",
        "--tokenizer",
        trained / "tok",
        "--cache",
        tmp_path / "latents",
        "--out",
        tmp_path / "x",
        *TINY,
    )


def test_training_from_a_folder_and_from_the_disk(trained, pictures, tmp_path, capsys):
    assert call("train", "vae", "--data", pictures, "--out", tmp_path / "vae", "--steps", 2, *TINY[2:]) == 0
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for f in sorted(pictures.rglob("*.png")):
            tar.add(f, f"{f.stem}.png")
    for name, data in (
        ("disk", ["--data", pictures, "--from-disk"]),
        ("tar", ["--data", tmp_path / "x.tar"]),
    ):
        assert call("train", "vae", *data, "--out", tmp_path / f"{name}_vae", "--steps", 2, *TINY[2:]) == 0
    assert (
        call(
            "train",
            "tokenizer",
            *data,
            "--vae",
            tmp_path / "tar_vae",
            "--out",
            tmp_path / "tok",
            "--steps",
            2,
            *TINY[2:],
        )
        == 0
    )
    assert (tmp_path / "tok.latents" / "cache.json").exists()
    assert (
        call(
            "train",
            "ar",
            "--data",
            pictures,
            "--from-disk",
            "--tokenizer",
            tmp_path / "tok",
            "--out",
            tmp_path / "ar",
            "--steps",
            2,
            *TINY[2:],
        )
        == 0
    )
    assert json.loads((tmp_path / "ar" / "config.json").read_text())["classes"] == ["day", "night"]


# --- nonsense
# --------------------------------------------------------------------------------------------------------


def test_nonsense_is_one_line(trained, pictures, tmp_path, capsys):
    out = ["--out", tmp_path / "x"]
    refused(capsys, 2, "--vae is missing", "train", "tokenizer", *out, *TINY)
    refused(
        capsys,
        1,
        "there is no VAE in it; there is no such folder",
        "train",
        "tokenizer",
        "--vae",
        "no/such",
        *out,
        *TINY,
    )
    refused(capsys, 1, "there is no VAE in it", "train", "tokenizer", "--vae", trained / "ar", *out, *TINY)
    refused(
        capsys,
        1,
        "the tokenizer of preset micro takes 4 x 4 x 4",
        "train",
        "tokenizer",
        "--vae",
        trained / "vae",
        *out,
        *TINY,
        "tokenizer.latent_size=4",
    )
    refused(capsys, 1, "mikro", "train", "vae", "--preset", "mikro", *out)
    refused(capsys, 1, "no/such", "train", "vae", "--data", "no/such", *out, "--device", "cpu")
    refused(capsys, 1, "precision", "train", "vae", "--precision", "half", *out, *TINY)
    refused(capsys, 2, "there is no setting 'vae.nothing'", "train", "vae", "--set", "vae.nothing=3", *out)
    refused(capsys, 2, "at least 1", "train", "vae", "--steps", 0, *out, *TINY)
    refused(
        capsys,
        1,
        "there is no class 'boot': did you mean boat",
        "generate",
        "boot",
        "--ar",
        trained / "ar",
        "--device",
        "cpu",
    )
    refused(
        capsys,
        1,
        "a budget must be an integer in 1 .. 16",
        "generate",
        "boat",
        "--ar",
        trained / "ar",
        "--budgets",
        17,
        "--device",
        "cpu",
    )
    refused(
        capsys,
        1,
        "there is no AR model in it",
        "generate",
        "boat",
        "--ar",
        trained / "vae",
        "--tokenizer",
        trained / "tok",
        "--device",
        "cpu",
    )
    assert not (tmp_path / "x").exists(), "nothing was begun"
    for argv in (
        ["train", "--nonsense"],
        ["train"],
        ["cache", "latents"],
        ["generate"],
        ["estimate", "micro", "--steps", "x"],
    ):
        assert call(*argv) == 2, argv
    capsys.readouterr()


def test_an_ar_model_of_another_tokenizer(trained, tmp_path, capsys):
    assert (
        call(
            "train",
            "tokenizer",
            "--vae",
            trained / "vae",
            "--out",
            tmp_path / "tok",
            "--steps",
            4,
            "--seed",
            1,
            *TINY,
        )
        == 0
    )
    refused(
        capsys,
        1,
        "writes ids of tokenizer",
        "generate",
        "boat",
        "--ar",
        trained / "ar",
        "--tokenizer",
        tmp_path / "tok",
        "--device",
        "cpu",
    )


@pytest.mark.parametrize(
    "name",
    ("train", "cache", "tokenize", "detokenize", "encode", "decode", "generate", "eval", "estimate", "run"),
)
def test_help(name, capsys):
    assert call(name, "--help") == 0
    text = capsys.readouterr().out
    assert (
        f"usage: flextok_{name}" in text
        and "MISSING" not in text
        and all(len(line) < 140 for line in text.splitlines())
    )


# --- pictures and ids
# ------------------------------------------------------------------------------------------------


def test_pictures_to_ids_to_pictures(trained, pictures, tmp_path, capsys):
    tok = ["--tokenizer", trained / "tok", "--device", "cpu"]
    (tmp_path / "broken.jpg").write_text("no picture")
    assert call("tokenize", pictures / "day", *tok, "--out", tmp_path / "all.jsonl") == 0
    head, *rows = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert len(rows) == 12 and all(len(r["ids"]) == 16 for r in rows) and head["registers"] == 16
    some = [pictures / "day" / "0.png", tmp_path / "broken.jpg", pictures / "day" / "2.png"]
    refused(
        capsys,
        1,
        "1 of 3 pictures could not be read",
        "tokenize",
        *some,
        *tok,
        "--out",
        tmp_path / "some.jsonl",
        "--budgets",
        4,
        8,
        2,
    )
    _, *few = [json.loads(line) for line in (tmp_path / "some.jsonl").read_text().splitlines()]
    by = {r["image"]: r["ids"] for r in rows}
    assert (
        [(r["image"], len(r["ids"])) for r in few] == [(str(some[0]), 4), (str(some[2]), 2)]
        and few[0]["ids"] == by[str(some[0])][:4]
        and few[1]["ids"] == by[str(some[2])][:2]
    )
    assert (
        call(
            "detokenize",
            tmp_path / "some.jsonl",
            *tok,
            "--steps",
            2,
            "--budgets",
            1,
            16,
            "--out",
            tmp_path / "back",
        )
        == 0
    )
    assert sorted(f.name for f in (tmp_path / "back").iterdir()) == [
        "0000_0_001.png",
        "0001_2_001.png",
        "sheet.png",
    ], "16 of 4 or 2 tokens are none"
    assert Image.open(tmp_path / "back" / "0000_0_001.png").size == (32, 32)
    refused(
        capsys,
        1,
        "could be read",
        "tokenize",
        tmp_path / "broken.jpg",
        *tok,
        "--out",
        tmp_path / "none.jsonl",
    )
    refused(capsys, 1, "is not there", "tokenize", tmp_path / "nothing.jpg", *tok)
    refused(capsys, 2, "2 budgets for 3 pictures", "tokenize", *some, *tok, "--budgets", 1, 2)
    (tmp_path / "other.jsonl").write_text(
        (tmp_path / "all.jsonl").read_text().replace(head["tokenizer"], "0" * 16)
    )
    refused(capsys, 1, "are of tokenizer 0000000000000000", "detokenize", tmp_path / "other.jsonl", *tok)
    (tmp_path / "other.jsonl").write_text("no json")
    refused(capsys, 1, "is no file of ids", "detokenize", tmp_path / "other.jsonl", *tok)
    (tmp_path / "other.jsonl").write_text(json.dumps(head) + '\n{"image": "x", "ids": [99999]}\n')
    refused(capsys, 1, "999", "detokenize", tmp_path / "other.jsonl", *tok, "--out", tmp_path / "never")


class Greys(torch.nn.Module):
    """A tokenizer of another kind, by the protocol: four bands, the grey of each in 16 steps; no VAE."""

    kind, vocabulary, length, image_size, token_counts = "greys", 16, 4, 8, (1, 2, 4)
    identity = "0123456789abcdef"

    @classmethod
    def from_folder(cls, folder, vae=None):
        return cls(), json.loads((Path(folder) / "config.json").read_text())

    def tokenize(self, images, budget=None):
        bands = images.mean(1).unflatten(1, (4, 2)).mean((2, 3))  # b 4
        return ((bands + 1) * 7.5).round().long()[:, :budget]

    def detokenize(self, ids, sampling=None, *, first_index=0, **settings):
        rows = [torch.nn.functional.pad(row, (0, 4 - len(row)), value=15) for row in ids]
        bands = torch.stack(rows).float() / 7.5 - 1
        return bands.repeat_interleave(2, 1)[:, None, :, None].expand(-1, 3, -1, 8)


def test_commands_take_any_tokenizer(tmp_path, monkeypatch):
    """Whatever is registered, and keeps to the protocol: ids and pictures by the same commands."""
    monkeypatch.setitem(engine_tokenizers.TOKENIZERS, "greys", Greys)
    facts = {"kind": "greys", "config": {}, "weights": "0" * 16}
    (tmp_path / "config.json").write_text(json.dumps(facts))
    whose = ["--tokenizer", tmp_path, "--device", "cpu"]
    for grey in (0, 119):
        Image.new("RGB", (8, 8), (grey,) * 3).save(tmp_path / f"{grey:03}.png")
    files = [tmp_path / "000.png", tmp_path / "119.png"]
    assert call("tokenize", *files, *whose, "--out", tmp_path / "ids.jsonl") == 0
    _, *rows = [json.loads(line) for line in (tmp_path / "ids.jsonl").read_text().splitlines()]
    assert [r["ids"] for r in rows] == [[0] * 4, [7] * 4]
    out = tmp_path / "back"
    assert call("detokenize", tmp_path / "ids.jsonl", *whose, "--budgets", 2, 4, "--out", out) == 0
    image = np.asarray(Image.open(out / "0001_119_002.png"))
    assert image.shape == (8, 8, 3) and (image[:4] == 119).all() and (image[4:] == 255).all()
    assert (np.asarray(Image.open(out / "0000_000_004.png")) == 0).all()


def test_new_pictures_depend_on_class_and_seed_alone(trained, tmp_path):
    argv = ["--ar", trained / "ar", "--device", "cpu", "--steps", 2, "--budgets", 2, 16]
    assert call("generate", "boat", "3", *argv, "--seeds", 5, 7, "--out", tmp_path / "a") == 0
    assert call("generate", "boat", *argv, "--seeds", 7, "--out", tmp_path / "b") == 0
    assert len(list((tmp_path / "a").iterdir())) == 9
    for k in ("002", "016"):
        a, b = (np.asarray(Image.open(tmp_path / f / f"002_boat_seed7_{k}.png"), dtype=int) for f in "ab")
        assert np.abs(a - b).max() <= 1, "a batch of another size may round otherwise"


def test_many_pictures_are_decoded_in_batches(trained, tmp_path, monkeypatch):
    """No batch is larger than `BATCH`, lists are written once, and pictures are those of one large batch."""
    argv = ["boat", "3", "0", "--ar", trained / "ar", "--device", "cpu", "--steps", 2, "--budgets", 1, 16]
    argv += ["--seeds", *range(4)]
    assert call("generate", *argv, "--out", tmp_path / "whole") == 0
    real, sizes, there = apps_generate.grow, [], []

    def grow(ar, tok, labels, *rest):
        sizes.append(len(labels))
        for found in real(ar, tok, labels, *rest):
            there.append(len(list((tmp_path / "parts").glob("0*.png"))))
            yield found

    patch(monkeypatch, apps_generate, "grow", grow)
    monkeypatch.setattr(apps_generate, "BATCH", 5)
    assert call("generate", *argv, "--out", tmp_path / "parts") == 0
    assert sizes == [5, 5, 2] and there == [0, 5, 10, 15, 20, 22], "a picture is there as soon as it can be"
    files = sorted(f.name for f in (tmp_path / "whole").iterdir())
    assert files == sorted(f.name for f in (tmp_path / "parts").iterdir()) and len(files) == 25
    for file in files:
        a, b = (np.asarray(Image.open(tmp_path / f / file), dtype=int) for f in ("whole", "parts"))
        assert np.abs(a - b).max() <= 1, "a batch of another size may round otherwise"


def test_measuring(trained, tmp_path, capsys):
    assert (
        call("eval", trained / "tok", "--ar", trained / "ar", "--out", tmp_path / "table", "--device", "cpu")
        == 0
    )
    rows = json.loads((tmp_path / "table" / "table.json").read_text())["rows"]
    assert [r["tokens"] for r in rows if r["what"] == "tokens"] == [1, 2, 4, 8, 16] and {
        r["n"] for r in rows if r["what"] != "half against half"
    } == {12}, "counts of the run that made the tokenizer"
    assert call("eval", "--config", tmp_path / "table" / "run.json", "--out", tmp_path / "again") == 0
    again = json.loads((tmp_path / "again" / "table.json").read_text())["rows"]
    assert [{k: v for k, v in r.items() if k != "card"} for r in again] == [
        {k: v for k, v in r.items() if k != "card"} for r in rows
    ]


def test_estimate(capsys):
    assert (
        call(
            "estimate",
            "micro",
            "--steps",
            2,
            "--seconds",
            4,
            "--device",
            "cpu",
            "--set",
            "train_ar.steps=1000",
        )
        == 0
    )
    said = capsys.readouterr().out
    for word in (
        "vae ",
        "classifier ",
        "tokenizer ",
        "ar ",
        "in all",
        "cache of latents: 1.04 kB an image",
        "all 20,000: 0.02 GB",
        "1,000 x 128",
    ):
        assert word in said, said


def test_estimate_scales_what_was_measured():
    pace = apps_pace.StepProfile(
        batch=4, steps=3, seconds=2.0, gradient=1.5, peak=10 * 10**9, flops=0, share=0.5
    )
    e = apps_estimate.Estimate("vae", pace, batch=16, steps=900, memory=1e9)
    assert e.seconds == 0.5 + 4 * 1.5 and e.hours == pytest.approx(apps_pace.SUSTAINED * 900 * 6.5 / 3600)
    assert "measured with 4 a step and scaled" in apps_estimate.estimate_line(e)


# --- the whole course
# ------------------------------------------------------------------------------------------------


def test_a_whole_run_from_its_own_json(tmp_path, capsys):
    argv = [
        "--device",
        "cpu",
        "--train-images",
        60,
        "--images",
        12,
        "--compile",
        "off",
        "--set",
        *TINY[TINY.index("--set") + 1 :],
        "train_classifier.batch=8",
    ]
    assert call("run", "--out", tmp_path / "a", "--steps", 3, *argv) == 0
    assert json.loads((tmp_path / "a" / "run.json").read_text())["preset"]["vae"]["channels"] == [16, 16]
    refused(
        capsys,
        1,
        "ar.depth: 1 then, 2 now",
        "run",
        "--out",
        tmp_path / "a",
        "--steps",
        3,
        *argv,
        "ar.depth=2",
    )
    assert (
        call(
            "run",
            "--config",
            tmp_path / "a" / "run.json",
            "--out",
            tmp_path / "b",
            "--device",
            "cpu",
            "--compile",
            "off",
        )
        == 0
    )
    for stage in ("vae", "classifier", "tokenizer", "ar"):
        assert weights(tmp_path / "a" / stage) == weights(tmp_path / "b" / stage), stage
    assert (
        call(
            "generate",
            "all",
            "--ar",
            tmp_path / "a",
            "--steps",
            1,
            "--device",
            "cpu",
            "--out",
            tmp_path / "new",
        )
        == 0
    ), "the folder of a run holds all models"
    refused(capsys, 1, "must be a positive number", "run", "--minutes", -3)


# Who may look at the arguments of the process. (claims: to say which process works in a folder.)
READS_ARGUMENTS = {"apps/cli.py", "engine/claims.py"}


def test_arguments_are_parsed_in_one_place():
    """Options, files, signals, exit statuses: whatever is a command goes through `command` of cli."""
    found = set()
    for file in sorted((ROOT / "flextok_edu").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, (ast.Import, ast.ImportFrom)) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [ast.unparse(node)] if isinstance(node, ast.Attribute) else []
            if {"argparse", "getopt", "sys.argv", "tyro.cli", "tyro"} & set(names):
                found.add(file.relative_to(ROOT / "flextok_edu").as_posix())
    assert found == READS_ARGUMENTS


def test_a_switch_is_one_word_or_a_pair(capsys):
    """Commands have the word that changes something; flextok_bench always had both, and keeps them."""

    @dataclass(frozen=True)
    class Options:
        quick: bool = False
        loud: bool = True

    assert command_line(Options, "x", ["--quick", "--no-loud"])[0] == Options(True, False)
    for word in ("--no-quick", "--loud"):
        with pytest.raises(SystemExit) as left:
            command_line(Options, "x", [word])
        assert left.value.code == 2
        assert command_line(Options, "x", [word], pairs=True)[0] == Options()
