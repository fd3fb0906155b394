"""Stage lora: what learns, what stays as it is, the kernels in four bits, and adapters merged into the kernels."""

import dataclasses
import json
import re
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

from configs import llava_v1_5
from llava_jax.models import nf4
from llava_jax.models.flops import adapter_weights, step_flops
from llava_jax.models.layers import stored_as
from llava_jax.models.llava import build, join_parts, logical_axes, split_parts
from llava_jax.models.lora import keep_mask
from llava_jax.settings import lora_targets, write_settings
from llava_jax.train import loop
from llava_jax.types import DECODER_LINEARS, InputError, LoraConfig
from llava_jax.weights import hf, load
from llava_jax.weights import source as checkpoints
from llava_jax.weights.adapters import merge_adapters, merge_difference
from llava_jax.weights.convert import convert
from llava_jax.weights.load import read_model
from llava_jax.weights.peft import write_peft
from tests import fast_compile
from tests.test_sharding import TINY
from tests.tiny_run import LLM, change, make_inputs, make_settings, read_metrics, watched_steps

LORA = LoraConfig(rank=4, alpha=8.0, dropout=0.1, targets=("attn/q", "attn/o", "mlp/down"))
CHEAP = "xla_backend_optimization_level=0,xla_llvm_disable_expensive_passes=true"


# ---- settings -------------------------------------------------------------------------------------------------------


def test_targets_are_matched_by_their_whole_path():
    assert lora_targets("llm/layers/(attn/[qkvo]|mlp/(gate|up|down))", "llm") == DECODER_LINEARS
    assert lora_targets("llm/layers/attn/[qv]", "llm") == ("attn/q", "attn/v")
    assert lora_targets(".*down", "llm") == lora_targets(".*down", "vision") == ("mlp/down",)
    for pattern in ("q", "vision/layers/attn/q", "llm/head", ""):
        with pytest.raises(InputError, match=r"matches none of llm/layers/attn/q, .*mlp/down"):
            lora_targets(pattern, "llm")
    with pytest.raises(InputError, match="is not a regular expression"):
        lora_targets("llm/(", "llm")


def test_four_bits_are_for_a_decoder_with_adapters(tmp_path):
    with pytest.raises(InputError, match="train.frozen_dtype=nf4 .*expected stage=lora"):
        make_settings(tmp_path, "finetune", train__frozen_dtype="nf4")


def test_recipe_of_llava_v1_5():
    c, finetune = (llava_v1_5.get_config(f"stage={stage}") for stage in ("lora", "finetune"))
    assert (c.lora.rank, c.lora.alpha, c.lora.dropout) == (128, 256.0, 0.05)
    assert lora_targets(c.lora.targets, "llm") == DECODER_LINEARS
    assert c.optim.lr == 2e-4 and c.optim.groups == "^projector/=2e-5"
    differ = {key for key in c.optim if c.optim[key] != finetune.optim[key]}
    assert differ == {"lr", "groups"} and c.train == finetune.train and c.data == finetune.data and c.init.projector


def test_published_number_of_adapter_weights():
    lora = LoraConfig(128, 256.0, 0.05, DECODER_LINEARS)
    assert round(adapter_weights(load.LLAMAS["vicuna-7b"], lora) / 1e6, 1) == 319.8
    assert round(adapter_weights(load.LLAMAS["vicuna-13b"], lora) / 1e6, 1) == 500.7
    shape = dict(rows=1, length=10, images=0)
    with_adapters = dataclasses.replace(TINY, lora=LORA)
    more = step_flops(with_adapters, ("projector", "lora"), **shape) - step_flops(TINY, ("projector",), **shape)
    assert more == 6 * 10 * adapter_weights(TINY.llm, LORA)


# ---- four bits ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shape, axes, in_dims",
    [
        ((128, 4, 8), ("embed", "heads", "head_dim"), 1),
        ((2, 128, 64), ("heads", "head_dim", "embed"), 2),
        ((48, 64), ("mlp", "embed"), 1),
    ],
)
def test_four_bits_hold_the_nearest_level_of_each_block(shape, axes, in_dims):
    kernel = np.random.default_rng(0).normal(0, 0.02, shape).astype(np.float32)
    codes, scale = jax.jit(lambda k: nf4.quantise(k, axes, in_dims))(kernel)
    inputs = shape[in_dims - 1]
    block = nf4.block_of(inputs)
    assert block == {128: 64, 48: 16}[inputs]
    assert codes.dtype == jnp.uint8 and codes.size == kernel.size // 2 and scale.size == kernel.size // block
    back = np.asarray(nf4.dequantise(codes, scale, axes, in_dims, jnp.float32))

    rows = np.moveaxis(kernel, in_dims - 1, -1).reshape(-1, block)
    largest = np.asarray(jnp.abs(rows).max(-1, keepdims=True).astype(jnp.bfloat16).astype(jnp.float32))
    distance = np.abs(rows[..., None] / largest[..., None] - np.asarray(nf4.LEVELS, np.float32))
    wanted = np.asarray(nf4.LEVELS, np.float32)[distance.argmin(-1)] * largest
    np.testing.assert_array_equal(np.moveaxis(back, in_dims - 1, -1).reshape(-1, block), wanted)
    error = np.sqrt(np.mean((back - kernel) ** 2) / np.mean(kernel**2))
    assert 0.06 < error < 0.11


def test_a_block_of_zeros_stays_zero():
    codes, scale = nf4.quantise(jnp.zeros((64, 2)), ("embed", "mlp"), 1)
    assert not np.any(nf4.dequantise(codes, scale, ("embed", "mlp"), 1, jnp.float32))


def test_levels_are_selected_on_a_tpu_and_looked_up_elsewhere():
    codes = jnp.arange(16, dtype=jnp.uint8)
    selected = jax.jit(nf4._selected)(codes)
    assert selected.tobytes() == jax.jit(nf4._looked_up)(codes).tobytes() == np.float32(nf4.LEVELS).tobytes()
    traced = jax.jit(nf4._level).trace(codes)
    lowered = {name: traced.lower(lowering_platforms=(name,)).as_text() for name in ("tpu", "cuda", "cpu")}
    assert {name: "gather" in text for name, text in lowered.items()} == {"tpu": False, "cuda": True, "cpu": True}


# ---- the model ------------------------------------------------------------------------------------------------------


def test_adapters_are_a_part_of_their_own():
    config = dataclasses.replace(TINY, lora=LORA, nf4=True)
    abstract = build(config)[1]
    parts = split_parts(abstract)
    assert set(parts) == {"vision", "projector", "llm", "lora"}
    axes = split_parts(logical_axes(config))
    jax.tree.map(lambda leaf, names: leaf.ndim - len(names) in (0, 1) or pytest.fail(str(names)), parts, axes)
    q, o = parts["lora"]["layers"]["attn"]["q"], parts["lora"]["layers"]["attn"]["o"]
    assert (q["a"].shape, q["b"].shape) == ((2, 32, 4), (2, 4, 8, 4))
    assert (o["a"].shape, o["b"].shape) == ((2, 8, 4, 4), (2, 4, 32))
    assert set(parts["llm"]["layers"]["mlp"]["up"]["kernel"]) == {"codes", "scale"}
    seeded = jax.eval_shape(lambda p: join_parts(p, jax.random.key(0)), parts)
    assert jax.tree.structure(seeded) == jax.tree.structure(abstract)
    assert jax.tree.leaves(seeded) == jax.tree.leaves(abstract)


def test_dropout_is_fair_and_different_everywhere():
    masks = np.stack([keep_mask((256, 512), jnp.uint32(seed), 0.05) for seed in (0, 1, 2**31)])
    assert abs(1 - masks.mean() - 0.05) < 1e-3
    dropped = (~masks).astype(float)
    assert np.abs(1 - masks.mean((0, 1)) - 0.05).max() < 0.04 and np.abs(1 - masks.mean((0, 2)) - 0.05).max() < 0.04
    for other in (dropped[1], np.roll(dropped[0], 1, 0), np.roll(dropped[0], 1, 1)):
        assert abs((dropped[0] * other).mean() - 0.0025) < 5e-4


# ---- a run ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """(workdir, settings, weights around each update, the inputs' folder) of a run in four bits with dropout."""
    inputs = tmp_path_factory.mktemp("inputs")
    make_inputs(inputs)
    how = dict(train__frozen_dtype="nf4", train__checkpoint_every=2, optim__warmup_ratio=0.0, lora__rank=4)
    how |= dict(lora__dropout=0.2, lora__targets="llm/layers/(attn/[qo]|mlp/down)", train__compiler_options=CHEAP)
    settings = make_settings(inputs, "lora", **how)
    workdir = tmp_path_factory.mktemp("lora")
    once, seen = watched_steps(loop.compile_step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "compile_step", once)
        loop.train(settings, str(workdir))
        again = tmp_path_factory.mktemp("again")
        shutil.copytree(workdir, again, dirs_exist_ok=True)
        shutil.rmtree(again / "checkpoints" / "4")
        (again / "metrics.jsonl").write_text("".join((again / "metrics.jsonl").read_text().splitlines(True)[:2]))
        loop.train(settings, str(again))
    return workdir, settings, seen, again


def test_projector_and_adapters_learn_and_nothing_else_changes_a_bit(ran):
    seen = ran[2]
    assert len(seen) == 6
    frozen, learns = zip(seen[0][0], seen[3][1], strict=True)
    assert set(learns[0]) == {"projector", "lora"} and set(frozen[0]) == {"vision", "llm"}
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.view(np.uint8), b.view(np.uint8)), *frozen)
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.tree.map(lambda a, b: np.any(a != b), *learns)):
        assert leaf, path
    assert frozen[0]["llm"]["layers"]["attn"]["q"]["kernel"]["codes"].dtype == np.uint8


def test_a_run_that_goes_on_draws_what_it_would_have_drawn(ran):
    workdir, _, seen, again = ran
    assert read_metrics(again) == read_metrics(workdir)
    jax.tree.map(np.testing.assert_array_equal, seen[3][1][1], seen[5][1][1])


def test_checkpoints_hold_projector_and_adapters_alone(ran):
    workdir = ran[0]
    _, params, meta = checkpoints.load_params(str(workdir))
    assert set(params) == set(meta["trainable"]) == {"projector", "lora"} and set(meta["frozen"]) == {"vision", "llm"}
    assert set(params["lora"]["layers"]["attn"]) == {"q", "o"}


def test_merged_gives_the_logits_of_the_adapters(ran):
    workdir, settings, seen, _ = ran
    plan, merged, _ = load.load_trained(str(workdir))
    frozen, learnt = seen[3][1]
    config = load.adapted(settings, plan.config)
    calm = dataclasses.replace(config, lora=dataclasses.replace(config.lora, dropout=0.0))
    tokens = np.random.default_rng(0).integers(1, LLM["vocab_size"] - 10, (2, 12))

    def forward(config):
        return jax.jit(lambda p: nnx.merge(build(config)[0], p)(tokens, None))

    with_adapters = forward(calm)
    unmerged = with_adapters(join_parts(stored_as({**frozen, **learnt}, "float32")))
    given = forward(plan.config)(jax.tree.map(np.asarray, merged))
    scale = np.abs(unmerged).max()
    assert np.abs(given - unmerged).max() <= 1e-4 * scale
    zeroed = jax.tree.map(np.zeros_like, learnt["lora"])
    without = with_adapters(join_parts(stored_as({**frozen, **learnt, "lora": zeroed}, "float32")))
    assert np.abs(unmerged - without).max() > 1e-3 * scale


def test_export_merges_and_compares_logits(ran, tmp_path, capsys):
    workdir, settings, seen, _ = ran
    convert(f"orbax:{workdir}", f"hf:{tmp_path}/out")
    said = re.search(r"adapters merged into float32: logits of a probe differ by (\S+) of", capsys.readouterr().out)
    assert 0 < float(said[1]) <= 1e-4
    plan, merged, _ = load.load_trained(str(workdir))
    out = hf.read_llava(f"{tmp_path}/out")[1]["llm"]["layers"]
    jax.tree.map(np.testing.assert_array_equal, out, merged["llm"]["layers"])
    config, lora = load.adapted(settings, plan.config), seen[3][1][1]["lora"]
    base = hf.read_llava(settings.init.model.removeprefix("hf:"), dtype="bfloat16")[1]["llm"]
    assert merge_difference(config, base, lora, merged["llm"]) == pytest.approx(float(said[1]), rel=0.1)
    assert merge_difference(config, base, lora, base) > 1e-2


def test_adapters_as_peft_saves_them(ran, tmp_path):
    workdir, settings, seen, _ = ran
    convert(f"orbax:{workdir}", f"peft:{tmp_path}/out")
    given = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert given["target_modules"] == r".*language_model.*\.(mlp\.down_proj|self_attn\.o_proj|self_attn\.q_proj)"
    assert (given["r"], given["lora_alpha"], given["lora_dropout"]) == (4, 16.0, 0.2)
    assert given["base_model_name_or_path"] == settings.init.model.removeprefix("hf:")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert len(tensors) == 2 * 3 * 2 + 4
    a = seen[3][1][1]["lora"]["layers"]["attn"]["o"]["a"]
    name = "base_model.model.model.language_model.layers.1.self_attn.o_proj.lora_A.weight"
    np.testing.assert_array_equal(tensors[name], a[1].reshape(-1, 4).T)


def test_adapters_of_a_next_are_not_written_without_its_newline(tmp_path):
    config = dataclasses.replace(TINY, lora=LORA, pinpoints=((16, 16),))
    with pytest.raises(InputError, match="image_newline, which peft's format has no place for"):
        write_peft(str(tmp_path / "out"), config, {"lora": {}, "projector": {"image_newline": {}}}, "")


def test_a_run_under_any_name(ran, tmp_path):
    """What adapters make, the run itself and the adapters' folder: none is known by its name."""
    workdir, _settings, _, _ = ran
    config, params, _ = read_model(f"orbax:{workdir}", "model")
    for name in ("zzz", "openai-clip-vicuna"):
        shutil.copytree(workdir, tmp_path / name)
        again, found, _ = read_model(str(tmp_path / name), "model")
        assert again == config
        jax.tree.map(np.testing.assert_array_equal, found, params)
    convert(f"orbax:{tmp_path}/zzz", f"peft:{tmp_path}/clip")
    convert(f"orbax:{workdir}", f"peft:{tmp_path}/out")
    tensors = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("clip", "out")]
    assert all(tensors[0][name].tobytes() == x.tobytes() for name, x in tensors[1].items())


def test_adapters_are_read_back_onto_their_base(ran, tmp_path):
    """A folder of peft as --model: with the base it names, or another one where that is not there."""
    workdir, settings, _, _ = ran
    config, trained = load.load_adapters(str(workdir))
    _, params, extras = hf.read_llava(settings.init.model.removeprefix("hf:"))
    # On the base as it is: in four bits it is only while a run trains on it.
    wanted = merge_adapters(dataclasses.replace(config, nf4=False), params["llm"], trained["lora"], "float32")
    convert(f"orbax:{workdir}", f"peft:{tmp_path}/out")
    base = shutil.copytree(settings.init.model.removeprefix("hf:"), tmp_path / "base")
    for source, given in ((f"peft:{tmp_path}/out", ""), (f"{tmp_path}/out", ""), (f"peft:{tmp_path}/out", str(base))):
        _, found, others = read_model(source, "model", dtype="float32", base=given)
        assert (others.template, others.aspect) == (extras.template, extras.aspect)
        found = jax.tree.map(np.asarray, found)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found["llm"], wanted)
        jax.tree.map(np.testing.assert_array_equal, found["projector"], trained["projector"])
    path = tmp_path / "out" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "gone/base"}))
    with pytest.raises(InputError, match="base of its adapter, 'gone/base', is no folder here.*--base=DIR"):
        read_model(f"{tmp_path}/out", "model")
    with pytest.raises(InputError, match="the folder holds adapters of peft"):
        read_model(f"hf:{tmp_path}/out", "model")


def test_only_a_run_with_adapters_has_some(ran, tmp_path):
    settings = ran[1]
    with pytest.raises(InputError, match="takes the adapters of a run with stage=lora"):
        convert(settings.init.model, f"peft:{tmp_path}/out")
    with pytest.raises(InputError, match="--dtype, .* do not go with --to=peft:DIR"):
        convert(f"orbax:{ran[0]}", f"peft:{tmp_path}/out", dtype="bfloat16")
    other = change(settings, "train", frozen_dtype="float32")
    shutil.copytree(ran[0], tmp_path / "run")
    write_settings(str(tmp_path / "run" / "config.json"), dataclasses.replace(other, stage="finetune"))
    with pytest.raises(InputError, match="is a run of stage finetune, which has no adapters"):
        convert(f"orbax:{tmp_path}/run", f"peft:{tmp_path}/out")


EIGHT_DEVICES = textwrap.dedent("""
    import dataclasses
    import jax, numpy as np
    from llava_jax.models import llava, lora
    from llava_jax.parallel.sharding import batch_sharding, make_mesh, param_shardings
    from llava_jax.models.llava import build, init, partition, split_parts
    from llava_jax.settings import STAGES
    from llava_jax.train.setup import split_rank
    from llava_jax.train.step import LossConfig, batch_ranks, loss_and_grads
    from llava_jax.types import Batch, MeshSettings
    from tests.test_lora import LORA
    from tests.test_sharding import TINY

    rng = np.random.default_rng(0)
    B, T = 8, 48
    tokens = rng.integers(1, 60, (B, T)).astype(np.int32)
    tokens[:, 2:6] = TINY.image_token_id
    targets = rng.random((B, T)) < 0.5
    segments = np.where(np.arange(T) < 24, 1, 2) * np.ones((B, 1), np.int32)
    positions = np.where(np.arange(T) < 24, np.arange(T), np.arange(T) - 24) * np.ones((B, 1), np.int32)
    pixels = rng.normal(size=(B, 1, 16, 16, 3)).astype(np.float32)
    batch = Batch(tokens, targets, segments.astype(np.int32), positions.astype(np.int32), pixels, None)

    def both(config, params, batch, key, **more):
        how = dict(graphdef=llava.build(config)[0], dtype="float32", packed=True, loss_norm="global_token")
        loss = LossConfig(**how, **more)
        grad = jax.jit(lambda trained, frozen, batch: loss_and_grads(trained, frozen, batch, loss, key))
        return jax.block_until_ready(grad(*partition(params, STAGES["lora"]), batch))

    def close(got, want):
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-5)

    config = dataclasses.replace(TINY, lora=LORA, nf4=True, remat="full")
    params = jax.tree.map(np.array, init(config, 0, split_parts(build(config)[1])))
    plain = init(TINY, 0)
    for of in (lambda p: p["projector"], lambda p: p["llm"]["embed"], lambda p: p["llm"]["layers"]["attn_norm"]):
        jax.tree.map(np.testing.assert_array_equal, of(params), of(plain))
    a, b = (params["lora"]["layers"]["attn"]["o"][leaf] for leaf in ("a", "b"))
    assert not b.any() and 0.9 / 32**0.5 < np.abs(a).max() <= 1 / 32**0.5
    print("equal to the model without adapters")
    params["lora"] = jax.tree.map(lambda x: x + rng.normal(0, 0.1, x.shape).astype(np.float32), params["lora"])
    calm = dataclasses.replace(config, lora=dataclasses.replace(LORA, dropout=0.0))
    want = both(calm, params, batch, None, accumulate=1, ranks=1)
    mesh = make_mesh(MeshSettings(2, 2, 2))
    with jax.set_mesh(mesh):
        calm = split_rank(calm, mesh)
        at = llava.split_parts(param_shardings(llava.logical_axes(calm), llava.build(calm)[1], mesh))
        q = at["lora"]["layers"]["attn"]["q"]
        assert not q["a"].is_fully_replicated and q["b"].spec[1] == ("fsdp_outer", "fsdp_inner")
        placed, on = jax.device_put(params, at), jax.device_put(batch, batch_sharding(mesh))
        close(both(calm, placed, on, None, accumulate=2, ranks=4), want)
        print("equal on eight devices, packed, in four bits, in two micro-batches")
        mask = lambda: lora.keep_mask((B, T), jax.numpy.uint32(5), 0.1)
        close(jax.jit(mask, out_shardings=batch_sharding(mesh))(), mask())
        assert not mask().all()
        print("equal dropout")
""")


def test_eight_devices_and_micro_batches_give_the_same_numbers():
    env = fast_compile.environment(devices=8)
    done = subprocess.run([sys.executable, "-c", EIGHT_DEVICES], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("equal") == 3
