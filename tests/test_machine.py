"""What a GPU is asked to do for speed: chosen, said, kept, and without consequences elsewhere."""

import copy
import json
from dataclasses import replace

import pytest
import torch

from flextok_edu.apps import job as apps_job
from flextok_edu.apps.machine import (
    MachineOptions,
    backend_options,
    check_machine,
    compiled_stages,
    machine_line,
    pick_noise,
)
from flextok_edu.apps.run import run
from flextok_edu.apps.run_config import RunConfig
from flextok_edu.apps.train import train
from flextok_edu.apps.training import TrainOptions, noise_before
from flextok_edu.data.datasets import load_data
from flextok_edu.data.extractors import extractor
from flextok_edu.data.features import perceptual_distance
from flextok_edu.engine.compiler import short_products
from flextok_edu.engine.config import preset
from flextok_edu.engine.trainer import SingleDevice, Trainer
from flextok_edu.vae import VAE, VAELoss
from flextok_edu.vae_training import train_vae

MICRO = preset("micro")


@pytest.mark.parametrize(
    "settings,words",
    (
        ({"graphs": "yes"}, "graphs 'yes': use auto, on or off"),
        ({"tf32": "1"}, "tf32 '1': use auto, on or off"),
        ({"ahead": -1}, "ahead must be 0 or more batches, not -1"),
        ({"noise": "gpu"}, "noise 'gpu'"),
    ),
)
def test_settings_that_are_none(settings, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        check_machine(MachineOptions(**settings))
    with pytest.raises(ValueError, match=words):
        run(RunConfig(out=str(tmp_path / "run"), **settings))
    with pytest.raises(ValueError, match=words):
        train(TrainOptions(stage="vae", out=str(tmp_path / "vae"), **settings))
    assert not list(tmp_path.iterdir()), "refused before anything starts"


def test_what_auto_means():
    assert backend_options(MachineOptions(), torch.bfloat16) == {"graphs": None, "tf32": True, "ahead": None}
    assert not backend_options(MachineOptions(), None)["tf32"], "float32 was asked for"
    assert backend_options(MachineOptions(tf32="on", graphs="off", ahead=0), None) == {
        "graphs": False,
        "tf32": True,
        "ahead": 0,
    }
    here = SingleDevice("cpu", tf32=True)
    assert (here.ahead, here.tf32, here.tensors) == (0, False, False), "nothing of it on a CPU"
    there = SingleDevice("cuda", tf32=True)  # (no GPU is touched before there is something to do)
    assert (there.ahead, there.tf32, there.tensors) == (2, True, True)


def test_what_is_said(monkeypatch):
    assert machine_line(MachineOptions(), "cpu", None, ("ar",), "cpu") == ""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA X1")
    assert (
        machine_line(MachineOptions(), "cuda", torch.bfloat16, ("tokenizer", "ar"), "device")
        == "NVIDIA X1: bfloat16, tokenizer and ar compiled, steps recorded as CUDA graphs, "
        "TF32 for the rest, 2 batches ahead, noise drawn on the GPU"
    )
    off = MachineOptions(graphs="off", ahead=0)
    assert (
        machine_line(off, "cuda", None, (), "cpu")
        == "NVIDIA X1: float32, nothing compiled, no CUDA graphs, no batch ahead, noise drawn on the CPU"
    )


def test_whose_networks_are_compiled():
    """The VAE's where it pays, or where somebody asks for it: what is said is what is done."""
    mini, small = preset("mini"), preset("small")
    assert compiled_stages("auto", mini, "cuda") == ("tokenizer", "ar")
    assert compiled_stages("auto", small, "cuda") == ("vae", "tokenizer", "ar")
    assert compiled_stages("on", mini, "cuda:0") == ("vae", "tokenizer", "ar")
    assert compiled_stages("auto", small, "cpu") == compiled_stages("on", small, "cpu") == ("tokenizer", "ar")
    assert compiled_stages("off", small, "cuda") == ()


def test_noise_is_kept():
    assert [pick_noise(MachineOptions(), d) for d in ("cpu", "mps", "cuda:1")] == ["cpu", "cpu", "device"]
    assert pick_noise(MachineOptions(), "cuda", before="cpu") == "cpu"
    assert pick_noise(MachineOptions(noise="device"), "cpu", before="device") == "device"
    with pytest.raises(ValueError, match="noise: 'cpu' then, 'device' now"):
        pick_noise(MachineOptions(noise="device"), "cuda", before="cpu")


def test_a_run_keeps_its_noise(tmp_path):
    """Begun with noise on the device, it goes on so without being told; with another it is refused."""
    small = RunConfig(
        out=str(tmp_path), noise="device", steps=2, train_images=16, images=8, device="cpu", compile="off"
    )
    base = replace(MICRO, vae_loss=replace(MICRO.vae_loss, perceptual=0.0))
    run(small, base)
    assert json.loads((tmp_path / "run.json").read_text())["noise"] == "device"
    recipe = json.loads((tmp_path / "vae" / "log.json").read_text())
    assert recipe
    assert apps_job.prepare(replace(small, noise="auto"), base).noise == "device"
    with pytest.raises(ValueError, match="noise: 'device' then, 'cpu' now"):
        apps_job.prepare(replace(small, noise="cpu"), base)


def test_a_stage_keeps_its_noise(tmp_path):
    o = TrainOptions(
        stage="vae", out=str(tmp_path), steps=2, train_images=16, noise="device", device="cpu", seed=1
    )
    base = replace(MICRO, vae_loss=replace(MICRO.vae_loss, perceptual=0.0))
    train(o, base)
    assert noise_before(tmp_path) == "device"
    assert noise_before(tmp_path / "nowhere") is None
    train(replace(o, noise="auto"), base)  # finished before
    with pytest.raises(ValueError, match="noise: 'device' then, 'cpu' now"):
        train(replace(o, noise="cpu"), base)


def test_mini_takes_five_minutes_on_a_gpu(capsys):
    p, gpu = preset("mini"), torch.device("cuda")
    assert apps_job._usual_minutes(RunConfig(preset="mini"), p, gpu) == 5
    assert "mini on a GPU: 5 minutes in all" in capsys.readouterr().out
    assert apps_job._usual_minutes(RunConfig(preset="mini", at_most=60.0), p, gpu) is None
    assert apps_job._usual_minutes(RunConfig(preset="mini"), p, torch.device("cpu")) is None
    assert apps_job._usual_minutes(RunConfig(preset="small"), preset("small"), gpu) is None


def test_short_products_are_put_back():
    before = torch.get_float32_matmul_precision()
    with pytest.raises(KeyError), short_products():
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        raise KeyError
    with short_products(False):
        assert torch.get_float32_matmul_precision() == before
    assert torch.get_float32_matmul_precision() == before


# --- the VAE and its frozen network ------------------------


def vae_in_half(**changed):
    data = load_data("scenes", 32, 24, 4, progress=False)[0]
    p = replace(MICRO, train_vae=replace(MICRO.train_vae, steps=4, batch=4))
    trainer = Trainer(SingleDevice("cpu", torch.bfloat16))
    return train_vae(
        data, p, extractor(), trainer=trainer, precision=torch.bfloat16, progress=False, **changed
    )


def test_frozen_weights_are_rounded_once(monkeypatch):
    """Autocast would round them anew in every step: to the same numbers."""
    torch.set_num_threads(1)
    _, rounded = vae_in_half()
    real, seen = VAELoss.__init__, []

    def init(self, vae, weights, feature_extractor=None, *more):
        seen.append(next(feature_extractor.parameters()).dtype)
        real(self, vae, weights, copy.deepcopy(feature_extractor).float() if len(seen) else None, *more)

    # the same weights, but widened again: autocast rounds them in every step
    monkeypatch.setattr(VAELoss, "__init__", init)
    _, again = vae_in_half()
    assert seen == [torch.bfloat16]
    assert [row["perceptual"] for row in rounded] == [row["perceptual"] for row in again]


def test_the_extractor_that_was_given_stays_as_it_is():
    eyes = extractor()
    before = eyes.stem.weight.clone()
    data = load_data("scenes", 32, 8, 4, progress=False)[0]
    p = replace(MICRO, train_vae=replace(MICRO.train_vae, steps=2, batch=4))
    trainer = Trainer(SingleDevice("cpu", torch.bfloat16))
    train_vae(data, p, eyes, trainer=trainer, precision=torch.bfloat16, progress=False)
    assert eyes.stem.weight.dtype == torch.float32 and torch.equal(eyes.stem.weight, before)


def test_what_is_compiled():
    """Encoder, decoder, critic and the frozen network's blocks: and all of them are what the losses call."""
    eyes, vae = extractor(), VAE(MICRO.vae)
    losses = VAELoss(vae, MICRO.vae_loss, eyes)
    networks, called = losses.networks(), set()
    assert networks == [vae.encoder, vae.decoder, losses.critic, *eyes.blocks]
    for m in networks:
        m.register_forward_hook(lambda m, given, found: called.add(m))
    images = torch.zeros(1, 3, 32, 32)
    losses.autoencoder(images, 1.0)
    losses.discriminator(images, 1.0)
    unused = [m for m in networks if m not in called]
    assert all(m in eyes.blocks for m in unused) and len(unused) < len(eyes.blocks)
    assert float(perceptual_distance(eyes, images, images)) == 0
    without = VAELoss(vae, replace(MICRO.vae_loss, perceptual=0.0, adversarial=0.0))
    assert without.networks() == [vae.encoder, vae.decoder]
