"""The short cuts are equalities: held against the plain computation at every kind of budget, on large random
weights.
"""

import pytest
import torch

from flextok_edu.engine.config import TokenizerConfig, TrunkConfig
from flextok_edu.tokenizer import FlexTok
from flextok_edu.short_cuts import condition_of, null_condition_of, runs_together

CONFIG = TokenizerConfig(4, 16, 64, (8, 5, 5, 5), TrunkConfig(128, 2), TrunkConfig(128, 3))
BUDGETS = (1, 2, 3, 8, 31, 64)


@pytest.fixture(scope="module")
def tok():
    generator = torch.Generator().manual_seed(0)
    model = FlexTok(CONFIG).eval()
    with torch.no_grad():
        for w in model.parameters():
            w.copy_(torch.randn(w.shape, generator=generator) * (0.3 if w.ndim > 1 else 1.0))
    return model


def close(a, b, tolerance=1e-5):
    """Relative to the output's maximum."""
    return float((a - b).abs().max()) <= tolerance * float(b.abs().max())


@pytest.mark.parametrize("budget", BUDGETS)
def test_encode_only_what_is_kept(tok, budget):
    latents = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert close(tok.encoder(latents, budget), tok.encoder(latents)[:, :budget])


@pytest.mark.parametrize("budget", [*BUDGETS, BUDGETS], ids=str)
def test_one_mask_token_is_enough(tok, budget):
    generator = torch.Generator().manual_seed(2)
    b = len(BUDGETS)
    codes, x, t = (
        torch.randn(b, 64, 4, generator=generator),
        torch.randn(b, 4, 16, 16, generator=generator),
        torch.rand(b, generator=generator),
    )
    kept = torch.tensor(budget).expand(b)
    results = []
    for short in (False, True):
        cut = codes[:, : int(kept.max())] if short else codes
        registers, bias = condition_of(tok.decoder, cut, kept, short=short)
        assert registers.shape[1] == (int(kept.max()) + 1 if short else 64)
        v = tok.decoder(x, tok.decoder.modulations(t), registers, bias)
        grads = torch.autograd.grad(v.square().mean(), [tok.decoder.mask_token, tok.decoder.codes_in.weight])
        results.append((v.detach(), *grads))
    assert close(results[1][0], results[0][0])
    for short, plain in zip(results[1][1:], results[0][1:]):
        assert float((short - plain).abs().max()) <= 1e-4 * max(float(plain.abs().max()), 1e-6), (
            "gradients too"
        )


def test_one_null_token_is_enough(tok):
    x, t = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3)), torch.tensor([0.2, 0.9])
    with torch.no_grad():
        plain, short = (
            tok.decoder(x, tok.decoder.modulations(t), *null_condition_of(tok.decoder, 2, s))
            for s in (False, True)
        )
    assert close(short, plain)


def test_modulations_of_all_steps_in_one_product(tok):
    times = torch.linspace(1, 0, 9)
    together = tok.decoder.modulations(times)
    for i in range(9):
        for all_steps, one in zip(together, tok.decoder.modulations(times[i : i + 1])):
            assert close(all_steps[i : i + 1], one)


@pytest.mark.parametrize("apg", (False, True), ids=("guidance", "APG"))
def test_whole_decodes_agree(tok, apg):
    generator = torch.Generator().manual_seed(4)
    ids = [torch.randint(1000, (k,), generator=generator) for k in BUDGETS]
    noise = torch.randn(len(ids), 4, 16, 16, generator=generator)
    results = []
    for tok.short_cuts in (False, True):
        results.append(tok.decode_latents(ids, noise, steps=3, guidance=3.0, apg=apg))
    assert close(results[1], results[0], 1e-4)


@pytest.mark.parametrize("budget", BUDGETS)
def test_decodes_of_one_budget_agree(tok, budget):
    """Plain, short, and with both guidance passes as one batch; at the full budget nothing is dropped and no
    bias is needed.
    """
    generator = torch.Generator().manual_seed(5)
    ids, noise = (
        torch.randint(1000, (2, budget), generator=generator),
        torch.randn(2, 4, 16, 16, generator=generator),
    )
    try:
        results = []
        for tok.short_cuts, tok.guidance_together in (
            (False, False),
            (True, False),
            (True, True),
            (False, True),
        ):
            results.append(tok.decode_latents(ids, noise, steps=2, guidance=3.0))
        for other in results[1:]:
            assert close(other, results[0], 1e-4)
        assert (condition_of(tok.decoder, torch.zeros(2, budget, 4), budget)[1] is None) == (budget == 64)
    finally:
        tok.short_cuts, tok.guidance_together = True, None


def test_together_with_mixed_budgets(tok):
    ids, noise = (
        [torch.full((k,), 7) for k in BUDGETS],
        torch.randn(len(BUDGETS), 4, 16, 16, generator=torch.Generator().manual_seed(6)),
    )
    apart = tok.decode_latents(ids, noise, steps=2, guidance=3.0, apg=True)
    try:
        tok.guidance_together = True
        assert close(tok.decode_latents(ids, noise, steps=2, guidance=3.0, apg=True), apart, 1e-4)
    finally:
        tok.guidance_together = None


def test_the_faster_way_is_chosen():
    """One batch of both passes for one picture of few tokens at the paper's size, as measured; two calls
    otherwise.
    """

    def registers(b, r):
        return torch.empty(b, r, 1)

    cond = {(1, 1): True, (1, 8): True, (1, 32): False, (1, 128): False, (4, 8): False, (4, 1): False}
    for (b, budget), together in cond.items():
        assert runs_together(registers(b, budget + 1), registers(b, 1), 256) == together


def test_the_short_cuts_are_taken(tok, monkeypatch):
    """Equal results could also come from short cuts that nobody takes: count positions and clocks."""
    lengths, clocks = [], []
    forward, modulations = type(tok.decoder).forward, type(tok.decoder).modulations
    monkeypatch.setattr(
        type(tok.decoder),
        "forward",
        lambda self, x, m, registers, *rest: (
            lengths.append(registers.shape[1]),
            forward(self, x, m, registers, *rest),
        )[1],
    )
    monkeypatch.setattr(
        type(tok.decoder), "modulations", lambda self, t: (clocks.append(len(t)), modulations(self, t))[1]
    )
    ids, noise = torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 4, 16, 16)
    try:
        tok.decode_latents(ids, noise, steps=3, guidance=2.0)
        assert lengths == [9, 1] * 3 and clocks == [3]
        lengths.clear(), clocks.clear()
        tok.short_cuts = False
        tok.decode_latents(ids, noise, steps=3, guidance=2.0)
        assert lengths == [64, 64] * 3 and clocks == [1, 1, 1]
    finally:
        tok.short_cuts = True


def test_without_the_causal_mask_the_short_cut_is_off():
    """Then registers beyond the budget matter, so all of them are encoded; and the tokenizer says so."""
    from dataclasses import replace

    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="short cut 1 is off"):
        model = FlexTok(replace(CONFIG, encoder_mask="full")).eval()
    latents = torch.randn(2, 4, 16, 16)
    with torch.no_grad():
        assert torch.equal(model.encoder(latents, 5), model.encoder(latents)[:, :5])
