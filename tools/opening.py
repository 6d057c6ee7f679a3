"""The two pictures at the top of the README. docs/opening.png: held-out scenes through 1, 2, 4, … 32 tokens
of `mini`, and held-out clip art through those of `clipart`. docs/samples.jpg: new pictures, written by the AR
model of `mini`, one of each kind in a column.

    python tools/opening.py /usr/share/openclipart/png [docs]

after apt-get install openclipart-png
"""

from __future__ import annotations

import sys
from pathlib import Path

import PIL.Image
import torch

from flextok_edu.apps.models import sampling_defaults, open_tokenizer
from flextok_edu.engine.hub import shipped_models
from flextok_edu.engine.tensors import from_uint8, grid
from flextok_edu.data.learned import load_learned
from flextok_edu.ar import ARModel, sample_images
from flextok_edu.data.scenes import KINDS, ToyScenes
from flextok_edu.evaluation.evaluate import split_by_record
from flextok_edu.apps.page import picture_rows

SCENES = (
    5,
    12,
    17,
    19,
)  # of the held-out ones; chosen by hand, for different kinds and grounds, before any was decoded
REAL = (2, 11)  # the same: of the held-out clip art, two that everybody can name


BUDGETS = (1, 2, 4, 8, 16, 32)
SIDE = 128  # pixels of a picture; smaller ones are enlarged


def columns(name: str, images: torch.Tensor) -> list[torch.Tensor]:
    """Originals, then what comes back from 1, 2, 4, … tokens."""
    tok, usual = open_tokenizer(name), sampling_defaults(name)
    ids = tok.tokenize(images)
    how = dict(steps=usual.steps, guidance=usual.guidance, seed=0)
    pictures = [images, *(tok.detokenize(ids[:, :k], **how) for k in BUDGETS)]
    times = SIDE // images.shape[-1]
    return [p.repeat_interleave(times, -1).repeat_interleave(times, -2) for p in pictures]


def opening(folder: str, out: Path) -> None:
    """Lists of tokens, cut."""
    drawn = ToyScenes("val", SIDE, 2, length=64)
    _, held = split_by_record(folder, 64, load_learned(shipped_models()["clipart"] / "tokenizer"))
    parts = [
        columns("mini", torch.stack([drawn[i].image for i in SCENES])),
        columns("clipart", from_uint8(held.images[list(REAL)])),
    ]
    rows = [torch.stack([column[i] for column in part]) for part in parts for i in range(len(part[0]))]
    picture_rows(
        rows,
        ["scene"] * len(SCENES) + ["clip art"] * len(REAL),
        out,
        "the same list of tokens, cut after 1, 2, 4, … of them (held-out pictures)",
        ["original", *(f"{k} token{'s' * (k > 1)}" for k in BUDGETS)],
        1,
    )


def samples(out: Path, each: int = 3) -> None:
    """New pictures; the first that come, none chosen."""
    tok, ar, usual = open_tokenizer("mini"), ARModel.from_pretrained("mini"), sampling_defaults("mini")
    classes = torch.arange(len(KINDS)).repeat(each)
    how = dict(steps=usual.steps, guidance=usual.guidance)
    pictures = sample_images(ar, tok, classes, ar_guidance=2.0, **how)
    PIL.Image.fromarray(grid(pictures, len(KINDS), 1, 4)).save(out, quality=88)


def main() -> None:
    if not 2 <= len(sys.argv) <= 3:
        sys.exit(__doc__)
    folder, out = sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "docs")
    torch.set_grad_enabled(False)
    opening(folder, out / "opening.png")
    samples(out / "samples.jpg")
    print(out / "opening.png", out / "samples.jpg")


if __name__ == "__main__":
    main()
