"""Where every definition went: {new module: {old module: names}}, as of commit 6b8e8e1, whose move.py read this.

Names are those of before; names.py has what they are called now.
"""

WHERE = {
    "engine.config": {
        "core": "VAEConfig TrunkConfig TokenizerConfig ARConfig AR_SIZES StageConfig VAELossConfig EvalConfig Preset _paper PRESETS preset"
    },
    "engine.checks": {
        "core": "_POINTER _no_pointer _deep parse_json read_json Range one_of _TYPES wanted _fits conform"
    },
    "engine.limits": {
        "core": "_COUNT _SHARE _WEIGHT _CHANNELS _STEPS _levels _widths _TRUNK LIMITS _NESTED _apart check_limits to_json from_dict _build"
    },
    "engine.text": {"core": "plain _glyphs drawable _lines"},
    "engine.tensors": {
        "core": "pick_device seed_everything to_uint8 from_uint8 grid show named_generator noise_like"
    },
    "engine.files": {
        "core": "_temporary atomic write_text weights_hash _opened _DTYPES tensor_header read_tensors fit_header"
    },
    "engine.identity": {"core": "_ALWAYS IDENTITY canonical meaning identity_of identity"},
    "engine.models": {
        "core": "save_model _blocks _ELEMENTWISE _ShapesOnly on_meta _hash _FACTS _check_fit load_model belongs"
    },
    "engine.hub": {"core": "shipped_models hub_folder Pretrained"},
    "engine.optim": {"core": "EMA schedule orthogonalise _with_bfloat16 Muon make_optimizers"},
    "engine.loader": {"core": "Deal Feed"},
    "engine.trainer": {"core": "Player Engine _Tally fit plot_log"},
    "engine.compiler": {"core": "_compiler compiler_works compiled"},
    "engine.checkpoint": {
        "train": "_content _not_finite _read_checkpoint Checkpoints _whole _like optimizer_state set_optimizer_state random_state set_random_state"
    },
    "engine.claims": {
        "train": "lock_byte _CLAIM _CLAIMED_BYTE _NO_LOCKS _holder _describe _locked Claim _claims claimed"
    },
    "engine.monitor": {"train": "matmul_rate peak_memory Watch"},
    "engine.distributed": {"train": "_Turn _blocks _quiet _Spread _divided _alike Shares recomputed"},
    "engine.resume": {
        "train": "_Remembering _changed _differences _said changes_of _COUNTED _FACTS _SCALER _MOMENTS _unlike _odd_moments _Agreeing _Restoring"
    },
    "engine.long_run": {"train": "_Measuring Stopped _tensors _Listening _Beginning LongRun"},
    "engine.shards": {
        "cache": "DamagedShard _FORMAT _KEY _BYTES _TENSOR shard_path write_shard _extent read_header check_content Claims"
    },
    "engine.marks": {
        "evaluate": "MARK save_picture _marked_png _MARKS is_ours may_replace may_fill any_terminal"
    },
    "data.shapes": {"data": "_ellipse _box _poly _star _PARTS"},
    "data.scenes": {
        "data": "COLOURS PLACES LIGHTS _WORDS _FIXED _HABITS KINDS COLOUR_NAMES PLACE_NAMES LIGHT_NAMES Thing Scene _GRID _EXTENT _RELATIONS describe _UNIT _paint _texture draw HEADS SceneItem ToyScenes"
    },
    "data.decoding": {
        "data": "_HEIF PICTURES _BAND _grey_scale _grey _TURNS _upright _flat to_rgb fit_square FORMATS LARGEST _THIN _MANY _reduced cut_square _BUDGET _MOST _SMALL _SCANNED _BESIDE _scans _MARKER _whole _need _trim _Share _share _register_heif read_square _memory check_memory decode_square"
    },
    "data.folders": {
        "data": "SETS PASSED_OVER _NOPICTURES _is_picture _read_all read_squares FolderImages evenly _walk image_files _magic _passed_over _TRAIN _VAL split_folders FolderList _listed list_folder class_labels told read_folder"
    },
    "data.sets": {
        "data": "_IMAGENETTE _ROOT _open_set _array_set _wnid_names _wnid_files _imagenette find_set"
    },
    "data.keys": {
        "data": "picture_key held_out _KEPT keys_folder load_keys save_keys _file_keys picture_keys"
    },
    "data.datasets": {
        "data": "ImageSet spread batches _Side _read_side _keys _first _two_sides _some _divide _own _load_set _load_folder no_random_access load_data"
    },
    "data.learned": {
        "data": "Learned _hash_keys learned_from save_learned load_learned _set_part _by_rule leave_out_learned"
    },
    "data.sources": {
        "sources": "Unreadable Item _OWN _TOO_MANY Source _read_bytes _head _Strings _LONGEST _said _caption FolderSource"
    },
    "data.tar": {
        "sources": "_IMAGES _choices expand_braces _label _INDEX _Headers index_shard _shard_files _kept_name _kept_index _sound _numbered TarSource"
    },
    "data.reading": {
        "sources": "decode _decode Survey _read _Squares _scan survey _Reader _stack _Plan _Maker SourceFeed reading_rate"
    },
    "data.set_sources": {
        "sources": "SetSource _picture ObjectSource _LABELS _CAPTIONS _columns _local _example HubSource"
    },
    "data.streams": {"sources": "StreamSource _Blocks _decoded _FrontToBack StreamFeed"},
    "data.opening": {
        "sources": "Part split_source _read_rows as_image_set OnDisk _hub _hub_source open_source"
    },
    "data.features": {
        "features": "_LITE0_SHA256 _lite0 Lite0 perceptual_distance AttributeClassifier train_classifier read_accuracy"
    },
    "data.extractors": {"features": "OTHER_EYES PINS OtherEyes _inception _transformer_eyes extractor"},
    "evaluation.metrics": {
        "evaluate": "image_scores mean_and_error _Given frechet RESAMPLES frechet_resamples all_features Seen Judge reading distances reconstruction_row column token_counts"
    },
    "evaluation.report": {
        "evaluate": "versions CROP PERCEPTUAL UNKNOWN trained_how _against make_card Report _number _CARD _TABLE load_report _read_scores better score_key plot_report"
    },
    "evaluation.evaluate": {
        "evaluate": "READS_ORIGINALS ReaderEyes gains measure_reconstructions measure_samples measured_and_rest LEFT_OVER floor_rows evaluate_tokenizer RULES older_than_the_rule split_by_record"
    },
    "evaluation.compare": {"evaluate": "conditions Comparison _flat comparison_keys comparison_text compare"},
    "io.pictures": {"cache": "Pictures pictures_of decoded_pictures _loaded encode_span"},
    "io.cache_facts": {
        "cache": "latent_facts token_facts _LATER _NOTES _refuse _kind _CACHE read_facts _ABOUT _DTYPES _odd _check_shard _odd_labels"
    },
    "io.cache": {"cache": "OpenCache _Checked Cache LearnedCache _of _shaped LatentCache TokenCache"},
    "io.build": {
        "cache": "Recipe _sides latent_recipe _SOURCE token_recipe _bytes _duration CachePlan _good cache_plan _begin _make build_cache cache_latents_to cache_tokens_to"
    },
    "io.grammar": {
        "released": "_TOKENIZER _TRUNK _word _two_keys _sizes _some_parts _RULES TERMS _LAWS _M PARTS _TURN _part _Side"
    },
    "io.tables": {"released": "Table _check_tables"},
    "io.layout": {
        "released": "Layout _read_encoder _trunk _read_decoder _BLOCK _names _equal _latent_size _SECTIONS _read _layout"
    },
    "io.released": {
        "released": "_find _check_finite _vae_names _OLD _build_vae _VAE _all _VAE_OPTIONS load_vae _vae_inside load_flextok _fits _from_metadata _check_vae"
    },
    "io.export": {"released": "_part_of _turn _adder _describe_side _describe _own_layout save_released"},
    "apps.pictures": {
        "pipeline": "watched on_disk held_out_scenes open_pictures for_the_floor numbered encode_to material some"
    },
    "apps.run_config": {
        "pipeline": "RunConfig pick_precision check ready_to_write check_name inside _GO_ON parse_go_on known_changes with_changes STAGES"
    },
    "apps.pace": {
        "pipeline": "SUSTAINED _Enough _reset_peak _peak Pace Stopwatch _with_steps throwaway probe plan"
    },
    "apps.page": {
        "pipeline": "_rows picture_reconstructions picture_samples picture_quality CURVES collect_expected _band expected_curves picture_losses PICTURES write_report"
    },
    "apps.job": {
        "pipeline": "Job _NOT_ASKED lasting _asked _unequal _plain _stored _strangers _under_way prepare _decide"
    },
    "apps.stages": {"pipeline": "_stage Models train_all finished_report _trained_in evaluate_all"},
    "apps.run": {"pipeline": "run main", "commands": "RunOptions run_main"},
    "apps.options": {"commands": "UsageError setting_names nearest typed override _put parse_settings"},
    "apps.cli": {
        "commands": "Settings read_settings _PLACES at_home stored_options _ELSEWHERE _hint _of_file command_line Terminated _signals _manners _sentence command"
    },
    "apps.models": {
        "commands": "Common DataOptions _holds _find open_vae open_tokenizer open_ar made_with _made_beside habits preset_of all_learned size_of"
    },
    "apps.training": {
        "commands": "TrainOptions Told _DECIDES _of_stage _begin _fits _to_go_on_with _begun_from _cache_folder _material _classes_agree"
    },
    "apps.train": {"commands": "train _claim _train_in with_earlier _seen _recipe _trained _save train_main"},
    "apps.tokenize": {
        "commands": "CacheOptions make_cache cache_main TokenizeOptions read_ids tokenize tokenize_main"
    },
    "apps.generate": {
        "commands": "DecodeOptions _safe _file_name _may_write _sheet _write_pictures DetokenizeOptions detokenize _latent_shape detokenize_main GenerateOptions _its_tokenizer generate generate_main"
    },
    "apps.measure": {
        "commands": "EvalOptions _only_results _to_measure_on measure eval_main",
        "evaluate": "compare_main",
    },
    "apps.estimate": {
        "commands": "EstimateOptions Estimate counted_memory _room estimate _hours estimate_line estimate_all estimate_main"
    },
    "apps.cost": {
        "cost": "_hidden block_parameters tokenizer_parameters ar_parameters vae_parameters trunk_flops encode_positions encode_flops decode_positions decode_flops counted_flops PeakMemory on_meta faked peak_bytes training_bytes training_line decoding_bytes describe info_main"
    },
    "apps.timing": {
        "cost": "_wait in_turns matmuls matmul_rate VARIANTS variant BenchConfig bench_tokenizer _row _memory bench_line"
    },
    "apps.bench_training": {
        "cost": "loss_flops loss_positions loss_bytes _Unsorted training_feed TRAINING _backward sorting_allows bench_train"
    },
    "apps.bench": {"cost": "bench_inference bench bench_main"},
    "apps.zoo": {
        "zoo": "halved _folders _DECIDES _text _group _made _told_by _history _round _thin _keep read_log _write_parts rounding _side _table _fits pack"
    },
    "apps.card": {
        "zoo": "PARTS _open _read markdown _known _STAGE _stage _row learned_facts _learned_from _decoding _measured _texts _numbers _PART _MODEL read_facts model_card"
    },
    "apps.explore": {
        "zoo": "parse_budgets _model ShowOptions ReconstructOptions _photos reconstruct reconstruct_main TrainedOn trained_on images_that_fit DemoOptions _shipped _shown demo demo_main"
    },
}
for _whole in ("vae", "fsq", "transformer", "registers", "flow", "tokenizer", "ar"):
    WHERE[_whole] = {_whole: "*"}
