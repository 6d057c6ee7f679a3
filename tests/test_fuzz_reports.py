"""Thousands of damaged tables and descriptions of models: each is read, or refused in one sentence
(ValueError); nothing else, and nothing large.

FLEXTOK_FUZZ=10 tries ten times as many.
"""

import json
import os
import random
import resource

import pytest
import torch

from flextok_edu.data.learned import Learned, hash_keys, save_learned
from flextok_edu.evaluation.compare import compare
from flextok_edu.evaluation.metrics import column
from flextok_edu.evaluation.report import Report, load_report, plot_report, score_key
from flextok_edu.apps.card import markdown, model_card, read_facts
from flextok_edu.apps.stage_table import PARTS
from flextok_edu.apps.zoo import read_log

CASES = 2000 * int(os.environ.get("FLEXTOK_FUZZ", "1"))
ODD = [
    None,
    True,
    -1,
    0,
    1.9,
    2**63,
    10**400,
    -(10**18),
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "1",
    "a|b`<c>[d](e)\n# f",
    "\ud800",
    "$x_{",
    [],
    {},
    [[]],
    [{}],
    {"": {}},
    "9" * 5000,
]


def nodes(value, path=()):
    """Every place in a json value."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield from nodes(one, (*path, key))


def damaged(value, dice):
    """A copy with one to three faults: another value, an entry gone, doubled, renamed or moved."""
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        value = json.loads(json.dumps(value))
        places = [p for p in nodes(value) if p]
        if not places:
            return dice.choice(ODD)
        *above, last = dice.choice(places)
        inside = value
        for key in above:
            inside = inside[key]
        how = dice.random()
        if how < 0.5:
            inside[last] = dice.choice(ODD)
        elif how < 0.6:
            del inside[last]
        elif how < 0.7 and isinstance(inside, list):
            inside.append(inside[last])
        elif how < 0.8 and isinstance(inside, dict):
            inside[str(dice.choice(ODD))] = inside.pop(last)
        elif how < 0.9:
            inside[last] = [inside[last]]
        else:
            other = value
            for key in dice.choice(places):
                other = other[key]
            inside[last] = json.loads(json.dumps(other))
    return value


def as_text(value, dice):
    """As bytes; some of them cut, with a wrong byte, doubled or nested a hundred thousand times."""
    data = json.dumps(value).encode("utf-8", "surrogatepass")
    how = dice.random()
    if how < 0.06:
        return data[: dice.randrange(len(data) + 1)]
    if how < 0.12 and data:
        at = dice.randrange(len(data))
        return data[:at] + bytes([dice.randrange(256)]) + data[at + 1 :]
    if how < 0.13:
        return b"[" * 100_000 + data
    if how < 0.14:
        return data + data
    return data


def tried(work, allowed=(ValueError, FileNotFoundError)):
    """Whether it went well. Errors that are none of these are the test's."""
    try:
        work()
        return True
    except allowed as error:
        assert str(error) and len(str(error)) < 2000, error
        return False


def a_report():
    rows = [
        {"what": "originals", "n": 4, "acc_kind": 1.0, "acc_kind_se": 0.0},
        {"what": "real against real", "n": 4, "frechet_pixels": 1.0, "frechet_pixels_se": 0.1},
        {"what": "half against half", "n": 2, "frechet_pixels": 2.0, "frechet_pixels_se": 0.2},
    ]
    scores = {}
    for what in ({"what": "VAE alone"}, {"what": "tokens", "tokens": 1}, {"what": "tokens", "tokens": 2}):
        values = torch.tensor([0.1, 0.2, 0.3, 0.4])
        rows.append(
            {
                **what,
                "n": 4,
                "mae": float(values.mean()),
                "mae_se": 0.06,
                "psnr": float("inf"),
                "psnr_se": float("nan"),
                "frechet_pixels": 2.0,
                "frechet_pixels_se": 0.2,
            }
        )
        scores[score_key(what, "mae")] = values
    card = {
        "data": "a folder",
        "data_hash": "0",
        "image_size": 8,
        "crop": "c",
        "images": 4,
        "reference": {
            "originals": {"name": "own", "crop": "c", "resize": "r", "count": 4, "hash": "0"},
            "gfid": {"name": "file", "crop": "c", "resize": "r", "count": None, "hash": "1"},
        },
        "floor_halves": {"what": "halves of the pictures", "seed": 0, "count": 2},
        "extractors": ["pixels/2x2"],
        "seed": 0,
        "steps": 2,
        "guidance": 1.0,
        "weights_are": "EMA",
        "weights": {"vae": "0", "extractor": "1"},
        "learned": {"vae": {"rule": "one in eight", "count": 3}},
        "floor": "training pictures",
    }
    return Report(rows, card, ["a note"], scores)


@pytest.fixture
def memory():
    """Nothing may take a gigabyte more than there is now."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 2**30


def test_tables(tmp_path, memory):
    """Read, printed and compared, or refused; a table that was read never fails later."""
    dice, good = random.Random(0), a_report()
    good.save(tmp_path)
    stored, weights = (
        json.loads((tmp_path / "table.json").read_text()),
        (tmp_path / "table_scores.safetensors").read_bytes(),
    )
    well = 0
    for case in range(CASES):
        (tmp_path / "table.json").write_bytes(as_text(damaged(stored, dice), dice))
        spoilt = bytearray(weights)
        if case % 10 == 0:
            spoilt[dice.randrange(len(spoilt))] = dice.randrange(256)
        (tmp_path / "table_scores.safetensors").write_bytes(
            spoilt[: dice.randrange(len(spoilt))] if case % 50 == 0 else spoilt
        )
        found = []
        if not tried(lambda: found.append(load_report(tmp_path))):
            continue
        well += 1
        str(found[0]).encode("utf-8")
        str(compare(found[0], good)).encode("utf-8")
        tried(lambda: compare(good, found[0], force=True).best(column("pixels/2x2"), tokens=2), ValueError)
        if case % 200 == 0:
            import matplotlib.pyplot as plt

            tried(lambda: plt.close(plot_report(found[0])), ValueError)
    assert 0.1 * CASES < well < 0.9 * CASES, well


def test_descriptions(tmp_path, memory):
    """model.json, and what lies beside the weights: read and written into a card, or refused; and a card
    stays one table whatever stands in them.
    """
    dice, place = random.Random(1), tmp_path / "model"
    from dataclasses import asdict
    from flextok_edu.engine.config import preset

    made = {
        "command": "flextok_train vae",
        "data": "a folder",
        "seed": 0,
        "images": "0",
        "versions": {"torch": "2"},
    }
    facts = {
        "preset": asdict(preset("micro")),
        "made": {"vae": made, "tokenizer": made},
        "weights_are": "EMA",
        "vae_trained_against": "nothing but pixels",
        "packed_with": {"torch": "2"},
        "rounding": {"vae_mae": 0.1},
    }
    config = {
        "config": {},
        "weights": "0",
        "loaded": "0123456789abcdef",
        "stage": {
            "stage": "vae",
            "steps": 3,
            "batch": 4,
            "seconds": 1.0,
            "images_per_second": 9.0,
            "parameters": 10,
        },
    }
    keys = torch.arange(4)
    for part in ("vae", "tokenizer"):
        (place / part).mkdir(parents=True)
        (place / part / "model.safetensors").write_bytes(b"0" * 100)
        save_learned(place / part, Learned("one in eight", "a folder", 4, hash_keys(keys), keys))
    log = [{"step": i, "loss": 0.5, "seconds": 1.0} for i in range(5)]
    learned = json.loads((place / "vae" / "learned.json").read_text())
    files = {"model.json": facts, "vae/config.json": config, "vae/log.json": log, "vae/learned.json": learned}
    for name, value in {**files, "tokenizer/config.json": config}.items():
        (place / name).write_text(json.dumps(value))
    whole, well = model_card(place, "m"), 0
    assert whole.count("\n| ") == 3 and all(f"- {part}: 4 pictures" in whole for part in PARTS[:2])
    for case in range(CASES):
        name = "model.json" if case % 2 else dice.choice(list(files))
        (place / name).write_bytes(as_text(damaged(files[name], dice), dice))
        cards = []
        good = tried(
            lambda: (read_facts(place), read_log(place / "vae"), cards.append(model_card(place, "m")))
        )
        well += good
        for card in cards:
            card.encode("utf-8")
            assert (
                card.count("\n| ") == 3 and card.count("\n## ") == whole.count("\n## ") and "<c>" not in card
            ), (name, card)
        (place / name).write_text(json.dumps(files[name]))
    assert 0.05 * CASES < well < 0.9 * CASES, well


@pytest.mark.parametrize(
    "text",
    (
        "a|b",
        "`x`",
        "<b>",
        "[a](b)",
        "line\nline",
        "\r",
        "\x1b[31m",
        "\ud800",
        "_x_",
        "$1 and $2",
        "&lt;",
        "# x",
        "\u202e",
    ),
)
def test_markdown(text):
    """No sign that opens markup is left unescaped, and the result is one printable line."""
    found = markdown(f"before {text} after")
    assert (
        found.isprintable() and "\n" not in found and found.startswith("before ") and found.endswith(" after")
    )
    bare = found.replace("\\\\", "")
    for sign in "|`<>[]$&#":
        assert bare.count(sign) == bare.count("\\" + sign), (sign, found)
