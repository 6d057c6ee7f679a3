"""The picture at the top of the README: held-out scenes and two photographs, through 1, 2, 4, … tokens of a model that comes with the package.

    python tools/opening.py photo1 photo2 [docs/opening.png]

The photographs in the repository's picture are `astronaut.png` and `coffee.png` of scikit-image (both public domain); they are not contained here.
"""
from __future__ import annotations

import sys
from pathlib import Path

import torch

from flextok_edu.commands import habits, open_tokenizer, size_of
from flextok_edu.core import from_uint8
from flextok_edu.data import ToyScenes, read_squares
from flextok_edu.evaluate import token_counts
from flextok_edu.pipeline import _rows

SCENES = (5, 12, 17, 19)  # of the held-out ones; chosen by hand, for different kinds and grounds, before any was decoded


def main() -> None:
    photos, out = [Path(p) for p in sys.argv[1:3]], Path(sys.argv[3] if len(sys.argv) > 3 else "docs/opening.png")
    if len(photos) < 2:
        sys.exit(__doc__)
    torch.set_grad_enabled(False)
    tok, usual = open_tokenizer("tiny"), habits("tiny")
    drawn = ToyScenes("val", size_of(tok), 2, length=64)
    squares, good = read_squares(photos, size_of(tok), False)
    if len(good) < 2:
        sys.exit(f"cannot read {', '.join(map(str, photos))}")
    images = torch.cat([torch.stack([drawn[i].image for i in SCENES]), from_uint8(squares)])
    ids, counts = tok.tokenize(images), token_counts(tok.config.registers)
    columns = [images, *(tok.detokenize(ids[:, :k], usual.steps, usual.guidance, 0) for k in counts)]
    rows = [torch.stack([c[i] for c in columns]) for i in range(len(images))]
    names = ["held-out scene"] * 4 + ["photograph"] * 2
    _rows(rows, names, out, "the same list of tokens, cut after 1, 2, 4, … of them", ["original", *(f"{k} token{'s' * (k > 1)}" for k in counts)], 2)
    print(out)


if __name__ == "__main__":
    main()
