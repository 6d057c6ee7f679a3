"""How flextok_edu/zoo/tiny was put together from its trainings (nbs/experiments/tiny_recipe.ipynb has the commands that make them).

    python tools/ship_tiny.py RUNS            RUNS holds vae, vae2, tokenizer, ar: what flextok_train left; the classifier is trained if it is not there
    flextok_eval tiny --ar tiny --classifier tiny --train-images 100 --out TABLE
    python tools/ship_tiny.py RUNS TABLE      once more, with the table of results

`vae2` is `vae` after its decoder went on learning: encoder and latents are the same, so tokenizer and AR model only have to be told its hash.
"""
from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path

from flextok_edu.ar import load_ar, save_ar, tokenizer_hash
from flextok_edu.core import Preset, VAEConfig, load_model, preset, save_model, write_text
from flextok_edu.data import load_data
from flextok_edu.evaluate import versions
from flextok_edu.features import train_classifier
from flextok_edu.tokenizer import load_tokenizer, save_tokenizer, with_decoder
from flextok_edu.vae import VAE
from flextok_edu.zoo import pack

TEXT = """FlexTok at 64 px: a picture becomes up to 32 tokens out of 1,000 words, coarse to fine; any number of them, from the first, gives a picture back. With an AR model that writes such lists for twelve classes, and the attribute classifier that its table was measured with. All of it was trained from scratch on ToyScenes of level 2 (a thing of one of twelve kinds and eight colours on one of several grounds, mostly with a second, small thing), on two CPU cores, in about two hours (the VAE, the classifier and the AR model on one of them).

What a stranger would recognise: from one token the ground and its light, nearly always; often a snowman, a house, a flower or a mushroom, in a colour that the decoder made up. From 4 to 8 tokens the colour and place of most things; from 8 flowers, houses, boats and snowmen at sight, while balloons, stars and fishes are still coloured blobs; from 16 to 32 those too, and the small second thing as a blob of the right colour in the right place. Outlines stay soft, petals and stripes run into each other: the VAE alone, whose pictures are the ceiling, is soft as well. Of the new pictures boats, flowers, balloons, snowmen and cacti are recognised; trees, houses, cars, fishes and stars are often blobs of fitting colours, of which the classifier still reads nearly nine of ten."""
LIMITS = """Photographs come back as grounds, horizons and blobs of about the right colours: nothing in them would be recognised. One seed; a VAE with an error of 0.016 (of a white of 1) is blurred at edges and loses small things. The last 1,500 steps of the VAE trained its decoder alone, after the tokenizer had been trained (room 03: the ids are the same)."""


def read(file: Path):
    return json.loads(file.read_text(encoding="utf-8"))


def one_after_the_other(first: Path, second: Path) -> tuple[dict, list[dict]]:
    """What a training and the one that went on with its result have to say together: the facts of the stage, the log."""
    a, b = (read(f / "config.json")["stage"] for f in (first, second))
    steps, seconds = a["steps"] + b["steps"], a["seconds"] + b["seconds"]
    later = [{**row, "step": row["step"] + a["steps"], "seconds": row["seconds"] + a["seconds"]} for row in read(second / "log.json")]
    return {**a, "steps": steps, "seconds": seconds, "images_per_second": steps * a["batch"] / seconds}, read(first / "log.json") + later


def facts_of(found: dict) -> dict:
    """What config.json says besides what is written anew."""
    return {k: v for k, v in found.items() if k not in ("config", "weights", "vae", "tokenizer", "terms")}


def classify(folder: Path, p: Preset) -> None:
    """The classifier, which no command trains alone."""
    train, _ = load_data("scenes", p.image_size, p.train_images, 2, p.level)
    model, log = train_classifier(train, p.train_classifier)
    c = p.train_classifier
    write_text(folder / "log.json", json.dumps(log))
    write_text(folder / "run.json", json.dumps({"command": "train_classifier", "options": {"seed": 0, "data": "scenes"}, "preset": asdict(p), "versions": versions()}, indent=1))
    save_model(folder, model, c, stage={"stage": "classifier", "steps": c.steps, "batch": c.batch, "seconds": log[-1]["seconds"], "images_per_second": c.steps * c.batch / log[-1]["seconds"],
                                        "parameters": sum(w.numel() for w in model.parameters())})


def assemble(runs: Path, to: Path) -> None:
    """The parts, all of them knowing the VAE with the better decoder; logs and facts of both of its trainings."""
    (old, first), (new, second) = (load_model(runs / n, VAE, VAEConfig) for n in ("vae", "vae2"))
    stage, log = one_after_the_other(runs / "vae", runs / "vae2")
    lr = read(runs / "vae2" / "run.json")["preset"]["train_vae"]["lr"]
    save_model(to / "vae", new, new.config, **facts_of(second) | {"stage": stage | {"of_which_decoder_alone": second["stage"]["steps"]}})
    write_text(to / "vae" / "log.json", json.dumps(log))
    write_text(to / "vae" / "run.json", json.dumps({**read(runs / "vae" / "run.json"), "command": f"flextok_train vae; then flextok_train vae --vae (the decoder alone, {second['stage']['steps']} steps, lr {lr})"}, indent=1))
    tok, found = load_tokenizer(runs / "tokenizer", old)
    ar, written = load_ar(runs / "ar", tok)
    save_tokenizer(to / "tokenizer", with_decoder(tok, new), **facts_of(found))
    ar.tokenizer = tokenizer_hash(tok)
    save_ar(to / "ar", ar, **facts_of(written))
    for part in ("tokenizer", "ar"):
        for name in ("log.json", "run.json"):
            shutil.copy(runs / part / name, to / part / name)
    shutil.copytree(runs / "classifier", to / "classifier", dirs_exist_ok=True)


def main() -> None:
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    runs, table = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None
    parts, zoo = runs / "assembled", Path(__file__).resolve().parent.parent / "flextok_edu" / "zoo"
    if not (runs / "classifier" / "config.json").exists():
        classify(runs / "classifier", preset("tiny"))
    assemble(runs, parts)
    pack({p: parts / p for p in ("vae", "tokenizer", "ar", "classifier")}, "tiny", zoo, TEXT, LIMITS, report=table, evaluate=preset("tiny").evaluate, again=True)


if __name__ == "__main__":
    main()
