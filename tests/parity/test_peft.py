"""The adapters of a lora run in peft's hands: loaded onto our exported model they give our logits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import peers
import pytest
import torch
from flax import nnx
from peft import PeftModel
from test_export import exported

from llava_jax.models.llava import build, join_parts, split_parts
from llava_jax.types import LoraConfig
from llava_jax.weights.adapters import merge_adapters, merge_tower
from llava_jax.weights.peft import write_peft

ALL = ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down")
# Of the decoder, and of the tower.
TARGETS = [(ALL, ()), (("attn/q", "mlp/down"), ()), (("attn/v",), ("attn/o", "mlp/up"))]


@pytest.mark.parametrize("projector", ["mlp2x_gelu", "linear"])
@pytest.mark.parametrize(
    "targets, tower", [(ALL, ()), (("attn/q", "mlp/down"), ()), (("attn/v",), ("attn/o", "mlp/up"))]
)
def test_peft_gives_our_logits(tmp_path, targets, tower, projector):
    folder, config, params = exported(tmp_path, projector=projector)
    lora = LoraConfig(rank=4, alpha=8.0, dropout=0.0, targets=targets, vision_targets=tower)
    trained = dataclasses.replace(config, lora=lora)
    graphdef, abstract = build(trained)
    rng = np.random.default_rng(3)
    learnt = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), split_parts(abstract))
    learnt = {part: tree for part, tree in learnt.items() if part in ("lora", "vision_lora", "projector")}
    write_peft(str(tmp_path / "adapters"), trained, learnt, folder)

    theirs = PeftModel.from_pretrained(peers.load_strict(folder), str(tmp_path / "adapters")).eval()
    adapted = [name for name, _ in theirs.named_modules() if name.endswith(".lora_A")]
    of_tower = [name for name in adapted if "vision_tower" in name]
    assert len(of_tower) == len(tower) * config.vision_layers
    assert len(adapted) == len(targets) * config.llm.layers + len(of_tower)
    tokens, targets_BT, pixels = peers.batch()
    is_image = tokens == peers.IMAGE_ID
    with torch.no_grad():
        image = theirs.config.image_token_index
        inputs = peers.torch_inputs(np.where(is_image, image, tokens), targets_BT, pixels)
        logits = theirs(**inputs).logits[..., : config.llm.vocab_size]
        plain = peers.load_strict(folder)(**inputs).logits[..., : config.llm.vocab_size]

    seen = jnp.asarray(np.where(is_image, config.image_token_id, tokens)), jnp.asarray(pixels)
    whole = params | learnt
    ours = nnx.merge(graphdef, join_parts(whole))(*seen)
    assert peers.relative(ours, logits) <= 1e-4
    assert peers.relative(ours, plain) > 1e-2
    merged = params | {"projector": learnt["projector"]}
    merged["llm"] = merge_adapters(trained, params["llm"], learnt["lora"], "float32")
    if tower:
        merged["vision"] = merge_tower(trained, params["vision"], learnt["vision_lora"], "float32")
    assert peers.relative(nnx.merge(build(config)[0], merged)(*seen), logits) <= 1e-4
