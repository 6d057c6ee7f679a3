"""What a file of a stranger may do at the doors of models: nothing but be refused in a sentence."""

import json
import os
import re
import stat
import subprocess
import sys
import tracemalloc
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import flextok_edu.engine.identity as engine_identity
import flextok_edu.engine.limits as engine_limits
import flextok_edu.engine.models as engine_models
import flextok_edu.engine.tensors as engine_tensors
import flextok_edu.engine.figures as engine_figures
from flextok_edu.ar import ARModel, load_ar, save_ar
from flextok_edu.engine.binding import bind_tokenizer, check_tokenizer, tokenizer_hash, tokenizer_identity
from flextok_edu.engine.checks import Range, conform, one_of, parse_json, read_json
from flextok_edu.engine.config import (
    ARConfig,
    EvalConfig,
    PRESETS,
    Preset,
    StageConfig,
    TokenizerConfig,
    preset,
    TrunkConfig,
    VAEConfig,
    VAELossConfig,
)
from flextok_edu.engine.files import atomic, weights_hash, write_text
from flextok_edu.engine.identity import identity
from flextok_edu.engine.limits import check_limits, from_dict, to_json
from flextok_edu.engine.models import load_model, model_kind, save_model
from flextok_edu.engine.text import drawable, plain
from flextok_edu.tokenizer import FlexTok, load_tokenizer, save_tokenizer
from flextok_edu.vae import VAE

ROOT = Path(__file__).resolve().parent.parent
VAE_SMALL = VAEConfig(latent_channels=4, channels=(16, 32), layers=1, stem=2, groups=4)
TOK_SMALL = TokenizerConfig(4, 8, 8, (8, 5, 5, 5), TrunkConfig(64, 1), TrunkConfig(64, 2))
AR_SMALL = ARConfig(vocabulary=1000, length=8, classes=3, width=64, depth=1)
MODELS = {"vae": (VAE, VAE_SMALL), "tokenizer": (FlexTok, TOK_SMALL), "ar": (ARModel, AR_SMALL)}
CLASSES = (
    VAEConfig,
    TrunkConfig,
    TokenizerConfig,
    ARConfig,
    StageConfig,
    VAELossConfig,
    EvalConfig,
    Preset,
)


# --- json --------------------------------------------------------------------------------------------------

BAD_TEXTS = {
    "brackets": "[" * 100_000,
    "closed brackets": "[" * 150 + "]" * 150,
    "braces": '{"a":' * 100_000,
    "empty": "",
    "half": '{"a": 1',
    "a long number": "1" * 10_000,
    "words": "depth: 3",
    "no UTF-8": b"\xff\xfe{}",
    "a surrogate of bytes": b'"\xed\xa0\x80"',
    "zeros": b"\x00" * 100,
}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_no_json_is_a_value_error(tmp_path, name):
    text, path = BAD_TEXTS[name], tmp_path / "x.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    for call in (lambda: parse_json(text, "x.json", "index"), lambda: read_json(path, "index")):
        with pytest.raises(ValueError, match="x.json is no index: "):
            call()


def test_files_that_are_no_json(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "none.json")
    with pytest.raises(ValueError, match="no ordinary file"):
        read_json(tmp_path)
    path = tmp_path / "x.json"
    with open(path, "wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match="more than 67,108,864 are not read"):
        read_json(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n")
    with pytest.raises(ValueError, match="git-lfs pointer, not the file: git lfs pull"):
        read_json(path)
    path.write_bytes(b"\xef\xbb\xbf" + '{"ä": [1, 2.5, null]}'.encode())
    assert read_json(path) == {"ä": [1, 2.5, None]}


SHAPE = {
    "count": int,
    "name?": (str, None),
    "rows": [{"ids": [Range(0, 9)], "kind": one_of("a", "b")}],
    "scale?": Range(0, 1, float),
}


def test_conform_lets_through():
    for value in (
        {"count": 1, "rows": []},
        {"count": 0, "name": None, "rows": [{"ids": [0, 9], "kind": "a", "more": 1}], "scale": 1, "other": 5},
    ):
        assert conform(value, SHAPE) is value
    assert (
        conform([1, 2.5], [float])
        and conform(3, (int, [int])) == 3
        and conform({"a": 1}, {"a": int, ...: False})
    )


@pytest.mark.parametrize(
    "value, says",
    (
        ({"rows": []}, "ids.jsonl has no 'count': a whole number"),
        ({"count": True, "rows": []}, "ids.jsonl.count is True; it must be a whole number"),
        ({"count": 1.0, "rows": []}, "ids.jsonl.count is 1.0"),
        ([], r"ids.jsonl is \[\]; it must be an object"),
        ({"count": 1, "rows": {}}, "ids.jsonl.rows is {}"),
        (
            {"count": 1, "rows": [{"ids": [1, 1.9], "kind": "a"}]},
            r"ids.jsonl.rows\[0\].ids\[1\] is 1.9; it must be a whole number in 0 .. 9",
        ),
        ({"count": 1, "rows": [{"ids": [True], "kind": "a"}]}, r"rows\[0\].ids\[0\] is True"),
        ({"count": 1, "rows": [{"ids": [], "kind": "c"}]}, r"kind is 'c'; it must be 'a' or 'b'"),
        ({"count": 1, "rows": [], "name": 3}, "name is 3; it must be text or nothing"),
        ({"count": 1, "rows": [], "scale": float("nan")}, "scale is nan"),
        ({"count": 1, "rows": [], "scale": 10**400}, "scale is 1000"),
        ({"count": 1, "rows": [], "scale": float("inf")}, "scale is inf"),
    ),
)
def test_conform_names_the_place(value, says):
    with pytest.raises(ValueError, match=says):
        conform(value, SHAPE, "ids.jsonl")


def test_conform_alternatives_and_further_keys():
    with pytest.raises(
        ValueError, match=r"x.ids\[0\] is 'a'"
    ):  # it is an object: then what is wrong inside it
        conform({"ids": ["a"]}, (str, {"ids": [int]}), "x")
    with pytest.raises(ValueError, match="x has an unknown key 'b'; it may have: a"):
        conform({"a": 1, "b": 2}, {"a": int, ...: False}, "x")
    with pytest.raises(ValueError, match="x is 'a{1,15}"):
        conform("a" * 10**6, int, "x")
    assert not one_of(1, 2)(True) and not one_of(1)(1.0) and one_of(0.0, None)(0) and not one_of("a")([])


# --- configurations ----------------------------------------------------------------------------------------


def test_presets_are_within_their_limits():
    for p in PRESETS.values():
        check_limits(p)
        assert from_dict(Preset, json.loads(to_json(p))) == p
    for kind in CLASSES:
        limited = engine_limits.configuration_of(kind).limits.keys()
        inside = engine_limits.configurations_inside(kind).keys()
        assert limited | inside == {f.name for f in fields(kind)}, "every setting has a limit"
        assert not limited & inside


@dataclass(frozen=True)
class Inner:  # nobody registered it
    act: str = "gelu"
    trunk: TrunkConfig = TrunkConfig()


@dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    maybe: "Inner | None" = None
    many: tuple[Inner, ...] = ()
    notes: dict = field(default_factory=dict)


def test_configurations_inside_are_built_by_their_annotation():
    one = Outer(Inner("silu", TrunkConfig(64)), Inner("a"), (Inner("b"), Inner("c")), {"a": 1})
    back = from_dict(Outer, json.loads(to_json(one)))
    assert back == one and type(back.maybe) is Inner and type(back.many[1].trunk) is TrunkConfig
    assert from_dict(Outer, {"maybe": None}) == from_dict(Outer, {"inner": Inner()}) == Outer()
    for values, says in (
        ({"inner": {"atc": "gelu"}}, "Inner has no setting 'atc'"),
        ({"inner": 3}, r"Outer.inner is 3; it must be an object"),
        ({"inner": None}, "Outer.inner is None"),
        ({"many": [{"trunk": {"width": 10**9}}]}, r"Outer.many\[0\].trunk.width is 1000000000"),
        ({"maybe": {"trunk": {"width": 66}}}, "Outer.maybe.trunk: width 66 is not a multiple"),
        ({"many": [[]]}, r"Outer.many\[0\] is \[\]"),
    ):
        with pytest.raises(ValueError, match=says):
            from_dict(Outer, values)
    with pytest.raises(ValueError, match="Outer.inner is {'act': 'gelu'}; it must be a Inner"):
        check_limits(Outer(inner={"act": "gelu"}))


def test_an_annotation_that_says_no_class_is_an_error():
    @dataclass
    class Lost:
        inner: "NobodyKnows" = None  # noqa: F821

    with pytest.raises(ValueError, match="Lost.inner is an object, and nobody knows the class 'NobodyKnows'"):
        from_dict(Lost, {"inner": {"a": 1}})

    @dataclass
    class Either:
        inner: "Inner | TrunkConfig" = None

    with pytest.raises(TypeError, match="may be several configurations"):
        from_dict(Either, {"inner": {}})


def test_a_configuration_registers_itself_from_outside(tmp_path):
    @engine_limits.configuration(
        "toy",
        limits={"width": Range(1, 100)},
        identity=engine_limits.identity_keys("inner.act", width=4),
        misfit=lambda c: "13 is no width" if c.width == 13 else None,
    )
    @dataclass(frozen=True)
    class ToyConfig:
        width: int = 4
        inner: Inner = Inner()

    class Toy(torch.nn.Linear):
        def __init__(self, config):
            super().__init__(config.width, 2)
            self.config = config

    toy = Toy(ToyConfig(5, Inner("silu")))
    save_model(tmp_path, toy, toy.config, seed=3)
    assert json.loads((tmp_path / "config.json").read_text())["kind"] == "toy" == model_kind(tmp_path)
    back, facts = load_model(tmp_path, Toy, ToyConfig)
    assert back.config == toy.config and facts["seed"] == 3 and identity(back) == identity(toy)
    assert engine_identity.canonical(toy.config) == {"toy": {"width": 5, "inner.act": "silu"}}
    assert engine_identity.canonical(ToyConfig()) == {"toy": {"inner.act": "gelu"}}
    for width, says in ((101, "width is 101"), (13, "13 is no width")):
        with pytest.raises(ValueError, match=says):
            check_limits(ToyConfig(width))
    with pytest.raises(ValueError, match="kind 'toy', not 'ar'"):
        load_model(tmp_path, Toy, ARConfig)
    for wrong in ({"limits": {"widht": int}}, {"identity": engine_limits.identity_keys("a.b"), "part": "p"}):
        with pytest.raises(TypeError, match="Inner has no setting"):
            engine_limits.configuration(**wrong)(Inner)


def test_config_json_says_its_kind(tmp_path):
    cases = {
        "vae": (VAE(VAE_SMALL), VAE_SMALL, "vae"),
        "tokenizer": (FlexTok(TOK_SMALL), TOK_SMALL, "flextok"),
        "ar": (ARModel(AR_SMALL), AR_SMALL, "ar"),
        "classifier": (torch.nn.Linear(2, 2), StageConfig(), "classifier"),
    }
    for kind, (model, config, written) in cases.items():
        place = tmp_path / kind
        save_model(place, model, config)
        facts = json.loads((place / "config.json").read_text())
        assert facts["kind"] == written and model_kind(place) == kind
        del facts["kind"]  # a file of before
        (place / "config.json").write_text(json.dumps(facts))
        assert model_kind(place) == kind and load_model(place, lambda c: model, type(config))
    save_model(tmp_path / "mine", torch.nn.Linear(2, 2), StageConfig(), kind="mine")
    assert model_kind(tmp_path / "mine") == "mine" and model_kind(str(tmp_path / "vae")) == "vae"
    for text in (
        "",
        "[]",
        "{}",
        '{"config": 3}',
        '{"config": {}}',
        '{"config": {}, "kind": 3}',
        '{"kind": "ar"}',
    ):
        (tmp_path / "config.json").write_text(text)
        assert model_kind(tmp_path) is None
    assert model_kind(tmp_path / "nowhere") is None
    for folder in sorted((ROOT / "flextok_edu" / "zoo").glob("*/*/")):
        assert model_kind(folder) == {"judge": "reader"}.get(folder.name, folder.name)


HUGE = {
    "tokenizer": (
        ("encoder.depth", 10**9),
        ("decoder.depth", 10**9),
        ("encoder.depth", 1000),
        ("registers", 10**9),
        ("registers", 65536),
        ("latent_size", 10**9),
        ("latent_size", 65536),
        ("time_features", 10**10),
        ("time_features", 65536),
        ("encoder.width", 10**9),
        ("decoder.width", 65536),
        ("latent_channels", 10**9),
        ("latent_channels", 65536),
        ("decoder.mlp_ratio", 1e300),
        ("decoder.mlp_ratio", 256.0),
        ("levels", [2] * 10**5),
        ("levels", [65536] * 5),
        ("encoder.patch", 0),
    ),
    "ar": (
        ("vocabulary", 10**12),
        ("vocabulary", 2**31 - 1),
        ("length", 10**9),
        ("length", 65536),
        ("classes", 10**9),
        ("classes", 2**24),
        ("depth", 10**9),
        ("depth", 1000),
        ("width", 2**40),
        ("width", 65536),
        ("mlp_ratio", 1e300),
    ),
    "vae": (
        ("channels", [10**9, 10**9]),
        ("channels", [65536] * 2),
        ("channels", [4] * 10**6),
        ("layers", 10**9),
        ("layers", 100),
        ("stem", 10**5),
        ("stem", 64),
        ("in_channels", 10**9),
        ("in_channels", 1000),
        ("latent_channels", 10**9),
        ("latent_channels", 65536),
        ("groups", 0),
    ),
}


def changed(folder: Path, place: str, value) -> None:
    facts = json.loads((folder / "config.json").read_text())
    at = facts["config"]
    *path, last = place.split(".")
    for key in path:
        at = at[key]
    at[last] = value
    (folder / "config.json").write_text(json.dumps(facts))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    for name, (cls, config) in MODELS.items():
        save_model(folder / name, cls(config), config)
    return folder


def copy(saved: Path, to: Path, name: str) -> Path:
    (to / name).mkdir()
    for file in (saved / name).iterdir():
        (to / name / file.name).write_bytes(file.read_bytes())
    return to / name


@pytest.mark.parametrize(
    "name, place, value",
    [(name, *case) for name, cases in HUGE.items() for case in cases],
    ids=lambda v: str(v)[:20],
)
def test_sizes_are_not_believed(saved, tmp_path, monkeypatch, name, place, value):
    """Refused before anything of that size is allocated: no model is built off the meta device, and little
    memory is taken.
    """
    folder, (cls, config) = copy(saved, tmp_path, name), MODELS[name]
    changed(folder, place, value)
    real = []

    def build(c):
        with torch.device(torch.get_default_device()):
            real.append(torch.empty(0).device.type != "meta")
            return cls(c)

    load_model(saved / name, build, type(config))
    assert real == [False, True], "first without memory, then with"
    real.clear()
    tracemalloc.start()
    try:
        with pytest.raises(ValueError):
            load_model(folder, build, type(config))
        assert tracemalloc.get_traced_memory()[1] < 30e6
    finally:
        tracemalloc.stop()
    assert not any(real)
    with pytest.raises(ValueError):
        cls.from_pretrained(folder)


@pytest.mark.parametrize("value", (5e-324, 1e-300, 0, -1.0, float("inf"), "1"))
def test_times_stay_finite(saved, tmp_path, value):
    folder = copy(saved, tmp_path, "tokenizer")
    changed(folder, "max_timestep", value)
    with pytest.raises(ValueError, match="TokenizerConfig.max_timestep is"):
        load_tokenizer(folder)
    for edge in (1e-6, 1e6):
        tok = FlexTok(replace(TOK_SMALL, max_timestep=edge)).eval()
        assert torch.isfinite(tok.decode_latents(torch.zeros(1, 8, dtype=torch.int64), steps=2)).all()


@pytest.mark.parametrize(
    "kind, values, says",
    (
        (TrunkConfig, {"width": 65}, "width 65 is not a multiple of head_dim 64"),
        (TrunkConfig, {"width": 6, "head_dim": 3}, "width 6 is not divisible by 4"),
        (VAEConfig, {"groups": 3}, "groups 3 does not divide channels 128"),
        (TokenizerConfig, {"latent_size": 31}, "latent_size 31 is not a multiple of patch 2"),
        (TokenizerConfig, {"time_features": 3}, "time_features 3 is odd"),
        (TokenizerConfig, {"levels": [8, 1]}, "levels is .*each 2 or more"),
        (TokenizerConfig, {"levels": []}, "levels"),
        (TokenizerConfig, {"levels": 8}, "levels is 8"),
        (TokenizerConfig, {"encoder": 3}, "TokenizerConfig.encoder is 3; it must be an object"),
        (TokenizerConfig, {"encoder": {"depth": True}}, "TokenizerConfig.encoder.depth is True"),
        (TokenizerConfig, {"encoder_mask": "none"}, "'causal_last' or 'causal' or 'full'"),
        (TokenizerConfig, {"modulations": True}, "modulations is True; it must be 1 or 2"),
        (StageConfig, {"lr": "1e-3"}, "lr is '1e-3'; it must be a number in"),
        (StageConfig, {"optimizer": "sgd"}, "'adamw' or 'muon'"),
        (Preset, {"name": "x", "vae": None}, "Preset.vae is None"),
        (Preset, {}, "Preset needs the setting 'name'"),
        (Preset, [], "it must be an object"),
        (ARConfig, {"dept": 2}, "ARConfig has no setting 'dept'"),
    ),
)
def test_settings_that_cannot_be(kind, values, says):
    with pytest.raises(ValueError, match=says):
        from_dict(kind, values)


def test_looking_first_costs_little():
    """Shapes are found without PyTorch's compiler and sympy: they would take longer to load than a small
    model.
    """
    code = (
        "import sys\nfrom flextok_edu.tokenizer import FlexTok\nfrom flextok_edu.ar import ARModel\nfrom "
        "flextok_edu.data.features import AttributeClassifier\n"
        "for kind in (FlexTok, ARModel, AttributeClassifier): kind.from_pretrained('tiny')\nprint([m for m "
        "in ('sympy', 'torch._dynamo') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert result.returncode == 0 and result.stdout.strip() == "[]", (result.stdout, result.stderr[-1000:])


@pytest.mark.parametrize("name", MODELS)
def test_shapes_on_meta_are_the_real_ones(name):
    for cls, config in (
        MODELS[name],
        {
            "vae": (VAE, PRESETS["tiny"].vae),
            "tokenizer": (FlexTok, PRESETS["micro"].tokenizer),
            "ar": (ARModel, PRESETS["micro"].ar),
        }[name],
    ):
        real, shapes = cls(config).state_dict(), engine_models.on_meta(cls, config, "x").state_dict()
        assert {n: (w.shape, w.is_floating_point()) for n, w in real.items()} == {
            n: (w.shape, w.is_floating_point()) for n, w in shapes.items()
        }
        assert all(w.is_meta for w in shapes.values())


# --- what is wrong with the two files ----------------------------------------------------------------------

CONFIGS = {
    "a list": [],
    "nothing": None,
    "no weights": {"config": {}},
    "a number for the hash": {"config": {}, "weights": 3},
    "a list of settings": {"config": [], "weights": "a"},
    "classes that are none": {"config": {}, "weights": "a", "classes": [1]},
    "terms that are none": {"config": {}, "weights": "a", "terms": 5},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_a_configuration_of_another_shape(saved, tmp_path, name):
    folder = copy(saved, tmp_path, "tokenizer")
    write_text(folder / "config.json", json.dumps(CONFIGS[name]))
    with pytest.raises(ValueError, match="config.json"):
        load_tokenizer(folder)


def test_weights_that_are_none(saved, tmp_path):
    folder, file = copy(saved, tmp_path, "ar"), tmp_path / "ar" / "model.safetensors"
    whole = file.read_bytes()
    for content, says in (
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 5\n",
            "git-lfs pointer, not the file: git lfs pull",
        ),
        (b"PK\3\4", "is a pickle"),
        (b"", "damaged"),
        (whole[:-5], "damaged"),
        ((2**60).to_bytes(8, "little") + whole[8:], "damaged"),
    ):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=says):
            load_ar(folder)
    state = {n: w.clone() for n, w in ARModel(AR_SMALL).state_dict().items()}
    for change, says in (
        (dict(start=torch.zeros(65)), r"'start' has shape \(65,\), but the configuration says \(64,\)"),
        (dict(start=torch.zeros(64, dtype=torch.int64)), "'start' holds int64, not real numbers"),
        (dict(more=torch.zeros(1)), "surplus tensors 'more'"),
    ):
        save_file(state | change, file)
        with pytest.raises(ValueError, match="do not fit the model that config.json describes: .*" + says):
            load_ar(folder)
    save_file({n: w for n, w in state.items() if n != "start"}, file)
    with pytest.raises(ValueError, match="missing tensors 'start'"):
        load_ar(folder)


# --- identity ----------------------------------------------------------------------------------------------

PINNED = {
    "tiny": ("7ce56d2736c72642", "c809aa9106366039", "c7c90ad88fe10165"),
    "clipart": ("fea0e60188b242de", "f4dd89c4f9322cdd", "070ec5bff23541c0"),
}


@pytest.mark.parametrize("name", PINNED)
def test_identities_of_what_is_shipped(name):
    """They never change: caches, ids and AR models are bound by them."""
    tok = FlexTok.from_pretrained(name)
    assert (tokenizer_hash(tok), tokenizer_identity(tok), identity(tok.vae)) == PINNED[name]
    text = json.dumps(
        {"weights": weights_hash(tok)}
        | engine_identity.canonical(tok.config)
        | engine_identity.canonical(tok.vae.config),
        sort_keys=True,
        separators=(",", ":"),
    )
    assert text == (
        '{"tokenizer":{"decoder.head_dim":64,"decoder.patch":2,"encoder.head_dim":64,"encoder.patch":2,"latent_channels":4,'
        '"latent_size":8,"levels":[8,5,5,5],"registers":32},'
        '"vae":{"channels":[48,96],"groups":8,"in_channels":3,"latent_channels":4,"stem":4},"weights":"'
        + PINNED[name][0]
        + '"}'
    )


def test_identity_says_what_weights_mean():
    def one(vae=VAE_SMALL, **changes):
        torch.manual_seed(0)
        return FlexTok(replace(TOK_SMALL, **changes), VAE(vae))

    first = one()
    for other in (
        one(levels=(5, 8, 5, 5)),
        one(encoder=replace(TOK_SMALL.encoder, head_dim=32)),
        one(encoder_mask="causal"),
        one(max_timestep=2.0),
        one(vae=replace(VAE_SMALL, groups=8)),
    ):
        assert weights_hash(first) == weights_hash(other) and identity(first) != identity(other)
    for same in (
        one(
            budget_distribution="uniform",
            null_probability=0.3,
            time_distribution="uniform",
            sample_posterior=False,
            zero_noise=0.5,
            mode_scale=0.5,
        ),
        one(max_timestep=1),
    ):  # how it is trained
        assert identity(first) == identity(same)
    assert identity(ARModel(AR_SMALL)) != identity(ARModel(AR_SMALL)), "other weights"


def test_renaming_a_setting_and_adding_one_keep_identities():
    """`levels` is called `digits` one day, and `register_kind` is new: the frozen list says where the old
    name is found, and what is neutral stays unsaid.
    """
    old = FlexTok(TOK_SMALL)
    settings = engine_limits.configuration_of(TokenizerConfig).identity

    @dataclass
    class Renamed:
        digits: tuple = TOK_SMALL.levels
        register_kind: str = "one"

        def __getattr__(self, key):
            if key == "levels":
                raise AttributeError(key)
            return getattr(TOK_SMALL, key)

    before = identity(old)
    Renamed.__configuration__ = engine_limits.ConfigurationFacts(
        part="tokenizer",
        identity=settings
        | {"levels": ("digits", settings["levels"][1]), "register_kind": ("register_kind", "one")},
    )
    old.config = Renamed()
    assert identity(old) == before
    old.config.register_kind = "two"
    assert identity(old) != before


def test_the_frozen_list():
    """Whoever changes this list changes the names of everything that was ever made.

    Add to it (with the value that changes nothing); never take away.
    """
    says = {
        kind.__name__: (
            facts.part,
            {key: place for key, (place, _) in facts.identity.items()},
            {key: v for key, (_, v) in facts.identity.items() if v is not engine_limits.ALWAYS},
        )
        for kind in CLASSES
        if (facts := engine_limits.configuration_of(kind)).identity is not None
    }

    def same(*keys):
        return {key: key for key in keys}

    assert says == {
        "VAEConfig": (
            "vae",
            same("in_channels", "latent_channels", "channels", "stem", "groups", "attention"),
            {"stem": 1, "attention": True},
        ),
        "TokenizerConfig": (
            "tokenizer",
            same(
                "latent_channels",
                "latent_size",
                "registers",
                "levels",
                "encoder.patch",
                "encoder.head_dim",
                "decoder.patch",
                "decoder.head_dim",
                "encoder_mask",
                "max_timestep",
                "modulations",
            ),
            {"encoder_mask": "causal_last", "max_timestep": 1.0, "modulations": 2},
        ),
        "ARConfig": (
            "ar",
            same("classes", "head_dim", "null", "text", "style"),
            {"null": None, "text": None, "style": None},  # what it had before they were there
        ),
    }


def test_ar_models_know_their_tokenizer(tmp_path):
    torch.manual_seed(0)
    tok, model = FlexTok(TOK_SMALL, VAE(VAE_SMALL)), ARModel(AR_SMALL)
    torch.manual_seed(0)
    permuted = FlexTok(replace(TOK_SMALL, levels=(5, 8, 5, 5)), VAE(VAE_SMALL))
    bind_tokenizer(model, tok)
    assert (model.tokenizer, model.tokenizer_identity) == (tokenizer_hash(tok), tokenizer_identity(tok))
    save_ar(tmp_path / "new", model)
    assert load_ar(tmp_path / "new", tok)[0].tokenizer_identity == tokenizer_identity(tok)
    with pytest.raises(ValueError, match="not the configuration"):
        load_ar(tmp_path / "new", permuted)
    save_ar(tmp_path / "alone", model)  # with the name alone
    facts = json.loads((tmp_path / "alone" / "config.json").read_text())
    del facts["tokenizer_means"]
    (tmp_path / "alone" / "config.json").write_text(json.dumps(facts))
    assert load_ar(tmp_path / "alone", tok)[0].tokenizer_identity == tokenizer_identity(tok)
    with pytest.raises(ValueError, match="not the configuration"):
        load_ar(tmp_path / "alone", permuted)
    facts = json.loads((tmp_path / "new" / "config.json").read_text())
    del facts["tokenizer_identity"], facts["tokenizer_means"]  # as it was written before
    (tmp_path / "new" / "config.json").write_text(json.dumps(facts))
    old, _ = load_ar(tmp_path / "new", tok)
    assert old.tokenizer_identity is None and old.tokenizer == tokenizer_hash(tok)
    with pytest.raises(ValueError, match="writes ids of tokenizer"):
        check_tokenizer(old, FlexTok(TOK_SMALL, VAE(VAE_SMALL)))
    torch.manual_seed(0)
    fewer = FlexTok(replace(TOK_SMALL, levels=(8, 5, 5, 4)), VAE(VAE_SMALL))
    assert weights_hash(fewer) == old.tokenizer
    with pytest.raises(ValueError, match="8 tokens out of 1000, and this tokenizer has 8 out of 800"):
        check_tokenizer(old, fewer)
    model.tokenizer = "0" * 16  # said by hand: what was known before is forgotten
    assert model.tokenizer_identity is None


def test_packed_models_keep_what_their_partners_mean(tmp_path):
    """Rounded weights have another hash, and are told so; what they mean stays, and so the new identity is
    known.
    """
    torch.manual_seed(0)
    tok, model = FlexTok(TOK_SMALL, VAE(VAE_SMALL)), ARModel(AR_SMALL)
    bind_tokenizer(model, tok)
    save_ar(tmp_path / "a", model)
    with torch.no_grad():
        for w in tok.parameters():
            w.copy_(w.half().float())
    facts = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps(facts | {"tokenizer": tokenizer_hash(tok)}))
    assert load_ar(tmp_path / "a", tok)[0].tokenizer_identity == tokenizer_identity(tok)


def test_tokenizers_know_their_vae(tmp_path):
    torch.manual_seed(0)
    tok = FlexTok(TOK_SMALL, VAE(VAE_SMALL))
    other = VAE(replace(VAE_SMALL, groups=8))
    other.load_state_dict(tok.vae.state_dict())
    save_tokenizer(tmp_path, tok)
    assert load_tokenizer(tmp_path, tok.vae)[0].vae is tok.vae
    with pytest.raises(ValueError, match="has its weights, but not its configuration"):
        load_tokenizer(tmp_path, other)
    facts = json.loads((tmp_path / "config.json").read_text())
    del facts["vae_means"]  # as it was written before
    (tmp_path / "config.json").write_text(json.dumps(facts))
    load_tokenizer(tmp_path, tok.vae)


# --- names and files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, shown",
    (
        ("Äpfel 中 $5", "Äpfel 中 $5"),
        ("a\x1b[31mb", r"a\x1b[31mb"),
        ("caf\udce9", r"caf\xe9"),
        ("\ud800", r"\ud800"),
        ("a\nb\tc\0", r"a\x0ab\x09c\x00"),
        ("abc\u202ecod", r"abc\u202ecod"),
        ("\U000e0001", r"\U000e0001"),
        (Path("x"), "x"),
    ),
)
def test_plain(text, shown):
    assert plain(text) == shown
    shown.encode("utf-8")


def test_drawable_names_can_be_drawn(tmp_path):
    import warnings

    import matplotlib.pyplot as plt

    assert (
        drawable("Äpfel α $5_to_$10") == "Äpfel α $5_to_$10"
        and drawable("中 \U00020bb7 caf\udce9") == r"\u4e2d \U00020bb7 caf\xe9"
    )
    figure, axes = plt.subplots()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of glyphs that it does not have
        axes.set_title(drawable("$5_to_$10 中 \x1b[31m \udce9"), parse_math=False)
        figure.savefig(tmp_path / "x.png")
    plt.close(figure)


def test_titles_are_no_mathematics():
    import matplotlib.pyplot as plt

    engine_figures.plot_log(
        [{"step": 0, "loss": 1.0}, {"step": 1, "loss": 0.5}], title="$5_to_$10 \x1b"
    ).figure.canvas.draw()
    engine_tensors.show(torch.zeros(1, 3, 4, 4), title="$5_to_$10")
    plt.close("all")


def test_terms_of_a_stranger_are_text():
    model = VAE(VAE_SMALL)
    model.terms = "<script>alert(1)</script>\x1b[2J"
    card = str(model.generate_model_card())
    assert "<script>" not in card and "&lt;script&gt;" in card and "\x1b" not in card


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
@pytest.mark.parametrize("mask", (0o022, 0o077, 0o002))
def test_atomic_honours_the_umask_and_keeps_modes(tmp_path, mask):
    old = os.umask(mask)
    try:
        write_text(tmp_path / "new", "a")
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o666 & ~mask
        for mode in (0o600, 0o640, 0o666):
            os.chmod(tmp_path / "new", mode)
            write_text(tmp_path / "new", "b")
            assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == mode
    finally:
        os.umask(old)


@pytest.mark.parametrize("name", ("a" * 255, "é" * 127, "a" * 250 + ".json", "x." + "y" * 253))
def test_atomic_takes_the_longest_names(tmp_path, name):
    write_text(tmp_path / name, "a")
    assert [f.name for f in tmp_path.iterdir()] == [name]


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    with pytest.raises(OSError, match=re.escape(str(tmp_path / "x"))):
        with atomic(tmp_path / "x"):
            raise OSError(28, "No space left on device")
    import safetensors.torch

    def full(*args, **options):
        raise safetensors.SafetensorError(
            'Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "No space left on '
            'device" })'
        )

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(OSError, match="model.safetensors could not be written: .*No space left"):
        save_model(tmp_path / "m", nn.Linear(2, 2), AR_SMALL)
    assert not list((tmp_path / "m").iterdir())


def test_constraints_agree():
    """What constraints.txt asks for is what was tested with everything else."""
    pins = {
        name: dict(
            line.split("==")
            for line in (ROOT / name).read_text().splitlines()
            if line and not line.startswith("#")
        )
        for name in ("constraints.txt", "constraints-all.txt")
    }
    few, all_of_them = ({k.lower().replace("_", "-"): v for k, v in pins[name].items()} for name in pins)
    missing = {k for k in few if k not in all_of_them and k not in ("torch", "torchvision")}
    assert not missing and all(all_of_them.get(k, v) == v for k, v in few.items()) and len(all_of_them) > 100


def test_settings_keep_their_old_names():
    """Configurations lie in files for years: what was called a law is a distribution today."""
    from flextok_edu.apps.options import override

    old = json.loads(to_json(preset("tiny").tokenizer))
    old = {
        {"budget_distribution": "dropout_law", "time_distribution": "time_law"}.get(k, k): v
        for k, v in old.items()
    }
    assert "dropout_law" in old and from_dict(TokenizerConfig, old) == preset("tiny").tokenizer
    changed = override(
        preset("tiny"), {"tokenizer.dropout_law": "uniform", "tokenizer.time_law": "uniform"}
    ).tokenizer
    assert (changed.budget_distribution, changed.time_distribution) == ("uniform", "uniform")
