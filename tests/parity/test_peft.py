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
from llava_jax.weights.adapters import merge_adapters
from llava_jax.weights.peft import write_peft

ALL = ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down")


@pytest.mark.parametrize("projector", ["mlp2x_gelu", "linear"])
@pytest.mark.parametrize("targets", [ALL, ("attn/q", "mlp/down")])
def test_peft_gives_our_logits(tmp_path, targets, projector):
    folder, config, params = exported(tmp_path, projector=projector)
    trained = dataclasses.replace(config, lora=LoraConfig(rank=4, alpha=8.0, dropout=0.0, targets=targets))
    graphdef, abstract = build(trained)
    rng = np.random.default_rng(3)
    learnt = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(np.float32), split_parts(abstract))
    lora, learnt_projector = learnt["lora"], learnt["projector"]
    write_peft(str(tmp_path / "adapters"), trained, {"lora": lora, "projector": learnt_projector}, folder)

    theirs = PeftModel.from_pretrained(peers.load_strict(folder), str(tmp_path / "adapters")).eval()
    adapted = [name for name, _ in theirs.named_modules() if name.endswith(".lora_A")]
    assert len(adapted) == len(targets) * config.llm.layers and all("language_model" in name for name in adapted)
    tokens, targets_BT, pixels = peers.batch()
    is_image = tokens == peers.IMAGE_ID
    with torch.no_grad():
        image = theirs.config.image_token_index
        inputs = peers.torch_inputs(np.where(is_image, image, tokens), targets_BT, pixels)
        logits = theirs(**inputs).logits[..., : config.llm.vocab_size]
        plain = peers.load_strict(folder)(**inputs).logits[..., : config.llm.vocab_size]

    seen = jnp.asarray(np.where(is_image, config.image_token_id, tokens)), jnp.asarray(pixels)
    whole = params | {"projector": learnt_projector, "lora": lora}
    ours = nnx.merge(graphdef, join_parts(whole))(*seen)
    assert peers.relative(ours, logits) <= 1e-4
    assert peers.relative(ours, plain) > 1e-2
    merged = whole | {"llm": merge_adapters(trained, params["llm"], lora, "float32")}
    del merged["lora"]
    assert peers.relative(nnx.merge(build(config)[0], merged)(*seen), logits) <= 1e-4
