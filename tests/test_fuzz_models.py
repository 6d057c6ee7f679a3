"""Mutated models at every door: 2,000 cases each, in one process, from fixed seeds.

Refused in a sentence or loaded; nothing else.

`FLEXTOK_FUZZ=10` makes ten times as many. A case that fails is made again by its door and number:
`cases("ours", 1234)`.
"""

import copy
import json
import os
import random
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save

from flextok_edu.ar import ARModel, load_ar
from flextok_edu.engine.checks import parse_json, read_json
from flextok_edu.engine.config import ARConfig, TokenizerConfig, TrunkConfig, VAEConfig
from flextok_edu.engine.models import save_model
from flextok_edu.io.released import load_flextok, load_vae
from flextok_edu.io.released_ar import load_released_ar
from flextok_edu.tokenizer import FlexTok, load_tokenizer
from flextok_edu.vae import VAE

FIXTURES = Path(__file__).parent / "fixtures"
COUNT = int(2000 * float(os.environ.get("FLEXTOK_FUZZ", "1")))
ALLOWED = (ValueError, OSError)  # FileNotFoundError is one
NASTY = (
    None,
    True,
    False,
    -1,
    0,
    1,
    2,
    3,
    7,
    64,
    1000,
    65536,
    65537,
    10**9,
    2**31,
    2**63,
    2**64,
    10**400,
    1e308,
    -1e308,
    5e-324,
    1.5,
    -0.0,
    float("nan"),
    float("inf"),
    "",
    "x",
    "1",
    "\ud800",
    "\x1b[2J",
    "../../etc/passwd",
    "$x^2",
    "é" * 50,
    "y" * 5000,
    [],
    {},
    [[]],
    [None],
    [1, 2, 3],
    [0],
    [10**9] * 3,
    {"a": 1},
    {"_target_": "os.system"},
    {"": {}},
    [[[[[[[[[[]]]]]]]]]],
    list(range(300)),
    "F32",
    "I64",
    "BOOL",
    "F8_E4M3",
)


def nodes(value, path=()):
    """All places of a json value."""
    found = [path] if path else []
    if isinstance(value, dict):
        for k, v in value.items():
            found += nodes(v, (*path, k))
    elif isinstance(value, list):
        for i, v in enumerate(value):
            found += nodes(v, (*path, i))
    return found


def at(value, path):
    for key in path:
        value = value[key]
    return value


def mutate(value, rng: random.Random):
    """One to three changes of a json value."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        places = nodes(value)
        if not places:
            return rng.choice(NASTY)
        *path, key = rng.choice(places)
        parent = at(value, path)
        now, how = parent[key], rng.randrange(10)
        if how < 4:
            parent[key] = copy.deepcopy(rng.choice(NASTY))
        elif how == 4 and isinstance(parent, dict):
            del parent[key]
        elif how == 5 and isinstance(parent, dict):
            parent[rng.choice(("", "x", str(key)[::-1], "config", "\ud800"))] = parent.pop(key)
        elif how == 6:
            parent[key] = copy.deepcopy(at(value, rng.choice(places)))
        elif how == 7 and isinstance(now, (int, float)) and not isinstance(now, bool):
            parent[key] = (
                now * rng.choice((-1, 2, 0.5, 1000, 1e9)) if rng.random() < 0.5 else now + rng.choice((-1, 1))
            )
        elif how == 8:
            parent[key] = [now] * rng.choice((0, 1, 2, 50))
        else:
            parent[key] = {"x": now} if rng.random() < 0.5 else str(now)
    return value


def spoil(text: bytes, rng: random.Random) -> bytes:
    """One change of the bytes."""
    a, how = rng.randrange(len(text) + 1), rng.randrange(6)
    if how == 0:
        return text[:a]
    if how == 1:
        return text[:a] + bytes(rng.randrange(256) for _ in range(rng.choice((1, 4, 40)))) + text[a:]
    if how == 2:
        return (
            text[:a]
            + rng.choice((b"[", b'{"a":', b"9", b"\\ud800", b"\xff")) * rng.choice((10, 2000, 100_000))
            + text[a:]
        )
    if how == 3:
        return text[:a] + text[a + rng.choice((1, 5, 100)) :]
    if how == 4:
        return b"\xef\xbb\xbf" + text
    return text[: max(0, a - 1)] + bytes([rng.randrange(256)]) + text[a:]


def json_text(value) -> bytes:
    try:
        return json.dumps(value).encode()
    except ValueError:  # of a number with too many digits
        return b"1" * 5000


def safetensors_head(whole: bytes, rng: random.Random) -> bytes:
    """A file of weights whose head, or the length of it, is another."""
    size = int.from_bytes(whole[:8], "little")
    head, rest = whole[8 : 8 + size], whole[8 + size :]
    if rng.random() < 0.1:
        return (
            rng.choice((0, 1, size - 1, size + 1, 2**60, 2**63, len(whole))).to_bytes(8, "little") + whole[8:]
        )
    head = json_text(mutate(json.loads(head), rng)) if rng.random() < 0.7 else spoil(head, rng)
    return (
        len(head).to_bytes(8, "little")
        + head
        + rest[: rng.choice((len(rest), len(rest), len(rest), 0, len(rest) // 2))]
    )


def door_of_ours(folder: Path):
    torch.manual_seed(0)
    trunk = TrunkConfig(8, 1, head_dim=8, mlp_ratio=1.0)
    kinds = (
        (load_tokenizer, FlexTok, TokenizerConfig(2, 4, 4, (3, 2), trunk, trunk, time_features=4)),
        (load_ar, ARModel, ARConfig(6, 4, 3, 8, 1, 8, 1.0)),
        (VAE._load_pretrained, VAE, VAEConfig(3, 2, (4, 8), 1, 1, 2)),
    )
    made = []
    for i, (load, cls, config) in enumerate(kinds):
        save_model(
            folder / str(i),
            cls(config),
            config,
            terms=None,
            classes=["a", "b", "c"],
            tokenizer="0" * 16,
            stage={"steps": 1},
        )
        made.append((load, folder / str(i), "config.json", "model.safetensors"))
    return made


def door_of_released(folder: Path):
    made = []
    for name in ("released_tiny", "released_plain"):
        (folder / name).mkdir()
        for file in ("config.json", "model.safetensors"):
            (folder / name / file).write_bytes((FIXTURES / name / file).read_bytes())
        made.append((load_flextok, folder / name, "config.json", "model.safetensors"))
    return made


def door_of_vaes(folder: Path):
    from flextok_edu.io.released_vae import vae_names

    config = VAEConfig(3, 4, (8, 16), 1, 1, 4)
    state = VAE(config).state_dict()
    weights = {
        f"{theirs}.{last}": state[f"{ours}.{last}"].contiguous()
        for theirs, ours in vae_names(config).items()
        for last in ("weight", "bias")
    }
    (folder / "v").mkdir()
    (folder / "v" / "diffusion_pytorch_model.safetensors").write_bytes(save(weights))
    (folder / "v" / "config.json").write_text(
        json.dumps(
            dict(
                _class_name="AutoencoderKL",
                block_out_channels=[8, 16],
                latent_channels=4,
                layers_per_block=1,
                norm_num_groups=4,
                in_channels=3,
                out_channels=3,
                down_block_types=["DownEncoderBlock2D"] * 2,
                up_block_types=["UpDecoderBlock2D"] * 2,
                scaling_factor=0.2,
                shift_factor=None,
                act_fn="silu",
            )
        )
    )
    return [(load_vae, folder / "v", "config.json", "diffusion_pytorch_model.safetensors")]


def door_of_released_ar(folder: Path):
    from flextok_edu.io.ar_export import save_released_ar

    torch.manual_seed(0)
    save_released_ar(folder / "own", ARModel(ARConfig(20, 4, 3, 16, 1, 8)))
    (folder / "grid").mkdir()
    for file in ("config.yaml", "model.safetensors"):
        (folder / "grid" / file).write_bytes((FIXTURES / "released_ar_grid" / file).read_bytes())
    for place in (folder / "own", folder / "grid"):  # json is YAML too, and is what these tests can change
        told = yaml.safe_load((place / "config.yaml").read_text())
        (place / "config.yaml").write_text(json.dumps(told))
    return [(load_released_ar, folder / n, "config.yaml", "model.safetensors") for n in ("own", "grid")]


DOORS = {
    "ours": door_of_ours,
    "released": door_of_released,
    "released vae": door_of_vaes,
    "released ar": door_of_released_ar,
}


@pytest.fixture
def bounded():
    """No more than a gigabyte of address space beyond what is there: whoever asks for more gets an error that
    is not allowed. Yields how much memory was really taken.
    """
    resource = pytest.importorskip("resource")

    def used():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    before, old = used(), resource.getrlimit(resource.RLIMIT_AS)
    try:
        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + 2**30, old[1]))
    except (OSError, ValueError):  # not on this system
        pass
    yield lambda: used() - before
    resource.setrlimit(resource.RLIMIT_AS, old)


@pytest.mark.parametrize("door", DOORS)
def test_mutated_models(tmp_path, bounded, door, capsys):
    made = DOORS[door](tmp_path)
    originals = {place: {f: (place / f).read_bytes() for f in files} for _, place, *files in made}
    for load, place, *_ in made:
        load(place)
    failed, loaded = [], 0
    for number in range(COUNT):
        rng = random.Random(f"{door} {number}")
        load, place, config, weights = made[rng.randrange(len(made))]
        name = config if rng.random() < 0.75 else weights
        whole = originals[place][name]
        if name == weights:
            content = safetensors_head(whole, rng)
        else:
            content = json_text(mutate(json.loads(whole), rng)) if rng.random() < 0.9 else spoil(whole, rng)
        (place / name).write_bytes(content)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                load(place)
            loaded += 1
        except ALLOWED as error:
            if (
                len(str(error)) > 5000
                or not str(error).isprintable()
                and any(c in str(error) for c in "\x1b\ud800")
            ):
                failed.append(
                    (
                        number,
                        f"a message of {len(str(error)):,} characters, or with control characters: "
                        f"{str(error)[:200]!r}",
                    )
                )
        except Exception as error:
            failed.append((number, f"{type(error).__name__}: {str(error)[:200]}"))
        (place / name).write_bytes(whole)
    capsys.readouterr()
    assert not failed, f"{len(failed)} of {COUNT}, the first: {failed[:8]}"
    assert loaded < COUNT / 2, "most changes are noticed"
    assert bounded() < 500e6, "memory was taken"


def test_mutated_json(tmp_path, bounded):
    """The reader itself, on bytes of any kind."""
    whole, file = (FIXTURES / "released_plain" / "config.json").read_bytes(), tmp_path / "x.json"
    for number in range(COUNT):
        rng = random.Random(f"json {number}")
        content = (
            spoil(spoil(whole, rng), rng)
            if number % 2
            else bytes(
                rng.choice(b'[]{}",:0123456789.eE-+ntfalsru\\ \n\xff') for _ in range(rng.randrange(60))
            )
        )
        file.write_bytes(content)
        for read in (lambda: parse_json(content, "x"), lambda: read_json(file)):
            try:
                read()
            except ValueError:
                pass
    assert bounded() < 500e6
