"""Choosing the length: the promise of each policy, and the bugs that would break it."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from planting import planted
from torch import nn

import flextok_edu.evaluation.budget_heads as heads
import flextok_edu.evaluation.budgets as budgets
from flextok_edu.apps.generate import detokenize_main
from flextok_edu.apps.tokenize import tokenize_main
from flextok_edu.data.scenes import ToyScenes
from flextok_edu.engine.config import TokenizerConfig, TrunkConfig, VAEConfig
from flextok_edu.engine.tensors import from_uint8, noise_like
from flextok_edu.evaluation.budget_heads import BudgetHead, HeadConfig, PredictedBudget, fit_head
from flextok_edu.evaluation.budgets import (
    Look,
    Quality,
    SearchBudget,
    compare_with_fixed,
    feature_distance,
    least_counts,
    meets_from,
    quality_curves,
)
from flextok_edu.flow import SamplingConfig
from flextok_edu.tokenizer import FlexTok
from flextok_edu.vae import VAE

COUNTS = (1, 2, 4, 8)


class Tok:
    """Its decode of picture i at count k is lighter than the original by `errors[i, k]`.

    With `noisy` the error also depends on the noise's number, so that another noise is another error.
    """

    kind, identity, vocabulary, length, image_size, token_counts = "toy", "2" * 16, 1000, 8, 2, COUNTS

    def __init__(self, errors, noisy=False):
        self.errors, self.noisy, self.decoded = torch.tensor(errors), noisy, []

    def tokenize(self, images, budget=None):
        if callable(budget):
            budget = budget(self, images)
        ids = ((images[:, :1, 0, 0] + 1) * 500).round().long().expand(-1, 8)  # which picture it is
        if budget is None or isinstance(budget, int):
            return ids[:, :budget]
        return [row[:k] for row, k in zip(ids, budget)]

    def detokenize(self, ids, sampling=None, *, first_index=0, **settings):
        numbers = range(first_index, first_index + len(ids))
        if isinstance(sampling.seed, tuple):
            numbers = sampling.seed  # each picture's own
        self.decoded += [(i, ids.shape[1]) for i in numbers]
        value = ids[:, 0] / 1000 + self.errors[ids[:, 0], COUNTS.index(ids.shape[1])]
        if self.noisy:
            value = value + torch.tensor(list(numbers)) * 0.01
        return (value * 2 - 1).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)


def pretend(errors, **options):
    "A tokenizer, and its pictures: as dark as possible, and different."
    number = torch.arange(len(errors)).view(-1, 1, 1, 1) / 1000
    return Tok(errors, **options), (number * 2 - 1).expand(-1, 3, 2, 2)


ERRORS = [
    [0.5, 0.1, 0.3, 0.1],  # a stroke of luck at 2
    [0.1, 0.1, 0.1, 0.1],
    [0.5, 0.5, 0.5, 0.5],  # never
    [0.5, 0.4, 0.15, 0.1],
    [0.5, 0.5, 0.5, 0.1],
]
BEST = [8, 1, 8, 4, 8]


# --- the rule and the search -------------------------------------------------------------------------------


def check_every_larger_count_meets():
    """The promise: from the budget on, all counts are good enough; just below it one is not."""
    errors = torch.rand(500, 6, generator=torch.Generator().manual_seed(0))
    counts = (1, 2, 4, 8, 16, 32)
    found = least_counts(errors, counts, 0.7)
    for row, k in zip(errors, found.tolist()):
        at = counts.index(k)
        assert bool((row[at:] <= 0.7).all()) or k == 32
        assert at == 0 or row[at - 1] > 0.7 or row[-1] > 0.7


def check_search_finds_it():
    tok, images = pretend(ERRORS)
    search = SearchBudget(Quality("mae", 0.2))
    assert search(tok, images).tolist() == BEST
    assert [len(row) for row in tok.tokenize(images, budget=search)] == BEST


def check_search_stops_at_the_first_miss():
    tok, images = pretend(ERRORS)
    SearchBudget(Quality("mae", 0.2))(tok, images)
    assert sorted(tok.decoded) == sorted(
        [(0, 8), (0, 4), *((1, k) for k in COUNTS), (2, 8), (3, 8), (3, 4), (3, 2), (4, 8), (4, 4)]
    )


def check_noise_stays_with_its_picture():
    """A search of some rows sees the pictures that a decode of all of them shows, whatever the batch."""
    rows = [[0.2, 0.06, 0.2 if i < 3 else 0.03, 0.02] for i in range(9)]  # the first ones drop out first
    tok, images = pretend(rows, noisy=True)
    quality = Quality("mae", 0.115)
    expected = least_counts(torch.tensor(rows) + 0.01 * torch.arange(9)[:, None], COUNTS, 0.115).tolist()
    assert len(set(expected)) > 1
    for batch in (1, 4, 64):
        assert SearchBudget(quality, look=Look(batch=batch))(tok, images).tolist() == expected
        seeds = Look(SamplingConfig(seed=tuple(range(9))), batch=batch)
        assert SearchBudget(quality, look=seeds)(tok, images).tolist() == expected
    assert torch.allclose(
        quality_curves(tok, images, quality, look=Look(batch=4)),
        torch.tensor(rows) + 0.01 * torch.arange(9)[:, None],
        atol=1e-6,
    )


def check_slack():
    tok, images = pretend([[0.52, 0.51, 0.5, 0.5], [0.9, 0.8, 0.7, 0.5], [0.1, 0.1, 0.1, 0.1]])
    quality = Quality("mae", 0.2)
    assert SearchBudget(quality)(tok, images).tolist() == [8, 8, 1]
    assert SearchBudget(quality, slack=0.05)(tok, images).tolist() == [1, 8, 1]
    errors = quality.error(tok.errors)
    assert least_counts(errors, COUNTS, quality.limit, slack=0.05).tolist() == [1, 8, 1]


def first_pass(monkeypatch):
    def lucky(errors, limit):
        return (errors <= limit).int().cummax(1).values.bool()

    monkeypatch.setattr(budgets, "meets_from", lucky)


def upwards(monkeypatch):
    monkeypatch.setattr(budgets, "reversed", lambda counts: sorted(counts), raising=False)


def binary(monkeypatch):
    """ElasticTok's search: it never looks at most of the larger counts."""

    def search(self, tok, images):
        ids, found = tok.tokenize(images), []
        for i in range(len(images)):
            low, high = 0, len(COUNTS) - 1
            while low < high:
                middle = (low + high) // 2
                values = self.look.values(tok, images, ids[:, : COUNTS[middle]], [i], self.quality)
                low, high = (low, middle) if values <= self.quality.target else (middle + 1, high)
            found.append(COUNTS[low])
        return torch.tensor(found)

    monkeypatch.setattr(SearchBudget, "__call__", search)


def everything_each_time(monkeypatch):
    original = Look.values

    def values(self, tok, images, ids, rows, quality):
        return original(self, tok, images, ids, list(range(len(images))), quality)[rows]

    monkeypatch.setattr(Look, "values", values)


def renumbered(monkeypatch):
    """The noise of a picture's place among those that are left."""

    def decode(self, tok, ids, rows):
        seed = self.sampling.seed
        how = replace(self.sampling, seed=seed[: len(rows)]) if isinstance(seed, tuple) else self.sampling
        return tok.detokenize(ids[rows], how, first_index=self.first_index)

    monkeypatch.setattr(Look, "decode", decode)


def no_slack(monkeypatch):
    original = least_counts
    monkeypatch.setattr(budgets, "least_counts", lambda e, c, limit, slack=None: original(e, c, limit))
    monkeypatch.setitem(globals(), "least_counts", budgets.least_counts)


def slack_for_all(monkeypatch):
    """Also those that can meet the target stop early."""
    search = SearchBudget.__call__

    def call(self, tok, images):
        loose = Quality(self.quality.metric, self.quality.target * 3)
        return search(SearchBudget(loose, self.counts, self.look), tok, images)

    monkeypatch.setattr(SearchBudget, "__call__", call)


test_search, test_search_bugs = planted(
    [
        (check_every_larger_count_meets, first_pass),
        (check_search_finds_it, upwards),
        (check_search_finds_it, binary),
        (check_search_stops_at_the_first_miss, everything_each_time),
        (check_noise_stays_with_its_picture, renumbered),
        (check_slack, no_slack),
        (check_slack, slack_for_all),
    ]
)


def test_runs_of_rows():
    assert budgets._runs([0, 1, 2, 5, 6, 9], 64) == [(0, 3), (5, 7), (9, 10)]
    assert budgets._runs([0, 1, 2, 3, 4], 2) == [(0, 2), (2, 4), (4, 5)]
    for seed in range(20):
        rows = torch.randperm(30, generator=torch.Generator().manual_seed(seed))[:12].sort().values.tolist()
        found = budgets._runs(rows, 3)
        assert [i for start, end in found for i in range(start, end)] == rows
        assert max(end - start for start, end in found) <= 3


def test_on_a_gpu_the_span_is_decoded():
    """One batch instead of many small ones; the noise stays the same."""
    tok, images = pretend([[0.1 * i] * 4 for i in range(6)], noisy=True)
    rows, quality = [1, 4, 5], Quality("mae", 0.2)
    plain = Look().values(tok, images, tok.tokenize(images, 8), rows, quality)
    tok.device, tok.decoded = "cuda:0", []
    assert torch.equal(Look().values(tok, images, tok.tokenize(images, 8), rows, quality), plain)
    assert [i for i, _ in tok.decoded] == [1, 2, 3, 4, 5], "in one go"


# --- targets -----------------------------------------------------------------------------------------------


def test_targets_of_every_kind():
    """PSNR is better large; a distance of features is brought along."""

    class Mean(nn.Module):
        def forward(self, images):
            return torch.stack([images.mean((1, 2, 3)), torch.ones(len(images))], 1)

    tok, images = pretend(ERRORS)
    assert SearchBudget(Quality("psnr", 15.0))(tok, images).tolist() == BEST  # an error of .178
    close = Quality("features", 0.06, feature_distance(Mean()))
    values = quality_curves(tok, images, close)
    assert values[0, 0] > values[0, 2] > values[0, 1] > 0
    assert (
        SearchBudget(close)(tok, images).tolist()
        == least_counts(close.error(values), COUNTS, close.limit).tolist()
    )
    more = Quality("mine", 0.8, lambda a, b: 1 - (a - b).abs().mean((1, 2, 3)), better=1)
    assert SearchBudget(more)(tok, images).tolist() == BEST
    assert torch.allclose(feature_distance(Mean())(images, images), torch.zeros(5), atol=1e-6)


def test_what_is_refused():
    tok, images = pretend(ERRORS)
    for text in ("mae", "=1", "mae=", "mae=nan", "mae=-1", "mae=0", "psnr=inf", "mea=1"):
        with pytest.raises(ValueError):
            Quality.parse(text)
    assert Quality.parse(" psnr = 25 ") == Quality("psnr", 25.0)
    with pytest.raises(ValueError, match="the same noise"):
        Look(SamplingConfig(seed=None))
    for counts in ((), (2, 1), (0, 1), (1, 16), (1, 1)):
        with pytest.raises(ValueError, match="rise within 1 .. 8"):
            SearchBudget(Quality("mae", 0.2), counts)(tok, images)
    with pytest.raises(ValueError, match="none of the counts"):
        compare_with_fixed(torch.tensor([3]), torch.ones(1, 4), COUNTS, Quality("mae", 0.2))


# --- against fixed lengths ---------------------------------------------------------------------------------


def check_known_answers():
    easy, hard = [0.1] * 4, [0.9, 0.9, 0.9, 0.1]
    values, quality = torch.tensor([easy, hard] * 40), Quality("mae", 0.2)
    told = compare_with_fixed(torch.tensor([1, 8] * 40), values, COUNTS, quality)
    known = {
        "tokens": 4.5,
        "share": 1,
        "value": 0.1,
        "share_fixed": 0.75,  # a coin: 1 or 8 tokens
        "value_fixed": 0.3,
        "tokens_share": 8,
        "tokens_value": 8,
        "saved_share": 1 - 4.5 / 8,
        "saved_value": 1 - 4.5 / 8,
    }
    assert told.keys() == known.keys()
    for name, (estimate, low, high) in told.items():
        assert abs(estimate - known[name]) < 1e-6, name
        assert low <= estimate + 1e-9 and estimate - 1e-9 <= high
    half = 1.96 * 3.5 / 80**0.5  # of the interval of the mean: each is 3.5 away from it
    assert abs(told["tokens"][1] - (4.5 - half)) < 0.15 and abs(told["tokens"][2] - (4.5 + half)) < 0.15


def check_luck_is_no_success():
    """A picture that meets the target at 2 tokens and misses it at 4 counts as missed at 2."""
    values, quality = torch.tensor([[0.5, 0.1, 0.3, 0.1]] * 4), Quality("mae", 0.2)
    assert compare_with_fixed(torch.tensor([2] * 4), values, COUNTS, quality)["share"][0] == 0
    assert compare_with_fixed(torch.tensor([8] * 4), values, COUNTS, quality)["share"][0] == 1


def check_better_large():
    values = torch.tensor([[10.0, 20.0, 30.0, 40.0]] * 10)
    told = compare_with_fixed(torch.tensor([4] * 10), values, COUNTS, Quality("psnr", 25.0))
    assert told["share"][0] == 1 and told["value"][0] == 30
    assert abs(told["value_fixed"][0] - 30) < 1e-9 and abs(told["tokens_value"][0] - 4) < 1e-9


def swapped_sign(monkeypatch):
    original = budgets._mixed
    monkeypatch.setattr(budgets, "_mixed", lambda x, xs, ys, better: original(x, xs, ys, -better))


def no_resampling(monkeypatch):
    def same(high, size, generator=None):
        return torch.arange(high).expand(size)

    class Pretended:
        def __getattr__(self, name):
            return same if name == "randint" else getattr(torch, name)

    monkeypatch.setattr(budgets, "torch", Pretended())


def always_small(monkeypatch):
    original = Quality.__post_init__

    def init(self):
        original(self)
        object.__setattr__(self, "better", -1)

    monkeypatch.setattr(Quality, "__post_init__", init)


test_fixed, test_fixed_bugs = planted(
    [
        (check_known_answers, swapped_sign),
        (check_known_answers, no_resampling),
        (check_luck_is_no_success, first_pass),
        (check_better_large, always_small),
    ]
)


def test_a_tokenizer_of_one_length():
    values = torch.tensor([[0.1], [0.3]])
    told = compare_with_fixed(torch.tensor([8, 8]), values, (8,), Quality("mae", 0.2))
    assert told["tokens"][0] == 8 == told["tokens_share"][0] and told["share"][0] == 0.5


# --- heads -------------------------------------------------------------------------------------------------


def small_tok():
    torch.manual_seed(0)
    vae = VAE(VAEConfig(latent_channels=4, channels=(16, 32), layers=1, stem=2, groups=4))
    config = TokenizerConfig(4, 8, 8, (8, 5, 5, 5), TrunkConfig(64, 1), TrunkConfig(64, 2))
    return FlexTok(config, vae).eval()


@pytest.fixture(scope="module")
def toy():
    """A small FlexTok, pictures, and curves that its registers tell: the brightness of a picture is its error
    at 1 token, and each doubling takes the same from it.
    """
    tok = small_tok()
    images = from_uint8(ToyScenes("train", 32, 1).render(0, 160, workers=1)[0])
    bright = (images.mean((1, 2, 3)) + 1) / 2
    values = bright[:, None] * torch.tensor([1.0, 0.6, 0.3, 0.1])
    return tok, images, values


QUALITY = Quality("mae", 0.2)
SMALL = HeadConfig(("registers",), counts=COUNTS, width=32, dropout=0.0, steps=1)


@pytest.fixture(scope="module")
def fitted(toy):
    return fit_head(*toy, QUALITY, SMALL, updates=150)


def test_a_head_learns_what_registers_tell(toy, fitted):
    wrong = (fitted.held_errors - fitted.held_predictions).square().mean(0)
    assert bool((wrong < 0.5 * fitted.held_errors.var(0)).all()), wrong / fitted.held_errors.var(0)
    tok, images, values = toy
    assert fitted.held_errors.shape == (40, 4)
    assert torch.allclose(fitted.held_errors, QUALITY.error(values[:40]), atol=1e-6)
    needed = least_counts(QUALITY.error(values), COUNTS, QUALITY.limit)
    found = PredictedBudget(fitted, QUALITY)(tok, images)
    assert (found >= needed).double().mean() > 0.8 and found.double().mean() < 1.5 * needed.double().mean()


def test_a_head_is_reproduced(toy, fitted):
    """The same head again, whatever the global seed, which stays as it was."""
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    again = fit_head(*toy, QUALITY, SMALL, updates=150)
    assert torch.equal(torch.rand(1), expected)
    for (name, a), b in zip(again.state_dict().items(), fitted.state_dict().values()):
        assert torch.allclose(a, b, atol=1e-5), name


def test_files(toy, fitted, tmp_path):
    tok, images, _ = toy
    fitted.save_pretrained(tmp_path)
    assert {"config.json", "model.safetensors"} <= {f.name for f in tmp_path.iterdir()}
    back = BudgetHead.from_pretrained(tmp_path)
    assert back.config == fitted.config and back.tokenizer == tok.identity
    for share in (0.5, 0.95):
        a, b = (PredictedBudget(head, QUALITY, share)(tok, images[:20]) for head in (fitted, back))
        assert torch.equal(a, b)
    facts = json.loads((tmp_path / "config.json").read_text())
    assert facts["kind"] == "budget_head"
    facts["config"]["features"] = ["eyes"]
    (tmp_path / "config.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="features"):
        BudgetHead.from_pretrained(tmp_path)


def test_a_head_knows_whose_it_is(toy, fitted):
    tok, images, values = toy
    other = small_tok()
    with torch.no_grad():
        other.encoder.registers.add_(0.1)
    with pytest.raises(ValueError, match="was fitted to tokenizer"):
        PredictedBudget(fitted, QUALITY)(other, images[:2])
    with pytest.raises(ValueError, match="predicts mae, not psnr"):
        PredictedBudget(fitted, Quality("psnr", 20.0))(tok, images[:2])
    with pytest.raises(ValueError, match="encoder.head"):
        heads.pooled_registers(pretend(ERRORS)[0], images[:2], QUALITY, Look())
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match="share"):
            PredictedBudget(fitted, QUALITY, share)
    with pytest.raises(ValueError, match="one for each"):
        fit_head(tok, images, values[:, :3], QUALITY, SMALL)


def head_of(errors, predictions):
    """A head that held these pictures out."""
    head = BudgetHead(HeadConfig(counts=COUNTS[: errors.shape[1]], held=len(errors)))
    head.held_errors.copy_(errors)
    head.held_predictions.copy_(predictions)
    return head


def check_margin():
    """Of held pictures that can, the share gets enough, and with a margin a little smaller it does not."""
    generator = torch.Generator().manual_seed(1)
    truth = torch.rand(400, 1, generator=generator) * 2 - torch.arange(4) * 0.4
    truth += 0.2 * torch.randn(400, 4, generator=generator)
    head = head_of(truth, truth + 0.3 * torch.randn(400, 4, generator=generator))
    for limit in (0.0, 0.4):
        can = truth[:, -1] <= limit
        needed = least_counts(truth, COUNTS, limit)
        for share in (0.5, 0.8, 0.95):
            served = []
            for margin in (head.margin(limit, share), head.margin(limit, share) - 0.05):
                found = least_counts(head.held_predictions + margin * head.spread(), COUNTS, limit)
                served.append(float((found >= needed)[can].double().mean()))
            assert share <= served[0] < share + 0.05 and served[1] < served[0]


def check_margin_of_a_perfect_head():
    truth = torch.rand(50, 1, generator=torch.Generator().manual_seed(2)) - torch.arange(4) * 0.2
    head = head_of(truth, truth.clone())
    found = least_counts(truth + head.margin(0.3, 0.9) * head.spread(), COUNTS, 0.3)
    assert (found == least_counts(truth, COUNTS, 0.3)).double().mean() > 0.8


def no_margin(monkeypatch):
    monkeypatch.setattr(BudgetHead, "margin", lambda self, limit, share: 0.0)


def all_pictures(monkeypatch):
    """Also those that cannot meet the target, and get everything, count as served."""
    original = BudgetHead.margin
    monkeypatch.setattr(BudgetHead, "margin", lambda self, limit, share: original(self, limit, share * 0.9))


def far_too_careful(monkeypatch):
    monkeypatch.setattr(BudgetHead, "margin", lambda self, limit, share: 10_000.0)


test_margin, test_margin_bugs = planted(
    [
        (check_margin, no_margin),
        (check_margin, all_pictures),
        (check_margin_of_a_perfect_head, far_too_careful),
    ]
)


def test_the_line_from_one_decode(toy):
    """With the real error at full length as its only input it knows the last count exactly."""
    tok, images, _ = toy
    look = Look(SamplingConfig(steps=1))
    values = quality_curves(tok, images[:48], QUALITY, COUNTS, look)
    config = HeadConfig(("full_error",), counts=COUNTS, width=0, steps=1)
    head = fit_head(tok, images[:48], values, QUALITY, config)
    assert float(head.spread()[-1]) < 2e-3
    predicted = head.predict(tok, images[40:44], QUALITY, first_index=40)
    assert torch.allclose(predicted[:, -1], QUALITY.error(values[40:44, -1]), atol=2e-3)
    other = head.predict(tok, images[40:44], QUALITY, first_index=0)
    assert not torch.allclose(other, predicted, atol=1e-5), "the noise is that of the picture's number"


# --- FlexTok -----------------------------------------------------------------------------------------------


def test_flextok_calls_a_policy(toy):
    tok, images, _ = toy
    seen = []

    def policy(asked, shown):
        seen.append((asked, shown))
        return torch.tensor([1, 3, 8])

    ids, whole = tok.tokenize(images[:3], budget=policy), tok.tokenize(images[:3])
    assert seen[0][0] is tok and torch.equal(seen[0][1], images[:3])
    assert [len(row) for row in ids] == [1, 3, 8]
    assert all(torch.equal(row, full[: len(row)]) for row, full in zip(ids, whole))
    for wrong in ([1, 2], [0, 1, 2], [1, 2, 9]):
        with pytest.raises(ValueError):
            tok.tokenize(images[:3], budget=lambda t, x, k=wrong: torch.tensor(k))


def test_what_a_search_has_seen_is_what_is_shown(toy):
    """To the bit of rounding: the same noise, the same settings, also in the middle of a longer set."""
    tok, images, _ = toy
    how = SamplingConfig(steps=2, guidance=1.5)
    curves = quality_curves(tok, images[:8], QUALITY, COUNTS, Look(how, first_index=30))
    quality = Quality("mae", float(curves.median()))
    search = SearchBudget(quality, COUNTS, Look(how, first_index=30, batch=3))
    ids = tok.tokenize(images[:8], budget=search)
    expected = least_counts(quality.error(curves), COUNTS, quality.limit)
    assert [len(row) for row in ids] == expected.tolist()
    shown = quality.values(tok.detokenize(ids, how, first_index=30), images[:8])
    at = [COUNTS.index(len(row)) for row in ids]
    assert torch.allclose(shown, curves[range(8), at], atol=1e-5)
    latents = noise_like((4, 8, 8), 0, [31])
    again = tok.detokenize(ids[1][None], how, noise=latents)
    assert torch.allclose(quality.values(again, images[1:2]), shown[1:2], atol=1e-5)


def test_meets_from_is_monotone():
    errors = torch.rand(50, 5, generator=torch.Generator().manual_seed(3))
    good = meets_from(errors, 0.6)
    assert bool((good[:, 1:] >= good[:, :-1]).all()) and torch.equal(good[:, -1], errors[:, -1] <= 0.6)


# --- the command -------------------------------------------------------------------------------------------


def test_a_quality_on_the_command_line(tmp_path, capsys):
    """What flextok_detokenize draws from the file has the quality that was asked for."""
    (tmp_path / "in").mkdir()
    scenes = ToyScenes("val", 64, 2).render(0, 5, workers=1)[0]
    for i, image in enumerate(scenes):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "in" / f"{i}.png")
    (tmp_path / "in" / "2b.png").write_text("no picture")  # the others keep their numbers in the file
    ids, tok = tmp_path / "ids.jsonl", ["--tokenizer", "tiny", "--device", "cpu"]
    with pytest.raises(SystemExit):  # status 1: one could not be read
        tokenize_main(
            [str(tmp_path / "in"), *tok, "--quality", "mae=0.035", "--batch", "2", "--out", str(ids)]
        )
    lists = [json.loads(line)["ids"] for line in ids.read_text().splitlines()[1:]]
    assert len(lists) == 5 and len(set(map(len, lists))) > 1
    detokenize_main([str(ids), *tok, "--out", str(tmp_path / "out")])
    drawn = sorted(f for f in (tmp_path / "out").glob("*.png") if f.name != "sheet.png")
    for image, row, file in zip(scenes, lists, drawn, strict=True):
        back = torch.from_numpy(np.asarray(Image.open(file)).copy()).permute(2, 0, 1)
        off = float((back.float() - image.float()).abs().mean()) / 255
        assert off <= 0.0355 or len(row) == 32, (file.name, off, len(row))
    capsys.readouterr()
    for wrong, says in (
        (["--quality", "mae=0.03", "--budgets", "8"], "give one of them"),
        (["--quality", "mea=0.03"], "no metric of pictures is called 'mea'"),
        (["--quality", "good"], "metric=target"),
    ):
        with pytest.raises(SystemExit) as status:
            tokenize_main([str(tmp_path / "in"), *tok, "--out", str(tmp_path / "x.jsonl"), *wrong])
        assert status.value.code == 2 and says in " ".join(capsys.readouterr().err.split())


def test_known_metrics_do_not_depend_on_what_was_imported():
    import flextok_edu.evaluation.entries  # noqa: F401 (registers further ones)

    with pytest.raises(ValueError, match="use one of mae, psnr, ssim"):
        Quality.parse("mse=0.01")
