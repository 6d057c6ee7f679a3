"""What a distance is held against stands on its card, and nothing is ranked across references; settings are
chosen on one half of the pictures and reported on the other.
"""

import json
import math
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from planting import patch
from torch import nn

import flextok_edu.evaluation.compare as evaluation_compare
import flextok_edu.evaluation.evaluate as evaluation_evaluate
import flextok_edu.evaluation.references as references
import flextok_edu.evaluation.rows as evaluation_rows
import flextok_edu.evaluation.surface as evaluation_surface
import flextok_edu.evaluation.sweep as evaluation_sweep
from flextok_edu.data.datasets import ImageSet
from flextok_edu.engine.config import EvalConfig
from flextok_edu.evaluation.compare import compare, incomparable
from flextok_edu.evaluation.distances import Moments
from flextok_edu.evaluation.entries import open_asked
from flextok_edu.evaluation.evaluate import Measurement, evaluate_tokenizer, references_of
from flextok_edu.evaluation.references import KnownReference, REFERENCES, facts_of, register_reference
from flextok_edu.evaluation.references import stated_reference, statistics_of
from flextok_edu.evaluation.report import load_report
from flextok_edu.evaluation.rows import HALVES
from flextok_edu.evaluation.surface import draw_surface, load_cells, run_sweep
from flextok_edu.evaluation.sweep import Cell, Surface, Sweep, parse_axes, split_halves
from flextok_edu.evaluation.sweep import chosen_facts, chosen_text

TODAY = EvalConfig(images=60, samples=20, steps=2, guidance=1.0)


class Thumbnails(nn.Module):
    name = "pixels/2x2"

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images):
        x = images.float() / 127.5 - 1 if images.dtype == torch.uint8 else images
        return nn.functional.adaptive_avg_pool2d(x * self.weight, 2).flatten(1)


class Offset:
    """A tokenizer that knows its pictures, and gives them back a bit lighter; guidance turns the contrast up
    (2 is right), and each step takes noise away.
    """

    kind, vocabulary, length, token_counts, image_size = "offset", 4, 2, (1, 2), 16
    vae, device = None, torch.device("cpu")

    def __init__(self, offset=0.0, identity="offset"):
        self.offset, self.identity, self.calls = offset, identity, 0

    def tokenize(self, x, budget=None):
        self.seen = x if getattr(self, "seen", None) is None else torch.cat([self.seen, x])
        return torch.arange(len(x))[:, None].expand(-1, 2)

    def detokenize(self, ids, sampling=None, *, first_index=0, **settings):
        self.calls += 1
        dice = torch.Generator().manual_seed(first_index)
        noise = torch.randn(len(ids), 3, 16, 16, generator=dice) / sampling.steps
        x = torch.linspace(-0.5, 0.5, len(ids))[:, None, None, None] * (0.6 + 0.2 * sampling.guidance)
        return (x + 0.2 * noise + self.offset).clamp(-1, 1)


class Writer(nn.Module):
    """Stands for an AR model: pictures of which it may write, it writes."""

    def __init__(self, offset=0):
        super().__init__()
        self.config = SimpleNamespace(classes=3)
        self.weight = nn.Parameter(torch.full((1,), float(offset)))

    def generate(self, classes, length, first_index=0, **how):
        return classes[:, None].expand(-1, length).clone()


@pytest.fixture(autouse=True)
def bound(monkeypatch):
    """The stand-in of an AR model is bound to no tokenizer."""
    monkeypatch.setattr(evaluation_evaluate, "check_tokenizer", lambda ar, tok: None)


def pictures(count=60, seed=0, rule="one in eight", **more):
    dice = torch.Generator().manual_seed(seed)
    x = (
        torch.randint(0, 60, (count, 3, 16, 16), generator=dice)
        + 2 * torch.arange(count)[:, None, None, None]
    )
    labels = torch.zeros(count, 1, dtype=torch.int64)
    return ImageSet(x.clamp(0, 255).to(torch.uint8), labels, ("all",), "greys", rule=rule, **more)


def measured(tok=None, data=None, ar=None, config=TODAY, **settings):
    data = pictures() if data is None else data
    return evaluate_tokenizer(
        tok or Offset(), data, None, Thumbnails(), config, ar=ar, progress=False, **settings
    )


# --- names and files
# ------------------------------------------------------------------------------------------------


def test_pictures_at_hand():
    """Name, crop and resize follow from how the pictures were read; hash and count from the pictures."""
    read, made = pictures(), pictures(rule="unknown")
    drawn = pictures(scenes=True)
    assert [facts_of(d).name for d in (read, made, drawn)] == ["val-crop", "own", "own"]
    assert len({(facts_of(d).crop, facts_of(d).resize) for d in (read, made, drawn)}) == 3
    assert "bicubic" in facts_of(read).resize and "antialiased" in facts_of(read).resize
    assert facts_of(read).count == 60 and facts_of(read).hash == read.hash
    other = replace(read, images=read.images.roll(1, -1))
    assert facts_of(other).hash != facts_of(read).hash, "the same files under another crop"
    for data in (made, drawn):
        with pytest.raises(ValueError, match="did not pass the package's crop"):
            facts_of(data, "val-crop")


@pytest.fixture
def adm(tmp_path, monkeypatch):
    """The published file, with fewer numbers: a function that writes it, changed."""
    small = {"mu": (12,), "sigma": (12, 12), "mu_s": (4,), "sigma_s": (4, 4), "arr_0": (-1, 16, 16, 3)}
    entry = replace(REFERENCES["adm-imagenet256"], shapes=small, size=16)
    monkeypatch.setitem(REFERENCES, "adm-imagenet256", entry)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))

    def write(**changed):
        entry.path.parent.mkdir(parents=True, exist_ok=True)
        dice = np.random.default_rng(0)
        whole = {"mu": dice.normal(size=12), "sigma": np.eye(12), "mu_s": dice.normal(size=4)}
        whole |= {"sigma_s": np.eye(4), "arr_0": np.zeros((3, 16, 16, 3), np.uint8)}
        whole = {k: v for k, v in (whole | changed).items() if v is not None}
        np.savez(entry.path, **whole)
        return entry.path

    return write


def test_the_published_file_has_its_shapes():
    entry = REFERENCES["adm-imagenet256"]
    assert entry.path.name == "VIRTUAL_imagenet256_labeled.npz" and entry.size == 256
    assert entry.shapes["mu"] == (2048,) and entry.shapes["sigma_s"] == (2023, 2023)
    assert entry.count == 1_281_167 and "box" in entry.resize and "bicubic" in entry.resize


def test_what_is_missing_says_where_to_get_it(adm):
    with pytest.raises(FileNotFoundError) as error:
        statistics_of("adm-imagenet256")
    text, entry = str(error.value), REFERENCES["adm-imagenet256"]
    assert entry.fetch in text and str(entry.path) in text and "curl" in text
    with pytest.raises(FileNotFoundError, match="references that have a name are own, val-crop"):
        statistics_of("adm-imagenet")


def test_the_published_file(adm):
    path = adm()
    (mean, facts), (spatial, also) = statistics_of("adm-imagenet256"), statistics_of("adm-imagenet256", True)
    assert len(mean.mean) == 12 and len(spatial.mean) == 4 and facts == also
    assert facts.name == "adm-imagenet256" and facts.count == 1_281_167
    assert facts.hash == references.network_hash(path)[:16]
    adm(mu=np.zeros(12))
    assert statistics_of("adm-imagenet256")[1].hash != facts.hash


@pytest.mark.parametrize(
    "changed",
    (
        {"mu": None},
        {"sigma_s": None},
        {"arr_0": None},
        {"mu": np.zeros(13)},
        {"sigma": np.eye(11)},
        {"mu": np.full(12, np.nan)},
        {"mu": np.array([{}] * 12, dtype=object)},
        {"arr_0": np.zeros((3, 8, 8, 3), np.uint8)},
    ),
)
def test_another_file_is_refused(adm, changed):
    adm(**changed)
    with pytest.raises(ValueError):
        statistics_of("adm-imagenet256")


def test_nothing_is_unpickled(adm, tmp_path, monkeypatch):
    """Neither the checks of shapes nor the reading runs code that lies in the file."""
    ran = []

    class Bomb:
        def __reduce__(self):
            return ran.append, ("boom",)

    adm(mu=np.array([Bomb()] * 12, dtype=object))
    for reference in ("adm-imagenet256", REFERENCES["adm-imagenet256"].path):
        with pytest.raises(ValueError):
            statistics_of(reference)
    assert not ran


def test_damaged_files(adm):
    """Cut, overwritten or empty: a ValueError that names the file, and nothing else."""
    path = adm()
    whole = path.read_bytes()
    dice = np.random.default_rng(1)
    for case in range(120):
        spoilt = bytearray(whole)
        for _ in range(1 + case % 4):
            spoilt[dice.integers(len(spoilt))] = dice.integers(256)
        path.write_bytes(spoilt[: dice.integers(len(spoilt))] if case % 3 == 0 else spoilt)
        try:
            statistics_of("adm-imagenet256")
        except ValueError as error:
            assert path.name in str(error)


def test_a_reference_from_outside(monkeypatch, tmp_path):
    """One line, and it has a name everywhere."""
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    before = dict(REFERENCES)
    entry = KnownReference("mine", "my set", "centre", "box", 9, 16, "https://x.org/m.npz", {"mu": (-1,)})
    try:
        register_reference(entry)
        Moments.of(torch.randn(9, 12)).save(entry.path)
        assert statistics_of("mine")[1].name == "mine"
        with pytest.raises(ValueError, match="already"):
            register_reference(replace(entry, count=8))
        for name in ("a/b", "m.npz", "", "file"):
            with pytest.raises(ValueError, match="looks like a file"):
                register_reference(replace(entry, name=name))
    finally:
        REFERENCES.clear()
        REFERENCES.update(before)


# --- on the card
# ----------------------------------------------------------------------------------------------------


def networks():
    return {name: Thumbnails() for name in ("fid_inception", "fid_inception_mixed_6")}


def asked_of(reference, names=("rfid", "gfid")):
    return open_asked(names, reference=reference, networks=networks())


def test_each_distance_names_its_reference(adm, tmp_path):
    """Reconstructions are held against their originals, samples against the file; the card says both."""
    adm()
    report = measured(ar=Writer(), asked=asked_of("adm-imagenet256"))
    said = report.card["reference"]
    assert said == {
        "originals": asdict(facts_of(pictures())),
        "gfid": asdict(statistics_of("adm-imagenet256")[1]),
    }
    keys = {"name", "crop", "resize", "count", "hash"}
    assert all(set(one) == keys for one in said.values())
    assert stated_reference(report.card, "rfid")["name"] == "val-crop"
    assert stated_reference(report.card, "gfid")["name"] == "adm-imagenet256"
    assert stated_reference(report.card, "frechet_pixels") == said["originals"]
    kinds = {r["what"]: r for r in report.rows}
    assert "rfid" in kinds["tokens"] and "gfid" not in kinds["tokens"]
    assert "gfid" in kinds["samples"] and "rfid" not in kinds["samples"]
    report.save(tmp_path)
    assert load_report(tmp_path) == report
    assert "adm-imagenet256: 1,281,167 pictures" in report.card["metrics"]["gfid"]


def test_samples_against_the_pictures_at_hand():
    """`val-crop` and `own` need no file: the distance is the one to the originals that are measured."""
    for name in ("val-crop", "own"):
        report = measured(ar=Writer(), asked=asked_of(name))
        row = report.rows[-1]
        assert row["gfid"] == pytest.approx(row["frechet_pixels"], rel=1e-3)
        assert report.card["reference"]["gfid"] == report.card["reference"]["originals"]
    with pytest.raises(ValueError, match="did not pass the package's crop"):
        measured(data=pictures(scenes=True), asked=asked_of("val-crop"))


def test_another_size_is_refused(adm):
    adm()
    REFERENCES["adm-imagenet256"] = replace(REFERENCES["adm-imagenet256"], size=256)
    with pytest.raises(ValueError, match="256 px, and these have 16"):
        references_of(pictures(), asked_of("adm-imagenet256"))


def test_cards_of_before(tmp_path):
    """A table of before there were names loads, and is ranked against one of today on the same pictures."""
    now = measured()
    old = replace(now, card=now.card | {"reference": "the same 60 images"})
    for name in ("resample_seed", "floor_halves"):
        old.card.pop(name)
    old.save(tmp_path)
    found = compare(load_report(tmp_path), now)
    assert not found.mismatches("frechet_pixels") and not found.refused("frechet_pixels")
    assert found.difference("frechet_pixels", tokens=2) == (0, 0, True)
    for said in (None, "another set"):
        card = {k: v for k, v in old.card.items() if k != "reference"} | ({"reference": said} if said else {})
        assert "reference" in compare(replace(old, card=card), now).refused("frechet_pixels")
    for damaged in (7, {}, {"originals": {}}, {"originals": {"name": "own"}}, ["own"]):
        now.save(tmp_path)
        stored = json.loads((tmp_path / "table.json").read_text())
        stored["card"]["reference"] = damaged
        (tmp_path / "table.json").write_text(json.dumps(stored))
        with pytest.raises(ValueError, match="reference"):
            load_report(tmp_path)


# --- never ranked
# ---------------------------------------------------------------------------------------------------


def two_references(adm, tmp_path):
    """The same samples: against the published file, and against another one."""
    adm()
    Moments.of(Thumbnails()(pictures().images)).save(tmp_path / "mine.npz")
    return [
        measured(Offset(offset), ar=Writer(), asked=asked_of(reference, ("rfid", "gfid", "fdr")))
        for reference, offset in (("adm-imagenet256", 0.3), (tmp_path / "mine.npz", 0.0))
    ]


def check_never_across_references(pair):
    for force in (False, True):
        found = compare(*pair, force=force)
        with pytest.raises(ValueError, match="not even by force: reference"):
            found.best("gfid", "samples", 2)
    assert compare(*pair, force=True).best("rfid", tokens=2) == 1, "that has the same reference"
    text = str(compare(*pair, force=True))
    lines = text[text.index("gfid, samples") :].splitlines()
    assert not lines[1].rstrip().endswith("best") and any(
        line.startswith("never ranked: ref") for line in lines
    )
    assert "adm-imagenet256" in text[text.index("never ranked") :]


def test_never_across_references(adm, tmp_path, monkeypatch):
    pair = two_references(adm, tmp_path)
    check_never_across_references(pair)
    # force ranks everything else
    other = replace(pair[0], card=pair[0].card | {"steps": 9})
    assert compare(other, pair[1], force=True).best("rfid", tokens=2) == 1
    bugs = (
        (evaluation_compare, "stated_reference", lambda card, key: card["reference"]["originals"]),
        (evaluation_compare, "incomparable", lambda a, b: ""),
        (evaluation_compare.Comparison, "refused", lambda self, key, what="tokens": ""),
    )
    for where, name, bug in bugs:
        with monkeypatch.context() as m:
            m.setattr(where, name, bug)
            with pytest.raises((AssertionError, pytest.fail.Exception)):
                check_never_across_references(pair)


@pytest.mark.parametrize(
    "field,value", (("hash", "0"), ("crop", "x"), ("resize", "y"), ("count", 1), ("name", "z"))
)
def test_every_fact_of_a_reference_counts(field, value):
    one, two = measured(), measured(Offset(0.3))
    assert compare(one, two).best("frechet_pixels", tokens=2) == 0
    two.card["reference"] = {"originals": two.card["reference"]["originals"] | {field: value}}
    found = compare(one, two, force=True)
    for key in ("frechet_pixels",):
        with pytest.raises(ValueError, match="not even by force"):
            found.best(key, tokens=2)
    assert found.best("mae", tokens=2) is not None or found.difference("mae", tokens=2)[1] > 0
    assert not found.difference("frechet_pixels", tokens=2)[2], "nor is it paired"


def test_reconstructions_and_samples_are_never_ranked():
    """rFID and gFID are different numbers, whatever their references; so are distances of both kinds."""
    card = measured(ar=Writer(), asked=asked_of("own")).card
    assert not incomparable((card, "rfid", "tokens"), (card, "rfid", "tokens"))
    assert not incomparable((card, "gfid", "samples"), (card, "gfid", "samples"))
    assert "gfid" in incomparable((card, "rfid", "tokens"), (card, "gfid", "samples"))
    assert "samples" in incomparable((card, "frechet_pixels", "tokens"), (card, "frechet_pixels", "samples"))
    assert not incomparable((card, "frechet_pixels", "tokens"), (card, "frechet_pixels", "VAE alone"))
    assert "not of samples" in incomparable((card, "rfid", "samples"), (card, "rfid", "samples"))
    assert not incomparable((card, "mae", "tokens"), (card, "psnr", "tokens")), "these are no distances"


def test_the_command_says_what_force_cannot(adm, tmp_path, capsys):
    from flextok_edu.apps.measure import compare_main

    for name, report in zip("ab", two_references(adm, tmp_path)):
        report.save(tmp_path / name)
    with pytest.raises(SystemExit) as end:
        compare_main([str(tmp_path / "a"), str(tmp_path / "b"), "--force"])
    said = capsys.readouterr()
    assert end.value.code == 1 and "--force changes nothing" in said.err and "never ranked" in said.out


# --- paired errors
# --------------------------------------------------------------------------------------------------


def check_samples_are_paired():
    """Distances of two models' samples: the same resamples, so the error of the difference is small."""
    pair = [measured(Offset(x), ar=Writer(x)) for x in (0.0, 0.02)]
    found = compare(*pair)
    for what in ("tokens", "samples"):
        gap, error, paired = found.difference("frechet_pixels", what, 2)
        alone = math.hypot(*(r.rows[-1 if what == "samples" else -3]["frechet_pixels_se"] for r in pair))
        assert paired and error < alone, (what, error, alone)
        by_hand = [r.scores[f"{what}/2/frechet_pixels"] for r in pair]
        assert error == pytest.approx(float((by_hand[1] - by_hand[0]).std()))
    return pair


def test_distances_have_paired_errors(monkeypatch):
    pair = check_samples_are_paired()
    assert pair[0].card["resample_seed"] == 0 and pair[0].card["resamples"] == 8
    seeds = iter(range(1000))
    real = evaluation_rows.resamples
    with monkeypatch.context() as m:
        patch(
            m, evaluation_rows, "resamples", lambda d, a, b, seed, halves: real(d, a, b, next(seeds), halves)
        )
        with pytest.raises(AssertionError):
            check_samples_are_paired()


def test_other_resamples_are_not_paired():
    pair = [measured(Offset(x), ar=Writer(x)) for x in (0.0, 0.02)]
    other = replace(pair[1], card=pair[1].card | {"resample_seed": 1})
    assert compare(pair[0], other).difference("frechet_pixels", "samples", 2)[2] is False
    assert compare(pair[0], other).difference("mae", "tokens", 2)[2] is True, (
        "pictures are paired all the same"
    )
    fewer = measured(Offset(0.02), ar=Writer(0.02), config=replace(TODAY, samples=10))
    assert compare(pair[0], fewer).difference("frechet_pixels", "samples", 2)[2] is False


# --- halves
# ---------------------------------------------------------------------------------------------------------


def test_the_floor_of_halves(tmp_path):
    """Disjoint, drawn with the seed on the card, as many as it says; without another look at any picture."""
    data = pictures()
    report = measured(data=data, seed=3)
    row = next(r for r in report.rows if r["what"] == HALVES)
    said = report.card["floor_halves"]
    assert said["seed"] == 3 and said["count"] == row["n"] == 30 and "halves" in said["what"]
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    features = Thumbnails()(data.images)
    metric = evaluation_rows.METRICS["frechet"].measure
    by_hand = metric(features[order[:30]], features[order[30:]])
    assert row["frechet_pixels"] == pytest.approx(by_hand, rel=1e-4) and row["frechet_pixels_se"] > 0
    assert measured(data=data, seed=3).rows == report.rows
    other = next(r for r in measured(data=data, seed=4).rows if r["what"] == HALVES)
    assert other["frechet_pixels"] != row["frechet_pixels"]
    assert f"{HALVES}: halves of the 60 held-out pictures that are measured, seed 3" in str(report)
    report.save(tmp_path)
    assert load_report(tmp_path) == report
    assert "half against half" not in str(compare(report, report)), "it ranks nothing"


def test_halves_too_small():
    report = measured(data=pictures(6), asked=open_asked(("precision", "kid")))
    row = next(r for r in report.rows if r["what"] == HALVES)
    assert "precision_pixels" not in row and "kid_pixels" in row and row["n"] == 3
    assert any("half of these pictures is too small for precision" in note for note in report.notes)
    assert not any(r["what"] == HALVES for r in measured(data=pictures(3)).rows)


# --- sweeps
# ---------------------------------------------------------------------------------------------------------


def plan(**more):
    return Sweep(parse_axes(("guidance=1,2,4", "steps=1,2,4"), TODAY), **{"tokens": 2} | more)


def measurement(**more):
    return Measurement(Thumbnails(), TODAY).with_settings({"progress": False, **more})


def quiet(text):
    pass


def test_axes():
    assert parse_axes(("guidance,steps",), TODAY)["guidance"] == (1.0, 1.5, 2.0, 3.0, 5.0)
    assert 7.5 in parse_axes(("guidance",), replace(TODAY, guidance=7.5))["guidance"], "today's is tried"
    assert parse_axes(("ema=a,b", "steps=4,2,2"), TODAY) == {"ema": ("a", "b"), "steps": (2, 4)}
    for words in (
        ("speed",),
        ("steps=1.5",),
        ("steps=",),
        ("guidance=nan",),
        ("steps=0",),
        ("steps", "steps=3"),
    ):
        with pytest.raises(ValueError):
            parse_axes(words, TODAY)
    assert len(plan().settings) == 9 and plan().what == "tokens"
    with pytest.raises(ValueError, match="is of samples, and this sweep is of tokens"):
        plan(by="gfid").column(["pixels"], [])


def test_halves_share_no_picture():
    data = pictures(61)
    first, second = split_halves(data, 5)
    assert len(first) == 30 and len(second) == 31
    a, b = (set(map(bytes, x.images.numpy())) for x in (first, second))
    assert not a & b and len(a | b) == 61
    with pytest.raises(ValueError, match="4 or more"):
        split_halves(pictures(3))


def check_chosen_on_one_half(tmp_path):
    """The reporting half is never looked at while settings are chosen."""
    data = pictures()
    choosing, reporting = split_halves(data)
    tok = Offset()
    surface = run_sweep({"": tok}, choosing, measurement(), plan(by="mae"), tmp_path / "sweep.json", quiet)
    seen = set(map(bytes, tok.seen.mul(127.5).add(127.5).round().to(torch.uint8).numpy()))
    assert seen == set(map(bytes, choosing.images.numpy()))
    assert seen.isdisjoint(map(bytes, reporting.images.numpy()))
    facts = chosen_facts(surface, choosing, reporting, TODAY)
    assert facts["choosing"]["hash"] == choosing.hash != facts["reporting"]["hash"] == reporting.hash
    assert surface.chosen.row["mae"] == min(c.row["mae"] for c in surface.cells) and len(surface.cells) == 9
    assert "9 settings" in chosen_text(facts) and choosing.hash in chosen_text(facts)
    return surface


def test_chosen_on_one_half(tmp_path, monkeypatch):
    check_chosen_on_one_half(tmp_path)
    real = evaluation_surface.open_reference
    whole = pictures()
    with monkeypatch.context() as m:  # the bug: all pictures choose
        m.setattr(evaluation_surface, "open_reference", lambda data, *a: real(whole, *a))
        with pytest.raises(AssertionError):
            check_chosen_on_one_half(tmp_path / "bug")
    with monkeypatch.context() as m:  # the bug: the worst is chosen
        m.setattr(evaluation_sweep, "better", lambda key: 1)
        with pytest.raises(AssertionError):
            check_chosen_on_one_half(tmp_path / "worst")


def test_it_goes_on(tmp_path):
    """What the file holds is not measured again, also for more values; other conditions are refused."""
    file, (choosing, _) = tmp_path / "sweep.json", split_halves(pictures())
    tok = Offset()

    class Enough(Exception):
        pass

    def stops(ids, *a, **k):
        if tok.calls >= 9:
            raise Enough
        return Offset.detokenize(tok, ids, *a, **k)

    tok.detokenize = stops
    with pytest.raises(Enough):
        run_sweep({"": tok}, choosing, measurement(), plan(), file, quiet)
    done = len(json.loads(file.read_text())["cells"])
    assert 0 < done < 9
    said, tok = [], Offset()
    whole = run_sweep({"": tok}, choosing, measurement(), plan(), file, said.append)
    assert f"{done} were measured before" in said[0] and "to go" in said[0]
    anew = run_sweep({"": Offset()}, choosing, measurement(), plan(), tmp_path / "other.json", quiet)
    assert [c.row for c in whole.measured] == [c.row for c in anew.measured]
    tok.calls = 0
    again = run_sweep({"": tok}, choosing, measurement(), plan(), file, quiet)
    assert tok.calls == 0 and again.cells == whole.cells
    more = Sweep(plan().axes | {"steps": (1, 2, 4, 8)}, 2)
    assert len(run_sweep({"": tok}, choosing, measurement(), more, file, quiet).cells) == 12
    for changed in (
        lambda: run_sweep({"": Offset(identity="b")}, choosing, measurement(), plan(), file, quiet),
        lambda: run_sweep({"": tok}, split_halves(pictures(), 1)[0], measurement(), plan(), file, quiet),
        lambda: run_sweep({"": tok}, choosing, measurement(seed=1), plan(), file, quiet),
        lambda: run_sweep({"": tok}, choosing, measurement(), plan(by="mae"), file, quiet),
        lambda: run_sweep({"": tok}, choosing, measurement(), plan(tokens=1), file, quiet),
        lambda: run_sweep({"": tok}, choosing, measurement(), Sweep({"steps": (2,)}, 2), file, quiet),
    ):
        with pytest.raises(ValueError, match="other conditions"):
            changed()


def test_damaged_sweeps(tmp_path):
    """Read, or a ValueError."""
    file, (choosing, _) = tmp_path / "sweep.json", split_halves(pictures())
    surface = run_sweep({"": Offset()}, choosing, measurement(), plan(), file, quiet)
    whole = file.read_bytes()
    stored = json.loads(whole)
    for spoil in (
        lambda s: s["cells"][0].pop("row"),
        lambda s: s["cells"][0]["row"].pop("frechet_pixels"),
        lambda s: s["cells"][0].update(behind=["x"]),
        lambda s: s["cells"][0]["row"].update(frechet_pixels="1"),
        lambda s: s["cells"][0].update(behind=[None]),
        lambda s: s.update(cells=3),
        lambda s: s.pop("conditions"),
    ):
        bad = json.loads(json.dumps(stored))
        spoil(bad)
        file.write_text(json.dumps(bad))
        with pytest.raises(ValueError):
            load_cells(file, surface.conditions)
    file.write_bytes(whole[:500])
    with pytest.raises(ValueError):
        load_cells(file, surface.conditions)


def made_up(steps, values, key="mae", **setting):
    row = {"what": "tokens", "n": len(values), key: sum(values) / len(values), f"{key}_se": 0.1}
    return Cell({"steps": steps, **setting}, row, list(values))


def test_what_is_as_good():
    """By paired errors: surely worse by little is worse; what differs by chance is as good."""
    base = [0.1, 0.2, 0.3, 0.4]
    cells = [made_up(2, [v + 0.01 for v in base]), made_up(4, [0.12, 0.19, 0.32, 0.38]), made_up(8, base)]
    surface = Surface(Sweep({"steps": (2, 4, 8)}, 1, "mae"), "mae", {}, cells)
    assert surface.chosen is cells[2] and surface.as_good == cells[1:]
    assert surface.cheapest(TODAY) is cells[1]
    nan = made_up(1, [math.nan])
    assert (
        Surface(replace(surface.sweep, axes={"steps": (1, 8)}), "mae", {}, [nan, cells[2]]).chosen is cells[2]
    )
    with pytest.raises(ValueError, match="nothing to choose"):
        Surface(replace(surface.sweep, axes={"steps": (1,)}), "mae", {}, [nan]).chosen


@pytest.mark.parametrize(
    "axes", (("steps=1,2",), ("guidance=1,2", "steps=1,2"), ("ema=a,b", "guidance=1,2", "steps=1,2"))
)
def test_surfaces_are_drawn(axes, tmp_path):
    """One axis is a line, two a map, three a map for each value of the third."""
    import matplotlib.pyplot as plt

    toks = {"a": Offset(identity="a"), "b": Offset(0.2, identity="b")}
    sweep = Sweep(parse_axes(axes, TODAY), 2, "mae")
    surface = run_sweep(toks, split_halves(pictures())[0], measurement(), sweep, tmp_path / "s.json", quiet)
    fig = draw_surface(surface)
    fig.canvas.draw()
    assert len(fig.axes) == (2 if len(axes) == 3 else 1)
    frames = [p for ax in fig.axes for p in ax.patches if p.get_linewidth() == 3]
    assert len(frames) == (len(axes) > 1)
    if len(axes) > 1:
        texts = [t.get_text() for ax in fig.axes for t in ax.texts]
        assert len(texts) == len(surface.cells)
        assert sum(t.startswith(f"{surface.chosen.row['mae']:.4f}") for t in texts) >= 1
    plt.close("all")
    assert "ema" not in surface.chosen.setting or surface.chosen.setting["ema"] == "a"


def test_samples_are_swept(tmp_path):
    m = replace(measurement(), ar=Writer())
    sweep = Sweep(parse_axes(("temperature=0.5,1", "steps=1,4"), TODAY), 2)
    surface = run_sweep({"": Offset()}, split_halves(pictures())[0], m, sweep, tmp_path / "s.json", quiet)
    assert {c.row["what"] for c in surface.cells} == {"samples"} and surface.chosen.row["n"] == 20
    assert len(surface.chosen.behind) == 8, "resamples, for paired errors"


# --- the command
# ----------------------------------------------------------------------------------------------------

WORDS = ["--set", "evaluate.images=12", "evaluate.steps=1", "--device", "cpu"]


def test_the_command(tmp_path, capsys):
    """sweep.json, sweep.png and a table of the other half with the chosen settings, which the card tells."""
    from flextok_edu.apps.measure import eval_main

    words = ["tiny", "--out", str(tmp_path), "--sweep", "ema", "guidance=1,2", "steps=1", "--sweep-by", "mae"]
    eval_main([*words, "--sweep-tokens", "1", *WORDS])
    said = capsys.readouterr()
    assert "2 guidance x 1 steps = 2 settings on 6 pictures, chosen by mae; about" in said.out
    assert "keeps one set of weights (EMA)" in said.err and "--keep-last" in said.err
    report, stored = load_report(tmp_path), json.loads((tmp_path / "sweep.json").read_text())
    chosen = report.card["chosen"]
    assert chosen == stored["chosen"] and len(stored["cells"]) == 2
    assert report.card["guidance"] == chosen["setting"]["guidance"] and report.card["steps"] == 1
    assert report.card["data_hash"] == chosen["reporting"]["hash"] != chosen["choosing"]["hash"]
    row = next(r for r in report.rows if r.get("tokens") == 1)
    assert chosen["reporting"]["value"] == row["mae"] and report.card["images"] == row["n"] == 6
    assert "half of the held-out pictures that chose" in report.card["floor"]
    assert "chosen among 2 settings by mae of tokens at 1 token on the choosing half" in str(report)
    assert (tmp_path / "sweep.png").stat().st_size > 5000
    eval_main([*words, "--sweep-tokens", "1", *WORDS])
    assert "2 were measured before" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        eval_main([*words, "--sweep-tokens", "2", *WORDS])
    assert "other conditions (tokens)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words,said",
    (
        (["--sweep", "speed"], "there are ema"),
        (["--sweep", "ema"], "keeps one set of weights"),
        (["--sweep", "ema=last", "steps=1"], "keeps one set of weights"),
        (["--sweep", "steps", "--sweep-tokens", "3"], "one of 1, 2, 4"),
        (["--sweep", "temperature"], "--ar"),
        (["--sweep", "steps", "--sweep-by", "kid"], "--metrics kid"),
    ),
)
def test_what_cannot_be_swept(words, said, tmp_path, capsys):
    from flextok_edu.apps.measure import eval_main

    with pytest.raises(SystemExit) as end:
        eval_main(["tiny", "--out", str(tmp_path), *words, *WORDS])
    assert end.value.code == 2 and said in capsys.readouterr().err


def check_both_weights(folder, at_last):
    """What --keep-last kept is what the last checkpoint held, and not the average that is in the model."""
    from flextok_edu.apps.choosing import LAST, last_weights, weights_to_try
    from flextok_edu.apps.models import open_tokenizer

    tok = open_tokenizer(str(folder))
    toks, note = weights_to_try(str(folder), tok, "EMA")
    assert list(toks) == ["ema", "last"] and not note and toks["ema"] is tok
    last = toks["last"].state_dict()
    for name, x in at_last.items():
        assert torch.equal(last[name], x), name
    moved = [n for n, x in tok.state_dict().items() if not torch.equal(x, last[n])]
    assert moved and not any(n.startswith("vae.") for n in moved)
    other = open_tokenizer("tiny")
    with pytest.raises(ValueError, match="of another tokenizer"):
        last_weights(other, folder / LAST)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A tokenizer of a few steps that kept both; and the weights in its last checkpoint."""
    import flextok_edu.apps.stages as stages
    from flextok_edu.apps.train import train_main

    base, at_last, real = tmp_path_factory.mktemp("kept"), {}, stages.save_last

    def watch(folder, model):
        found = stages.Checkpoints(folder / "checkpoints").newest()[0]
        start = "weight/tokenizer/"
        at_last.update({n.removeprefix(start): x for n, x in found.items() if n.startswith(start)})
        real(folder, model)

    few = ["--device", "cpu", "--compile", "off", "--train-images", "16"]
    train_main(["vae", "--steps", "1", "--set", "train_vae.batch=4", "--out", str(base / "vae"), *few])
    words = ["tokenizer", "--steps", "3", "--vae", str(base / "vae"), "--out", str(base / "tok"), *few]
    with pytest.MonkeyPatch.context() as m:
        m.setattr(stages, "save_last", watch)
        train_main([*words, "--set", "train_tokenizer.batch=4", "--keep-last"])
    return base / "tok", at_last


def test_both_weights_are_kept(kept, monkeypatch):
    import flextok_edu.apps.choosing as choosing

    assert kept[1]
    check_both_weights(*kept)
    real = choosing.last_weights
    monkeypatch.setattr(choosing, "last_weights", lambda tok, file: real(tok, file) and tok)
    with pytest.raises(AssertionError):
        check_both_weights(*kept)


def test_weights_are_swept(kept, tmp_path, capsys):
    from flextok_edu.apps.measure import eval_main

    folder = kept[0]
    words = [
        str(folder),
        "--out",
        str(tmp_path),
        "--sweep",
        "ema",
        "--sweep-by",
        "mae",
        "--sweep-tokens",
        "1",
    ]
    eval_main([*words, *WORDS])
    assert "2 ema = 2 settings" in capsys.readouterr().out
    stored = json.loads((tmp_path / "sweep.json").read_text())
    values = {c["setting"]["ema"]: c["row"]["mae"] for c in stored["cells"]}
    assert values["ema"] != values["last"] and len(set(stored["conditions"]["tokenizers"].values())) == 2
    card = load_report(tmp_path).card
    assert card["chosen"]["setting"]["ema"] == min(values, key=values.get)
    assert ("last step" in card["weights_are"]) == (card["chosen"]["setting"]["ema"] == "last")


def test_keep_last_is_for_tokenizers(tmp_path, capsys):
    from flextok_edu.apps.train import train_main

    with pytest.raises(SystemExit) as end:
        train_main(["vae", "--keep-last", "--out", str(tmp_path / "v")])
    assert end.value.code == 2 and "--keep-last is for a tokenizer" in capsys.readouterr().err
