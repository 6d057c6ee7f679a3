"""One set of scenes while a tokenizer leaves the plateau: docs/plateau.jpg and docs/plateau.json.

    python tools/plateau.py          train `micro` on the latents of the shipped `tiny` VAE, then draw
    python tools/plateau.py --draw   draw again from what lies in runs/plateau

Training stops on Ctrl-C or SIGTERM and the same command goes on from there. While it runs, the tokenizer is
looked at 11 times: what it makes of four held-out scenes from 1, 4 and 16 tokens in one step from zero noise
(its best guess), how large the error of this guess is on 200 held-out scenes, and what the shipped attribute
classifier reads off its samples.
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from flextok_edu import VAE, AttributeClassifier, FlexTok
from flextok_edu.data.datasets import ImageSet, load_data
from flextok_edu.data.scenes import ATTRIBUTES, ToyScenes
from flextok_edu.engine.config import preset
from flextok_edu.engine.files import write_text
from flextok_edu.engine.long_run import Stopped, long_run
from flextok_edu.engine.trainer import Callback
from flextok_edu.training import Latents, cache_latents, fit_tokenizer

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "runs" / "plateau"
STEPS, TRAIN, VAL = 1000, 20_000, 200
POINTS = (25, 50, 100, 150, 200, 300, 400, 500, 600, 800, STEPS)
COUNTS = (1, 2, 4, 8, 16)
SCENES = (5, 12, 17, 19)  # the held-out ones of the README's picture
SHOWN = (1, 4, 16)
DRAWN = (25, 100, 200, 300, 400, 500, 600, STEPS)  # of POINTS, the columns of the picture


def scenes() -> tuple[ImageSet, ImageSet]:
    """Training and held-out scenes of the kind that the `tiny` VAE was trained on."""
    return load_data("scenes", 64, TRAIN, VAL, 2, progress=False)


def latents_of(vae: VAE, images: Tensor, name: str) -> Latents:
    """Posteriors of these images, cached in the run's folder."""
    path = FOLDER / f"{name}.pt"
    if not path.exists():
        torch.save(cache_latents(vae, images), path)
    return Latents(*torch.load(path))


def known(train: Latents, data: ImageSet, held: Latents, val: ImageSet, names: tuple[str, ...]) -> float:
    """The held-out error of the best linear guess of the latents from these attributes (one-hot) alone."""

    def inputs(labels: Tensor) -> Tensor:
        hot = [one_hot(labels[:, list(ATTRIBUTES).index(n)], ATTRIBUTES[n]) for n in names]
        return torch.cat([torch.ones(len(labels), 1), *hot], 1)

    weights = torch.linalg.lstsq(inputs(data.labels), train.means.flatten(1), driver="gelsd").solution
    return float((inputs(val.labels) @ weights - held.means.flatten(1)).square().mean())


class Album(Callback):
    """At certain steps: pictures, errors, and what the classifier reads."""

    def __init__(self, tok: FlexTok, val: ImageSet, latents: Tensor):
        self.tok = tok
        self.truth = val.labels
        self.latents = latents
        self.reader = AttributeClassifier.from_pretrained("tiny")
        self.cpu = max((r["cpu_seconds"] for r in self.rows()), default=0.0) - time.process_time()

    @staticmethod
    def rows() -> list[dict]:
        return [json.loads(f.read_text()) for f in sorted(FOLDER.glob("point_*.json"))]

    def step(self, training, backend, looked: bool) -> None:
        if training.done in POINTS:
            self.look(training.done)

    def right(self, latents: Tensor) -> dict[str, float]:
        """The share of pictures off which each attribute is read rightly."""
        read = self.reader.read(self.tok.vae.decode(latents).clamp(-1, 1))
        return dict(zip(ATTRIBUTES, (read == self.truth).float().mean(0).tolist()))

    @torch.no_grad()
    def look(self, done: int) -> None:
        tok, z = self.tok.eval(), self.latents
        with torch.compiler.set_stance("force_eager"):
            ids = tok.encode_latents(z)
            nothing = torch.zeros_like(z)
            guesses = {k: tok.decode_latents(ids[:, :k], nothing, steps=1) for k in COUNTS}
            samples = {k: tok.decode_latents(ids[:, :k], steps=5, guidance=1.5, seed=0) for k in SHOWN}
        row = {
            "step": done,
            "error": {k: float((g - z).square().mean()) for k, g in guesses.items()},
            "right": {k: self.right(s) for k, s in samples.items()},
            "cpu_seconds": self.cpu + time.process_time(),
        }
        four = list(SCENES)
        kept = {"guess": guesses, "sample": samples}
        kept = {name: {k: x[four] for k, x in found.items()} for name, found in kept.items()}
        torch.save(kept, FOLDER / f"point_{done:05d}.pt")
        write_text(FOLDER / f"point_{done:05d}.json", json.dumps(row))
        print(json.dumps(row), flush=True)
        tok.train()


def train() -> None:
    """Train `micro`, or go on; write docs/plateau.json at the end."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    vae = VAE.from_pretrained("tiny")
    data, val = scenes()
    latents, held = latents_of(vae, data.images, "train"), latents_of(vae, val.images, "val")
    p = preset("micro")
    config = replace(p.train_tokenizer, steps=STEPS)
    torch.manual_seed(0)
    tok = FlexTok(p.tokenizer, vae)
    trainer = long_run(FOLDER, device="cpu", steps=100, callbacks=[Album(tok, val, held.means)])
    try:
        _, log = fit_tokenizer(tok, latents, config, trainer=trainer, compile=True, progress=False)
    except Stopped as stop:
        sys.exit(str(stop))
    rows = Album.rows()
    known_by = {
        "nothing": (),
        "place": ("place",),
        "place and light": ("place", "light"),
        "kind, colour, place and light": tuple(ATTRIBUTES),
    }
    facts = {
        "command": "python tools/plateau.py",
        "tokenizer": "micro on the latents of the shipped tiny VAE (64 px scenes, level 2)",
        "steps": STEPS,
        "batch": config.batch,
        "train_scenes": TRAIN,
        "held_out_scenes": VAL,
        "seed": 0,
        "minutes": round(log[-1]["seconds"] / 60, 1),
        "cpu_minutes": round(rows[-1]["cpu_seconds"] / 60, 1),
        "machine": f"1 thread of {os.cpu_count()} shared cores, torch {torch.__version__}",
        "error_of_a_guess_that_knows": {
            name: round(known(latents, data, held, val, attributes), 4)
            for name, attributes in known_by.items()
        },
        "points": [{k: v for k, v in r.items() if k != "cpu_seconds"} for r in rows],
        "log": [
            {k: round(r[k], 4) for k in ("step", "tokenizer", "flow", "regression_full", "lr") if k in r}
            for r in log
        ],
    }
    write_text(ROOT / "docs" / "plateau.json", json.dumps(facts, indent=1) + "\n")
    print(f"{time.perf_counter() - began:.0f} s in this sitting")


def sheet(columns: list[tuple[str, dict[int, Tensor]]], originals: Tensor, gap: int = 2) -> np.ndarray:
    """Originals, then a column a point; a row for each scene and number of tokens."""
    side, count = originals.shape[-1], len(SHOWN)
    high, wide = (
        len(originals) * (count * (side + gap) + 3 * gap),
        (1 + len(columns)) * (side + gap) + 3 * gap,
    )
    found = np.full((high, wide, 3), 255, np.uint8)

    def put(image: Tensor, top: int, left: int) -> None:
        pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        found[top : top + side, left : left + side] = pixels

    for i, original in enumerate(originals):
        top = i * (count * (side + gap) + 3 * gap)
        put(original, top + (count - 1) // 2 * (side + gap), 0)
        for j, (_, pictures) in enumerate(columns):
            for r, k in enumerate(SHOWN):
                put(pictures[k][i], top + r * (side + gap), (j + 1) * (side + gap) + 3 * gap)
    return found


def draw() -> None:
    """docs/plateau.jpg from docs/plateau.json and the pictures of the run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    facts = json.loads((ROOT / "docs" / "plateau.json").read_text())
    vae = VAE.from_pretrained("tiny")
    originals = torch.stack([ToyScenes("val", 64, 2, length=VAL)[i].image for i in SCENES])
    columns = []
    for point in DRAWN:
        kept = torch.load(FOLDER / f"point_{point:05d}.pt")["guess"]
        with torch.no_grad():
            columns.append((f"step {point}", {k: vae.decode(x) for k, x in kept.items()}))
    pixels, side, dpi = sheet(columns, originals), 66, 90
    width, margin, above, below = pixels.shape[1] / dpi, 0.95, 0.3, 5.0
    height = pixels.shape[0] / dpi
    size = (9.0, height + above + below)
    fig = plt.figure(figsize=size, dpi=dpi)
    ax = fig.add_axes((margin / size[0], below / size[1], width / size[0], height / size[1]))
    ax.imshow(pixels, interpolation="nearest", aspect="auto")
    ax.axis("off")
    for j, name in enumerate(("original", *(name for name, _ in columns))):
        ax.text((j + 0.5) * side + 6 * (j > 0), -5, name, ha="center", va="bottom", fontsize=9)
    for i in range(len(SCENES)):
        for r, k in enumerate(SHOWN):
            at = i * (len(SHOWN) * side + 6) + (r + 0.5) * side
            ax.text(-6, at, f"{k} token{'s' * (k > 1)}", ha="right", va="center", fontsize=9)
    points = facts["points"]
    steps = [r["step"] for r in points]
    low = 0.08, 0.45 / size[1], 0.66, (below - 0.95) / 2 / size[1]
    right = fig.add_axes(low)
    error = fig.add_axes((low[0], low[1] + low[3] + 0.35 / size[1], *low[2:]))
    for k in COUNTS:
        error.plot(
            steps, [r["error"][str(k)] for r in points], ".-", lw=1.2, label=f"{k} token{'s' * (k > 1)}"
        )
    for name, style in (("nothing", ":"), ("place and light", "--"), ("kind, colour, place and light", "-.")):
        level = facts["error_of_a_guess_that_knows"][name]
        error.axhline(level, color="k", lw=0.8, ls=style, label=f"a guess that knows\n{name}")
    error.set(ylabel="error of the one-step guess", ylim=(0, 1.05), xticklabels=[])
    for name, colour in zip(("place", "light", "colour", "kind"), ("C2", "C8", "C1", "C3")):
        right.plot(steps, [r["right"]["16"][name] for r in points], ".-", lw=1.2, color=colour, label=name)
    right.set(xlabel=f"step (of {facts['batch']} images)", ylabel="read off 16 tokens", ylim=(0, 1.05))
    for ax in (error, right):
        ax.spines[["top", "right"]].set_visible(False)
        ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.02), frameon=False, fontsize=9)
        for point in DRAWN:
            ax.axvline(point, color="k", lw=0.5, alpha=0.15)
    fig.savefig(ROOT / "docs" / "plateau.jpg", dpi=dpi, pil_kwargs={"quality": 88, "subsampling": 0})
    plt.close(fig)


if __name__ == "__main__":
    if "--draw" not in sys.argv[1:]:
        train()
    draw()
