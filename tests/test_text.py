"""An AR model that is asked by text: what it reads, what it must not read, and every way of computing it."""

import copy
import json
from dataclasses import asdict, replace

import pytest
import torch
from planting import planted, randomize

import flextok_edu.text as text_module
from flextok_edu.apps.cost import ar_parameters
from flextok_edu.apps.options import override
from flextok_edu.ar import ARModel, cached_logits, load_ar, save_ar
from flextok_edu.ar_training import Tokens, position_losses, token_batches, train_ar
from flextok_edu.engine.conditions import TextFeatures, count, join, take
from flextok_edu.engine.config import AR_SIZES, ARConfig, StageConfig, TextConfig, preset
from flextok_edu.engine.files import weights_hash
from flextok_edu.engine.graphs import Graphs, OpRecorder
from flextok_edu.engine.limits import check_limits, from_dict
from flextok_edu.engine.settings import ARStyle
from flextok_edu.engine.writing import Writer
from flextok_edu.text import Captioned, CrossAttention, TextBlock, read_texts, text_config

TEXT = TextConfig("toy", "0123456789abcdef", 24, 10)
CONFIG = ARConfig(vocabulary=50, length=8, classes=0, width=64, depth=2, head_dim=32, text=TEXT)


def features(*lengths, seed=0, pad=None, width=24) -> TextFeatures:
    "Texts of these lengths; whatever stands in padding is large."
    longest = pad or max(lengths)
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(len(lengths), longest, width, generator=g)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]
    return TextFeatures(torch.where(mask[..., None], x, 100.0), mask)


def model(config=CONFIG, seed=0) -> ARModel:
    torch.manual_seed(seed)
    ar = randomize(ARModel(config), 0.2).eval()
    if config.text:
        ar.text.set_null(features(2, seed=9))
    return ar


IDS = torch.randint(50, (3, 8), generator=torch.Generator().manual_seed(1))
ASKED = features(6, 3, 5)


# --- what a text changes -------------------------------------------------------------------------


@torch.no_grad()
def text_is_read():
    ar, other = model(), features(6, 3, 5, seed=2)
    assert (ar(IDS, ASKED) - ar(IDS, other)).abs().amax((1, 2)).min() > 1e-2, (
        "every text counts, from token 0 on"
    )
    assert (ar(IDS, ASKED) - ar(IDS, other))[:, 0].abs().max() > 1e-2


@torch.no_grad()
def padding_is_not_read():
    ar = model()
    plain, other = ar(IDS, ASKED), ASKED.features.clone()
    other[~ASKED.mask] = -7.0
    longer = features(6, 3, 5, pad=10)
    longer.features[:, :6][ASKED.mask] = ASKED.features[ASKED.mask]
    assert torch.allclose(ar(IDS, TextFeatures(other, ASKED.mask)), plain, atol=1e-5)
    assert torch.allclose(ar(IDS, longer), plain, atol=1e-4)


@torch.no_grad()
def neighbours_do_not_count():
    ar = model()
    whole = ar(IDS, ASKED)
    for i in range(3):
        assert torch.allclose(ar(IDS[i : i + 1], take(ASKED, [i]))[0], whole[i], atol=1e-4)


@torch.no_grad()
def hidden_texts_are_the_empty_one():
    ar, hidden = model(), torch.tensor([True, False, True])
    nothing = ar.condition.without(ASKED)
    assert count(nothing) == 3 and torch.equal(nothing.mask.sum(1), torch.tensor([2, 2, 2]))
    mixed = ar(IDS, ar.condition.without(ASKED, hidden))
    empty = ar(IDS, join(features(2, 2, seed=9), features(2, seed=9)))
    assert torch.allclose(mixed[1], ar(IDS, ASKED)[1], atol=1e-5)
    assert torch.allclose(mixed[[0, 2]], ar(IDS, nothing)[[0, 2]], atol=1e-5)
    one = TextFeatures(features(2, seed=9).features.expand(3, -1, -1), torch.ones(3, 2, dtype=torch.bool))
    assert torch.allclose(ar(IDS, one), ar(IDS, nothing), atol=1e-4) and empty.shape == mixed.shape


def reads_padding(monkeypatch):
    real = CrossAttention.read

    def read(self, text, mask):
        return real(self, text, torch.ones_like(mask))

    monkeypatch.setattr(CrossAttention, "read", read)


def reads_the_neighbour(monkeypatch):
    real = CrossAttention.read
    monkeypatch.setattr(
        CrossAttention, "read", lambda self, text, mask: real(self, text.roll(1, 0), mask.roll(1, 0))
    )


def reads_nothing(monkeypatch):
    monkeypatch.setattr(CrossAttention, "forward", lambda self, x, seen: torch.zeros_like(x))


def hides_the_others(monkeypatch):
    real = text_module.TextCondition.without

    def without(self, cond, hidden=None):
        return real(self, cond, None if hidden is None else ~hidden)

    monkeypatch.setattr(text_module.TextCondition, "without", without)


test_reading, test_reading_bugs = planted(
    [
        (text_is_read, reads_nothing),
        (padding_is_not_read, reads_padding),
        (neighbours_do_not_count, reads_the_neighbour),
        (hidden_texts_are_the_empty_one, hides_the_others),
    ]
)


# --- the ways of computing it ----------------------------------------------------------------------


@torch.no_grad()
def test_cached_steps_are_the_full_pass():
    ar = model()
    assert (cached_logits(ar, IDS, ASKED) - ar(IDS, ASKED)).abs().max() < 1e-4


@pytest.mark.parametrize("guidance", (1.0, 3.0))
def test_recorded_and_flat_and_continued(guidance):
    """One list, whoever writes it; a list that is continued; a sample alone."""
    ar = model()
    ar.flat.enabled = False
    plain = ar.generate(ASKED, guidance=guidance, seed=3)
    assert torch.equal(ar.generate(ASKED, guidance=guidance, seed=3, prefix=plain[:, :3]), plain)
    assert torch.equal(ar.generate(take(ASKED, [1]), guidance=guidance, seed=3, first_index=1), plain[1:2])
    ar.flat.enabled = True
    assert torch.equal(ar.generate(ASKED, guidance=guidance, seed=3), plain), "flat"
    ar.writer = Writer(Graphs(True, recorder=OpRecorder()))
    for _ in range(3):
        assert torch.equal(ar.generate(ASKED, guidance=guidance, seed=3), plain), "recorded"
    other = features(4, 4, 6, seed=5)
    recorded = ar.generate(other, guidance=guidance, seed=3, prefix=plain[:, :2])
    assert not ar.writer.graphs.refused
    ar.writer = Writer(Graphs(False))
    assert torch.equal(ar.generate(other, guidance=guidance, seed=3, prefix=plain[:, :2]), recorded)


def test_copies_and_files(tmp_path):
    ar = model()
    ar.tokenizer = "0" * 16
    save_ar(tmp_path / "ar", ar)
    again, facts = load_ar(tmp_path / "ar")
    assert again.config == CONFIG and facts["config"]["text"]["identity"] == TEXT.identity
    assert weights_hash(again) == weights_hash(ar) == weights_hash(copy.deepcopy(ar))
    assert torch.equal(again.generate(ASKED, guidance=2.0), ar.generate(ASKED, guidance=2.0))


def test_gradients_reach_every_weight():
    ar = model().train()
    loss, _ = ar.loss(IDS, ASKED, torch.tensor([False, True, False]))
    loss.backward()
    assert not [name for name, w in ar.named_parameters() if w.grad is None or not w.grad.abs().sum()]


def test_it_is_as_large_as_its_formula():
    """16 width² depth and the norms, counted in a small model; the tables beside it."""
    for c in (CONFIG, replace(CONFIG, depth=3), replace(CONFIG, text=None, classes=5, null="nothing")):
        found = ar_parameters(c)
        assert sum(w.numel() for w in ARModel(c).parameters()) == sum(found.values())
    for c in AR_SIZES.values():
        assert abs(ar_parameters(c)["blocks"] / ((16 if c.text else 12) * c.width**2 * c.depth) - 1) < 5e-4
    assert isinstance(ARModel(CONFIG).blocks[0], TextBlock)


# --- what it is trained on ---------------------------------------------------------------------------


class Told:
    "A table of captions, without an encoder."

    encoder, identity, width, length = "toy", TEXT.identity, 24, 10

    def __init__(self, pictures: int):
        self.pictures = pictures

    def __len__(self) -> int:
        return self.pictures

    def features(self, rows, variants=None, length=None) -> TextFeatures:
        x = torch.zeros(len(rows), 3, 24)
        x[:, 0, 0], x[:, 1, 1] = rows.float(), 0.0 if variants is None else (variants % 4).float()
        return TextFeatures(x, torch.ones(len(rows), 3, dtype=torch.bool))

    @property
    def null(self) -> TextFeatures:
        return TextFeatures(torch.full((1, 2, 24), -1.0), torch.ones(1, 2, dtype=torch.bool))


class Tok:
    "What a training asks of a tokenizer."

    vocabulary, length, identity, kind = 50, 8, "a" * 16, "toy"


def tokens(n: int = 20) -> Tokens:
    ids = torch.randint(50, (n, 8), generator=torch.Generator().manual_seed(4))
    return Tokens(ids, torch.zeros(n, dtype=torch.int64), ("all",))


def test_captions_stay_with_their_pictures():
    data = Captioned(tokens(), Told(20), torch.tensor([3, 5, 7, 11, 19]))
    assert len(data) == 5 and text_config(data.captions) == TEXT
    stream, variants = token_batches(data, 4, 0.5, seed=1, text=True), set()
    for step in range(10):
        rows, (ids, cond, hidden) = stream.rows(step), next(stream)
        assert torch.equal(ids, data.tokens.all[data.rows[rows]])
        assert torch.equal(cond.features[:, 0, 0].long(), data.rows[rows]), "the caption of this picture"
        variants |= set(cond.features[:, 1, 1].tolist())
        assert hidden.dtype == torch.bool
    assert variants == {0.0, 1.0, 2.0, 3.0}, "each of its captions comes"


def test_batches_have_few_lengths():
    """A GPU records a step for each length: texts are padded to multiples of eight."""

    class Long(Told):
        length = 30

        def features(self, rows, variants=None, length=None) -> TextFeatures:
            most = int(variants.max())  # of this batch
            return TextFeatures(
                torch.ones(len(rows), most, 24), torch.ones(len(rows), most, dtype=torch.bool)
            )

    data, rows, found = Captioned(tokens(), Long(20)), torch.arange(4), set()
    for most in range(2, 31):
        cond = data.text(rows, torch.full((4,), most))
        assert int(cond.mask[0].sum()) == most, "what is added is no text"
        found.add(cond.mask.shape[1])
    assert found == {8, 16, 24, 30}


def test_a_training_learns_what_the_text_says():
    """Each picture's ids follow from its caption: with it they are predicted, without it they are not."""
    torch.manual_seed(0)
    n = 8
    data = Captioned(tokens(n), Told(n))
    p = replace(
        preset("micro"), ar=CONFIG, train_ar=StageConfig(steps=150, batch=32, lr=3e-3, ema=0.0, warmup=5)
    )
    ar, log = train_ar(data, Tok(), p, progress=False)
    assert ar.text.knows_null and torch.equal(ar.text.null_features[:2], Told(n).null.features[0])
    rows = torch.arange(n)
    told = position_losses(ar, data.ids(rows), data.text(rows, rows * 0))[0]
    nothing = position_losses(ar, data.ids(rows), ar.condition.without(data.text(rows, rows * 0)))[0]
    assert told < 0.5 < 1.0 < nothing, (told, nothing)


# --- what is refused ----------------------------------------------------------------------------------


def test_nonsense_is_refused():
    ar = model()
    for cond, words in (
        (torch.tensor([0]), "asked by text"),
        (features(3, width=23), "width 24"),
        (features(11), "at most 10 positions"),
        ([1, 2], "TextFeatures"),
        (TextFeatures(torch.zeros(1, 3, 24), torch.ones(1, 4, dtype=torch.bool)), "mask"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            ar.generate(cond)
    with pytest.raises(ValueError, match="set_null"):
        ARModel(CONFIG).generate(ASKED)
    with pytest.raises(ValueError, match="classes or a text encoder"):
        from_dict(ARConfig, json.loads(json.dumps({"classes": 3, "text": {"encoder": "toy"}})))
    with pytest.raises(TypeError, match="a list of prompts"):
        read_texts(ar, "a red boat")
    for bad, words in (({"heads": 4, "kv_heads": 3}, "kv_heads 3"), ({"rope": 1e4, "head": 31}, "is odd")):
        head = bad.pop("head", 32)
        with pytest.raises(ValueError, match=words):
            check_limits(replace(CONFIG, width=2 * head, head_dim=head, style=ARStyle(**bad)))
    with pytest.raises(ValueError, match="by class"):
        read_texts(model(replace(CONFIG, text=None, classes=2)), ["a boat"])

    class Other:
        name, identity, length = "other", "f" * 16, 10

    with pytest.raises(ValueError, match="other"):
        read_texts(ar, ["a boat"], Other())
    p = replace(preset("micro"), ar=CONFIG)
    with pytest.raises(ValueError, match="captions encoded by toy"):
        train_ar(tokens(), Tok(), p, progress=False)
    with pytest.raises(ValueError, match="the captions are"):
        train_ar(
            Captioned(tokens(), Told(20)), Tok(), replace(p, ar=replace(CONFIG, text=replace(TEXT, width=25)))
        )
    with pytest.raises(ValueError, match="do not belong together"):
        Captioned(tokens(), Told(19))


@pytest.mark.parametrize(
    "prefix",
    (torch.zeros(2, 1, dtype=torch.int64), torch.full((3, 1), 50), torch.zeros(3, 9, dtype=torch.int64)),
)
def test_a_prefix_that_cannot_be(prefix):
    with pytest.raises(ValueError, match="prefix"):
        model().generate(ASKED, prefix=prefix)


def test_configurations_that_may_be_there_come_back():
    """A preset as run.json keeps it; a size by name; there and away again."""
    p = preset("tiny")
    text = override(p, {"ar": "382M-text"})
    assert text.ar.text.width == 2048 and (text.ar.vocabulary, text.ar.length) == (1000, 32)
    kept = json.loads(json.dumps(asdict(text.ar)))
    assert (
        override(p, {"ar": kept}) == text
        and override(text, {"ar": json.loads(json.dumps(asdict(p.ar)))}) == p
    )
    with pytest.raises(ValueError, match="382M-text"):
        override(p, {"ar": "382M"})


def test_features_of_another_type():
    """A model in half precision, and features as encoders give them."""
    half = model().to(torch.bfloat16)
    assert half(IDS, ASKED).dtype == torch.bfloat16
    assert half.generate(ASKED, 3, guidance=2.0).shape == (3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert model().generate(ASKED, 3, guidance=2.0).shape == (3, 3)
