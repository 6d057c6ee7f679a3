"""Stage 0: the critic really plays, the learned scale is really learned, and every channel count works.

Each check is also run on a planted bug, and must fail there.
"""

import inspect
import json
import math
import textwrap
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from planting import patch, planted

import flextok_edu.engine.config as engine_config
import flextok_edu.engine.limits as engine_limits
import flextok_edu.engine.models as engine_models
import flextok_edu.engine.optim as engine_optim
import flextok_edu.engine.tensors as engine_tensors
import flextok_edu.vae as vae
import flextok_edu.vae_training as vae_training
from flextok_edu.engine.config import StageConfig, VAEConfig, VAELossConfig, preset
from flextok_edu.engine.trainer import fit
from flextok_edu.data.datasets import load_data

SMALL = VAEConfig(latent_channels=4, channels=(8, 16), layers=1, stem=2, groups=4)
CRITIC_ONLY = VAELossConfig(perceptual=0.0, adversarial=1.0, adversarial_start=0.0)
PIXELS = VAELossConfig(perceptual=0.0, adversarial=0.0)


def scenes(count=64):
    train, _ = load_data("scenes", 32, count, 4, 1, progress=False)
    return engine_tensors.from_uint8(train.images)


def stream(images, batch=8):
    generator = torch.Generator().manual_seed(0)
    while True:
        yield images[torch.randint(len(images), (batch,), generator=generator)], None


# --- the checks
# ------------------------------------------------------------------------------------------------


def check_the_critic_learns():
    """Its loss falls from 1, and real pictures end above reconstructions, if `fit` trains all objectives."""
    torch.manual_seed(0)
    losses = vae.VAELoss(vae.VAE(SMALL), CRITIC_ONLY)
    log = fit(
        losses.objectives(StageConfig(lr=5e-4, warmup=5)), stream(scenes()), 40, every=1, progress=False
    )
    assert "critic" in log[0], "the critic is an objective"
    assert log[0]["critic"] > 0.9 and sum(r["critic"] for r in log[-5:]) / 5 < 0.7, "its loss falls"
    assert log[-1]["score_real"] > log[-1]["score_fake"] + 0.5, "and it prefers real pictures"


def check_the_critic_judges_this_step():
    """The forgeries it learns from are those of this very step, without a way back into the autoencoder."""
    torch.manual_seed(0)
    losses, images = vae.VAELoss(vae.VAE(SMALL), CRITIC_ONLY), scenes(8)
    torch.manual_seed(1)
    losses.autoencoder(images, 1.0)
    torch.manual_seed(1)
    mean, logvar = losses.vae.posterior(images)
    expected = losses.vae.decoder(mean + (0.5 * logvar).exp() * torch.randn_like(mean))
    assert torch.allclose(losses.fake, expected, atol=1e-5) and not losses.fake.requires_grad
    losses.vae.zero_grad()
    losses.discriminator(images, 1.0)[0].backward()
    assert all(w.grad is None for w in losses.vae.parameters()) and all(
        w.grad is not None for w in losses.critic.parameters()
    )


def check_the_decoder_follows_the_critic():
    """The adversarial term's gradient arrives at every layer of both halves, and points towards higher
    scores.
    """
    torch.manual_seed(0)
    losses, images = vae.VAELoss(vae.VAE(SMALL), replace(CRITIC_ONLY, l1=0.0, kl=0.0)), scenes(8)
    torch.manual_seed(1)
    losses.autoencoder(images, 1.0)[0].backward()
    named = dict(losses.vae.named_parameters())
    for half in ("encoder.conv_in", "encoder.moments", "decoder.conv_in", "decoder.conv_out"):
        assert named[f"{half}.weight"].grad is not None and named[f"{half}.weight"].grad.abs().max() > 0, half
    assert all(w.grad is None for w in losses.critic.parameters()), (
        "the critic does not learn in the autoencoder's turn"
    )
    before = losses.critic(losses.fake).mean()
    with torch.no_grad():
        norm = math.sqrt(sum(float(w.grad.square().sum()) for w in named.values()))
        for w in named.values():
            w -= 0.01 / norm * w.grad
    torch.manual_seed(1)
    losses.autoencoder(images, 1.0)
    assert losses.critic(losses.fake).mean() > before


def check_the_critic_waits():
    """Before its start it neither moves nor is listened to."""
    torch.manual_seed(0)
    losses = vae.VAELoss(vae.VAE(SMALL), replace(CRITIC_ONLY, adversarial_start=0.5))
    before = [w.clone() for w in losses.critic.parameters()]
    objectives = losses.objectives(StageConfig(lr=1e-3))
    log = fit(objectives, stream(scenes()), 8, every=1, progress=False)
    assert [("adversarial" in r) for r in log] == [False] * 4 + [True] * 4
    fresh = vae.VAELoss(vae.VAE(SMALL), replace(CRITIC_ONLY, adversarial_start=1.1))
    fresh.critic.load_state_dict(dict(zip(fresh.critic.state_dict(), before)))
    fit(fresh.objectives(StageConfig(lr=1e-3)), stream(scenes()), 4, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(before, fresh.critic.parameters()))
    assert not all(torch.equal(a, b) for a, b in zip(before, losses.critic.parameters()))


def check_the_scale_is_learned():
    """exp(s) finds the reconstruction error, and divides its gradient."""
    torch.manual_seed(0)
    losses = vae.VAELoss(vae.VAE(SMALL), replace(PIXELS, learned_logvar=True))
    log = fit(losses.objectives(StageConfig(lr=1e-4)), stream(scenes(8)), 120, every=1, progress=False)
    assert abs(float(losses.logvar.detach()) - math.log(sum(r["l1"] for r in log[-20:]) / 20)) < 0.15
    images, grads = scenes(8), []
    for s in (0.0, -2.0):
        with torch.no_grad():
            losses.logvar.fill_(s)
        losses.zero_grad(), torch.manual_seed(0)
        loss, numbers = replace_kl(losses).autoencoder(images, 0.0)
        loss.backward()
        assert torch.isclose(loss, numbers["l1"] / math.exp(s) + s)
        grads.append(losses.vae.decoder.conv_out.weight.grad.clone())
    assert torch.allclose(grads[1], grads[0] * math.exp(2), rtol=1e-3, atol=1e-6)


def replace_kl(losses):
    losses.weights = replace(losses.weights, kl=0.0)
    return losses


class Known(nn.Module):
    """A VAE whose posterior is known and whose decoder shows the latents as they are."""

    config = VAEConfig(in_channels=4)

    def posterior(self, images):
        return torch.full_like(images, 0.7).requires_grad_(), torch.full_like(
            images, math.log(0.04)
        ).requires_grad_()

    def decoder(self, latents):
        self.seen = latents
        return latents


def check_reparameterisation():
    """Latents in training are mean + std * noise, std = exp(logvar / 2), and their KL is the formula's."""
    torch.manual_seed(0)
    known = Known()
    _, numbers = vae.VAELoss(known, PIXELS).autoencoder(torch.zeros(8, 4, 32, 32), 0.0)
    assert abs(known.seen.mean() - 0.7) < 0.01 and abs(known.seen.std() - 0.2) < 0.01
    q, n = (
        torch.distributions.Normal(torch.tensor(0.7), torch.tensor(0.2)),
        torch.distributions.Normal(0.0, 1.0),
    )
    assert torch.isclose(numbers["kl"], torch.distributions.kl_divergence(q, n), rtol=1e-4)


def check_latents_are_measured():
    """Samples of the posterior, not only its means, have zero mean and unit scale in every channel."""
    torch.manual_seed(0)
    model = vae.VAE(SMALL).eval()
    with torch.no_grad():
        # means, then log-variances
        model.encoder.moments.bias.copy_(torch.tensor([3.0, -1.0, 0.0, 0.5, 0.0, 1.0, -2.0, -8.0]))
        images = (torch.rand(48, 3, 32, 32) * 255).to(torch.uint8)
        model.measure_latents(images, batch=20)
        mean, logvar = model.posterior(engine_tensors.from_uint8(images))
        z = model.normalize(mean + (0.5 * logvar).exp() * torch.randn_like(mean))
    assert z.mean((0, 2, 3)).abs().max() < 0.1 and (z.std((0, 2, 3)) - 1).abs().max() < 0.1


# --- the planted bugs
# ------------------------------------------------------------------------------------------


def left_out_of_fit(monkeypatch):
    real = vae.VAELoss.objectives
    monkeypatch.setattr(vae.VAELoss, "objectives", lambda self, config: real(self, config)[:1])


def optimiser_never_steps(monkeypatch):
    real = engine_optim.make_optimizers

    def lazy(named, config, *more):
        found = real(named, config, *more)
        if any(n.startswith("body.") or n == "logvar" for n, _ in named):
            for opt in found:
                opt.step = lambda: None
        return found

    patch(monkeypatch, engine_optim, "make_optimizers", lazy)


def hinge_upside_down(monkeypatch):
    def discriminator(self, images, progress):
        real, fake = self.critic(images), self.critic(self.fake)
        return (F.relu(1 + real).mean() + F.relu(1 - fake).mean()) / 2, {
            "score_real": real.mean(),
            "score_fake": fake.mean(),
        }

    monkeypatch.setattr(vae.VAELoss, "discriminator", discriminator)


def opinion_cut_off(monkeypatch):
    real = vae.PatchDiscriminator.forward
    monkeypatch.setattr(vae.PatchDiscriminator, "forward", lambda self, x: real(self, x.detach()))


def flees_from_the_critic(monkeypatch):
    real = vae.PatchDiscriminator.forward
    monkeypatch.setattr(
        vae.PatchDiscriminator,
        "forward",
        lambda self, x: -real(self, x) if not self.body[0].weight.requires_grad else real(self, x),
    )


def judges_old_forgeries(monkeypatch):
    real = vae.VAELoss.autoencoder

    def autoencoder(self, images, progress):
        out = real(self, images, progress)
        self.fake = self.fake.roll(1, 0)
        return out

    monkeypatch.setattr(vae.VAELoss, "autoencoder", autoencoder)


def never_waits(monkeypatch):
    real = vae.VAELoss.objectives
    monkeypatch.setattr(
        vae.VAELoss, "objectives", lambda self, config: [replace(p, start=0.0) for p in real(self, config)]
    )


def rewritten(monkeypatch, old, new):
    """`VAELoss.autoencoder` with a slip of the pen."""
    source = textwrap.dedent(inspect.getsource(vae.VAELoss.autoencoder))
    assert source.count(old) == 1
    scope = dict(vars(vae))
    exec(source.replace(old, new), scope)
    monkeypatch.setattr(vae.VAELoss, "autoencoder", scope["autoencoder"])


def std_for_variance(monkeypatch):
    rewritten(monkeypatch, "(0.5 * logvar).exp()", "logvar.exp()")


def no_noise_at_all(monkeypatch):
    rewritten(monkeypatch, "torch.randn_like(mean)", "torch.zeros_like(mean)")


def kl_without_the_half(monkeypatch):
    real = vae.kl_to_standard_normal
    patch(monkeypatch, vae, "kl_to_standard_normal", lambda mean, logvar: 2 * real(mean, logvar))


def fakes_keep_their_graph(monkeypatch):
    rewritten(monkeypatch, "self.fake = output.detach()", "self.fake = output")


def scale_applied_to_nothing(monkeypatch):
    rewritten(monkeypatch, "loss = loss / s.exp() + s", "loss = loss + s")


def scale_without_its_log(monkeypatch):
    monkeypatch.setattr(
        vae.VAELoss, "scale", lambda self, images, progress: (self.distance / self.logvar.exp(), {})
    )


def measured_on_means_only(monkeypatch):
    real = vae.VAE.posterior

    def measure(self, images, batch=250):
        mean = real(self, engine_tensors.from_uint8(images))[0]
        self.latent_mean.copy_(mean.mean((0, 2, 3))), self.latent_std.copy_(mean.std((0, 2, 3)))

    monkeypatch.setattr(vae.VAE, "measure_latents", measure)


PLANTED = [
    (check_the_critic_learns, left_out_of_fit),
    (check_the_critic_learns, optimiser_never_steps),
    (check_the_critic_learns, hinge_upside_down),
    (check_the_critic_judges_this_step, judges_old_forgeries),
    (check_the_decoder_follows_the_critic, opinion_cut_off),
    (check_the_decoder_follows_the_critic, flees_from_the_critic),
    (check_the_critic_waits, never_waits),
    (check_the_scale_is_learned, left_out_of_fit),
    (check_the_scale_is_learned, optimiser_never_steps),
    (check_the_scale_is_learned, scale_without_its_log),
    (check_reparameterisation, std_for_variance),
    (check_reparameterisation, no_noise_at_all),
    (check_reparameterisation, kl_without_the_half),
    (check_the_critic_judges_this_step, fakes_keep_their_graph),
    (check_the_scale_is_learned, scale_applied_to_nothing),
    (check_latents_are_measured, measured_on_means_only),
]


test_the_code_passes, test_the_bug_is_caught = planted(PLANTED)


# --- sizes and options
# -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", (4, 8, 16))
def test_channels(channels, tmp_path):
    """4, 8 and 16 latent channels build, train, measure, save and come back."""
    p = preset("micro")
    train, _ = load_data("scenes", 32, 60, 4, 1, progress=False)
    p = replace(
        p,
        vae=replace(SMALL, latent_channels=channels),
        vae_loss=replace(p.vae_loss, perceptual=0.0),
        train_vae=StageConfig(steps=30, batch=8, lr=2e-3, ema=0.9),
    )
    model, log = vae_training.train_vae(train, p, progress=False)
    images = engine_tensors.from_uint8(train.images[:3])
    with torch.no_grad():
        z = model.encode(images)
        assert (
            z.shape == (3, channels, 8, 8)
            and model.decode(z).shape == images.shape
            and log[-1]["l1"] < log[0]["l1"]
        )
        assert torch.allclose(model.encode(images[:1]), z[:1], atol=1e-5), "a batch of one"
        engine_models.save_model(tmp_path, model, model.config)
        again, _ = engine_models.load_model(tmp_path, vae.VAE, VAEConfig)
        assert torch.equal(again.eval().encode(images), z)


def test_weights_of_another_size_are_refused(tmp_path):
    """config.json was edited: the weights are those it names, and do not fit the model that it describes."""
    model = vae.VAE(SMALL)
    engine_models.save_model(tmp_path, model, model.config)
    facts = json.loads((tmp_path / "config.json").read_text())
    facts["config"]["latent_channels"] = 2 * SMALL.latent_channels
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="do not fit the model that config.json describes.*size mismatch"):
        engine_models.load_model(tmp_path, vae.VAE, VAEConfig)


def test_options_are_off_by_default():
    """Without options nothing is added: two objectives, no scale, and the loss is the plain weighted sum."""
    torch.manual_seed(0)
    losses, images = vae.VAELoss(vae.VAE(SMALL), replace(VAELossConfig(), perceptual=0.0)), scenes(8)
    assert [p.name for p in losses.objectives(StageConfig())] == ["vae", "critic"] and losses.logvar is None
    loss, numbers = losses.autoencoder(images, 0.0)
    assert torch.isclose(loss, numbers["l1"] + 1e-4 * numbers["kl"])
    squares = vae.VAELoss(losses.vae, PIXELS, pixel=F.mse_loss)
    torch.manual_seed(3)
    loss, numbers = squares.autoencoder(images, 0.0)
    assert torch.isclose(
        loss, (squares.fake - images).square().mean() + 1e-4 * numbers["kl"]
    ) and torch.isclose(numbers["l1"], (squares.fake - images).abs().mean())


def test_learned_scale_trains_from_the_preset():
    """The option is a field of the preset, and `train_vae` needs nothing else; also with a critic and under
    autocast.
    """
    p = preset("micro")
    train, _ = load_data("scenes", 32, 40, 4, 1, progress=False)
    p = replace(
        p,
        vae=SMALL,
        vae_loss=replace(p.vae_loss, perceptual=0.0, learned_logvar=True, adversarial_start=0.5),
        train_vae=StageConfig(steps=20, batch=4, ema=0.9),
    )
    _, log = vae_training.train_vae(train, p, progress=False, precision=torch.bfloat16)
    assert log[-1]["logvar"] < log[0]["logvar"] - 0.1 and "critic" in log[-1]
    assert engine_limits.from_dict(engine_config.Preset, json.loads(engine_limits.to_json(p))) == p
