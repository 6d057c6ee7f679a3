"""How flextok_edu/zoo/clipart was put together from its trainings (nbs/experiments/real_images.ipynb has the
commands that make them).

    python tools/ship_clipart.py RUNS PICTURES
    flextok_eval clipart --data PICTURES --out TABLE
    python tools/ship_clipart.py RUNS PICTURES TABLE      once more, with the table of results

RUNS holds vae, tokenizer, tokenizer2, tokenizer3: what flextok_train left; PICTURES is the folder they
learnt from. `tokenizer2` is `tokenizer` after a second training, with a learning rate of its own,
`tokenizer3` is `tokenizer2` after a third.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch

from flextok_edu.engine.config import preset
from flextok_edu.engine.files import write_text
from flextok_edu.engine.tensors import from_uint8
from flextok_edu.data.folders import read_folder
from flextok_edu.data.keys import picture_keys
from flextok_edu.data.learned import Learned, save_learned
from flextok_edu.evaluation.evaluate import split_by_record
from flextok_edu.apps.zoo import pack
from ship_tiny import one_after_the_other, read

TEXT = (
    "FlexTok at 64 px for clip art: a picture becomes up to 32 tokens out of 1,000 words, coarse to "
    "fine; any number of them, from the first, gives a picture back. VAE and tokenizer began with "
    "the weights of `tiny` and went on, encoder and decoder, with 5,095 pictures of the Open Clip "
    "Art Library (Debian's `openclipart-png`, public domain), mirrored too, on two CPU cores. No AR "
    "model, no classifier: five thousand pictures in 22 folders are too few for the one, and nothing "
    "reads their attributes for the other.\n"
    "\n"
    "What a stranger would recognise: from one or two tokens no object, only ground, palette and "
    "covering (and a pale ring, of which training had hundreds); from 8 a face; from 16 a T-shirt, a "
    "moon, a box; from 32 an ear, a cup, a small figure with arms and legs. Whatever is thinner than "
    "two pixels is lost, lettering first."
)
LIMITS = (
    "It knows clip art, nearly two thirds of it computer icons, rings, flags and signs. Photographs "
    "come back as stains. `nbs/experiments/real_images` shows what comes back, count by count. One "
    "seed, one split; near twins of held-out pictures are among the training pictures."
)
GUIDANCE = 1.5  # chosen on training pictures
RULE = "drawn at random, seed 0 (before pictures were divided by their bytes)"


def record(pictures: str | Path) -> Learned:
    """What clipart learned from.

    It was trained before pictures were divided by their bytes: equal pixels were dropped, and a quarter of
    the rest, drawn at random, was held out.

    This is that rule, kept for this one list. Every file whose pixels at 64 px equal a learned picture's
    counts as learned.
    """
    found = read_folder(pictures, 64, progress=False)
    pixels, first = [hashlib.sha256(image.numpy()).digest() for image in found.images], {}
    for i, value in enumerate(pixels):
        first.setdefault(value, i)
    order = torch.randperm(len(first), generator=torch.Generator().manual_seed(0)).tolist()
    different = list(first)
    learned = {different[i] for i in order[min(5000, len(first) // 4) :]}
    files = [Path(pictures) / path for path, value in zip(found.paths, pixels) if value in learned]
    keys = picture_keys(files).unique()  # sorted
    name = hashlib.sha256(keys.numpy()).hexdigest()[:16]
    return Learned(
        RULE,
        f"clip art of Debian's openclipart-png 1:0.18+dfsg-19: {len(files):,} files, {len(keys):,} "
        f"different ones, {len(learned):,} different at 64 px; begun with the weights of tiny, which "
        "learned from ToyScenes train, level 2, seed 0",
        len(keys),
        name,
        keys,
    )


def assemble(trainings: list[Path], to: Path) -> None:
    """The weights of the last training; log and facts of all."""
    *_, last = trainings
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(last, to)
    stage, log = one_after_the_other(*trainings)
    later = [
        (
            read(run / "config.json")["stage"]["steps"],
            read(run / "run.json")["preset"]["train_tokenizer"]["lr"],
        )
        for run in trainings[1:]
    ]
    write_text(
        to / "config.json",
        json.dumps(
            read(last / "config.json")
            | {"stage": stage | {"of_which_later_trainings": sum(steps for steps, _ in later)}},
            indent=1,
        ),
    )
    write_text(to / "log.json", json.dumps(log))
    command = "; then ".join(
        [
            "flextok_train tokenizer --tokenizer tiny --part both",
            *(f"the same from its result ({steps} steps, lr {lr:g})" for steps, lr in later),
        ]
    )
    write_text(to / "run.json", json.dumps({**read(trainings[0] / "run.json"), "command": command}, indent=1))


def main() -> None:
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    runs, pictures, table = Path(sys.argv[1]), sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None
    zoo, usual = Path(__file__).resolve().parent.parent / "flextok_edu" / "zoo", preset("tiny").evaluate
    learned = record(pictures)
    held = split_by_record(pictures, 64, learned, progress=False)[1]
    assemble([runs / name for name in ("tokenizer", "tokenizer2", "tokenizer3")], runs / "assembled")
    for folder in (runs / "vae", runs / "assembled"):
        save_learned(folder, learned)
    pack(
        {"vae": runs / "vae", "tokenizer": runs / "assembled"},
        "clipart",
        zoo,
        TEXT,
        LIMITS,
        images=from_uint8(held.images[:64]),
        report=table,
        evaluate=replace(usual, guidance=GUIDANCE),
        again=True,
    )


if __name__ == "__main__":
    main()
