"""LLaVA-1.5 (arXiv 2310.03744): Vicuna-v1.5 7B or 13B, CLIP ViT-L/14 at 336 px, a two-layer projector.

    --config=llava_v1_5:size=7b,stage=pretrain      558,128 captions, batch 256, lr 1e-3, 2,181 steps
    --config=llava_v1_5:size=7b,stage=finetune      665,298 conversations, batch 128, lr 2e-5, 5,198 steps
    --config=llava_v1_5:size=7b,stage=lora          the same with adapters (rank 128, alpha 256), lr 2e-4

7B and 13B share every value. Neither stage clips gradients. The first crops its images, the second pads them. The
original draws its finetune batches by modality and length; here they are drawn from one shuffled stream.
"""

import ml_collections

try:
    import common  # from the folder of this file: by --config, as a script, or copied elsewhere with common.py
except ModuleNotFoundError:
    from configs import common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """arg: size=7b|13b, stage=finetune|pretrain|lora."""
    args = common.parse_arg(arg, size=("7b", "13b"), stage=("finetune", "pretrain", "lora"))
    c = common.default_config()
    c.stage = args.stage
    c.model.vision = "weights/clip-vit-large-patch14-336"
    c.model.llm = f"weights/vicuna-{args.size}-v1.5"
    c.model.projector = "mlp2x_gelu"
    c.data.max_length = 2048
    c.data.pack = True
    c.data.workers = 8
    c.optim.schedule = "cosine"
    c.optim.warmup_ratio = 0.03
    c.optim.weight_decay = 0.0
    c.optim.clip_norm = 0.0
    c.train.epochs = 1.0
    if args.stage == "pretrain":
        c.data.annotations = "data/blip_laion_cc_sbu_558k.json"
        c.data.images = "data/llava_pretrain"
        c.data.template = "plain"
        c.data.aspect = "crop"
        c.optim.lr = 1e-3
        c.train.batch_size = 256
    else:
        c.init.projector = f"runs/llava_v1_5_{args.size}_pretrain"
        c.data.annotations = "data/llava_v1_5_mix665k.json"
        c.data.images = "data/llava_finetune"
        c.data.template = "v1"
        c.data.aspect = "pad"
        c.optim.lr = 2e-5
        c.train.batch_size = 128
    if args.stage == "lora":
        c.optim.lr = 2e-4
        c.optim.groups = "^projector/=2e-5"
        c.lora.rank = 128
        c.lora.alpha = 256.0
        c.lora.dropout = 0.05
    return c


if __name__ == "__main__":
    print(get_config())
