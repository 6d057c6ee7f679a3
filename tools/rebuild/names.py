"""The field's words for home-made ones, as of commit daa1184, whose rename.py applied this table.

Somebody's program has a name that is gone? Here is what it is called now.

NAMES: {module: {old: new}} for what a module defines; its users follow.
ATTRIBUTES: methods and fields, renamed wherever they stand behind a dot, are defined or are passed by keyword.
LOCAL: {words: modules} for variables, arguments and fields of some notebooks.
"""

NAMES = {
    # words of DESIGN.md
    "engine.trainer": {"Player": "Objective"},
    "engine.monitor": {"Watch": "Diagnostics"},
    "engine.loader": {"Deal": "BatchSampler", "Feed": "Loader"},
    "data.reading": {
        "SourceFeed": "SourceLoader",
        "_scan": "scan",
        "_decode": "decode_quietly",
        "_read": "_square_of",
    },
    "data.streams": {"StreamFeed": "StreamLoader"},
    "vae": {"PosteriorFeed": "PosteriorLoader"},
    "tokenizer": {"TokenizerFeed": "TokenizerLoader", "Draws": "TrainingNoise"},
    "registers": {"LAWS": "BUDGET_DISTRIBUTIONS"},
    "flow": {"TIME_LAWS": "TIME_DISTRIBUTIONS"},
    "fsq": {"CodeUse": "CodebookUsage"},
    "data.extractors": {
        "OtherEyes": "DownloadedExtractor",
        "OTHER_EYES": "DOWNLOADED",
        "_transformer_eyes": "_transformer",
    },
    "data.scenes": {"HEADS": "ATTRIBUTES", "_HABITS": "_PREFERENCES"},
    "evaluation.metrics": {"Judge": "Reference"},
    "evaluation.evaluate": {"ReaderEyes": "ClassifierFeatures"},
    "apps.job": {"Job": "RunContext", "_plain": "as_json", "_unequal": "differences"},
    "apps.models": {
        "habits": "sampling_defaults",
        "made_with": "training_preset",
        "_find": "find_model",
        "_made_beside": "preset_beside",
    },
    "apps.pace": {"throwaway": "dummy_stages", "Pace": "StepProfile", "_with_steps": "with_steps"},
    "ar": {
        "choose": "sample_token",
        "keep_likely": "filter_top_k_top_p",
        "token_chances": "token_uniforms",
    },
    "engine.models": {"belongs": "was_trained_with"},
    # names that several modules use are public
    "engine.checks": {"_fits": "fits", "_no_pointer": "refuse_pointer"},
    "engine.text": {"_lines": "drawable_lines"},
    "engine.checkpoint": {"_like": "placed_like", "_whole": "gathered", "_not_finite": "first_not_finite"},
    "engine.resume": {"_Restoring": "Restoring", "_said": "settings_text", "_changed": "changed_recipe"},
    "engine.claims": {"_claims": "claims"},
    "data.shapes": {"_PARTS": "SHAPES"},
    "data.folders": {
        "_walk": "walk",
        "_passed_over": "passed_over",
        "_is_picture": "is_picture",
        "_read_all": "read_all",
        "_VAL": "VAL_NAMES",
        "_TRAIN": "TRAIN_NAMES",
        "told": "list_reasons",
    },
    "data.sets": {"_ROOT": "CACHE_ROOT"},
    "data.sources": {
        "_Strings": "SharedStrings",
        "_caption": "caption_of",
        "_LONGEST": "LONGEST_TEXT",
        "_OWN": "OWN_SPLIT",
        "_said": "caption_in",
        "_TOO_MANY": "HASHED_AT_MOST",
    },
    "data.set_sources": {"_columns": "find_columns", "_example": "row_item"},
    "data.learned": {"_hash_keys": "hash_keys"},
    "data.decoding": {"_memory": "machine_memory"},
    "engine.shards": {"_FORMAT": "SHARD_FORMAT"},
    "io.cache_facts": {
        "_refuse": "refuse_other",
        "_check_shard": "check_shard",
        "_ABOUT": "BESIDE_ROWS",
        "_odd_labels": "odd_labels",
        "_CACHE": "CACHE_SHAPE",
    },
    "io.grammar": {
        "_Side": "Side",
        "_part": "read_part",
        "_LAWS": "RELEASED_DISTRIBUTIONS",
        "_RULES": "RULES",
        "_TURN": "RESHAPES",
    },
    "io.layout": {"_equal": "check_equal", "_read": "read_description"},
    "io.tables": {"_check_tables": "check_tables"},
    "io.released": {"_vae_names": "vae_names"},
    "apps.training": {
        "_to_go_on_with": "model_to_go_on_with",
        "_fits": "check_latents_fit",
        "_cache_folder": "cache_folder",
        "_material": "training_material",
        "_classes_agree": "check_classes",
        "_begin": "begin_folder",
        "_begun_from": "begun_from",
    },
    "apps.cost": {"_hidden": "swiglu_width"},
    "apps.timing": {"_memory": "peak_of", "_row": "bench_row"},
    "apps.card": {"_open": "open_part", "_read": "open_parts", "_known": "known", "_stage": "read_stage"},
    "apps.page": {"_rows": "picture_rows"},
}
ATTRIBUTES = {
    "players": "objectives",
    "places": "positions",
    "dealt": "shard",
    "parts": "micro_batches",  # of loaders and engines: only where it is called or defined
}
LOCAL = {  # module or file: {old: new}; "*": everywhere
    "*": {
        "player": "objective",
        "players": "objectives",
        "eyes": "feature_extractor",
        "judge": "reference",
        "law": "distribution",
        "dropout_law": "budget_distribution",
        "time_law": "time_distribution",
    },
    "tokenizer": {"told": "cond", "nothing": "uncond", "places": "positions"},
    "test_short_cuts": {"told": "cond", "nothing": "uncond"},
    **{
        name: {"places": "positions"}
        for name in (
            "engine.loader data.reading data.streams vae ar apps.bench_training test_train_speed test_scale test_train "
            "test_cache test_sources 10_training training_speed engine.trainer build test_fuzz_training"
        ).split()
    },
}
PHRASES = [
    (r"\ba player\b", "an objective"),
    (r"\bA player\b", "An objective"),
    (r"\ba \*\*player\*\*", "an **objective**"),
    (r"\bplayers\b", "objectives"),
    (r"\bplayer\b", "objective"),
    (r"\bPlayers\b", "Objectives"),
    (r"\bdropout law", "budget distribution"),
    (r"\ba law\b", "a distribution"),
    (r"(?<![-\"'])\blaws\b(?![\"'])", "distributions"),
    (r"(?<![-\"'])\blaw\b(?![\"'])", "distribution"),
    (r"\bdropout_law\b", "budget_distribution"),
    (r"\btime_law\b", "time_distribution"),
]
ROOMS = {
    "00": "engine",
    "01": "scenes",
    "01b": "sources",
    "02": "features",
    "03": "vae",
    "04": "fsq",
    "05": "transformer",
    "06": "registers",
    "07": "flow",
    "08": "tokenizer",
    "09": "ar",
    "10": "evaluation",
    "11": "training",
    "11b": "caches",
    "13": "released",
    "15": "run",
    "15b": "commands",
    "16": "cost",
    "17": "zoo",
}
