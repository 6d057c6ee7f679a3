"""Quantiser, transformer parts and registers: properties, and for each the bug that it must find, planted on
purpose.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from planting import patch, planted

import flextok_edu.fsq as fsq
import flextok_edu.registers as registers
import flextok_edu.transformer as transformer


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# --- FSQ
# -----------------------------------------------------------------------------------------------------------


def check_fsq_is_the_loop():
    for levels in ((8, 5, 5, 5), (2, 3, 4), (7, 6)):
        f, z = fsq.FSQ(levels), torch.randn(100, len(levels), generator=generator()) * 2
        for row, code, word in zip(z.tolist(), f(z).tolist(), f.codes_to_ids(f(z)).tolist()):
            expected = 0
            for i, (number, L) in enumerate(zip(row, levels)):
                half, offset = (L - 1) * 1.001 / 2, 0.5 * (L % 2 == 0)
                level = round(math.tanh(number + math.atanh(offset / half)) * half - offset)
                assert abs(code[i] - level / (L // 2)) < 1e-6
                expected += (level + L // 2) * math.prod(levels[:i])
            assert word == expected


def check_every_word_is_reached():
    """From a z that is finite: at the outermost levels that is what the epsilon is for."""
    for levels in (*fsq.LEVELS.values(), (2, 2, 3)):
        f = fsq.FSQ(levels)
        ids = torch.arange(f.vocabulary)
        z = torch.atanh((f.ids_to_codes(ids) * f.step + f.offset) / f.half_width) - f.shift
        assert z.isfinite().all() and z.abs().max() < 9
        assert torch.equal(f.codes_to_ids(f(z)), ids)


def check_words_do_not_depend_on_precision():
    f, z = fsq.FSQ((8, 5, 5, 5)), torch.randn(4000, 4, generator=generator()) * 2
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes = f(z)
    assert codes.dtype == torch.float32 and torch.equal(f.codes_to_ids(codes), f.codes_to_ids(f(z)))
    assert torch.equal(f(z.bfloat16()), f(z.bfloat16().float()))


def check_norm_counts_what_is_kept():
    z, keep = (
        torch.randn(40, 8, 3, generator=generator()) * 5 + 2,
        registers.keep_mask(torch.arange(40) % 8 + 1, 40, 8),
    )
    norm, other = fsq.RunningNorm(3), fsq.RunningNorm(3)
    norm.update(z, keep)
    other.update(torch.where(keep[..., None], z, 1e5), keep)
    assert torch.allclose(norm.mean, z[keep].mean(0), atol=1e-4) and torch.allclose(
        norm.std, z[keep].std(0, correction=0), atol=1e-4
    )
    assert torch.equal(norm.mean, other.mean) and torch.equal(norm.std, other.std)


def check_norm_ignores_its_batch():
    norm, z = fsq.RunningNorm(3), torch.randn(16, 8, 3, generator=generator()) * 4 + 1
    norm.update(z)
    assert torch.equal(norm(z)[:1], norm(z[:1])) and torch.allclose(
        norm(2 * z) * norm.std + norm.mean, 2 * z, atol=1e-4
    )


def check_norm_forgets_its_start():
    norm = fsq.RunningNorm(2)
    for i in range(5):
        norm.update(torch.randn(200, 4, 2, generator=generator(i)) * 100 + 50)
    assert (norm.mean - 50).abs().max() < 10 and (norm.std - 100).abs().max() < 10


@pytest.mark.parametrize(
    "ids,error",
    (([0, 1000], ValueError), ([-1], ValueError), ([0.5], TypeError), ([True], TypeError)),
    ids=str,
)
def test_strange_ids_are_refused(ids, error):
    f = fsq.FSQ((8, 5, 5, 5))
    with pytest.raises(error):
        f.check_ids(torch.tensor(ids))
    f.check_ids(torch.tensor([0, 999]))
    f.check_ids(torch.zeros(0, dtype=torch.int64))


@pytest.mark.parametrize("levels", ((), (1, 5), (8, 0)), ids=str)
def test_levels_below_two_are_refused(levels):
    with pytest.raises(ValueError, match="at least 2"):
        fsq.FSQ(levels)


def test_levels_by_vocabulary():
    for bits, levels in fsq.LEVELS.items():
        assert abs(math.log2(math.prod(levels)) - bits) < 0.1 and min(levels) >= 5


def test_wrong_width_is_refused():
    with pytest.raises(ValueError, match="takes"):
        fsq.FSQ((8, 5))(torch.randn(3, 4))


# --- transformer
# ---------------------------------------------------------------------------------------------------


def by_hand(layer, x, mask):
    """Attention with einsum, masks boolean or added, QK-norm and scale written out."""
    q, k, v = (rearrange(f(x), "b n (h e) -> b h n e", h=layer.heads) for f in (layer.q, layer.k, layer.v))
    e = q.shape[-1]
    q, k = (
        (w - w.mean(-1, keepdim=True)) / (w.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() for w in (q, k)
    )
    logits = torch.einsum("bhid,bhjd->bhij", q, k) * 8 / e
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    return layer.out(
        rearrange(torch.einsum("bhij,bhjd->bhid", logits.softmax(-1), v), "b h n e -> b n (h e)")
    )


def check_attention_by_hand():
    torch.manual_seed(0)
    for d, head_dim in ((64, 32), (128, 64)):
        layer, x = transformer.Attention(d, head_dim), torch.randn(2, 7, d)
        added = torch.zeros(7, 7)
        added[:, 3] = math.log(5)
        for mask in (None, torch.ones(7, 7).tril().bool(), added):
            with torch.no_grad():
                assert torch.allclose(layer(x, mask), by_hand(layer, x, mask), atol=1e-5)


def check_attention_cannot_freeze():
    """The pattern belongs to the direction of x, so the output of attention is proportional to its scale."""
    torch.manual_seed(0)
    layer, x = transformer.Attention(64), torch.randn(1, 9, 64) * 3
    with torch.no_grad():
        assert torch.allclose(layer(100 * x) / 100, layer(x), atol=1e-3)


def check_modulation_by_kind():
    torch.manual_seed(0)
    x, y, shift, scale = (
        torch.randn(3, 9, 8),
        torch.randn(3, 9, 8),
        torch.randn(3, 2, 8),
        torch.randn(3, 2, 8),
    )
    for n in (0, 4, 9):
        for kinds in (1, 2):
            kind = torch.tensor([0] * n + [kinds - 1] * (9 - n))
            a, g = shift[:, :kinds], scale[:, :kinds]
            assert torch.allclose(
                transformer.modulate(x, n, a, g), x * (1 + g[:, kind]) + a[:, kind], atol=1e-6
            )
            assert torch.allclose(transformer.gated(x, n, g, y), x + g[:, kind] * y, atol=1e-6)


def check_starts_as_identity_and_can_begin():
    torch.manual_seed(0)
    for kinds in (1, 2):
        block, x = transformer.ModulatedBlock(64, kinds=kinds), torch.randn(1, 6, 64)
        y = block(x, 4, block.modulation(torch.randn(1, 64)))
        assert torch.equal(y, x)
        y.square().sum().backward()
        felt = rearrange(
            block.to_modulation[1].weight.grad, "(kinds six d) t -> six (kinds d t)", kinds=kinds, six=6
        ).norm(dim=1)
        assert (felt[:2] > 0).all() and (felt[2:] == 0).all(), (
            "gates must feel a gradient, or they never open"
        )


def check_depth_keeps_its_size():
    """Twelve blocks with open gates; what they add does not depend on the size of what enters."""
    torch.manual_seed(0)
    block, modulation = transformer.ModulatedBlock(64), torch.zeros(1, 2, 6, 64)
    modulation[:, :, :2] = 0.5
    x = torch.randn(1, 8, 64) * 10
    with torch.no_grad():
        for _ in range(12):
            x = block(x, 5, modulation)
    assert x.abs().max() < 1000


def check_patches():
    x = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    patches = transformer.patchify(x, 2)
    assert patches.shape == (2, 6, 12) and torch.equal(transformer.unpatchify(patches, 2, 2), x)
    for i in range(2):
        for j in range(3):  # raster order; in a patch: row, column, channel
            expected = [x[0, c, 2 * i + r, 2 * j + s] for r in range(2) for s in range(2) for c in range(3)]
            assert patches[0, 3 * i + j].tolist() == expected


def check_positions():
    flat = rearrange(transformer.sincos_2d(64, 8, 8), "1 d h w -> (h w) d")
    near = F.normalize(flat, dim=1) @ F.normalize(flat, dim=1).T
    assert near.fill_diagonal_(0).max() < 0.999, "no two alike"
    for row in range(1, 7):
        for column in range(1, 7):
            i = 8 * row + column
            assert sorted(near[i].topk(4).indices.tolist()) == [i - 8, i - 1, i + 1, i + 8], (
                "most similar: the four neighbours"
            )


def check_blocks_do_not_see_order():
    torch.manual_seed(0)
    block, x, order = transformer.Block(64), torch.randn(2, 10, 64), torch.randperm(10)
    with torch.no_grad():
        assert torch.allclose(block(x[:, order]), block(x)[:, order], atol=1e-5)


def check_times_differ():
    torch.manual_seed(0)
    for top in (1.0, 1000.0):
        embed, t = transformer.TimeEmbedding(64, max_timestep=top), torch.linspace(0, top, 51)
        with torch.no_grad():
            seen = F.normalize(embed(t) - embed(t).mean(0), dim=1)
        assert (seen[:-1] * seen[1:]).sum(1).max() < 0.95, "times .02 apart are told apart"


def check_weights_are_counted():
    with torch.device("meta"):
        for d in (192, 768):
            plain, modulated = transformer.Block(d), transformer.ModulatedBlock(d)
            shared = transformer.ModulatedBlock(d, kinds=1)

            def count(m):
                return sum(w.numel() for w in m.parameters())

            assert count(plain) == 12 * d * d
            assert count(modulated) == 24 * d * d + 12 * d and count(shared) == 18 * d * d + 6 * d


def test_bad_widths_are_refused():
    with pytest.raises(ValueError, match="head_dim"):
        transformer.Attention(100)
    with pytest.raises(ValueError, match="divisible by 4"):
        transformer.sincos_2d(66, 4, 4)


# --- registers
# -----------------------------------------------------------------------------------------------------


def check_mask_by_hand():
    for n, k in ((6, 4), (1, 1), (3, 0), (0, 3)):
        expected = [[c < n if r < n else c < n or c <= r for c in range(n + k)] for r in range(n + k)]
        assert torch.equal(registers.encoder_mask(n, k), torch.tensor(expected))


def check_leaks_finds_them():
    torch.manual_seed(0)
    blocks = nn.ModuleList(transformer.Block(64) for _ in range(2))
    assert registers.leaks(blocks, registers.encoder_mask(5, 4), 5, 4, 64) == []
    slip, way = registers.encoder_mask(5, 4), registers.encoder_mask(5, 4)
    slip[:5, 5] = True
    way[:5] = True  # registers causal, but patches see them: visible from two blocks on
    assert registers.leaks(blocks, slip, 5, 4, 64) == [0]
    assert registers.leaks(blocks, None, 5, 4, 64) == registers.leaks(blocks, way, 5, 4, 64) == [0, 1, 2, 3]


def check_budget_is_counted():
    for k in (1, 7):
        for budget in range(k + 1):
            assert registers.keep_mask(budget, 2, k).sum(1).tolist() == [budget] * 2
    assert torch.equal(
        registers.keep_mask(torch.tensor([0, 2, 3]), 3, 3),
        torch.tensor([[0, 0, 0], [1, 1, 0], [1, 1, 1]]).bool(),
    )


def check_dropped_is_gone():
    tokens, keep, mask_token = (
        torch.randn(3, 5, 4, generator=generator()),
        registers.keep_mask(torch.tensor([0, 2, 5]), 3, 5),
        torch.full((4,), 0.5),
    )
    before = tokens.clone()
    leaf = tokens.clone().requires_grad_()
    dropped = registers.nested_dropout(leaf, keep, mask_token)
    dropped.sum().backward()
    assert torch.equal(leaf.grad != 0, keep[..., None].expand(3, 5, 4))
    assert torch.equal(dropped[~keep], mask_token.expand(8, 4)) and torch.equal(dropped[keep], tokens[keep])
    registers.nested_dropout(tokens, keep, mask_token)
    assert torch.equal(tokens, before), "the caller's tensor stays as it was"
    assert registers.nested_dropout(tokens.bfloat16(), keep, mask_token).dtype == torch.bfloat16


def check_laws():
    count = 20_000
    expected = {
        "uniform": {i: 1 / 12 for i in range(1, 13)},
        "powers_of_two": {p: 0.2 for p in (1, 2, 4, 8, 12)},
        "uniform_rounded_up": {1: 1 / 12, 2: 1 / 12, 4: 2 / 12, 8: 4 / 12, 12: 4 / 12},
        "half_full": {1: 0.1, 2: 0.1, 4: 0.1, 8: 0.1, 12: 0.6},
    }
    assert set(registers.BUDGET_DISTRIBUTIONS) == set(expected)
    for distribution, shares in expected.items():
        values, counts = registers.sample_budget(distribution, count, 12, generator()).unique(
            return_counts=True
        )
        assert values.tolist() == sorted(shares)
        assert all(
            abs(c / count - shares[v]) < 5 * math.sqrt(shares[v] / count)
            for v, c in zip(values.tolist(), counts.tolist())
        ), distribution


def check_gradient_noise_averages():
    """Budgets of a batch are independent: their mean has the variance of one draw divided by the batch."""
    for distribution in registers.BUDGET_DISTRIBUTIONS:
        g = generator()
        one = registers.sample_budget(distribution, 20_000, 16, g).float().var()
        means = torch.stack(
            [registers.sample_budget(distribution, 64, 16, g).float().mean() for _ in range(400)]
        )
        assert means.var() * 64 < 2 * one


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="causal_last"):
        registers.encoder_mask(2, 2, "casual")
    with pytest.raises(ValueError, match="half_full"):
        registers.sample_budget("pow2", 2, 2)


# --- the bugs
# ------------------------------------------------------------------------------------------------------


def no_epsilon(monkeypatch):
    real = fsq.FSQ.__init__

    def init(self, levels=(8, 5, 5, 5)):
        real(self, levels)
        L = torch.tensor(levels, dtype=torch.float32)
        self.half_width = (L - 1) / 2
        self.shift = torch.atanh(self.offset / self.half_width)

    monkeypatch.setattr(fsq.FSQ, "__init__", init)


def no_offset(monkeypatch):
    monkeypatch.setattr(fsq.FSQ, "bound", lambda self, z: torch.tanh(z) * self.half_width)


def no_shift(monkeypatch):
    monkeypatch.setattr(fsq.FSQ, "bound", lambda self, z: torch.tanh(z) * self.half_width - self.offset)


def last_dimension_fastest(monkeypatch):
    real = fsq.FSQ.codes_to_ids
    monkeypatch.setattr(fsq.FSQ, "codes_to_ids", lambda self, codes: real(self, codes.flip(-1)))


def half_precision(monkeypatch):
    monkeypatch.setattr(
        fsq.FSQ,
        "forward",
        lambda self, z: (
            self.bound(z.bfloat16().float() if torch.is_autocast_enabled("cpu") else z).round() / self.step
        ),
    )


def norm_counts_dropped_ones(monkeypatch):
    real = fsq.RunningNorm.update
    monkeypatch.setattr(fsq.RunningNorm, "update", lambda self, z, keep=None: real(self, z))


def norm_of_the_batch(monkeypatch):
    monkeypatch.setattr(fsq.RunningNorm, "forward", lambda self, z: (z - z.mean((0, 1))) / z.std((0, 1)))


def norm_remembers_its_start(monkeypatch):
    def update(self, z, keep=None):
        self.mean.lerp_(z.mean((0, 1)), self.momentum)
        self.std.lerp_(z.std((0, 1)), self.momentum)

    monkeypatch.setattr(fsq.RunningNorm, "update", update)


def other_scale(monkeypatch):
    real = F.scaled_dot_product_attention
    monkeypatch.setattr(
        transformer.F,
        "scaled_dot_product_attention",
        lambda q, k, v, attn_mask=None, scale=None: real(q, k, v, attn_mask=attn_mask),
    )


def inverted_mask(monkeypatch):
    real = F.scaled_dot_product_attention

    def flip(m):
        return ~m if m is not None and m.dtype == torch.bool else m

    monkeypatch.setattr(
        transformer.F,
        "scaled_dot_product_attention",
        lambda q, k, v, attn_mask=None, scale=None: real(q, k, v, attn_mask=flip(attn_mask), scale=scale),
    )


def always_causal(monkeypatch):
    real = F.scaled_dot_product_attention
    monkeypatch.setattr(
        transformer.F,
        "scaled_dot_product_attention",
        lambda q, k, v, attn_mask=None, scale=None: real(q, k, v, is_causal=True, scale=scale),
    )


def no_norm(monkeypatch):
    patch(monkeypatch, transformer, "norm32", lambda x, eps=1e-5: x)


def one_patch_too_many(monkeypatch):
    real = transformer.modulate
    patch(
        monkeypatch,
        transformer,
        "modulate",
        lambda x, n, shift, scale: real(x, min(n + 1, x.shape[1]), shift, scale),
    )


def kinds_exchanged(monkeypatch):
    real = transformer.gated
    patch(monkeypatch, transformer, "gated", lambda x, n, gate, y: real(x, n, gate.flip(1), y))


def scale_without_one(monkeypatch):
    real = transformer.modulate
    patch(monkeypatch, transformer, "modulate", lambda x, n, shift, scale: real(x, n, shift, scale - 1))


def not_zero(monkeypatch):
    monkeypatch.setattr(transformer.nn.init, "zeros_", lambda w: nn.init.normal_(w, std=0.02))


def gates_are_deaf(monkeypatch):
    real = transformer.gated
    patch(
        monkeypatch, transformer, "gated", lambda x, n, gate, y: real(x, n, gate.detach(), y) + 0 * gate.sum()
    )


def raw_x(monkeypatch):
    def forward(self, x, n, modulation, mask=None):
        gate1, gate2, shift1, scale1, shift2, scale2 = modulation.unbind(2)
        x = transformer.gated(x, n, gate1, self.attention(transformer.modulate(x, n, shift1, scale1), mask))
        return transformer.gated(x, n, gate2, self.mlp(transformer.modulate(x, n, shift2, scale2)))

    monkeypatch.setattr(transformer.ModulatedBlock, "forward", forward)


def patch_exchanged(monkeypatch):
    patch(
        monkeypatch,
        transformer,
        "unpatchify",
        lambda x, p, h: rearrange(x, "b (h w) (q p c) -> b c (h p) (w q)", p=p, q=p, h=h),
    )


def channels_slowest(monkeypatch):
    patch(
        monkeypatch,
        transformer,
        "patchify",
        lambda x, p: rearrange(x, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p),
    )
    patch(
        monkeypatch,
        transformer,
        "unpatchify",
        lambda x, p, h: rearrange(x, "b (h w) (c p q) -> b c (h p) (w q)", p=p, q=p, h=h),
    )


def rows_only(monkeypatch):
    real = transformer.sincos_2d
    patch(monkeypatch, transformer, "sincos_2d", lambda d, h, w: real(d, h, w)[..., :1].expand(1, d, h, w))


def time_too_small(monkeypatch):
    real = transformer.TimeEmbedding.forward
    monkeypatch.setattr(transformer.TimeEmbedding, "forward", lambda self, t: real(self, t / 1000))


def hidden_too_wide(monkeypatch):
    patch(monkeypatch, transformer, "SwiGLU", lambda d, ratio=4.0: Wide(d, ratio))


class Wide(nn.Module):
    def __init__(self, d, ratio):
        super().__init__()
        self.gate, self.up, self.down = (
            nn.Linear(*s, bias=False) for s in ((d, int(ratio * d)), (d, int(ratio * d)), (int(ratio * d), d))
        )


def patches_see_register_0(monkeypatch):
    real = registers.encoder_mask

    def mask(n, k, *a, **o):
        m = real(n, k, *a, **o).clone()
        m[:n, : n + 1] = True
        return m

    patch(monkeypatch, registers, "encoder_mask", mask)


def registers_blind_for_themselves(monkeypatch):
    real = registers.encoder_mask

    def mask(n, k, *a, **o):
        m = real(n, k, *a, **o).clone()
        m[range(n, n + k), range(n, n + k)] = False
        return m

    patch(monkeypatch, registers, "encoder_mask", mask)


def touches_with_a_constant(monkeypatch):
    def leaks(blocks, mask, n, k, d):
        def run(x):
            for block in blocks:
                x = block(x, mask)
            return x

        x, found = torch.randn(1, n + k, d), []
        with torch.no_grad():
            for j in range(k):
                y = x.clone()
                y[:, n + j] += 1
                if (run(y) - run(x))[:, : n + j].abs().max() > 1e-5:
                    found.append(j)
        return found

    patch(monkeypatch, registers, "leaks", leaks)


def one_token_too_many(monkeypatch):
    patch(
        monkeypatch,
        registers,
        "keep_mask",
        lambda budget, b, k, device=None: torch.arange(k) <= torch.as_tensor(budget).expand(b)[:, None],
    )


def dropped_whispers(monkeypatch):
    patch(
        monkeypatch,
        registers,
        "nested_dropout",
        lambda tokens, keep, mask_token: torch.where(keep[..., None], tokens, mask_token + 0.01 * tokens),
    )


def written_in_place(monkeypatch):
    def dropout(tokens, keep, mask_token):
        if tokens.requires_grad:
            return torch.where(keep[..., None], tokens, mask_token)
        tokens[~keep] = mask_token.to(tokens.dtype)
        return tokens

    patch(monkeypatch, registers, "nested_dropout", dropout)


def never_full_length(monkeypatch):
    real = registers.sample_budget
    patch(
        monkeypatch,
        registers,
        "sample_budget",
        lambda distribution, b, k, generator=None, device=None: real(
            distribution, b, 1 << (k.bit_length() - 1), generator, device
        ),
    )


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


PLANTED = [
    (check_fsq_is_the_loop, no_offset),
    (check_fsq_is_the_loop, no_shift),
    (check_fsq_is_the_loop, last_dimension_fastest),
    (check_every_word_is_reached, no_epsilon),
    (check_words_do_not_depend_on_precision, half_precision),
    (check_norm_counts_what_is_kept, norm_counts_dropped_ones),
    (check_norm_ignores_its_batch, norm_of_the_batch),
    (check_norm_forgets_its_start, norm_remembers_its_start),
    (check_attention_by_hand, other_scale),
    (check_attention_by_hand, inverted_mask),
    (check_attention_by_hand, no_norm),
    (check_attention_cannot_freeze, no_norm),
    (check_modulation_by_kind, one_patch_too_many),
    (check_modulation_by_kind, kinds_exchanged),
    (check_modulation_by_kind, scale_without_one),
    (check_starts_as_identity_and_can_begin, not_zero),
    (check_starts_as_identity_and_can_begin, gates_are_deaf),
    (check_depth_keeps_its_size, raw_x),
    (check_patches, patch_exchanged),
    (check_patches, channels_slowest),
    (check_positions, rows_only),
    (check_blocks_do_not_see_order, always_causal),
    (check_times_differ, time_too_small),
    (check_weights_are_counted, hidden_too_wide),
    (check_mask_by_hand, patches_see_register_0),
    (check_mask_by_hand, registers_blind_for_themselves),
    (check_leaks_finds_them, patches_see_register_0),
    (check_leaks_finds_them, touches_with_a_constant),
    (check_budget_is_counted, one_token_too_many),
    (check_dropped_is_gone, dropped_whispers),
    (check_dropped_is_gone, written_in_place),
    (check_laws, never_full_length),
    (check_gradient_noise_averages, one_budget_for_the_batch),
]


test_the_code_passes, test_the_bug_is_caught = planted(PLANTED)
