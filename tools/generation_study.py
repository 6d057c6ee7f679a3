"""What larger AR models, more tokens and searches give: the measurements behind nbs/experiments/generation.

python tools/generation_study.py caches FOLDER        tokens and captions of 80,000 scenes (ten minutes)
python tools/generation_study.py train FOLDER SIZE SEED   an AR model: SIZE of SIZES; goes on where it was
python tools/generation_study.py measure FOLDER       trained models, and the shipped one: FOLDER/models.json
python tools/generation_study.py search FOLDER        searches with the shipped model: FOLDER/searches.json
python tools/generation_study.py stop FOLDER          the stop rule: FOLDER/stops.json

Everything is counted in successes and numbers of samples, so that whoever reads can make intervals. A part
that is measured already is not measured again. The numbers of the notebook are these json files.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import torch

from flextok_edu import ARModel, FlexTok, ToyScenes
from flextok_edu.ar import load_ar
from flextok_edu.ar_training import position_losses
from flextok_edu.data.captions import scene_caption
from flextok_edu.data.scenes import COLOUR_NAMES, KINDS, PHRASES
from flextok_edu.engine.conditions import take
from flextok_edu.engine.files import write_text
from flextok_edu.engine.hub import shipped_models
from flextok_edu.engine.tensors import from_uint8
from flextok_edu.evaluation.growing import until_still
from flextok_edu.evaluation.priors import ARPrior, UniformPrior
from flextok_edu.evaluation.prompts import judged, wanted_attributes
from flextok_edu.evaluation.readers import SceneReader
from flextok_edu.evaluation.search import search
from flextok_edu.evaluation.verifiers import make_verifier
from flextok_edu.flow import SamplingConfig
from flextok_edu.sampling import TokenSampling
from flextok_edu.text import read_texts

SIZES = {"small": (128, 3), "middle": (192, 4), "large": (256, 6)}  # width, depth
HELD_OUT = ("blue boat", "red flower", "pink star", "orange mushroom", "purple fish", "green car")
LOOK = SamplingConfig(steps=5, guidance=2.0)
COUNTS = (1, 2, 4, 8, 16, 32)
SAMPLES = 200  # of each kind of prompt


def command(*words: str) -> None:
    subprocess.run([str(Path(sys.executable).with_name(words[0])), *words[1:]], check=True)


def caches(folder: Path) -> None:
    how = "--preset", "tiny", "--data", "scenes"
    command("flextok_cache", "tokens", "--tokenizer", "tiny", *how, "--out", str(folder / "tokens"))
    command("flextok_cache", "captions", *how, "--positions", "32", "--out", str(folder / "captions"))


def train(folder: Path, size: str, seed: int) -> None:
    width, depth = SIZES[size]
    made = "--tokenizer", "tiny", "--cache", str(folder / "tokens"), "--captions", str(folder / "captions")
    sizes = f"ar.width={width}", f"ar.depth={depth}", "train_ar.ema=0.995"
    options = (
        "--steps",
        "2500",
        "--precision",
        "bf16",
        "--compile",
        "off",
        "--minutes",
        "3",
        "--seed",
        str(seed),
    )
    out = "--out", str(folder / f"{size}-{seed}")
    command(
        "flextok_train",
        "ar",
        "--preset",
        "tiny",
        *made,
        "--leave-out",
        *HELD_OUT,
        *options,
        *out,
        "--set",
        *sizes,
    )


# --- prompts ------------------------


def article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def prompts() -> dict[str, list[str]]:  # so many of each kind
    scenes = [ToyScenes("val", 64, 2, length=4 * SAMPLES).scene(i) for i in range(4 * SAMPLES)]
    seen = [s for s in scenes if not any(pair in s.caption for pair in HELD_OUT)][:SAMPLES]
    pairs = [f"{c} {k}" for k in KINDS for c in COLOUR_NAMES if f"{c} {k}" not in HELD_OUT]
    found = {
        detail: [scene_caption(s, detail) for s in seen]
        for detail in ("kind", "colour", "place", "light", "full")
    }
    found["any pair"] = [article(pairs[i % len(pairs)]) for i in range(SAMPLES)]
    return found | {"held out": [article(HELD_OUT[i % 6]) for i in range(SAMPLES)]}


def counted(reader: SceneReader, images: torch.Tensor, wanted: list[dict]) -> dict[str, list[int]]:
    "Of each attribute: how many right, of how many."
    found = judged(reader, images, wanted)
    return {name: [int(x.nansum()), int((~x.isnan()).sum())] for name, x in found.items()}


def readers() -> dict[str, SceneReader]:
    place = shipped_models()["tiny-text"]
    return {
        "judge": SceneReader.from_pretrained(place / "judge"),
        "verifier": SceneReader.from_pretrained(place / "reader"),
    }


def kept(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


# --- models ------------------------


@torch.no_grad()
def measure_model(ar: ARModel, tok: FlexTok, judge: SceneReader) -> dict:
    found = {}
    for name, texts in prompts().items():
        cond, wanted = read_texts(ar, texts), [wanted_attributes(t) for t in texts]
        parts = [slice(i, i + 100) for i in range(0, len(texts), 100)]
        ids = torch.cat([ar.generate(take(cond, p), guidance=2.0, first_index=p.start) for p in parts])
        found[name] = {}
        for k in COUNTS:
            images = torch.cat([tok.detokenize(ids[p, :k], LOOK, seed=0, first_index=p.start) for p in parts])
            found[name][k] = counted(judge, images, wanted)
    scenes = ToyScenes("val", 64, 2, length=1000)
    ids = torch.cat([tok.tokenize(from_uint8(x)) for x in scenes.render()[0].split(100)])
    text = read_texts(ar, [scenes.scene(i).caption for i in range(1000)])
    nats = {
        "with": position_losses(ar, ids, text),
        "without": position_losses(ar, ids, ar.condition.without(text)),
    }
    found["nats"] = {name: [round(x, 4) for x in each.tolist()] for name, each in nats.items()}
    found["parameters"] = sum(w.numel() for w in ar.parameters())
    return found


@torch.no_grad()
def measure_reconstructions(tok: FlexTok, judge: SceneReader) -> dict:
    "What the tokenizer holds: the same scenes as the full captions, tokenised."
    scenes = ToyScenes("val", 64, 2, length=4 * SAMPLES)
    rows = [i for i in range(4 * SAMPLES) if not any(pair in scenes.scene(i).caption for pair in HELD_OUT)][
        :SAMPLES
    ]
    images, wanted = (
        from_uint8(scenes.render()[0][rows]),
        [wanted_attributes(scenes.scene(i).caption) for i in rows],
    )
    ids = torch.cat([tok.tokenize(x) for x in images.split(100)])
    pictures = {
        k: torch.cat([tok.detokenize(x[:, :k], LOOK, seed=0) for x in ids.split(100)]) for k in COUNTS
    }
    return {
        "full": {k: counted(judge, x, wanted) for k, x in pictures.items()}
        | {"originals": counted(judge, images, wanted)}
    }


def measure(folder: Path) -> None:
    tok, judge, file = FlexTok.from_pretrained("tiny"), readers()["judge"], folder / "models.json"
    found = kept(file)
    if "reconstructions" not in found:
        found["reconstructions"] = measure_reconstructions(tok, judge)
    places = {"middle-0": shipped_models()["tiny-text"] / "ar"}
    places |= {
        f.parent.name: f.parent
        for f in folder.glob("*-*/config.json")
        if f.parent.name.split("-")[0] in SIZES
    }
    for name, place in places.items():
        if name not in found:
            began = time.perf_counter()
            found[name] = measure_model(load_ar(place, tok)[0], tok, judge)
            print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
            write_text(file, json.dumps(found))
    write_text(file, json.dumps(found))


# --- searches ------------------------

SEARCHES = {
    **{f"best of {n}": ("best_of_n", "attributes", {"n": n}) for n in (5, 14, 55, 260)},
    "beam 2 x 5": ("beam", "attributes", {"beams": 2, "candidates": 5}),
    "beam 5 x 10": ("beam", "attributes", {"beams": 5, "candidates": 10}),
    "lookahead 2 x 5": ("lookahead", "attributes", {"beams": 2, "candidates": 5}),
    "lookahead 5 x 10": ("lookahead", "attributes", {"beams": 5, "candidates": 10}),
    "best of 55 by likelihood": ("best_of_n", "likelihood", {"n": 55}),
    "best of 55 by both": ("best_of_n", "attributes+likelihood", {"n": 55}),
    "no AR model, beam 5 x 50": ("beam", "attributes", {"beams": 5, "candidates": 50}),
}


def rare_prompts() -> list[str]:
    "Kind, colour, place and light drawn apart: what scenes seldom show."
    g = torch.Generator().manual_seed(7)
    words = [
        COLOUR_NAMES,
        KINDS,
        [PHRASES[p] for p in list(PHRASES)[:8]],
        [PHRASES[p] for p in list(PHRASES)[8:]],
    ]
    drawn = [
        [each[int(torch.randint(len(each), (1,), generator=g))] for each in words] for _ in range(SAMPLES)
    ]
    return [f"{article(f'{c} {k}')} {place} {light}" for c, k, place, light in drawn]


@torch.no_grad()
def searches(folder: Path) -> None:
    tok, ar, file = (
        FlexTok.from_pretrained("tiny"),
        ARModel.from_pretrained("tiny-text"),
        folder / "searches.json",
    )
    who, found = readers(), kept(file)
    for kind, texts in (("usual", prompts()["light"]), ("rare", rare_prompts())):
        wanted, cond = [wanted_attributes(t) for t in texts], read_texts(ar, texts)
        for g in (1.0, 2.0):
            name = f"{kind}, guidance {g:g}"
            each = found.setdefault(name, {})
            if "sample" not in each:
                ids = torch.cat(
                    [ar.generate(take(cond, slice(i, i + 100)), guidance=g, first_index=i) for i in (0, 100)]
                )
                images = torch.cat([tok.detokenize(x, LOOK, seed=0) for x in ids.split(100)])
                each["sample"] = {"decodes": 1} | {r: counted(m, images, wanted) for r, m in who.items()}
            for label, (method, verifier, options) in SEARCHES.items():
                alone = label.startswith("no AR")
                if label in each or (alone and g != 1.0):
                    continue
                began = time.perf_counter()
                prior = UniformPrior(tok, len(texts)) if alone else ARPrior(ar, cond, guidance=g)
                says = make_verifier(verifier, reader=who["verifier"], wanted=wanted, ar=ar, cond=cond)
                best = search(method, prior, tok, says, sampling=LOOK, **options)
                each[label] = {"decodes": best.decodes} | {
                    r: counted(m, best.images, wanted) for r, m in who.items()
                }
                print(
                    f"{name}: {label}: {best.decodes} decodes, {time.perf_counter() - began:.0f} s",
                    flush=True,
                )
                write_text(file, json.dumps(found))
    write_text(file, json.dumps(found))


# --- the stop rule ------------------------


@torch.no_grad()
def stops(folder: Path) -> None:
    tok, ar, judge = FlexTok.from_pretrained("tiny"), ARModel.from_pretrained("tiny-text"), readers()["judge"]
    found, choice = {}, TokenSampling(guidance=2.0)
    for name in ("colour", "full"):
        texts = prompts()[name]
        wanted, cond = [wanted_attributes(t) for t in texts], read_texts(ar, texts)
        for change in (0.0, 0.01, 0.02, 0.03, 0.04, 0.06, 0.1):
            grown = until_still(ar, tok, cond, change, choice, LOOK)
            row = {"tokens": grown.tokens, "decodes": grown.decodes / len(texts)}
            found.setdefault(name, {})[str(change)] = row | counted(judge, grown.images, wanted)
    write_text(folder / "stops.json", json.dumps(found))


if __name__ == "__main__":
    torch.set_num_threads(1)
    tasks = {"caches": caches, "train": train, "measure": measure, "search": searches, "stop": stops}
    if len(sys.argv) < 3 or sys.argv[1] not in tasks:
        sys.exit(__doc__)
    Path(sys.argv[2]).mkdir(parents=True, exist_ok=True)
    tasks[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:4], *map(int, sys.argv[4:5]))
