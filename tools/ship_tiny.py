"""How flextok_edu/zoo/tiny was put together from its trainings (nbs/experiments/tiny_recipe.ipynb has the
commands that make them).

    python tools/ship_tiny.py RUNS
    flextok_eval tiny --ar tiny --classifier tiny --train-images 100 --out TABLE
    python tools/ship_tiny.py RUNS TABLE      once more, with the table of results

RUNS holds what flextok_train left; the classifier is trained if it is not there.

    vae         from scratch
    vae2        its decoder alone went on
    vae3        both parts
    vae4        the decoder alone
    tokenizer   from scratch, on vae
    tokenizer2  both parts went on, on vae3
    tokenizer3  its decoder alone
    tokenizer4  both parts
    ar          from scratch, on the ids of tokenizer2
    ar2         went on, on those of tokenizer4

A VAE whose decoder went on alone makes the same latents: the tokenizer only has to be told its new hash, and
the AR model the tokenizer's.
"""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

from flextok_edu.ar import load_ar, save_ar
from flextok_edu.engine.binding import tokenizer_hash
from flextok_edu.engine.config import Preset, VAEConfig, preset
from flextok_edu.engine.files import write_text
from flextok_edu.engine.models import load_model, save_model
from flextok_edu.data.datasets import load_data
from flextok_edu.data.learned import Learned, save_learned
from flextok_edu.evaluation.report import versions
from flextok_edu.data.features import train_classifier
from flextok_edu.tokenizer import load_tokenizer, save_tokenizer, with_decoder
from flextok_edu.vae import VAE
from flextok_edu.apps.zoo import pack

TEXT = (
    "FlexTok at 64 px: a picture becomes up to 32 tokens out of 1,000 words, coarse to fine; any "
    "number of them, from the first, gives a picture back. With an AR model that writes such lists "
    "for twelve classes, and the attribute classifier that its table was measured with. All of it "
    "was trained from scratch on ToyScenes of level 2 (a thing of one of twelve kinds and eight "
    "colours on one of several grounds, mostly with a second, small thing), on two CPU cores, in "
    "five hours (more than half of the VAE's time, the classifier and the AR model on one of them).\n"
    "\n"
    "What a stranger would recognise: from one token the ground and its light; often a snowman, a "
    "flower, a balloon or a mushroom, in a colour that the decoder made up. From 2 most houses, "
    "boats, flowers and balloons; from 4 to 8 their colours and where they stand; from 16 to 32 most "
    "cars and about half of the fishes and of the stars; suns as a disc without face or rays. The "
    "small second thing, where it is there at all, is a blob of about the right colour. Outlines are "
    "soft, petals and stripes sometimes run into each other; the VAE alone, whose pictures are the "
    "ceiling, is soft as well. Of the new pictures flowers, mushrooms, balloons, snowmen and cacti "
    "are recognised, nearly all trees and boats, and three of four houses and cars. Suns are discs, "
    "half of the fishes have no clear shape, and of sixteen stars four had points: the classifier "
    "reads the others all the same, by colour and ground."
)
LIMITS = (
    "Photographs come back as grounds, horizons and blobs of about the right colours: nothing in "
    "them would be recognised. One seed; a VAE with an error of 0.015 (of a white of 1) is blurred "
    "at edges and loses small things. VAE, tokenizer and AR model were trained in several runs, each "
    "going on where the one before had ended."
)


# all parts; the hash is that of the pictures, and drawing them today gives it again
LEARNED = Learned("scenes", "ToyScenes train, level 2, seed 0, 64 px", 80_000, "670cfc6992eee654", None)


def read(file: Path):
    return json.loads(file.read_text(encoding="utf-8"))


def one_after_the_other(*runs: Path) -> tuple[dict, list[dict]]:
    """What a training and those that went on with its result have to say together: the facts of the stage,
    the log.
    """
    stages, log = [read(f / "config.json")["stage"] for f in runs], []
    steps = seconds = 0
    for run, stage in zip(runs, stages):
        log += [
            {**row, "step": row["step"] + steps, "seconds": row["seconds"] + seconds}
            for row in read(run / "log.json")
        ]
        steps, seconds = steps + stage["steps"], seconds + stage["seconds"]
    return {
        **stages[0],
        "steps": steps,
        "seconds": seconds,
        "images_per_second": steps * stages[0]["batch"] / seconds,
    }, log


def facts_of(found: dict) -> dict:
    """What config.json says besides what is written anew."""
    return {
        k: v
        for k, v in found.items()
        if k not in ("config", "weights", "terms") and not k.startswith(("vae", "tokenizer"))
    }  # (whose it is goes by hash, identity, and meaning)


def classify(folder: Path, p: Preset) -> None:
    """The classifier, which no command trains alone."""
    train, _ = load_data("scenes", p.image_size, p.train_images, 2, p.level)
    model, log = train_classifier(train, p.train_classifier)
    c = p.train_classifier
    write_text(folder / "log.json", json.dumps(log))
    write_text(
        folder / "run.json",
        json.dumps(
            {
                "command": "train_classifier",
                "options": {"seed": 0, "data": "scenes"},
                "preset": asdict(p),
                "versions": versions(),
            },
            indent=1,
        ),
    )
    save_model(
        folder,
        model,
        c,
        stage={
            "stage": "classifier",
            "steps": c.steps,
            "batch": c.batch,
            "seconds": log[-1]["seconds"],
            "images_per_second": c.steps * c.batch / log[-1]["seconds"],
            "parameters": sum(w.numel() for w in model.parameters()),
        },
    )


VAES = {"vae": None, "vae2": "decoder", "vae3": "both", "vae4": "decoder"}  # folder: which part went on
TOKENIZERS = {"tokenizer": None, "tokenizer2": "both", "tokenizer3": "decoder", "tokenizer4": "both"}
ARS = {"ar": None, "ar2": "all"}


def together(runs: Path, trainings: dict, to: Path) -> dict:
    """Log and run.json of a part with several trainings; the facts of its stage."""
    name, command, alone = next(iter(trainings)), [], 0
    for run, part in trainings.items():
        stage, facts = read(runs / run / "config.json")["stage"], read(runs / run / "run.json")
        how = {None: "", "all": f" --{name}"}.get(part, f" --{name} --part {part}")
        command.append(
            f"flextok_train {name}{how} ({stage['steps']} steps, lr "
            f"{facts['preset']['train_' + name]['lr']:g})"
        )
        alone += stage["steps"] * (part == "decoder")
    stage, log = one_after_the_other(*(runs / n for n in trainings))
    write_text(to / "log.json", json.dumps(log))
    write_text(
        to / "run.json",
        json.dumps({**read(runs / name / "run.json"), "command": "; then ".join(command)}, indent=1),
    )
    return stage | ({"of_which_decoder_alone": alone} if name != "ar" else {})


def assemble(runs: Path, to: Path) -> None:
    """The parts, all of them knowing the last decoders; logs and facts of all trainings."""
    (old, _), (new, last) = (load_model(runs / n, VAE, VAEConfig) for n in ("vae3", "vae4"))
    save_model(to / "vae", new, new.config, **facts_of(last) | {"stage": together(runs, VAES, to / "vae")})
    tok, found = load_tokenizer(runs / "tokenizer4", old)
    ar, written = load_ar(runs / "ar2", tok)
    save_tokenizer(
        to / "tokenizer",
        with_decoder(tok, new),
        **facts_of(found) | {"stage": together(runs, TOKENIZERS, to / "tokenizer")},
    )
    ar.tokenizer = tokenizer_hash(tok)
    save_ar(to / "ar", ar, **facts_of(written) | {"stage": together(runs, ARS, to / "ar")})
    shutil.copytree(runs / "classifier", to / "classifier", dirs_exist_ok=True)
    for part in ("vae", "tokenizer", "ar", "classifier"):
        save_learned(to / part, LEARNED)


def main() -> None:
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    runs, table = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None
    parts, zoo = runs / "assembled", Path(__file__).resolve().parent.parent / "flextok_edu" / "zoo"
    if not (runs / "classifier" / "config.json").exists():
        classify(runs / "classifier", preset("tiny"))
    assemble(runs, parts)
    pack(
        {p: parts / p for p in ("vae", "tokenizer", "ar", "classifier")},
        "tiny",
        zoo,
        TEXT,
        LIMITS,
        report=table,
        evaluate=preset("tiny").evaluate,
        again=True,
    )


if __name__ == "__main__":
    main()
