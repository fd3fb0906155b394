"""Newer backbones: Qwen3 0.6B to 8B, SigLIP2 so400m/14 at 384 px; LLaVA-OneVision's stages and learning rates.

    --config=llava_qwen:size=8b,stage=pretrain      captions: the projector learns, lr 1e-3
    --config=llava_qwen:size=8b,stage=mid           stage 1.5, detailed captions, OCR and knowledge: all of it learns
    --config=llava_qwen:size=8b,stage=finetune      instructions: all of it learns, lr 1e-5, vision tower 2e-6

All sizes share every value. Rates and stages are LLaVA-OneVision's (arXiv 2408.03326, on SigLIP and Qwen2), whose data
has videos and several images a conversation besides; grids of up to four tiles next to the whole image are those of
scripts/train/direct_finetune_siglip_a4.sh of LLaVA-VL/LLaVA-NeXT. Conversations are written by the chat template that
comes with Qwen3. No model of this recipe has been published.

The data: LLaVA-1.5's captions; for stage 1.5 lmms-lab/LLaVA-ReCap-* (558K, 118K and CC3M) and
lmms-lab/LLaVA-OneVision-Mid-Data; then lmms-lab/LLaVA-NeXT-Data or lmms-lab/LLaVA-OneVision-Data.
"""

import ml_collections

try:
    import common  # from the folder of this file: by --config, as a script, or copied elsewhere with common.py
except ModuleNotFoundError:
    from configs import common


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    """arg: size=8b|4b|1.7b|0.6b, stage=finetune|mid|pretrain."""
    args = common.parse_arg(arg, size=("8b", "4b", "1.7b", "0.6b"), stage=("finetune", "mid", "pretrain"))
    c = common.default_config()
    c.stage = args.stage
    c.model.vision = "weights/siglip2-so400m-patch14-384"
    c.model.llm = f"weights/Qwen3-{args.size.upper()}"
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
        c.data.aspect = "squash"
        c.data.max_length = 2048
        c.optim.lr = 1e-3
        c.train.batch_size = 256
        return c
    c.data.template = "tokenizer"
    c.data.aspect = "anyres"
    c.data.max_length = 8192
    c.optim.lr = 1e-5
    c.optim.groups = "^vision/=2e-6"
    c.train.trainable = "^(projector|llm|vision)/"
    c.train.batch_size = 128
    if args.stage == "mid":
        c.init.projector = f"runs/llava_qwen_{args.size}_pretrain"
        c.data.annotations = "data/llava_onevision_mid.json"
        c.data.images = "data/llava_onevision_mid"
    else:
        c.init.model = f"orbax:runs/llava_qwen_{args.size}_mid"
        c.data.annotations = "data/llava_next_779k.json"
        c.data.images = "data/llava_next"
    return c


if __name__ == "__main__":
    print(get_config())
