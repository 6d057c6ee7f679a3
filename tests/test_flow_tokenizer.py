"""The lesson flow and tokenizer: solvers of known order, time shift, guidance in time, the loss in time; and
REPA. With the bugs that each check must catch.
"""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from planting import patch, randomize

import flextok_edu.flow as flow
import flextok_edu.training as training
from flextok_edu.objective import FlowObjective
from flextok_edu.engine.config import StageConfig, TokenizerConfig, TrunkConfig, VAEConfig
from flextok_edu.data.datasets import ImageSet
from flextok_edu.flow import (
    APG,
    SOLVERS,
    euler_times,
    guidance_at,
    guidance_interval,
    loss_by_time,
    shift_time,
)
from flextok_edu.objective import REPA, feature_map
from flextok_edu.tokenizer import FlexTok
from flextok_edu.training import fit_tokenizer, latent_batches
from flextok_edu.vae import VAE

VAE_SMALL = VAEConfig(latent_channels=4, channels=(16,), layers=1, stem=4, groups=4, attention=False)
TOK_SMALL = TokenizerConfig(
    4, 8, 8, (8, 5, 5, 5), TrunkConfig(64, 1), TrunkConfig(64, 4), norm_before_fsq=True, zero_noise=0.5
)


@pytest.fixture
def tok():
    torch.manual_seed(0)
    model = FlexTok(TOK_SMALL, VAE(VAE_SMALL))
    randomize(model.encoder), randomize(model.decoder)
    return model.eval()


# --- solvers: all data is one blob, so the walk from x ends at mean + spread * x, exactly
# --------------------------

MEAN, SPREAD = torch.tensor([1.0, -0.5], dtype=torch.float64), 0.5


def blob_velocity(x, t):
    return (t - (1 - t) * SPREAD**2) / (t**2 + (1 - t) ** 2 * SPREAD**2) * (x - (1 - t) * MEAN) - MEAN


def order(name, shift):
    x = torch.randn(100, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    errors = []
    for steps in (32, 128):
        times = euler_times(steps, shift=shift).tolist()
        end = getattr(flow, name)(lambda x, i: blob_velocity(x, times[i]), x, steps, shift)
        errors.append(float((end - (MEAN + SPREAD * x)).norm(dim=1).mean()))
    return math.log(errors[0] / errors[1]) / math.log(4)


def check_orders():
    for shift in (1.0, 3.0, 1 / 3):
        assert abs(order("euler", shift) - 1) < 0.15 and abs(order("heun", shift) - 2) < 0.2


def test_euler_is_of_first_order_and_heun_of_second():
    assert set(SOLVERS) == {"euler", "heun"} and SOLVERS["heun"] is flow.heun
    check_orders()


def trial_is_the_step(velocity, noise, steps=25, shift=1.0):  # the trial's velocity alone, not the mean
    x, times = noise, euler_times(steps, shift=shift).tolist()
    for i in range(steps):
        dt, v = times[i] - times[i + 1], velocity(x, i)
        x = x - dt * (velocity(x - dt * v, i + 1) if i + 1 < steps else v)
    return x


def unshifted_steps(
    velocity,
    noise,
    steps=25,
    shift=1.0,  # asks at shifted times, but walks steps of equal length
):
    x = noise
    for i in range(steps):
        x = x - velocity(x, i) / steps
    return x


@pytest.mark.parametrize(
    "name,bug",
    [("heun", trial_is_the_step), ("heun", flow.euler), ("euler", unshifted_steps)],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_wrong_solver_is_caught(name, bug, monkeypatch):
    monkeypatch.setattr(flow, name, bug)
    with pytest.raises(AssertionError):
        check_orders()


@pytest.mark.parametrize("steps", (1, 2, 5))
def test_heun_asks_only_where_euler_does(steps):
    asked = {}
    for name, solver in SOLVERS.items():
        seen = asked[name] = []
        solver(lambda x, i: (seen.append(i), x)[1], torch.zeros(1), steps)
    assert (
        asked["euler"] == list(range(steps))
        and set(asked["heun"]) == set(asked["euler"])
        and len(asked["heun"]) == 2 * steps - 1
    )


def test_both_solvers_are_exact_on_a_straight_path():
    latents, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    for solver in SOLVERS.values():
        for shift in (1.0, 3.0, 0.2):
            assert torch.allclose(solver(lambda x, i: noise - latents, noise, 4, shift), latents, atol=1e-5)


def test_time_shift():
    t = torch.linspace(0, 1, 101)
    for s in (0.1, 0.5, 3.0, 7.3):
        assert torch.allclose(shift_time(t, s), s * t / (1 + (s - 1) * t), atol=1e-6), (
            "Esser et al. 2024, equation 23"
        )
        assert torch.allclose(shift_time(shift_time(t, s), 1 / s), t, atol=1e-5)
        times = euler_times(9, shift=s)
        assert times[0] == 1 and times[-1] == 0 and (times.diff() < 0).all() and (times[4] > 0.5) == (s > 1)
    assert torch.equal(euler_times(9), torch.linspace(1, 0, 10)) and torch.equal(
        euler_times(9, shift=1.0), torch.linspace(1, 0, 10)
    ), "the default stays as it was, to the bit"
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="above 0"):
            euler_times(3, shift=bad)


def test_loss_by_time():
    generator = torch.Generator().manual_seed(0)
    t = torch.rand(5000, generator=generator)
    loss = t.square()  # known: the mean over a bin is about its middle squared
    means, counts = loss_by_time(loss, t, 10)
    assert counts.sum() == 5000 and torch.allclose((means * counts).sum() / 5000, loss.mean(), atol=1e-5)
    assert torch.allclose(means, ((torch.arange(10) + 0.5) / 10).square(), atol=0.01)
    means, counts = loss_by_time(torch.tensor([2.0, 4.0]), torch.tensor([1.0, 0.0]), 4)
    assert (
        means[-1] == 2 and means[0] == 4 and means[1:3].isnan().all() and counts.tolist() == [1, 0, 0, 1]
    ), "t = 1 belongs to the last bin"
    with pytest.raises(ValueError, match="one loss and one time"):
        loss_by_time(loss, t[:10])


# --- the tokenizer's sampler
# ----------------------------------------------------------------------------------------


def by_hand(tok, ids, noise, times, g, solver):
    """Plain modulations, plain conditions, both passes always: what `decode_latents` must equal."""
    decoder, b, k = tok.decoder, len(ids), ids.shape[1]
    codes = tok.fsq.ids_to_codes(ids)

    def velocity(x, t):
        now = decoder.modulations(t[None])
        u = decoder(x, now, decoder.null_condition(b))
        return u + g(float(t)) * (decoder(x, now, decoder.condition(codes, k)) - u)

    x = noise
    for i in range(len(times) - 1):
        dt, v = times[i] - times[i + 1], velocity(x, times[i])
        if solver == "heun" and i + 2 < len(times):
            v = (v + velocity(x - dt * v, times[i + 1])) / 2
        x = x - dt * v
    return x


@torch.no_grad()
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    "guidance", (1.0, 3.0, guidance_interval(3.0, 0.3, 0.8)), ids=("g1", "g3", "interval")
)
@pytest.mark.parametrize("shift", (1.0, 2.5))
def test_decoding_is_what_it_says(tok, solver, guidance, shift):
    ids, noise = (
        torch.randint(1000, (2, 3), generator=torch.Generator().manual_seed(1)),
        torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(2)),
    )
    expected = by_hand(
        tok,
        ids,
        noise,
        euler_times(5, shift=shift),
        guidance if callable(guidance) else lambda t: guidance,
        solver,
    )
    for tok.short_cuts in (True, False):
        found = tok.decode_latents(ids, noise, steps=5, guidance=guidance, solver=solver, shift=shift)
        assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def count_passes(tok, monkeypatch, **settings):
    asked, clocks = [], []
    forward, modulations = type(tok.decoder).forward, type(tok.decoder).modulations
    with monkeypatch.context() as m:
        m.setattr(
            type(tok.decoder), "forward", lambda self, *inputs: (asked.append(1), forward(self, *inputs))[1]
        )
        m.setattr(
            type(tok.decoder), "modulations", lambda self, t: (clocks.append(len(t)), modulations(self, t))[1]
        )
        tok.decode_latents(
            torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 4, 8, 8), steps=10, **settings
        )
    return len(asked), clocks


def test_passes_are_not_wasted(tok, monkeypatch):
    """One pass where g is 1, two elsewhere; one product for all modulations, whichever solver walks."""

    def count(**settings):
        return count_passes(tok, monkeypatch, **settings)

    assert count() == (10, [10]) and count(guidance=3.0) == (20, [10]) and count(solver="heun") == (19, [10])
    inside = sum(0.3 <= t <= 0.8 for t in euler_times(10)[:-1].tolist())
    assert count(guidance=guidance_interval(3.0, 0.3, 0.8)) == (10 + inside, [10]) and 0 < inside < 10
    tok.guidance_together = True
    assert count(guidance=3.0) == (10, [10]) and count(guidance=guidance_interval(3.0, 0.3, 0.8)) == (
        10,
        [10],
    )


@torch.no_grad()
def test_a_constant_function_is_a_number(tok):
    ids, noise = (
        torch.randint(1000, (2, 5), generator=torch.Generator().manual_seed(1)),
        torch.randn(2, 4, 8, 8),
    )
    for apg in (False, True, APG(momentum=0.0)):
        assert torch.equal(
            tok.decode_latents(ids, noise, steps=4, guidance=lambda t: 3.0, apg=apg),
            tok.decode_latents(ids, noise, steps=4, guidance=3.0, apg=apg),
        )
    assert torch.equal(
        tok.detokenize(ids, steps=4, guidance=2.0, noise=noise, solver="euler", shift=1.0),
        tok.detokenize(ids, steps=4, guidance=2.0, noise=noise),
    )
    assert not torch.allclose(
        tok.detokenize(ids, steps=4, noise=noise, solver="heun"),
        tok.detokenize(ids, steps=4, noise=noise),
        atol=1e-3,
    )
    assert not torch.allclose(
        tok.detokenize(ids, steps=4, noise=noise, shift=3.0),
        tok.detokenize(ids, steps=4, noise=noise),
        atol=1e-3,
    )


def test_bad_settings_are_refused(tok):
    ids = torch.zeros(1, 2, dtype=torch.int64)
    for settings, message in (
        (dict(solver="rk4"), "use one of euler, heun"),
        (dict(shift=0.0), "above 0"),
        (dict(guidance=lambda t: math.nan if t < 0.5 else 1.0), "at t = 0.25"),
        (dict(guidance=math.inf), "finite"),
    ):
        with pytest.raises(ValueError, match=message):
            tok.detokenize(ids, steps=4, **settings)
    assert guidance_at(2, [1.0, 0.5]) == [2.0, 2.0]


# --- REPA
# ------------------------------------------------------------------------------------------------------------


class Eyes(nn.Module):
    "Mean colours on a grid of 5 x 5."

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images, 5)


class TransformerEyes(nn.Module):
    "As features wraps DINOv2: pooled features, and a net whose output knows all tokens."

    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, images):
        return self.net(images).last_hidden_state[:, 0]


class Net(nn.Module):
    def forward(self, images):
        patches = nn.functional.avg_pool2d(images, 4).flatten(2).mT
        return SimpleNamespace(last_hidden_state=torch.cat([99 + 0 * patches[:, :1], patches], 1))


def pictures(n=12):
    return torch.randint(
        0, 256, (n, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )


def dataset(n=12):
    return ImageSet(pictures(n), torch.zeros(n, 1, dtype=torch.int64), ("all",), "test")


def check_repa_teaches_early_blocks(tok, block=1):
    tok.zero_grad()
    repa = randomize(REPA(tok.config, Eyes(), block))
    codes = tok.quantize(tok.encoder(torch.randn(3, 4, 8, 8)))
    _, hidden = tok.decoder(
        torch.randn(3, 4, 8, 8),
        tok.decoder.modulations(torch.rand(3)),
        tok.decoder.condition(codes, torch.tensor([1, 4, 8])),
        hidden_of=repa.block,
    )
    repa.distance(hidden, repa.look(pictures(3))).backward()
    moved = [
        any(w.grad is not None and w.grad.abs().sum() > 0 for w in part.parameters())
        for part in tok.decoder.blocks
    ]
    assert moved == [i <= block for i in range(4)] and tok.decoder.head.weight.grad is None
    assert tok.encoder.registers.grad.abs().sum() > 0, "through the registers, the encoder learns too"
    for w in repa.projector.parameters():
        assert w.grad.abs().sum() > 0


@pytest.mark.parametrize("block", (0, 1, 3))
def test_repa_teaches_early_blocks_and_no_others(tok, block):
    check_repa_teaches_early_blocks(tok, block)


def test_repa_at_the_wrong_block_is_caught(tok, monkeypatch):
    forward = type(tok.decoder).forward
    monkeypatch.setattr(
        type(tok.decoder),
        "forward",
        lambda self, *inputs, hidden_of=None: forward(self, *inputs, hidden_of=3),
    )
    with pytest.raises(AssertionError):
        check_repa_teaches_early_blocks(tok)


def check_repa_reads_the_patches(tok):
    """A distance that knows the answer: only the patches count, each at its own place."""
    repa = REPA(tok.config, Eyes())
    repa.projector = nn.Sequential(nn.Linear(64, 64, bias=False))
    nn.init.eye_(repa.projector[0].weight)
    n, features = repa.side**2, torch.randn(2, 64, repa.side, repa.side)
    hidden = torch.cat([features.flatten(2).mT, torch.randn(2, 5, 64)], 1)
    assert hidden.shape[1] == n + 5 and repa.distance(hidden, features).abs() < 1e-5
    assert repa.distance(-hidden, features) > 1.99 and 0.5 < repa.distance(hidden.roll(1, 1), features) < 1.5
    assert repa.distance(hidden, features.mT) > 0.3, "rows are not columns"


def test_repa_reads_the_patches(tok):
    check_repa_reads_the_patches(tok)


def test_reading_the_registers_is_caught(tok, monkeypatch):
    real = REPA.distance
    monkeypatch.setattr(REPA, "distance", lambda self, hidden, features: real(self, hidden.flip(1), features))
    with pytest.raises(AssertionError):
        check_repa_reads_the_patches(tok)


def check_statistics_are_averaged_like_the_weights(decay):
    """What comes out of the training reads codes as the training wrote them: the norm's statistics are the
    same average of the past as the weights, not a fresh measurement.
    """
    torch.manual_seed(0)
    tok, seen = FlexTok(TOK_SMALL, VAE(VAE_SMALL)), []
    average, settle = (tok.norm.mean.clone(), tok.norm.std.clone()), type(tok.norm).settle

    def noted(self, *args):
        settle(self, *args)
        seen.append((self.mean.clone(), self.std.clone()))

    with pytest.MonkeyPatch.context() as m:
        m.setattr(type(tok.norm), "settle", noted)
        fit_tokenizer(
            tok, dataset(), StageConfig(steps=12, batch=8, lr=3e-2, warmup=1, ema=decay), progress=False
        )
    for n, now in enumerate(seen[:12], 1):
        weight = 1 - min(decay, (1 + n) / (10 + n))
        average = tuple(torch.lerp(a, b, weight) for a, b in zip(average, now))
    assert torch.allclose(tok.norm.mean, average[0], rtol=1e-5, atol=1e-6) and torch.allclose(
        tok.norm.std, average[1], rtol=1e-5
    )


@pytest.mark.parametrize("decay", (0.0, 0.5))
def test_statistics_are_averaged_like_the_weights(decay):
    check_statistics_are_averaged_like_the_weights(decay)


@pytest.mark.parametrize("decay", (0.0, 0.5))
def test_statistics_measured_anew_are_caught(decay, monkeypatch):
    """The bug that `tiny` had: exact statistics of the finished weights, which nobody trained with."""
    fit = fit_tokenizer

    def anew(tok, data, *args, **named):
        tok, log = fit(tok, data, *args, **named)
        tok.norm.updates.zero_()
        with torch.no_grad():
            tok.norm.update(tok.encoder(training.cache_latents(tok.vae, data.images)[0]))
        return tok, log

    monkeypatch.setitem(globals(), "fit_tokenizer", anew)
    with pytest.raises(AssertionError):
        check_statistics_are_averaged_like_the_weights(decay)


def check_features_go_with_their_images():
    """Through the whole of fit_tokenizer, mirrored images included: each latent comes with what the eyes see
    on its own image.
    """
    torch.manual_seed(0)
    tok, data = FlexTok(replace(TOK_SMALL, sample_posterior=False), VAE(VAE_SMALL)), dataset()
    repa, seen = REPA(tok.config, Eyes()), []
    images = torch.cat([data.images, data.images.flip(-1)])
    means, features = training.cache_latents(tok.vae, images)[0], repa.look(images)

    def loss(self, latents, features=None, draws=None):
        seen.append((latents, features))
        return self.tok.encoder.registers.sum() + sum(w.sum() for w in repa.projector.parameters()), {}

    with pytest.MonkeyPatch.context() as m:
        m.setattr(FlowObjective, "__call__", loss)
        fit_tokenizer(
            tok,
            data,
            StageConfig(steps=5, batch=7, warmup=1, ema=0.5),
            flip=True,
            progress=False,
            terms=[repa],
        )
    for latents, found in seen:
        which = torch.cdist(latents.flatten(1), means.flatten(1)).argmin(1)
        assert torch.equal(latents, means[which]) and torch.equal(found, features[which])
    assert (
        len(torch.cat([torch.cdist(a.flatten(1), means.flatten(1)).argmin(1) for a, _ in seen]).unique()) > 12
    ), "shuffled, mirrored ones too"


def test_features_go_with_their_images():
    check_features_go_with_their_images()


@pytest.mark.parametrize("bug", ("shuffled apart", "not mirrored"))
def test_features_of_other_images_are_caught(bug, monkeypatch):
    if bug == "shuffled apart":
        real = training.latent_batches
        patch(
            monkeypatch,
            training,
            "latent_batches",
            lambda latents, batch, seed=0, device="cpu", features=None, *more: real(
                latents, batch, seed, device, features.roll(1, 0), *more
            ),
        )
    else:
        look, calls = REPA.look, []

        def other(self, images, batch=250):  # the first call is the check's own
            calls.append(1)
            return look(self, images if len(calls) == 1 else torch.cat([images[:12], images[:12]]), batch)

        monkeypatch.setattr(REPA, "look", other)
    with pytest.raises(AssertionError):
        check_features_go_with_their_images()


def train(repa_weight=None, steps=4, precision=None):
    torch.manual_seed(0)
    tok = FlexTok(TOK_SMALL, VAE(VAE_SMALL))
    repa = None if repa_weight is None else REPA(tok.config, Eyes(), weight=repa_weight)
    start = None if repa is None else {n: w.clone() for n, w in repa.projector.named_parameters()}
    tok, log = fit_tokenizer(
        tok,
        dataset(),
        StageConfig(steps=steps, batch=8, lr=1e-3, warmup=1, ema=0.5),
        progress=False,
        precision=precision,
        terms=[repa] if repa else [],
    )
    return tok, log, repa, start


def test_weight_zero_changes_nothing():
    tok, log, _, _ = train()
    same, log0, _, _ = train(0.0)
    assert [r["tokenizer"] for r in log] == [r["tokenizer"] for r in log0]
    assert all(torch.equal(a, b) for a, b in zip(tok.own_state().values(), same.own_state().values()))
    other, _, _, _ = train(1.0)
    assert any(not torch.equal(a, b) for a, b in zip(tok.own_state().values(), other.own_state().values())), (
        "and weight 1 does change something"
    )


@pytest.mark.parametrize("precision", (None, torch.bfloat16))
def test_the_projector_is_trained_and_not_saved(precision, tmp_path):
    tok, log, repa, start = train(1.0, 30, precision)
    assert all(not torch.equal(w, start[n]) for n, w in repa.projector.named_parameters())
    assert log[-1]["repa"] < log[0]["repa"] and math.isclose(
        log[0]["tokenizer"] - log[0]["repa"], train(0.0, 1, precision)[1][0]["tokenizer"], rel_tol=1e-3
    )
    tok.save_pretrained(tmp_path)
    again = FlexTok.from_pretrained(tmp_path)
    assert list(again.own_state()) == list(tok.own_state()) and not any(
        "projector" in n or "feature_extractor" in n for n in again.own_state()
    )


def test_one_image_and_given_budgets(tok):
    repa = REPA(tok.config, Eyes())
    loss, numbers = FlowObjective(tok.train(), [repa])(
        torch.randn(1, 4, 8, 8), repa.look(pictures(1)), budget=3
    )
    assert torch.isfinite(loss) and 0 <= numbers["repa"] <= 2
    budgets = []
    with pytest.MonkeyPatch.context() as m:
        real = type(tok.decoder).condition
        m.setattr(
            type(tok.decoder),
            "condition",
            lambda self, codes, budget, null=None: (
                budgets.append(budget),
                real(self, codes, budget, null),
            )[1],
        )
        FlowObjective(tok)(torch.randn(4, 4, 8, 8), budget=3)
        FlowObjective(tok)(torch.randn(2, 4, 8, 8), budget=torch.tensor([1, 8]))
    assert [b.tolist() for b in budgets] == [[3] * 4, [1, 8]]


def test_feature_maps():
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(feature_map(TransformerEyes(), images), nn.functional.avg_pool2d(images, 4)), (
        "patches in their places, without the class token"
    )
    assert feature_map(Eyes(), images).shape == (2, 3, 5, 5)

    class Pooled(nn.Module):
        name = "one glance"

        def forward(self, images):
            return images.mean((-2, -1))

    with pytest.raises(ValueError, match="one glance .* without places"):
        feature_map(Pooled(), images)


def test_real_eyes():
    pytest.importorskip("efficientnet_lite_pytorch")
    from flextok_edu.data.extractors import extractor

    repa = REPA(TOK_SMALL, extractor(size=64))
    features = repa.look(pictures(3))
    assert (
        features.shape == (3, 112, 4, 4) and features.dtype == torch.float16 and features.device.type == "cpu"
    )
    assert torch.allclose(features, repa.look(pictures(3), batch=2), atol=1e-2), (
        "neither does the batch size matter"
    )
    assert not any(w.requires_grad for w in repa.feature_extractor.parameters())
    assert repa.train().feature_extractor.training is False, "frozen: never leaves eval mode"


def test_repa_refuses_what_does_not_fit(tok):
    with pytest.raises(ValueError, match="blocks 0 .. 3"):
        REPA(tok.config, Eyes(), block=4)
    repa = REPA(tok.config, Eyes())
    with pytest.raises(ValueError, match="not None"):
        FlowObjective(tok, [repa])(torch.randn(2, 4, 8, 8))
    with pytest.raises(ValueError, match=r"\(b, d, 4, 4\)"):
        FlowObjective(tok, [repa])(torch.randn(2, 4, 8, 8), torch.randn(2, 3, 5, 5))
    with pytest.raises(ValueError, match="same images"):
        next(latent_batches(training.Latents(torch.randn(4, 4, 8, 8)), 2, features=torch.randn(3, 3, 4, 4)))
