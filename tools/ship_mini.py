"""How flextok_edu/zoo/mini is put together from what tools/mini_ea3e120.py left on a GPU.

    python tools/ship_mini.py FILES

FILES holds weights_0.safetensors, weights_1, …, logs.json, table.json. The script ran with the package as of
commit ea3e120 (`git archive ea3e120 flextok_edu`) and, beside it, a file lite0_block10.safetensors: of
EfficientNet-Lite0 the stem, _bn0 and blocks 0 to 10, all that our extractor looks through. It rounded every
part to float16 as soon as it was trained, and the next part learned from the rounded one: the weights are
packed as they come, bit for bit. What the rounding changed was measured on the GPU.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file

from flextok_edu.ar import ARModel, save_ar
from flextok_edu.engine.binding import bind_tokenizer, tokenizer_hash
from flextok_edu.engine.config import Preset, preset
from flextok_edu.engine.files import weights_hash, write_text
from flextok_edu.engine.limits import from_dict
from flextok_edu.engine.models import save_model
from flextok_edu.data.learned import Learned, save_learned
from flextok_edu.data.scenes import KINDS
from flextok_edu.evaluation.report import load_report, trained_how
from flextok_edu.data.features import AttributeClassifier
from flextok_edu.tokenizer import FlexTok, save_tokenizer
from flextok_edu.vae import VAE
from flextok_edu.apps.card import PARTS, model_card, read_facts
from flextok_edu.apps.zoo import pack

SCRIPT = Path(__file__).with_name("mini_ea3e120.py")
COMMAND = (
    "tools/mini_ea3e120.py cuda 565 120 45 (package of commit ea3e120, one {device}, {seconds:.0f} s with "
    "drawing, compiling and measuring; noise drawn on the GPU, bfloat16 autocast)"
)
TEXT = (
    "FlexTok at 128 px: a picture becomes up to 64 tokens out of 4,375 words, coarse to fine; any "
    "number of them, from the first, gives a picture back. With an AR model that writes such lists "
    "for twelve classes, and the attribute classifier that its table was measured with. All of it "
    "was trained from scratch on ToyScenes of level 2 (a thing of one of twelve kinds and eight "
    "colours on one of several grounds, mostly with a second, small thing), on one GPU (NVIDIA "
    "H200), in seven and a half minutes (nine with drawing 100,000 scenes, compiling and measuring). "
    "It is a single run; its sizes and learning rates came from one shorter run before it.\n"
    "\n"
    "What a stranger would recognise: everything is crisp from the first token on, so what the "
    "tokens do not say is not blurred but invented. From one token the ground and its light are "
    "right; the thing on it is clearly drawn, of the right kind in about half of the pictures, and "
    "mostly in a colour that the decoder made up. From 2 four of five things have their kind, colour "
    "and place; of 24 pictures that we looked at, two of each kind, 22 could be named from 4 tokens "
    "and all from 32 (fishes and stars come last, and a few things change on the way: a boat at 4 "
    "tokens was a house at 8 and a boat again at 32). The small second thing is invented, or in the "
    "wrong place, up to 8 tokens; at 16 to 32 it stands where it should, in about its colour; at 64 "
    "not quite half of them can be named, the others are spots. The VAE alone is hard to tell from "
    "the original. Of 132 new pictures from 64 tokens all but two show what was asked for (the two "
    "are misshapen stars); their small second things are mostly scraps that are nothing."
)
LIMITS = (
    "Photographs come back as a thing that it knows (a portrait as a mushroom, from one token and "
    "from two), and from more tokens as a patchwork of coloured scraps; already the VAE alone makes "
    "a mask without features of a face. One seed. The new pictures are read right almost always, but "
    "they do not get nearer to real ones after 4 tokens: their distance in EfficientNet's features "
    "even grows (15 to 19); the scraps in place of small things may be why. Decoding a picture takes "
    "one to two seconds on a CPU core."
)


def read(file: Path):
    return json.loads(file.read_text(encoding="utf-8"))


def weights(files: Path) -> dict[str, dict]:  # part -> its state
    """All pieces together, divided by the first word of their names."""
    found = {part: {} for part in ("vae", "tok", "ar", "classifier")}
    for piece in sorted(files.glob("weights_*.safetensors")):
        for name, tensor in load_file(piece).items():
            part, rest = name.split(".", 1)
            found[part][rest] = tensor
    return found


def models(files: Path, p: Preset) -> tuple[VAE, FlexTok, ARModel, AttributeClassifier]:
    """In float32, with values that float16 holds. Raises ValueError for weights that were not measured."""
    found, vae = weights(files), VAE(p.vae)
    tok, ar, reader = FlexTok(p.tokenizer), ARModel(p.ar), AttributeClassifier()
    for model, part in ((vae, "vae"), (tok, "tok"), (ar, "ar"), (reader, "classifier")):
        model.load_state_dict(found[part])
        model.eval()
    tok.vae = vae.requires_grad_(False)
    bind_tokenizer(ar, tok)
    hashes = {"vae": weights_hash(vae), "tokenizer": tokenizer_hash(tok), "ar": weights_hash(ar)}
    hashes["classifier"] = weights_hash(reader)
    if hashes != (known := read(files / "logs.json")["hashes"]):
        raise ValueError(f"the weights in {files} are {hashes}, and {known} were measured")
    return vae, tok, ar, reader


def assemble(files: Path, to: Path) -> None:
    """Folders as flextok_run leaves them."""
    logs = read(files / "logs.json")
    p, stages = from_dict(Preset, logs["preset"]), logs["stages"]
    if p != preset("mini"):
        raise ValueError(f"{files} holds a model of another preset than today's mini")
    ran = SCRIPT.read_text().replace("import json\n", "import json\nimport math\n", 1)
    if hashlib.sha256(ran.encode()).hexdigest() != logs["script"]:
        raise ValueError(f"{SCRIPT} is not the script that ran (but for an import that it did not use)")
    vae, tok, ar, reader = models(files, p)
    save_model(to / "vae", vae, vae.config, stage=stages["vae"]["stage"])
    save_tokenizer(to / "tokenizer", tok, stage=stages["tokenizer"]["stage"])
    save_ar(to / "ar", ar, classes=list(KINDS), stage=stages["ar"]["stage"])
    save_model(to / "classifier", reader, p.train_classifier, stage=stages["classifier"]["stage"])
    source = f"ToyScenes train, level {p.level}, seed 0, {p.image_size} px"
    learned = Learned("scenes", source, p.train_images, logs["data"]["train"], None)
    for part in PARTS:
        write_text(to / part / "log.json", json.dumps(stages[part]["log"]))
        save_learned(to / part, learned)
    command = COMMAND.format(device=logs["device"], seconds=logs["seconds"])
    versions = logs["versions"] | {"flextok_edu": "commit ea3e120"}
    told = {"command": command, "asked": {"data": "scenes", "seed": 0}, "preset": logs["preset"]}
    told["data"] = logs["data"]
    write_text(to / "run.json", json.dumps(told | {"versions": versions}))
    report = load_report(files / "table.json")
    report.card |= trained_how(vae=p, tokenizer=p, ar=p) | {"floor": "other held-out scenes"}
    report.card |= {"device": logs["device"], "versions": versions}
    report.card["learned"] = {part: learned.facts | {"overlap": "none"} for part in PARTS}
    report.save(to)


def ship(files: Path, zoo: Path) -> Path:
    """Pack, and say what the rounding changed when it was done."""
    with tempfile.TemporaryDirectory() as run:
        assemble(files, Path(run))
        place = pack(run, "mini", zoo, TEXT, LIMITS, limit=45, again=True)
    facts, logs = read_facts(place), read(files / "logs.json")
    facts |= {"rounding": logs["rounding"], "script": logs["script"]}
    write_text(place / "model.json", json.dumps(facts, indent=1))
    write_text(place / "README.md", model_card(place, "mini", TEXT, LIMITS))
    return place


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    ship(Path(sys.argv[1]), Path(__file__).resolve().parent.parent / "flextok_edu" / "zoo")
