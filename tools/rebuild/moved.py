"""Names that the seams moved to another module, and train functions with new arguments: users follow."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MOVED = {
    "vae": {
        "train_vae": "vae_training",
        "PosteriorLoader": "vae_training",
        "VAEParts": "vae",
        "AutoencoderLoss": "vae",
    },
    "tokenizer": {
        **dict.fromkeys(
            "fit_tokenizer train_tokenizer latent_batches Latents cache_latents TokenizerLoader _lengths".split(),
            "training",
        ),
        **dict.fromkeys("TrainingNoise REPA feature_map".split(), "objective"),
        **dict.fromkeys("GuidedVelocity runs_together".split(), "short_cuts"),
        **dict.fromkeys("Encoder Decoder Condition".split(), "networks"),
    },
    "ar": {
        **dict.fromkeys(
            "Tokens token_batches train_ar tokenize_all position_losses unigram_entropies".split(),
            "ar_training",
        ),
        **dict.fromkeys("token_uniforms filter_top_k_top_p sample_token guidance_at".split(), "sampling"),
    },
}
RENAMED = {
    ("ar", "guidance_at"): "guidance_per_token",
    ("vae", "VAEParts"): "VAE",
    ("vae", "AutoencoderLoss"): "VAELoss",
}
FROM = re.compile(
    r"(?P<lead>^[ \t]*)?from flextok_edu\.(?P<old>\w+) import (?P<names>\([^)]*\)|\w[\w ,]*\w|\w)", re.M
)


def imports(text: str) -> str:
    def new(found: re.Match) -> str:
        old = found["old"]
        if old not in MOVED:
            return found[0]
        groups: dict[str, list[str]] = {}
        for item in re.sub(r"#[^\n]*", "", found["names"].strip("()")).split(","):
            if item := item.strip():
                name = item.split(" as ")[0].strip()
                other = RENAMED.get((old, name), name)
                item = item.replace(name, other, 1)
                if item not in groups.setdefault(MOVED[old].get(name, old), []):
                    groups[MOVED[old].get(name, old)].append(item)
        if list(groups) == [old]:
            return found[0]
        lead = found["lead"]
        joint = "; " if lead is None else "\n" + lead
        return (lead or "") + joint.join(
            f"from flextok_edu.{m} import {', '.join(n)}" for m, n in groups.items()
        )

    text = FROM.sub(new, text)
    for old, names in MOVED.items():  # tokenizer.fit_tokenizer, patch(monkeypatch, tokenizer, "fit_tokenizer"
        for name, module in names.items():
            other = RENAMED.get((old, name), name)
            for pattern, put in (
                (rf"(?<![\w.\"]){old}\.{name}\b", f"{module}.{other}"),
                (rf"(patch\(\s*\w+,\s*){old},(\s*)\"{name}\"", rf'\g<1>{module},\g<2>"{other}"'),
            ):
                if re.search(pattern, text) and re.search(rf"import flextok_edu\.{old} as {old}\b", text):
                    text = re.sub(pattern, put, text)
                    if module != old and f"import flextok_edu.{module} as {module}" not in text:
                        text = re.sub(
                            rf"^([ \t]*)(import flextok_edu\.{old} as {old})$",
                            rf"\1\2\n\1import flextok_edu.{module} as {module}",
                            text,
                            count=1,
                            flags=re.M,
                        )
    return text


def main() -> None:
    for name in sys.argv[1:]:
        path = Path(name)
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".ipynb":
            book = json.loads(text)
            for c in book["cells"]:
                if c["cell_type"] == "code":
                    c["source"] = imports("".join(c["source"])).splitlines(keepends=True)
            new = json.dumps(book, indent=1, ensure_ascii=False) + "\n"
        else:
            new = imports(text)
        if new != text:
            path.write_text(new, encoding="utf-8")
            print(name)


if __name__ == "__main__":
    main()
