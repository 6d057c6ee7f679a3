"""Writing tokens (ar) and laying results side by side (evaluation): what must hold, and the planted bug that
each test catches.
"""

import json
import math
from dataclasses import replace

import pytest
from planting import patch
import torch
from torch import nn

import flextok_edu.apps.measure as apps_measure
import flextok_edu.ar as ar
import flextok_edu.sampling as sampling
import flextok_edu.evaluation.compare as evaluation_compare
import flextok_edu.evaluation.evaluate as evaluation_evaluate
import flextok_edu.evaluation.metrics as evaluation_metrics
import flextok_edu.evaluation.report as evaluation_report
from flextok_edu.ar import ARModel, CachedGPT, sample_images
from flextok_edu.engine.binding import tokenizer_hash
from flextok_edu.sampling import sample_token, guidance_per_token, filter_top_k_top_p, token_uniforms
from flextok_edu.ar_training import position_losses, unigram_entropies
from flextok_edu.engine.config import ARConfig, EvalConfig, TokenizerConfig, TrunkConfig, VAEConfig
from flextok_edu.data.datasets import ImageSet
from flextok_edu.engine.runtime import Runtime
from flextok_edu.evaluation.compare import compare, conditions
from flextok_edu.evaluation.metrics import column
from flextok_edu.evaluation.report import Report, load_report
from flextok_edu.tokenizer import FlexTok
from flextok_edu.vae import VAE

LABELS = torch.tensor([0, 1, 2, 3])
KNOBS = [
    {},
    dict(guidance=2.0),
    dict(guidance=lambda j: 1 + j / 3, top_k=9, top_p=0.9, temperature=1.3),
    dict(top_p=0.5),
    dict(temperature=0),
]


@pytest.fixture(scope="module")
def model():
    """Large random weights, so that no choice is certain."""
    torch.manual_seed(0)
    model = ARModel(ARConfig(vocabulary=50, length=10, classes=3, width=64, depth=2)).eval()
    with torch.no_grad():
        for w in model.parameters():
            w.add_(0.1 * torch.randn_like(w))
    return model


# --- ar: what is written depends on (seed, index) alone
# ------------------------------------------------------


def check_alone_as_in_a_batch(model, options):
    written = model.generate(LABELS, seed=3, first_index=5, **options)
    for i in range(4):
        assert torch.equal(
            model.generate(LABELS[i : i + 1], seed=3, first_index=5 + i, **options)[0], written[i]
        )


def check_fewer_are_the_beginning(model, options):
    whole = model.generate(LABELS, seed=3, **options)
    for k in (1, 5, 9):
        assert torch.equal(model.generate(LABELS, k, seed=3, **options), whole[:, :k])


def check_a_seed_per_sample(model, options):
    seeds = (7, 7, 2**40, 0)
    alone = torch.cat([model.generate(LABELS[i : i + 1], seed=s, **options) for i, s in enumerate(seeds)])
    assert torch.equal(model.generate(LABELS, seeds=seeds, **options), alone)
    assert torch.equal(model.generate(LABELS, seeds=torch.tensor(seeds), **options), alone)


@pytest.mark.parametrize("options", KNOBS, ids=lambda o: "+".join(o) or "plain")
@pytest.mark.parametrize(
    "check",
    (check_alone_as_in_a_batch, check_fewer_are_the_beginning, check_a_seed_per_sample),
    ids=lambda f: f.__name__,
)
def test_written_samples(model, check, options):
    check(model, options)


def numbers_of_the_batch(monkeypatch):
    real = sampling.token_uniforms
    patch(
        monkeypatch,
        sampling,
        "token_uniforms",
        lambda length, indices, seed=0, seeds=None: real(length, range(len(indices)), seed, seeds),
    )


def numbers_for_the_asked_length(monkeypatch):
    monkeypatch.setattr(
        ARModel,
        "generate",
        lambda self, labels, length=None, seed=0, **o: self.write(
            labels,
            [1.0] * (length or 10),
            (lambda u: lambda j, logits: sample_token(logits, u[:, j : j + 1]))(
                sampling.token_uniforms(10, range(len(labels)), seed + (length or 10))
            ),
        ),
    )


def seeds_number_the_samples_too(monkeypatch):
    patch(
        monkeypatch,
        sampling,
        "token_uniforms",
        lambda length, indices, seed=0, seeds=None: (
            token_uniforms(length, indices, seed)
            if seeds is None
            else torch.cat([token_uniforms(length, [i], int(s)) for i, s in enumerate(seeds)])
        ),
    )


@pytest.mark.parametrize(
    "check,bug",
    (
        (check_alone_as_in_a_batch, numbers_of_the_batch),
        (check_fewer_are_the_beginning, numbers_for_the_asked_length),
        (check_a_seed_per_sample, seeds_number_the_samples_too),
    ),
    ids=lambda f: f.__name__,
)
def test_the_bug_is_caught(model, check, bug, monkeypatch):
    bug(monkeypatch)
    with pytest.raises(AssertionError):
        check(model, {})


def test_old_numbers_stay():
    """The ids that the sampler gave before it had top-k, top-p, schedules and seeds."""
    torch.manual_seed(0)
    old = ARModel(ARConfig(vocabulary=8, length=4, classes=2, width=64, depth=1)).eval()
    with torch.no_grad():
        for i, w in enumerate(old.parameters()):
            w.copy_((torch.arange(w.numel()).reshape(w.shape) * (i + 3)).sin() * 0.5)
    found = [
        old.generate(torch.tensor([0, 1, 2]), **o).tolist()
        for o in ({}, dict(guidance=2.0, temperature=0.7, seed=3, first_index=5), dict(temperature=0))
    ]
    assert found == [
        [[1, 7, 1, 6], [6, 5, 6, 6], [3, 1, 4, 7]],
        [[2, 4, 5, 6], [7, 6, 0, 5], [2, 3, 4, 5]],
        [[2, 3, 4, 6], [2, 3, 4, 6], [1, 3, 4, 6]],
    ]


def test_off_means_off(model):
    plain = model.generate(LABELS, guidance=2.0)
    for off in (
        dict(top_k=0),
        dict(top_k=None),
        dict(top_k=50),
        dict(top_p=0.0),
        dict(top_p=1.0),
        dict(seeds=None),
    ):
        assert torch.equal(model.generate(LABELS, guidance=2.0, **off), plain)
    for same in (lambda j: 2.0, [2.0] * 10, torch.full((12,), 2.0), torch.tensor(2.0)):
        assert torch.equal(model.generate(LABELS, guidance=same), plain)
    assert torch.equal(model.generate(LABELS, guidance=lambda j: 1.0), model.generate(LABELS))


def test_guidance_acts_where_it_is_asked_for(model):
    """A schedule that is 1 up to position j writes the unguided beginning, and differs after."""
    plain = model.generate(LABELS.repeat(8), seed=1)
    for j in (0, 3, 7):
        written = model.generate(LABELS.repeat(8), seed=1, guidance=lambda i: 6.0 if i >= j else 1.0)
        assert torch.equal(written[:, :j], plain[:, :j]) and not torch.equal(written[:, j], plain[:, j])


def test_guidance_by_hand(model):
    with torch.no_grad():
        one, none = (model(torch.zeros(1, 1, dtype=torch.int64), torch.tensor([c]))[:, 0] for c in (1, 3))
    for g in (-1.0, 0.0, 2.5):
        assert (
            model.generate(torch.tensor([1]), 1, guidance=g, temperature=0).item()
            == (none + g * (one - none)).argmax().item()
        )


@pytest.mark.parametrize(
    "bad",
    (
        dict(length=0),
        dict(length=11),
        dict(temperature=-1.0),
        dict(temperature=math.nan),
        dict(top_k=-1),
        dict(top_k=51),
        dict(top_k=2.5),
        dict(top_p=1.5),
        dict(top_p=-0.1),
        dict(guidance=[1.0, 2.0]),
        dict(guidance=math.nan),
        dict(guidance=lambda j: math.inf),
        dict(seeds=[1]),
        dict(seeds=[1, 2, 3, 0.5]),
        dict(seeds=torch.rand(4)),
        dict(seeds=[1, 2, 3, 4], seed=5),
        dict(seeds=[1, 2, 3, 4], first_index=5),
    ),
    ids=lambda bad: "+".join(bad),
)
def test_nonsense_is_refused(model, bad):
    with pytest.raises(ValueError, match=next(iter(bad)).rstrip("s")):
        model.generate(LABELS, **bad)


# --- ar: the choice of a token
# ---------------------------------------------------------------------------------


def reference_kept(p, top_k, top_p):
    """By hand, one row: sort, cut, cut."""
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))[: top_k or len(p)]
    total, kept, mass = sum(p[i] for i in order), [], 0.0
    for i in order:
        if top_p and mass / total >= top_p:
            break
        kept.append(i)
        mass += p[i]
    return sorted(kept)


def check_kept():
    p = torch.rand(40, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)
    for top_k, top_p in ((1, None), (5, None), (None, 0.3), (None, 0.95), (4, 0.6), (12, 1.0), (None, 1e-9)):
        kept = filter_top_k_top_p(p.log(), top_k, top_p)
        for row, found in zip(p, kept):
            assert found.isfinite().nonzero()[:, 0].tolist() == reference_kept(row.tolist(), top_k, top_p)
            assert torch.equal(found[found.isfinite()], row.log()[found.isfinite()]), (
                "what stays is not changed"
            )


def test_kept():
    check_kept()
    assert filter_top_k_top_p(torch.zeros(2, 3, 6), top_k=2).isfinite().sum(-1).tolist() == [[2] * 3] * 2, (
        "equal tokens: exactly two"
    )
    x = torch.randn(3, 6)
    before = x.clone()
    filter_top_k_top_p(x, 2, 0.5)
    assert torch.equal(x, before), "nothing is written in place"


def test_kept_one_too_many_is_caught(monkeypatch):
    real = sampling.filter_top_k_top_p
    monkeypatch.setitem(
        globals(),
        "filter_top_k_top_p",
        lambda logits, top_k=None, top_p=None: real(logits, min(top_k + 1, 12) if top_k else top_k, top_p),
    )
    with pytest.raises(AssertionError):
        check_kept()


def test_drawn_as_often_as_they_should_be():
    p = torch.tensor([0.05, 0.38, 0.07, 0.24, 0.1, 0.16])
    u = token_uniforms(1, range(6000))
    for options in (dict(), dict(temperature=0.5), dict(temperature=2.0), dict(top_k=3), dict(top_p=0.7)):
        cut = {k: v for k, v in options.items() if k != "temperature"}
        expected = filter_top_k_top_p(p.log() / options.get("temperature", 1.0), **cut).softmax(-1)
        counted = torch.bincount(sample_token(p.log().expand(6000, 6), u, **options), minlength=6) / 6000
        assert (counted - expected).abs().max() < 0.02 and (counted[expected == 0] == 0).all()


def test_edges_of_the_chance():
    """The smallest and the largest u still fall on a token that was kept."""
    logits = torch.tensor([[-math.inf, 1.0, 2.0, -math.inf]])
    assert [sample_token(logits, torch.tensor([[u]])).item() for u in (1e-38, 1 - 1e-7, 1.0)] == [1, 2, 2]


def test_guidance_list():
    assert (
        guidance_per_token(2, 2) == [2.0, 2.0]
        and guidance_per_token(torch.tensor([1.0, 2.0, 3.0]), 2) == [1.0, 2.0]
        and guidance_per_token(lambda j: -j, 2) == [0.0, -1.0]
    )


# --- ar: reading
# ----------------------------------------------------------------------------------------------


def check_causal(model):
    ids = torch.randint(50, (4, 10), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(ids, LABELS)
        for j in range(10):
            other = ids.clone()
            other[:, j] = (other[:, j] + 7) % 50
            changed = (model(other, LABELS) - logits).abs().amax((0, 2)) > 1e-6
            assert not changed[: j + 1].any() and (j == 9 or changed[j + 1])


def test_causal(model):
    check_causal(model)


def test_a_mask_that_looks_ahead_is_caught(model, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "tril", lambda self, diagonal=0: torch.ones_like(self))
    with pytest.raises(AssertionError):
        check_causal(model)


def test_batches_do_not_matter(model):
    ids = torch.randint(50, (7, 10), generator=torch.Generator().manual_seed(0))
    labels = torch.arange(7) % 4
    with torch.no_grad():
        whole = model(ids, labels)
        assert torch.allclose(
            torch.cat([model(i[None], c[None]) for i, c in zip(ids, labels)]), whole, atol=1e-5
        )
    costs = position_losses(model, ids, labels)
    assert torch.allclose(position_losses(model, ids, labels, batch=2), costs, atol=1e-5)
    by_hand = -whole.log_softmax(-1).gather(-1, ids[..., None])[..., 0].mean(0)
    assert torch.allclose(costs, by_hand, atol=1e-5)


def test_unigram_entropies():
    ids = torch.stack(
        [torch.arange(400) % 4, torch.zeros(400, dtype=torch.int64), (torch.arange(400) % 4 == 0).long()], 1
    )
    assert torch.allclose(
        unigram_entropies(ids, 9),
        torch.tensor([math.log(4), 0.0, -0.25 * math.log(0.25) - 0.75 * math.log(0.75)]),
        atol=1e-5,
    )


def test_three_models_share_their_weights(model):
    """GPT, CachedGPT and ARModel are one network: a state dict of one is one of the others."""
    step = CachedGPT(model.config).eval()
    step.load_state_dict(model.state_dict())
    ids = torch.randint(50, (4, 10))
    with torch.no_grad():
        assert torch.equal(step(ids, LABELS), model(ids, LABELS))
        assert torch.allclose(ar.cached_logits(step, ids, LABELS), model(ids, LABELS), atol=1e-4)


def test_images_by_seeds():
    torch.manual_seed(0)
    tok = FlexTok(
        TokenizerConfig(4, 8, 8, (8, 5, 5, 5), TrunkConfig(64, 1), TrunkConfig(64, 1)),
        VAE(VAEConfig(latent_channels=4, channels=(16,), layers=1, stem=4, groups=4)),
    ).eval()
    writer = ARModel(ARConfig(vocabulary=1000, length=8, classes=3, width=64, depth=1)).eval()
    writer.tokenizer = tokenizer_hash(tok)
    options = dict(steps=1, top_k=50, top_p=0.9, ar_guidance=lambda j: 2.0 if j < 2 else 1.0)
    images = sample_images(writer, tok, LABELS[:3], 4, seeds=[11, 12, 11], **options)
    for i, seed in enumerate((11, 12, 11)):
        assert torch.allclose(
            sample_images(writer, tok, LABELS[i : i + 1], 4, seed=seed, **options)[0], images[i], atol=1e-5
        )
    assert not torch.allclose(images[0], images[1], atol=1e-3)


# --- evaluation: results side by side
# ----------------------------------------------------------------------------------


class Eyes(nn.Module):
    name = "pixels/2x2"

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


def images(n=40, seed=0):
    return ImageSet(
        torch.randint(
            0, 256, (n, 3, 16, 16), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
        ),
        torch.zeros(n, 1, dtype=torch.int64),
        ("all",),
        "test",
    )


class Fade(nn.Module):
    """Stands for a tokenizer: with r of 4 tokens it shows the picture faded by (1 - r/8), plus an error."""

    def __init__(self, error=0.0):
        super().__init__()
        self.register_buffer("error", torch.tensor(error))
        self.token_counts, self.length, self.device = (1, 2, 4), 4, torch.device("cpu")
        self.vae = nn.Identity()
        self.vae.encode, self.vae.decode = (
            (lambda x: x * 0.9),
            (lambda z: z),
        )  # not quite exact: a PSNR of infinity has no error

    def tokenize(self, x, budget=None):  # the ids are the numbers of the pictures
        self.seen = torch.cat([getattr(self, "seen", x[:0]), x])
        return torch.arange(len(self.seen) - len(x), len(self.seen))[:, None].expand(-1, 4)

    def detokenize(self, ids, sampling=None, *, first_index=0, **settings):
        return self.seen[ids[:, 0]] * (ids.shape[1] / 8 + self.error)


CONFIG = EvalConfig(images=40, steps=2, guidance=1.0)


def measured(error=0.0, data=None, **options):
    return evaluation_evaluate.evaluate_tokenizer(
        Fade(error),
        images() if data is None else data,
        images(seed=1),
        Eyes(),
        options.pop("config", CONFIG),
        progress=False,
        **options,
    )


@pytest.fixture(scope="module")
def pair():
    return measured(), measured(0.004)


def test_a_fair_comparison(pair):
    found = compare(*pair)
    assert not found.mismatches("mae") and not found.mismatches(column(Eyes.name))
    gap, error, paired = found.difference("mae", tokens=2)
    by_hand = pair[1].scores["tokens/2/mae"] - pair[0].scores["tokens/2/mae"]
    assert (
        paired
        and math.isclose(gap, by_hand.mean(), rel_tol=1e-4)
        and math.isclose(error, by_hand.std() / 40**0.5, rel_tol=1e-4)
    )
    assert found.best("mae", tokens=2) == 1 and found.best("psnr", tokens=2) == 1, "less error, more decibels"
    assert "not ranked" not in str(found) and "paired" in str(found)
    assert compare(*reversed(pair)).best("mae", tokens=2) == 0


def test_pairs_are_sharper(pair):
    blind = compare(*(replace(r, scores={}) for r in pair))
    gap, error, paired = blind.difference("mae", tokens=2)
    rows = [next(x for x in r.rows if x.get("tokens") == 2) for r in pair]
    assert not paired and math.isclose(error, math.hypot(*(r["mae_se"] for r in rows)), rel_tol=1e-6)
    assert error > 5 * compare(*pair).difference("mae", tokens=2)[1] and blind.best("mae", tokens=2) is None


def test_nothing_against_itself(pair):
    same = compare(pair[0], pair[0])
    assert (
        same.difference("mae", tokens=4)[0] == 0
        and same.best("mae", tokens=4) is None
        and same.best(column(Eyes.name), tokens=4) is None
    )


def other_card(report, **changes):
    card = {**report.card, "weights": dict(report.card["weights"])}
    for name, value in changes.items():
        if "weights." in name:
            card["weights"][name.split(".")[1]] = value
        elif value is None:
            card.pop(name)
        else:
            card[name] = value
    return replace(report, card=card)


@pytest.mark.parametrize(
    "name,value",
    (
        ("data_hash", "0"),
        ("crop", "random"),
        ("image_size", 8),
        ("images", 39),
        ("seed", 1),
        ("steps", 3),
        ("guidance", 2.0),
        ("weights_are", "last"),
        ("steps", None),
    ),
)
def test_what_must_agree(pair, name, value):
    found = compare(pair[0], other_card(pair[1], **{name: value}))
    assert list(found.mismatches("mae")) == [name]
    with pytest.raises(ValueError, match=f"not ranked: {name}"):
        found.best("mae", tokens=2)
    text = str(found)
    assert f"! {name}" in text and "not ranked: " in text
    forced = compare(pair[0], other_card(pair[1], **{name: value}), force=True)
    assert (
        forced.best("mae", tokens=1) == 1 or name in ("data_hash", "images")
    ) and "ranked by force" in str(forced)


def test_only_what_depends_on_it_is_refused(pair):
    key = column(Eyes.name)
    for name, value in (("reference", "others"), ("extractors", ["pixels/3x3"]), ("weights.extractor", "0")):
        found = compare(pair[0], other_card(pair[1], **{name: value}))
        assert found.best("mae", tokens=2) == 1 and list(found.mismatches(key)) == [name]
        with pytest.raises(ValueError, match="not ranked"):
            found.best(key, tokens=2)
    drawn = {
        "ar_guidance": 1.0,
        "samples": 8,
        "temperature": 1.0,
    }  # only a measurement with samples has these
    for name, value in (("ar_guidance", 9.0), ("samples", 3), ("temperature", 0.5)):
        found = compare(other_card(pair[0], **drawn), other_card(pair[1], **drawn | {name: value}))
        assert (
            not found.mismatches("mae")
            and list(found.mismatches(key, "samples")) == [name]
            and f"· {name}" in str(found)
        )
    found = compare(pair[0], other_card(pair[1], steps=7))
    assert not found.mismatches("mae", "VAE alone"), "an autoencoder takes no steps"


def test_other_pictures_are_not_paired(pair):
    other = measured(0.01, images(seed=5))
    found = compare(pair[0], other)
    assert found.difference("mae", tokens=2)[2] is False and "data_hash" in found.mismatches("mae")


def forgets_the_reference(monkeypatch):
    patch(
        monkeypatch,
        evaluation_compare,
        "conditions",
        lambda card, key, what: {
            k: v for k, v in conditions(card, key, what).items() if k not in ("steps", "reference")
        },
    )


def test_a_forgotten_condition_is_caught(pair, monkeypatch):
    forgets_the_reference(monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test_what_must_agree(pair, "steps", 3)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test_only_what_depends_on_it_is_refused(pair)


def test_saved_and_read(pair, tmp_path):
    pair[0].save(tmp_path)
    back = load_report(tmp_path)
    assert back == pair[0] and back == load_report(tmp_path / "table.json")
    assert all(torch.equal(back.scores[k], v.float()) for k, v in pair[0].scores.items())
    assert compare(back, pair[1]).difference("mae", tokens=2) == pytest.approx(
        compare(*pair).difference("mae", tokens=2)
    )
    pair[1].save(tmp_path, "other")
    (tmp_path / "other_scores.safetensors").replace(tmp_path / "table_scores.safetensors")
    with pytest.raises(ValueError, match="does not belong"):
        load_report(tmp_path)
    (tmp_path / "table.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match="no table"):
        load_report(tmp_path)
    with pytest.raises(FileNotFoundError, match="finished run"):
        load_report(tmp_path / "nothing")


def test_old_tables_without_scores(pair, tmp_path):
    pair[0].save(tmp_path)
    (tmp_path / "table_scores.safetensors").unlink()
    assert compare(tmp_path, pair[1]).difference("mae", tokens=2)[2] is False


def test_three_side_by_side(pair):
    found = compare(*pair, measured(-0.01))
    assert found.best("mae", tokens=2) == 1 and "C - A" in str(found)
    with pytest.raises(ValueError, match="2 to 26"):
        compare(pair[0])


def test_the_command(pair, tmp_path, capsys):
    pair[0].save(tmp_path / "a")
    pair[1].save(tmp_path / "b")
    other_card(pair[1], steps=9).save(tmp_path / "c")

    def command(*args, status=0):  # what it prints: to stdout, to stderr
        try:
            apps_measure.compare_main(list(map(str, args)))
            left = 0
        except SystemExit as leave:
            left = leave.code
        assert left == status
        return capsys.readouterr()

    assert "not ranked" not in command(tmp_path / "a", tmp_path / "b").out
    said = command(tmp_path / "a", tmp_path / "c", status=1)
    assert "because steps differ" in said.err and "--force" in said.err
    assert "! steps" in said.out, "the table is printed all the same"
    assert "ranked by force" in command(tmp_path / "a", tmp_path / "c", "--force").out
    assert "usage" in command().out and "usage" in command("--help").out
    assert "2 to 26" in command(tmp_path / "a", status=1).err
    assert "finished run" in command(tmp_path / "a", tmp_path / "none", status=1).err
    assert "--fast" in command(tmp_path / "a", "--fast", status=2).err


def test_the_file_is_as_it_was(pair, tmp_path):
    """Columns and keys of the files that others read."""
    pair[0].save(tmp_path)
    stored = json.loads((tmp_path / "table.json").read_text())
    assert (
        set(stored) == {"format", "notes", "card", "rows"}
        and stored["format"] == "flextok_edu.table"
        and all(row["card"] == pair[0].card for row in stored["rows"])
    )
    assert [r["what"] for r in stored["rows"]] == [
        "originals",
        "real against real",
        "half against half",
        "VAE alone",
        "tokens",
        "tokens",
        "tokens",
    ]
    assert (
        list(stored["rows"][-1])[:3] == ["what", "tokens", "n"]
        and "frechet_pixels_gain_se" in stored["rows"][-1]
    )
    assert Report(pair[0].rows, pair[0].card, pair[0].notes) == pair[0]


@pytest.mark.parametrize("n, batch", ((7, 3), (5, 2), (1, 125)))
def test_scores_in_parts(n, batch):
    """Picture by picture the same as all at once, also where one is left over; unequal shapes are refused."""
    x, y = torch.rand(2, n, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    whole, parts = evaluation_metrics.image_scores(x, y, 1000), evaluation_metrics.image_scores(x, y, batch)
    alone = [evaluation_metrics.image_scores(x[i : i + 1], y[i : i + 1]) for i in range(n)]
    for key in ("mae", "psnr", "ssim"):
        assert parts[key].shape == (n,) and torch.allclose(parts[key], whole[key], atol=1e-6)
        assert torch.allclose(torch.cat([a[key] for a in alone]), whole[key], atol=1e-5) and (
            n == 1 or whole[key].std() > 0
        )
    with pytest.raises(ValueError, match="same size"):
        evaluation_metrics.image_scores(x, y[..., :16])


# --- a number of one's own
# ----------------------------------------------------------------------------------------------


def contrast(output, original):  # both in [0, 1]
    assert output.min() >= 0 and output.max() <= 1 and output.shape == original.shape
    return (output.flatten(1).std(1) - original.flatten(1).std(1)).abs()


def mean_gap(real, found):
    return float((real.mean(0) - found.mean(0)).square().sum())


@pytest.fixture
def registry():
    """What a test registers is gone after it."""
    before = dict(evaluation_metrics.METRICS)
    yield evaluation_metrics.METRICS
    evaluation_metrics.METRICS.clear()
    evaluation_metrics.METRICS.update(before)


def test_a_metric_from_outside(registry, tmp_path):
    """One call, and the number is everywhere: rows, gains, print, csv, figure, comparison, reading."""
    import matplotlib.pyplot as plt

    Metric, register_metric = evaluation_metrics.Metric, evaluation_metrics.register_metric
    register_metric(Metric("contrast", "contrast error", -1, "pictures", contrast, range=(0, 1), digits=5))
    register_metric(Metric("gap", "gap {}", -1, "set", mean_gap, range=(0, math.inf), digits=2))
    one, two = measured(), measured(0.004)
    last, values = one.rows[-1], one.scores["tokens/4/contrast"]
    assert last["contrast"] == pytest.approx(float(values.mean())) and values.shape == (40,)
    assert {"contrast_se", "contrast_gain", "contrast_gain_se", "gap_pixels", "gap_pixels_gain_se"} <= set(
        last
    )
    assert last["contrast_gain"] == pytest.approx(float((one.scores["tokens/2/contrast"] - values).mean()))
    head, *lines = str(one).splitlines()
    assert "contrast error" in head and "gap 1" in head
    assert any(f"  {last['contrast']:.5f} ±" in line for line in lines), lines
    assert any("gap 1: distance in the features of pixels" in line for line in lines)
    one.save(tmp_path)
    assert "contrast_gain" in (tmp_path / "table.csv").read_text().splitlines()[0]
    back = load_report(tmp_path)
    assert back == one and torch.equal(back.scores["tokens/4/contrast"], values)
    found = compare(back, two)
    assert not found.mismatches("contrast") and found.difference("contrast", tokens=2)[2], "paired"
    assert found.best("contrast", tokens=2) == 1 and "contrast, tokens (less is better)" in str(found)
    assert "gap_pixels, tokens (less is better)" in str(found)
    figure = evaluation_report.plot_report(back)
    assert [ax.get_title().split("\n")[0] for ax in figure.axes] == [
        *("MAE", "PSNR (dB)", "contrast error", "Fréchet distance", "gap")
    ]
    plt.close(figure)

    replace(one, rows=one.rows[:-1] + [last | {"contrast": 2.0}]).save(tmp_path)
    with pytest.raises(ValueError, match=r"contrast is 2.0; it must be a number in 0 .. 1"):
        load_report(tmp_path)
    replace(one, rows=one.rows[:-1] + [last | {"contrast": 0.9}]).save(tmp_path)
    with pytest.raises(ValueError, match="does not belong to .*its mean contrast"):
        load_report(tmp_path)
    one.save(tmp_path)

    del registry["contrast"], registry["gap"]  # somebody else reads it, who does not know these numbers
    back = load_report(tmp_path)
    assert back == one and "contrast" not in str(back) and "contrast" not in str(compare(back, two))
    with pytest.raises(ValueError, match="nobody registered a metric 'contrast'"):
        compare(back, two).best("contrast", tokens=2)


def test_attributes_from_outside(registry):
    """A metric of what a classifier reads is a column for each attribute."""
    register_metric = evaluation_metrics.register_metric
    register_metric(
        evaluation_metrics.Metric("off", "{} off", -1, "attributes", lambda read, truth: (read - truth).abs())
    )

    class Dark(nn.Module):
        name, dim, sizes = "dark", 3, {"dark": 2, "red": 2}

        def read(self, x):
            return torch.stack([x.mean((1, 2, 3)) < 0, x[:, 0].mean((1, 2)) > 0], 1).long()

        def features(self, x):
            return x.mean((2, 3))

    data = images()
    reader = Dark()
    truth = reader.read(data.images.float() / 127.5 - 1)
    report = measured(data=replace(data, labels=truth), reader=reader)
    assert report.rows[0]["acc_dark"] == 1 and report.rows[0]["off_red"] == 0
    last = report.rows[-1]
    assert last["off_red"] == pytest.approx(1 - last["acc_red"]) and "frechet_dark" in last
    assert "red off" in str(report) and report.card["extractors"] == ["dark/means", Eyes.name]


def test_names_of_metrics(registry):
    """A name that could be taken for another column is refused; the same metric again is none."""
    Metric, register_metric = evaluation_metrics.Metric, evaluation_metrics.register_metric
    assert register_metric(registry["mae"]) is registry["mae"]
    for name in ("tokens", "card", "mae_se", "x_gain", "a b", "", "psnr", "acc", "acc_kind", "frechet_x"):
        with pytest.raises(ValueError, match="taken|cannot be a column"):
            register_metric(Metric(name, "x", 1, "pictures", contrast))
    register_metric(Metric("far_out", "x", 1, "pictures", contrast))
    with pytest.raises(ValueError, match="taken by far_out"):
        register_metric(Metric("far", "x {}", 1, "set", mean_gap))
    with pytest.raises(ValueError, match="larger is better"):
        Metric("x", "x", 2, "pictures", contrast)
    with pytest.raises(ValueError, match="of pictures, of a set"):
        Metric("x", "x", 1, "picture", contrast)
    metric_of, better = evaluation_metrics.metric_of, evaluation_metrics.better
    assert metric_of("frechet_a_b").name == "frechet" and metric_of("acc_kind").name == "acc"
    assert not any(map(metric_of, ("mae_se", "mae_gain", "frechet_x_se", "n", "frechet", "what", "")))
    assert (better("mae"), better("psnr"), better("acc_x"), better("frechet_x")) == (-1, 1, 1, -1)
    register_metric(Metric("whole", "x", 1, "pictures", lambda a, b: (a - b).mean()))
    with pytest.raises(ValueError, match="whole gave"):
        measured()


# --- what is known of a tokenizer
# ----------------------------------------------------------------------------------------


class Plain:
    """The protocol, and nothing else: no module, no configuration, no VAE, one length only."""

    kind, identity, vocabulary, length, token_counts, image_size = "plain", "abc", 256, 3, (3,), 16
    device, vae = torch.device("cpu"), None

    def tokenize(self, images, budget=None):
        return ((images.mean((2, 3)) + 1) * 127.5).round().long()[:, :budget]

    def detokenize(self, ids, sampling=None, *, first_index=0, **settings):
        self.told = sampling, first_index
        return (ids / 127.5 - 1)[:, :, None, None].expand(-1, 3, 16, 16)


def test_the_protocol_is_enough(tmp_path):
    """No row for a VAE that there is not, one row for one length; the identity stands for the weights."""
    tok = Plain()
    report = evaluation_evaluate.evaluate_tokenizer(
        tok, images(), None, Eyes(), CONFIG, seed=5, batch=15, progress=False
    )
    assert [row["what"] for row in report.rows] == ["originals", "half against half", "tokens"]
    assert report.card["weights"]["tokenizer"] == "abc" and "vae" not in report.card["weights"]
    sampling, first = tok.told
    assert (sampling.steps, sampling.guidance, sampling.seed, first) == (2, 1.0, 5, 30)
    report.save(tmp_path)
    assert load_report(tmp_path) == report and compare(report, tmp_path).best("mae", tokens=3) is None


def test_settings_by_name():
    """One object or keywords; what is no setting is refused, and not swallowed."""
    m = evaluation_evaluate.Measurement(Eyes(), CONFIG, runtime=Runtime(seed=3))
    assert m.with_settings({"seed": 4}).runtime.seed == 4 and m.with_settings({"batch": 7}).runtime.seed == 3
    assert m.with_settings({"progress": False}).runtime == Runtime(seed=3, progress=False)
    with pytest.raises(TypeError, match="no setting 'guidance'"):
        measured(guidance=2.0)
    one = evaluation_evaluate.measure_tokenizer(Fade(), images(), None, m)
    two = measured(runtime=Runtime(seed=3, progress=True), other_is="nothing")
    assert one.card["seed"] == two.card["seed"] == 3 and one.rows[-1] == two.rows[-1]
