"""The sizes of the demo and the tests: minutes on a laptop CPU.

    --config=tiny:stage=pretrain --config.model.vision=CLIP_DIR --config.model.llm=LLAMA_DIR \
        --config.data.annotations=captions.json --config.data.images=DIR
    --config=tiny:stage=finetune … --config.init.projector=WORKDIR_OF_PRETRAIN
"""

import ml_collections

try:
    import common  # from the folder of this file: by --config, as a script, or copied elsewhere with common.py
except ModuleNotFoundError:
    from configs import common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """arg: stage=finetune|pretrain|mid|lora."""
    args = common.parse_arg(arg, stage=("finetune", "pretrain", "mid", "lora"))
    c = common.default_config()
    c.stage = args.stage
    c.model.vision = "random:tiny"
    c.model.llm = "random:tiny"
    c.data.max_length = 1024  # tokenizers of small models come near one token a character
    # Captions are of one length; on a CPU, attention over long rows of conversations costs more than their padding.
    c.data.pack = args.stage == "pretrain"
    c.data.template = "plain" if args.stage == "pretrain" else ""
    c.data.aspect = "crop" if args.stage == "pretrain" else "pad"
    c.optim.lr = 1e-3
    c.optim.clip_norm = 1.0
    c.lora.rank = 8
    c.lora.alpha = 16.0
    c.train.batch_size = 8
    c.train.dtype = "float32"
    c.train.frozen_dtype = "float32"
    c.train.remat = "none"
    c.train.log_every = 1
    c.train.checkpoint_every = 100
    return c


if __name__ == "__main__":
    print(get_config())
