"""LLaVA (arXiv 2304.08485) as in the paper: Vicuna-v0 7B or 13B, CLIP ViT-L/14 at 224 px, a linear projector.

    --config=llava_v1:size=13b,stage=pretrain       595,375 captions, batch 128, lr 2e-3, 4,652 steps
    --config=llava_v1:size=13b,stage=finetune       157,712 conversations, batch 32, lr 2e-5, 14,787 steps

7B and 13B share every value. Both stages use the v0 prompt with the placeholder where the row has it, crop their
images and clip gradients at norm 1.
"""

import ml_collections

try:
    import common  # from the folder of this file: by --config, as a script, or copied elsewhere with common.py
except ModuleNotFoundError:
    from configs import common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """arg: size=7b|13b, stage=finetune|pretrain."""
    args = common.parse_arg(arg, size=("7b", "13b"), stage=("finetune", "pretrain"))
    c = common.default_config()
    c.stage = args.stage
    c.model.vision = "weights/clip-vit-large-patch14"
    c.model.llm = f"weights/vicuna-{args.size}-v0"
    c.model.projector = "linear"
    c.data.template = "v0"
    c.data.image_position = "keep"
    c.data.aspect = "crop"
    c.data.max_length = 2048
    c.data.pack = True
    c.data.workers = 8
    c.optim.schedule = "cosine"
    c.optim.warmup_ratio = 0.03
    c.optim.weight_decay = 0.0
    c.optim.clip_norm = 1.0
    if args.stage == "pretrain":
        c.data.annotations = "data/cc3m_595k.json"
        c.data.images = "data/cc3m_595k"
        c.optim.lr = 2e-3
        c.train.batch_size = 128
        c.train.epochs = 1.0
    else:
        c.init.projector = f"runs/llava_v1_{args.size}_pretrain"
        c.data.annotations = "data/llava_instruct_158k.json"
        c.data.images = "data/coco/train2017"
        c.optim.lr = 2e-5
        c.train.batch_size = 32
        c.train.epochs = 3.0
    return c


if __name__ == "__main__":
    print(get_config())
