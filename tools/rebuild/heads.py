"""Title, promise and first words of every reference notebook; the lessons bring their own."""

HEADS = {
    "engine.config": (
        "Configurations",
        "Every number of a model and of its training, under a name.",
        "A model is described by a small frozen dataclass, and a preset bundles those of all stages. Nothing else decides what is built.",
    ),
    "engine.checks": (
        "Checks",
        "Has a piece of json the right shape? Asked before anything is built from it.",
        "Files come from strangers. Whatever is read from json goes through `read_json` and `conform`, and what is wrong is said in one sentence.",
    ),
    "engine.limits": (
        "Limits",
        "What each setting may be, and the way of a configuration through a file.",
        "Bounds are wide: they refuse what cannot be, not what is unusual.",
    ),
    "engine.text": (
        "Text",
        "Names that somebody else chose, printed and drawn as they are.",
        "A class may be called `$5_to_$10`, and a file may have a name that is no UTF-8. Terminals, figures and pages take names from here.",
    ),
    "engine.tensors": (
        "Tensors",
        "Devices, seeds, noise by name, and a batch of images as one picture.",
        "Small functions that every room uses.",
    ),
    "engine.files": (
        "Files",
        "Written whole or not at all; weights read without running code.",
        "Everything that this package writes goes through `atomic`, and every file of weights is looked at before it is read.",
    ),
    "engine.identity": (
        "Identity",
        "A short name for exactly these weights with exactly this meaning.",
        "Ids, caches and AR models are bound to their partner by it.",
    ),
    "engine.models": (
        "Models",
        "A model is a folder with two files; what does not fit is refused before memory is taken.",
        "`save_model` writes them, `load_model` reads them.",
    ),
    "engine.hub": (
        "The hub",
        "`from_pretrained`, `save_pretrained`, `push_to_hub`.",
        "Models that come with the package, folders, and repositories of the Hugging Face hub, by the same three methods.",
    ),
    "engine.optim": (
        "Optimisers",
        "Averaged weights, a schedule, and Muon beside AdamW.",
        "What moves the weights.",
    ),
    "engine.loader": (
        "Batches by number",
        "Which items a step sees is a function of the seed and the step.",
        "So a run that was stopped goes on with the very batch that came next, and several processes can share one.",
    ),
    "engine.trainer": (
        "The training loop",
        "One loop trains every model of this course.",
        "Batches come from an iterator, and one or several losses move their own parameters.",
    ),
    "engine.compiler": (
        "The compiler",
        "`torch.compile` where it works, one line of notice where it does not.",
        "Small transformers get somewhat faster by it.",
    ),
    "engine.checkpoint": (
        "Checkpoints",
        "The whole state of a training, written and found again.",
        "Weights are not enough: an optimiser remembers, and random numbers go on.",
    ),
    "engine.claims": (
        "Claims",
        "One folder, one training.",
        "Two trainings in one folder are worse than one that dies: each removes the other's files.",
    ),
    "engine.monitor": (
        "Monitor",
        "Is the machine well used, and does the training go well?",
        "Two numbers for the dashboard, and a watch that says once what looks wrong.",
    ),
    "engine.distributed": (
        "Several processes",
        "The same step, shared by several devices.",
        "Processes and devices are Hugging Face Accelerate's; what is ours is that the result does not depend on how many there are.",
    ),
    "engine.resume": (
        "Going on",
        "A checkpoint is compared with what is asked before it is loaded.",
        "A training may only go on as itself, or with a change that was asked for.",
    ),
    "engine.long_run": (
        "Long runs",
        "Stopped, killed, moved: and nothing happened.",
        "The engine for nights and queues.",
    ),
    "engine.shards": (
        "Shards",
        "A file of tensors that says what it holds.",
        "The pieces that caches are made of.",
    ),
    "engine.marks": (
        "Marks",
        "Whose file is that? Nothing of yours is written over.",
        "What this package makes carries a mark, and only what carries one may be replaced.",
    ),
    "data.shapes": (
        "Shapes",
        "The things of ToyScenes as coloured polygons.",
        "A thing is a list of coloured polygons in a box from -0.5 to 0.5, y pointing down. The lesson *scenes* paints them.",
    ),
    "data.decoding": (
        "Decoding",
        "From any file to an upright RGB square, in bounded memory.",
        "Nothing that lies in a file makes this raise, wait for ever or fill the memory.",
    ),
    "data.folders": (
        "Folders",
        "Folders of images with all their accidents.",
        "Which files are pictures, which folders are classes, and what is passed over.",
    ),
    "data.sets": (
        "Sets that have a name",
        "CIFAR-10, Fashion-MNIST, Imagenette, ImageNet.",
        "Found on the disk, or fetched on demand.",
    ),
    "data.keys": (
        "Keys",
        "On which side does a picture stand? It says so itself.",
        "The one rule by which pictures are divided into training and held-out ones.",
    ),
    "data.datasets": (
        "Data sets in memory",
        "Whatever the source: uint8 images, labels, class names, and a hash.",
        "From any source to two sets, one to learn from and one that is held out.",
    ),
    "data.learned": (
        "What a model learned from",
        "A list beside the weights, so that an evaluation can leave out what was learned.",
        "It is written when a model is trained, and asked when one is measured.",
    ),
    "data.sources": ("Sources", "Millions of pictures, read from the disk while the model trains.", ""),
    "data.tar": (
        "Tar shards",
        "A million small files in a few large ones, with random access.",
        "The format of WebDataset, read by an index of its members.",
    ),
    "data.reading": (
        "Reading",
        "From bytes to batches: what is broken is counted, and no step waits for it.",
        "Workers read ahead; which items a step sees follows from the seed and the step alone.",
    ),
    "data.set_sources": (
        "Sets as sources",
        "Public sets, PyTorch data sets and the hub's, item by item.",
        "The same interface as folders and shards.",
    ),
    "data.streams": (
        "Streams",
        "Data that is read from front to back.",
        "Sets on a hub that are not to be downloaded as a whole.",
    ),
    "data.opening": (
        "Opening",
        "One door for every source, and one rule that divides it.",
        "`open_source` picks the kind by what it is given.",
    ),
    "data.extractors": (
        "Other feature extractors",
        "Inception, DINOv2 and CLIP by name.",
        "The networks that published numbers use. They are downloaded on demand, and their files are known by hash or commit.",
    ),
    "evaluation.report": (
        "Reports",
        "A table that carries its conditions.",
        "The card says what was measured, on what and how; the table says how well.",
    ),
    "evaluation.evaluate": (
        "Evaluating",
        "The whole table: every stage at every token count.",
        "Held-out pictures, references, reconstructions, samples, and the floor below them.",
    ),
    "evaluation.compare": (
        "Comparing",
        "Two tables, and whether one is better.",
        "First the conditions, then the numbers: what was measured differently is not ranked.",
    ),
    "io.pictures": (
        "Pictures for a cache",
        "Any source as bytes by number, and what an encoder makes of them.",
        "What a cache is made from.",
    ),
    "io.cache_facts": (
        "What a cache says of itself",
        "The facts in `cache.json` and in every shard, and what is refused.",
        "A cache that does not fit is refused by name.",
    ),
    "io.cache": (
        "Caches",
        "Latents and ids on the disk, read as if they lay in memory.",
        "Every shard is checked when it is first touched.",
    ),
    "io.build": (
        "Building caches",
        "Encode every picture once, keep the result on the disk, and be certain that nobody trains on somebody else's.",
        "",
    ),
    "io.grammar": (
        "The grammar of released files",
        "Which classes and options of a released description are understood.",
        "A released checkpoint describes its network by classes and options. What is not understood is refused by name.",
    ),
    "io.tables": (
        "Position tables",
        "Three ways to store positions, one table.",
        "Released checkpoints have all three.",
    ),
    "io.layout": (
        "Layouts",
        "From a released description to our configuration and names.",
        "Both sides are read in the order of the data, not by their names.",
    ),
    "io.released": (
        "Loading released models",
        "`load_flextok` and `load_vae`.",
        "The description is read, the weights are checked against it, and only then is a model built.",
    ),
    "io.export": (
        "Saving in the released layout",
        "Our models, as others will want them.",
        "`save_released` is the way back.",
    ),
    "apps.pictures": (
        "Pictures for a run",
        "Which pictures? Asked by all commands, answered once.",
        "In memory where they fit, from the disk where they do not.",
    ),
    "apps.run_config": (
        "What a run is",
        "The options of a run, and what is refused before it starts.",
        "One small dataclass.",
    ),
    "apps.pace": (
        "How long will it take?",
        "Every stage trained for a moment, with a stop-watch.",
        "Minutes become step counts, and an estimate is made before anything long begins.",
    ),
    "apps.page": (
        "The page",
        "Pictures, curves and a table in one file.",
        "It can be mailed: no network, no scripts.",
    ),
    "apps.job": (
        "Preparing a run",
        "What was decided when a run began, kept for when it goes on.",
        "Everything that can go wrong early is made to.",
    ),
    "apps.stages": (
        "The stages of a run",
        "Load what is finished, train what is missing, measure all of it.",
        "VAE, classifier, tokenizer, AR model, evaluation.",
    ),
    "apps.run": (
        "Run",
        "The whole course as one command: data, VAE, tokenizer, AR model, evaluation, report.",
        "",
    ),
    "apps.options": (
        "Options",
        "Any number of a preset can be changed by its name.",
        "A preset has about eighty numbers, and a typo must not pass.",
    ),
    "apps.cli": (
        "The command line",
        "One way to start all commands: options, files, signals, errors in one line.",
        "What all console commands have in common.",
    ),
    "apps.models": (
        "Models by folder",
        "A folder is enough to say which model.",
        "Opened with what they need, and with the settings that they were trained with.",
    ),
    "apps.training": (
        "Options of training",
        "What `flextok_train` can be asked, and with what it may go on.",
        "One stage at a time, on any pictures.",
    ),
    "apps.train": (
        "Train",
        "`flextok_train`: one stage, from pictures or from caches.",
        "It can be stopped, goes on when it is started again, and says what its model learned from.",
    ),
    "apps.tokenize": (
        "Tokenize",
        "`flextok_cache` and `flextok_tokenize`: pictures to latents and ids.",
        "Into caches for training, or into one file.",
    ),
    "apps.generate": (
        "Generate",
        "`flextok_detokenize` and `flextok_generate`: ids to pictures, and new pictures.",
        "At any token count.",
    ),
    "apps.measure": (
        "Measure",
        "`flextok_eval` and `flextok_compare`.",
        "The table of a model, and two tables beside each other.",
    ),
    "apps.estimate": (
        "Estimate",
        "`flextok_estimate`: the price, beforehand.",
        "Time and memory of each stage, on this machine.",
    ),
    "apps.cost": ("Cost", "Parameters, arithmetic and memory: known by formula before anything runs.", ""),
    "apps.timing": (
        "Timing",
        "Measuring well on a machine that is not alone.",
        "Variants take turns, and ratios are what is reported.",
    ),
    "apps.bench_training": (
        "Timing training steps",
        "What sorting by budgets saves.",
        "The same draws for every variant; every round is another step.",
    ),
    "apps.bench": (
        "Bench",
        "`flextok_bench`: encode, decode or train, in any variants.",
        "Ratios within one run.",
    ),
    "apps.zoo": (
        "The zoo",
        "Trained models that come with the package: packed small, found by name, shown at once.",
        "",
    ),
    "apps.card": (
        "Model cards",
        "What a shipped model is, how it was made, and how good it is.",
        "Written from facts; what is not known is said to be unknown.",
    ),
    "apps.explore": (
        "Explore",
        "`flextok_reconstruct` and `flextok_demo`.",
        "A shipped model on your own photos, and all of it on one page.",
    ),
}
LESSONS = {  # module: lesson
    "data.scenes": "01_scenes",
    "data.features": "02_features",
    "vae": "03_vae",
    "fsq": "04_fsq",
    "transformer": "05_transformer",
    "registers": "06_registers",
    "flow": "07_flow",
    "tokenizer": "08_tokenizer",
    "ar": "11_ar",
    "evaluation.metrics": "14_evaluation",
}
TALES = {  # lessons that export nothing
    "start": "00_start",
    "training": "10_training",
    "released": "17_released",
    "session": "apps/session",
}
