"""Every silent bug that DESIGN.md names, planted on purpose: the check must pass on the real code and fail on
the planted one.

A check that cannot fail protects nobody; here each one shows that it can.
"""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from planting import patch, planted, randomize

import flextok_edu.ar as ar
import flextok_edu.flow as flow
import flextok_edu.fsq as fsq
import flextok_edu.registers as registers
import flextok_edu.tokenizer as tokenizer
import flextok_edu.networks as networks
import flextok_edu.transformer as transformer
import flextok_edu.vae as vae
import flextok_edu.data.datasets as data_datasets
import flextok_edu.engine.binding as binding
import flextok_edu.engine.tensors as engine_tensors
import flextok_edu.evaluation.evaluate as evaluation_evaluate
import flextok_edu.evaluation.metrics as evaluation_metrics
import flextok_edu.evaluation.report as evaluation_report
from flextok_edu.objective import FlowObjective
from flextok_edu.short_cuts import condition_of
from flextok_edu.engine.config import (
    ARConfig,
    EvalConfig,
    StageConfig,
    TokenizerConfig,
    TrunkConfig,
    VAEConfig,
    VAELossConfig,
)
from flextok_edu.engine.trainer import fit

VAE_SMALL = VAEConfig(latent_channels=4, channels=(16,), layers=1, stem=4, groups=4)
TOK_SMALL = TokenizerConfig(
    4, 8, 8, (8, 5, 5, 5), TrunkConfig(64, 1), TrunkConfig(64, 2), norm_before_fsq=False
)


# --- the checks
# ------------------------------------------------------------------------------------------------


def check_critic_is_trained():
    torch.manual_seed(0)
    losses = vae.VAELoss(
        vae.VAE(VAE_SMALL), VAELossConfig(perceptual=0.0, adversarial=0.1, adversarial_start=0.0)
    )
    before = {n: w.clone() for n, w in losses.critic.named_parameters()}

    def stream():
        while True:
            yield torch.rand(4, 3, 32, 32) * 2 - 1, None

    fit(losses.objectives(StageConfig(batch=4)), stream(), 2, progress=False)
    assert any(not torch.equal(before[n], w) for n, w in losses.critic.named_parameters())


def check_critic_reaches_autoencoder():
    model, grads = vae.VAE(VAE_SMALL), []
    for weight in (0.0, 1.0):
        torch.manual_seed(0)
        losses = vae.VAELoss(model, VAELossConfig(perceptual=0.0, adversarial=weight, adversarial_start=0.0))
        model.zero_grad()
        torch.manual_seed(1)
        losses.autoencoder(torch.rand(2, 3, 32, 32), 1.0)[0].backward()
        grads.append(model.decoder.conv_out.weight.grad.clone())
    assert (grads[0] - grads[1]).abs().max() > 1e-6


def check_latents_normalised_on_both_sides():
    torch.manual_seed(0)
    model, x = vae.VAE(VAE_SMALL).eval(), torch.rand(4, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        plain = model.decode(model.encode(x))
        model.latent_mean.copy_(torch.tensor([3.0, -2.0, 1.0, 0.0]))
        model.latent_std.copy_(torch.tensor([0.1, 5.0, 2.0, 1.0]))
        assert torch.allclose(model.decode(model.encode(x)), plain, atol=1e-4), (
            "decode must undo what encode did"
        )
        mean, _ = model.posterior(x)
        assert torch.allclose(
            model.encode(x),
            (mean - model.latent_mean[:, None, None]) / model.latent_std[:, None, None],
            atol=1e-5,
        ), "and encode must do it"


def check_fsq_levels():
    for levels in ((8, 5), (8, 8, 8, 5, 5, 5), (7, 5), (6, 3)):
        codes = fsq.FSQ(levels)(torch.linspace(-30, 30, 5001)[:, None].expand(-1, len(levels)))
        assert [len(codes[:, i].unique()) for i in range(len(levels))] == list(levels)


def check_fsq_ids_in_range():
    f = fsq.FSQ((8, 5, 5, 5))
    ids = f.codes_to_ids(f(torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0)) * 20))
    assert ids.min() >= 0 and ids.max() < 1000
    everything = torch.arange(1000)
    assert torch.equal(f.codes_to_ids(f.ids_to_codes(everything)), everything)


def check_fsq_gradient():
    z = torch.randn(50, 4, requires_grad=True)
    fsq.FSQ((8, 5, 5, 5))(z).sum().backward()
    assert z.grad is not None and (z.grad > 0).all()


def check_encoder_mask():
    torch.manual_seed(0)
    blocks = nn.ModuleList(transformer.Block(64) for _ in range(2))
    assert registers.leaks(blocks, registers.encoder_mask(6, 5), 6, 5, 64) == []


def check_one_budget_per_sample():
    for distribution in registers.BUDGET_DISTRIBUTIONS:
        budgets = registers.sample_budget(distribution, 4096, 16, torch.Generator().manual_seed(0))
        assert len(budgets.unique()) == (16 if distribution == "uniform" else 5)


def check_dropped_is_dropped():
    torch.manual_seed(0)
    decoder = randomize(networks.Decoder(TOK_SMALL))
    codes, t, x = torch.randn(2, 8, 4), torch.rand(2), torch.randn(2, 4, 8, 8)
    other = codes.clone()
    other[:, 3:] = torch.randn(2, 5, 4)
    with torch.no_grad():
        for short in (False, True):
            a, b = (
                decoder(x, decoder.modulations(t), *condition_of(decoder, c, 3, short=short))
                for c in (codes, other)
            )
            assert torch.allclose(a, b, atol=1e-5 * float(a.abs().max()))


def check_flow_sign():
    torch.manual_seed(0)
    latents, noise = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    target = flow.velocity_target(latents, noise)  # what the loss asks for
    # is what the sampler follows
    assert torch.allclose(flow.euler(lambda x, i: target, noise, 5), latents, atol=1e-5)


def check_flow_sign_in_the_tokenizer():
    """Loss and sampler of FlexTok itself: a decoder that answers with the true velocity has loss 0 and
    decodes exactly.
    """
    torch.manual_seed(0)
    tok, latents, noise = tokenizer.FlexTok(TOK_SMALL), torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    ids = tok.encode_latents(latents)
    tok.decoder.forward = lambda x, modulations, *told: noise - latents
    assert torch.allclose(tok.decode_latents(ids, noise, steps=4), latents, atol=1e-5)
    seen = {}

    def oracle(x, modulations, *told):  # where x lies on its line tells t; the velocity follows
        seen["x"] = x
        t = seen["t"].view(-1, 1, 1, 1)
        return (x - latents) / t  # = noise - latents

    tok.decoder.forward = oracle
    real = tok.decoder.modulations

    def modulations(t):
        seen["t"] = t
        return real(t)

    tok.decoder.modulations = modulations
    assert FlowObjective(tok)(latents)[0] < 1e-6


def check_ar_targets():
    """A model that puts all weight on the right next token has loss 0."""
    model, ids = ar_toy(), torch.randint(20, (2, 6))
    model.forward = lambda i, labels: 50.0 * nn.functional.one_hot(ids, 20).float()
    assert model.loss(ids, torch.tensor([0, 1]))[0] < 1e-6


def check_adaln_reads_norm():
    torch.manual_seed(0)
    assert transformer.sees_normed_input(randomize(transformer.ModulatedBlock(64)))


def check_ar_refuses_other_tokenizer():
    torch.manual_seed(0)
    one, two = (tokenizer.FlexTok(TOK_SMALL, vae.VAE(VAE_SMALL)).eval() for _ in range(2))
    model = ar.ARModel(ARConfig(vocabulary=1000, length=8, classes=3, width=64, depth=1)).eval()
    model.tokenizer = binding.tokenizer_hash(one)
    with pytest.raises(ValueError, match="nonsense"):
        ar.sample_images(model, two, torch.tensor([0]), steps=1)


def ar_toy():
    return randomize(ar.ARModel(ARConfig(vocabulary=20, length=6, classes=3, width=64, depth=2)), 0.3).eval()


def check_ar_shift():
    torch.manual_seed(0)
    model, ids, labels = ar_toy(), torch.randint(20, (2, 6)), torch.tensor([0, 1])
    with torch.no_grad():
        logits = model(ids, labels)
        for j in range(6):
            other = ids.clone()
            other[:, j] = (other[:, j] + 3) % 20
            changed = (model(other, labels) - logits).abs().amax((0, 2)) > 1e-5
            assert not changed[: j + 1].any(), "a prediction must not see its own target"
            assert j == 5 or changed[j + 1], "and must see the token before"


def check_ar_cache():
    torch.manual_seed(0)
    model, ids, labels = ar_toy(), torch.randint(20, (2, 6)), torch.tensor([0, 1])
    with torch.no_grad():
        assert torch.allclose(ar.cached_logits(model, ids, labels), model(ids, labels), atol=1e-4)


class Eyes(nn.Module):
    name = "pixels"

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


def check_card_names_the_pixels():
    images = torch.randint(
        0, 256, (12, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    labels = torch.zeros(12, 1, dtype=torch.int64)
    cards = [
        evaluation_report.make_card(
            data_datasets.ImageSet(x, labels, ("all",), "test"), [Eyes()], EvalConfig(), 0
        )
        for x in (images, images.roll(1, -1), images.flip(0))
    ]
    assert len({card["data_hash"] for card in cards}) == 3, "another crop, another order, another card"


def check_evaluation_uses_the_cards_images():
    torch.manual_seed(0)
    tok = tokenizer.FlexTok(TOK_SMALL, vae.VAE(VAE_SMALL)).eval()
    images = torch.randint(
        0, 256, (16, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    val = data_datasets.ImageSet(images, torch.zeros(16, 1, dtype=torch.int64), ("all",), "test")
    report = evaluation_evaluate.evaluate_tokenizer(
        tok, val, val, Eyes(), EvalConfig(images=16, steps=1, guidance=1.0), progress=False
    )
    x = engine_tensors.from_uint8(images)
    with torch.no_grad():
        # by hand, on a [0, 1] scale
        expected = ((tok.vae.decode(tok.vae.encode(x)).clamp(-1, 1) - x).abs().mean() / 2).item()
    row = next(r for r in report.rows if r["what"] == "VAE alone")
    assert report.card["data_hash"] == val.hash and math.isclose(row["mae"], expected, rel_tol=1e-4)
    floor = next(r for r in report.rows if r["what"] == "real against real")
    assert abs(floor["frechet_pixels"]) < 1e-6, "the very same images must have distance 0"


# --- the bugs
# ---------------------------------------------------------------------------------------------------


def one_player_only(monkeypatch):
    real = vae.VAELoss.objectives
    monkeypatch.setattr(vae.VAELoss, "objectives", lambda self, config: real(self, config)[:1])


def opinion_cut_off(monkeypatch):
    real = vae.PatchDiscriminator.forward
    monkeypatch.setattr(vae.PatchDiscriminator, "forward", lambda self, x: real(self, x.detach()))


def decode_forgets_normalisation(monkeypatch):
    monkeypatch.setattr(vae.VAE, "denormalize", lambda self, z: z)


def encode_forgets_normalisation(monkeypatch):
    monkeypatch.setattr(vae.VAE, "normalize", lambda self, z: z)
    monkeypatch.setattr(vae.VAE, "denormalize", lambda self, z: z)


def nine_levels_for_eight(monkeypatch):
    monkeypatch.setattr(fsq.FSQ, "bound", lambda self, z: torch.tanh(z) * self.half_width)


def wrong_basis(monkeypatch):
    monkeypatch.setattr(
        fsq.FSQ,
        "codes_to_ids",
        lambda self, codes: ((codes * self.step + self.step + 1).round().long() * self.basis).sum(-1),
    )


def no_straight_through(monkeypatch):
    monkeypatch.setattr(fsq.FSQ, "forward", lambda self, z: self.bound(z).round() / self.step + 0 * z)


def patches_see_register_0(monkeypatch):
    def mask(n, k, *args, **kwargs):
        m = torch.ones(n + k, n + k, dtype=torch.bool).tril()
        m[:n, : n + 1] = True
        return m

    patch(monkeypatch, registers, "encoder_mask", mask)


def register_sees_the_next(monkeypatch):
    def mask(n, k, *args, **kwargs):
        m = torch.ones(n + k, n + k, dtype=torch.bool).tril(1)
        m[:n, :n], m[:n, n:] = True, False
        return m

    patch(monkeypatch, registers, "encoder_mask", mask)


def one_budget_for_the_batch(monkeypatch):
    real = registers.sample_budget
    patch(
        monkeypatch,
        registers,
        "sample_budget",
        lambda distribution, b, k, generator=None, device=None: real(
            distribution, 1, k, generator, device
        ).expand(b),
    )


def dropout_keeps_information(monkeypatch):
    patch(
        monkeypatch,
        registers,
        "nested_dropout",
        lambda tokens, keep, mask_token: torch.where(keep[..., None], tokens, mask_token + 0.1 * tokens),
    )


def wrong_sign_in_the_loss(monkeypatch):
    patch(monkeypatch, flow, "velocity_target", lambda latents, noise: latents - noise)


def wrong_sign_in_the_sampler(monkeypatch):
    def walk(velocity, noise, steps=25):
        x = noise
        for i in range(steps):
            x = x + velocity(x, i) / steps
        return x

    patch(monkeypatch, flow, "euler", walk)


def wrong_sign_in_the_tokenizers_loss(monkeypatch):
    patch(monkeypatch, flow, "velocity_target", lambda latents, noise: latents - noise)


def wrong_sign_in_the_tokenizers_sampler(monkeypatch):
    monkeypatch.setitem(
        flow.SOLVERS,
        "euler",
        lambda velocity, noise, steps, shift: noise + sum(velocity(noise, i) / steps for i in range(steps)),
    )


def targets_rolled(monkeypatch):
    real = ar.F.cross_entropy
    monkeypatch.setattr(ar.F, "cross_entropy", lambda logits, ids, **k: real(logits, ids.roll(1), **k))


def reference_is_another_set(monkeypatch):
    real = evaluation_metrics.METRICS["frechet"]
    bug = replace(real, measure=lambda a, b: real.measure(a.flip(1), b))
    monkeypatch.setitem(evaluation_metrics.METRICS, "frechet", bug)


def reference_is_resized_otherwise(monkeypatch):
    real = evaluation_metrics.all_features

    def resized(feature_extractor, images, *args, **kwargs):
        if images.dtype == torch.uint8:
            images = nn.functional.interpolate(
                nn.functional.interpolate(images.float(), size=5), size=images.shape[-1]
            ).to(torch.uint8)
        return real(feature_extractor, images, *args, **kwargs)

    patch(monkeypatch, evaluation_metrics, "all_features", resized)


def raw_x_in_adaln(monkeypatch):
    patch(monkeypatch, transformer, "norm32", lambda x, eps=1e-5: x)


def raw_x_in_the_mlp_half(monkeypatch):
    def forward(self, x, n, modulation, mask=None):
        gate1, gate2, shift1, scale1, shift2, scale2 = modulation.unbind(2)
        x = transformer.gated(
            x, n, gate1, self.attention(transformer.modulate(transformer.norm32(x), n, shift1, scale1), mask)
        )
        return transformer.gated(x, n, gate2, self.mlp(transformer.modulate(x, n, shift2, scale2)))

    monkeypatch.setattr(transformer.ModulatedBlock, "forward", forward)


def any_tokenizer_will_do(monkeypatch):
    patch(monkeypatch, ar, "check_tokenizer", lambda model, tok: None)


def targets_not_shifted(monkeypatch):
    def forward(self, ids, labels):
        x = self.placed(self.token_table(ids) + self.first(labels))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    monkeypatch.setattr(ar.ARModel, "forward", forward)


def targets_shifted_twice(monkeypatch):
    real = ar.ARModel.forward
    monkeypatch.setattr(
        ar.ARModel,
        "forward",
        lambda self, ids, labels: real(self, torch.cat([ids[:, :1], ids[:, :-1]], 1), labels),
    )


def cached_step_forgets_the_position(monkeypatch):
    real = ar.ARModel.step
    monkeypatch.setattr(
        ar.ARModel,
        "step",
        lambda self, x, cache, position, seen: real(
            self, x + self.positions[0] - self.positions[position], cache, position, seen
        ),
    )


def cache_of_the_last_token_only(monkeypatch):
    real = ar.CausalAttention.forward
    monkeypatch.setattr(ar.CausalAttention, "forward", lambda self, x, cache=None, position=0: real(self, x))


def hash_of_the_shape_only(monkeypatch):
    monkeypatch.setattr(data_datasets.ImageSet, "hash", property(lambda self: str(self.images.shape)))


def reference_is_another_crop(monkeypatch):
    real = evaluation_metrics.all_features
    patch(
        monkeypatch,
        evaluation_metrics,
        "all_features",
        lambda feature_extractor, images, *a, **k: real(
            feature_extractor, images.roll(3, -1) if images.dtype == torch.uint8 else images, *a, **k
        ),
    )


def scored_against_shifted_originals(monkeypatch):
    real = evaluation_metrics.image_scores
    patch(
        monkeypatch,
        evaluation_metrics,
        "image_scores",
        lambda output, original, *a, **k: real(output, original.roll(1, -1), *a, **k),
    )


PLANTED = [
    (check_critic_is_trained, one_player_only),
    (check_critic_reaches_autoencoder, opinion_cut_off),
    (check_latents_normalised_on_both_sides, decode_forgets_normalisation),
    (check_latents_normalised_on_both_sides, encode_forgets_normalisation),
    (check_fsq_levels, nine_levels_for_eight),
    (check_fsq_ids_in_range, nine_levels_for_eight),
    (check_fsq_ids_in_range, wrong_basis),
    (check_fsq_gradient, no_straight_through),
    (check_encoder_mask, patches_see_register_0),
    (check_encoder_mask, register_sees_the_next),
    (check_one_budget_per_sample, one_budget_for_the_batch),
    (check_dropped_is_dropped, dropout_keeps_information),
    (check_flow_sign, wrong_sign_in_the_loss),
    (check_flow_sign, wrong_sign_in_the_sampler),
    (check_adaln_reads_norm, raw_x_in_adaln),
    (check_adaln_reads_norm, raw_x_in_the_mlp_half),
    (check_ar_refuses_other_tokenizer, any_tokenizer_will_do),
    (check_ar_shift, targets_not_shifted),
    (check_ar_shift, targets_shifted_twice),
    (check_ar_cache, cached_step_forgets_the_position),
    (check_ar_cache, cache_of_the_last_token_only),
    (check_card_names_the_pixels, hash_of_the_shape_only),
    (check_evaluation_uses_the_cards_images, reference_is_another_crop),
    (check_evaluation_uses_the_cards_images, scored_against_shifted_originals),
    (check_evaluation_uses_the_cards_images, reference_is_another_set),
    (check_evaluation_uses_the_cards_images, reference_is_resized_otherwise),
    (check_flow_sign_in_the_tokenizer, wrong_sign_in_the_tokenizers_loss),
    (check_flow_sign_in_the_tokenizer, wrong_sign_in_the_tokenizers_sampler),
    (check_ar_targets, targets_rolled),
]


test_the_code_passes, test_the_bug_is_caught = planted(PLANTED)
