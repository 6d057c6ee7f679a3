"""JPEG, WebP and AVIF at a byte budget: never above it, counted as it says, and the best that fits; then
their rows in a table, in a comparison and in a figure.
"""

import io
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from PIL import Image, features

import flextok_edu.evaluation.codecs as codecs
import flextok_edu.evaluation.registry as registry
from flextok_edu.apps.measure import EvalOptions, measure
from flextok_edu.apps.options import UsageError
from flextok_edu.data.scenes import ToyScenes
from flextok_edu.engine.config import EvalConfig
from flextok_edu.engine.hub import shipped_models
from flextok_edu.engine.tensors import from_uint8
from flextok_edu.evaluation.compare import compare
from flextok_edu.evaluation.evaluate import evaluate_tokenizer
from flextok_edu.evaluation.metrics import image_scores
from flextok_edu.evaluation.report import load_report, plot_report, score_key
from flextok_edu.evaluation.rows import Reference
from flextok_edu.io.ftok import FtokHeader
from planting import patch, planted
from test_metrics import Halves, Pixels, pictures

HERE = [name for name in codecs.CODECS if not codecs.why_not(name)]
SCENES = ToyScenes("val", 64, 2, length=3).render(progress=False)[0]
BUDGETS = {False: [1, 12, 40, 90, 400], True: [60, 100, 330, 700]}  # whole: bytes


def file_of(form, pixels, **how):  # by Pillow alone
    file = io.BytesIO()
    pixels.save(file, form, **how)
    return file.getvalue()


def error(found, original):
    return float((found.picture.float() - original.float()).square().mean())


# --- what every result must hold, and bugs that break it
# --------------------------------------------------------------------------------------------------------


def budgets_are_kept():
    """Counted here once more, from the file: its length, or that minus one grey pixel's, plus the choices."""
    for name in HERE:
        codec = codecs.CODECS[name]
        for whole, budgets in BUDGETS.items():
            for image in SCENES[:1]:
                for budget, found in zip(budgets, codecs.within_budget(image, codec, budgets, whole)):
                    if found is None:
                        continue
                    how = dict(codec.options) | {"quality": found.quality}
                    if found.subsampling:
                        how["subsampling"] = found.subsampling
                    grey = len(file_of(codec.title, Image.new("RGB", (1, 1), (128,) * 3), **how))
                    cost = len(found.file) if whole else max(0, len(found.file) - grey) + 2
                    assert cost == found.bytes <= budget, (name, whole, budget, found.bytes, cost)


def one_quality_too_fine(monkeypatch):
    finest = codecs._Files.finest

    def more(self, size, subsampling, budget):
        q = finest(self, size, subsampling, budget)
        levels = self.codec.qualities
        return q if q is None else levels[min(levels.index(q) + 4, len(levels) - 1)]

    monkeypatch.setattr(codecs._Files, "finest", more)


def tables_are_forgotten(monkeypatch):
    counted = codecs.counted
    patch(monkeypatch, codecs, "counted", lambda c, file, q, s, whole: counted(c, file, q, s, False))


def choices_are_free(monkeypatch):
    monkeypatch.setattr(codecs, "CHOICES", 0)


def files_hold_the_pictures():
    """What is shown comes from the file: of the format and size that are stated, and worse at fewer bytes."""
    for name in HERE:
        found = codecs.within_budget(SCENES[0], codecs.CODECS[name], [40, 90, 400])
        for each in found:
            with Image.open(io.BytesIO(each.file)) as stored:
                assert stored.format == codecs.CODECS[name].title.upper() and stored.size == each.size[::-1]
                large = stored.convert("RGB").resize((64, 64), Image.Resampling.BICUBIC)
            shown = torch.from_numpy(np.array(large)).permute(2, 0, 1)
            assert torch.equal(shown, each.picture)
        errors = [error(each, SCENES[0]) for each in found]
        assert errors == sorted(errors, reverse=True) and errors[-1] > 0, (name, errors)


def the_original_is_shown(monkeypatch):
    monkeypatch.setattr(codecs.Coded, "picture", property(lambda self: SCENES[0]))


def size_is_misstated(monkeypatch):
    real = codecs.Coded
    patch(monkeypatch, codecs, "Coded", lambda file, n, size, *a: real(file, n, (64, 64), *a))


def nothing_is_better():
    """Against all sizes, qualities and colours, tried one by one."""
    for name in HERE:
        codec, image = codecs.CODECS[name], SCENES[1]
        files = codecs._Files(codec, image, False)
        for budget, found in zip((25, 80), codecs.within_budget(image, codec, [25, 80])):
            best = None
            for size in files.small:
                for quality in codec.qualities:
                    for s in codec.subsamplings:
                        cost, file = files.get(size, quality, s)
                        if cost <= budget:
                            apart = codecs.decode(file, (64, 64)).float() - image.float()
                            best = min(best or 1e9, float(apart.square().mean()))
            assert error(found, image) <= 1.1 * best, (name, budget, error(found, image), best)


def sizes_are_not_tried(monkeypatch):
    monkeypatch.setattr(codecs, "_TRIED", 1)


def worst_quality_is_taken(monkeypatch):
    finest = codecs._Files.finest

    def worst(self, *how):
        return None if finest(self, *how) is None else self.codec.qualities[0]

    monkeypatch.setattr(codecs._Files, "finest", worst)


def nothing_fits():
    """No file is shorter than its tables."""
    for name in HERE:
        assert codecs.within_budget(SCENES[0], codecs.CODECS[name], [1]) == [None]
        assert codecs.codec_pictures(SCENES[:1], name, 40, whole=True) == [None]
    assert codecs.codec_pictures(SCENES[:1], "jpeg", 144, whole=True) == [None]


def the_smallest_is_given_all_the_same(monkeypatch):
    finest = codecs._Files.finest
    worst = codecs.CODECS["jpeg"].qualities[0]
    monkeypatch.setattr(codecs._Files, "finest", lambda self, *how: finest(self, *how) or worst)


test_the_code_passes, test_the_bug_is_caught = planted(
    [
        (budgets_are_kept, one_quality_too_fine),
        (budgets_are_kept, tables_are_forgotten),
        (budgets_are_kept, choices_are_free),
        (files_hold_the_pictures, the_original_is_shown),
        (files_hold_the_pictures, size_is_misstated),
        (nothing_is_better, sizes_are_not_tried),
        (nothing_is_better, worst_quality_is_taken),
        (nothing_fits, the_smallest_is_given_all_the_same),
        (nothing_fits, tables_are_forgotten),
    ]
)


def test_what_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="'gif' is no codec: there are jpeg, webp, avif"):
        codecs.open_codec("gif")
    with pytest.raises(ValueError, match="b 3 h w"):
        codecs.codec_pictures(SCENES[0], "jpeg", 40)
    monkeypatch.setattr(features, "check", lambda name: name != "avif")
    with pytest.raises(ValueError, match="without AVIF: pip install 'pillow>=11.3'"):
        codecs.codec_pictures(SCENES, "avif", 40)


def test_pictures_of_any_shape():
    """Wide ones, small ones, floats as bytes."""
    wide = SCENES[:1, :, 10:40, :]
    found = codecs.codec_pictures(wide, "webp", 60)[0]
    assert found.picture.shape == (3, 30, 64) and found.picture.dtype == torch.uint8
    assert codecs.codec_pictures(from_uint8(wide), "webp", 60) == [found]
    tiny = codecs.codec_pictures(SCENES[:1, :, 30:33, 30:31], "jpeg", 30)[0]
    assert tiny.picture.shape == (3, 3, 1)


def test_bytes_of_tokens_are_those_of_a_file():
    for vocabulary in (1, 2, 1000, 1024, 1025, 4375, 64_000):
        for count in (1, 2, 7, 32, 64):
            header = FtokHeader(64, 64, count, 64, vocabulary, "0" * 16)
            assert codecs.token_bytes(count, vocabulary) == header.body_bytes


# --- rows of a table
# --------------------------------------------------------------------------------------------------------


def table(names=("jpeg", "webp"), offset=0.0):
    tok = Halves()
    tok.detokenize = lambda *a, **k: (Halves.detokenize(tok, *a, **k) + offset).clamp(-1, 1)
    config, eyes = EvalConfig(images=30, steps=1, guidance=1.0), Pixels("pixels/2x2", 2)
    return evaluate_tokenizer(tok, pictures(60), None, eyes, config, codecs=names, progress=False)


def rows_of(report, what):
    return [row for row in report.rows if row["what"] == what]


def test_rows(tmp_path):
    """At the bytes of the tokens and beyond; numbers as by hand; saved, read, drawn."""
    report = table()
    assert [row["bytes"] for row in rows_of(report, "tokens")] == [1, 1]
    own = codecs.codec_budgets(Halves())
    assert own == [1, 2, 4, 8, 16]
    jpeg = rows_of(report, "jpeg")
    assert jpeg and {row["budget"] for row in jpeg} < set(own), "one byte holds nothing"
    for row in jpeg:
        assert 0 < row["bytes"] <= row["budget"] < row["file_bytes"] and row["n"] == 30
    assert any("JPEG within 1 bytes: 0 of 30 pictures fit" in note for note in report.notes)
    images = Reference(*data(), []).images
    by_hand = torch.stack([c.picture for c in codecs.codec_pictures(images, "jpeg", jpeg[-1]["budget"])])
    scores = image_scores(from_uint8(by_hand), from_uint8(images))
    assert jpeg[-1]["mae"] == pytest.approx(float(scores["mae"].mean()), rel=1e-5)
    assert torch.allclose(report.scores[score_key(jpeg[-1], "mae")], scores["mae"], atol=1e-6)
    report.save(tmp_path)
    assert load_report(tmp_path) == report and "jpeg: Pillow" in str(report)
    ax = plot_report(report).axes[0]
    assert ax.get_xlabel() == "bytes, without headers"
    assert {"JPEG", "reconstructions"} <= set(ax.get_legend_handles_labels()[1])
    plt.close("all")


def data():
    from flextok_edu.evaluation.evaluate import measured_and_rest

    kept = measured_and_rest(pictures(60), 30, 30)[0]
    return kept.images, kept.labels


def test_without_codecs_nothing_changes():
    plain = table(())
    assert not any("bytes" in row for row in plain.rows) and "codecs" not in plain.card
    assert plot_report(plain).axes[0].get_xlabel() == "tokens"
    plt.close("all")
    old = load_report(shipped_models()["tiny"])
    assert score_key(old.rows[-1], "mae") == f"samples/{old.rows[-1]['tokens']}/mae"


def test_a_missing_codec_is_a_note(monkeypatch):
    monkeypatch.setattr(features, "check", lambda name: name != "avif")
    report = table(("jpeg", "avif"))
    assert not rows_of(report, "avif") and rows_of(report, "jpeg") and set(report.card["codecs"]) == {"jpeg"}
    assert any(note.startswith("AVIF is left out: Pillow") for note in report.notes)


def each_budget_is_compared_with_itself():
    a, b = table(), table(offset=0.1)
    found = compare(a, b)
    for row in rows_of(a, "jpeg"):
        assert found.row(1, "jpeg", row["budget"]).get("bytes") == row["bytes"]
        assert found.difference("mae", "jpeg", row["budget"]) == (0.0, 0.0, True)
        assert found.best("mae", "jpeg", row["budget"]) is None
    assert not found.mismatches("mae", "jpeg"), "other weights of the tokenizer are none of its business"
    assert len({score_key(row, "mae") for row in a.rows if "mae" in row}) == sum("mae" in r for r in a.rows)
    assert "mae, jpeg (less is better)" in str(found) and "\nbytes " in str(found)


def budgets_are_mixed_up(monkeypatch):
    patch(monkeypatch, registry, "place_of", lambda row: row.get("tokens", ""))


test_comparing, test_mixed_up_budgets_are_caught = planted(
    [(each_budget_is_compared_with_itself, budgets_are_mixed_up)]
)


def test_another_encoder_is_not_ranked():
    a = table(("jpeg",))
    said = a.card["codecs"]["jpeg"].replace("Pillow", "Pillow of another year,")
    b = replace(a, card=a.card | {"codecs": {"jpeg": said}})
    c = replace(a, card={k: v for k, v in a.card.items() if k != "codecs"})
    for other in (b, c):
        assert list(compare(a, other).mismatches("mae", "jpeg")) == ["codec"]
        assert "codec" not in compare(a, other).mismatches("mae", "tokens")


def test_the_command_knows_its_codecs(tmp_path):
    with pytest.raises(UsageError, match="--codecs gif is none: there are jpeg, webp, avif"):
        measure(EvalOptions(tokenizer="tiny", out=str(tmp_path / "out"), codecs=("gif",)))
