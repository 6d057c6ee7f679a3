"""What tools/gpu_check.sh sends home, small enough to be mailed, and how it becomes a run's folder again.

python tools/gpu_join.py FOLDER DEST           DEST: a new folder, as flextok_run leaves it, and DEST/logs
python tools/gpu_join.py --pack WORK FOLDER    what gpu_check.sh calls: WORK holds run/ and logs/
python tools/gpu_join.py --rounding RUN        writes RUN/rounding.json: what rounding to float16 changes

The format: weights_N.safetensors, whose tensors are called "part.name" (the parts are the folders of a run),
matrices and filters in float16 and the rest as it is; results.tar.gz with all small files (of the run at the
top, logs/ as in WORK); the pictures of the run beside them as far as there is room. At most 8 files of at
most 16 MiB. What is joined is in float32 again, rounded; every part names the rounded weights of the one
before it, and so does the table, which was measured before they were rounded.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
import tarfile
from pathlib import Path

FILES, SIZE = 8, 16 * 2**20  # how many, bytes of each
PIECE = 15 * 2**20  # bytes of the tensors in one: names come on top
TEXT = 2**20  # bytes that are kept of a log, its end
PARTS = ("vae", "tokenizer", "ar", "classifier")
PICTURES = (
    "reconstructions.png",
    "samples.png",
    "quality.png",
    "losses.png",
)  # what matters most comes first


def finished(run: Path) -> list[str]:
    """Parts whose training has ended: their config.json is written last."""
    return [part for part in PARTS if (run / part / "config.json").exists()]


# --- weights ------------------------


def small(tensor):
    """In float16, if it is a matrix or a filter of real numbers that float16 can hold."""
    import torch

    half = tensor.half()
    whole = tensor.is_floating_point() and tensor.ndim > 1 and tensor.dtype.itemsize > 2
    return half if whole and bool(torch.isfinite(half).all()) else tensor


def deal(tensors: dict) -> list[dict]:
    """Into as few pieces as the largest first make. Raises ValueError for a tensor that fits in none."""
    pieces = []
    for name, x in sorted(tensors.items(), key=lambda item: -item[1].nbytes):
        if x.nbytes > PIECE:
            raise ValueError(
                f"{name} has {x.nbytes / 2**20:.1f} MiB, more than a piece of {PIECE / 2**20:g} MiB"
            )
        piece = next((p for p in pieces if sum(y.nbytes for y in p.values()) + x.nbytes <= PIECE), None)
        if piece is None:
            pieces.append(piece := {})
        piece[name] = x
    return pieces


def pack_weights(run: Path, to: Path) -> int:
    """How many pieces there are."""
    parts = finished(run)
    if not parts:
        return 0
    from safetensors.torch import load_file, save_file

    found = {}
    for part in parts:
        for name, x in load_file(run / part / "model.safetensors").items():
            found[f"{part}.{name}"] = small(x).contiguous()
    pieces = deal(found)
    for i, piece in enumerate(pieces):
        save_file(piece, file := to / f"weights_{i}.safetensors", {"format": "pt"})
        file.chmod(0o644)  # safetensors keeps it for its owner
    return len(pieces)


def joined_weights(folder: Path) -> dict[str, dict]:
    """Part -> its tensors, real ones in float32."""
    from safetensors.torch import load_file

    found: dict[str, dict] = {}
    for file in sorted(folder.glob("weights_*.safetensors")):
        for name, x in load_file(file).items():
            part, rest = name.split(".", 1)
            found.setdefault(part, {})[rest] = x.float() if x.is_floating_point() else x
    return found


def ours(name: str) -> bool:
    """Whether `pack` writes files of this name."""
    pictures = {name, Path(name).with_suffix(".png").name} & set(PICTURES)
    return bool(pictures) or name == "results.tar.gz" or bool(re.fullmatch(r"weights_\d+\.safetensors", name))


# --- everything else ------------------------


def contents(work: Path, room: int) -> tuple[list[tuple[str, bytes]], list[Path]]:
    """Small files with their names in the archive; the pictures that lie beside it."""
    run, logs = work / "run", work / "logs"
    files = [
        f for f in sorted(run.rglob("*")) if f.suffix in (".json", ".csv") or f.name == "learned.safetensors"
    ]
    files = [f for f in files if "checkpoints" not in f.parts]
    found = [(str(f.relative_to(run)), f.read_bytes()) for f in files]
    found += [
        (str(f.relative_to(work)), f.read_bytes()[-TEXT:]) for f in sorted(logs.rglob("*")) if f.is_file()
    ]
    pictures = [run / name for name in PICTURES if (run / name).exists()]
    beside, inside = pictures[: max(0, room)], pictures[max(0, room) :]
    taken = sum(len(text) for _, text in found)
    for f in (*inside, run / "table_scores.safetensors", run / "report.html"):  # as long as there is room
        if f.exists() and taken + f.stat().st_size <= PIECE:
            found.append((f.name, f.read_bytes()))
            taken += f.stat().st_size
    return found, beside


def put_picture(file: Path, to: Path) -> None:
    """As it is, or as JPEG if it is too large."""
    if file.stat().st_size <= SIZE:
        shutil.copyfile(file, to / file.name)
        return
    from PIL import Image

    Image.open(file).convert("RGB").save(to / f"{file.stem}.jpg", quality=90)


def pack(work: Path, out: Path) -> list[Path]:
    """All that there is so far, in the place of what was packed before.

    Raises ValueError for what the limits cannot hold; what was packed before stays then.
    """
    new = work / "packing.new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        texts, pictures = contents(work, FILES - 1 - pack_weights(work / "run", new))
        with tarfile.open(new / "results.tar.gz", "w:gz") as archive:
            for name, text in texts:
                about = tarfile.TarInfo(name)
                about.size = len(text)
                archive.addfile(about, io.BytesIO(text))
        for file in pictures:
            put_picture(file, new)
        made = sorted(new.iterdir())
        large = [f"{f.name} ({f.stat().st_size / 2**20:.1f} MiB)" for f in made if f.stat().st_size > SIZE]
        if large or len(made) > FILES:
            raise ValueError(
                f"at most {FILES} files of {SIZE / 2**20:g} MiB: there are {len(made)}, too large: "
                f"{', '.join(large) or 'none'}"
            )
        out.mkdir(parents=True, exist_ok=True)
        for old in [f for f in out.iterdir() if ours(f.name)]:
            old.unlink()
        return [Path(shutil.move(f, out / f.name)) for f in made]
    finally:
        shutil.rmtree(new, ignore_errors=True)


# --- the way back ------------------------


def rebind(dest: Path, states: dict[str, dict]) -> dict[str, str]:
    """Write the parts, each with the new hash of those before it; part -> hash of the weights."""
    from safetensors.torch import save_file

    from flextok_edu.engine.files import weights_hash, write_text
    from flextok_edu.engine.identity import identity_of

    hashes = {}
    for part in [p for p in PARTS if p in states]:
        file, state = dest / part / "config.json", states[part]
        facts = json.loads(file.read_text(encoding="utf-8"))
        facts |= {"weights": weights_hash(state), "rounded_from": facts["weights"]}
        whole = state
        if part == "tokenizer":
            facts["vae"] = hashes["vae"]
            whole = state | {f"vae.{name}": x for name, x in states["vae"].items()}
        if part == "ar":
            facts["tokenizer"] = hashes["tokenizer"]
            facts["tokenizer_identity"] = identity_of(hashes["tokenizer"], facts["tokenizer_means"])
        hashes[part] = weights_hash(whole)
        save_file(state, file.with_name("model.safetensors"), {"format": "pt"})
        write_text(file, json.dumps(facts, indent=1))
    return hashes


def rename_table(dest: Path, hashes: dict[str, str]) -> None:
    """The table says whose it is now, and that it was measured before the rounding."""
    from flextok_edu.evaluation.report import load_report

    report = load_report(dest)
    measured = report.card["weights"]
    report.card["weights"] = measured | {part: h for part, h in hashes.items() if part in measured}
    report.card["measured_before_rounding"] = {part: h for part, h in measured.items() if part in hashes}
    report.scores = {}  # they lie there as they are
    report.save(dest)


def join(folder: Path, dest: Path) -> dict[str, str]:
    """Part -> hash of its weights. Raises ValueError for a folder that is taken, or a missing piece."""
    if dest.exists() and any(dest.iterdir()):
        raise ValueError(f"{dest} is not empty: give a new folder")
    dest.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "results.tar.gz") as archive:
        archive.extractall(dest, filter="data")
    for name in PICTURES:
        for file in (folder / name, (folder / name).with_suffix(".jpg")):
            if file.exists():
                shutil.copyfile(file, dest / file.name)
    states = joined_weights(folder)
    if set(states) != set(finished(dest)):
        raise ValueError(f"weights of {sorted(states)}, but results of {finished(dest)}: a piece is missing")
    if not states:
        return {}
    hashes = rebind(dest, states)
    if (dest / "table.json").exists():
        rename_table(dest, hashes)
    from flextok_edu.apps.card import open_parts

    open_parts({part: dest / part for part in hashes})  # everything fits, and belongs together
    return hashes


def rounding(run: Path) -> dict[str, float]:
    """What rounding changes, on 64 held-out scenes: told beside the table, because later nobody can tell."""
    from flextok_edu.apps.card import open_parts
    from flextok_edu.apps.zoo import rounding as changes
    from flextok_edu.data.scenes import ToyScenes
    from flextok_edu.engine.config import Preset
    from flextok_edu.engine.files import write_text
    from flextok_edu.engine.limits import from_dict
    from flextok_edu.engine.tensors import from_uint8

    p = from_dict(Preset, json.loads((run / "run.json").read_text(encoding="utf-8"))["preset"])
    before, after = (open_parts({part: run / part for part in finished(run)}) for _ in range(2))
    for model in filter(None, after):
        model.load_state_dict({name: small(x).to(x.dtype) for name, x in model.state_dict().items()})
    images = ToyScenes("val", p.image_size, p.level, length=64).render()[0]
    found = changes(before, after, from_uint8(images))
    write_text(run / "rounding.json", json.dumps(found, indent=1))
    return found


def main(words: list[str]) -> None:
    if len(words) == 3 and words[0] == "--pack":
        for file in pack(Path(words[1]), Path(words[2])):
            print(f"{file.stat().st_size / 2**20:8.2f} MiB  {file.name}")
    elif len(words) == 2 and words[0] == "--rounding":
        print(json.dumps(rounding(Path(words[1]))))
    elif len(words) == 2 and not words[0].startswith("-"):
        for part, name in join(Path(words[0]), Path(words[1])).items():
            print(f"{part}: {name}")
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
