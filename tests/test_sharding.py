"""The mesh and its rules: total coverage, clear errors, and the same numbers on eight devices as on one."""

import dataclasses
import subprocess
import sys
import textwrap
import types

import jax
import pytest
from jax.sharding import PartitionSpec

from llava_jax.models import llava
from llava_jax.parallel.sharding import RULES, check_divisible, make_mesh, spec_of
from llava_jax.types import ClipConfig, InputError, LlamaConfig, MeshSettings, ModelConfig
from tests import fast_compile

TINY = ModelConfig(
    vision=ClipConfig(width=32, mlp_width=64, layers=3, heads=4, image_size=16, patch_size=8),
    llm=LlamaConfig(vocab_size=64, width=32, mlp_width=64, layers=2, heads=8, kv_heads=4, head_dim=4),
    image_token_id=64,
)


def test_mesh_takes_what_is_left():
    mesh = make_mesh(MeshSettings(data=1, fsdp=-1, tensor=1))
    assert dict(mesh.shape) == {"data": 1, "fsdp_outer": jax.device_count(), "fsdp_inner": 1, "tensor": 1}


@pytest.mark.parametrize("sizes, needs", [((3, 5, 7), "105 devices"), ((7, -1, 1), "7 devices or a multiple")])
def test_a_mesh_of_other_devices_is_refused(sizes, needs):
    with pytest.raises(InputError, match=f"needs {needs}, found {jax.device_count()}"):
        make_mesh(MeshSettings(*sizes))


def test_slices_need_data_parallelism():
    devices = [types.SimpleNamespace(platform="tpu", slice_index=index // 2) for index in range(4)]
    with pytest.raises(InputError, match="mesh.data=1: the devices are 2 slices .* set --config.mesh.data=2"):
        make_mesh(MeshSettings(1, -1, 1), devices)


def test_fsdp_inner_divides_fsdp():
    with pytest.raises(InputError, match="mesh.fsdp_inner=3: expected a divisor of mesh.fsdp, which is 1"):
        make_mesh(MeshSettings(1, -1, 1, fsdp_inner=3), jax.devices()[:1])


def test_stacked_layers_stay_whole_and_every_axis_has_a_rule():
    assert spec_of(("embed", "heads", "head_dim"), 4) == PartitionSpec(
        None, ("fsdp_outer", "fsdp_inner"), "tensor", None
    )
    axes = jax.tree.leaves(llava.logical_axes(TINY), is_leaf=lambda leaf: isinstance(leaf, tuple))
    assert {name for names in axes for name in names} <= set(RULES)


def test_a_dimension_that_does_not_divide_is_named():
    class Mesh:
        shape = {"data": 1, "fsdp": 4, "tensor": 1}

    with pytest.raises(InputError, match=r"llm/head/kernel: size 6 .* does not divide .* \(4 ways\)"):
        check_divisible("llm/head/kernel", (6, 8), PartitionSpec("fsdp", "tensor"), Mesh)


TIED = dataclasses.replace(TINY.llm, tied=True, attention_bias=True, mlp_bias=True)
NORMED = dataclasses.replace(TINY.llm, family="qwen3")
KEPT = dataclasses.replace(TINY, remat="minimal+q_weight+o_weight+down_weight", llm=NORMED)
PRESETS = ((8, 1, 1), (1, 8, 1), (1, 2, 4), (2, 2, 2), (2, 4, 1, 2))

EIGHT_DEVICES = textwrap.dedent("""
    import dataclasses
    import jax, numpy as np
    from flax import nnx
    from llava_jax.infer import passes
    from llava_jax.models import llava
    from llava_jax.models.layers import turned, unstacked
    from llava_jax.parallel.sharding import batch_sharding, make_mesh, param_shardings
    from llava_jax.settings import STAGES
    from llava_jax.train.step import LossConfig, batch_ranks, loss_and_grads
    from llava_jax.types import Batch, MeshSettings
    from tests.test_sharding import KEPT, PRESETS, TIED, TINY

    graphdef, abstract = llava.build(TINY)
    params = llava.init(TINY, 0)
    rng = np.random.default_rng(0)
    B, T = 16, 192
    tokens = rng.integers(1, 60, (B, T)).astype(np.int32)
    tokens[:, 2:6] = tokens[:, 102:106] = TINY.image_token_id
    targets = np.zeros((B, T), bool); targets[:, 8:40] = targets[: B // 2, 180:] = True
    segments = np.where(np.arange(T) < 100, 1, 2) * np.ones((B, 1), np.int32)
    positions = np.where(np.arange(T) < 100, np.arange(T), np.arange(T) - 100) * np.ones((B, 1), np.int32)
    pixels = rng.normal(size=(B, 2, 16, 16, 3)).astype(np.float32)
    batch = Batch(tokens, targets, segments.astype(np.int32), positions.astype(np.int32), pixels, None)
    how = dict(graphdef=graphdef, dtype="float32", packed=True)

    def both(params, batch, stage="finetune", **more):
        grad = jax.jit(lambda trained, frozen, batch: loss_and_grads(trained, frozen, batch, LossConfig(**how, **more)))
        return jax.block_until_ready(grad(*llava.partition(params, STAGES[stage]), batch))

    def close(got, want):
        # Against each leaf's largest entry: gradients of q and k are all smaller than 1e-4.
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
            a, b = np.asarray(a), np.asarray(b)
            worst = np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)
            assert worst <= 1e-5, (jax.tree_util.keystr(path), worst)

    want = {norm: both(params, batch, accumulate=1, loss_norm=norm, ranks=8) for norm in ("global_token", "rank_mean")}
    for sizes in PRESETS:
        mesh = make_mesh(MeshSettings(*sizes))
        ranks = batch_ranks(mesh)
        with jax.set_mesh(mesh):
            placed = jax.device_put(params, param_shardings(llava.logical_axes(TINY), abstract, mesh))
            on = jax.device_put(batch, batch_sharding(mesh))
            close(both(placed, on, accumulate=1, loss_norm="global_token", ranks=ranks), want["global_token"])
            if sizes == (2, 4, 1, 2):
                close(both(placed, on, accumulate=2, loss_norm="global_token", ranks=ranks), want["global_token"])
            if sizes == (8, 1, 1):
                close(both(placed, on, accumulate=1, loss_norm="rank_mean", ranks=ranks), want["rank_mean"])
        print("equal", sizes)

    # Hierarchical: one reduce-scatter of a matrix an axis and weight (seven of the block, projector, head), and a remat
    # policy that keeps matmuls finds those of `matmul`.
    products = {}
    mesh = make_mesh(MeshSettings(1, 8, 1, fsdp_inner=4))
    for remat in ("full", "dots"):
        how["graphdef"], abstract = llava.build(dataclasses.replace(TINY, remat=remat))
        with jax.set_mesh(mesh):
            grad = jax.jit(lambda trained, frozen, batch: loss_and_grads(
                trained, frozen, batch, LossConfig(**how, loss_norm="global_token", ranks=8)))
            placed = jax.device_put(params, param_shardings(llava.logical_axes(TINY), abstract, mesh))
            on = jax.device_put(batch, batch_sharding(mesh))
            traced = grad.trace(*llava.partition(placed, STAGES["finetune"]), on)
        products[remat] = str(traced.jaxpr).count("dot_general")
        scattered = traced.lower().as_text().count("stablehlo.reduce_scatter")
        assert scattered == 18, scattered
    assert products["dots"] < products["full"], products
    print("equal products")

    # A kept weight is not gathered again in the backward pass; without fsdp there is nothing to keep.
    def count(word, sizes, remat):
        how["graphdef"], abstract = llava.build(dataclasses.replace(TINY, remat=remat))
        mesh = make_mesh(MeshSettings(*sizes))
        with jax.set_mesh(mesh):
            placed = jax.device_put(params, param_shardings(llava.logical_axes(TINY), abstract, mesh))
            on = jax.device_put(batch, batch_sharding(mesh))
            grad = jax.jit(lambda trained, frozen, batch: loss_and_grads(
                trained, frozen, batch, LossConfig(**how, loss_norm="global_token", ranks=4)))
            return str(grad.trace(*llava.partition(placed, STAGES["finetune"]), on).jaxpr).count(word)

    for mesh in ((1, 4, 2), (1, 8, 1), (1, 8, 1, 4)):
        none, two = (count("sharding_constraint", mesh, remat) for remat in ("full", "q_weight+up_weight"))
        assert two == none - 2, (mesh, none, two)
    assert count("name=down_weight", (8, 1, 1), "full") == 0 < count("name=down_weight", (1, 8, 1), "full")
    print("equal kept weights")

    # The frozen head, no images, and a head that is the embedding, where every axis is used.
    plain = dict(accumulate=1, loss_norm="global_token")
    text = batch._replace(tokens_BT=np.minimum(tokens, 59), pixels_BNXYC=pixels[:, :0])
    for case, config, data, stage in (
        ("pretrain", TINY, batch, "pretrain"),
        ("text", TINY, text, "finetune"),
        ("tied", dataclasses.replace(TINY, llm=TIED), batch, "finetune"),
        ("kept", KEPT, batch._replace(pixels_BNXYC=pixels[:, [0, 1, 0]]), "finetune"),
    ):
        how["graphdef"], abstract = llava.build(config)
        params = llava.init(config, 0)
        want = both(params, data, stage, ranks=1, **plain)
        mesh = make_mesh(MeshSettings(1, 4, 2, fsdp_inner=2))
        with jax.set_mesh(mesh):
            placed = jax.device_put(params, param_shardings(llava.logical_axes(config), abstract, mesh))
            close(both(placed, jax.device_put(data, batch_sharding(mesh)), stage, ranks=4, **plain), want)
        print("equal", case)

    # Kernels for answers are split as those of training are, in the pass over whole rows and in a step of decoding.
    def last_logits(params, tokens, positions):
        model = llava.unstacked_model(TINY, params | {"llm": unstacked(params["llm"])})
        x, ones = model.llm.embed(tokens), np.ones(tokens.shape, np.int32)
        _, cache = passes.prefill(model.llm, x[:, :8], positions, ones[:, :8])
        return passes.logits(model.llm, passes.extend(model.llm, x[:, 8:9], passes.widened(cache, 16))[0])

    params = llava.init(TINY, 0)
    asked = tokens[:, :9].clip(0, 59), positions[:, :8].astype(np.int32)
    want = jax.jit(last_logits)(params | {"llm": turned(params["llm"])}, *asked)
    mesh = make_mesh(MeshSettings(2, 2, 2))
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, param_shardings(llava.logical_axes(TINY), llava.build(TINY)[1], mesh))
        for_answers = placed | {"llm": jax.jit(turned)(placed["llm"])}
        close(jax.jit(last_logits)(for_answers, *asked), want)
    print("equal kernels for answers")
""")


def test_sharded_loss_and_gradient_equal_the_single_device_ones():
    """Packed rows with images, the loss in more than one chunk, on every preset; accumulation and both stages."""
    env = fast_compile.environment(devices=8)
    done = subprocess.run([sys.executable, "-c", EIGHT_DEVICES], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("equal") == len(PRESETS) + 7
