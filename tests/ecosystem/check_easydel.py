"""Runs where EasyDeL is: `python check_easydel.py DIR` compares its logits with those that make_export wrote there.

EasyDeL keeps the cosines and sines of positions in bfloat16. What that alone changes is measured here, on PyTorch's
model of the same folder, and EasyDeL's logits may be no further from ours than twice as much.
"""

import os
import pathlib
import sys

import easydel
import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers


def torch_logits(folder: str, ids: np.ndarray, pixels: np.ndarray, rounded: bool) -> np.ndarray:
    model = transformers.LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    rotary = model.model.language_model.rotary_emb
    if rounded:
        rotary.register_forward_hook(lambda module, given, tables: tuple(t.bfloat16().float() for t in tables))
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids), pixel_values=torch.tensor(pixels)).logits.numpy()


def easydel_logits(folder: str, ids: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    model = easydel.AutoEasyDeLModelForImageTextToText.from_pretrained(
        folder,
        dtype=jnp.float32,
        param_dtype=jnp.float32,
        precision=jax.lax.Precision.HIGHEST,
        from_torch=True,
        config_kwargs=dict(attn_dtype=jnp.float32),
    )
    with model.mesh:
        return np.asarray(model(input_ids=jnp.asarray(ids), pixel_values=jnp.asarray(pixels)).logits)


def main(folder: pathlib.Path) -> None:
    given = np.load(folder / "logits.npz")
    ids, pixels, ours = (given[name].astype(kind) for name, kind in (("ids", int), ("pixels", "f4"), ("logits", "f4")))
    path = os.fspath(folder / "hf")
    exact, rounded = (torch_logits(path, ids, pixels, rounded=flag) for flag in (False, True))
    theirs = easydel_logits(path, ids, pixels)
    scale = np.abs(ours).max()
    off, tables, torchs = (float(np.abs(each - ours).max() / scale) for each in (theirs, rounded, exact))
    same = (theirs.argmax(-1) == ours.argmax(-1)).mean()
    print(
        f"EasyDeL {easydel.__version__}: logits differ by {off:.1e} of the largest, {same:.0%} of the likeliest tokens "
        f"are ours; PyTorch {torchs:.1e}, with its rotary tables in bfloat16 {tables:.1e}"
    )
    assert torchs < 1e-4 and off < 2 * tables, (off, tables)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
