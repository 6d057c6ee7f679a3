"""`from_pretrained`, `save_pretrained`, `push_to_hub` and downloads by name, against a stand-in hub on this
machine.
"""

import json
import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from hub import Hub

from flextok_edu.ar import ARModel
from flextok_edu.engine.config import ARConfig, TokenizerConfig, TrunkConfig, VAEConfig
from flextok_edu.engine.hub import hub_folder
from flextok_edu.io.released import load_flextok
from flextok_edu.tokenizer import FlexTok
from flextok_edu.vae import VAE

ROOT = Path(__file__).resolve().parent.parent
FIXTURES = ROOT / "tests" / "fixtures"
VAE_SMALL = VAEConfig(latent_channels=4, channels=(16, 32), layers=1, stem=2, groups=4)
TOK_SMALL = TokenizerConfig(4, 8, 8, (8, 5, 5, 5), TrunkConfig(64, 1), TrunkConfig(64, 2))


def small_tokenizer() -> FlexTok:
    torch.manual_seed(0)
    return FlexTok(TOK_SMALL, VAE(VAE_SMALL)).eval()


def in_process(code: str, hub: Hub | None, tmp_path: Path) -> subprocess.CompletedProcess:
    """huggingface_hub reads its address when it is imported: so in a process of its own."""
    env = {
        **os.environ,
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": "hf_test",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_ENDPOINT": hub.address if hub else "http://127.0.0.1:9",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=400, env=env, cwd=tmp_path
    )


def test_a_folder_holds_everything(tmp_path):
    tok = small_tokenizer()
    tok.save_pretrained(tmp_path / "t")
    files = sorted(str(f.relative_to(tmp_path / "t")) for f in (tmp_path / "t").rglob("*") if f.is_file())
    assert files == [
        "README.md",
        "config.json",
        "model.safetensors",
        "vae/config.json",
        "vae/model.safetensors",
    ]
    again, images = FlexTok.from_pretrained(tmp_path / "t"), torch.rand(2, 3, 32, 32) * 2 - 1
    assert not again.training and torch.equal(again.tokenize(images), tok.tokenize(images))
    ids = tok.tokenize(images)
    assert torch.equal(again.detokenize(ids, steps=2), tok.detokenize(ids, steps=2))
    assert "license: apache-2.0" in (tmp_path / "t" / "README.md").read_text()
    vae = VAE.from_pretrained(tmp_path / "t" / "vae")
    assert torch.equal(vae.encode(images), tok.vae.encode(images))


def test_the_vae_must_be_the_one(tmp_path):
    tok = small_tokenizer()
    tok.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="was trained with VAE"):
        FlexTok.from_pretrained(tmp_path, vae=VAE(VAE_SMALL))


def test_ar_model(tmp_path):
    model = ARModel(ARConfig(vocabulary=1000, length=8, classes=3, width=64, depth=1))
    model.save_pretrained(tmp_path)
    again = ARModel.from_pretrained(tmp_path)
    labels = torch.tensor([0, 2])
    assert torch.equal(again.generate(labels, seed=1), model.eval().generate(labels, seed=1))


@pytest.mark.parametrize(
    "kind,other",
    (
        (VAE, "tokenizer"),
        (FlexTok, "vae"),
        (FlexTok, "released"),
        (VAE, "released"),
        (FlexTok, "nothing"),
        (FlexTok, "name"),
    ),
)
def test_what_is_something_else_is_refused(tmp_path, kind, other):
    tok = small_tokenizer()
    place = {
        "tokenizer": tmp_path,
        "vae": tmp_path / "vae",
        "released": FIXTURES / "released_tiny",
        "nothing": tmp_path / "empty",
        "name": "surely-not-there",
    }[other]
    tok.save_pretrained(tmp_path)
    (tmp_path / "empty").mkdir()
    match = {
        "tokenizer": "VAEConfig has no setting",
        "vae": "TokenizerConfig has no setting",
        "released": "load_flextok",
        "nothing": "config.json is missing",
        "name": "no folder here",
    }[other]
    with pytest.raises((ValueError, FileNotFoundError), match=match):
        kind.from_pretrained(place)


def test_damage_is_noticed(tmp_path):
    tok = small_tokenizer()
    tok.save_pretrained(tmp_path)
    with open(tmp_path / "model.safetensors", "r+b") as f:
        f.truncate(10_000)
    with pytest.raises(ValueError, match="damaged"):
        FlexTok.from_pretrained(tmp_path)
    with torch.no_grad():
        tok.decoder.mask_token[0] = torch.nan
    tok.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="mask_token contains NaN"):
        FlexTok.from_pretrained(tmp_path)


def test_terms_travel_with_the_weights(tmp_path, capsys):
    """Fine-tunes of released weights are for research use only: in the card, in config.json, and on every
    load.
    """
    tok = load_flextok(FIXTURES / "released_tiny")
    capsys.readouterr()
    tok.save_pretrained(tmp_path / "a")
    card = (tmp_path / "a" / "README.md").read_text()
    assert "license: other" in card and "apache" not in card and "research use only" in card
    again = FlexTok.from_pretrained(tmp_path / "a")
    assert "research use only" in capsys.readouterr().out
    again.save_pretrained(tmp_path / "b")
    assert "research use only" in json.loads((tmp_path / "b" / "config.json").read_text())["terms"]


def test_push_and_pull(tmp_path):
    """Up to a hub, and down again in another process with an empty cache."""
    hub = Hub()
    setup = (
        "import torch\nfrom flextok_edu.engine.config import TokenizerConfig, TrunkConfig, VAEConfig\nfrom "
        "flextok_edu.tokenizer import FlexTok\nfrom flextok_edu.vae import VAE\n"
        "images = torch.linspace(-1, 1, 2 * 3 * 32 * 32).view(2, 3, 32, 32)\n"
    )
    pushed = in_process(
        setup + f"torch.manual_seed(0)\ntok = FlexTok({TOK_SMALL!r}, "
        f"VAE({VAE_SMALL!r})).eval()\n"
        "print(tok.push_to_hub('me/mine'))\nprint(tok.tokenize(images).tolist())",
        hub,
        tmp_path,
    )
    assert pushed.returncode == 0, pushed.stderr[-2000:]
    assert {
        "config.json",
        "model.safetensors",
        "vae/config.json",
        "vae/model.safetensors",
        "README.md",
    } <= hub.repos["me/mine"].keys()
    hub.repos["me/mine"] |= {
        name: b"{}"
        for name in (
            "trap.bin",
            "trap.json",
            "trap.safetensors",
            "vae/trap.json",
            "checkpoints/trap/model.safetensors",
            "trap/config.json",
        )
    }
    pulled = in_process(
        setup + "tok = FlexTok.from_pretrained('me/mine')\nprint(tok.tokenize(images).tolist())",
        hub,
        tmp_path,
    )
    assert pulled.returncode == 0, pulled.stderr[-2000:]
    assert pulled.stdout.splitlines()[-1] == pushed.stdout.splitlines()[-1]
    assert not any("trap" in request and "resolve" in request for request in hub.asked), (
        "only the four files are downloaded"
    )


def test_extractors_are_pinned(monkeypatch, tmp_path):
    """DINOv2 and CLIP by commit, Inception by its whole hash, also where it lies in the cache already."""
    import flextok_edu.data.extractors as data_extractors

    asked = {}

    def kind():
        return type(
            "Kind",
            (),
            {
                "from_pretrained": classmethod(
                    lambda cls, name, **options: asked.update({name: options}) or torch.nn.Identity()
                )
            },
        )

    monkeypatch.setitem(
        sys.modules,
        "transformers",
        types.SimpleNamespace(Dinov2Model=kind(), CLIPVisionModelWithProjection=kind()),
    )
    for name in ("dinov2_small", "clip_b32"):
        data_extractors.extractor(name)
    data_extractors.extractor("dinov2_small", weights=tmp_path)
    assert {name: len(o.get("revision") or "") for name, o in asked.items()} == {
        "facebook/dinov2-small": 40,
        "openai/clip-vit-base-patch32": 40,
        str(tmp_path): 0,
    } and all(o["weights_only"] for o in asked.values())
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    url = data_extractors.DOWNLOADED["inception"][0]
    assert len(data_extractors.PINS[url]) == 64 and data_extractors.PINS[url].startswith(
        url.split("-")[-1].removesuffix(".pth")
    )
    fetched = []
    monkeypatch.setattr(
        torch.hub,
        "download_url_to_file",
        lambda url, path, hash_prefix: fetched.append(hash_prefix) or Path(path).write_bytes(b"other"),
    )
    for _ in range(2):  # the second time it is in the cache
        with pytest.raises(ValueError, match="is not torchvision's Inception-v3"):
            data_extractors.extractor("inception")
    assert fetched == [data_extractors.PINS[url]]


def test_released_by_name(tmp_path):
    """`load_flextok` by the name of a repository, as released ones are."""
    hub = Hub()
    hub.repos["owner/tiny"] = {f.name: f.read_bytes() for f in (FIXTURES / "released_tiny").iterdir()}
    code = (
        "import torch\nfrom safetensors.torch import load_file\nfrom flextok_edu.io.released import "
        "load_flextok\n"
        f"io = load_file({str(FIXTURES / 'released_tiny' / 'io.safetensors')!r})\ntok = "
        "load_flextok('owner/tiny')\nassert torch.equal(tok.encode_latents(io['latents']), "
        "io['tokens'])\nprint('fine')"
    )
    result = in_process(code, hub, tmp_path)
    assert result.returncode == 0 and result.stdout.splitlines()[-1] == "fine", result.stderr[-2000:]


def test_released_ar_by_name(tmp_path):
    """Only the configuration and the weights are fetched."""
    hub = Hub()
    files = {f.name: f.read_bytes() for f in (FIXTURES / "released_ar_class").iterdir()}
    hub.repos["owner/ar"] = files | {"pytorch_model.bin": b"a pickle"}
    code = (
        "from flextok_edu import load_released_ar\nar = load_released_ar('owner/ar')\n"
        "print(ar.config.depth, ar.released.tokenizer)"
    )
    result = in_process(code, hub, tmp_path)
    assert result.returncode == 0 and result.stdout.split() == ["3", "EPFL-VILAB/flextok_d18_d28_dfn"], (
        result.stderr[-2000:]
    )
    assert not any("io.safetensors" in r or "pickle" in r or ".bin" in r for r in hub.asked if "resolve" in r)
    (elsewhere := tmp_path / "elsewhere").mkdir()
    result = in_process(code, None, elsewhere)
    assert "FileNotFoundError" in result.stderr and "hf download owner/ar" in result.stderr


def test_a_repository_without_the_file(tmp_path):
    """There, but of another kind: what is missing is named, and nobody is told that the network is."""
    hub = Hub()
    hub.repos["owner/other"] = {"README.md": b"# weights as a pickle", "pytorch_model.bin": b"a pickle"}
    code = (
        "from flextok_edu.io.released import load_flextok, load_vae\nfor load in (load_flextok, "
        "load_vae):\n    try: load('owner/other')\n    except FileNotFoundError as error: print(error)"
    )
    result = in_process(code, hub, tmp_path)
    assert (
        result.returncode == 0
        and "owner/other holds no model.safetensors" in result.stdout
        and "owner/other holds no config.json of a VAE" in result.stdout
    ), (result.stdout, result.stderr[-2000:])
    assert not any("pytorch_model" in request and "resolve" in request for request in hub.asked)


@pytest.mark.parametrize(
    "call", ("FlexTok.from_pretrained('owner/none')", "load_flextok('owner/none')", "load_vae('owner/none')")
)
@pytest.mark.parametrize("there", (True, False), ids=("unknown name", "no network"))
def test_no_such_name_and_no_network(tmp_path, call, there):
    hub = Hub() if there else None
    result = in_process(
        "from flextok_edu.tokenizer import FlexTok\nfrom flextok_edu.io.released import load_flextok, "
        "load_vae\n" + call,
        hub,
        tmp_path,
    )
    assert (
        result.returncode != 0
        and "FileNotFoundError" in result.stderr
        and "hf download owner/none" in result.stderr
    ), result.stderr[-2000:]


def test_the_lesson_with_a_network(tmp_path):
    """The last cells of the notebook, as a reader with a network runs them: the released names lead to the
    fixture and to a small VAE.
    """
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=1,
        norm_num_groups=8,
        latent_channels=16,
    ).save_pretrained(tmp_path / "vae")
    config = json.loads((FIXTURES / "released_tiny" / "config.json").read_text())
    config["vae"]["scaling_factor"] = 0.18215  # the VAE's own
    hub = Hub()
    hub.repos["EPFL-VILAB/flextok_d12_d12_in1k"] = {
        "config.json": json.dumps(config).encode(),
        "model.safetensors": (FIXTURES / "released_tiny" / "model.safetensors").read_bytes(),
    }
    hub.repos["EPFL-VILAB/flextok_vae_c16"] = {f.name: f.read_bytes() for f in (tmp_path / "vae").iterdir()}
    code = [
        "".join(c["source"])
        for c in json.loads((ROOT / "nbs" / "17_released.ipynb").read_text(encoding="utf-8"))["cells"]
        if c["cell_type"] == "code"
    ]
    first, last = (
        next(i for i, source in enumerate(code) if mark in source)
        for mark in ("import copy", "def at_budgets")
    )
    program = (
        "import os\nos.environ |= {'FLEXTOK_DOWNLOAD': '1', 'MPLBACKEND': 'Agg'}\n"
        + "\n".join([code[first], *code[last:]])
        + "\nprint(len(budgets), images.shape, real.config.registers)"
    )
    result = in_process(program, hub, tmp_path)
    assert result.returncode == 0, (result.stdout[-500:], result.stderr[-2000:])
    assert result.stdout.splitlines()[-1] == "7 torch.Size([4, 3, 32, 32]) 64"


def test_hub_folder_is_local_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert hub_folder("owner/name") == Path("owner/name")
    shutil.rmtree(tmp_path / "owner")
