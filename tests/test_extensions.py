"""What a reader adds from outside, in one place each: a tokenizer, a number, pictures, a loss, a solver, …

Each goes through training, caching, evaluation and the commands as what the package brings does.
"""

import json
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from einops import rearrange, repeat
from PIL import Image
from torch import nn

from flextok_edu import flow
from flextok_edu.apps.generate import detokenize_main, generate_main
from flextok_edu.apps.measure import eval_main
from flextok_edu.apps.tokenize import cache_main, tokenize_main
from flextok_edu.apps.train import train_main
from flextok_edu.ar import sample_images
from flextok_edu.ar_training import train_ar
from flextok_edu.data import registry
from flextok_edu.data.datasets import load_data
from flextok_edu.data.registry import SourceKind, register_source
from flextok_edu.data.set_sources import ObjectSource
from flextok_edu.engine import tokenizers
from flextok_edu.engine.config import preset
from flextok_edu.engine.hub import Pretrained
from flextok_edu.engine.limits import configuration
from flextok_edu.engine.models import load_model, model_kind, save_model
from flextok_edu.engine.tensors import noise_like
from flextok_edu.engine.tokenizers import Tokenizer, known_identity, powers_of_two, register_tokenizer
from flextok_edu.evaluation import metrics, verifiers
from flextok_edu.evaluation.metrics import Metric, register_metric
from flextok_edu.evaluation.report import load_report
from flextok_edu.evaluation.verifiers import Verifier
from flextok_edu.short_cuts import guided_velocity
from flextok_edu.training import train_tokenizer
from flextok_edu.vae import VAE

# --- a tokenizer: 4 x 4 squares, each by the nearest colour of a palette
# ----------------------------------------------------------------------


@configuration(
    "mosaic", part="tokenizer", limits={"side": int, "size": int}, identity={"side": ("side", None)}
)
@dataclass(frozen=True)
class MosaicConfig:
    side: int = 4
    size: int = 32


class Mosaic(nn.Module, Pretrained):
    """Knows nothing of VAEs, flows and FSQ."""

    kind, part, needs = "mosaic", "tokenizer", ("config.json", "model.safetensors")

    def __init__(self, config: MosaicConfig):
        super().__init__()
        self.config = config
        steps = torch.linspace(-1, 1, 4)
        self.register_buffer("palette", torch.cartesian_prod(steps, steps, steps))  # (v 3)

    vae = None
    vocabulary = property(lambda self: len(self.palette))
    length = property(lambda self: self.config.side**2)
    image_size = property(lambda self: self.config.size)
    token_counts = property(lambda self: powers_of_two(self.length))
    identity = property(known_identity)
    device = property(lambda self: self.palette.device)

    def tokenize(self, images, budget=None):
        squares = nn.functional.adaptive_avg_pool2d(images.to(self.device), self.config.side)
        colours = rearrange(squares, "b c h w -> b (h w) c")
        ids = torch.cdist(colours, self.palette.expand(len(colours), -1, -1)).argmin(-1)
        if budget is None or isinstance(budget, int):
            return ids[:, :budget]
        return [row[:k] for row, k in zip(ids, budget)]

    def detokenize(self, ids, sampling=None, *, first_index=0, **settings):
        squares = torch.zeros(len(ids), self.length, 3, device=self.device)  # grey where nothing is known
        for square, row in zip(squares, ids):
            square[: row.numel()] = self.palette[row.flatten().to(self.device)]
        times, side = self.config.size // self.config.side, self.config.side
        return repeat(squares, "b (h w) c -> b c (h p) (w q)", h=side, p=times, q=times)

    @classmethod
    def from_folder(cls, folder, vae=None):
        return load_model(folder, cls, MosaicConfig)

    @classmethod
    def _load_pretrained(cls, folder):
        return cls.from_folder(folder)[0]

    def _save_pretrained(self, save_directory):
        save_model(save_directory, self, self.config)


@pytest.fixture
def mosaic(tmp_path):
    before = dict(tokenizers.TOKENIZERS)
    register_tokenizer("mosaic", Mosaic)  # the one line
    yield Mosaic(MosaicConfig())
    tokenizers.TOKENIZERS.clear()
    tokenizers.TOKENIZERS.update(before)


# --- pictures
# ----------------------------------------------------------------------------------------------


def open_stripes(spec, options):
    """`stripes:60`: sixty pictures of two classes, by the way that the stripes run."""
    rng, count, n = np.random.default_rng(0), int(spec.removeprefix("stripes:")), options.size
    wave = np.sin(
        np.arange(n)[None, :, None] * rng.uniform(0.3, 1.2, (count, 1, 3)) + rng.uniform(0, 6, (count, 1, 3))
    )
    pictures = np.repeat((wave[:, None] * 127 + 128).astype(np.uint8), n, 1)  # (count h w 3)
    pictures[1::2] = pictures[1::2].swapaxes(1, 2)
    source = ObjectSource([(picture, i % 2) for i, picture in enumerate(pictures)], spec)
    source.classes = ("upright", "level")
    return source


@pytest.fixture
def stripes():
    kind = SourceKind("stripes", open_stripes, what="stripes:COUNT")
    register_source(kind)  # the one line
    yield "stripes:60"
    registry.SOURCES.remove(kind)


# --- a number
# ----------------------------------------------------------------------------------------------


def colour_error(output, original):  # images (b 3 h w) in [0, 1] -> (b,)
    return (output.mean((2, 3)) - original.mean((2, 3))).abs().mean(1)


@pytest.fixture
def colour():
    register_metric(Metric("colour", "colour", -1, "pictures", colour_error, range=(0, 1)))  # the one line
    yield "colour"
    del metrics.METRICS["colour"]


# --- a loss and a solver
# ----------------------------------------------------------------------------------------------


class EvenCodes:
    """Pulls the mean code of a batch towards 0."""

    name, weight, asked = "even", 0.5, 0

    def __call__(self, step):
        self.asked += 1
        return step.codes[step.keep].mean(0).square().mean()


def midpoint(velocity, noise, steps=25, shift=1.0):
    """A step of twice the length with the velocity of its middle."""
    x, times = noise, flow.euler_times(steps, shift=shift).tolist()
    for i in range(0, steps - 1, 2):
        middle = x + (times[i + 1] - times[i]) * velocity(x, i)
        x = x + (times[i + 2] - times[i]) * velocity(middle, i + 1)
    return x


@pytest.fixture
def solver():
    flow.SOLVERS["midpoint"] = midpoint  # the one line
    yield "midpoint"
    del flow.SOLVERS["midpoint"]


# --- through everything
# ----------------------------------------------------------------------------------------------

MICRO = preset("micro")
PROTOCOL = "kind vocabulary length image_size identity token_counts tokenize detokenize device".split()


def run(main, *words):
    try:
        main([str(w) for w in words])
    except SystemExit as end:
        assert not end.code, (words, end.code)


def test_a_tokenizer_a_source_and_a_metric_go_through_everything(mosaic, stripes, colour, tmp_path, capsys):
    assert isinstance(mosaic, Tokenizer)
    train, held = load_data(stripes, 32, 0, 100, progress=False)
    ids = mosaic.tokenize(held.images[:3].float() / 127.5 - 1, budget=4)
    assert ids.shape == (3, 4) and mosaic.detokenize(ids).shape == (3, 3, 32, 32)

    # training, in Python
    small = replace(MICRO, train_ar=replace(MICRO.train_ar, steps=3, batch=8))
    ar, log = train_ar(train, mosaic, small, progress=False)
    assert (ar.config.vocabulary, ar.config.length, ar.config.classes) == (64, 16, 2) and log[-1]["step"] == 2

    # the protocol is enough: no module, no weights, only a name
    bare = SimpleNamespace(**{n: getattr(mosaic, n) for n in PROTOCOL})
    assert isinstance(bare, Tokenizer)
    other, _ = train_ar(train, bare, small, progress=False)
    assert other.tokenizer is None and other.tokenizer_identity == mosaic.identity
    assert sample_images(other, bare, torch.tensor([0, 1])).shape == (2, 3, 32, 32)
    with pytest.raises(ValueError, match="writes ids of tokenizer"):
        sample_images(other, SimpleNamespace(**{**vars(bare), "identity": "another"}), torch.tensor([0]))

    # a folder says its kind, and is opened by it
    place = tmp_path / "mosaic"
    mosaic.save_pretrained(place)
    assert json.loads((place / "config.json").read_text())["kind"] == "mosaic"
    assert model_kind(place) == "tokenizer" and tokenizers.kind_of(place) == "mosaic"
    again = tokenizers.tokenizer_from_pretrained(place)
    assert type(again) is Mosaic and again.identity == mosaic.identity

    # the commands: a cache of ids, an AR model on it and on pictures, files of ids, pictures, a table
    data = "--data", stripes, "--preset", "micro", "--device", "cpu"
    run(cache_main, "tokens", *data, "--tokenizer", place, "--out", tmp_path / "ids")
    of_cache = "--cache", tmp_path / "ids", "--tokenizer", place, "--steps", 3, "--compile", "off"
    run(train_main, "ar", *data, *of_cache, "--out", tmp_path / "a")
    run(train_main, "ar", *data, *of_cache[2:], "--out", tmp_path / "b")
    for folder in "ab":
        assert (
            json.loads((tmp_path / folder / "config.json").read_text())["tokenizer_identity"]
            == mosaic.identity
        )
    files = tmp_path / "pictures"
    run(generate_main, "all", "--ar", tmp_path / "a", "--out", files, "--budgets", 1, 16, "--seeds", 0, 1)
    assert len(list(files.glob("*_seed1_016.png"))) == 2
    run(
        tokenize_main, *sorted(files.glob("*_016.png")), "--tokenizer", place, "--out", tmp_path / "ids.jsonl"
    )
    run(detokenize_main, tmp_path / "ids.jsonl", "--tokenizer", place, "--out", tmp_path / "back")
    back = sorted((tmp_path / "back").glob("0*.png"))
    for one, other in zip(sorted(files.glob("*_016.png")), back, strict=True):
        assert np.array_equal(*(np.asarray(Image.open(f)) for f in (one, other))), (
            "a mosaic's mosaic is itself"
        )
    quick = "--set", "evaluate.samples=20"
    run(eval_main, place, *data, *quick, "--ar", tmp_path / "a", "--out", tmp_path / "table")
    assert "the vae learned" not in capsys.readouterr().err
    report = load_report(tmp_path / "table")
    rows = [row for row in report.rows if row["what"] == "tokens"]
    assert [row["tokens"] for row in rows] == [1, 2, 4, 8, 16]
    assert rows[-1]["mae"] < rows[0]["mae"] and {"colour_se", "colour_gain"} <= set(rows[-1])
    assert "colour" in str(report)
    assert not any(row["what"].lower().startswith("vae") for row in report.rows), "there is no VAE"


def test_a_loss_and_a_solver_go_through_training_and_decoding(stripes, solver):
    train, held = load_data(stripes, 32, 0, 100, progress=False)
    torch.manual_seed(0)
    vae, term = VAE(MICRO.vae), EvenCodes()
    small = replace(MICRO, train_tokenizer=replace(MICRO.train_tokenizer, steps=4, batch=8))
    tok, log = train_tokenizer(train, vae, small, terms=[term], progress=False)
    plain, other = train_tokenizer(train, vae, small, progress=False)
    assert term.asked >= 4 and all("even" in row for row in log) and "even" not in other[0]
    assert log[0]["flow"] == other[0]["flow"] and log[1]["flow"] != other[1]["flow"], "the same first step"
    assert 0 < log[0]["even"] < 1
    assert tok.identity != plain.identity, "it changed what was learnt"
    ids = tok.tokenize(held.images[:2].float() / 127.5 - 1)
    with torch.no_grad():
        found = tok.decode_latents(ids, steps=4, guidance=1.0, solver=solver, seed=3)
        codes = tok.fsq.ids_to_codes(ids)
        settings = flow.SamplingConfig(steps=4, guidance=1.0, solver=solver)
        velocity = guided_velocity(tok.decoder, codes, tok.length, settings, True, None)
        noise = noise_like(found.shape[1:], 3, [0, 1])
        assert torch.allclose(found, midpoint(velocity, noise, 4), atol=1e-5)
        assert not torch.allclose(found, tok.decode_latents(ids, steps=4, guidance=1.0, seed=3), atol=1e-3)
    with pytest.raises(ValueError, match="solver 'upside_down': use one of .*midpoint"):
        tok.decode_latents(ids, steps=4, solver="upside_down")


# --- a verifier: who likes it dark
# ----------------------------------------------------------------------


class Dark(Verifier):
    """Scores what a search decodes; whatever was asked for."""

    def measure(self, images, ids, prompts):  # images (n 3 h w) in [-1, 1] -> (n, 1)
        return -images.mean((1, 2, 3))[:, None]


@pytest.fixture()
def dark(monkeypatch):
    monkeypatch.setattr(verifiers, "VERIFIERS", dict(verifiers.VERIFIERS))
    verifiers.register_verifier("dark", lambda asked: Dark())


def test_a_verifier_guides_the_command(dark, tmp_path):
    few = ["--budgets", "2", "--beams", "2", "--candidates", "4", "--steps", "1"]
    words = ["boat", "fish", "--ar", "tiny", *few, "--seeds", "3", "--out"]
    light = {}
    for name, how in (("plain", ()), ("dark", ("--search", "best_of_n", "--verifier", "dark"))):
        run(generate_main, *words, str(tmp_path / name), *how)
        files = sorted((tmp_path / name).glob("0*.png"))
        assert len(files) == 2
        light[name] = np.mean([np.asarray(Image.open(file)).mean() for file in files])
    assert light["dark"] < light["plain"] - 10
