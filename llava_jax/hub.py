"""Models and data sets of the Hugging Face Hub, as folders of this machine; and the upload of an export.

huggingface_hub fetches, so its variables count (HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE, proxies), and so do its
locks: of several processes on a host one fetches a file, and the others wait for it and find it.
"""

import fnmatch
import glob
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from llava_jax.types import InputError

REPOSITORY = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
COMMIT = re.compile(r"[0-9a-f]{40}")
# The folder in an export to the original's layout that holds the vision tower; SGLang looks for `clip` in the name that
# mm_vision_tower gives.
TOWER = "clip-vision-tower"

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
# What is read of a model apart from its weights.
CONFIGS = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "chat_template.jinja",
    "chat_template.json",
    *TOKENIZER_FILES,
    "weights/_METADATA",
    f"{TOWER}/config.json",
    f"{TOWER}/preprocessor_config.json",
)
_CARD = "README.md"  # for the licence
_STEMS = ("model", f"{TOWER}/model", "adapter_model")
_SAFETENSORS = tuple(
    f"{stem}{end}"
    for stem in _STEMS
    for end in (".safetensors", "-?????-of-?????.safetensors", ".safetensors.index.json")
)
_TORCH = ("pytorch_model.bin", "pytorch_model-?????-of-?????.bin", "pytorch_model.bin.index.json", "adapter_model.bin")
_TRAINED = "non_lora_trainables.bin"  # next to the adapters of the original's LoRA runs
_PROJECTOR = ("mm_projector.bin", _TRAINED)
_ORBAX, _IS_ORBAX = ("weights/*",), "weights/_METADATA"


def fetch(repo: str, revision: str, where: str, need: str) -> str:
    """Return the folder of a commit of a repository, with what is needed of it; what is here already is not fetched.

    Args:
        repo: owner/name.
        revision: a branch, a tag or a commit; "" is the main branch.
        where: how messages begin: the flag or key, and what it was given.
        need: config (config, tokenizer and image settings), weights (those and the weights: safetensors, else .bin), or
            projector (the file of a pretrain run).

    A commit whose files are all here is read without the network. Raises InputError where it cannot be fetched or has
    not what is needed.
    """
    with _explained(f"{where}: there is no folder of that name, and", repo, revision, "model"):
        folder = _snapshot(repo, revision, (*CONFIGS, _CARD), "model")
        commit = os.path.basename(folder)
        if need == "config":
            expected, found = "config.json", _holds(folder, CONFIGS)
        else:
            expected, groups = _needs(need, _holds(folder, (_IS_ORBAX,)))
            found = any(_has(repo, commit, group) for group in groups)
    if not found:
        raise InputError(f"{where}: {repo} on the Hub (commit {commit}) has no {expected}")
    return folder


def needed(need: str, names: Sequence[str]) -> list[str]:
    """Return those of all files of a model folder that `fetch` would take with the same `need`."""
    groups = _needs(need, _IS_ORBAX in names)[1] if need != "config" else ()
    group = next((group for group in groups if _matching(names, group)), ())
    return _matching(names, (*CONFIGS, _CARD, *group, *([_TRAINED] if group else [])))


def _needs(need: str, is_orbax: bool) -> tuple[str, Sequence[Sequence[str]]]:
    """Return (what is expected, in words; the groups of files, of which the first that is there is needed)."""
    if need == "projector":
        return " or ".join(_PROJECTOR), [_PROJECTOR]
    groups = [_ORBAX] if is_orbax else [_SAFETENSORS, _TORCH, _PROJECTOR]
    return "model.safetensors or pytorch_model.bin, whole or in shards", groups


def _matching(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    return [name for name in names if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]


def _has(repo: str, commit: str, group: Sequence[str]) -> bool:
    """Fetch the files of a group and what lies next to adapters; return whether the repository has any of the group."""
    # Asked for with files that are there: huggingface_hub warns where nothing matches.
    return _holds(_snapshot(repo, commit, (*CONFIGS, _CARD, *group, _TRAINED), "model"), group)


def _snapshot(repo: str, revision: str, patterns: Sequence[str], kind: str) -> str:
    """Return the folder of a commit with the files that match; `kind` is model or dataset."""
    # A second of import that only who names a repository should wait for.
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    return snapshot_download(repo, repo_type=kind, revision=revision or None, allow_patterns=list(patterns))


def _holds(folder: str, patterns: Sequence[str]) -> bool:
    return any(glob.glob(os.path.join(glob.escape(folder), pattern)) for pattern in patterns)


# ---- data sets --------------------------------------------------------------------------------------------------


def list_dataset(repo: str, revision: str, where: str) -> tuple[str, list[str]]:
    """Return (commit, the paths of all files) of a data set; `where` begins messages. Raises InputError.

    A commit that was asked for before is known without the network.
    """
    from huggingface_hub import get_cached_repo_tree

    with _explained(f"{where}:", repo, revision, "dataset"):
        # What it fetches is small and in every repository; that it keeps the list of files is what counts.
        commit = os.path.basename(_snapshot(repo, revision, (".gitattributes", _CARD), "dataset"))
        return commit, [file.path for file in get_cached_repo_tree(repo, repo_type="dataset", revision=commit)]


def fetch_dataset(repo: str, commit: str, files: Sequence[str], where: str) -> list[str]:
    """Return these files of a data set as paths of this machine; what is here already is not fetched."""
    with _explained(f"{where}:", repo, commit, "dataset"):
        folder = _snapshot(repo, commit, [glob.escape(file) for file in files], "dataset")
    return [os.path.join(folder, file) for file in files]


# ---- upload -----------------------------------------------------------------------------------------------------


def make_repository(repo: str) -> None:
    """Make the repository that --push names, private, unless it is there. Raises InputError where it holds files."""
    from huggingface_hub import HfApi

    if not re.fullmatch(REPOSITORY, repo):
        raise InputError(f"--push={repo}: expected USER/NAME, or ORGANISATION/NAME")
    with _explained_upload(repo, ""):
        HfApi().create_repo(repo, private=True, exist_ok=True)
        held = [name for name in HfApi().list_repo_files(repo) if name != ".gitattributes"]
    if held:
        raise InputError(
            f"--push={repo}: already holds files ({', '.join(sorted(held)[:3])}{' …' if len(held) > 3 else ''}); give "
            "another name, or write over it yourself with `hf upload`"
        )


def upload(folder: str, repo: str) -> str:
    """Upload a folder to the repository that --push names; return the address of the commit. Raises InputError."""
    from huggingface_hub import HfApi

    with _explained_upload(repo, f"; {folder} is written: `hf upload {repo} {folder}` uploads it"):
        return HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message="Export of llava-jax").commit_url


@contextmanager
def _explained_upload(repo: str, then: str) -> Iterator[None]:
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, OfflineModeIsEnabled

    try:
        yield
    except (HTTPError, HFValidationError, OfflineModeIsEnabled) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0]
        if isinstance(error, HfHubHTTPError):
            said = f"answers {error.response.status_code}: {error.server_message or said}"
            if error.response.status_code in (401, 403):
                said += " (log in with `hf auth login` or HF_TOKEN, with the right to write)"
        raise InputError(f"--push={repo}: the Hub ({constants.ENDPOINT}): {said}{then}") from error


# ---- errors -----------------------------------------------------------------------------------------------------


@contextmanager
def _explained(before: str, repo: str, revision: str, kind: str) -> Iterator[None]:
    """Raise one InputError, which `before` begins, for whatever the Hub answers, or for no answer."""
    from huggingface_hub import constants, errors

    absent = (errors.LocalEntryNotFoundError, errors.CachedRepoTreeNotFoundError)
    try:
        yield
    except (errors.HTTPError, *absent, errors.HFValidationError) as error:
        reason = _reason(error, repo, revision, kind, constants.ENDPOINT, constants.HF_HUB_CACHE)
        raise InputError(f"{before} {reason}") from error


def _reason(error: Exception, repo: str, revision: str, kind: str, endpoint: str, cache: str) -> str:
    from huggingface_hub import errors

    log_in = "log in with `hf auth login` or HF_TOKEN"
    match error:
        case errors.GatedRepoError():
            page = f"{endpoint}/datasets/{repo}" if kind == "dataset" else f"{endpoint}/{repo}"
            return f"{repo} on the Hub is gated: accept its terms at {page}, and {log_in}"
        case errors.RepositoryNotFoundError():
            return f"the Hub ({endpoint}) has no {kind} {repo} that it shows to you: check the name, or {log_in}"
        case errors.RevisionNotFoundError():
            return f"{repo} on the Hub has no revision {revision!r}: expected a branch, a tag or a commit"
        case errors.HfHubHTTPError():
            said = error.server_message or str(error).splitlines()[0]
            return f"the Hub ({endpoint}) answers {error.response.status_code} for {repo}: {said}"
        case errors.HFValidationError():
            return f"{repo} is no name of a {kind} on the Hub: {str(error).splitlines()[0]}"
    lacks = f"what is needed of it is not in the cache ({cache})"
    if isinstance(error.__cause__, errors.OfflineModeIsEnabled):
        return f"the Hub may not be asked for {repo} (HF_HUB_OFFLINE is set); {lacks}: fetch it once without that"
    said = (str(error.__cause__ or error).splitlines() or [""])[0]
    return f"the Hub ({endpoint}) cannot be reached for {repo} ({said}); {lacks}: check the network and HF_ENDPOINT"
