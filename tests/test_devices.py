"""Any device, any precision, any batch size: shown here without a GPU, and on one where there is one."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flextok_edu.ar import ARModel
from flextok_edu.engine.config import ARConfig, TokenizerConfig, TrunkConfig, VAEConfig, VAELossConfig
from flextok_edu.engine.tensors import noise_like, pick_device
from flextok_edu.data.features import AttributeClassifier
from flextok_edu.flow import APG, guide_apg
from flextok_edu.objective import FlowObjective
from flextok_edu.short_cuts import condition_of, null_condition_of, side_by_side
from flextok_edu.tokenizer import FlexTok
from flextok_edu.vae import VAE, PatchDiscriminator, VAELoss

VAE_SMALL = VAEConfig(latent_channels=4, channels=(16, 32), layers=1, stem=2, groups=4)
TOK_SMALL = TokenizerConfig(
    4, 8, 8, (8, 5, 5, 5), TrunkConfig(64, 2), TrunkConfig(64, 2), norm_before_fsq=True, zero_noise=0.5
)
AR_SMALL = ARConfig(vocabulary=1000, length=8, classes=3, width=64, depth=2)


def on_fake_cuda(module):
    """The module with all parameters and buffers replaced by fake ones on `cuda` (call it inside
    FakeTensorMode).
    """
    for m in module.modules():
        for name, w in m._parameters.items():
            if w is not None:
                m._parameters[name] = torch.nn.Parameter(
                    torch.empty(w.shape, dtype=w.dtype, device="cuda"), requires_grad=w.requires_grad
                )
        for name, w in m._buffers.items():
            if w is not None:
                m._buffers[name] = torch.empty(w.shape, dtype=w.dtype, device="cuda")
    return module


def test_forwards_leave_nothing_on_the_cpu():
    """Fake-tensor mode with everything on `cuda`: a tensor forgotten on the CPU is an error, GPU or not."""
    vae, critic, classifier = VAE(VAE_SMALL), PatchDiscriminator(), AttributeClassifier()
    losses, tok, ar = (
        VAELoss(vae, VAELossConfig(perceptual=0.0, adversarial_start=0.0)),
        FlexTok(TOK_SMALL),
        ARModel(AR_SMALL),
    )
    with FakeTensorMode(allow_non_fake_inputs=False):
        for module in (losses, critic, classifier, tok, ar):
            on_fake_cuda(module)
        images = torch.empty(2, 3, 32, 32, device="cuda")
        latents = vae.encode(images)
        assert vae.decode(latents).device.type == "cuda" and critic(images).device.type == "cuda"
        assert (
            losses.autoencoder(images, 1.0)[0].device.type == "cuda"
            and losses.discriminator(images, 1.0)[0].device.type == "cuda"
        )
        assert (
            classifier.loss(images, torch.zeros(2, 4, dtype=torch.int64, device="cuda")).device.type == "cuda"
        )
        codes = tok.quantize(tok.encoder(latents, 3))
        assert tok.fsq.ids_to_codes(tok.fsq.codes_to_ids(codes)).device.type == "cuda"
        budget, null, t = (
            torch.empty(2, dtype=torch.int64, device="cuda"),
            torch.empty(2, dtype=torch.bool, device="cuda"),
            torch.empty(2, device="cuda"),
        )
        for short in (False, True):
            for told in (
                condition_of(tok.decoder, codes, budget, null, short),
                null_condition_of(tok.decoder, 2, short),
            ):
                v = tok.decoder(latents, tok.decoder.modulations(t), *told)
                assert v.device.type == "cuda" and v.shape == latents.shape
        assert guide_apg(v, v, 3.0, APG(), None)[0].device.type == "cuda"
        together = side_by_side(condition_of(tok.decoder, codes, 3), null_condition_of(tok.decoder, 2))
        assert (
            tok.decoder(torch.cat([latents, latents]), tok.decoder.modulations(t[:1]), *together).device.type
            == "cuda"
        )
        assert (
            FlowObjective(tok.train())(latents)[0].device.type == "cuda"
            and tok.norm.mean.device.type == "cuda"
        )  # nested dropout, running norm, zero-noise regression
        ids, labels = (
            torch.empty(2, 8, dtype=torch.int64, device="cuda"),
            torch.empty(2, dtype=torch.int64, device="cuda"),
        )
        assert ar.loss(ids, labels)[0].device.type == "cuda"
        assert ar(ids, labels).device.type == "cuda"
        assert (
            ar.step(
                torch.empty(2, 1, 64, device="cuda"), ar.new_cache(2, 8), 3, [None] * len(ar.blocks)
            ).device.type
            == "cuda"
        )


def test_the_fake_device_test_can_fail():
    with FakeTensorMode(allow_non_fake_inputs=False):
        ar = ARModel(AR_SMALL)  # fake parameters, but on the CPU
        with pytest.raises(Exception, match="(?i)device"):
            ar(
                torch.empty(2, 8, dtype=torch.int64, device="cuda"),
                torch.empty(2, dtype=torch.int64, device="cuda"),
            )


class WithoutFloat64(torch.Tensor):
    """Stands for a tensor on a device that has no float64, such as MPS: it must be moved before it is
    widened.
    """

    def double(self):
        raise TypeError("this device has no float64")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_float64_stays_on_the_cpu(monkeypatch):
    from flextok_edu.evaluation.metrics import frechet

    vae, real = VAE(VAE_SMALL), VAE.posterior
    monkeypatch.setattr(
        VAE,
        "posterior",
        lambda self, images: tuple(x.as_subclass(WithoutFloat64) for x in real(self, images)),
    )
    vae.measure_latents(torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8))
    assert torch.isfinite(vae.latent_std).all()
    assert frechet(*(torch.randn(9, 3).as_subclass(WithoutFloat64) for _ in range(2))) > -1e-6


@pytest.mark.parametrize("batch", (1, 3))
def test_autocast_and_batches_of_one(batch):
    torch.manual_seed(0)
    tok, ar = FlexTok(TOK_SMALL, VAE(VAE_SMALL)), ARModel(AR_SMALL)
    images = torch.rand(batch, 3, 32, 32) * 2 - 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        latents = tok.vae.encode(images).float()
        loss, _ = FlowObjective(tok.train())(latents)
        loss.backward()
        vae_loss, _ = VAELoss(VAE(VAE_SMALL), VAELossConfig(perceptual=0.0, adversarial=0.0)).autoencoder(
            images, 0.0
        )
        ids = tok.eval().tokenize(images)
        ar_loss, _ = ar.loss(ids, torch.zeros(batch, dtype=torch.int64))
        pictures = tok.detokenize(ids[:, :3], steps=2, guidance=2.0)
        written = ar.generate(torch.zeros(batch, dtype=torch.int64), guidance=2.0)
    assert all(torch.isfinite(x) for x in (loss, vae_loss, ar_loss)) and torch.isfinite(pictures).all()
    assert ids.shape == written.shape == (batch, 8) and written.max() < 1000
    assert all(torch.isfinite(w.grad).all() for _, w in tok.own_parameters() if w.grad is not None)


def test_noise_is_the_same_on_every_device():
    for device in [d for d in ("cuda", "mps") if getattr(torch, d).is_available()] + ["cpu"]:
        assert torch.equal(noise_like((4, 8, 8), 3, [5, 6], device).cpu(), noise_like((4, 8, 8), 3, [5, 6]))


def test_pick_device_refuses_what_is_not_there():
    assert pick_device("cpu").type == pick_device(torch.device("cpu")).type == "cpu" and pick_device(
        "auto"
    ).type in ("cpu", "cuda", "mps")
    for name in ("gpu", "cudaa", "") + (() if torch.cuda.is_available() else ("cuda", "cuda:0")):
        with pytest.raises(ValueError, match=f"{name!r} is not available here.*cpu"):
            pick_device(name)
    with pytest.raises(ValueError, match="'cpu:x' is none"):
        pick_device("cpu:x")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_same_tokens_and_pictures():
    torch.manual_seed(0)
    tok = FlexTok(TOK_SMALL, VAE(VAE_SMALL)).eval()
    images = torch.rand(4, 3, 32, 32) * 2 - 1
    ids, pictures = tok.tokenize(images), tok.detokenize(tok.tokenize(images), steps=3, guidance=2.0)
    tok.cuda()
    assert (tok.tokenize(images).cpu() == ids).float().mean() > 0.95
    assert torch.allclose(tok.detokenize(ids, steps=3, guidance=2.0).cpu(), pictures, atol=1e-2)
