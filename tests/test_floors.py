"""Who may import whom: every import of the package is read with ast and held against the floors of the house."""

import ast
import pathlib
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parent.parent

# A module imports only from lines above its own (a floor of several lines has steps); one that stands nowhere here is
# a breach by itself.
FLOORS = """
F0 types convert.table
F0 convert.stored
F1 convert.families
F1 convert.config convert.orbax_file
F1 source convert.torch_bin files
F1 data.sources data.mixture
F1 data.index
F1 settings sharding data.chat data.image synthesize.json_stream synthesize.parse synthesize.teacher
F1 synthesize.context synthesize.journal synthesize.budget synthesize.endpoint
F1 evaluate.exact_match data.grouping
F1 chips flops plan_hlo
F2 ops.product ops.ring
F1 data.words
F2 layers ops.attention ops.loss ops.rope data.tokenize data.row convert.chat_jinja convert.safetensors_io
F2 convert.chat_known
F2 plan_cost
F2 data.records
F2 data.anyres data.example data.packing synthesize.kinds
F2 synthesize.asking
F2 synthesize.batch synthesize.card
F2 synthesize.card_page
F2 synthesize.write
F2 prepare.output prepare.phrases
F3 prepare.arrayrecord prepare.captions prepare.concepts prepare.scienceqa
F3 plan_target
F3 models.nf4
F3 data.checks data.pipeline
F3 infer.stream
F3 models.lora models.clip models.llama data.verify convert.processor
F3 convert.original
F4 models.llava train.optim train.metrics convert.export
F5 train.step train.hosts convert.hf convert.peft infer.sample
F5 infer.beam convert.original_export
F5 infer.generate
F5 train.checkpoint train.tracing
F6 train.prepare train.adapters
F6 train.compiling
F6 train.assemble infer.chat infer.answers
F6 train.whole
F6 train.start
F6 train.loop plan
F6 plan_report plan_sweep
F7 api
F7 convert.commands
F7 (root)
F7 demo.world
F7 demo.files demo.reading demo.report demo.teacher
F7 demo.backbones demo.story
F7 benchmark.turns
F7 benchmark.making benchmark.ours benchmark.compare
F8 cli_parse
F8 cli_benchmark cli_prepare
F8 cli_train
F8 cli_data cli_models cli_plan cli_synthesize
F8 cli
F8 __main__
F9 benchmark.peer
"""
FLOOR = {module: step for step, line in enumerate(FLOORS.strip().split("\n")) for module in line.split()[1:]}

JAX = ("jax", "jaxlib", "flax", "optax", "orbax")
MODEL = (
    "llava_jax.models",
    "llava_jax.ops",
    "llava_jax.models.layers",
    "llava_jax.train",
    "llava_jax.infer",
    "llava_jax.api",
)
# Files below a folder never import these.
CLOSED = {
    "llava_jax/": ("torch", "tensorflow"),
    "llava_jax/data/": (*JAX, *MODEL, "llava_jax.convert"),
    "llava_jax/synthesize/": (*JAX, *MODEL, "llava_jax.convert"),
    "llava_jax/prepare/": (*JAX, *MODEL, "llava_jax.convert"),
    "llava_jax/evaluate/": (*JAX, *MODEL, "llava_jax.convert"),
    "llava_jax/models/": ("llava_jax.data", "llava_jax.train", "llava_jax.convert"),
}
# Runs by itself where torch is, as what we are measured against: no floor is below it, and nothing imports it.
PEER = "llava_jax/benchmark/peer.py"
# The part of Flax that will go, see its tree mode; jax has all of it.
NNX_NEVER = ("jit", "grad", "value_and_grad", "scan", "vmap", "remat", "Optimizer", "DiffState", "StateAxes")
LONGEST = 400


def sources(*folders: str) -> list[str]:
    """Python files below `folders`, relative to the root."""
    return sorted(path.relative_to(ROOT).as_posix() for folder in folders for path in (ROOT / folder).rglob("*.py"))


PACKAGE = sources("llava_jax")
CONFIGS = sources("configs")


def module_name(path: str) -> str:
    """llava_jax/models/rope.py -> ops.rope, llava_jax/ops/__init__.py -> ops, llava_jax/__init__.py -> (root)."""
    parts = path.removesuffix(".py").split("/")[1:]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "(root)"


MODULES = {module_name(path) for path in PACKAGE}


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, those inside functions too; `from a import b` is a.b, a '.' is relative."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


def below(name: str, roots: tuple[str, ...]) -> bool:
    return any(name == root or name.startswith(root + ".") for root in roots)


def target(name: str) -> str:
    """The module of ours that an import of `name` loads: itself, or the module that holds the imported function."""
    inner = name.removeprefix("llava_jax").removeprefix(".")
    return inner if inner in MODULES else inner.rpartition(".")[0] or "(root)"


def import_breaches(path: str, tree: ast.AST) -> Iterator[str]:
    name = module_name(path)
    for line, imported in imports(tree):
        where = f"{path}:{line} imports {imported}"
        if imported.startswith("."):
            yield f"{where}: write the full name"
        if below(imported, ("jax._src", "llava_jax.tests", "tests")):
            yield f"{where}: not a public module"
        closed = {path: ("llava_jax",)} if path == PEER else CLOSED
        for folder, never in closed.items():
            if path.startswith(folder) and below(imported, never):
                yield f"{where}: {folder} never does"
        if below(imported, ("llava_jax",)) and FLOOR.get(target(imported), len(FLOOR)) >= FLOOR.get(name, -1):
            yield f"{where}, which is not on a lower floor"


def style_breaches(path: str, tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = [None if kind is None else ast.unparse(kind) for kind in caught]
            for kind in {None, "Exception", "BaseException"} & set(names):
                yield f"{path}:{node.lineno} catches {kind or 'everything'}: name the errors"
        if isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            if below(text, ("jax._src",)) or text in [f"nnx.{name}" for name in NNX_NEVER]:
                yield f"{path}:{node.lineno} uses {text}"


def breaches(path: str, text: str) -> list[str]:
    """'file:line what' for every rule that a file of the package breaks."""
    tree = ast.parse(text, filename=path)
    found = [*import_breaches(path, tree), *style_breaches(path, tree)]
    lines = text.count("\n")
    return found + ([f"{path}: {lines} lines, {LONGEST} at most"] if lines > LONGEST else [])


@pytest.mark.parametrize("path", PACKAGE)
def test_file_keeps_the_rules(path):
    if not path.endswith("__init__.py"):
        assert module_name(path) in FLOOR, f"{path} has no floor: give it one in {pathlib.Path(__file__).name}"
    assert breaches(path, (ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", CONFIGS)
def test_config_imports_nothing_but_ml_collections(path):
    names = [name for _, name in imports(ast.parse((ROOT / path).read_text(encoding="utf-8")))]
    assert [name for name in names if not below(name, ("ml_collections", "configs.common", "common"))] == []


def test_every_floor_has_its_file():
    assert set(FLOOR) - MODULES == set()


@pytest.mark.parametrize(
    "path, text, says",
    [
        ("llava_jax/models/layers.py", "from llava_jax.models import clip", "llava_jax/models/layers.py:1"),
        (
            "llava_jax/models/layers.py",
            "def f():\n    from llava_jax.models.clip import Clip",
            "llava_jax/models/layers.py:2",
        ),
        ("llava_jax/models/clip.py", "import llava_jax.models.llama", "not on a lower floor"),
        ("llava_jax/types.py", "from llava_jax import InputError", "not on a lower floor"),
        ("llava_jax/models/llava.py", "from llava_jax.data.images import decode", "never"),
        ("llava_jax/data/images.py", "import jax.numpy as jnp", "never"),
        (
            "llava_jax/data/verify.py",
            "from llava_jax.parallel.sharding import batch_sharding\nfrom flax import nnx",
            "flax",
        ),
        ("llava_jax/evaluate/new.py", "from llava_jax import api", "never"),
        ("llava_jax/train/loop.py", "import torch", "never"),
        ("llava_jax/train/loop.py", "from . import step", "full name"),
        ("llava_jax/train/loop.py", "from jax._src import core", "public"),
        ("llava_jax/train/loop.py", "import jax\njax._src.core", "jax._src"),
        ("llava_jax/train/loop.py", "step = nnx.jit(f)", "nnx.jit"),
        ("llava_jax/train/loop.py", "try:\n    f()\nexcept Exception:\n    pass", "Exception"),
        ("llava_jax/train/loop.py", "try:\n    f()\nexcept (OSError, Exception):\n    pass", "Exception"),
        ("llava_jax/train/loop.py", "try:\n    f()\nexcept:\n    pass", "everything"),
        ("llava_jax/train/loop.py", "x = 1\n" * (LONGEST + 1), "lines"),
    ],
)
def test_a_breach_is_found(path, text, says):
    assert any(says in line for line in breaches(path, text))
