""".bin files that torch writes, and folders of the original's names, against the tensors that torch has."""

import json

import jax.numpy as jnp
import numpy as np
import peers
import pytest
import torch
from flax import nnx

from llava_jax.models.llava import build
from llava_jax.types import InputError
from llava_jax.weights import convert, hf
from llava_jax.weights.original import Companions
from llava_jax.weights.tensors import open_folder
from llava_jax.weights.torch_bin import open_torch

DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.bool,
)


def as_bytes(tensor):
    tensor = tensor.detach().contiguous()
    return tensor.view(torch.int16).numpy().tobytes() if tensor.dtype is torch.bfloat16 else tensor.numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bit_equal(tmp_path, dtype):
    """Whole tensors, views, transposes, shared storages, parameters, scalars and empty ones."""
    whole = (torch.randn(6, 5) * 100).to(dtype)
    tensors = {"whole": whole, "row": whole[2], "part": whole[1:4, ::2], "turned": whole.T, "scalar": whole[0, 0]}
    tensors |= {"none": whole[:0], "wide": whole[:1].expand(3, 5)}
    if dtype.is_floating_point:
        tensors["parameter"] = torch.nn.Parameter(whole[3:])
    torch.save(tensors, tmp_path / "x.bin")
    file = open_torch(str(tmp_path / "x.bin"))
    assert list(file) == list(tensors)
    for name, tensor in tensors.items():
        assert file[name].shape == tuple(tensor.shape) and file[name].get().tobytes() == as_bytes(tensor), name


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_state_dict_of_a_module(tmp_path, protocol):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4), torch.nn.Linear(4, 4, bias=False))
    torch.save(module.state_dict(), tmp_path / "x.bin", pickle_protocol=protocol)
    file = open_torch(str(tmp_path / "x.bin"))
    for name, tensor in module.state_dict().items():
        assert file[name].get().tobytes() == as_bytes(tensor)


def test_the_old_format_is_refused(tmp_path):
    torch.save({"a": torch.ones(2)}, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    with pytest.raises(InputError, match="older"):
        open_torch(str(tmp_path / "x.bin"))


def original(tmp_path, dtype=torch.float32):
    """(an original folder of torch's .bin, the model it was written from, its tensors, its whole tower)."""
    clip = peers.clip(tmp_path / "c", whole=True)
    torch.save({name: x.to(dtype) for name, x in full_clip(tmp_path / "c").items()}, tmp_path / "c/pytorch_model.bin")
    (tmp_path / "c" / "model.safetensors").unlink()
    theirs = peers.llava(tmp_path / "m", text=dict(vocab_size=127))
    state = theirs.state_dict()
    state |= {f"model.vision_tower.{name.removeprefix('vision_model.')}": x for name, x in clip.state_dict().items()}
    theirs.load_state_dict(state)
    names = {"model.language_model.": "model.", "lm_head.": "lm_head."}
    names |= {f"model.multi_modal_projector.linear_{n + 1}.": f"model.mm_projector.{2 * n}." for n in (0, 1)}
    weights = {
        new + k.removeprefix(old): x.to(dtype)
        for old, new in names.items()
        for k, x in state.items()
        if k.startswith(old)
    }
    folder = tmp_path / "o"
    folder.mkdir()
    torch.save(weights, folder / "pytorch_model.bin")
    text = {key: x for key, x in theirs.config.text_config.to_dict().items() if key != "dtype"}
    mm = dict(mm_vision_tower=str(tmp_path / "c"), mm_projector_type="mlp2x_gelu", mm_hidden_size=16)
    mm |= dict(mm_vision_select_layer=-2, torch_dtype=str(dtype).removeprefix("torch."))
    (folder / "config.json").write_text(json.dumps(text | mm | dict(model_type="llava_llama")))
    peers.tokenizer(folder, "bytes", size=127)
    return folder, theirs, weights, clip


def full_clip(folder):
    return peers.CLIPModel.from_pretrained(folder).state_dict()


def test_logits_and_the_way_back(tmp_path):
    """Ours from the original's .bin give transformers' logits; so does transformers from the folder we then write."""
    folder, theirs, weights, _ = original(tmp_path)
    config, params, _ = hf.read_llava(str(folder))
    tokens, targets, pixels = peers.batch()
    ours = nnx.merge(build(config)[0], params)(jnp.asarray(tokens), jnp.asarray(pixels))
    convert.convert(str(folder), f"hf:{tmp_path / 'h'}")
    again = peers.load_strict(str(tmp_path / "h"))
    tokens = np.where(tokens == peers.IMAGE_ID, again.config.image_token_index, tokens)
    with torch.no_grad():
        logits = again(**peers.torch_inputs(tokens, targets, pixels)).logits[..., :127]
        theirs.config.image_token_id = theirs.config.image_token_index = 126
        plain = theirs(
            **peers.torch_inputs(np.where(tokens == again.config.image_token_index, 126, tokens), targets, pixels)
        )
    assert peers.relative(ours, logits) <= 1e-4
    assert peers.relative(ours, plain.logits) <= 1e-4
    convert.convert(f"hf:{tmp_path / 'h'}", f"llava:{tmp_path / 'back'}")
    tensors = open_folder(str(tmp_path / "back"))
    assert tensors.names() == sorted(weights)
    for name, tensor in weights.items():
        assert tensors[name].get().tobytes() == as_bytes(tensor), name
    assert hf.read_llava_config(str(tmp_path / "back"), Companions())[0] == config


def test_bfloat16_is_bit_equal(tmp_path):
    folder, _, weights, _ = original(tmp_path, torch.bfloat16)
    convert.convert(str(folder), f"llava:{tmp_path / 'back'}")
    tensors = open_folder(str(tmp_path / "back"))
    for name, tensor in weights.items():
        assert tensors[name].get().tobytes() == as_bytes(tensor), name


def test_the_tower_that_is_written_loads(tmp_path):
    folder, _, _, clip = original(tmp_path)
    convert.convert(str(folder), f"llava:{tmp_path / 'back'}")
    model, info = peers.CLIPVisionModel.from_pretrained(
        tmp_path / "back" / "clip-vision-tower", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    wanted = {name.removeprefix("vision_model."): value for name, value in clip.state_dict().items()}
    for name, value in model.state_dict().items():
        assert torch.equal(value, wanted[name.removeprefix("vision_model.")]), name
