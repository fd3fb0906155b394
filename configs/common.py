"""What every config shares: the complete set of keys with their defaults, and typed arguments after `file.py:`."""

import ml_collections


def default_config() -> ml_collections.ConfigDict:
    """Every key of a run. Paths are empty: a run must name its model and data."""
    c = ml_collections.ConfigDict()
    c.stage = "finetune"  # pretrain: the projector learns; finetune: the decoder, too; mid: all; lora: adapters
    c.seed = 42

    c.model = ml_collections.ConfigDict()
    c.model.vision = ""  # CLIP folder, its name on the Hub, random:NAME or random:FILE.json
    c.model.llm = ""  # LLaMA folder, its name on the Hub, random:NAME or random:FILE.json
    c.model.projector = "mlp2x_gelu"  # or linear
    c.model.feature_layer = -2

    c.init = ml_collections.ConfigDict()
    c.init.model = ""  # a whole model to start from; model.vision and model.llm are then not read
    c.init.projector = ""  # .safetensors file or the workdir of a pretrain run; empty: random

    c.data = ml_collections.ConfigDict()
    c.data.annotations = ""
    c.data.images = ""
    c.data.template = ""  # that of the model it starts from, else the tokenizer's own chat template, else v1
    c.data.image_position = "front"  # keep: where the row has it
    c.data.aspect = "pad"  # crop, squash (SigLIP's), anyres (tiles)
    c.data.max_rejects = 0.001  # rows that may turn out unreadable or lack their image: a share below 1, else a number
    c.data.exclude = ""  # a file of ids (or #N, row N), one a line, of rows that are left out
    c.data.exif = "apply"  # turn images upright as EXIF says; ignore: as stored, as the original
    c.data.max_length = 2048
    c.data.shuffle = True
    c.data.group_by = "none"  # modality_length: rows of like length and kind share an update, as the original
    c.data.pack = False  # several conversations in a row; False: one, all rows as long as the longest
    c.data.pack_length = 0  # tokens in a packed row; 0: what leaves the least padding
    c.data.pack_images = 0  # images in a packed row; 0: what is needed
    c.data.workers = 0  # threads that make batches; 0: one
    c.data.eval = ""  # rows held out, of which the loss is measured
    c.data.eval_images = ""  # their images; empty: data.images

    c.optim = ml_collections.ConfigDict()
    c.optim.lr = 2e-5
    c.optim.groups = ""  # "path regex=lr,path regex=lr": first match wins, the rest takes lr
    c.optim.schedule = "cosine"  # constant, linear
    c.optim.warmup_ratio = 0.03
    c.optim.weight_decay = 0.0
    c.optim.clip_norm = 0.0  # 0: off
    c.optim.b1 = 0.9
    c.optim.b2 = 0.999
    c.optim.eps = 1e-8

    c.lora = ml_collections.ConfigDict()
    c.lora.rank = 128
    c.lora.alpha = 256.0
    c.lora.dropout = 0.05
    c.lora.targets = "llm/layers/(attn/[qkvo]|mlp/(gate|up|down))"  # regular expression on the whole path
    c.lora.vision_targets = ""  # vision/layers/(attn/[qkvo]|mlp/(up|down)): adapters of the tower, too

    c.train = ml_collections.ConfigDict()
    c.train.batch_size = 128  # conversations an update, over all devices
    c.train.steps = 0  # 0: epochs decide
    c.train.epochs = 1.0
    c.train.accumulate = 1  # micro-batches an update
    c.train.dtype = "bfloat16"  # of the computation
    c.train.param_dtype = "float32"  # of what learns
    c.train.moment_dtype = "float32"  # of Adam's moments
    c.train.frozen_dtype = "bfloat16"  # of what does not learn; nf4: the decoder's blocks in four bits (stage lora)
    c.train.remat = "full"  # none, dots, minimal, full, or names: attention+q+k
    c.train.attention = "auto"  # splash (TPU), cudnn (GPU), xla; auto: the best that runs
    c.train.compiler_options = "none"  # tuned: those of the chip; or "option=value,option=value"
    c.train.profile = 0  # updates to trace for the profiler
    c.train.log_every = 1
    c.train.checkpoint_every = 500  # 0: only the last step
    c.train.keep = 2
    c.train.eval_every = 0  # updates between passes over data.eval; 0: one, at the end
    c.train.eval_generate = 0  # so many of its rows are answered at each pass, too
    c.train.keep_best = False  # the checkpoint with the smallest loss of held-out rows stays, too
    c.train.wandb = ""  # project of Weights & Biases that the metrics go to, too
    c.train.trainable = ""  # "projector|llm|vision/layers": what learns, by path; empty: what the stage says
    c.train.max_nonfinite = 10  # updates in a row that are not finite, each skipped, until the run stops
    c.train.watchdog = 3600  # seconds until a phase counts as stuck; 0: never
    c.train.vision_blocks = 0  # only so many of the tower's last blocks may learn; 0: all
    c.train.loss_norm = "global_token"  # rank_mean: mean of per-device means, as the original

    c.mesh = ml_collections.ConfigDict()
    c.mesh.data = 1
    c.mesh.fsdp = -1  # -1: the devices that are left
    c.mesh.tensor = 1
    c.mesh.fsdp_inner = 1  # of the fsdp devices, along a second axis of the network: sums are made hierarchically
    return c


def parse_arg(arg: str | None, **choices: tuple[str, ...]) -> ml_collections.ConfigDict:
    """'size=7b,stage=pretrain' against the names and values allowed; the first value of each name is its default.

    ValueError says which names or values there are.
    """
    values = {name: allowed[0] for name, allowed in choices.items()}
    for item in filter(None, (arg or "").split(",")):
        name, _, value = item.partition("=")
        if name not in choices:
            raise ValueError(f"argument {item!r}: expected {', '.join(f'{known}=…' for known in choices)}")
        if value not in choices[name]:
            raise ValueError(f"argument {item!r}: {name} is one of {', '.join(choices[name])}")
        values[name] = value
    return ml_collections.ConfigDict(values)
