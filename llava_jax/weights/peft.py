"""The adapters of a run as peft saves them: adapter_config.json and adapter_model.safetensors, with the projector."""

import json
import os
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from llava_jax.types import InputError, LoraConfig, ModelConfig
from llava_jax.weights import name_table
from llava_jax.weights.hf_export import finished_folder
from llava_jax.weights.tensors import open_file

Params = dict[str, Any]

ADAPTER = "adapter_model.safetensors"
# LlavaForConditionalGeneration of transformers 5 in memory, where peft looks; the names in files are older.
LLM = "model.language_model."
PROJECTOR = "model.multi_modal_projector."


def write_peft(folder: str, config: ModelConfig, lora: Params, projector: Params, base: str) -> None:
    """Write the folder that `peft.PeftModel.from_pretrained(model, folder)` loads onto our exported LLaVA.

    `lora` and `projector` are parts of a run with the adapters of `config.lora`; `base` names the model they belong to
    ("" where it is not one folder). The projector goes along as peft's modules_to_save. InputError when `folder` is
    already there, or for a LLaVA-NeXT: peft saves modules, and `image_newline` lies in none.
    """
    if config.pinpoints:
        raise InputError(
            f"--to=peft:{folder}: the run trained image_newline, which peft's format has no place for; write the "
            "merged model, --to=hf:DIR"
        )
    tensors = dict(sorted((_adapters(config.lora, lora) | _projector(config, projector)).items()))
    with finished_folder(folder) as partial:
        with open(os.path.join(partial, "adapter_config.json"), "w", encoding="utf-8") as file:
            json.dump(adapter_json(config.lora, base), file, indent=2)
        path = os.path.join(partial, ADAPTER)
        save_file(tensors, path, metadata={"format": "pt"})
        # safetensors leaves it readable by its owner alone.
        os.chmod(path, 0o644)
        written = open_file(path)
        for name, array in tensors.items():
            if written.get(name).tobytes() != array.tobytes():
                raise OSError(f"{path}: {name} read back differs from what was written")


def adapter_json(lora: LoraConfig, base: str) -> dict[str, Any]:
    """peft's LoraConfig. Modules are a pattern: their last names alone would also find those of the vision tower."""
    names = sorted(_module(target).partition(".")[2].replace(".", r"\.") for target in lora.targets)
    return dict(
        peft_type="LORA",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base or None,
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        bias="none",
        fan_in_fan_out=False,
        inference_mode=True,
        target_modules=rf".*language_model.*\.({'|'.join(names)})",
        modules_to_save=["multi_modal_projector"],
    )


def _module(target: str) -> str:
    """'{}.self_attn.q_proj', with {} for the layer, of 'attn/q'."""
    row = name_table.ROWS[f"llm/layers/{target}/kernel"]
    return row.hf.removeprefix(name_table.LLM + "layers.").removesuffix(".weight")


def _adapters(lora: LoraConfig, params: Params) -> dict[str, np.ndarray]:
    found = {}
    for target in lora.targets:
        room, layer = target.split("/")
        a, b = (np.asarray(params["layers"][room][layer][leaf], np.float32) for leaf in ("a", "b"))
        for index in range(len(a)):
            name = f"base_model.model.{LLM}layers.{_module(target).format(index)}"
            found[f"{name}.lora_A.weight"] = np.ascontiguousarray(a[index].reshape(-1, lora.rank).T)
            found[f"{name}.lora_B.weight"] = np.ascontiguousarray(b[index].reshape(lora.rank, -1).T)
    return found


def _projector(config: ModelConfig, params: Params) -> dict[str, np.ndarray]:
    found = {}
    for path, array in name_table.flatten({"projector": params}).items():
        row = name_table.ROWS[path]
        name = row.hf.removeprefix(name_table.PROJECTOR)
        found[name] = name_table.to_hf(row, np.asarray(array, np.float32))
    if config.projector == "linear":
        # Theirs always has two layers; the second one of a linear projector is the identity.
        found |= {"linear_2.weight": np.eye(config.llm.width, dtype=np.float32)}
        found |= {"linear_2.bias": np.zeros(config.llm.width, np.float32)}
    return {f"base_model.model.{PROJECTOR}{name}": array for name, array in found.items()}
