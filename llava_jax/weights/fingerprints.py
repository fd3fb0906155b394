"""Fingerprints of what a run depends on: frozen weights, tokenizer, config files. Every checkpoint keeps them."""

import glob
import hashlib
import os

from llava_jax.settings import STAGES
from llava_jax.types import InputError, Settings
from llava_jax.weights import hf, runs
from llava_jax.weights.processor import TOKENIZER_FILES
from llava_jax.weights.source import is_workdir, split
from llava_jax.weights.spec import ModelSpec
from llava_jax.weights.tensors import weight_files


def frozen_sources(settings: Settings) -> dict[str, dict[str, str]]:
    """Where each frozen part comes from, with a fingerprint of the folder: kept in every checkpoint."""
    given = {"vision": settings.model.vision, "llm": settings.model.llm, "projector": settings.init.projector}
    sources = {}
    for part in given:
        if part not in STAGES[settings.stage]:
            source = settings.init.model or given[part]
            sources[part] = {"source": source, "fingerprint": fingerprint(source)}
    return sources


def model_inputs(spec: ModelSpec) -> dict[str, dict[str, str]]:
    """Path and hash of what a model depends on next to its weights: kept in every checkpoint."""
    files = [os.path.join(spec.tokenizer, name) for name in TOKENIZER_FILES]
    inputs = file_inputs("the tokenizer", spec.tokenizer, *files)
    inputs |= file_inputs("the decoder's config.json", os.path.join(spec.tokenizer, "config.json"))
    if spec.vision_folder:
        inputs |= file_inputs("the vision tower's config.json", os.path.join(spec.vision_folder, "config.json"))
        settings = os.path.join(spec.vision_folder, "preprocessor_config.json")
        inputs |= file_inputs("the vision tower's image settings", settings)
    return inputs


def file_inputs(name: str, path: str, *files: str) -> dict[str, dict[str, str]]:
    """{name: path and hash of the content of `files` (the path itself by default)}; absent files count as such."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files or (path,):
        content = ""
        if os.path.isfile(file):
            with open(file, "rb") as opened:
                content = hashlib.file_digest(opened, "sha256").hexdigest()
        digest.update(f"{os.path.basename(file)} {content}\n".encode())
    return {name: {"source": path, "fingerprint": digest.hexdigest()}}


def check_unchanged(workdir: str, saved: dict, now: dict) -> None:
    """InputError when a frozen part or another input is no longer what the checkpoint was trained on.

    `saved` and `now` are metas of checkpoints; an input that either does not name is not compared.
    """
    found = {f"the frozen {part}": (was, now["frozen"][part]) for part, was in saved["frozen"].items()}
    inputs = saved.get("inputs", {})
    found |= {name: (inputs[name], given) for name, given in now["inputs"].items() if name in inputs}
    for name, (was, given) in found.items():
        if was["fingerprint"] != given["fingerprint"]:
            raise InputError(
                f"{workdir}: {name} in {given['source']} is not the one this run was trained with (fingerprint "
                f"{given['fingerprint']}, was {was['fingerprint']}): put it back, or choose another workdir"
            )


def fingerprint(source: str) -> str:
    """Hash of a SRC: of a workdir's newest checkpoint, or of a folder's weights; '' when there are none.

    Of weight files it takes names, sizes and the first and last megabyte. Folders that an original LLaVA folder names
    count as part of it.
    """
    folder = split(source)[1]
    if is_workdir(folder):
        return runs.fingerprint(folder)
    paths = [path for other in hf.weight_folders(folder) for path in _weights(other)] if folder else []
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        size = os.path.getsize(path)
        digest.update(f"{os.path.basename(path)} {size}".encode())
        with open(path, "rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read())
    return digest.hexdigest() if paths else ""


def _weights(folder: str) -> list[str]:
    """Weight files of a folder: .safetensors, and others unless the model itself lies in the former."""
    found, own = sorted(glob.glob(os.path.join(glob.escape(folder), "*.safetensors"))), weight_files(folder)
    if any(path in found for path in own):
        return found
    return found + sorted({*own, *glob.glob(os.path.join(glob.escape(folder), "*.bin"))})
