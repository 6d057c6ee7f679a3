"""FlexTok, from pixels to coarse-to-fine tokens and back.

The names that most programs need can be imported from here: `from flextok_edu import FlexTok, ARModel, show`.
They are looked up when they are asked for, so that a command starts without what it may not need.
"""

from importlib import import_module as _import_module

__version__ = "0.1.0"

_PLACES = {  # module: names
    "engine.config": "PRESETS Preset preset",
    "engine.settings": "VAEConfig TrunkConfig TokenizerConfig ARConfig TextConfig StageConfig EvalConfig",
    "engine.limits": "configuration",
    "engine.runtime": "Runtime",
    "engine.tokenizers": "Tokenizer load_any_tokenizer register_tokenizer tokenizer_from_pretrained",
    "engine.tensors": "from_uint8 grid noise_like pick_device seed_everything show to_uint8",
    "engine.hub": "shipped_models",
    "data.scenes": "COLOUR_NAMES KINDS LIGHT_NAMES PLACE_NAMES Scene ToyScenes draw",
    "data.datasets": "ImageSet load_data",
    "data.opening": "open_source",
    "data.registry": "SourceKind register_source",
    "data.features": "AttributeClassifier Lite0",
    "data.extractors": "extractor",
    "vae": "VAE",
    "flow": "SOLVERS SamplingConfig",
    "fsq": "FSQ",
    "vae_training": "train_vae",
    "objective": "REPA FlowObjective",
    "training": "fit_tokenizer train_tokenizer",
    "ar_training": "train_ar",
    "tokenizer": "FlexTok load_tokenizer save_tokenizer",
    "systems.titok": "TiTok",
    "systems.tail_drop": "TailDrop",
    "systems.grid": "Grid",
    "systems.pixels": "Pixels",
    "ar": "ARModel load_ar sample_images save_ar",
    "text": "Captioned read_texts",
    "data.text_encoders": "text_encoder",
    "data.captions": "captions_of",
    "evaluation.search": "search",
    "evaluation.growing": "grow until_still",
    "evaluation.metrics": "Metric register_metric",
    "evaluation.budgets": "Quality SearchBudget",
    "evaluation.budget_heads": "BudgetHead PredictedBudget",
    "evaluation.evaluate": "evaluate_tokenizer",
    "evaluation.report": "Report load_report plot_report",
    "evaluation.compare": "compare",
    "io.cache": "LatentCache TokenCache",
    "io.build": "cache_latents_to cache_tokens_to",
    "io.released": "load_flextok load_vae",
    "io.export": "save_released",
    "io.released_ar": "load_released_ar",
    "io.ar_export": "save_released_ar",
    "io.ftok": "decode_ftok read_ftok write_ftok",
    "apps.run_config": "RunConfig",
    "apps.run": "run",
}
_MODULES = {name: module for module, names in _PLACES.items() for name in names.split()}


def _door(places: dict[str, str], module: str):  # {name: module}; the module that has the door
    """A module's `__getattr__` that looks names up where they live."""

    def __getattr__(name: str):
        if name not in places:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        return getattr(_import_module(f"{__name__}.{places[name]}"), name)

    return __getattr__


__getattr__ = _door(_MODULES, __name__)
__all__ = sorted(_MODULES)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
