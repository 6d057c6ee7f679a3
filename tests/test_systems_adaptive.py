"""ALIT and KARL: what an iteration sees, what halts, where a list ends. With the bugs that each check must
catch.
"""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from planting import patch, planted, randomize
from torch import nn

import flextok_edu.systems.adaptive as adaptive
import flextok_edu.systems.alit as alit
import flextok_edu.systems.karl as karl
from flextok_edu.data.datasets import ImageSet
from flextok_edu.engine.config import StageConfig, TrunkConfig, VAEConfig, preset
from flextok_edu.engine.tokenizers import load_any_tokenizer
from flextok_edu.objective import REPA, sample_training_noise
from flextok_edu.registers import keep_mask
from flextok_edu.systems.alit import ALIT, ALITEncoder, ALITObjective, until_error
from flextok_edu.systems.common import training_flops
from flextok_edu.systems.karl import BINS, KARL, LOSSLESS, KARLEncoder, KARLObjective, bin_of, kept_tokens
from flextok_edu.training import Latents, fit_tokenizer, train_tokenizer
from flextok_edu.vae import VAE

MICRO = preset("micro")
SMALL = dict(encoder=TrunkConfig(32, 1, head_dim=16), decoder=TrunkConfig(32, 2, head_dim=16))
SYSTEMS = (ALIT, KARL)


def small(system, vae=None, **fields):
    """A small tokenizer with large random weights."""
    torch.manual_seed(0)
    tok = randomize(system(replace(system.settings_for(MICRO), **SMALL, **fields), vae))
    with torch.no_grad():  # no saturated FSQ, and errors of many sizes
        tok.encoder.head.weight.mul_(0.3)
        tok.decoder.head.weight.mul_(0.1)
    return tok.eval()


def some_latents(b=6):
    return torch.randn(b, 4, 8, 8, generator=torch.Generator().manual_seed(1))


def some_draws(tok, b=6, **fields):
    g = torch.Generator().manual_seed(2)
    draws = sample_training_noise(tok.config, b, generator=g)
    return draws._replace(noise=torch.randn(b, 4, 8, 8, generator=g), **fields)


def in_doubt(tok):
    """A threshold that half of the patches pass."""
    *_, last = tok.read(some_latents(), predict_last=True)
    errors = adaptive.patch_errors(last.prediction.detach(), some_latents(), 2)
    tok.halt_below = float(errors.median())
    return tok


# --- ALIT: what an iteration sees


def weights_are_shared():
    tok, calls = small(ALIT), []
    like = small(KARL).config
    for block in tok.encoder.blocks:
        block.register_forward_hook(lambda *_: calls.append(1))
    list(tok.read(some_latents(), 4))
    assert len(calls) == 4 * tok.config.encoder.depth
    d, k = 32, tok.length
    plain = sum(w.numel() for w in adaptive_plain(like).parameters())
    mine = sum(w.numel() for w in tok.encoder.parameters())
    assert mine == plain - (k - k // 4) * d + 4 * d + d  # a quarter of the registers, iterations, mask


def adaptive_plain(config):
    from flextok_edu.networks import Encoder

    return Encoder(config)


def blocks_of_each_iteration(m):
    begin = ALITEncoder.__init__

    def init(self, config):
        begin(self, config)
        self.others = nn.ModuleList(copy.deepcopy(self.blocks) for _ in range(3))

    m.setattr(ALITEncoder, "__init__", init)


def halted_content_is_gone():
    encoder, x = small(ALIT).encoder, torch.randn(2, 16 + 4, 32)
    halted = torch.rand(2, 16, generator=torch.Generator().manual_seed(3)) < 0.5
    other = x.clone()
    other[:, :16][halted] = torch.randn(int(halted.sum()), 32)
    with torch.no_grad():
        a, b = (encoder(encoder.halt(each, halted), 1) for each in (x, other))
        assert torch.equal(a, b)
        kept = encoder.halt(x, halted)
        assert torch.equal(kept[:, :16][~halted], x[:, :16][~halted]) and torch.equal(kept[:, 16:], x[:, 16:])
        moved = x.clone()
        moved[0, int((~halted[0]).nonzero()[0])] += torch.randn(32)  # one that is not halted: it counts
        assert not torch.allclose(encoder(encoder.halt(moved, halted), 1)[0], a[0])


def the_mask_is_added(m):
    def halt(self, x, halted):
        return torch.cat([x[:, : self.n] + halted[..., None] * self.halted, x[:, self.n :]], 1)

    m.setattr(ALITEncoder, "halt", halt)


def the_others_are_halted(m):
    halt = ALITEncoder.halt
    m.setattr(ALITEncoder, "halt", lambda self, x, halted: halt(self, x, ~halted))


def good_patches_halt():
    tok, seen = in_doubt(small(ALIT)), []
    forward = tok.encoder.forward
    tok.encoder.forward = lambda x, i: (seen.append(x), forward(x, i))[1]
    with torch.no_grad():
        found = list(tok.read(some_latents(), 4))
        mask = tok.encoder.halted + tok.encoder.places(seen[0])
    for one, after in zip(found[:-1], seen[1:]):
        good = adaptive.patch_errors(one.prediction, some_latents(), 2) < tok.halt_below
        assert 0.05 < good.float().mean() < 0.95
        assert torch.equal((after[:, :16] == mask).all(-1), good)


def bad_patches_halt(m):
    m.setattr(alit, "patch_errors", lambda *a: -adaptive.patch_errors(*a))


def nothing_halts(m):
    m.setattr(ALITEncoder, "halt", lambda self, x, halted: x)


def patches_by_columns(m):
    m.setattr(
        alit, "patch_errors", lambda p, x, s: adaptive.patch_errors(p.transpose(2, 3), x.transpose(2, 3), s)
    )


def earlier_latents_change():
    """Ids of fewer tokens are those of an earlier iteration, which the later ones write anew."""
    tok = small(ALIT)
    whole = tok.encode_latents(some_latents())
    *_, second, _, last = tok.read(some_latents())
    assert torch.equal(whole, tok.fsq.codes_to_ids(last.codes)) and whole.shape == (6, 16)
    half = tok.encode_latents(some_latents(), 8)
    assert torch.equal(half, tok.fsq.codes_to_ids(second.codes)) and half.shape == (6, 8)
    assert (half != whole[:, :8]).float().mean() > 0.2


def a_budget_cuts(m):
    encode = ALIT.encode_latents
    m.setattr(ALIT, "encode_latents", lambda self, x, budget=None: encode(self, x)[:, :budget])


# --- ALIT: its loss


def gradients_reach_every_iteration():
    tok = in_doubt(small(ALIT)).train()
    ALITObjective(tok)(some_latents(), draws=some_draws(tok))[0].backward()
    e = tok.encoder
    assert e.iterations.grad.abs().sum(1).gt(0).all() and e.registers.grad.abs().sum(1).gt(0).all()
    assert e.halted.grad.abs().sum() > 0
    others = e.iterations.grad[1:] - e.iterations.grad[:1]
    assert others.abs().sum(1).gt(0).all()


def the_first_iteration_forever(m):
    forward = ALITEncoder.forward
    m.setattr(ALITEncoder, "forward", lambda self, x, i: forward(self, x, 0))


def every_iteration_counts():
    tok = small(ALIT)
    loss = ALITObjective(tok)
    draws = some_draws(tok)
    with torch.no_grad():
        _, numbers = loss(some_latents(), draws=draws)
        each = [numbers[f"regression_{i}"] for i in (1, 2, 3, 4)]
        assert len(set(map(float, each))) == 4
        total = sum(w * e for w, e in zip(loss.weights, each)) / sum(loss.weights)
        assert torch.allclose(numbers["regression"], total)
        assert list(loss.weights) == sorted(loss.weights, reverse=True) and min(loss.weights) > 0
        assert len(loss.weights) == 4
        full = loss(some_latents(), draws=draws)[0]
        assert torch.allclose(full, (numbers["flow"] + total) / 2)


def only_the_last_counts(m):
    m.setattr(ALITObjective, "weights", (0.0, 0.0, 0.0, 1.0))


def one_is_forgotten(m):
    m.setattr(ALITObjective, "weights", (2.5, 2.0, 1.5))


def the_flow_gets_the_drawn_iteration():
    tok = small(ALIT)
    draws = some_draws(tok, 16, budget=torch.arange(1, 17), null=torch.zeros(16, dtype=torch.bool))
    latents = some_latents(16)
    with torch.no_grad():
        step = ALITObjective(tok).step(latents, None, draws)
    assert step.keep.sum(1).tolist() == [4] * 4 + [8] * 4 + [12] * 4 + [16] * 4
    assert (step.codes[:4, 4:] == 0).all() and (step.codes[0, 3] != 0).any()
    tok.halt_below = 0.0  # without lots
    with torch.no_grad():
        step = ALITObjective(tok).step(latents, None, draws)
    for i, k in enumerate((4, 8, 12, 16)):
        rows = slice(4 * i, 4 * i + 4)
        ids = tok.fsq.codes_to_ids(step.codes[rows, :k])
        assert torch.equal(ids, tok.encode_latents(latents, k)[rows])


def one_iteration_late(m):
    of = ALITObjective._of
    m.setattr(ALITObjective, "_of", lambda self, last, parts: of(self, (last + 1).clamp(max=3), parts))


def a_micro_batch_is_a_part():
    for system in SYSTEMS:
        tok = small(system)
        if system is ALIT:
            in_doubt(tok)
        loss, draws = tok.objective(tok), some_draws(tok)
        with torch.no_grad():
            whole = loss(some_latents(), draws=draws)[0]
            parts = [loss(some_latents()[r], draws=draws.of(r))[0] for r in torch.arange(6).split(2)]
        assert torch.allclose(whole, sum(parts) / 3, rtol=1e-5), system


def lots_of_the_batch(m):
    for module in (alit, karl):
        m.setattr(module, "chances", lambda noise: torch.rand(noise.shape))


# --- both: ids


def an_image_stands_alone():
    for system in SYSTEMS:
        tok = small(system)
        if system is ALIT:
            in_doubt(tok)
        together = tok.encode_latents(some_latents())
        assert torch.equal(together, tok.encode_latents(some_latents()))
        alone = torch.cat([tok.encode_latents(one) for one in some_latents().split(1)])
        assert torch.equal(together, alone), system
        if system is KARL:
            both = (
                tok.encode_to(some_latents(), 0.5),
                [tok.encode_to(x, 0.5)[0] for x in some_latents().split(1)],
            )
            assert [x.tolist() for x in both[0]] == [x.tolist() for x in both[1]]


def errors_of_the_batch(m):
    m.setattr(alit, "patch_errors", lambda *a: adaptive.patch_errors(*a).mean(0).expand(len(a[0]), -1))


def lots_at_test(m):
    read = ALIT.read

    def by_lot(self, x, count=4, stay=None, predict_last=False):
        return read(self, x, count, lambda i: torch.rand(len(x), 16) < 0.5, predict_last)

    m.setattr(ALIT, "read", by_lot)


# --- KARL


def the_condition_reaches_all():
    tok = small(KARL)
    with torch.no_grad():
        (z, p), (z2, p2) = (tok.encoder(some_latents(), torch.full((6,), i)) for i in (4, 12))
    assert ((z - z2).abs().amax(-1) > 1e-3).all() and ((p - p2).abs() > 1e-5).all()


def no_condition(m):
    forward = KARLEncoder.forward
    m.setattr(KARLEncoder, "forward", lambda self, x, wanted: forward(self, x, wanted * 0))


def errors_are_rounded_up():
    errors = torch.tensor([0.001, 0.04, 0.0401, 0.08, 0.379, 0.7601, 0.9, 7.0])
    assert bin_of(errors).tolist() == [0, 0, 1, 1, 9, 19, 19, 19]


def errors_are_rounded_down(m):
    patch(m, karl, "bin_of", lambda error: ((error / karl.WIDTH).long() - 1).clamp(0, BINS - 1))
    m.setitem(globals(), "bin_of", karl.bin_of)


def targets_are_right():
    assert karl.halt_targets(torch.tensor([1, 3, 5]), 5).tolist() == [
        [0, 1, 1, 1, 1],
        [0, 0, 0, 1, 1],
        [0] * 5,
    ]
    tok = small(KARL)
    draws, seen = some_draws(tok, budget=torch.tensor([1, 2, 7, 15, 16, 16])), []
    tok.encoder.register_forward_hook(lambda mod, given, out: seen.append((given[1], out)))
    with torch.no_grad():
        step = KARLObjective(tok).step(some_latents(), None, draws)
    (first, _), (second, (_, logits)) = seen
    error = measured(tok, draws, seen[0][1][0])
    assert torch.allclose(step.numbers["error"], error.mean(), rtol=1e-4)
    assert (first < LOSSLESS).all() and torch.equal(second, bin_of(error))
    truth = torch.stack([(torch.arange(16) >= n).float() for n in draws.budget])
    expected = F.binary_cross_entropy(logits.sigmoid(), truth)
    assert torch.allclose(step.numbers["halt"], expected, rtol=1e-4)
    assert torch.allclose(step.extra, 0.1 * expected, rtol=1e-4)


def measured(tok, draws, z):
    """The error from the first T tokens, in plain steps."""
    cond = tok.decoder.condition(tok.quantize(z), draws.budget)
    with torch.no_grad():
        v = tok.decoder(torch.zeros(6, 4, 8, 8), tok.decoder.modulations(torch.ones(6)), cond)
    return (v + some_latents()).abs().flatten(1).mean(1)


def one_target_too_far(m):
    m.setattr(karl, "halt_targets", lambda t, k: (~keep_mask(t + 1, len(t), k)).float())


def targets_upside_down(m):
    m.setattr(karl, "halt_targets", lambda t, k: keep_mask(t, len(t), k).float())


def the_error_of_all_tokens(m):
    m.setattr(
        karl, "one_step", lambda dec, codes, budget, short: adaptive.one_step(dec, codes, codes.shape[1])
    )


def no_error_is_asked_for(m):
    m.setattr(karl, "bin_of", lambda error: torch.zeros(len(error), dtype=torch.int64))


def a_list_ends_at_the_first():
    p = torch.tensor(
        [[0.9, 0.1, 0.8, 0.1], [0.1, 0.76, 0.0, 0.0], [0.7, 0.74, 0.1, 0.74], [0.0, 0.0, 0.1, 0.9]]
    )
    assert kept_tokens(torch.logit(p)).tolist() == [2, 1, 4, 3]


def the_list_ends_one_later(m):
    def late(logits, above=0.75):
        going = logits <= math.log(above / (1 - above))
        return (2 + going[:, 1:].int().cumprod(1).sum(1)).clamp(max=logits.shape[1])

    patch(m, karl, "kept_tokens", late)
    m.setitem(globals(), "kept_tokens", late)


def the_last_halt_counts(m):
    def last(logits, above=0.75):
        return (logits <= math.log(above / (1 - above))).sum(1).clamp(min=1)

    patch(m, karl, "kept_tokens", last)
    m.setitem(globals(), "kept_tokens", last)


def dropped_latents_are_not_seen():
    tok, seen = small(KARL), []

    def watch(module, given, out):
        out[0].retain_grad()
        seen.append(out)

    tok.encoder.register_forward_hook(watch)
    draws = some_draws(tok, budget=torch.tensor([1, 2, 5, 9, 12, 16]), null=torch.zeros(6, dtype=torch.bool))
    step = KARLObjective(tok).step(some_latents(), None, draws)
    (z, _), (z_b, _) = seen
    step.regression.sum().backward(retain_graph=True)
    assert torch.equal(z.grad.abs().sum(-1) > 0, keep_mask(draws.budget, 6, 16))
    z.grad = None
    step.velocity.square().sum().backward()
    reached = torch.stack([g.abs().sum(-1) for g in (z.grad, z_b.grad)]).sum(0) > 0
    assert torch.equal(reached, step.keep)


def everything_is_seen(m):
    m.setattr(karl, "condition_of", lambda dec, codes, kept, null, short: (dec.condition(codes, 16), None))


test_the_code_passes, test_the_bug_is_caught = planted(
    [
        (weights_are_shared, blocks_of_each_iteration),
        (halted_content_is_gone, the_mask_is_added),
        (halted_content_is_gone, the_others_are_halted),
        (good_patches_halt, bad_patches_halt),
        (good_patches_halt, nothing_halts),
        (good_patches_halt, patches_by_columns),
        (earlier_latents_change, a_budget_cuts),
        (gradients_reach_every_iteration, the_first_iteration_forever),
        (every_iteration_counts, only_the_last_counts),
        (every_iteration_counts, one_is_forgotten),
        (the_flow_gets_the_drawn_iteration, one_iteration_late),
        (a_micro_batch_is_a_part, lots_of_the_batch),
        (an_image_stands_alone, errors_of_the_batch),
        (an_image_stands_alone, lots_at_test),
        (the_condition_reaches_all, no_condition),
        (errors_are_rounded_up, errors_are_rounded_down),
        (targets_are_right, one_target_too_far),
        (targets_are_right, targets_upside_down),
        (targets_are_right, the_error_of_all_tokens),
        (targets_are_right, no_error_is_asked_for),
        (a_list_ends_at_the_first, the_list_ends_one_later),
        (a_list_ends_at_the_first, the_last_halt_counts),
        (dropped_latents_are_not_seen, the_error_of_all_tokens),
        (dropped_latents_are_not_seen, everything_is_seen),
    ]
)


# --- from images to files


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    config = VAEConfig(latent_channels=4, channels=(16,), layers=1, stem=4, groups=4, attention=False)
    return VAE(config).eval()


def pictures(b=5):
    return torch.rand(b, 3, 32, 32, generator=torch.Generator().manual_seed(4)) * 2 - 1


@pytest.mark.parametrize("system", SYSTEMS)
def test_files_and_lengths(system, vae, tmp_path):
    tok = small(system, vae)
    ids = tok.tokenize(pictures())
    assert ids.shape == (5, 16) and ids.dtype == torch.int64 and tok.tokenize(pictures(1)).shape == (1, 16)
    assert tok.token_counts == {"alit": (4, 8, 12, 16), "karl": (1, 2, 4, 8, 16)}[tok.kind]
    for k in tok.token_counts:
        assert tok.detokenize(tok.tokenize(pictures(), k), steps=2).shape == (5, 3, 32, 32)
    tok.save_pretrained(tmp_path)
    again, facts = load_any_tokenizer(tmp_path, vae)
    assert (
        type(again) is system
        and facts["kind"] == system.kind
        and torch.equal(again.tokenize(pictures()), ids)
    )
    each = tok.tokenize(pictures(), [4, 8, 16, 4, 12])
    for row, k, image in zip(each, [4, 8, 16, 4, 12], pictures()):
        assert torch.equal(row, tok.tokenize(image[None], k)[0])
    assert tok.tokenize(pictures(2), [4, 8], as_list=True)[1].shape == (1, 8)
    assert tok.detokenize(each, steps=1).shape == (5, 3, 32, 32)


def test_alit_says_which_lengths_it_has(vae):
    tok = small(ALIT, vae)
    for wrong in (
        lambda: tok.encode_latents(some_latents(), 6),
        lambda: tok.tokenize(pictures(), 6),
        lambda: tok.tokenize(pictures(), [4, 6, 8, 4, 4]),
        lambda: tok.detokenize(torch.zeros(1, 5, dtype=torch.int64)),
        lambda: tok.decode_latents(torch.zeros(1, 1, dtype=torch.int64)),
    ):
        with pytest.raises(ValueError, match="use 4, 8, 12 or 16"):
            wrong()
    with pytest.raises(ValueError, match="choose registers=12"):
        ALIT(replace(ALIT.settings_for(MICRO), registers=10))
    with pytest.raises(ValueError, match="above 0"):
        until_error(0.0)


def test_until_error_takes_the_first(vae, monkeypatch):
    tok = small(ALIT, vae)
    errors = torch.tensor([[0.09, 0.04, 0.06, 0.03], [0.04, 0.1, 0.1, 0.1], [0.1] * 4, [0.1, 0.1, 0.1, 0.01]])
    monkeypatch.setattr(alit, "iteration_errors", lambda *_: errors)
    assert until_error(0.05)(tok, pictures(4)).tolist() == [8, 4, 16, 16]
    ids = tok.tokenize(pictures(4), budget=until_error(0.05))
    assert [len(row) for row in ids] == [8, 4, 16, 16] and torch.equal(
        ids[0], tok.tokenize(pictures(1), 8)[0]
    )


def test_iteration_errors(vae):
    tok = small(ALIT, vae)
    found = alit.iteration_errors(tok, pictures())
    zeros = torch.zeros(5, 4, 8, 8)
    for i, k in enumerate(tok.token_counts):
        picture = tok.detokenize(tok.tokenize(pictures(), k), steps=1, noise=zeros)
        expected = ((picture - pictures()) / 2).abs().flatten(1).mean(1)
        assert torch.allclose(found[:, i], expected, atol=1e-5)


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_decoder_alone_is_refused(system):
    tok = small(system)
    with pytest.raises(ValueError, match="part='both'"):
        fit_tokenizer(
            tok, Latents(some_latents()), StageConfig(steps=1, batch=2), part="decoder", device="cpu"
        )


@pytest.mark.parametrize("system", SYSTEMS)
def test_arithmetic(system):
    for name in ("micro", "tiny"):
        p = preset(name)
        assert abs(training_flops(replace(p, system=system.kind)) / training_flops(p) - 1) < 0.1, name


class Maps(nn.Module):
    maps = staticmethod(lambda images, layers: [images[:, :, ::8, ::8]])


@pytest.mark.parametrize("system", SYSTEMS)
@pytest.mark.parametrize("precision", [None, torch.bfloat16])
def test_training(system, precision, vae):
    p = replace(MICRO, system=system.kind, train_tokenizer=StageConfig(steps=4, batch=8, lr=1e-3))
    images = torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8)
    data = ImageSet(images, torch.zeros(16, 1, dtype=torch.int64), ("noise",), "noise")
    terms = [REPA(system.settings_for(MICRO), Maps(), block=0, weight=0.1)]
    tok, log = train_tokenizer(data, vae, p, terms, device="cpu", precision=precision, progress=False)
    assert type(tok) is system and all(math.isfinite(entry["tokenizer"]) for entry in log)
    assert {"flow", "regression", "repa"} <= log[-1].keys()
    assert log[0]["tokenizer"] == pytest.approx(
        (log[0]["flow"] + log[0]["regression"]) / 2 + rest(log[0]), rel=0.02
    )
    assert int(tok.norm.updates) == 4 and tok.norm.std.min() > 0


def rest(entry):
    return 0.1 * entry["repa"] + 0.1 * entry.get("halt", 0.0)


# --- what a short training teaches the halt head


def trained(monkeypatch):
    """KARL of 4 tokens, whose error tells their number: T tokens reconstruct 0.9 T/4 of the latents."""
    now, step = {}, KARLObjective.step

    def remember(self, latents, *rest):
        now["latents"] = latents
        return step(self, latents, *rest)

    def share_of(decoder, codes, budget, short):
        return now["latents"] * (0.9 * budget / 4)[:, None, None, None]

    monkeypatch.setattr(KARLObjective, "step", remember)
    monkeypatch.setattr(karl, "one_step", share_of)
    torch.manual_seed(0)
    trunk = TrunkConfig(32, 2, patch=4, head_dim=16)
    tok = KARL(replace(KARL.settings_for(MICRO), registers=4, encoder=trunk, decoder=trunk))
    how = StageConfig(steps=150, batch=16, lr=3e-3, optimizer="muon", ema=0.98)
    data = Latents(torch.randn(500, 4, 8, 8, generator=torch.Generator().manual_seed(5)))
    return fit_tokenizer(tok, data, how, device="cpu", progress=False)


def lengths_follow(tok, log):
    wanted = (0.1, 0.25, 0.45, 0.6, 0.75)  # all of 4, and 4, 3, 2, 1 tokens have 0.08, 0.26, 0.44, 0.62
    lengths = torch.tensor([[len(x) for x in tok.encode_to(some_latents(16), e)] for e in wanted])
    assert (lengths[0] == 4).all() and (lengths[-1] == 1).all()
    assert (lengths.diff(dim=0) <= 0).all() and len(set(lengths[:, 0].tolist())) >= 3, lengths
    assert log[-1]["halt"] < 0.5 * log[0]["halt"]


def test_a_larger_error_takes_no_more_tokens(monkeypatch):
    lengths_follow(*trained(monkeypatch))


def test_lengths_that_do_not_follow_are_caught(monkeypatch):
    no_error_is_asked_for(monkeypatch)
    with pytest.raises(AssertionError):
        lengths_follow(*trained(monkeypatch))
