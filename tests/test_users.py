"""What users hit at the commands: each test is a report that was filed, and failed on the code of its day."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from planting import patch
import torch
from PIL import Image

import flextok_edu.apps.explore as apps_explore
import flextok_edu.apps.generate as apps_generate
import flextok_edu.apps.models as apps_models
import flextok_edu.apps.train as apps_train
import flextok_edu.tokenizer as tokenizer
from flextok_edu.engine.binding import tokenizer_identity
from flextok_edu.apps.models import DataOptions
from flextok_edu.objective import FlowObjective
import flextok_edu.engine.distributed as engine_distributed
from flextok_edu.engine.config import preset
from flextok_edu.engine.files import weights_hash
from flextok_edu.data.learned import load_learned
from flextok_edu.apps.job import prepare
from flextok_edu.apps.pictures import open_pictures
from flextok_edu.apps.run_config import RunConfig
from flextok_edu.tokenizer import FlexTok
from test_commands import TINY, call, refused, weights  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
Q = [
    "--device",
    "cpu",
    "--steps",
    "2",
    "--compile",
    "off",
    "--set",
    "vae_loss.perceptual=0",
    "evaluate.images=8",
    "evaluate.samples=8",
    "vae.channels=16,16",
    "vae.groups=4",
    "train_vae.batch=8",
    "train_tokenizer.batch=8",
    "train_ar.batch=8",
    "tokenizer.encoder.width=64",
    "tokenizer.decoder.width=64",
    "tokenizer.decoder.depth=2",
    "ar.width=64",
    "ar.depth=1",
]
SMALL = [a for a in Q if a not in ("--compile", "off")]
ENV = {**os.environ, "PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1"}


def make(*folders, count=20):
    """Small distinct pictures in each folder, another set for each name."""
    for d in folders:
        d.mkdir(parents=True, exist_ok=True)
        for i in range(count):
            names = [
                i,
                *d.name.encode("utf-8", "surrogateescape"),
                *d.parent.name.encode("utf-8", "surrogateescape"),
            ]
            Image.fromarray(
                np.random.default_rng(names).integers(0, 256, (6, 6, 3), np.uint8).repeat(8, 0).repeat(8, 1)
            ).save(d / f"{i}.png")


def pixels(images):
    return {image.numpy().tobytes() for image in images}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A run on a folder whose classes have names that mean something to matplotlib, HTML, markdown and
    terminals.
    """
    root = tmp_path_factory.mktemp("users")
    make(
        root / "d" / "$5_to_$10", root / "d" / "b|<i>*x*\x1b[31m", root / "d" / "家", root / "d" / "€5_to_€10"
    )
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(
        os.fsencode(root / "d" / "家") + b"/caf\xe9.png", format="PNG"
    )
    assert call("run", "--data", root / "d", "--out", root / "r", *Q) == 0
    return root


# --- numbers
# ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "learn, measure",
    (
        (dict(seed=1), dict()),
        (dict(from_disk=True), dict()),
        (dict(), dict(from_disk=True, seed=3)),
        (dict(train_images=30), dict()),
        (dict(), dict(images=3)),
    ),
    ids=str,
)
def test_what_is_held_out_depends_on_the_pictures_alone(tmp_path, learn, measure):
    """Another seed, another route, another number of pictures at evaluation: not one held-out picture was
    learned.
    """
    make(tmp_path / "d" / "a", tmp_path / "d" / "b", count=60)
    p = preset("micro")

    def opened(images=2000, **options):
        return open_pictures(
            DataOptions(data=str(tmp_path / "d"), **options),
            replace(p, evaluate=replace(p.evaluate, images=images)),
        )

    train, val = opened(**learn)[0], opened(**measure)[1]
    seen = pixels(train.images) if hasattr(train, "images") else pixels(train.head(len(train)))
    assert len(val) >= 3 and len(seen) >= 30 and not seen & pixels(val.images)


def test_train_and_val_folders_are_no_classes(tmp_path):
    """ImageNet's own layout: val/ is for evaluation, and is not trained on."""
    make(*(tmp_path / "tv" / s / c for s in ("train", "val") for c in ("cat", "dog")))
    for route in (False, True):
        train, val = open_pictures(
            DataOptions(data=str(tmp_path / "tv"), seed=1, from_disk=route), preset("micro")
        )
        assert train.classes == val.classes == ("cat", "dog") and len(train) == 40 and len(val) == 40
        seen = pixels(train.images) if not route else pixels(train.head(40))
        assert not seen & pixels(val.images) and pixels(val.images) == pixels(
            open_pictures(DataOptions(data=str(tmp_path / "tv")), preset("micro"))[1].images
        )


def test_what_a_model_learned_from_stands_beside_it_and_on_the_card(models, tmp_path):
    r = models / "r"
    for stage in ("vae", "tokenizer", "ar"):
        found = load_learned(r / stage)
        assert (
            found.rule == "one in eight"
            and found.count
            == len(found.keys)
            == prepare(
                RunConfig(data=str(models / "d"), out=str(r), device="cpu", compile="off", steps=2), _base(r)
            ).train.__len__()
        )
    card = json.loads((r / "table.json").read_text())["card"]
    assert set(card["learned"]) == {"vae", "tokenizer", "ar"} and all(
        c["overlap"] == 0 for c in card["learned"].values()
    )
    # measured on pictures of which some were learned: those are left out, and counted
    before = len(load_learned(r / "vae").keys)
    assert (
        call("eval", r, "--data", models / "d", "--out", tmp_path / "t", "--device", "cpu", "--seed", 5) == 0
    )
    assert (
        json.loads((tmp_path / "t" / "table.json").read_text())["card"]["learned"]["vae"]["overlap"] == 0
        and before > 30
    )
    val = tmp_path / "mixed" / "val" / "x"
    make(tmp_path / "mixed" / "train" / "x", val)
    learned = [f for f in sorted((models / "d" / "$5_to_$10").iterdir())]
    for f in learned:
        (val / f"again{f.name}").write_bytes(f.read_bytes())
    assert (
        call(
            "eval",
            r,
            "--data",
            tmp_path / "mixed",
            "--out",
            tmp_path / "t2",
            "--device",
            "cpu",
            "--set",
            "evaluate.images=100",
        )
        == 0
    )
    card = json.loads((tmp_path / "t2" / "table.json").read_text())["card"]
    assert (
        card["learned"]["vae"]["overlap"] >= 10 and card["images"] == 40 - card["learned"]["vae"]["overlap"]
    )


def _base(r):
    from flextok_edu.engine.config import Preset
    from flextok_edu.engine.limits import from_dict

    return from_dict(Preset, json.loads((r / "run.json").read_text())["base"])


def test_the_card_says_what_the_vae_was_trained_against(models):
    assert (
        "efficientnet"
        not in json.loads((models / "r" / "table.json").read_text())["card"]["vae_trained_against"]
    ), "vae_loss.perceptual was 0"
    assert json.loads((models / "r" / "table.json").read_text())["card"]["precision"] == "float32"
    assert json.loads((models / "r" / "table.json").read_text())["card"]["floor"] in (
        "pictures of the training side of this set",
        "held-out pictures that are not measured",
    )


def test_other_numbers_of_classes_are_refused(tmp_path, capsys):
    make(tmp_path / "d" / "a", tmp_path / "d" / "b")
    argv = ["--data", tmp_path / "d", "--out", tmp_path / "r", *Q, "ar.classes=5"]
    refused(capsys, 1, "ar.classes=5 was asked for, but these pictures have 2 classes", "run", *argv)


# --- names, places
# ---------------------------------------------------------------------------------------------------


def test_names_are_never_markup(models, tmp_path, capsys):
    """Dollar signs, bytes that are not UTF-8, HTML, escape sequences, CJK: the run ends well, and nothing is
    interpreted.
    """
    page = (models / "r" / "report.html").read_text(encoding="utf-8")
    assert "<i>*x*" not in page and "\x1b" not in page
    odd = os.fsdecode(os.fsencode(models / "d" / "家") + b"/caf\xe9.png")
    assert (
        call(
            "tokenize",
            odd,
            models / "d" / "$5_to_$10" / "0.png",
            "--tokenizer",
            models / "r",
            "--out",
            tmp_path / "i.jsonl",
            "--device",
            "cpu",
        )
        == 0
    )
    assert (
        call(
            "detokenize",
            tmp_path / "i.jsonl",
            "--tokenizer",
            models / "r",
            "--out",
            tmp_path / "p",
            "--device",
            "cpu",
            "--steps",
            1,
        )
        == 0
    )
    assert (
        call(
            "generate", "all", "--ar", models / "r", "--out", tmp_path / "g", "--device", "cpu", "--steps", 1
        )
        == 0
    )
    assert len(list((tmp_path / "g").iterdir())) == 5, "two of the four classes have the same letters"
    capsys.readouterr()
    assert (
        call("generate", "b\x1b[31m", "--ar", models / "r", "--out", tmp_path / "g", "--device", "cpu") == 1
    )
    assert "\x1b" not in capsys.readouterr().err


def test_files_of_similar_names_are_all_written(models, tmp_path):
    """Names that a file system would take for the same, and names of 240 bytes."""
    for i, name in enumerate(("a b", "a_b", "A_b", "a,b", "家" * 80)):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(np.full((9, 9, 3), 40 * i, np.uint8)).save(tmp_path / "in" / f"{name}.png")
    assert (
        call(
            "tokenize",
            tmp_path / "in",
            "--tokenizer",
            models / "r",
            "--out",
            tmp_path / "i.jsonl",
            "--device",
            "cpu",
        )
        == 0
    )
    assert (
        call(
            "detokenize",
            tmp_path / "i.jsonl",
            "--tokenizer",
            models / "r",
            "--out",
            tmp_path / "p",
            "--device",
            "cpu",
            "--steps",
            1,
        )
        == 0
    )
    files = [f.name for f in (tmp_path / "p").iterdir()]
    assert len(files) == len({f.lower() for f in files}) == 6 and max(len(f.encode()) for f in files) < 120


def test_paths_mean_the_same_from_every_folder(models, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(models)
    make(models / "rel" / "a", models / "rel" / "b")
    assert call("train", "vae", "--data", "rel", "--out", "rv", *SMALL) == 0
    assert call("train", "tokenizer", "--data", "rel", "--vae", "rv", "--out", "rt", *SMALL) == 0
    assert call("train", "ar", "--data", "rel", "--tokenizer", "rt", "--out", "ra", *SMALL) == 0
    monkeypatch.chdir(tmp_path)
    assert (
        call("generate", "0", "--ar", models / "ra", "--device", "cpu", "--steps", 1, "--out", tmp_path / "g")
        == 0
    )
    assert call(
        "train", "--config", models / "rt" / "run.json", "--out", tmp_path / "again"
    ) == 0 and weights(tmp_path / "again") == weights(models / "rt")
    stored = json.loads((models / "ra" / "run.json").read_text())
    stored["options"]["tokenizer"] = "tok"  # as an older version stored it
    (models / "ra" / "run.json").write_text(json.dumps(stored))
    refused(
        capsys,
        2,
        "was trained with tok, which is not there any more",
        "generate",
        "0",
        "--ar",
        models / "ra",
        "--device",
        "cpu",
    )


def test_home_is_home(models, tmp_path, monkeypatch):
    """`--out=~/x`: the shell leaves it to us."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert (
        call(
            "tokenize",
            models / "d" / "$5_to_$10" / "0.png",
            "--tokenizer",
            models / "r",
            "--out=~/x/i.jsonl",
            "--device",
            "cpu",
        )
        == 0
    )
    assert (tmp_path / "x" / "i.jsonl").is_file() and not (tmp_path / "~").exists()


def test_fresh_here_and_without_the_old_cache(models, tmp_path, monkeypatch, capsys):
    make(tmp_path / "d" / "a", tmp_path / "d" / "b")
    argv = ["--data", tmp_path / "d", "--from-disk", *SMALL]
    assert call("train", "vae", "--out", tmp_path / "v", *argv) == 0
    assert call("train", "tokenizer", "--vae", tmp_path / "v", "--out", tmp_path / "t", *argv) == 0
    assert call("train", "tokenizer", "--vae", tmp_path / "v", "--out", tmp_path / "t", "--fresh", *argv) == 0
    assert (
        (tmp_path / "t.latents.old-1" / "cache.json").is_file()
        and (tmp_path / "t.latents" / "cache.json").is_file()
        and (tmp_path / "t.old-1").is_dir()
    )
    here = tmp_path / "v"
    monkeypatch.chdir(here)
    assert call("train", "vae", "--out", ".", "--fresh", *argv) == 0
    assert (tmp_path / "v.old-1" / "config.json").is_file() and (tmp_path / "v" / "config.json").is_file()


HOLD = """
import sys, time
from pathlib import Path
from flextok_edu.engine.claims import claimed
with claimed(Path(sys.argv[1])):
    print("held", flush=True); time.sleep(60)
"""


def test_one_process_trains_in_a_folder(models, tmp_path, capsys):
    """A second one is told who trains there, whatever it was going to do with the folder; after a death
    nothing is in the way.
    """
    out = tmp_path / "v"
    argv = ["vae", "--out", out, *SMALL]
    child = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True, env=ENV, cwd=ROOT
    )
    try:
        assert child.stdout.readline() == "held\n"
        for more in ([], ["--fresh"]):
            refused(capsys, 1, f"process {child.pid}", "train", *argv, *more)
        refused(capsys, 1, f"process {child.pid}", "run", "--out", out, *Q)
        assert out.is_dir() and not list(tmp_path.glob("*.old-*")), "nothing was moved"
    finally:
        child.kill()
        child.wait()
    assert call("train", *argv) == 0


# --- output
# ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ("cp437", "cp932", "cp949", "ascii", "latin-1"))
def test_every_terminal_can_show_it(models, tmp_path, encoding):
    """A table with ± and é ends in status 0 whatever the terminal's encoding."""
    code = (
        "import sys; sys.argv[0] = 'x'; from flextok_edu.apps.measure import eval_main; from "
        "flextok_edu.apps.train import train_main; (eval_main if sys.argv[1] != '--help' else "
        "train_main)(sys.argv[1:])"
    )
    argv = (
        [str(models / "r"), "--data", str(models / "d"), "--out", str(tmp_path / "t"), "--device", "cpu"]
        if encoding == "ascii"
        else ["--help"]
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *argv],
        capture_output=True,
        env={**ENV, "PYTHONIOENCODING": encoding},
        cwd=ROOT,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-800:]


def test_no_bars_in_files(models, tmp_path):
    """`flextok_run` into a file: lines, and no progress bars."""
    code = "import sys; from flextok_edu.apps.run import run_main; run_main(sys.argv[1:])"
    env = {k: v for k, v in ENV.items() if k != "TQDM_DISABLE"}
    done = subprocess.run(
        [sys.executable, "-c", code, "--data", str(models / "d"), "--out", str(tmp_path / "r"), *Q],
        capture_output=True,
        text=True,
        env=env,
        cwd=ROOT,
        timeout=400,
    )
    assert done.returncode == 0 and "%|" not in done.stderr and "\r" not in done.stderr, done.stderr[-800:]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_noticed_first(models, tmp_path, capsys, monkeypatch):
    (tmp_path / "ro").mkdir(mode=0o500)
    patch(monkeypatch, apps_models, "open_tokenizer", lambda *a: pytest.fail("it began to work"))
    refused(
        capsys,
        1,
        "nothing can be written to",
        "eval",
        models / "r",
        "--out",
        tmp_path / "ro" / "t",
        "--device",
        "cpu",
    )


def test_a_folder_that_cannot_be_written_is_noticed_first(models, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    patch(monkeypatch, apps_models, "open_tokenizer", lambda *a: pytest.fail("it began to work"))
    refused(
        capsys,
        1,
        "nothing can be written to",
        "eval",
        models / "r",
        "--out",
        tmp_path / "file" / "t",
        "--device",
        "cpu",
    )


def test_a_demo_notices_it_first_too(tmp_path, monkeypatch, capsys):
    pass

    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(tokenizer.FlexTok, "from_pretrained", lambda *a, **k: pytest.fail("it began to work"))
    with pytest.raises(SystemExit) as leave:
        apps_explore.demo_main(
            ["--model", "tiny", "--device", "cpu", "--out", str(tmp_path / "file" / "page")]
        )
    assert leave.value.code == 1 and "nothing can be written to" in capsys.readouterr().err


def test_evaluation_draws_no_training_scenes(models, tmp_path, monkeypatch):
    drawn = []
    from flextok_edu.data.scenes import ToyScenes

    real = ToyScenes.render
    monkeypatch.setattr(
        ToyScenes,
        "render",
        lambda self, *a, **k: drawn.append((self.split, self.length)) or real(self, *a, **k),
    )
    assert call("eval", models / "r", "--out", tmp_path / "t", "--device", "cpu") == 0
    assert drawn and {split for split, _ in drawn} == {"val"} and max(n for _, n in drawn) <= 16


def test_sheets_are_about_square(models, tmp_path):
    names, rows = [f"{i:04}" for i in range(700)], [torch.zeros(1, 3, 32, 32)] * 700
    sheet = apps_generate._sheet(rows, 1)
    assert 0.5 < sheet.shape[0] / sheet.shape[1] < 2


def test_half_precision_on_a_cpu_is_said(capsys):
    from flextok_edu.apps.run_config import pick_precision

    with pytest.warns(UserWarning, match="float16 on a CPU"):
        pick_precision("fp16", "cpu")


# --- words
# -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option, advice",
    (
        ("--lr=1e-3", "--set train_STAGE.lr"),
        ("--batch-size", "train_STAGE.batch"),
        ("--epochs", "counted in steps"),
        ("--resume", "the same command goes on"),
    ),
)
def test_options_of_other_programs(capsys, option, advice):
    refused(capsys, 2, advice, "train", "vae", option, "3")


def test_words_that_led_astray(models, tmp_path, capsys):
    refused(
        capsys,
        1,
        "--preset tiny",
        "train",
        "tokenizer",
        "--vae",
        "tiny",
        "--preset",
        "micro",
        "--out",
        tmp_path / "x",
        "--device",
        "cpu",
    )
    (tmp_path / "x.tar.gz").write_bytes(b"")
    for name in ("train", "run"):
        refused(
            capsys,
            1,
            "compressed",
            name,
            *(["vae"] if name == "train" else []),
            "--data",
            tmp_path / "x.tar.gz",
            "--out",
            tmp_path / "x",
        )
    argv = ["train", "vae", "--data", models / "d", "--out", tmp_path / "v", *SMALL]
    assert call(*argv) == 0
    said = capsys.readouterr().out
    assert "items" not in said.split("steps of 8")[1].split(";")[0] or said.count("items") == 1
    assert call(*argv, "train_ar.lr=.5") == 0 and "finished before" in capsys.readouterr().out, (
        "the VAE has no part in train_ar"
    )
    more = [a if a != "2" else "3" for a in map(str, argv)]
    refused(capsys, 1, f"--vae {tmp_path / 'v'} --out another --part both", *more)


def test_budgets_beyond_the_ids(models, tmp_path, capsys):
    assert (
        call(
            "tokenize",
            models / "d" / "$5_to_$10" / "0.png",
            "--tokenizer",
            models / "r",
            "--out",
            tmp_path / "i.jsonl",
            "--device",
            "cpu",
            "--budgets",
            4,
        )
        == 0
    )
    argv = ["detokenize", tmp_path / "i.jsonl", "--tokenizer", models / "r", "--device", "cpu", "--steps", 1]
    capsys.readouterr()
    assert (
        call(*argv, "--out", tmp_path / "p", "--budgets", 2, 4, 16) == 0
        and "fewer tokens" in capsys.readouterr().err
    )
    assert sorted(f.name for f in (tmp_path / "p").iterdir()) == [
        "0000_0_002.png",
        "0000_0_004.png",
        "sheet.png",
    ]
    assert call(*argv, "--out", tmp_path / "q") == 0 and (tmp_path / "q" / "0000_0_004.png").is_file()
    refused(capsys, 2, "no picture", *argv, "--out", tmp_path / "n", "--budgets", 16)


def test_a_run_takes_what_a_training_takes(models, tmp_path, capsys):
    """Shards (and hub sets): read while training, encoded once, measured on what was held out."""
    import tarfile

    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for i, f in enumerate(
            sorted((models / "d" / "$5_to_$10").iterdir()) + sorted((models / "d" / "家").glob("[0-9]*"))
        ):
            tar.add(f, f"{i:04}.png")
    assert call("run", "--data", tmp_path / "x.tar", "--out", tmp_path / "r", *Q) == 0
    assert (tmp_path / "r" / "report.html").is_file() and load_learned(
        tmp_path / "r" / "ar"
    ).rule == "one in eight"
    capsys.readouterr()
    assert (
        call("run", "--data", tmp_path / "x.tar", "--out", tmp_path / "r", *Q) == 0
        and "evaluation: finished before" in capsys.readouterr().out
    )


# --- bad luck and bad intentions
# -------------------------------------------------------------------------------------

GO = "import sys; from flextok_edu.apps.train import train_main; train_main(sys.argv[1:])"


def test_a_loss_that_went_wrong_goes_on(models, tmp_path, monkeypatch, capsys):
    """NaN in the middle of stage 1: evidence, advice that the same command accepts, and a recipe that
    remembers what changed.
    """
    argv = [
        "tokenizer",
        "--data",
        models / "d",
        "--vae",
        models / "r",
        "--out",
        tmp_path / "t",
        *[a if a != "2" else "6" for a in SMALL],
        "--minutes",
        "0",
    ]
    real, count = FlowObjective.__call__, []

    def loss(self, *a, **k):
        found, numbers = real(self, *a, **k)
        count.append(1)
        return found * (float("nan") if len(count) == 5 else 1.0), numbers

    monkeypatch.setattr(FlowObjective, "__call__", loss)
    argv = argv[: argv.index("--set")] + argv[-2:] + argv[argv.index("--set") : -2]
    capsys.readouterr()
    assert call("train", *argv) == 1
    said = capsys.readouterr().err
    assert "--go-on" in said and "failed_batch.safetensors" in said and "Traceback" not in said, said
    monkeypatch.undo()
    refused(capsys, 1, "--go-on depth=3", "train", *argv[:1], "--go-on", "depth=3", *argv[1:])
    assert call("train", *argv[:1], "--go-on", "lr=1e-5,clip=.5", *argv[1:]) == 0
    assert "goes on after step" in capsys.readouterr().out
    facts = json.loads((tmp_path / "t" / "run.json").read_text())
    assert (
        facts["changes"] == [{"lr": 1e-5, "clip": 0.5}]
        and facts["preset"] == facts["recipe"]["preset"]
        and facts["recipe"]["preset"]["train_tokenizer"]["lr"] == preset("micro").train_tokenizer.lr
    )
    assert json.loads((tmp_path / "t" / "config.json").read_text())["changes"][0]["step"] > 0
    assert call("train", *argv) == 0 and "finished before" in capsys.readouterr().out, (
        "the same command, without --go-on, finds its run"
    )


def test_nan_in_the_codes_is_no_index_error(models, tmp_path, monkeypatch, capsys):
    from flextok_edu.networks import Encoder

    real = Encoder.forward
    monkeypatch.setattr(Encoder, "forward", lambda self, *a, **k: real(self, *a, **k) * float("nan"))
    capsys.readouterr()
    assert (
        call(
            "train",
            "tokenizer",
            "--data",
            models / "d",
            "--vae",
            models / "r",
            "--out",
            tmp_path / "t",
            *SMALL,
        )
        == 1
    )
    said = capsys.readouterr().err
    assert (
        "the loss of tokenizer is nan" in said and (tmp_path / "t" / "failed_batch.safetensors").is_file()
    ), said


def test_ids_are_ids(models, tmp_path, capsys):
    """A schema at the door: whole numbers of this tokenizer, and its identity."""
    tok = FlexTok.from_pretrained(models / "r" / "tokenizer")
    head = {"tokenizer": weights_hash(tok), "identity": tokenizer_identity(tok)}
    argv = [
        "detokenize",
        tmp_path / "i.jsonl",
        "--tokenizer",
        models / "r",
        "--device",
        "cpu",
        "--out",
        tmp_path / "p",
    ]
    for rows, text in (
        ([{"image": "x", "ids": [1.9, True]}], "ids[0]"),
        ([{"image": "x", "ids": [1, True]}], "ids[1]"),
        ([{"image": "x", "ids": []}], "0 ids"),
        ([{"image": "x", "ids": [10**30]}], "1000000000"),
        ([{"image": 3, "ids": [1]}], "image"),
        ([[]], "picture 1"),
    ):
        (tmp_path / "i.jsonl").write_text("\n".join(map(json.dumps, [head, *rows])))
        refused(capsys, 1, text, *argv)
    for text in ("[" * 100_000, '{"tokenizer": 3}\n{}', "\xff", ""):
        (tmp_path / "i.jsonl").write_text(text, encoding="latin-1")
        refused(capsys, 1, "is no file of ids", *argv)
    (tmp_path / "i.jsonl").write_text(
        json.dumps(head | {"identity": "0" * 16}) + '\n{"image": "x", "ids": [1]}'
    )
    refused(capsys, 1, "identity 0000000000000000", *argv)
    assert not (tmp_path / "p").exists()


def test_nobody_loses_a_file(models, tmp_path, capsys):
    """An output never replaces an input; a stranger's file only with --force."""
    photo = tmp_path / "a.png"
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(photo)
    before = photo.read_bytes()
    tok = ["--tokenizer", models / "r", "--device", "cpu"]
    for more in ([], ["--force"]):
        capsys.readouterr()
        assert call("tokenize", photo, *tok, "--out", photo, *more) != 0 and photo.read_bytes() == before
    assert (
        call("tokenize", photo, *tok, "--out", tmp_path / "i.jsonl") == 0
        and call("tokenize", photo, *tok, "--out", tmp_path / "i.jsonl") == 0
    ), "our own file is replaced"
    (tmp_path / "holiday").mkdir()
    Image.fromarray(np.ones((9, 9, 3), np.uint8)).save(tmp_path / "holiday" / "sheet.png")
    mine = (tmp_path / "holiday" / "sheet.png").read_bytes()
    argv = ["detokenize", tmp_path / "i.jsonl", *tok, "--steps", 1, "--out", tmp_path / "holiday"]
    capsys.readouterr()
    assert (
        call(*argv) != 0
        and (tmp_path / "holiday" / "sheet.png").read_bytes() == mine
        and len(list((tmp_path / "holiday").iterdir())) == 1
    )
    assert (
        call(*argv, "--force") == 0
        and call(*argv) == 0
        and (tmp_path / "holiday" / "sheet.png").read_bytes() != mine
    )
    (tmp_path / "notes.jsonl").write_text("my notes")
    capsys.readouterr()
    assert (
        call("tokenize", photo, *tok, "--out", tmp_path / "notes.jsonl") != 0
        and (tmp_path / "notes.jsonl").read_text() == "my notes"
    )


def test_guidance_beyond_reason(models, tmp_path, capsys):
    for guidance in ("1e38", "nan"):
        capsys.readouterr()
        assert (
            call(
                "generate",
                "0",
                "--ar",
                models / "r",
                "--guidance",
                guidance,
                "--out",
                tmp_path / "g",
                "--device",
                "cpu",
            )
            != 0
        )
    assert not (tmp_path / "g").exists()


def test_what_nobody_announced_is_a_sentence(monkeypatch, capsys):
    for error in (
        KeyError("x"),
        TypeError("y"),
        RecursionError("z"),
        MemoryError(),
        AttributeError("a"),
        RuntimeError("b"),
        IndexError("c"),
    ):

        def fail(*a):
            raise error

        patch(monkeypatch, apps_train, "train", fail)
        refused(
            capsys,
            1,
            "out of memory" if isinstance(error, MemoryError) else type(error).__name__,
            "train",
            "vae",
        )


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="signals")
def test_a_closed_terminal_is_heard(models, tmp_path):
    """SIGHUP saves like SIGTERM does."""
    loud = GO.replace(
        "import sys;",
        "import sys; import flextok_edu.engine.distributed as c; real = c.Distributed.micro_batches; "
        "c.Distributed.micro_batches = lambda s, n: print('in training', flush=True) or real(s, n);",
    )
    argv = [
        "vae",
        "--data",
        str(models / "d"),
        "--out",
        str(tmp_path / "v"),
        *[a if a != "2" else "4000" for a in SMALL],
    ]
    child = subprocess.Popen(
        [sys.executable, "-c", loud, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENV,
        cwd=ROOT,
    )
    while "in training" not in child.stdout.readline():
        assert child.poll() is None
    child.send_signal(signal.SIGHUP)
    _, err = child.communicate(timeout=120)
    assert child.returncode == 128 + signal.SIGHUP and list(
        (tmp_path / "v" / "checkpoints").glob("step-*")
    ), err


def test_foreign_configurations_are_checked(tmp_path, capsys):
    """`--config` of a stranger, and --set: sizes that no machine has are refused before anything is
    allocated.
    """
    for preset_ in (
        {"tokenizer": {"registers": 10**12}},
        {"ar": {"depth": 10**9}},
        {"vae": {"channels": [10**9]}},
        {"tokenizer": {"max_timestep": 5e-324}},
    ):
        (tmp_path / "s.json").write_text(json.dumps({"preset": {"name": "micro", **preset_}}))
        began = time.monotonic()
        refused(
            capsys,
            2,
            next(iter(next(iter(preset_.values())))),
            "train",
            "vae",
            "--config",
            tmp_path / "s.json",
            "--out",
            tmp_path / "x",
        )
        assert time.monotonic() - began < 2
    (tmp_path / "s.json").write_text("[" * 100_000)
    refused(capsys, 2, "is no json", "train", "vae", "--config", tmp_path / "s.json")
    refused(
        capsys,
        2,
        "tokenizer.registers",
        "train",
        "vae",
        "--out",
        tmp_path / "x",
        "--set",
        "tokenizer.registers=1000000000000",
    )


# --- what a reviewer found in the mending
# ----------------------------------------------------------------------------


def test_results_do_not_replace_a_training(models, tmp_path, capsys):
    """`flextok_eval runs/x --out runs/x` would have replaced run.json, and made the run unusable."""
    before = (models / "r" / "run.json").read_bytes()
    refused(
        capsys,
        2,
        "holds a run.json of flextok_run",
        "eval",
        models / "r",
        "--data",
        models / "d",
        "--out",
        models / "r",
        "--device",
        "cpu",
    )
    assert (models / "r" / "run.json").read_bytes() == before
    (tmp_path / "holiday").mkdir()
    Image.fromarray(np.ones((9, 9, 3), np.uint8)).save(tmp_path / "holiday" / "quality.png")
    refused(
        capsys,
        1,
        "did not write it",
        "eval",
        models / "r",
        "--data",
        models / "d",
        "--out",
        tmp_path / "holiday",
        "--device",
        "cpu",
    )
    Image.fromarray(np.ones((9, 9, 3), np.uint8)).save(tmp_path / "holiday" / "samples.png")
    refused(
        capsys, 1, "a run would replace it", "run", "--data", models / "d", "--out", tmp_path / "holiday", *Q
    )


def test_nonsense_behind_go_on_is_not_kept(models, capsys):
    before = (models / "r" / "run.json").read_bytes()
    for words in ("precision=int8", "lr=-1", "lr=nan", "clip=x", "depth=3", "lr"):
        refused(
            capsys, 1, "--go-on", "run", "--data", models / "d", "--out", models / "r", "--go-on", words, *Q
        )
    assert (models / "r" / "run.json").read_bytes() == before


def test_a_configuration_with_other_data(models, tmp_path):
    """run.json stores the number of classes that its pictures had: other pictures have another."""
    make(tmp_path / "e" / "a", tmp_path / "e" / "b")
    assert (
        call(
            "run",
            "--config",
            models / "r" / "run.json",
            "--data",
            tmp_path / "e",
            "--out",
            tmp_path / "r",
            "--device",
            "cpu",
            "--compile",
            "off",
        )
        == 0
    )


def test_a_changed_run_goes_on_from_its_own_json(models, tmp_path, monkeypatch, capsys):
    argv = [
        "vae",
        "--data",
        models / "d",
        "--out",
        tmp_path / "v",
        "--minutes",
        "0",
        *[a if a != "2" else "6" for a in SMALL],
    ]
    real, count = engine_distributed.Distributed.micro_batches, []

    def micro_batches(self, step):
        count.append(step)
        if len(count) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, step)

    monkeypatch.setattr(engine_distributed.Distributed, "micro_batches", micro_batches)
    assert call("train", *argv) == 143
    count.clear()
    assert call("train", *argv[:1], "--go-on", "lr=1e-5", *argv[1:]) == 143, "stopped once more"
    monkeypatch.undo()
    assert call("train", "--config", tmp_path / "v" / "run.json", "--out", tmp_path / "v") == 0
    assert json.loads((tmp_path / "v" / "config.json").read_text())["changes"][0]["settings"] == {
        "preset.train_vae.lr": 1e-5
    }
    capsys.readouterr()
    assert (
        call("train", *argv[:1], "--go-on", "lr=1e-5", *argv[1:]) == 0
        and "finished before" in capsys.readouterr().out
    ), "a queue says it again"


def test_fresh_moves_nothing_that_is_needed(models, tmp_path, capsys):
    """What the training begins with lies in the folder, or the pictures cannot be had: nothing is renamed."""
    argv = ["vae", "--data", models / "d", "--out", tmp_path / "v", *SMALL]
    assert call("train", *argv) == 0
    refused(
        capsys, 1, "would get another name", "train", argv[0], "--vae", tmp_path / "v", "--fresh", *argv[1:]
    )
    refused(capsys, 1, "nowhere", "train", "vae", "--data", tmp_path / "nowhere", "--fresh", *argv[3:])
    refused(
        capsys, 1, "nowhere", "run", "--data", tmp_path / "nowhere", "--out", tmp_path / "v", "--fresh", *Q
    )
    refused(
        capsys,
        1,
        "not both",
        "run",
        "--data",
        models / "d",
        "--out",
        tmp_path / "v",
        "--fresh",
        "--go-on",
        "lr=1e-4",
        *Q,
    )
    assert (tmp_path / "v" / "config.json").is_file() and not list(tmp_path.glob("*.old-*"))


def test_doubles_were_learned_too(tmp_path):
    """Of files with equal pixels one is trained on; an evaluation on the other one knows."""
    from flextok_edu.data.datasets import load_data
    from flextok_edu.data.keys import picture_key
    from flextok_edu.data.learned import learned_from, leave_out_learned

    make(tmp_path / "d" / "a", count=60)
    train, _ = load_data(str(tmp_path / "d"), 16, 0, 10, progress=False)
    twins = []
    for f in sorted((tmp_path / "d" / "a").iterdir()):
        Image.open(f).save(tmp_path / f"twin{f.name}", compress_level=1)
        if picture_key(f) % 8 and picture_key(tmp_path / f"twin{f.name}") % 8:
            twins.append(f.name)
    for name in twins:
        os.rename(tmp_path / f"twin{name}", tmp_path / "d" / "a" / f"z{name}")
    train, val = load_data(str(tmp_path / "d"), 16, 0, 10, progress=False)
    known = set(learned_from(train).keys.tolist())
    assert len(train) < len(known) and all(
        picture_key(tmp_path / "d" / "a" / f"z{name}") in known for name in twins
    )
    seen = replace(
        val,
        keys=torch.tensor(
            [picture_key(tmp_path / "d" / "a" / f"z{name}") for name in twins[:2]] + val.keys[2:].tolist()
        ),
    )
    assert leave_out_learned(seen, {"vae": learned_from(train)})[1]["vae"]["overlap"] == 2


def test_a_model_that_goes_on_has_seen_both():
    from flextok_edu.apps.train import with_earlier
    from flextok_edu.data.learned import Learned

    def keys(*k):
        return torch.tensor(k)

    a, b, scenes = (
        Learned("one in eight", "a", 2, "x", keys(1, 2)),
        Learned("one in eight", "b", 2, "y", keys(2, 3)),
        Learned("scenes", "s", 9, "z", None),
    )
    assert (
        with_earlier(b, a).keys.tolist() == [1, 2, 3]
        and with_earlier(b, a).count == 3
        and with_earlier(b, a).rule == "one in eight"
    )
    assert (
        with_earlier(b, scenes).keys.tolist() == with_earlier(scenes, b).keys.tolist() == [2, 3]
        and with_earlier(scenes, b).rule == "one in eight"
    )
    assert with_earlier(scenes, replace(scenes, hash="w")).rule == "scenes" and with_earlier(b, b) == b
    for unknown in (None, replace(a, keys=None)):
        assert with_earlier(b, unknown).rule == "unknown" and with_earlier(b, unknown).keys is None


def test_a_cache_leaves_warnings_on(models):
    from flextok_edu.io.pictures import decoded_pictures
    from flextok_edu.data.reading import decode
    from flextok_edu.data.sources import FolderSource

    before = list(warnings.filters)
    pictures = decoded_pictures(FolderSource(models / "d"), 16, decode)
    for _ in range(3):
        pictures.load(0, 40)
    assert warnings.filters == before


def test_a_stray_archive_is_no_set(tmp_path):
    import tarfile

    make(*(tmp_path / "tv" / s / "cat" for s in ("train", "val")))
    tarfile.open(tmp_path / "tv" / "backup.tar", "w").close()
    for route in (False, True):
        assert (
            len(open_pictures(DataOptions(data=str(tmp_path / "tv"), from_disk=route), preset("micro"))[1])
            == 20
        )


def test_what_is_said_twice_is_one_file(models, tmp_path, capsys):
    assert (
        call(
            "generate",
            "0",
            "0",
            "--seeds",
            1,
            1,
            "--ar",
            models / "r",
            "--steps",
            1,
            "--device",
            "cpu",
            "--out",
            tmp_path / "g",
        )
        == 0
    )
    assert "1 pictures in" in capsys.readouterr().out and len(list((tmp_path / "g").iterdir())) == 2


def test_a_vae_in_the_folder_of_a_tokenizer_was_not_trained_there(models, tmp_path):
    from flextok_edu.apps.zoo import _history

    assert call("train", "vae", "--data", models / "d", "--out", tmp_path / "v", *SMALL) == 0
    assert (
        call(
            "train",
            "tokenizer",
            "--data",
            models / "d",
            "--vae",
            tmp_path / "v",
            "--out",
            tmp_path / "t",
            "--seed",
            7,
            *SMALL,
        )
        == 0
    )
    made = _history({"vae": tmp_path / "t" / "vae", "tokenizer": tmp_path / "t"}, None)["made"]
    assert made["tokenizer"]["seed"] == 7 and made["vae"]["seed"] is None
