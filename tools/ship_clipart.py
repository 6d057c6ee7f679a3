"""How flextok_edu/zoo/clipart was put together from its trainings (nbs/experiments/real_images.ipynb has the commands that make them).

    python tools/ship_clipart.py RUNS PICTURES            RUNS holds vae, tokenizer, tokenizer2, tokenizer3: what flextok_train left; PICTURES is the folder they learnt from
    flextok_eval clipart --data PICTURES --out TABLE
    python tools/ship_clipart.py RUNS PICTURES TABLE      once more, with the table of results

`tokenizer2` is `tokenizer` after a second training, with a learning rate of its own, `tokenizer3` is `tokenizer2` after a third.
"""
from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

from flextok_edu.core import from_uint8, preset, write_text
from flextok_edu.data import load_data
from flextok_edu.zoo import pack
from ship_tiny import one_after_the_other, read

TEXT = """FlexTok at 64 px for clip art: a picture becomes up to 32 tokens out of 1,000 words, coarse to fine; any number of them, from the first, gives a picture back. VAE and tokenizer began with the weights of `tiny` and went on, encoder and decoder, with 5,095 pictures of the Open Clip Art Library (Debian's `openclipart-png`, public domain), mirrored too, on two CPU cores. No AR model, no classifier: five thousand pictures in 22 folders are too few for the one, and nothing reads their attributes for the other.

What a stranger would recognise: from one or two tokens no object, only ground, palette and covering (and a pale ring, of which training had hundreds); from 8 a face; from 16 a T-shirt, a moon, a box; from 32 an ear, a cup, a small figure with arms and legs. Whatever is thinner than two pixels is lost, lettering first."""
LIMITS = """It knows clip art, nearly two thirds of it computer icons, rings, flags and signs. Photographs come back as stains. `nbs/experiments/real_images` shows what comes back, count by count. One seed, one split; near twins of held-out pictures are among the training pictures."""
GUIDANCE = 1.5  # chosen on training pictures


def assemble(trainings: list[Path], to: Path) -> None:
    """The weights of the last training; log and facts of all."""
    *_, last = trainings
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(last, to)
    stage, log = one_after_the_other(*trainings)
    later = [(read(run / "config.json")["stage"]["steps"], read(run / "run.json")["preset"]["train_tokenizer"]["lr"]) for run in trainings[1:]]
    write_text(to / "config.json", json.dumps(read(last / "config.json") | {"stage": stage | {"of_which_later_trainings": sum(steps for steps, _ in later)}}, indent=1))
    write_text(to / "log.json", json.dumps(log))
    command = "; then ".join(["flextok_train tokenizer --tokenizer tiny --part both", *(f"the same from its result ({steps} steps, lr {lr:g})" for steps, lr in later)])
    write_text(to / "run.json", json.dumps({**read(trainings[0] / "run.json"), "command": command}, indent=1))


def main() -> None:
    if len(sys.argv) not in (3, 4):
        sys.exit(__doc__)
    runs, pictures, table = Path(sys.argv[1]), sys.argv[2], sys.argv[3] if len(sys.argv) > 3 else None
    zoo, usual = Path(__file__).resolve().parent.parent / "flextok_edu" / "zoo", preset("tiny").evaluate
    _, held = load_data(pictures, 64, 0, 5000)
    assemble([runs / name for name in ("tokenizer", "tokenizer2", "tokenizer3")], runs / "assembled")
    pack({"vae": runs / "vae", "tokenizer": runs / "assembled"}, "clipart", zoo, TEXT, LIMITS, images=from_uint8(held.images[:64]), report=table, evaluate=replace(usual, guidance=GUIDANCE), again=True)


if __name__ == "__main__":
    main()
