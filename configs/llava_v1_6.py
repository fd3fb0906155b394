"""LLaVA-NeXT (LLaVA-1.6, January 2024): Vicuna-v1.5 7B or 13B, CLIP ViT-L/14 at 336 px, all of it learns from tiles.

    --config=llava_v1_6:size=7b,stage=pretrain      558,128 captions, batch 256, lr 1e-3: LLaVA-1.5's, which it reuses
    --config=llava_v1_6:size=7b,stage=finetune      779K conversations, batch 128, lr 1e-5, vision tower 2e-6

7B and 13B share every value. An image is cut into up to four tiles next to the whole one, and rows have 4096 tokens.
Grids, length and the tower's rate are those of the published config.json; the other rate and the schedule those of the
script that followed (scripts/train/direct_finetune_clip.sh of LLaVA-VL/LLaVA-NeXT). It leaves the batch to the number
of GPUs; here it is LLaVA-1.5's.

The data, lmms-lab/LLaVA-NeXT-Data: LLaVA-1.5's mix without TextCaps, and conversations of GPT-4V (LAION-GPT-V,
ShareGPT-4V), 15K requests of users, DocVQA, SynDog-EN, ChartQA, DVQA and AI2D.
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
    c.model.vision = "weights/clip-vit-large-patch14-336"
    c.model.llm = f"weights/vicuna-{args.size}-v1.5"
    c.model.projector = "mlp2x_gelu"
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
        c.data.max_length = 2048
        c.optim.lr = 1e-3
        c.train.batch_size = 256
    else:
        c.init.projector = f"runs/llava_v1_6_{args.size}_pretrain"
        c.data.annotations = "data/llava_next_779k.json"
        c.data.images = "data/llava_next"
        c.data.template = "v1"
        c.data.aspect = "anyres"
        c.data.max_length = 4096
        c.optim.lr = 1e-5
        c.optim.groups = "^vision/=2e-6"
        c.train.trainable = "^(projector|llm|vision)/"
        c.train.batch_size = 128
    return c


if __name__ == "__main__":
    print(get_config())
