"""`compile`: what is compiled, what is said of it, and what is refused. Nothing here compiles for more than a chip."""

import contextlib
import ctypes
import dataclasses
import io
import json

import jax
import pytest
from jax.experimental import topologies

from configs import llava_v1_5, tiny
from llava_jax.aot import compile as ahead
from llava_jax.aot import report, sweep, target
from llava_jax.cli import compile as command
from llava_jax.cli.compile import unpacked_without_lengths
from llava_jax.cli.main import main
from llava_jax.data.packing import BatchShape
from llava_jax.parallel.chips import CHIP_OF_KIND, CHIPS
from llava_jax.settings import settings_from_dict
from llava_jax.types import InputError
from tests.test_aot_report import LARGE

GIB = 2**30
TINY = ["--config=configs/tiny.py:stage=finetune", "--config.data.max_length=64", "--config.train.batch_size=2"]


def settings(config=llava_v1_5, **changes):
    """Settings of a config with random towers; `changes` are 'part__key'=value."""
    values = config.get_config("stage=finetune").to_dict()
    values["model"] |= {"llm": "random:tiny", "vision": "random:tiny"}
    for key, value in changes.items():
        part, _, name = key.partition("__")
        values[part][name] = value
    return settings_from_dict(values)


@pytest.fixture
def described(monkeypatch):
    """What libtpu is told, without libtpu."""
    told = {}

    def describe(**given):
        told.update(given)
        return topologies.TopologyDescription([object()] * 4)

    monkeypatch.setattr(topologies, "get_topology_desc", describe)
    return told


# ---- what is compiled for ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, says",
    [
        ("v5e:8x8", ("v5e:8x8", "default", (2, 2, 1), (False, False, False))),
        ("v5e:16x16", ("v5e:16x16", "default", (2, 2, 1), (True, True, False))),
        ("v6e:4x4", ("v6e:4x4", "default", (2, 2, 1), (False, False, False))),
        ("v5p:4x4x4", ("v5:4x4x4", "megacore", (2, 2, 1), (True, True, True))),
        ("v5p:2x2x1", ("v5:2x2x1", "megacore", (2, 2, 1), (False, False, False))),
        ("v5e:1x1", ("v5e:1x1", "default", (1, 1, 1), (False, False, False))),
        ("v7x:2x2x1", ("tpu7x:2x2x1", "default", (2, 2, 1), (False, False, False))),
    ],
)
def test_how_a_topology_is_described(described, name, says):
    found = target.named_target(name, slices=2)
    keys = ("topology_name", "chip_config_name", "chips_per_host_bounds", "wrap")
    assert tuple(described[key] for key in keys) == says
    assert (described["num_slices"], found.slices, found.name) == (2, 2, name)
    chip = CHIPS[name.split(":")[0]]
    assert (found.chip, found.hbm_bytes) == (chip, chip.hbm_bytes)


@pytest.mark.parametrize(
    "name, says",
    [
        ("v8:8x8", "v5e, v5p, v6e, v7x, a100-40g, .*h100"),
        ("v5p:8x8", "3 sizes"),
        ("v7x:8x8", "3 sizes for v7x, such as v7x:4x4x4"),
        ("v5e:8", "2 sizes"),
        ("h100:0", "1 to 8 GPUs, or a multiple of 8, such as h100:8"),
        ("h100:12", "a multiple of 8"),
        ("l40s:2x2", "1 to 8 GPUs"),
        ("h100", "1 to 8 GPUs"),
    ],
)
def test_a_topology_that_is_none(name, says):
    with pytest.raises(InputError, match=says):
        target.named_target(name)


@pytest.mark.parametrize("name, nodes", [("h100:1", "1x1x1"), ("a100-80g:6", "1x1x6"), ("rtx4090:24", "1x3x8")])
def test_how_gpus_are_described(described, monkeypatch, name, nodes):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: None)  # cuDNN is not here
    found = target.named_target(name)
    chip = CHIPS[name.split(":")[0]]
    assert (described["platform"], described["topology"]) == ("cuda", nodes)
    assert (found.chip, found.hbm_bytes, found.layout, found.absent_gpu) == (chip, 0.92 * chip.hbm_bytes, None, True)
    assert f"device_memory_size: {int(chip.hbm_bytes)}" in described["target_config"]


def test_a_card_is_called_as_jax_calls_it_and_fills_its_memory():
    assert {kind: CHIP_OF_KIND[gpu.name] for kind, gpu in target.GPUS.items()} == {
        kind: CHIPS[kind] for kind in target.GPUS
    }


def test_gpus_have_no_slices():
    with pytest.raises(InputError, match="--slices=2: only TPUs have slices; --topology=h100:16 is all GPUs"):
        target.named_target("h100:8", slices=2)


@pytest.mark.parametrize(
    "missing", [NotImplementedError("topology not implemented for cuda"), OSError("libcudnn.so.9")]
)
def test_without_the_cuda_plugin_the_answer_says_what_to_install(monkeypatch, missing):
    def absent(**_):
        raise missing

    monkeypatch.setattr(topologies, "get_topology_desc", absent)
    says = r'h100:1 needs the CUDA plugin of jax and cuDNN, no GPU: pip install -e "\.\[cuda\]" \('
    with pytest.raises(InputError, match=says):
        target.named_target("h100:1")


def test_without_libtpu_the_answer_says_what_to_install(monkeypatch):
    def absent(**_):
        raise RuntimeError("JAX TPU support not installed")

    monkeypatch.setattr(topologies, "get_topology_desc", absent)
    with pytest.raises(InputError, match=r'v5e:8x8 needs libtpu: pip install -e "\.\[tpu\]" \(JAX TPU'):
        target.named_target("v5e:8x8")


def test_local_devices_have_no_known_memory_on_a_cpu():
    found = target.local_target()
    assert (found.chip, found.hbm_bytes, found.layout, found.slices) == (None, None, None, 1)
    assert set(ahead.unknown_reasons(found)) == {"hbm_bytes", "step_seconds"}


# ---- what is compiled -------------------------------------------------------------------------------------------


def test_a_config_needs_no_weights_tokenizer_or_data(tmp_path):
    (tmp_path / "decoder.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 256, "vocab_size": 500}))
    config = ahead.plan_config(settings(model__llm=f"random:{tmp_path}/decoder.json", model__vision="random:tiny"))
    assert (config.llm.width, config.llm.vocab_size, config.image_token_id) == (256, 500, 500)


def test_absent_folders_are_named_with_what_to_give():
    given = settings(model__llm="weights/vicuna-13b-v1.5", model__vision="weights/clip")
    with pytest.raises(InputError) as error:
        ahead.plan_config(given)
    flags = "--config.model.llm=random:vicuna-13b --config.model.vision=random:clip-l-14-336"
    assert "weights/vicuna-13b-v1.5" in str(error.value) and flags in str(error.value)


def test_a_folder_that_is_there_is_read(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 128, "vocab_size": 300}))
    assert ahead.plan_config(settings(model__llm=str(tmp_path))).llm.width == 128


def config_of(**changes):
    return ahead.plan_config(settings(tiny, **changes))


def test_unpacked_rows_are_conversations():
    given = settings(tiny, train__batch_size=16)
    assert ahead.batch_shape(given, config_of(), ways=8, tokens_per_row=None) == BatchShape(16, 1024, 1, None, 16)
    with pytest.raises(InputError, match="train.batch_size=16 does not divide .* multiple of 3"):
        ahead.batch_shape(given, config_of(), ways=3, tokens_per_row=None)


@pytest.mark.parametrize(
    "length, tokens, ways, expected",
    [
        (512, 200, 8, (56, 512)),  # 128 * 200 / (0.985 * 512) = 50.8 rows over 8 ways
        (0, 600, 8, (72, 1152)),  # 77,970 tokens: 9 rows a way of 1083 still hold the longest, 10 do not
        (0, 100, 8, (8, 1664)),  # 1625 tokens a way: one row, as no row is shorter than the longest conversation
        (0, 10, 8, (8, 1024)),
        (0, 600, 64, (64, 1280)),
    ],
)
def test_packed_rows_hold_all_conversations_and_divide(length, tokens, ways, expected):
    given = settings(tiny, train__batch_size=128, data__pack=True, data__pack_length=length)
    shape = ahead.batch_shape(given, config_of(), ways=ways, tokens_per_row=tokens)
    assert (shape.rows, shape.length) == expected
    assert shape.rows * shape.images >= 128 == shape.images_used
    assert shape.rows * shape.length * 0.985 >= 128 * tokens


def test_more_shards_than_conversations_are_refused_as_by_train():
    given = settings(tiny, train__batch_size=16, data__pack=True)
    with pytest.raises(InputError, match="train.batch_size=16 is less than 32 device shards"):
        ahead.batch_shape(given, config_of(), ways=32, tokens_per_row=100)


def test_packed_rows_need_the_mean_length():
    with pytest.raises(InputError, match="tokens_per_row"):
        ahead.batch_shape(settings(tiny, data__pack=True), config_of(), ways=8, tokens_per_row=None)


def test_a_config_that_packs_is_compiled_unpacked_until_a_length_is_given():
    packs = settings(tiny, data__pack=True)
    alone, said = unpacked_without_lengths(packs, None)
    assert alone == settings(tiny) and said.endswith("--tokens_per_row=N compiles packed ones")
    assert unpacked_without_lengths(packs, 300.0) == (packs, "packed")
    given = settings(tiny, data__pack=True, data__pack_length=512)
    assert unpacked_without_lengths(given, None) == (given, "packed")  # refused next: its rows are not known


# ---- figures ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def local():
    """The step of a tiny model, lowered for one of this machine's devices."""
    one = dataclasses.replace(target.local_target(), devices=jax.devices()[:1])
    return ahead.lower(settings(tiny, data__max_length=64, train__batch_size=2), one)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(what the command prints, its figures, the program) for all of this machine's devices."""
    folder = tmp_path_factory.mktemp("plan")
    size = f"--config.train.batch_size={2 * len(jax.devices())}"
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert run(size, "--rows=100", f"--json={folder}/compile.json", f"--hlo={folder}/compile.hlo") == 0
    return said.getvalue(), json.loads((folder / "compile.json").read_text()), (folder / "compile.hlo").read_text()


def run(*argv: str) -> int:
    return main(["compile", *TINY, f"--config.mesh.fsdp={len(jax.devices())}", *argv])


CONTRACT = (
    "chips topology parameters trainable argument_bytes temporary_bytes peak_bytes hbm_bytes fits model_flops flops "
    "step_seconds mfu breakdown compile_seconds"
).split()


def test_figures_hold_the_contract(written):
    _, figures, text = written
    assert set(CONTRACT) <= set(figures)
    assert figures["parameters"] == sum(figures["parameters_by_part"].values()) > figures["trainable"] > 0
    assert figures["trainable"] == figures["parameters_by_part"]["llm"] + figures["parameters_by_part"]["projector"]
    assert figures["peak_bytes"] >= figures["argument_bytes"] + figures["temporary_bytes"] > figures["state_bytes"]
    assert figures["donated_whole"] and text.startswith("HloModule")
    assert figures["fits"] is figures["step_seconds"] is figures["mfu"] is figures["flops"] is None
    # Parameters, two moments and three counters.
    assert figures["state_bytes"] == 12 * figures["trainable"] + 3 * 4


def test_an_absent_gpu_is_compiled_without_trying_kernels_and_with_room_for_cudnn(local, monkeypatch):
    config = dataclasses.replace(local.run.config, attention="cudnn")
    gpu = dataclasses.replace(local.target, absent_gpu=True, hbm_bytes=GIB)
    absent = dataclasses.replace(local, target=gpu, run=local.run._replace(config=config))
    given = []

    def compile_lowered(lowered, spec, kind, defaults):
        given.append(defaults)
        return lowered.compile()

    monkeypatch.setattr(ahead, "compile_lowered", compile_lowered)
    figures, here = (ahead.compile_plan(lowered)[0] for lowered in (absent, local))
    assert given == [{"xla_gpu_enable_triton_gemm": False}, None]
    # 2 rows of 64 tokens, 4 heads of 16: the queries' gradient in float32.
    assert figures["workspace_bytes"] == 4 * 2 * 64 * 4 * 16 == figures["peak_bytes"] - here["peak_bytes"]
    assert here["workspace_bytes"] == 0 and not here["absent_gpu"]
    assert figures["fits"] and "XLA_PYTHON_CLIENT_MEM_FRACTION" in report.report(figures)


def test_the_hash_is_of_the_program(local):
    again = ahead.lower(local.settings, local.target)
    other = ahead.lower(dataclasses.replace(local.settings, stage="pretrain"), local.target)
    assert again.hash == local.hash != other.hash


@pytest.mark.parametrize(
    "message, arguments, needed",
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 54.50G of 15.75G hbm. Exceeded hbm "
            "capacity by 38.75G.",
            1 * GIB,
            54.5,
        ),
        (
            "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (51.43G) "
            "exceeds available HBM (15.75G).",
            2 * GIB,
            53.43,
        ),
    ],
)
def test_a_program_that_is_refused_says_by_how_much(message, arguments, needed):
    refused = ahead.refusal(message, arguments)
    assert (refused["fits"], refused["hbm_bytes"]) == (False, 15.75 * GIB)
    assert refused["peak_bytes"] == pytest.approx(needed * GIB, abs=2)
    assert refused["over_bytes"] == pytest.approx((needed - 15.75) * GIB, abs=2)


@pytest.mark.parametrize(
    "message", ["INVALID_ARGUMENT: no such option", "Ran out of memory in memory space vmem. Used 9M of 8M"]
)
def test_another_error_is_no_refusal(message):
    assert ahead.refusal(message, 0) is None


def test_forbidden_shapes_are_those_of_one_chip(local):
    scores, logits = ahead.forbidden_shapes(local)
    assert (2, 4, 64, 64) in scores and (8, 64, 64) in scores
    assert (2, 64, 2048) in logits and (2, 63, 2048) in logits and (128, 2048) in logits


# ---- the sweep --------------------------------------------------------------------------------------------------


def test_grids():
    devices = dataclasses.replace(target.local_target(), devices=[None] * 64)
    grid = sweep.parse_grid(None, None, None, settings(tiny), devices)
    assert grid == sweep.Grid((2, 4, 8), ("full", "minimal"), ((1, 64, 1), (2, 32, 1)))
    given = sweep.parse_grid("4,1", "none", "1x32x2,64x1x1", settings(tiny), devices)
    assert given == sweep.Grid((4, 1), ("none",), ((1, 32, 2), (64, 1, 1)))
    inner = settings(mesh__fsdp_inner=16)
    assert sweep.parse_grid(None, None, None, inner, devices).meshes == ((1, 64, 1), (2, 32, 1))
    assert sweep.parse_grid(None, None, "4x16x1", inner, devices).meshes == ((4, 16, 1),)
    with pytest.raises(InputError, match="FSDP is not a multiple of mesh.fsdp_inner=16"):
        sweep.parse_grid(None, None, "8x8x1", inner, devices)
    for bad in (("0", None, None), ("a", None, None), (None, "most", None), (None, None, "8x8"), (None, None, "1x8x1")):
        with pytest.raises(InputError, match="--sweep_|train.remat"):
            sweep.parse_grid(*bad, settings(tiny), devices)


def test_grids_of_slices_spread_the_data_over_them():
    devices = dataclasses.replace(target.local_target(), devices=[None] * 64, slices=2)
    grid = sweep.parse_grid(None, None, None, settings(tiny), devices)
    assert grid.meshes == ((2, 32, 1), (4, 16, 1))
    with pytest.raises(InputError, match="multiple of 2"):
        sweep.parse_grid(None, None, "1x64x1", settings(tiny), devices)


def test_a_packed_point_has_the_rows_it_is_called_by(monkeypatch):
    monkeypatch.setattr(sweep, "lower", lambda given, *_: given)
    monkeypatch.setattr(sweep, "compile_plan", lambda given: ({"fits": True, "settings": given}, ""))
    given = settings(tiny, data__pack=True)
    grid = sweep.Grid((1, 2, 8), ("full",), ((2, 4, 1),))
    for rows, figures in zip(grid.rows, sweep.plans(given, target.local_target(), grid, 300), strict=True):
        shape = ahead.batch_shape(figures["settings"], config_of(), ways=8, tokens_per_row=300)
        assert (shape.rows, shape.length) == (8 * rows, 1024)


def test_larger_batches_are_not_tried_where_a_smaller_one_does_not_fit(monkeypatch):
    tried = []

    def lower(given, target, tokens_per_row):
        tried.append((given.train.remat, given.train.batch_size))
        return given

    def compile_plan(given):
        fits = given.train.remat == "full" or given.train.batch_size <= 64
        return {"fits": fits, "rows": given.train.batch_size, "step_seconds": 1.0}, ""

    monkeypatch.setattr(sweep, "lower", lower)
    monkeypatch.setattr(sweep, "compile_plan", compile_plan)
    grid = sweep.Grid((4, 1, 2), ("full", "none"), ((1, 64, 1),))
    found = list(sweep.plans(settings(tiny), target.local_target(), grid, None))
    assert tried == [("full", 64), ("full", 128), ("full", 256), ("none", 64), ("none", 128)]
    assert found[-1]["skipped"] == "not compiled: 2 rows do not fit"
    assert report.sweep_line(found[-1]).endswith("not compiled: 2 rows do not fit")


# ---- the command ------------------------------------------------------------------------------------------------


def test_the_command_says_what_it_compiles_and_what_it_does_not_know(written):
    said = written[0]
    for part in ("attention xla", "temporaries", "unknown (cpu: memory", "`train` measures it", "steps of"):
        assert part in said


def test_the_sweep_of_local_devices(tmp_path, capsys):
    mesh = f"--sweep_mesh=1x{len(jax.devices())}x1"
    assert run("--sweep", "--sweep_rows=1", "--sweep_remat=none", mesh, f"--json={tmp_path}/sweep.json") == 0
    said = capsys.readouterr().out
    assert "1 program, a minute" in said and "no time is known here, so none is called the best" in said
    written = json.loads((tmp_path / "sweep.json").read_text())
    assert [(plan["remat"], plan["rows"], plan["fits"]) for plan in written["plans"]] == [
        ("none", len(jax.devices()), None)
    ]
    assert written["best"] is None


@pytest.mark.parametrize(
    "argv, says",
    [
        (["--slices=2"], "--slices=2"),
        (["--rows=0"], "--rows=0"),
        (["--json=no/such/compile.json"], "no folder 'no/such'"),
        (["--hlo=tests"], "is a folder"),
        (["--sweep_rows=2"], "need --sweep"),
        (["--sweep", "--hlo=x"], "--hlo"),
        (["--topology=v4:8x8"], "expected one of v5e, v5p, v6e"),
    ],
)
def test_bad_flags_are_one_line(argv, says, capsys, monkeypatch):
    monkeypatch.setattr(command, "ENVIRONMENT", {})
    assert run(*argv) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and says in error


def test_what_does_not_fit_exits_with_1(monkeypatch, capsys):
    figures = {**LARGE, "compile_seconds": 1.0}
    monkeypatch.setattr(ahead, "compile_plan", lambda lowered: (figures, ""))
    size = f"--config.train.batch_size={2 * len(jax.devices())}"
    assert run(size) == 1
    assert "does not fit" in capsys.readouterr().out
