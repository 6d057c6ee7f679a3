"""The picture at the top of the README: held-out scenes through 1, 2, 4, … tokens of `tiny`, and held-out
clip art through those of `clipart`.

    python tools/opening.py /usr/share/openclipart/png [docs/opening.png]

after apt-get install openclipart-png
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from flextok_edu.apps.models import sampling_defaults, open_tokenizer
from flextok_edu.engine.hub import shipped_models
from flextok_edu.engine.tensors import from_uint8
from flextok_edu.data.learned import load_learned
from flextok_edu.data.scenes import ToyScenes
from flextok_edu.evaluation.evaluate import split_by_record
from flextok_edu.evaluation.metrics import token_counts
from flextok_edu.apps.page import picture_rows

SCENES = (
    5,
    12,
    17,
    19,
)  # of the held-out ones; chosen by hand, for different kinds and grounds, before any was decoded
REAL = (2, 11)  # the same: of the held-out clip art, two that everybody can name


def columns(name: str, images: torch.Tensor) -> list[torch.Tensor]:
    """Originals, then what comes back from 1, 2, 4, … tokens."""
    tok, usual = open_tokenizer(name), sampling_defaults(name)
    ids = tok.tokenize(images)
    return [
        images,
        *(
            tok.detokenize(ids[:, :k], steps=usual.steps, guidance=usual.guidance, seed=0)
            for k in token_counts(tok.config.registers)
        ),
    ]


def main() -> None:
    if not 2 <= len(sys.argv) <= 3:
        sys.exit(__doc__)
    folder, out = sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "docs/opening.png")
    torch.set_grad_enabled(False)
    drawn = ToyScenes("val", 64, 2, length=64)
    _, held = split_by_record(folder, 64, load_learned(shipped_models()["clipart"] / "tokenizer"))
    parts = [
        columns("tiny", torch.stack([drawn[i].image for i in SCENES])),
        columns("clipart", from_uint8(held.images[list(REAL)])),
    ]
    rows = [torch.stack([column[i] for column in part]) for part in parts for i in range(len(part[0]))]
    counts = token_counts(open_tokenizer("tiny").config.registers)
    names = ["scene"] * len(SCENES) + ["clip art"] * len(REAL)
    picture_rows(
        rows,
        names,
        out,
        "the same list of tokens, cut after 1, 2, 4, … of them (held-out pictures)",
        ["original", *(f"{k} token{'s' * (k > 1)}" for k in counts)],
        2,
    )
    print(out)


if __name__ == "__main__":
    main()
