"""What stands on a card was done, what nobody said is unknown; evaluation sees an even spread and keeps no
pictures (evaluation).
"""

import os
import subprocess
import sys
import weakref
from dataclasses import replace

import numpy as np
import pytest
from planting import patch
import torch
from PIL import Image
from torch import nn

import flextok_edu.engine.tensors as engine_tensors
import flextok_edu.evaluation.evaluate as evaluation_evaluate
import flextok_edu.evaluation.metrics as evaluation_metrics
import flextok_edu.evaluation.report as evaluation_report
from flextok_edu.engine.config import EvalConfig, preset
from flextok_edu.data.datasets import ImageSet
from flextok_edu.data.folders import evenly, read_squares
from flextok_edu.data.keys import picture_keys
from flextok_edu.data.learned import Learned
from flextok_edu.evaluation.compare import compare
from flextok_edu.evaluation.evaluate import LEFT_OVER, evaluate_tokenizer
from flextok_edu.evaluation.report import PERCEPTUAL, UNKNOWN, make_card, trained_how

CONFIG = EvalConfig(images=40, steps=2, guidance=1.0)


class Eyes(nn.Module):
    name = "pixels/2x2"

    def forward(self, images):
        return nn.functional.adaptive_avg_pool2d(images, 2).flatten(1)


class Half(nn.Module):
    """Stands for a tokenizer of 4 tokens that shows every picture in grey, a bit lighter with each token. It
    knows its living pictures.
    """

    def __init__(self):
        super().__init__()
        self.token_counts, self.length, self.device = (1, 2, 4), 4, torch.device("cpu")
        self.vae = nn.Identity()
        self.vae.encode, self.vae.decode = (lambda x: x * 0.9), self.shown
        self.alive, self.most = 0, 0

    def shown(self, pictures):
        self.alive += len(pictures)
        self.most = max(self.most, self.alive)
        weakref.finalize(pictures, self.gone, len(pictures))
        return pictures

    def gone(self, count):
        self.alive -= count

    def tokenize(self, x, budget=None):
        return torch.zeros(len(x), 4, dtype=torch.int64)

    def detokenize(self, ids, sampling=None, *, first_index=0, **settings):
        return self.shown(torch.rand(len(ids), 3, 16, 16) * ids.shape[1] / 8)


def in_order(classes, each, seed=0):
    """A set in the order of its classes, each of its own brightness, as a folder is read."""
    noise = torch.randint(0, 20, (classes * each, 3, 16, 16), generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(classes).repeat_interleave(each)
    images = (noise + labels[:, None, None, None] * 200 // classes).to(torch.uint8)
    return ImageSet(images, labels[:, None], tuple(map(str, range(classes))), "in order")


def measured(data, other=None, config=CONFIG, **options):
    return evaluate_tokenizer(Half(), data, other, Eyes(), config, progress=False, **options)


# --- which pictures
# -------------------------------------------------------------------------------------------------


def test_an_even_spread_is_measured():
    """Forty of four hundred pictures in the order of ten classes: four of each, not forty of the first."""
    data = in_order(10, 40)
    chosen = evenly(list(range(400)), 40)
    few, rest = evaluation_evaluate.measured_and_rest(data, 40, 1000)
    assert few.labels[:, 0].bincount().tolist() == [4] * 10 and len(rest) == 360
    assert (
        measured(data).card["data_hash"]
        == replace(data, images=data.images[chosen], labels=data.labels[chosen]).hash
    )
    whole, nothing = evaluation_evaluate.measured_and_rest(data, 400, 1000)
    assert whole is data and len(nothing) == 0
    some = evaluation_evaluate.measured_and_rest(data, 40, 20)[1]
    assert some.labels[:, 0].bincount().tolist() == [2] * 10 and not set(
        map(bytes, some.images.numpy())
    ) & set(map(bytes, few.images.numpy()))


def test_the_floor_sees_all_classes():
    """Other pictures in the order of their classes: the floor is as low as for a shuffled set, not as high as
    for one class.
    """
    data, other = in_order(10, 4), in_order(10, 40, seed=1)
    order = torch.randperm(400, generator=torch.Generator().manual_seed(0))

    def floor(some):
        return next(
            r["frechet_pixels"]
            for r in measured(data, some, other_is="training pictures").rows
            if r["what"] == "real against real"
        )

    mixed, first = replace(other, images=other.images[order]), replace(other, images=other.images[:40])
    assert floor(other) < 1.5 * floor(mixed) and floor(first) > 5 * floor(other), (
        floor(other),
        floor(mixed),
        floor(first),
    )


def test_the_floor_is_held_out_where_it_can_be():
    """What is left over is better than anything a caller may bring; what a caller brings is named; nothing is
    said of what nobody knows.
    """
    plenty, few, other = in_order(10, 8), in_order(10, 7), in_order(10, 4, seed=1)
    assert measured(plenty, other, other_is="training pictures").card["floor"] == LEFT_OVER
    assert measured(few, other, other_is="training pictures").card["floor"] == "training pictures"
    assert measured(few, other).card["floor"] == UNKNOWN
    alone = measured(few)
    assert alone.card["floor"].startswith("none") and not any(
        r["what"] == "real against real" for r in alone.rows
    )
    assert "real against real: training pictures" in str(measured(few, other, other_is="training pictures"))
    assert "real against real: held-out pictures" in str(measured(plenty))


def test_no_pictures_are_kept(monkeypatch):
    """Bytes become floats a batch at a time, and a reconstruction lives until the next batch has been looked
    at.
    """
    largest, real = [], engine_tensors.from_uint8
    patch(monkeypatch, engine_tensors, "from_uint8", lambda x: largest.append(len(x)) or real(x))
    data, tok = in_order(10, 20), Half()
    report = evaluate_tokenizer(
        tok, data, in_order(10, 20, seed=1), Eyes(), EvalConfig(images=200, steps=1), batch=10, progress=False
    )
    assert max(largest) <= 125 and sum(r["what"] == "tokens" for r in report.rows) == 3, (
        "the floor's features take 125 at a time"
    )
    assert tok.most <= 20, f"{tok.most} reconstructions of 200 lived at once"


@pytest.mark.parametrize("side, most", ((32, 125), (64, 125), (128, 31), (256, 7)))
def test_scores_take_as_much_memory_whatever_the_size(side, most, monkeypatch):
    """SSIM of 125 pictures of 256 px would take 4 GB: there are fewer at a time."""
    import torchmetrics.functional.image as metrics

    seen = []
    monkeypatch.setattr(
        metrics,
        "structural_similarity_index_measure",
        lambda a, b, **how: seen.append(len(a)) or torch.zeros(len(a)),
    )
    x = torch.zeros(130, 3, side, side)
    evaluation_metrics.image_scores(x, x)
    assert max(seen) == most and sum(seen) == 130


def test_batches_change_nothing():
    data = in_order(10, 4)

    class Mirror(Half):
        def tokenize(self, x, budget=None):
            return (x[:, 0, 0, :4] * 100).long()

        def detokenize(self, ids, sampling=None, **more):
            return (ids.float().mean(1) / 100)[:, None, None, None].expand(-1, 3, 16, 16) * 1.0

    one, two = (
        evaluate_tokenizer(Mirror(), data, None, Eyes(), CONFIG, batch=b, progress=False) for b in (40, 7)
    )
    assert one.card == two.card
    for a, b in zip(one.rows, two.rows):
        assert a.keys() == b.keys() and all(
            a[k] == pytest.approx(b[k], rel=1e-5, abs=1e-6) for k in a if isinstance(a[k], float)
        )


# --- what a card says
# -----------------------------------------------------------------------------------------------


def averaged(p, ema, *parts):
    return replace(p, **{f"train_{part}": replace(getattr(p, f"train_{part}"), ema=ema) for part in parts})


def test_how_the_models_were_trained():
    """From the presets they were trained with: micro's VAE had EfficientNet and a critic, tiny's nothing but
    pixels; averages where there were some.
    """
    micro, tiny = preset("micro"), preset("tiny")
    assert trained_how(vae=micro, tokenizer=micro) == {
        "weights_are": "EMA",
        "vae_trained_against": f"{PERCEPTUAL} and a critic",
    }
    assert trained_how(vae=tiny, tokenizer=tiny)["vae_trained_against"] == "nothing but pixels"
    critic = replace(tiny, vae_loss=replace(tiny.vae_loss, adversarial=0.1, adversarial_start=0.5))
    assert trained_how(vae=critic)["vae_trained_against"] == "a critic"
    assert (
        trained_how(vae=replace(critic, vae_loss=replace(critic.vae_loss, perceptual=1.0)))[
            "vae_trained_against"
        ]
        == f"{PERCEPTUAL} and a critic"
    )
    assert (
        trained_how(vae=replace(critic, vae_loss=replace(critic.vae_loss, adversarial_start=1.0)))[
            "vae_trained_against"
        ]
        == "nothing but pixels"
    )
    last = averaged(micro, 0.0, "vae", "tokenizer")
    assert trained_how(vae=last, tokenizer=last)["weights_are"] == "of the last step"
    assert trained_how(vae=last, tokenizer=micro)["weights_are"] == "vae of the last step, tokenizer EMA"
    assert (
        trained_how(vae=None, tokenizer=None)
        == trained_how()
        == {"weights_are": "unknown", "vae_trained_against": "unknown"}
    )
    assert "unknown" in trained_how(vae=None, tokenizer=micro)["weights_are"]


def test_the_perceptual_features_are_those():
    """The card names the blocks that the loss reads by default."""
    import inspect
    from flextok_edu.data.features import Lite0

    after = inspect.signature(Lite0.maps).parameters["after"].default
    assert PERCEPTUAL == f"{Lite0.name.split('/')[0]} blocks {' and '.join(map(str, after))}"


def test_nothing_is_assumed():
    """A card that nobody helped knows neither crop nor training, and has no conditions of samples that were
    not drawn.
    """
    card = measured(in_order(10, 4)).card
    assert card["weights_are"] == card["vae_trained_against"] == "unknown" and card["crop"].startswith(
        "unknown"
    )
    assert card["learned"] == {"vae": UNKNOWN, "tokenizer": UNKNOWN}
    assert not {"samples", "ar_guidance", "temperature"} & set(card)
    known = make_card(
        in_order(2, 4),
        [Eyes()],
        CONFIG,
        0,
        {"learned": {"vae": {"rule": "one in eight", "count": 7}}, "device": "cpu"},
        vae=nn.Linear(1, 1),
        tokenizer=nn.Linear(1, 1),
        ar=nn.Linear(1, 1),
        extractor=Eyes(),
    )
    assert (
        known["learned"] == {"vae": {"rule": "one in eight", "count": 7}, "tokenizer": UNKNOWN, "ar": UNKNOWN}
        and known["device"] == "cpu"
    )
    assert known["samples"] == CONFIG.samples and set(known["weights"]) == {
        "vae",
        "tokenizer",
        "ar",
        "extractor",
    }
    scenes = replace(in_order(2, 4), scenes=True)
    assert make_card(scenes, [Eyes()], CONFIG, 0)["crop"] == "as rendered"


def test_learned_is_laid_side_by_side(tmp_path):
    """What the parts learned from survives a file, and a comparison shows where it differs, without refusing
    to rank.
    """
    data = in_order(10, 4)
    one, two = (
        measured(
            data, facts={"learned": {"vae": {"rule": rule, "count": 5}, "tokenizer": "unknown: no record"}}
        )
        for rule in ("scenes", "one in eight")
    )
    one.save(tmp_path)
    assert evaluation_report.load_report(tmp_path) == one
    found = compare(tmp_path, two)
    assert (
        "· learned.vae.rule" in str(found)
        and "learned.vae.count" not in str(found)
        and not found.mismatches("mae")
    )


# --- a folder divided by a model's record
# ---------------------------------------------------------------------------


def a_folder(place, count=12):
    """Pictures by name; 10.png has the pixels of 0.png in another file, 11.png is the same file as 5.png."""
    place.mkdir()
    for i in range(count - 2):
        Image.fromarray(np.random.default_rng(i).integers(0, 255, (16, 16, 3), np.uint8)).save(
            place / f"{i}.png"
        )
    with Image.open(place / "0.png") as image:
        image.save(place / "10.png", compress_level=0)
    (place / "11.png").write_bytes((place / "5.png").read_bytes())
    return place


def test_split_by_record(tmp_path):
    """What is not on the list was held out; a file with the pixels of a learned one counts as learned; equal
    pictures count once; the order is the seed's.
    """
    place = a_folder(tmp_path / "photos")
    keys = picture_keys([place / f"{i}.png" for i in (10, 3, 4)]).sort().values  # 10.png, and not 0.png
    learned = Learned("by hand", "three files", 3, "0", keys)
    train, val = evaluation_evaluate.split_by_record(place, 8, learned, progress=False)

    def names(part):
        return {bytes(x.numpy()) for x in part.images}

    whole = {
        i: bytes(x.numpy())
        for i, x in enumerate(read_squares([place / f"{i}.png" for i in range(12)], 8, False)[0])
    }
    assert (
        names(train) == {whole[i] for i in (0, 3, 4)}
        and len(train) == 3
        and names(val) == {whole[i] for i in (1, 2, 5, 6, 7, 8, 9)}
        and len(val) == 7
    )
    assert (
        val.rule == "by hand"
        and val.labels.shape == (7, 1)
        and "7 of 10 different pictures in 12 files" in val.source
    )
    other = evaluation_evaluate.split_by_record(place, 8, learned, seed=1, progress=False)[1]
    assert names(other) == names(val) and not torch.equal(other.images, val.images)
    with pytest.raises(ValueError, match="no list"):
        evaluation_evaluate.split_by_record(place, 8, replace(learned, keys=None), progress=False)
    with pytest.raises(ValueError, match="one side would be empty"):
        evaluation_evaluate.split_by_record(place, 8, replace(learned, keys=torch.arange(3)), progress=False)


# --- labels are text
# --------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error::UserWarning")  # matplotlib's, of a glyph that it does not have
@pytest.mark.parametrize(
    "name", ("$5_to_$10/x", "\\frac{/x", "a^{b_$c$", "中文/x", "caf\udce9/x", "two\nlines/x")
)
def test_names_of_extractors_are_text(name, tmp_path, monkeypatch):
    """In the figure, in the table and in a comparison: no mathematics, no line of its own, nothing that
    cannot be written.
    """
    import matplotlib.pyplot as plt

    monkeypatch.setattr(Eyes, "name", name)
    report = measured(in_order(10, 4))
    figure = evaluation_report.plot_report(report)
    figure.savefig(tmp_path / "quality.png")
    titles = [ax.title for ax in figure.axes]
    assert not any(t.get_parse_math() for t in titles) and any(
        "x" in t.get_text() or "c$" in t.get_text() for t in titles
    )
    plt.close(figure)
    for text in (str(report), str(compare(report, report))):
        text.encode("utf-8")
        assert "two\nlines" not in text


def test_one_score_is_drawn_too():
    import matplotlib.pyplot as plt

    report = measured(in_order(10, 4))
    rows = [{k: v for k, v in row.items() if k in ("what", "tokens", "n", "mae")} for row in report.rows]
    plt.close(evaluation_report.plot_report(replace(report, rows=rows)))
    with pytest.raises(ValueError, match="nothing to draw"):
        evaluation_report.plot_report(replace(report, rows=rows[:1]))


@pytest.mark.parametrize("encoding", ("ascii", "cp437", "cp932", "latin-1"))
def test_compare_on_any_terminal(encoding, tmp_path):
    """flextok_compare says what it found, whatever the terminal can show and the folder is called."""
    replace(measured(in_order(10, 4)), scores={}).save(tmp_path / "caf\u00e9")
    there = os.fsencode(tmp_path) + b"/b\xe9d"
    try:
        os.rename(tmp_path / "caf\u00e9", there)
    except (OSError, UnicodeError):
        pytest.skip("this file system cannot hold the name")
    run = (
        "import sys; from flextok_edu.apps.measure import compare_main; sys.argv = ['flextok_compare', "
        "*sys.argv[1:]]; compare_main()"
    )
    found = subprocess.run(
        [sys.executable, "-c", run, there, there],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        timeout=120,
    )
    assert found.returncode == 0 and b"mae, tokens" in found.stdout, found.stderr[-500:]
