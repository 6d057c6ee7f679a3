"""How flextok_edu/zoo/clipart was put together from its trainings (nbs/experiments/real_images.ipynb has the commands that make them).

    python tools/ship_clipart.py RUNS PICTURES            RUNS holds vae and tokenizer: what flextok_train left; PICTURES is the folder they learnt from
    flextok_eval clipart --data PICTURES --out TABLE
    python tools/ship_clipart.py RUNS PICTURES TABLE      once more, with the table of results
"""
from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

from flextok_edu.core import from_uint8, preset
from flextok_edu.data import load_data
from flextok_edu.zoo import pack

TEXT = """FlexTok at 64 px for clip art: a picture becomes up to 32 tokens out of 1,000 words, coarse to fine; any number of them, from the first, gives a picture back. VAE and tokenizer began with the weights of `tiny` and went on, encoder and decoder, with 5,095 pictures of the Open Clip Art Library (Debian's `openclipart-png`, public domain), mirrored too, on two CPU cores. No AR model, no classifier: five thousand pictures in 22 folders are too few for the one, and nothing reads their attributes for the other."""
LIMITS = """It knows clip art, a third of it grey icons, rings and flags. `nbs/experiments/real_images` shows what comes back, count by count. One seed, one split; near twins of held-out pictures are among the training pictures."""


def main() -> None:
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    runs, pictures, table = Path(sys.argv[1]), sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None
    zoo, usual = Path(__file__).resolve().parent.parent / "flextok_edu" / "zoo", preset("tiny").evaluate
    _, held = load_data(pictures, 64, 0, 5000)
    before = zoo / "clipart"
    put_aside = before.rename(runs / "clipart.before") if before.exists() else None  # back again if the new one is refused
    try:
        pack({p: runs / p for p in ("vae", "tokenizer")}, "clipart", zoo, TEXT, LIMITS, images=from_uint8(held.images[:64]), report=table, evaluate=replace(usual, guidance=GUIDANCE))
    except BaseException:
        if put_aside:
            put_aside.rename(before)
        raise
    if put_aside:
        shutil.rmtree(put_aside)


GUIDANCE = 2.  # chosen on training pictures


if __name__ == "__main__":
    main()
