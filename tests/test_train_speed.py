"""Short cut 4 is an equality: sorted micro-batches, cut to their longest budget, dealt to any number of
processes, make the gradient of the plain step.

Plain means: the whole batch in the order in which it was drawn, all registers, a mask token for each that is
dropped. Nothing is timed here.
"""

import math
from dataclasses import replace

import pytest
import torch
from planting import patch, planted, randomize
from torch import nn

import flextok_edu.apps.bench_training as apps_bench_training
import flextok_edu.apps.timing as apps_timing
import flextok_edu.engine.loader as engine_loader
import flextok_edu.engine.tensors as engine_tensors
import flextok_edu.engine.trainer as engine_trainer
import flextok_edu.fsq as fsq
import flextok_edu.objective as objective
import flextok_edu.short_cuts as short_cuts
import flextok_edu.training as training
from flextok_edu.objective import FlowObjective, sample_training_noise
from flextok_edu.engine.config import StageConfig, TokenizerConfig, TrunkConfig
from flextok_edu.registers import BUDGET_DISTRIBUTIONS
from flextok_edu.tokenizer import FlexTok
from flextok_edu.training import Latents, TokenizerLoader, fit_tokenizer, latent_batches
from flextok_edu.objective import REPA

CONFIG = TokenizerConfig(
    4,
    8,
    32,
    (8, 5, 5, 5),
    TrunkConfig(32, 2, head_dim=16),
    TrunkConfig(32, 3, head_dim=16),
    null_probability=0.3,
    zero_noise=0.3,
    norm_before_fsq=True,
)
SHARES = [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4)]  # processes, micro-batches in each
STEP = 3


def model(**changes):
    """Large random weights; a norm that has seen something; REPA with eyes of its own."""
    torch.manual_seed(0)
    config = replace(CONFIG, **changes)
    tok, repa = randomize(FlexTok(config)).train(), randomize(REPA(config, nn.Conv2d(3, 6, 8, 8), 1, 0.7))
    if tok.norm is not None:
        tok.norm.mean.copy_(torch.tensor([0.3, -0.2, 0.1, 0.0]))
        tok.norm.std.copy_(torch.tensor([2.0, 1.0, 3.0, 0.5]))
    return tok, repa


def feed_of(tok, batch, seed=0):
    """Posterior samples of 40 images and what the eyes see on them."""
    g = torch.Generator().manual_seed(1)
    data = Latents(torch.randn(40, 4, 8, 8, generator=g), torch.rand(40, 4, 8, 8, generator=g))
    return TokenizerLoader(
        tok, latent_batches(data, batch, seed, features=torch.randn(40, 6, 4, 4, generator=g))
    )


def results(tok, repa, parts, worlds):
    """One step of all processes: gradients by name, the norm after it, loss, what is logged."""
    weights = (
        {**dict(tok.named_parameters()), **dict(repa.named_parameters("projector"))}
        if repa
        else dict(tok.named_parameters())
    )
    before = {n: x.clone() for n, x in tok.named_buffers()}
    objective = FlowObjective(tok, [repa] if repa else [])
    # counts that do not fade: their order is no matter
    objective.usage = fsq.CodebookUsage(tok.config.levels, tok.config.registers, memory=math.inf)
    for w in weights.values():
        w.grad = None
    total, tally = 0.0, engine_trainer.Tally()
    for (latents, features, draws), weight in parts:
        loss, numbers = objective(latents, features if repa else None, draws=draws)
        (loss * weight / worlds).backward()  # processes take the mean of their gradients
        total += float(loss.detach()) * weight / worlds
        tally.add(numbers, weight / worlds)
    if tok.norm is not None:
        tok.norm.settle()
    found = {n: torch.zeros_like(w) if w.grad is None else w.grad.clone() for n, w in weights.items()}
    state = (
        {n: x.clone() for n, x in tok.named_buffers()}
        | {"loss": torch.tensor(total), "words": objective.usage.words, "digits": objective.usage.digits}
        | {n: torch.tensor(v) for n, v in tally.means(lambda x: x).items()}
    )
    for n, x in tok.named_buffers():
        x.copy_(before[n])
    return found, state


def plain(tok, repa, feed, step):
    """The same step without any short cut, from the feed's dice and images alone."""
    positions = torch.arange(feed.batch)
    latents, features = feed.latents.make(feed.latents.rows(step), positions, step)
    noise = engine_tensors.noise_like(
        feed.shape, feed.seed, (step * feed.batch + positions).tolist(), stream="flow"
    )
    tok.short_cuts = False
    try:
        return results(tok, repa, [((latents, features, feed.draws(step)._replace(noise=noise)), 1.0)], 1)
    finally:
        tok.short_cuts = True


def same(tok, repa, feed, world, micro, step=STEP, tolerance=1e-5):
    """Assert that the shares make the plain step: to 1e-5 of the gradient, and to 5e-5 of each tensor's own
    (where large terms cancel, float32 knows no more digits; doubles do, below).
    """
    expected, stands = plain(tok, repa, feed, step)
    parts = [part for rank in range(world) for part in feed.micro_batches(step, rank, world, micro)]
    found, state = results(tok, repa, parts, world)
    moved = math.sqrt(sum(float(g.square().sum()) for g in expected.values()))
    assert moved > 0 and all(torch.isfinite(g).all() for g in found.values())
    for name, g in expected.items():
        error, size = float((found[name] - g).norm()), float(g.norm())
        assert error <= 5 * tolerance * size + 1e-4 * tolerance * moved, (
            f"{name}: {error / max(size, 1e-30):.1e} of its gradient"
        )  # a gradient of zero up to rounding has no relative error
    missed = math.sqrt(sum(float((found[n] - g).square().sum()) for n, g in expected.items()))
    assert missed <= tolerance * moved, f"{missed / moved:.1e} of the gradient"
    assert state.keys() == stands.keys()
    for name, x in stands.items():
        assert torch.allclose(
            state[name].double(),
            x.double(),
            rtol=tolerance,
            atol=tolerance * float(x.nan_to_num().abs().max()),
            equal_nan=True,
        ), name
    return parts


@pytest.mark.parametrize("distribution", BUDGET_DISTRIBUTIONS)
@pytest.mark.parametrize("world,micro", SHARES)
def test_shares_make_the_plain_step(distribution, world, micro):
    """Every distribution, null samples, zero noise, norm and REPA together; 11 samples, so that no two parts
    need be of one size.
    """
    tok, repa = model(budget_distribution=distribution)
    feed = feed_of(tok, 11)
    draws = feed.draws(STEP)
    assert draws.null.any() and not draws.null.all() and draws.zeroed.any() and not draws.zeroed.all()
    parts = same(tok, repa, feed, world, micro)
    sizes = [len(latents) for (latents, _, _), _ in parts]
    assert sum(sizes) == 11 and len(parts) == world * micro
    for (latents, _, d), weight in parts:
        assert weight == len(latents) * world / 11 and int((d.budget * ~d.null).max()) <= d.longest <= 32


@pytest.mark.parametrize("distribution", BUDGET_DISTRIBUTIONS)
def test_the_difference_is_rounding(distribution, monkeypatch):
    """In doubles throughout, all of it agrees to 1e-12: it is an equality, not an approximation that is good
    enough.
    """
    tok, repa = (m.double() for m in model(budget_distribution=distribution))
    feed = feed_of(tok, 11)
    # norms, losses and statistics insist on float32
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(engine_trainer.Tally, "means", lambda self, total: {})  # the log is kept in float32
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        same(tok, repa, feed, 2, 4, tolerance=1e-12)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize(
    "changes",
    (
        {"norm_before_fsq": False},
        {"zero_noise": 0.0},
        {"null_probability": 0.0},
        {"null_probability": 1.0},
        {"modulations": 1},
        {"encoder_mask": "causal"},
        {"registers": 7},
        {"registers": 1},
        {"encoder": TrunkConfig(16, 1, 1, 16), "decoder": TrunkConfig(48, 2, 2, 16)},
    ),
    ids=str,
)
def test_whatever_the_configuration(changes):
    tok, repa = model(**changes)
    same(tok, repa, feed_of(tok, 6), 2, 2)
    same(tok, None, feed_of(tok, 6), 1, 3)


@pytest.mark.parametrize("distribution", BUDGET_DISTRIBUTIONS)
def test_a_batch_of_one(distribution):
    """Many steps of one sample: the accumulated gradient of a batch of one is that sample's, null or not,
    whatever its budget.
    """
    tok, repa = model(budget_distribution=distribution)
    feed = feed_of(tok, 1)
    seen = set()
    for step in range(12):
        same(tok, repa, feed, 1, 1, step)
        seen.add(bool(feed.draws(step).null))
    assert seen == {True, False}


@pytest.mark.filterwarnings("ignore:encoder_mask")
def test_without_the_causal_mask_all_registers_are_encoded():
    """Then a register that nobody keeps still matters to those that are kept."""
    tok, repa = model(encoder_mask="full", budget_distribution="uniform")
    feed = feed_of(tok, 8)
    lengths, forward = [], type(tok.encoder.blocks[0]).forward
    tok.encoder.blocks[0].forward = lambda x, mask=None: (
        lengths.append(x.shape[1]),
        forward(tok.encoder.blocks[0], x, mask),
    )[1]
    parts = same(tok, repa, feed, 1, 4)
    assert set(lengths) == {16 + 32} and min(d.longest for (_, _, d), _ in parts) < 32


def test_the_work_is_cut():
    """Equal gradients could also come from a cut that nobody makes: count positions, and see that no shorter
    length would do.
    """
    tok, _ = model(budget_distribution="powers_of_two")
    feed, seen = feed_of(tok, 32), {"encoder": [], "decoder": []}
    encode, decode = tok.encoder.forward, tok.decoder.forward
    tok.encoder.forward = lambda latents, budget=None: (
        seen["encoder"].append(budget),
        encode(latents, budget),
    )[1]
    tok.decoder.forward = lambda x, m, registers, *rest, **named: (
        seen["decoder"].append(registers.shape[1]),
        decode(x, m, registers, *rest, **named),
    )[1]
    longest, lengths = [], training._lengths(32)
    for (latents, _, draws), _ in feed.micro_batches(STEP, micro=8):
        FlowObjective(tok)(latents, draws=draws)
        kept = int((draws.budget * ~draws.null).max())  # a null sample keeps nothing
        assert draws.longest == min(n for n in lengths if n >= kept)
        longest.append(draws.longest)
    assert longest == sorted(longest, reverse=True) and len(set(longest)) >= 3
    assert seen["encoder"] == longest and seen["decoder"] == [n + (n < 32) for n in longest]


@pytest.mark.parametrize("distribution", BUDGET_DISTRIBUTIONS)
def test_dealing_is_fair(distribution):
    """Two processes get micro-batches of the same size and (nearly) the same length: neither waits for the
    other.
    """
    tok, _ = model(budget_distribution=distribution)
    feed = feed_of(tok, 32)
    for step in range(8):
        positions, kept = [feed.shard(step, rank, 2, 4) for rank in range(2)], feed.kept(feed.draws(step))
        assert sorted(torch.cat([p for dealt in positions for p in dealt]).tolist()) == list(range(32))
        for one, other in zip(*positions):
            assert (
                len(one) == len(other)
                and kept[one].max() >= kept[other].max()
                and kept[one].min() >= kept[other].min()
            )
        for mine in positions:
            assert all(kept[a].min() >= kept[b].max() for a, b in zip(mine, mine[1:]))


def test_the_real_loop_goes_the_same_way():
    """`fit_tokenizer` with training's engine in 1, 2 and 4 micro-batches, and with engine's: the same losses,
    gradients and averaged weights.
    """
    from flextok_edu.engine.distributed import Distributed
    from flextok_edu.engine.trainer import Trainer

    data = Latents(torch.randn(20, 4, 8, 8, generator=torch.Generator().manual_seed(0)))
    found = []
    for trainer in (None, *(Trainer(Distributed("cpu", micro=m)) for m in (1, 2, 4))):
        tok, _ = model(budget_distribution="powers_of_two")
        tok, log = fit_tokenizer(
            tok, data, StageConfig(steps=3, batch=10, lr=1e-3, warmup=1), trainer=trainer, progress=False
        )
        found.append((log, tok.own_state()))
    (first, weights), *others = found
    for log, other in others:
        for a, b in zip(first, log):
            assert all(
                math.isclose(a[k], b[k], rel_tol=1e-4) for k in ("tokenizer", "tokenizer_grad", "flow")
            )
        assert all(
            torch.allclose(other[n].float(), w.float(), rtol=1e-3, atol=1e-4) for n, w in weights.items()
        )


# --- the same, with bugs planted
# -------------------------------------------------------------------------------


def check_sorted_parts():
    tok, repa = model(budget_distribution="powers_of_two")
    same(tok, repa, feed_of(tok, 11), 2, 4)


def check_uneven_parts():
    tok, _ = model(budget_distribution="uniform")
    same(tok, None, feed_of(tok, 7), 1, 3)


def check_null_samples_are_short():
    tok, _ = model(budget_distribution="half_full")
    feed = feed_of(tok, 16)
    for (_, _, d), _ in feed.micro_batches(STEP, micro=16):
        assert d.longest == min(n for n in training._lengths(32) if n >= int((d.budget * ~d.null).max()))


def no_bias(monkeypatch):
    monkeypatch.setattr(
        objective, "condition_of", lambda *args, **named: (short_cuts.condition_of(*args, **named)[0], None)
    )


def bias_counts_all(monkeypatch):
    """The mask token stands for all k, not for those that are dropped."""

    def broken(decoder, codes, budget, null=None, short=True):
        x, bias = short_cuts.condition_of(decoder, codes, budget, null, short)
        return x, bias if bias is None else torch.cat(
            [bias[:, :-1], torch.full_like(bias[:, -1:], math.log(decoder.k))], 1
        )

    monkeypatch.setattr(objective, "condition_of", broken)


def null_counts_once(monkeypatch):
    def broken(decoder, codes, budget, null=None, short=True):
        x, bias = short_cuts.condition_of(decoder, codes, budget, null, short)
        return x, bias if bias is None or null is None else torch.where(
            null[:, None] & (bias == math.log(decoder.k)), 0.0, bias
        )

    monkeypatch.setattr(objective, "condition_of", broken)


def one_too_short(monkeypatch):
    def broken(self, step, rank=0, world=1, micro=1, parts=TokenizerLoader.micro_batches):
        return [
            ((x, f, d._replace(longest=max(1, int((d.budget * ~d.null).max()) - 1))), w)
            for (x, f, d), w in parts(self, step, rank, world, micro)
        ]

    monkeypatch.setattr(TokenizerLoader, "micro_batches", broken)


def equal_weights(monkeypatch):
    monkeypatch.setattr(
        TokenizerLoader,
        "micro_batches",
        lambda self, step, rank=0, world=1, micro=1, parts=TokenizerLoader.micro_batches: [
            (batch, 1 / micro) for batch, _ in parts(self, step, rank, world, micro)
        ],
    )


def no_share_of_the_world(monkeypatch):
    """m / B, though the mean over the processes is still to come."""
    monkeypatch.setattr(
        TokenizerLoader,
        "micro_batches",
        lambda self, step, rank=0, world=1, micro=1, parts=TokenizerLoader.micro_batches: [
            (batch, w / world) for batch, w in parts(self, step, rank, world, micro)
        ],
    )


def null_budgets_count(monkeypatch):
    monkeypatch.setattr(TokenizerLoader, "kept", lambda self, d: d.budget)


def dice_by_part(monkeypatch):
    """Each part throws dice of its own instead of taking those of its samples."""

    def broken(self, step, rank=0, world=1, micro=1, parts=TokenizerLoader.micro_batches):
        return [
            (
                (
                    x,
                    f,
                    sample_training_noise(
                        self.tok.config, len(x), generator=engine_tensors.named_generator("part", i)
                    )._replace(noise=d.noise),
                ),
                w,
            )
            for i, ((x, f, d), w) in enumerate(parts(self, step, rank, world, micro))
        ]

    monkeypatch.setattr(TokenizerLoader, "micro_batches", broken)


def noise_by_part(monkeypatch):
    """Noise is numbered by the place in the part, not in the batch."""

    def broken(self, step, rank=0, world=1, micro=1, parts=TokenizerLoader.micro_batches):
        return [
            (
                (
                    x,
                    f,
                    d._replace(
                        noise=engine_tensors.noise_like(self.shape, self.seed, range(len(x)), stream="flow")
                    ),
                ),
                w,
            )
            for (x, f, d), w in parts(self, step, rank, world, micro)
        ]

    monkeypatch.setattr(TokenizerLoader, "micro_batches", broken)


def both_processes_get_the_same(monkeypatch):
    monkeypatch.setattr(
        engine_loader.Loader,
        "shard",
        lambda self, step, rank=0, world=1, micro=1: [
            chunk[::world] for chunk in self.positions(step).tensor_split(micro)
        ],
    )


def norm_settles_every_part(monkeypatch):
    collect = fsq.RunningNorm.collect
    monkeypatch.setattr(
        fsq.RunningNorm, "collect", lambda self, z, keep=None: (collect(self, z, keep), self.settle())[0]
    )


def norm_counts_what_is_dropped(monkeypatch):
    """All the computed registers, which are fewer in a cut part."""
    collect = fsq.RunningNorm.collect
    monkeypatch.setattr(fsq.RunningNorm, "collect", lambda self, z, keep=None: collect(self, z, None))


def features_of_others(monkeypatch):
    """The features of a part are those of its first rows in the batch."""

    def broken(self, step, rank=0, world=1, micro=1, parts=TokenizerLoader.micro_batches):
        found = self.latents.make(self.latents.rows(step), torch.arange(self.batch), step)[1]
        return [((x, found[: len(x)], d), w) for (x, _, d), w in parts(self, step, rank, world, micro)]

    monkeypatch.setattr(TokenizerLoader, "micro_batches", broken)


test_the_code_passes, test_the_bug_is_caught = planted(
    [
        (check_sorted_parts, bug)
        for bug in (
            no_bias,
            bias_counts_all,
            null_counts_once,
            one_too_short,
            equal_weights,
            no_share_of_the_world,
            dice_by_part,
            noise_by_part,
            both_processes_get_the_same,
            norm_settles_every_part,
            norm_counts_what_is_dropped,
            features_of_others,
        )
    ]
    + [(check_uneven_parts, bug) for bug in (no_bias, one_too_short, equal_weights)]
    + [(check_null_samples_are_short, null_budgets_count)]
)


# --- the benchmark: the same dice for all, and formulas that count what is done
# -----------------------------------


@pytest.mark.parametrize("longest", (None, 1, 4, 32))
@pytest.mark.parametrize("images", (1, 3))
def test_the_arithmetic_of_a_micro_batch(longest, images):
    """`loss_flops` against PyTorch's own count of the same loss, `loss_positions` against the lengths of the
    sequences.
    """
    from flextok_edu.apps.bench_training import loss_flops, loss_positions
    from flextok_edu.apps.cost import counted_flops
    from flextok_edu.apps.memory import on_meta

    # on the CPU, PyTorch's counter does not know the attention
    tok = on_meta(lambda: FlexTok(replace(CONFIG, zero_noise=0.0))).requires_grad_(False)
    tok.fsq = nn.Identity()  # no products in it, and it insists on a real device
    tok.short_cuts = longest is not None
    lengths = []
    for block in (tok.encoder.blocks[0], tok.decoder.blocks[0]):
        block.register_forward_pre_hook(
            lambda block, given: lengths.append(given[0].shape[0] * given[0].shape[1])
        )
    draws = sample_training_noise(tok.config, images, longest or 32)._replace(longest=longest)
    counted = counted_flops(
        lambda: FlowObjective(tok)(torch.empty(images, 4, 8, 8, device="meta"), draws=draws)
    )
    assert abs(3 * counted / loss_flops(tok.config, images, longest) - 1) < 0.01
    assert sum(lengths) == loss_positions(tok.config, images, longest)


def test_memory_falls_with_the_length_and_the_images():
    from flextok_edu.apps.bench_training import loss_bytes

    plain, cut, one = (loss_bytes(CONFIG, *size) for size in ((16, None), (16, 1), (1, 1)))
    assert plain > cut > one > 4 * 4 * sum(w.numel() for w in FlexTok(CONFIG).parameters())
    assert loss_bytes(CONFIG, 4, None, micro=2) >= loss_bytes(CONFIG, 4, None)


def test_what_sorting_allows():
    """Full length always: nothing. One token always: positions alone. More micro-batches sort better."""
    from flextok_edu.apps.bench_training import loss_flops, sorting_allows

    few, many = (sorting_allows(CONFIG, "powers_of_two", 16, micro, 60) for micro in (1, 8))
    assert 1 <= few < many < loss_flops(CONFIG, 1, None) / loss_flops(CONFIG, 1, 1)
    assert sorting_allows(replace(CONFIG, null_probability=1.0), "uniform", 8, 2, 3) == pytest.approx(
        loss_flops(CONFIG, 1, None) / loss_flops(CONFIG, 1, 1)
    )


def test_the_benchmark_compares_the_same_steps(monkeypatch):
    """Both variants see the same images, dice and noise; the plain one computes everything; gradients agree;
    every distribution has its rows.
    """
    seen, loss = {True: [], False: []}, FlowObjective.__call__

    def watched(self, latents, *rest, draws=None, **named):
        seen[self.tok.short_cuts].append(
            (
                len(latents),
                latents.sum().item(),
                draws.noise.sum().item(),
                draws.budget.sum().item(),
                draws.t.sum().item(),
            )
        )
        return loss(self, latents, *rest, draws=draws, **named)

    monkeypatch.setattr(FlowObjective, "__call__", watched)
    patch(monkeypatch, apps_bench_training, "loss_bytes", lambda *size: 1)  # it would call the loss too
    rows = apps_bench_training.bench_train(
        apps_timing.BenchConfig(
            "micro",
            "cpu",
            batch=8,
            micro=4,
            variants=("plain", "sorted"),
            laws=("powers_of_two", "uniform"),
            adamw=False,
            repeats=2,
        ),
        say=lambda text: None,
    )
    assert [(r["distribution"], r["variant"]) for r in rows] == [
        (distribution, v) for distribution in ("powers_of_two", "uniform") for v in ("plain", "sorted")
    ]
    assert all(math.isnan(r["difference"]) for r in rows[::2]) and all(
        0 < r["difference"] < 1e-4 for r in rows[1::2]
    )
    assert all(r["allowed"] == 1 for r in rows[::2]) and all(
        r["allowed"] > 1 and r["positions"] < plain["positions"] == 8 * 2 * 32
        for r, plain in zip(rows[1::2], rows[::2])
    )
    # without the single image that wakes the machine up
    steps = {cut: [s for s in some if s[0] == 2] for cut, some in seen.items()}
    for i in range(0, 16, 4):  # four micro-batches of two a step
        plain, cut = (torch.tensor([s[1:] for s in steps[kind][i : i + 4]]).sum(0) for kind in (False, True))
        assert torch.allclose(plain, cut, atol=1e-3)


@pytest.mark.parametrize(
    "wrong,says",
    (
        ({"micro": 3, "batch": 2}, "3 micro-batches of 2"),
        ({"laws": ("zipf",)}, "zipf"),
        ({"repeats": 0}, "0 rounds"),
    ),
)
def test_the_benchmark_says_what_is_wrong(wrong, says):
    from flextok_edu.apps.bench import bench
    from flextok_edu.apps.timing import BenchConfig

    with pytest.raises(ValueError, match=says):
        bench("train", BenchConfig("micro", "cpu", **wrong), say=lambda text: None)
