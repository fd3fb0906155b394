"""Whether the numbers are those of an earlier revision: losses, answers and exported files, recorded and compared.

python -m tests.same_numbers                       the working tree against REV, where the recording began
python -m tests.same_numbers --against=main --cases='finetune-*' --keep=recordings

Both sides run on this machine with the same packages, so they must agree bit for bit and nothing is stored. Each case
is one command of the fixed contract (train, generate, convert) in a process that imports its own side's package and
configs; every key that a case depends on is given, so that a new default changes nothing here.
"""

import argparse
import dataclasses
import fnmatch
import hashlib
import importlib.metadata
import io
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

ROOT = pathlib.Path(__file__).parent.parent
REV = "48a2f2d"
STEPS = 20
AT_ONCE = 2  # processes

# Cases whose loss may move by --tolerance (relative), and why; the gradient norm, which gathers every rounding, by a
# hundred times as much.
MAY_MOVE = {
    "finetune-tensor": "mesh.tensor > 1 may sum the products of its columns in another order",
    "pretrain-padded": "rows far below data.max_length may be padded to another length, which XLA tiles otherwise",
    "finetune-padded": "rows far below data.max_length may be padded to another length, which XLA tiles otherwise",
}

# Keys of an exported config.json and files of an export that may be there now and were not before, and why.
MAY_GAIN = {
    "llava_jax.exif": "an export says how its images were turned (data.exif)",
    "README.md": "an export has a model card",
    "chat_template.jinja": "an export to the original's layout has a chat template, too",
    "chat_template": "its tokenizer_config.json, too",
    "image_token_id": "next to image_token_index, for programs that read this one",
    "model_input_names": "transformers 4 gives token_type_ids without them",
    "llava_jax": "an exported tokenizer keeps what added BOS",
    "projection_dim": "a written tower says what llama.cpp's converter asks for",
    "vision_feature_layer": "a written tower says what llama.cpp's converter asks for",
}
# Keys of a tokenizer's files, and files, that may say something else than before, and why.
MAY_CHANGE = {
    "chat_template.jinja": "a chat template writes BOS, takes a system message and marks what is trained",
    "chat_template": "a chat template writes BOS, takes a system message and marks what is trained",
    "post_processor": "BOS is in the chat template and no longer added by the tokenizer",
    "add_bos_token": "BOS is in the chat template and no longer added by the tokenizer",
}
BY_KEY = ("tokenizer.json", "tokenizer_config.json", "chat_template.json")

# What a case left behind: {"step 3": {"loss": 2.5, …}}, {"question 7": {"text": …}} or {"a.txt": {"sha256": …}}.
Recording = dict[str, dict]


@dataclasses.dataclass(frozen=True)
class Case:
    """One command, run in a side's folder with `devices` fake devices once `needs` have run, and what is read of it."""

    name: str
    argv: tuple[str, ...]
    read: Callable[[pathlib.Path], Recording]
    devices: int = 1
    needs: tuple[str, ...] = ()


# ---- what both sides read ---------------------------------------------------------------------------------------

COLOURS = {"red": (200, 30, 30), "blue": (30, 30, 200), "green": (30, 160, 30), "orange": (240, 150, 20)}
SHAPES = ("square", "circle", "triangle")
SMALL_CLIP = dict(
    model_type="clip_vision_model",
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=16,
    patch_size=8,
)
SMALL_LLAMA = dict(
    model_type="llama",
    vocab_size=1024,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=1,
    eos_token_id=2,
)


def write_inputs(folder: pathlib.Path, backbones: pathlib.Path) -> None:
    """Write trained backbones, configs of random ones, images, rows of both stages and questions into `folder`."""
    folder.mkdir()
    for name in ("clip", "llama"):
        shutil.copytree(backbones / name, folder / name)
    (folder / "small_clip.json").write_text(json.dumps(SMALL_CLIP))
    shutil.copytree(backbones / "llama", folder / "small_llama", ignore=shutil.ignore_patterns("*.safetensors"))
    (folder / "small_llama" / "config.json").write_text(json.dumps(SMALL_LLAMA))
    (folder / "images").mkdir()
    rng = np.random.default_rng(0)
    names, rows, captions, questions = list(COLOURS), [], [], []
    for n in range(24):
        width, height = rng.integers(20, 90, 2)
        pixels = rng.integers(0, 255, (height, width, 3)) // 4 + np.array(COLOURS[names[n % 4]]) * 3 // 4
        Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / f"{n}.png")
        thing = f"{names[n % 4]} {SHAPES[n % 3]}"
        caption = f"A {thing} left of a {names[n % 3]} {SHAPES[n % 2]}" + " and a circle" * (n % 5) + "."
        turns = [("human", f"<image>\nWhat is in the image {n}?"), ("gpt", caption)]
        captions.append({"id": f"caption-{n}", "image": f"{n}.png", "conversations": said(turns)})
        if n % 6 == 5:  # no image
            turns = [("human", f"A {thing} is left of a square. Which shape is left?"), ("gpt", thing)]
        if n % 4 == 3:  # a second turn
            turns += [("human", "What colour is it?"), ("gpt", thing.split()[0])]
        rows.append({"id": f"row-{n}", "conversations": said(turns)} | ({} if n % 6 == 5 else {"image": f"{n}.png"}))
    for n in range(20):
        questions.append({"question_id": n, "image": f"{n}.png", "text": f"What is in the image{' now' * (n % 2)}?"})
    for n in range(20, 40):
        scene = f"A {names[n % 3]} circle is left of a {names[n % 4]} {SHAPES[n % 3]} and {n} of a square."
        questions.append({"question_id": n, "text": f"{scene} What colour is it?"})
    (folder / "captions.json").write_text(json.dumps(captions))
    (folder / "rows.json").write_text(json.dumps(rows))
    (folder / "questions.jsonl").write_text("".join(json.dumps(question) + "\n" for question in questions))


def said(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"from": who, "value": text} for who, text in turns]


# ---- the cases --------------------------------------------------------------------------------------------------

VALUES = {
    "seed": 42,
    "model.vision": "../inputs/clip",
    "model.llm": "../inputs/llama",
    "model.projector": "mlp2x_gelu",
    "model.feature_layer": -2,
    "data.images": "../inputs/images",
    "data.image_position": "front",
    "data.shuffle": True,
    "data.group_by": "none",
    "data.pack": False,
    "data.pack_length": 0,
    "data.pack_images": 0,
    "data.workers": 0,
    "optim.lr": 1e-3,
    "optim.schedule": "cosine",
    "optim.warmup_ratio": 0.1,
    "optim.weight_decay": 0.01,
    "optim.clip_norm": 1.0,
    "optim.b1": 0.9,
    "optim.b2": 0.999,
    "optim.eps": 1e-8,
    "lora.rank": 8,
    "lora.alpha": 16.0,
    "lora.dropout": 0.05,
    "lora.targets": "llm/layers/(attn/[qkvo]|mlp/(gate|up|down))",
    "train.batch_size": 8,
    "train.steps": STEPS,
    "train.accumulate": 1,
    "train.dtype": "float32",
    "train.param_dtype": "float32",
    "train.moment_dtype": "float32",
    "train.frozen_dtype": "float32",
    "train.remat": "none",
    "train.attention": "xla",
    "train.log_every": 1,
    "train.checkpoint_every": 0,
    "train.keep": 1,
    "train.loss_norm": "global_token",
    "mesh.data": 1,
    "mesh.fsdp": 1,
    "mesh.tensor": 1,
}
# The longest row of each stage is longer than data.max_length and is cut, so that no rule for the length of a batch
# can choose another one.
PRETRAIN = {
    "data.annotations": "../inputs/captions.json",
    "data.template": "plain",
    "data.aspect": "crop",
    "data.max_length": 56,
}
FINETUNE = {
    "data.annotations": "../inputs/rows.json",
    "data.template": "v1",
    "data.aspect": "pad",
    "data.max_length": 112,
}
STAGES = {"pretrain": PRETRAIN, "finetune": FINETUNE, "lora": FINETUNE}
FLOAT32 = {"mesh.fsdp": -1}
BFLOAT16 = {"train.dtype": "bfloat16", "train.frozen_dtype": "bfloat16", "train.remat": "full", "mesh.fsdp": -1}
EIGHT_BFLOAT16 = BFLOAT16 | {"mesh.data": 2, "mesh.fsdp": 4}
TENSOR = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
# For cases whose roundings may change: Adam with a small eps makes a whole step of a gradient that is only rounding.
GENTLE = {"optim.lr": 1e-4, "optim.eps": 1e-3}
ANYRES = {
    "model.vision": "random:../inputs/small_clip.json",
    "model.llm": "random:../inputs/small_llama/config.json",
    "data.aspect": "anyres",
    "data.max_length": 88,
}
CHAIN = "finetune-from-pretrain"


def make_cases(config: pathlib.Path) -> list[Case]:
    """Return every case, with `config` (configs/tiny.py) to start from."""

    def train(name: str, stage: str, changes: dict, *, devices: int = 1, needs: tuple[str, ...] = ()) -> Case:
        values = VALUES | STAGES[stage] | changes
        keys = [f"--config.{key}={value}" for key, value in values.items()]
        argv = ("train", f"--config={config}:stage={stage}", f"--workdir={name}", *keys)
        return Case(name, argv, lambda folder: read_metrics(folder / name), devices, needs)

    def convert(name: str, source: str, form: str, *more: str) -> Case:
        needs = (source.partition(":")[2],)
        argv = ("convert", f"--from={source}", f"--to={form}:{name}", *more)
        return Case(name, argv, lambda folder: read_files(folder / name), needs=needs)

    cases = []
    for stage in ("pretrain", "finetune"):
        for how, pack in (("unpacked", {"data.pack": False}), ("packed", {"data.pack": True})):
            cases += [
                train(f"{stage}-{how}-1-float32", stage, pack | FLOAT32),
                train(f"{stage}-{how}-1-bfloat16", stage, pack | BFLOAT16),
                train(f"{stage}-{how}-8-float32", stage, pack | FLOAT32, devices=8),
                train(f"{stage}-{how}-8-bfloat16", stage, pack | EIGHT_BFLOAT16, devices=8),
            ]
        cases.append(train(f"{stage}-padded", stage, GENTLE | {"data.max_length": 256}))
    cases += [
        train("lora-1", "lora", FLOAT32),
        train("lora-8", "lora", EIGHT_BFLOAT16 | {"data.pack": True}, devices=8),
        train("anyres-1", "finetune", FLOAT32 | ANYRES),
        train("anyres-8", "finetune", EIGHT_BFLOAT16 | ANYRES, devices=8),
        train("finetune-tensor", "finetune", GENTLE | TENSOR, devices=8),
        train(
            CHAIN,
            "finetune",
            {"init.projector": "pretrain-unpacked-1-float32", "train.accumulate": 2, "optim.groups": "projector=1e-4"},
            needs=("pretrain-unpacked-1-float32",),
        ),
        Case(
            "answers",
            (
                "generate",
                f"--model=orbax:{CHAIN}",
                "--questions=../inputs/questions.jsonl",
                "--images=../inputs/images",
                "--answers=answers.jsonl",
                "--batch_size=8",
                "--temperature=0",
                "--max_new_tokens=24",
            ),
            lambda folder: read_answers(folder / "answers.jsonl"),
            needs=(CHAIN,),
        ),
        convert("hf", f"orbax:{CHAIN}", "hf"),
        convert("llava", f"orbax:{CHAIN}", "llava", "--dtype=bfloat16"),
        convert("orbax", f"orbax:{CHAIN}", "orbax"),
        convert("projector.safetensors", f"orbax:{CHAIN}", "projector"),
        convert("peft", "orbax:lora-1", "peft"),
        convert("hf-of-lora", "orbax:lora-1", "hf"),
        convert("hf-of-anyres", "orbax:anyres-1", "hf"),
        convert("hf-of-llava", "llava:llava", "hf"),
        convert("hf-of-orbax", "orbax:orbax", "hf"),
        convert("llava-of-hf", "hf:hf", "llava"),
    ]
    return cases


def with_needs(cases: list[Case], pattern: str) -> list[Case]:
    """Return the cases whose name the pattern matches, and those that they need."""
    wanted = {case.name for case in cases if fnmatch.fnmatch(case.name, pattern)}
    # What a case needs stands before it.
    for case in reversed(cases):
        if case.name in wanted:
            wanted.update(case.needs)
    return [case for case in cases if case.name in wanted]


# ---- what a case left behind ------------------------------------------------------------------------------------


def read_metrics(workdir: pathlib.Path) -> Recording:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    kept = ("loss", "grad_norm", "lr", "targets", "tokens")
    return {f"step {line['step']}": {key: line[key] for key in kept} for line in lines}


def read_answers(path: pathlib.Path) -> Recording:
    answers = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {f"question {answer['question_id']}": {"text": answer["text"]} for answer in answers}


def read_files(path: pathlib.Path) -> Recording:
    """Hash every file of an export; of an orbax checkpoint, whose files hold the time, every array.

    A config.json, whose keys have no order, is recorded by its values, a tokenizer's file by a hash of each key.
    """
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    weights = path / "weights"
    found = {str(file.relative_to(path.parent)): read_file(file) for file in files if not file.is_relative_to(weights)}
    return found | (read_arrays(weights) if weights.is_dir() else {})


def read_file(file: pathlib.Path) -> dict:
    if file.name == "config.json":
        return dict(leaves(json.loads(file.read_text(encoding="utf-8"))))
    if file.name in BY_KEY:
        content = json.loads(file.read_text(encoding="utf-8"))
        return {key: hashlib.sha256(json.dumps(value).encode()).hexdigest() for key, value in content.items()}
    return {file.name if file.name in MAY_GAIN else "sha256": hashlib.sha256(file.read_bytes()).hexdigest()}


def leaves(values: dict, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield the values of nested JSON objects as ("a.b", value)."""
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def read_arrays(folder: pathlib.Path) -> Recording:
    import jax
    import orbax.checkpoint as ocp
    from etils import epath

    handler = ocp.PyTreeCheckpointHandler()
    as_numpy = jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), handler.metadata(epath.Path(folder.resolve())).tree
    )
    tree = handler.restore(epath.Path(folder.resolve()), args=ocp.args.PyTreeRestore(restore_args=as_numpy))
    return {
        f"weights{jax.tree_util.keystr(place)}": {
            "dtype": str(array.dtype),
            "shape": list(array.shape),
            "sha256": hashlib.sha256(array.tobytes()).hexdigest(),
        }
        for place, array in jax.tree_util.tree_leaves_with_path(tree)
    }


# ---- recording --------------------------------------------------------------------------------------------------


def environment(tree: pathlib.Path, folder: pathlib.Path, devices: int) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "LLAVA_JAX_"))}
    return kept | {
        "PYTHONPATH": str(tree),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "LLAVA_JAX_CACHE": str(folder / "cache"),
    }


def check_import(tree: pathlib.Path, folder: pathlib.Path) -> None:
    """Exit where the package that a side would run is not that of its tree: it would be compared with itself."""
    argv = [sys.executable, "-c", "import llava_jax; print(llava_jax.__file__)"]
    found = subprocess.run(argv, cwd=folder, env=environment(tree, folder, 1), capture_output=True, text=True)
    if not pathlib.Path(found.stdout.strip()).is_relative_to(tree):
        raise SystemExit(f"{tree}: its package is not the one imported, but {found.stdout or found.stderr}")


def record(cases: list[Case], tree: pathlib.Path, folder: pathlib.Path) -> dict[str, Recording]:
    """Run the cases with the package in `tree` and return what each left behind in `folder`."""
    folder.mkdir()
    check_import(tree, folder)

    def run(case: Case) -> Recording:
        argv = [sys.executable, "-m", "llava_jax", *case.argv]
        done = subprocess.run(
            argv, cwd=folder, env=environment(tree, folder, case.devices), capture_output=True, text=True
        )
        if done.returncode:
            last = (done.stderr.strip() or done.stdout.strip() or "nothing said").splitlines()[-1]
            return {"command": {"failed": f"exit code {done.returncode}: {last}"}}
        print(f"{folder.name}: {case.name}", file=sys.stderr, flush=True)
        return case.read(folder)

    recorded: dict[str, Recording] = {}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        while left := [case for case in cases if case.name not in recorded]:
            ready = [case for case in left if all(need in recorded for need in case.needs)]
            recorded |= dict(zip([case.name for case in ready], pool.map(run, ready), strict=True))
    return recorded


def export_tree(revision: str, folder: pathlib.Path) -> str:
    """Write the files of a revision into `folder` and return its hash."""
    name = ["git", "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"]
    commit = subprocess.run(name, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    if not commit:
        raise SystemExit(
            f"--against={revision}: no commit of that name; give a branch, a tag or a hash of this repository"
        )
    archive = subprocess.run(["git", "archive", commit], cwd=ROOT, check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(folder, filter="data")
    return commit


# ---- comparing --------------------------------------------------------------------------------------------------


def difference(
    before: Recording,
    after: Recording,
    tolerance: float = 0.0,
    may_gain: Collection[str] = (),
    may_change: Collection[str] = (),
) -> str:
    """Return the first place where two recordings differ with both values, or ''.

    Losses may differ by `tolerance` (relative), and gradient norms by a hundred times as much; keys of `may_gain` may
    be new, those of `may_change` another.
    """
    allowed = {"loss": tolerance, "grad_norm": 100 * tolerance}
    for place in before | after:
        old, new = before.get(place, {}), after.get(place, {})
        for key in old | new:
            if key in may_gain and key not in old:
                continue
            if key in may_change and key in old and key in new:
                continue
            if key not in old or key not in new:
                return f"{place}: {key} is {new.get(key, 'absent')}, was {old.get(key, 'absent')}"
            if old[key] != new[key] and not (key in allowed and abs(new[key] - old[key]) <= allowed[key] * old[key]):
                return f"{place}: {key} is {new[key]}, was {old[key]}"
    return ""


def verdict(case: str, before: Recording, after: Recording, tolerance: float) -> tuple[bool, str]:
    """Return whether a case passes, and its line."""
    for side, recorded in (("before", before), ("now", after)):
        if "command" in recorded:
            return False, f"FAILED     {case}: {side}, {recorded['command']['failed']}"
    exact = difference(before, after)
    if not exact:
        return True, f"same       {case} ({len(before)})"
    if not difference(before, after, may_gain=MAY_GAIN, may_change=MAY_CHANGE):
        pairs = [(before.get(place, {}), after[place]) for place in after]
        moved = sorted({key for old, new in pairs for key in new if old.get(key) != new[key]})
        reasons = dict.fromkeys((MAY_GAIN | MAY_CHANGE)[key] for key in moved)
        return True, f"same but   {case} ({len(before)}): {exact} ({'; '.join(reasons)})"
    if case in MAY_MOVE and not difference(before, after, tolerance):
        return True, f"within {tolerance:g} {case}: {exact} ({MAY_MOVE[case]})"
    remains = difference(before, after, tolerance if case in MAY_MOVE else 0.0, MAY_GAIN, MAY_CHANGE)
    return False, f"DIFFERENT  {case}: {remains}"


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 when every case is the same on both sides, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", default=REV, metavar="REV", help=f"the revision to compare with ({REV})")
    parser.add_argument("--cases", default="*", metavar="PATTERN", help="only the cases of these names")
    parser.add_argument("--keep", type=pathlib.Path, metavar="DIR", help="keep recordings; REV's is used again")
    parser.add_argument("--tolerance", type=float, default=0.0, help=f"for losses of {', '.join(MAY_MOVE)} (0)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as temporary:
        work = pathlib.Path(temporary).resolve()
        tree = work / "tree"
        commit = export_tree(args.against, tree)
        write_inputs(work / "inputs", tree / "llava_jax" / "demo" / "backbones")
        kept = kept_file(args.keep or work, commit)
        before = json.loads(kept.read_text()) if kept.exists() else {}
        cases = with_needs(make_cases(tree / "configs" / "tiny.py"), args.cases)
        if not cases:
            names = ", ".join(case.name for case in make_cases(tree))
            print(f"--cases={args.cases}: matches no case; there are {names}", file=sys.stderr)
            return 2
        if any(case.name not in before for case in cases):
            before |= record(cases, tree, work / "before")
            kept.write_text(json.dumps(before, indent=1))
        after = record(with_needs(make_cases(ROOT / "configs" / "tiny.py"), args.cases), ROOT, work / "now")
        if args.keep:
            (args.keep / "now.json").write_text(json.dumps(after, indent=1))
    verdicts = [verdict(case.name, before[case.name], after[case.name], args.tolerance) for case in cases]
    print("\n".join(line for _, line in verdicts))
    return 0 if all(passed for passed, _ in verdicts) else 1


def kept_file(folder: pathlib.Path, commit: str) -> pathlib.Path:
    """Return where a recording of a commit lies: another one for other cases and other packages."""
    folder.mkdir(parents=True, exist_ok=True)
    packages = "".join(importlib.metadata.version(name) for name in ("jaxlib", "numpy", "pillow", "transformers"))
    made_by = hashlib.sha256(pathlib.Path(__file__).read_bytes() + packages.encode()).hexdigest()
    return folder / f"{commit[:12]}-{made_by[:8]}.json"


if __name__ == "__main__":
    sys.exit(main())
