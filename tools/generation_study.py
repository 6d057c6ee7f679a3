"""What larger AR models, more tokens and searches give: the measurements behind nbs/experiments/generation.

python tools/generation_study.py all FOLDER               all of the below, beside each other: for one GPU
python tools/generation_study.py collect FOLDER FILE      results into one json file, which keeps others

Or part by part:
python tools/generation_study.py caches FOLDER            tokens and captions of 80,000 scenes
python tools/generation_study.py train FOLDER SIZE SEED   an AR model: SIZE of SIZES; goes on where it was
python tools/generation_study.py measure FOLDER NAME      SIZE-SEED, shipped, classes, reconstructions, rare
python tools/generation_study.py search FOLDER KIND G     searches for "usual" or "rare" prompts, guidance G
python tools/generation_study.py judge FOLDER             read again what searches found
python tools/generation_study.py stop FOLDER              the stop rule

The device is a GPU where there is one. Everything is counted in successes and numbers of samples, or kept for
each prompt, so that whoever reads can make intervals. What is measured already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from flextok_edu import ARModel, FlexTok, ToyScenes
from flextok_edu.ar import load_ar
from flextok_edu.ar_training import position_losses
from flextok_edu.data.captions import scene_caption
from flextok_edu.data.scenes import COLOUR_NAMES, KINDS, PHRASES, Scene, draw
from flextok_edu.engine.conditions import take, to_device
from flextok_edu.engine.files import weights_hash, write_text
from flextok_edu.engine.hub import shipped_models
from flextok_edu.engine.tensors import from_uint8, pick_device, to_uint8
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
SEEDS = (0, 1, 2)
HELD_OUT = ("blue boat", "red flower", "pink star", "orange mushroom", "purple fish", "green car")
LOOK = SamplingConfig(steps=5, guidance=2.0)
COUNTS = (1, 2, 4, 8, 16, 32)
CHANGES = (0.0, 0.01, 0.02, 0.03, 0.04, 0.06, 0.1)  # thresholds of the stop rule
DEVICE = pick_device("auto")


def of_package(module: str, words: list[str]) -> list[str]:
    "A command of the package, also where it is not installed."
    app, name = module.split(":")
    start = f"from flextok_edu.apps.{app} import {name}; {name}()"
    return [sys.executable, "-c", start, *words]


def caches(folder: Path, o) -> None:
    how = ["--preset", "tiny", "--data", "scenes"]
    how += ["--train-images", str(o.images)] if o.images else []
    kinds = {
        "tokens": ["tokens", "--tokenizer", "tiny", *how, "--out", str(folder / "tokens")],
        "captions": ["captions", *how, "--positions", "32", "--out", str(folder / "captions")],
    }
    running = [subprocess.Popen(of_package("tokenize:cache_main", words)) for words in kinds.values()]
    if any([p.wait() for p in running]):
        sys.exit("a cache was not made")


def train(folder: Path, o) -> None:
    width, depth = SIZES[o.what]
    data = ["--tokenizer", "tiny", "--cache", str(folder / "tokens"), "--captions", str(folder / "captions")]
    words = ["ar", "--preset", "tiny", *data, "--leave-out", *HELD_OUT, "--steps", str(o.steps)]
    words += ["--precision", "bf16", "--compile", "off", "--minutes", "3", "--seed", o.which]
    words += ["--out", str(folder / f"{o.what}-{o.which}")]
    words += ["--set", f"ar.width={width}", f"ar.depth={depth}", "train_ar.ema=0.995"]
    subprocess.run(of_package("train:train_main", words), check=True)


# --- prompts ------------------------


def article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def prompts(n: int) -> dict[str, list[str]]:  # so many of each kind
    scenes = [ToyScenes("val", 64, 2, length=4 * n).scene(i) for i in range(4 * n)]
    seen = [s for s in scenes if not any(pair in s.caption for pair in HELD_OUT)][:n]
    pairs = [f"{c} {k}" for k in KINDS for c in COLOUR_NAMES if f"{c} {k}" not in HELD_OUT]
    found = {
        detail: [scene_caption(s, detail) for s in seen]
        for detail in ("kind", "colour", "place", "light", "full")
    }
    found["any pair"] = [article(pairs[i % len(pairs)]) for i in range(n)]
    return found | {"held out": [article(HELD_OUT[i % 6]) for i in range(n)]}


def rare_prompts(n: int) -> list[str]:
    "Kind, colour, place and light drawn apart: what scenes seldom show."
    g = torch.Generator().manual_seed(7)
    phrases = [PHRASES[p] for p in PHRASES]
    words = [COLOUR_NAMES, KINDS, phrases[:8], phrases[8:]]
    drawn = [[each[int(torch.randint(len(each), (1,), generator=g))] for each in words] for _ in range(n)]
    return [f"{article(f'{c} {k}')} {place} {light}" for c, k, place, light in drawn]


def rare_scenes(n: int) -> list[Scene]:
    "What the rare prompts ask for: main object, ground, light and colour of different scenes."
    scenes, found = [ToyScenes("val", 64, 2, length=4000).scene(i) for i in range(4000)], []
    for i, text in enumerate(rare_prompts(n)):
        w = wanted_attributes(text)
        things = [s for s in scenes if s.things[0].kind == w["kind"]]
        grounds = [s for s in scenes if s.place == w["place"]]
        own, ground = things[i % len(things)], grounds[i % len(grounds)]
        main = replace(own.things[0], colour=w["colour"])
        where = {"place": w["place"], "horizon": ground.horizon, "light": w["light"]}
        found.append(replace(own, things=(main, *own.things[1:]), **where))
    return found


def counted(reader: SceneReader, images: torch.Tensor, wanted: list[dict]) -> dict[str, list[int]]:
    "Of each attribute: how many right, of how many."
    found = judged(reader, images, wanted)
    return {name: [int(x.nansum()), int((~x.isnan()).sum())] for name, x in found.items()}


def each(reader: SceneReader, images: torch.Tensor, wanted: list[dict]) -> dict[str, str]:
    "Of each attribute a letter for each prompt: 1 right, 0 wrong, - not asked for."
    found = judged(reader, images, wanted)
    return {name: "".join("-" if v != v else str(int(v)) for v in x.tolist()) for name, x in found.items()}


def readers() -> dict[str, SceneReader]:
    place = shipped_models()["tiny-text"]
    names = {"judge": "judge", "verifier": "reader"}
    return {who: SceneReader.from_pretrained(place / name).to(DEVICE) for who, name in names.items()}


def signed(found: dict) -> dict:
    "With the judge that read it: its weights' hash."
    return found | {"read_by": weights_hash(readers()["judge"])}


def tokenizer() -> FlexTok:
    return FlexTok.from_pretrained("tiny").to(DEVICE)


def kept(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def save_strips(rows: list[torch.Tensor], file: Path) -> None:  # images (12 3 h w) of each row
    strips = [torch.cat(list(to_uint8(row).cpu()), 2) for row in rows]
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(torch.cat(strips, 1).permute(1, 2, 0).numpy()).save(file)


def store(file: Path, found: dict) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(found))


# --- models ------------------------


def parts(n: int) -> list[slice]:
    return [slice(i, min(i + 100, n)) for i in range(0, n, 100)]


@torch.no_grad()
def measure_model(ar: ARModel, tok: FlexTok, judge: SceneReader, n: int) -> dict:
    found = {}
    for name, texts in prompts(n).items():
        cond, wanted = read_texts(ar, texts), [wanted_attributes(t) for t in texts]
        ids = torch.cat([ar.generate(take(cond, p), guidance=2.0, first_index=p.start) for p in parts(n)])
        found[name] = {}
        for k in COUNTS:
            images = torch.cat(
                [tok.detokenize(ids[p, :k], LOOK, seed=0, first_index=p.start) for p in parts(n)]
            )
            found[name][k] = counted(judge, images, wanted)
    scenes = ToyScenes("val", 64, 2, length=5 * n)
    images = from_uint8(scenes.render()[0]).to(DEVICE)
    ids = torch.cat([tok.tokenize(x) for x in images.split(100)])
    text = read_texts(ar, [scenes.scene(i).caption for i in range(5 * n)])
    nats = {
        "with": position_losses(ar, ids, text),
        "without": position_losses(ar, ids, ar.condition.without(to_device(text, DEVICE))),
    }
    found["nats"] = {name: [round(x, 4) for x in row.tolist()] for name, row in nats.items()}
    found["parameters"] = sum(w.numel() for w in ar.parameters())
    return found


@torch.no_grad()
def measure_reconstructions(tok: FlexTok, judge: SceneReader, n: int) -> dict:
    "What the tokenizer holds: the scenes of the full captions, tokenised."
    scenes = ToyScenes("val", 64, 2, length=4 * n)
    told = [scenes.scene(i).caption for i in range(4 * n)]
    rows = [i for i, caption in enumerate(told) if not any(pair in caption for pair in HELD_OUT)][:n]
    images, wanted = (
        from_uint8(scenes.render()[0][rows]).to(DEVICE),
        [wanted_attributes(told[i]) for i in rows],
    )
    ids = torch.cat([tok.tokenize(x) for x in images.split(100)])
    found = {"originals": counted(judge, images, wanted)}
    for k in COUNTS:
        decoded = torch.cat([tok.detokenize(x[:, :k], LOOK, seed=0) for x in ids.split(100)])
        found[k] = counted(judge, decoded, wanted)
    return {"full": found}


@torch.no_grad()
def measure_rare(tok: FlexTok, n: int, picture: Path) -> dict:
    "What readers see in rare scenes themselves, and in what the tokenizer makes of them."
    pictures = torch.from_numpy(np.stack([draw(scene, 64) for scene in rare_scenes(n)]))
    images, wanted = (
        from_uint8(pictures.permute(0, 3, 1, 2)).to(DEVICE),
        [wanted_attributes(t) for t in rare_prompts(n)],
    )
    found, ids = {}, torch.cat([tok.tokenize(x) for x in images.split(100)])
    save_strips([images[:12], tok.detokenize(ids[:12], LOOK, seed=0)], picture)
    for name, reader in readers().items():
        found[name] = {"originals": counted(reader, images, wanted)}
        for k in COUNTS:
            decoded = torch.cat([tok.detokenize(x[:, :k], LOOK, seed=0) for x in ids.split(100)])
            found[name][k] = counted(reader, decoded, wanted)
    return found


@torch.no_grad()
def measure_classes(tok: FlexTok, judge: SceneReader, n: int) -> dict:
    "The class-conditional `tiny`: how often the class is read."
    ar, classes, found = ARModel.from_pretrained("tiny").to(DEVICE), torch.arange(n) % len(KINDS), {}
    ids = ar.generate(classes, guidance=2.0)
    for k in COUNTS:
        images = torch.cat([tok.detokenize(x[:, :k], LOOK, seed=0) for x in ids.split(100)])
        found[k] = counted(judge, images, [{"kind": KINDS[i]} for i in classes.tolist()])
    return {"class": found}


@torch.no_grad()
def show(ar: ARModel, tok: FlexTok, file: Path) -> None:
    "A row for each number of tokens: the same full captions for every model."
    texts = prompts(16)["full"][:12]
    ids = ar.generate(read_texts(ar, texts), guidance=2.0)
    save_strips([tok.detokenize(ids[:, :k], LOOK, seed=0) for k in (1, 4, 32)], file)


def measure(folder: Path, o) -> None:
    file = folder / "models" / f"{o.what}.json"
    if file.exists():
        return
    tok, judge = tokenizer(), readers()["judge"]
    if o.what == "reconstructions":
        store(file, signed(measure_reconstructions(tok, judge, o.samples)))
        return
    if o.what == "classes":
        store(file, signed(measure_classes(tok, judge, o.samples)))
        return
    if o.what == "rare":
        store(file, signed(measure_rare(tok, o.samples, file.with_suffix(".png"))))
        return
    place = shipped_models()["tiny-text"] / "ar" if o.what == "shipped" else folder / o.what
    ar = load_ar(place, tok)[0].to(DEVICE)
    show(ar, tok, file.with_suffix(".png"))
    store(file, signed(measure_model(ar, tok, judge, o.samples)))


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
WIDE = {"wide first 55": (30, 5, 5), "wide first 260": (60, 10, 20)}  # first tokens, kept, lists of each


def spent(method: str, options: dict, length: int) -> int:  # decodes for a prompt
    if method == "best_of_n":
        return options["n"]
    return options["candidates"] * (1 + options["beams"] * length.bit_length() - options["beams"])


def best_lists(prior: ARPrior, tok: FlexTok, says, starts: torch.Tensor, noise: list[int], batch: int):
    # starts (prompts n j), one noise for all lists of a prompt -> images (prompts 3 h w)
    "Whole lists from these beginnings, and the best picture of each prompt."
    n, best = starts.shape[1], []
    for rows in torch.arange(prior.prompts).split(max(1, batch // n)):
        which = rows.repeat_interleave(n)
        seeds = [int(i) * n + j for i in rows for j in range(n)]
        ids = prior.extend(starts[rows].flatten(0, 1), which, tok.length, seeds)
        images = tok.detokenize(ids, LOOK, seed=tuple(noise[int(i)] for i in which)).cpu()
        scores = says.measure(images, ids, which)[:, 0].view(len(rows), n)
        best.append(images.unflatten(0, (len(rows), n))[torch.arange(len(rows)), scores.argmax(1)])
    return torch.cat(best)


def wide_first(prior: ARPrior, tok: FlexTok, reader, wanted: list[dict], shape, batch: int):
    # images (prompts 3 h w), decodes for each
    "Many first tokens, kept by place and light alone; then whole lists from each of those."
    candidates, beams, lists = shape
    ground = [{a: w[a] for a in ("place", "light") if a in w} for w in wanted]
    looking, says = (make_verifier("attributes", reader=reader, wanted=w) for w in (ground, wanted))
    how = {"candidates": candidates, "beams": beams, "length": 1, "batch": batch}
    first = search("beam", prior, tok, looking, sampling=LOOK, **how)
    starts = first.steps[0].best().repeat_interleave(lists, 1)  # prompts n 1
    return best_lists(prior, tok, says, starts, first.noise, batch), candidates + beams * lists


def one_noise(prior: ARPrior, tok: FlexTok, reader, wanted: list[dict], n: int, batch: int):
    # images (prompts 3 h w), decodes for each
    "Best of n as a beam sees it: all lists of a prompt from the same noise."
    says = make_verifier("attributes", reader=reader, wanted=wanted)
    starts = torch.zeros(prior.prompts, n, 0, dtype=torch.int64)
    return best_lists(prior, tok, says, starts, list(range(prior.prompts)), batch), n


def stored(file: Path, label: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    return file.with_name(f"{file.stem}-{label.replace(' ', '_').replace(',', '')}.safetensors")


def judge_again(folder: Path, o) -> None:
    "What the searches found, read by the readers that are shipped now."
    who = readers()
    for file in (folder / "searches").glob("*.json"):
        found = kept(file)
        kind = file.stem.split("-")[0]
        texts = prompts(o.samples)["light"] if kind == "usual" else rare_prompts(o.samples)
        wanted = [wanted_attributes(t) for t in texts]
        for label, row in found.items():
            images = from_uint8(load_file(stored(file, label))["images"]).to(DEVICE)
            row |= {name: each(reader, images, wanted) for name, reader in who.items()}
        store(file, found)


@torch.no_grad()
def searches(folder: Path, o) -> None:
    kind, g = o.what, float(o.which)
    file = folder / "searches" / f"{kind}-{g:g}.json"
    texts = prompts(o.samples)["light"] if kind == "usual" else rare_prompts(o.samples)
    tok, ar, who, found = tokenizer(), ARModel.from_pretrained("tiny-text").to(DEVICE), readers(), kept(file)
    wanted, cond = [wanted_attributes(t) for t in texts], read_texts(ar, texts)
    batch = o.batch or (1000 if DEVICE.type == "cuda" else 250)

    def note(label: str, images: torch.Tensor, decodes: int, began: float) -> None:
        images = to_uint8(images.cpu()).contiguous()  # kept, so that another judge can read them
        save_file({"images": images}, stored(file, label))
        images = from_uint8(images)
        found[label] = {"decodes": decodes} | {r: each(m, images, wanted) for r, m in who.items()}
        store(file, found)
        print(f"{kind} {g:g}: {label}: {decodes} decodes, {time.perf_counter() - began:.0f} s", flush=True)

    for label, (method, verifier, options) in {
        "sample": ("best_of_n", "attributes", {"n": 1}),
        **SEARCHES,
    }.items():
        alone = label.startswith("no AR")
        if label in found or (alone and g != 1.0) or spent(method, options, tok.length) > o.most:
            continue
        began = time.perf_counter()
        prior = UniformPrior(tok, len(texts)) if alone else ARPrior(ar, cond, guidance=g)
        says = make_verifier(verifier, reader=who["verifier"], wanted=wanted, ar=ar, cond=cond)
        best = search(method, prior, tok, says, sampling=LOOK, batch=batch, **options)
        note(label, best.images, best.decodes, began)
    for label, shape in WIDE.items():
        if label not in found and shape[0] + shape[1] * shape[2] <= o.most:
            began, prior = time.perf_counter(), ARPrior(ar, cond, guidance=g)
            note(label, *wide_first(prior, tok, who["verifier"], wanted, shape, batch), began)
    for n in (n for n in (55, 260) if n <= o.most and f"best of {n}, one noise" not in found):
        began, prior = time.perf_counter(), ARPrior(ar, cond, guidance=g)
        note(f"best of {n}, one noise", *one_noise(prior, tok, who["verifier"], wanted, n, batch), began)


# --- the stop rule ------------------------


@torch.no_grad()
def stops(folder: Path, o) -> None:
    file = folder / "stops.json"
    if file.exists():
        return
    tok, ar = tokenizer(), ARModel.from_pretrained("tiny-text").to(DEVICE)
    judge, found, choice = readers()["judge"], {}, TokenSampling(guidance=2.0)
    for name in ("colour", "full"):
        texts = prompts(o.samples)[name]
        wanted, cond = [wanted_attributes(t) for t in texts], read_texts(ar, texts)
        for change in CHANGES:
            grown = until_still(ar, tok, cond, change, choice, LOOK)
            row = {"tokens": grown.tokens, "decodes": grown.decodes / len(texts)}
            found.setdefault(name, {})[f"{change:g}"] = row | each(judge, grown.images, wanted)
    store(file, found)


# --- all of it ------------------------


def jobs() -> dict[str, tuple[list[str], list[str]]]:  # name: words, names that come first
    found = {"caches": (["caches"], [])}
    found |= {f"search {k} {g}": (["search", k, g], []) for g in ("1", "2") for k in ("rare", "usual")}
    found |= {f"train {s} {n}": (["train", s, str(n)], ["caches"]) for n in SEEDS for s in reversed(SIZES)}
    found |= {"stop": (["stop"], []), "measure shipped": (["measure", "shipped"], [])}
    found |= {f"measure {name}": (["measure", name], []) for name in ("classes", "reconstructions", "rare")}
    for n in SEEDS:
        found |= {f"measure {s} {n}": (["measure", f"{s}-{n}"], [f"train {s} {n}"]) for s in SIZES}
    return found


def everything(folder: Path, o) -> None:
    "All jobs, as many beside each other as there is room for; each has a log."
    (folder / "logs").mkdir(exist_ok=True)
    began, waiting, running, ended = time.perf_counter(), jobs(), {}, {}
    options = [f"--{name}={value}" for name in ("samples", "steps", "images") if (value := getattr(o, name))]
    while waiting or running:
        for name, process in list(running.items()):
            if process.poll() is not None:
                ended[name] = running.pop(name).returncode
                said = "done" if not ended[name] else f"FAILED ({ended[name]})"
                print(f"{time.perf_counter() - began:5.0f} s: {name}: {said}", flush=True)
        for name, (words, first) in list(waiting.items()):
            if any(ended.get(f) for f in first):
                ended[name] = waiting.pop(name) and 1
            elif len(running) < o.beside and all(f in ended for f in first):
                del waiting[name]
                command = [sys.executable, __file__, words[0], str(folder), *words[1:], *options]
                with open(folder / "logs" / f"{name.replace(' ', '-')}.txt", "w") as log:
                    running[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        time.sleep(0.2)
    if failed := [name for name, code in ended.items() if code]:
        sys.exit(f"failed: {', '.join(failed)}; see {folder / 'logs'}")


def collect(folder: Path, o) -> None:
    "Into one file; what is there already and not in this folder, of another machine for example, stays."
    file = Path(o.what)
    found = {"models": {}, "searches": {}, "stops": {}} | kept(file)
    for kind in ("models", "searches"):
        found[kind] |= {f.stem: kept(f) for f in sorted((folder / kind).glob("*.json"))}
    found["stops"] = kept(folder / "stops.json") or found["stops"]
    store(file, found)
    print(f"{o.what}: {len(found['models'])} models, {len(found['searches'])} searches")


TASKS = {"all": everything, "collect": collect, "caches": caches, "train": train, "measure": measure}
TASKS |= {"search": searches, "judge": judge_again, "stop": stops}

if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("task", choices=TASKS)
    p.add_argument("folder", type=Path)
    p.add_argument("what", nargs="?")
    p.add_argument("which", nargs="?")
    p.add_argument("--samples", type=int, default=200, help="of each kind of prompt")
    p.add_argument("--steps", type=int, default=2500, help="of each training")
    p.add_argument("--images", type=int, help="to train with: 80,000")
    p.add_argument("--beside", type=int, default=min(8, os.cpu_count() or 1), help="jobs at once")
    p.add_argument("--most", type=int, default=10**9, help="searches of no more decodes for a prompt")
    p.add_argument("--batch", type=int, help="pictures decoded at once in a search")
    given = p.parse_args()
    torch.set_num_threads(1)
    given.folder.mkdir(parents=True, exist_ok=True)
    TASKS[given.task](given.folder, given)
