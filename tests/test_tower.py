"""A tower that learns: which parameters do, what stays as it is, what is kept for the backward pass, and exports."""

import dataclasses
import json
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from llava_jax.models.llava import build, join_parts, overlaid, partition, split_parts
from llava_jax.parallel.sharding import make_mesh
from llava_jax.settings import STAGES
from llava_jax.train import loop
from llava_jax.train.setup import build_run
from llava_jax.types import InputError, LoraConfig, MeshSettings, ModelConfig
from llava_jax.weights import load
from llava_jax.weights import source as checkpoints
from llava_jax.weights.convert import convert
from llava_jax.weights.hf import read_llava
from llava_jax.weights.load import read_model
from llava_jax.weights.peft import write_peft
from tests import fast_compile
from tests.test_sharding import TINY
from tests.tiny_run import change, make_inputs, make_settings, read_metrics, watched_steps

CHEAP = "xla_backend_optimization_level=0,xla_llvm_disable_expensive_passes=true"
DEEP = dataclasses.replace(TINY, vision=dataclasses.replace(TINY.vision, layers=5))  # four blocks run
TOWER_LORA = LoraConfig(4, 8.0, 0.0, ("attn/q",), vision_targets=("attn/q", "attn/o", "mlp/up"))


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


# ---- what learns ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stage, learns",
    [
        ("pretrain", {"projector"}),
        ("mid", {"projector", "llm", "vision"}),
        ("finetune", {"projector", "llm"}),
        ("lora", {"projector", "lora", "vision_lora"}),
    ],
)
def test_a_stage_is_a_pattern_of_whole_parts(stage, learns):
    config = dataclasses.replace(TINY, lora=TOWER_LORA if stage == "lora" else None)
    params = split_parts(build(config)[1])
    trainable, frozen = partition(params, STAGES[stage])
    assert set(trainable) == learns and set(frozen) == set(params) - learns
    assert overlaid(frozen, trainable) == params


def prepared(inputs, stage, **changes):
    settings = make_settings(inputs, stage, **changes)
    mesh = make_mesh(MeshSettings(1, 1, 1), jax.devices()[:1])
    return build_run(settings, load.model_spec(settings).stage_config, mesh, steps=4, length=32)


@pytest.mark.parametrize(
    "stage, changes, says",
    [
        ("finetune", dict(train__trainable="projector|lmm"), "train.trainable: 'lmm' finds no parameter, expected"),
        ("finetune", dict(train__trainable="projector|(llm|vision)/layer/"), "finds no parameter"),
        ("finetune", dict(train__trainable="projector|"), "an empty alternative finds every parameter"),
        ("finetune", dict(train__trainable="llm/("), "is not a regular expression"),
        ("finetune", dict(train__vision_blocks=1), "of the tower .* lets nothing learn"),
        ("mid", dict(train__vision_blocks=2), "the tower runs 2 blocks, expected fewer"),
        ("lora", dict(train__trainable="projector|llm"), "leaves out adapters of stage=lora.*expected lora/ in it"),
        (
            "lora",
            dict(train__trainable="^lora|projector", lora__vision_targets=".*q"),
            "leaves out adapters .*expected vision_lora/ in it",
        ),
        ("lora", dict(train__trainable="lora|llm", train__frozen_dtype="nf4"), "in four bits, which cannot learn"),
        (
            "lora",
            dict(lora__vision_targets="llm/layers/attn/q"),
            "lora.vision_targets=.* matches none of vision/layers",
        ),
        ("pretrain", dict(optim__groups="vision=1e-6"), "'vision' decides no trainable parameter"),
    ],
)
def test_what_cannot_learn_is_one_line(inputs, stage, changes, says):
    with pytest.raises(InputError, match=says) as error:
        prepared(inputs, stage, **changes)
    assert "\n" not in str(error.value)


def test_moments_and_dtypes_of_what_learns_alone(inputs):
    changes = dict(train__trainable="projector|vision/layers/attn|llm/norm", train__vision_blocks=1)
    run = prepared(inputs, "finetune", train__frozen_dtype="bfloat16", **changes)
    assert set(run.state.params["vision"]) == {"layers"} and set(run.state.params["vision"]["layers"]) == {"attn"}
    assert run.state.params["vision"]["layers"]["attn"]["q"]["kernel"].shape[0] == 1
    assert set(run.frozen["vision"]) == {"first", "layers", "patch", "class_embedding", "position", "pre_norm"}
    assert set(run.state.params["llm"]) == {"norm"} and "norm" not in run.frozen["llm"]
    shapes = sorted(leaf.shape for leaf in jax.tree.leaves(run.state.params))
    slots = sorted(leaf.shape for leaf in jax.tree.leaves(run.state.opt_state) if leaf.ndim)
    assert slots == sorted(2 * shapes)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(run.state.params)} == {"float32"}
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(run.frozen)} == {"bfloat16"}


def tower_gradient_bytes(config: ModelConfig, trainable: str) -> int:
    """The temporary memory of a tower's loss and gradient."""
    params = split_parts(build(config)[1])
    learns, frozen = partition({"vision": params["vision"]}, trainable)

    def loss(learns, frozen, pixels):
        whole = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params)
        model = nnx.merge(build(config)[0], join_parts(overlaid(whole, overlaid(frozen, learns))))
        return model.vision(pixels).sum()

    pixels = jax.ShapeDtypeStruct((64, 16, 16, 3), jnp.float32)
    compiled = (
        jax.jit(jax.grad(loss))
        .lower(learns, frozen, pixels)
        .compile(compiler_options={"xla_backend_optimization_level": "0"})
    )
    return compiled.memory_analysis().temp_size_in_bytes


def test_activations_are_kept_of_the_blocks_that_learn_alone():
    """Sixteen blocks run: the last two keep far less than all of them, and remat less than that."""
    deep = dataclasses.replace(TINY, vision=dataclasses.replace(TINY.vision, layers=17))
    whole = tower_gradient_bytes(deep, "vision/layers")
    last = tower_gradient_bytes(dataclasses.replace(deep, learning_blocks=2), "vision/layers")
    spared = tower_gradient_bytes(dataclasses.replace(deep, remat="full"), "vision/layers")
    assert last < whole / 3 and spared < whole / 3, (last, spared, whole)


# ---- a run whose tower's last block learns --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(inputs, tmp_path_factory):
    """(workdir, settings, (frozen, learning) weights before and after each update, a copy resumed halfway)."""
    how = dict(train__trainable="projector|llm/head|vision", train__vision_blocks=1, train__checkpoint_every=2)
    how |= dict(optim__groups="^vision/=2e-4,projector=3e-3", optim__weight_decay=0.1, optim__warmup_ratio=0.0)
    how |= dict(train__accumulate=2, train__remat="full", train__compiler_options=CHEAP)
    settings = make_settings(inputs, "mid", **how)
    workdir, again = tmp_path_factory.mktemp("tower"), tmp_path_factory.mktemp("again")
    once, seen = watched_steps(loop.compile_step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "compile_step", once)
        loop.train(settings, str(workdir))
        shutil.copytree(workdir, again, dirs_exist_ok=True)
        shutil.rmtree(again / "checkpoints" / "4")
        (again / "metrics.jsonl").write_text("".join((again / "metrics.jsonl").read_text().splitlines(True)[:2]))
        loop.train(settings, str(again))
    return workdir, settings, seen, again


def source_tower(settings):
    return read_llava(settings.init.model.removeprefix("hf:"))[1]["vision"]


def assert_equal(found, wanted, atol=0.0):
    """Compare trees of arrays that may lie in files."""
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=atol), found, wanted
    )


def test_frozen_blocks_are_unchanged_to_the_bit(ran):
    _, settings, seen, _ = ran
    frozen, learns = zip(seen[0][0], seen[3][1], strict=True)
    assert set(frozen[0]["vision"]) == {"first", "patch", "class_embedding", "position", "pre_norm"}
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8)), *frozen)
    assert set(learns[0]) == {"projector", "llm", "vision"} and set(learns[0]["llm"]) == {"head"}
    for path, same in jax.tree_util.tree_leaves_with_path(jax.tree.map(np.array_equal, *learns)):
        # The bias of the keys shifts every score of a query alike: its gradient is zero but for rounding.
        assert not same or jax.tree_util.keystr(path).endswith("['k']['bias']"), path
    tower = source_tower(settings)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[:1]), frozen[1]["vision"]["first"], tower["layers"])
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b[1:]), learns[0]["vision"]["layers"], tower["layers"])


def test_each_group_has_its_rate(ran):
    """Adam's first update moves an entry by its rate, whatever its gradient; decay adds a tenth of a percent here."""
    (_, before), (_, after) = ran[2][0]
    for part, rate in (("vision", 2e-4), ("projector", 3e-3), ("llm", 1e-3)):
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), after[part], before[part])
        assert np.median(jax.tree.leaves(moved)) == pytest.approx(rate, rel=0.1), part


def test_a_resumed_run_gives_the_same_numbers(ran):
    workdir, _, seen, again = ran
    assert read_metrics(again) == read_metrics(workdir)
    jax.tree.map(np.testing.assert_array_equal, seen[3][1][1], seen[5][1][1])


def test_a_checkpoint_holds_what_learns_and_names_where_the_rest_came_from(ran):
    _, params, meta = checkpoints.load_params(str(ran[0]))
    assert set(meta["trainable"]) == {"projector", "llm", "vision"} and set(meta["frozen"]) == {"llm", "vision"}
    assert set(params["vision"]) == {"layers"} and set(params["llm"]) == {"head"}


def test_the_trained_model_is_whole(ran):
    workdir, settings, seen, _ = ran
    _, params, _ = load.load_trained(str(workdir))
    tower, learnt = source_tower(settings), seen[3][1][1]
    params = jax.tree.map(np.asarray, params)
    wanted = jax.tree.map(lambda a, b: np.concatenate([a[:1], b]), tower["layers"], learnt["vision"]["layers"])
    jax.tree.map(np.testing.assert_array_equal, params["vision"], tower | {"layers": wanted})
    np.testing.assert_array_equal(params["llm"]["head"]["kernel"], learnt["llm"]["head"]["kernel"])
    jax.tree.map(np.testing.assert_array_equal, params["projector"], learnt["projector"])


@pytest.mark.parametrize("form", ["hf", "llava", "orbax"])
def test_every_form_carries_the_tuned_tower(ran, form, tmp_path):
    workdir = ran[0]
    config, params, _ = read_model(f"orbax:{workdir}", "model")
    convert(f"orbax:{workdir}", f"{form}:{tmp_path}/out")
    again, found, extras = read_model(f"{form}:{tmp_path}/out", "model")
    assert extras.tuned_tower and again.vision == config.vision
    for part in ("vision", "projector"):
        jax.tree.map(
            lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)), found[part], params[part]
        )
    convert(f"{form}:{tmp_path}/out", f"llava:{tmp_path}/original")
    jax.tree.map(
        lambda a, b: np.testing.assert_array_equal(np.asarray(a), np.asarray(b)),
        read_model(f"llava:{tmp_path}/original", "model")[1]["vision"],
        params["vision"],
    )


def test_the_original_reads_a_tuned_tower_from_its_own_file(ran, inputs, tmp_path):
    """Also where mm_vision_tower names a published one; a tower that no run trained stays in its folder alone."""
    workdir, settings = ran[:2]
    convert(f"orbax:{workdir}", f"llava:{tmp_path}/out", mm_vision_tower="openai/clip")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["unfreeze_mm_vision_tower"] is True
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    prefix = "model.vision_tower.vision_tower.vision_model."
    mine = {name.removeprefix(prefix) for name in tensors if name.startswith(prefix)}
    whole = load_file(tmp_path / "out" / "clip-vision-tower" / "model.safetensors")
    assert mine == {name.removeprefix("vision_model.") for name in whole} and "post_layernorm.weight" in mine
    other = shutil.copytree(tmp_path / "out" / "clip-vision-tower", tmp_path / "published")
    shutil.rmtree(tmp_path / "out" / "clip-vision-tower")
    found = read_model(f"llava:{tmp_path}/out", "model", vision=str(other))[1]["vision"]
    wanted = load.load_trained(str(workdir))[1]["vision"]
    assert_equal(found, wanted)
    convert(settings.init.model, f"llava:{tmp_path}/plain")
    assert "unfreeze_mm_vision_tower" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    assert not any("vision_tower" in name for name in load_file(tmp_path / "plain" / "model.safetensors"))


def test_another_run_starts_from_it(ran, inputs):
    settings = change(make_settings(inputs, "pretrain"), "init", model=f"orbax:{ran[0]}")
    spec = load.model_spec(settings)
    read = load.read_files(spec, {"vision": "float32"})
    wanted = load.load_trained(str(ran[0]))[1]["vision"]
    assert_equal(read["vision"], wanted)
    assert spec.tuned_tower and load.frozen_sources(settings, spec)["vision"]["fingerprint"]


# ---- adapters of the tower ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted_run(inputs, tmp_path_factory):
    """A run in which nothing but adapters learns, and in the tower those of its last block."""
    how = dict(lora__vision_targets="vision/layers/(attn/[qo]|mlp/up)", lora__rank=4, optim__warmup_ratio=0.0)
    how |= dict(train__trainable="lora")
    settings = make_settings(inputs, "lora", train__vision_blocks=1, train__compiler_options=CHEAP, **how)
    workdir = tmp_path_factory.mktemp("tower_lora")
    loop.train(settings, str(workdir))
    return workdir, settings


def test_merged_adapters_of_the_tower_give_its_features(adapted_run):
    workdir, settings = adapted_run
    spec, merged, _ = load.load_trained(str(workdir))
    config, trained = load.load_adapters(str(workdir))
    assert set(trained) == {"lora", "vision_lora"}
    assert trained["vision_lora"]["layers"]["attn"]["q"]["a"].shape == (1, 16, 4)
    assert all(np.any(x) for x in jax.tree.leaves(trained["vision_lora"]))
    calm = dataclasses.replace(config, lora=dataclasses.replace(config.lora, dropout=0.0))
    abstract = split_parts(build(calm)[1])
    tower = load.cut(source_tower(settings), abstract["vision"])
    pixels = np.random.default_rng(0).normal(size=(2, 16, 16, 3)).astype(np.float32)

    def features(config, params):
        zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), split_parts(build(config)[1]))
        return nnx.merge(build(config)[0], join_parts(zeros | params)).vision(pixels)

    unmerged = features(calm, {"vision": tower, "vision_lora": trained["vision_lora"]})
    plain = features(spec.config, {"vision": source_tower(settings)})
    given = features(spec.config, {"vision": jax.tree.map(np.asarray, merged["vision"])})
    np.testing.assert_allclose(given, unmerged, atol=1e-5)
    assert np.abs(unmerged - plain).max() > 1e-3
    assert spec.tuned_tower
    with pytest.raises(InputError, match="that run trained none .train.trainable.; give it as init.model"):
        load.read_projector(str(workdir), spec.config)


def test_adapters_of_the_tower_as_peft_saves_them(adapted_run, tmp_path):
    workdir, _ = adapted_run
    convert(f"orbax:{workdir}", f"peft:{tmp_path}/out")
    given = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert given["modules_to_save"] is None
    assert given["target_modules"].endswith(r"|.*vision_tower.*\.(1)\.(mlp\.fc1|self_attn\.out_proj|self_attn\.q_proj)")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    name = "base_model.model.model.vision_tower.encoder.layers.1.self_attn.q_proj.lora_A.weight"
    _, trained = load.load_adapters(str(workdir))
    np.testing.assert_array_equal(tensors[name], trained["vision_lora"]["layers"]["attn"]["q"]["a"][0].T)
    assert sum("vision_tower" in name for name in tensors) == 6
    _, found, _ = read_model(f"{tmp_path}/out", "model", dtype="float32")
    merged = load.load_trained(str(workdir), dtype="float32")[1]["vision"]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-6), found["vision"], merged
    )


def test_a_tower_with_a_trained_part_is_no_adapter(tmp_path):
    config = dataclasses.replace(TINY, lora=TOWER_LORA)
    with pytest.raises(InputError, match="the run trained weights of vision, which peft's format has no place for"):
        write_peft(str(tmp_path / "out"), config, {"lora": {}, "vision": {}}, "")


# ---- on a mesh ------------------------------------------------------------------------------------------------------

EIGHT_DEVICES = textwrap.dedent("""
    import dataclasses
    import jax, numpy as np
    from llava_jax.models import llava
    from llava_jax.models.llava import build, init, partition, split_parts
    from llava_jax.parallel.sharding import batch_sharding, make_mesh
    from llava_jax.train.setup import stored_shardings
    from llava_jax.train.step import LossConfig, batch_ranks, loss_and_grads
    from llava_jax.types import Batch, MeshSettings
    from tests.test_tower import DEEP, TOWER_LORA

    rng = np.random.default_rng(0)
    B, T = 16, 48
    tokens = rng.integers(1, 60, (B, T)).astype(np.int32)
    tokens[:, 2:6] = tokens[:, 22:26] = DEEP.image_token_id
    targets = rng.random((B, T)) < 0.5
    segments, positions = np.ones((B, T), np.int32), np.tile(np.arange(T, dtype=np.int32), (B, 1))
    pixels = rng.normal(size=(B, 3, 16, 16, 3)).astype(np.float32)
    mask = np.ones((B, 3), bool)
    mask[:3, 1] = mask[:, 2] = False  # no row uses the last slot
    batch = Batch(tokens, targets, segments, positions, pixels, mask)
    MID, LORA = "^(projector|llm|vision)/", "^(projector|lora|vision_lora)/"

    def both(config, pattern, params, batch, **more):
        how = dict(graphdef=build(config)[0], dtype="float32", packed=False, loss_norm="global_token")
        grad = jax.jit(lambda t, f, batch: loss_and_grads(t, f, batch, LossConfig(**how, **more)))
        return jax.block_until_ready(grad(*partition(params, pattern), batch))

    def close(got, want):
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
            if "['vision']" in jax.tree_util.keystr(path) and "['k']['bias']" in jax.tree_util.keystr(path):
                continue  # zero but for rounding
            a, b = np.asarray(a), np.asarray(b)
            worst = np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)
            assert worst <= 2e-5, (jax.tree_util.keystr(path), worst)

    cases = (
        ("all of it", dataclasses.replace(DEEP, remat="full"), MID),
        ("last blocks", dataclasses.replace(DEEP, learning_blocks=2), "^projector/|^vision/layers/"),
        ("adapters", dataclasses.replace(DEEP, lora=TOWER_LORA, learning_blocks=2), LORA),
    )
    for name, config, pattern in cases:
        params = jax.tree.map(np.array, init(config, 0, split_parts(build(config)[1])))
        if config.lora is not None:
            b = lambda x: x + rng.normal(0, 0.1, x.shape).astype(np.float32)
            params |= {part: jax.tree.map(b, params[part]) for part in ("lora", "vision_lora")}
        want = both(config, pattern, params, batch, accumulate=1, ranks=1)
        for sizes, accumulate in (((2, 4, 1), 1), ((2, 2, 2), 2))[0 if pattern == MID else 1 :]:
            mesh = make_mesh(MeshSettings(*sizes))
            with jax.set_mesh(mesh):
                at = stored_shardings(config, split_parts(build(config)[1]), pattern, mesh)
                q = at["vision"]["layers"]["attn"]["q"]["kernel"]
                assert ("fsdp_outer", "fsdp_inner") in q.spec or config.lora is not None, q
                assert at["vision"]["patch"]["kernel"].is_fully_replicated == (pattern != MID)
                placed, on = jax.device_put(params, at), jax.device_put(batch, batch_sharding(mesh))
                close(both(config, pattern, placed, on, accumulate=accumulate, ranks=batch_ranks(mesh)), want)
        print("equal", name)
""")


def test_eight_devices_give_the_gradients_of_one():
    env = fast_compile.environment(devices=8)
    done = subprocess.run([sys.executable, "-c", EIGHT_DEVICES], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("equal") == 3
