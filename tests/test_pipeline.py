"""The main job: on folders, interrupted, repeated, damaged."""

import json
import math
import os
import shutil
import signal
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
from planting import patch
import torch
from PIL import Image
from torch import nn

import flextok_edu
import flextok_edu.apps.pace as apps_pace
import flextok_edu.apps.page as apps_page
import flextok_edu.apps.run_config as apps_run_config
import flextok_edu.apps.stage_table as apps_stage_table
import flextok_edu.apps.stages as apps_stages
import flextok_edu.ar_training as ar_training
import flextok_edu.training as training
import flextok_edu.engine.config as engine_config
import flextok_edu.engine.limits as engine_limits
import flextok_edu.engine.distributed as engine_distributed
import flextok_edu.engine.long_run as engine_long_run
from flextok_edu.engine.config import StageConfig, preset
from flextok_edu.engine.tensors import to_uint8
from flextok_edu.data.scenes import ToyScenes, draw
from flextok_edu.apps.run import run
from flextok_edu.apps.run_config import RunConfig, pick_precision

FAST = dict(device="cpu", steps=3, images=12, train_images=60, compile="off")


def make_folder(root, classes=("day", "night"), count=24):
    """Scenes as files: subfolders, mixed formats and sizes, some with alpha, one broken."""
    data = ToyScenes("train", 64, 2, seed=1, length=count)
    for i in range(count):
        folder = root / classes[i % len(classes)] if classes else root
        folder.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(np.array(draw(data.scene(i), 40 + 7 * i)))
        image = image.convert("RGBA") if i % 5 == 0 else image
        image.save(folder / f"{i}.{'png' if i % 5 == 0 else ('jpg', 'webp', 'png')[i % 3]}")
    (root / "broken.jpg" if not classes else root / classes[0] / "broken.jpg").write_text("no picture")
    return root


@pytest.mark.filterwarnings("ignore:1 of")
@pytest.mark.parametrize("classes", (("day", "night"), ()), ids=("with classes", "without classes"))
def test_a_folder_of_images(tmp_path, classes, capsys):
    folder = make_folder(tmp_path / "pictures", classes)
    report = run(RunConfig(data=str(folder), out=str(tmp_path / "run"), **FAST))
    out = tmp_path / "run"
    assert [r["tokens"] for r in report.rows if r["what"] == "tokens"] == [1, 2, 4, 8, 16]
    assert not (out / "classifier").exists() and "acc_kind" not in report.rows[0], (
        "no attribute classifier on images without attributes"
    )
    assert json.loads((out / "ar" / "config.json").read_text())["config"]["classes"] == max(1, len(classes))
    for name in (
        "table.json",
        "table.csv",
        "report.html",
        "reconstructions.png",
        "samples.png",
        "losses.png",
        "quality.png",
        "vae/model.safetensors",
        "tokenizer/config.json",
    ):
        assert (out / name).stat().st_size > 200, name
    assert "centre crop" in report.card["crop"]
    assert not list(out.rglob(".*")), "no temporary file is left behind"
    Image.new("RGB", (50, 50), "red").save(folder / (f"{classes[0]}/new.png" if classes else "new.png"))
    with pytest.raises(ValueError, match="not those that the run"):
        run(RunConfig(data=str(folder), out=str(out), **FAST))


def test_a_retrained_stage_is_evaluated_again(tmp_path, monkeypatch, capsys):
    config = RunConfig(out=str(tmp_path / "run"), **FAST)
    first = run(config)
    shutil.rmtree(tmp_path / "run" / "ar")
    real = ar_training.train_ar
    patch(
        monkeypatch,
        ar_training,
        "train_ar",
        lambda train, tok, p, *, seed, **k: real(train, tok, p, seed=seed + 1, **k),
    )
    second = run(config)
    assert (
        second.card["weights"]["ar"] != first.card["weights"]["ar"]
        and second.card["weights"]["vae"] == first.card["weights"]["vae"]
    )


def test_interrupted_and_started_again(tmp_path, monkeypatch, capsys):
    """Interrupt it in the tokenizer; the same command goes on, and ends as if nothing had happened."""
    whole = run(RunConfig(out=str(tmp_path / "whole"), **FAST))

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        patch(m, training, "train_tokenizer", stop)
        with pytest.raises(KeyboardInterrupt):
            run(RunConfig(out=str(tmp_path / "cut"), **FAST))
    assert (tmp_path / "cut" / "vae" / "config.json").exists() and not (
        tmp_path / "cut" / "tokenizer"
    ).exists()
    capsys.readouterr()
    cut = run(RunConfig(out=str(tmp_path / "cut"), **FAST))
    assert "vae: finished before" in capsys.readouterr().out
    assert cut.card["weights"] == whole.card["weights"] and cut.rows == whole.rows


@pytest.mark.parametrize("name, at", (("vae", 2), ("classifier", 1), ("tokenizer", 2), ("ar", 1)))
def test_stopped_in_the_middle_of_a_stage(tmp_path, monkeypatch, capsys, name, at, whole=[]):
    """A signal while a stage trains; the same run goes on there, and ends with the same weights."""
    if not whole:
        whole.append(run(RunConfig(out=str(tmp_path / "whole"), **FAST)))
    real = engine_distributed.Distributed.micro_batches

    def micro_batches(self, training):
        # (not in the rehearsal that counts the arithmetic: it does not begin with this step)
        if training.objectives[0].name == name and training.done == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, training)

    with monkeypatch.context() as m:
        m.setattr(engine_distributed.Distributed, "micro_batches", micro_batches)
        with pytest.raises(engine_long_run.Stopped) as stop:
            run(RunConfig(out=str(tmp_path / "cut"), **FAST))
    assert (
        stop.value.number == signal.SIGTERM
        and len(list((tmp_path / "cut" / name / "checkpoints").iterdir())) == 1
        and not (tmp_path / "cut" / name / "config.json").exists()
    )
    capsys.readouterr()
    cut = run(RunConfig(out=str(tmp_path / "cut"), **FAST))
    assert f"goes on after step {at + 1} of 3" in capsys.readouterr().out and not list(
        (tmp_path / "cut").rglob("checkpoints")
    )
    assert cut.card["weights"] == whole[0].card["weights"] and cut.rows == whole[0].rows


def test_expected_curves(tmp_path, monkeypatch, capsys):
    """The range of two runs; drawn under a third of the same job, and under no other."""
    base = preset("micro")
    base = replace(
        base,
        train_images=60,
        evaluate=replace(base.evaluate, images=12, samples=12),
        **{
            f"train_{n}": replace(getattr(base, f"train_{n}"), steps=25, batch=4)
            for n in apps_run_config.STAGES
        },
    )
    patch(
        monkeypatch,
        apps_pace,
        "probe",
        lambda *a: {"vae": 1.0, "classifier": 1.0, "tokenizer": 1.0, "ar": 1.0, "evaluate": 0.0},
    )
    patch(monkeypatch, apps_stages, "evaluate_all", lambda job, models: models.logs)
    logs = [
        run(RunConfig(out=str(tmp_path / f"{seed}"), device="cpu", compile="off", seed=seed), base)
        for seed in (0, 1)
    ]
    patch(monkeypatch, apps_page, "files", lambda name: tmp_path)
    decided = engine_limits.from_dict(
        engine_config.Preset, json.loads((tmp_path / "0" / "run.json").read_text())["preset"]
    )
    assert apps_page.expected_curves(decided) is None, "no file, no curves"
    (tmp_path / "expected").mkdir()
    (tmp_path / "expected" / "micro.json").write_text(
        json.dumps(apps_page.collect_expected([tmp_path / "0", tmp_path / "1"]))
    )
    found = apps_page.expected_curves(decided)
    assert set(found) == set(apps_run_config.STAGES) and set(found["tokenizer"]) >= {"flow", "tokenizer"}
    band = found["ar"]["ar"]
    values = [row["ar"] for log in logs for row in log["ar"]]
    assert min(band["low"]) == pytest.approx(min(values), rel=1e-3) and max(band["high"]) == pytest.approx(
        max(values), rel=1e-3
    )
    assert (
        all(low <= mean <= high for low, mean, high in zip(band["low"], band["mean"], band["high"]))
        and 0 < band["at"][0] < band["at"][-1] < 1
    )
    assert (
        apps_page.expected_curves(decided, "some/folder") is None
        and apps_page.expected_curves(replace(decided, train_images=61)) is None
        and apps_page.expected_curves(preset("tiny")) is None
    )
    drawn = {}
    for name, expected in (("with", found), ("without", None)):
        apps_page.picture_losses(logs[0], tmp_path / f"{name}.png", expected)
        drawn[name] = np.asarray(Image.open(tmp_path / f"{name}.png"))
    assert drawn["with"].shape == drawn["without"].shape and (drawn["with"] != drawn["without"]).any()
    with pytest.raises(ValueError, match="the same run twice"):
        apps_page.collect_expected([tmp_path / "0", tmp_path / "0"])
    stored = json.loads((tmp_path / "1" / "run.json").read_text())
    stored["preset"]["train_ar"]["lr"] = 1.0
    (tmp_path / "1" / "run.json").write_text(json.dumps(stored))
    with pytest.raises(ValueError, match="one job"):
        apps_page.collect_expected([tmp_path / "0", tmp_path / "1"])


def test_a_stopwatch_measures_and_leaves(capsys):
    from flextok_edu.data.datasets import load_data

    train, _ = load_data("scenes", 32, 20, 2, progress=False)
    small = replace(
        preset("micro"),
        **{
            f"train_{n}": replace(getattr(preset("micro"), f"train_{n}"), batch=4)
            for n in apps_run_config.STAGES
        },
    )
    pace = apps_pace.Stopwatch("cpu", steps=2).watch(apps_pace.dummy_stages(small, train)["tokenizer"])
    assert (
        pace.batch == 4
        and pace.steps == 2
        and 0 < pace.gradient < pace.seconds
        and pace.flops > 1e8
        and 0 < pace.share < 2
        and pace.peak > 1e8
    )
    assert (
        apps_pace.Stopwatch("cpu", steps=50, seconds=0.0)
        .watch(apps_pace.dummy_stages(small, train)["ar"])
        .steps
        == 1
    ), "one step, whatever it costs"


def test_other_settings_in_the_same_folder_are_refused(tmp_path):
    config = RunConfig(out=str(tmp_path / "run"), **FAST)
    run(config)
    with pytest.raises(ValueError, match="seed: 0 then, 5 now"):
        run(replace(config, seed=5))
    weights = tmp_path / "run" / "vae" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(ValueError, match="not the ones that config.json describes"):
        run(config)
    weights.write_bytes(b"cut off")
    with pytest.raises(ValueError, match="damaged"):
        run(config)


def test_a_stage_of_another_run_is_refused(tmp_path):
    one, two = (
        RunConfig(out=str(tmp_path / name), **{**FAST, "seed": seed})
        for name, seed in (("one", 0), ("two", 1))
    )
    run(one)
    run(two)
    shutil.rmtree(tmp_path / "one" / "vae")
    shutil.copytree(tmp_path / "two" / "vae", tmp_path / "one" / "vae")
    with pytest.raises(ValueError, match="trained with VAE"):
        run(one)


def test_rows_of_pictures(tmp_path):
    """Each picture where it belongs, every pixel enlarged alike; room for the names at the left and above."""
    # rows, columns: no white
    paint = torch.rand(3, 4, 3, 1, 1, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8
    apps_page.picture_rows(
        list(paint.expand(-1, -1, -1, 16, 16)),
        ["a", "b", "c"],
        tmp_path / "rows.png",
        "title",
        ["1", "2", "3", "4"],
    )
    sheet = np.array(Image.open(tmp_path / "rows.png").convert("RGB")).astype(int)
    corner = None
    for i in range(3):
        for j in range(4):
            y, x = np.nonzero((np.abs(sheet - to_uint8(paint[i, j]).flatten().numpy()) <= 1).all(-1))
            assert len(y) >= 64 * 64 and len(y) < 64 * 64 + 40, (
                i,
                j,
                len(y),
            )  # 16 px, enlarged four times; the rim of a letter may have the same colour
            at = int(np.median(y)), int(np.median(x))
            corner = corner or at
            assert abs(at[0] - corner[0] - 67 * i) <= 1 and abs(at[1] - corner[1] - 67 * j) <= 1, (i, j, at)
    for what, part in {"names": sheet[:, :110], "title": sheet[:20], "tops": sheet[24:41, 112:]}.items():
        assert (part < 128).any(), f"{what} are not written"


def test_minutes_become_step_counts(tmp_path, monkeypatch, capsys):
    patch(
        monkeypatch,
        apps_pace,
        "probe",
        lambda *a: {"vae": 6.0, "classifier": 6.0, "tokenizer": 6.0, "ar": 6.0, "evaluate": 0.0},
    )
    run(
        RunConfig(
            out=str(tmp_path / "run"), minutes=9, device="cpu", images=12, train_images=60, compile="off"
        )
    )
    stored = json.loads((tmp_path / "run" / "run.json").read_text())["preset"]
    steps = {name: stored[f"train_{name}"]["steps"] for name in apps_run_config.STAGES}
    assert 60 <= sum(steps.values()) <= 110 and steps["vae"] > steps["ar"], steps
    assert (
        json.loads((tmp_path / "run" / "vae" / "config.json").read_text())["stage"]["steps"] == steps["vae"]
    )
    assert "minutes in all" in capsys.readouterr().out


@pytest.mark.parametrize("scale", (1.0, 1e5, 1e-6), ids=("ordinary", "would overflow", "would vanish"))
def test_float16_trains_with_a_gradient_scaler(scale):
    """Gradients too large or too small for float16 are scaled, and steps that overflow are left out, without
    a crash.
    """
    from flextok_edu.engine.trainer import Objective, fit

    torch.manual_seed(0)
    line, target, generator = (
        nn.Linear(4, 1),
        torch.tensor([[1.0, -2.0, 3.0, 0.5]]),
        torch.Generator().manual_seed(0),
    )

    def points():
        while True:
            x = torch.randn(64, 4, generator=generator)
            yield x, x @ target.T

    def loss(batch, progress):
        return (scale * (line(batch[0]).float() - batch[1]).square().mean(), {})

    log = fit(
        [Objective("line", loss, list(line.named_parameters()), StageConfig(steps=200, lr=3e-2, warmup=5))],
        points(),
        200,
        precision=torch.float16,
        progress=False,
    )
    assert log[-1]["line"] < 0.1 * log[0]["line"] and all(torch.isfinite(w).all() for w in line.parameters())
    assert all(math.isfinite(v) for row in log for v in row.values()), "the log stays json"


def test_pick_precision(monkeypatch):
    assert (
        pick_precision("auto", "cpu") is None
        and pick_precision("auto", "mps") is None
        and pick_precision("fp16", "cpu") is torch.float16
    )
    for native, expected in ((True, torch.bfloat16), (False, torch.float16)):  # Ampere and later; T4, V100
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation
        )
        assert pick_precision("auto", "cuda") is expected
    with pytest.raises(ValueError, match="use auto, fp32, bf16, fp16"):
        pick_precision("half", "cpu")


def test_named_sets_without_their_files(tmp_path):
    """A clear sentence before anything starts."""
    with pytest.raises(FileNotFoundError, match="(?i)cifar.*download"):
        run(
            RunConfig(
                data="cifar10", data_root=str(tmp_path), out=str(tmp_path / "run"), device="cpu", steps=2
            )
        )


@pytest.mark.parametrize("name, seeds", (("micro", 5), ("tiny", 1)))
def test_the_shipped_curves_are_of_the_preset(name, seeds):
    """Measured with so many seeds, of exactly what the preset says today: whoever changes it must measure
    them again.
    """
    stored = json.loads((Path(flextok_edu.__file__).parent / "expected" / f"{name}.json").read_text())
    assert len(set(stored["conditions"]["seeds"])) == seeds and replace(
        engine_limits.from_dict(engine_config.Preset, stored["preset"]), evaluate=preset(name).evaluate
    ) == preset(name)
    found = apps_page.expected_curves(preset(name))
    assert set(found) == set(apps_run_config.STAGES)
    for stage in found.values():
        for band in stage.values():
            assert len(band["at"]) == len(band["mean"]) > 5 and all(
                a <= b <= c for a, b, c in zip(band["low"], band["mean"], band["high"])
            )
    assert (
        found["tokenizer"]["regression_full"]["mean"][-1]
        < 0.2 * found["tokenizer"]["regression_full"]["mean"][0]
    )
    assert (
        apps_page.expected_curves(preset(name), "folder") is None
        and apps_page.expected_curves(replace(preset(name), level=3)) is None
    )
    assert (
        apps_page.expected_curves(
            replace(preset(name), evaluate=replace(preset(name).evaluate, guidance=7.0))
        )
        == found
    ), "how pictures are decoded changes no loss"


def test_the_table_of_stages():
    """Every group of a preset decides exactly one stage, or is shared by all; a card lists the same parts."""
    table = apps_stage_table.STAGE_TABLE
    assert tuple(table) == apps_run_config.STAGES
    decides = [name for stage in table.values() for name in stage.settings]
    shared = {"name", "image_size", "level", "train_images", "evaluate"}
    assert sorted([*decides, *shared]) == sorted(f.name for f in fields(engine_config.Preset))
    for name, stage in table.items():
        assert stage.config(preset("micro")) == getattr(preset("micro"), f"train_{name}")
        assert stage.after is None or list(table).index(stage.after) < list(table).index(name)
        assert (stage.encoded is None) == (stage.after is None), "a model before it encodes its pictures"
