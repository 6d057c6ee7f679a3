"""Cells that a notebook needs because an example found its folder or its pictures in another one: {module: code}."""

_FILES = """#| hide
# Sixty toy scenes as files and in three tar shards; *tar* shows how shards are written.
temporary = tempfile.TemporaryDirectory()  # goes away with the notebook
WORK = Path(temporary.name)
scenes, folder = ToyScenes(size=48, length=60), WORK / "scenes"


def sample(i):  # one sample of a shard: its key, and what belongs to it
    stream = io.BytesIO()
    Image.fromarray(to_uint8(scenes[i].image).permute(1, 2, 0).numpy()).save(stream, "JPEG", quality=92)
    parts = {"jpg": stream.getvalue(), "cls": str(scenes[i].label).encode(), "txt": scenes[i].caption.encode()}
    return f"{i:03}", parts


for i in range(60):
    place = folder / "abc"[i % 3]
    place.mkdir(parents=True, exist_ok=True)
    Image.fromarray(to_uint8(scenes[i].image).permute(1, 2, 0).numpy()).save(place / f"{i:03}.png")
    if i % 2 == 0:
        (place / f"{i:03}.txt").write_text(scenes[i].caption)
    with tarfile.open(WORK / f"toys-{i // 20:03}.tar", "a") as tar:
        for extension, content in sample(i)[1].items():
            member = tarfile.TarInfo(f"{i:03}.{extension}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
"""
_IMPORTS = {
    "io": "import io",
    "tempfile": "import tempfile",
    "tarfile": "import tarfile",
    "Path": "from pathlib import Path",
    "Image": "from PIL import Image",
    "ToyScenes": "from flextok_edu.data.scenes import ToyScenes",
    "to_uint8": "from flextok_edu.engine.tensors import to_uint8",
}
_SOURCE = "source = FolderSource(folder)\n"
_TARS = 'tars = TarSource(str(WORK / "toys-{000..002}.tar"), index=WORK / "index")\n'
SETUPS = {
    "data.tar": """temporary = tempfile.TemporaryDirectory()  # goes away with the notebook
WORK = Path(temporary.name)
scenes = ToyScenes(size=48, length=60)
""",
    "data.reading": _FILES + _SOURCE + _TARS + "toys = ObjectSource(ToyScenes(size=64, length=200))\n",
    "data.streams": _FILES,
    "data.opening": _FILES + _SOURCE + _TARS,
    "data.folders": """boat = Scene("sea", "night", 0.5, (Thing("boat", "red", 0.45, 0.5, 0.6, 4.0),), (False,), 2, 0)


def as_images(a):  # (b h w 3) uint8 -> (b 3 h w) in [-1, 1]
    return from_uint8(torch.from_numpy(a.copy()).permute(0, 3, 1, 2))
""",
    "data.extractors": 'x = from_uint8(ToyScenes("val", 64, 2, length=16).render()[0])\n',
    "engine.marks": "x = torch.rand(8, 3, 32, 32) * 2 - 1\n",
    "engine.shards": """room = tempfile.TemporaryDirectory()  # goes away with the notebook
base = Path(room.name)
""",
    "io.pictures": 'data, _ = load_data("scenes", 32, 200, 8, progress=False)\n',
    "engine.claims": "folder = Path(tempfile.mkdtemp())\n",
    "training": """folder = Path(tempfile.mkdtemp())
where = dict(os.environ, PYTHONPATH=str(Path(flextok_edu.__file__).parent.parent), OMP_NUM_THREADS="1")
""",
    "apps.explore": "folder = Path(tempfile.mkdtemp())\n",
}
SETUP_IMPORTS = _IMPORTS | {
    "FolderSource": "from flextok_edu.data.sources import FolderSource",
    "ObjectSource": "from flextok_edu.data.set_sources import ObjectSource",
    "TarSource": "from flextok_edu.data.tar import TarSource",
    "Scene": "from flextok_edu.data.scenes import Scene",
    "Thing": "from flextok_edu.data.scenes import Thing",
    "from_uint8": "from flextok_edu.engine.tensors import from_uint8",
    "torch": "import torch",
    "os": "import os",
    "flextok_edu": "import flextok_edu",
    "load_data": "from flextok_edu.data.datasets import load_data",
}
