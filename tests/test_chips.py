"""The chips' figures, and the names jax calls them by."""

import os

import pytest

from llava_jax.cli.main import main
from llava_jax.parallel.chips import CHIP_OF_KIND, CHIPS, GPU_FRACTION
from llava_jax.train.setup import compiler_options


def test_every_kind_is_a_chip():
    assert set(CHIP_OF_KIND.values()) == set(CHIPS.values())
    assert all(chip.name == name for name, chip in CHIPS.items())


@pytest.mark.parametrize(
    "kind, name",
    [("TPU v5 lite", "v5e"), ("TPU v5", "v5p"), ("TPU v6 lite", "v6e"), ("TPU7x", "v7x"), ("NVIDIA H200", "h200")],
)
def test_chip_of_a_device(kind, name):
    assert CHIP_OF_KIND[kind] is CHIPS[name]


@pytest.mark.parametrize("kind", ["cpu", "TPU v99", "NVIDIA H100 PCIe", ""])
def test_an_unknown_device_has_no_chip(kind):
    assert kind not in CHIP_OF_KIND
    assert compiler_options("tuned", kind) == {}


def test_every_command_leaves_xla_the_share_of_a_gpu_that_compile_counts_on(monkeypatch):
    name = "XLA_PYTHON_CLIENT_MEM_FRACTION"
    monkeypatch.delenv(name, raising=False)
    main(["train"])
    assert float(os.environ[name]) == GPU_FRACTION
    monkeypatch.setenv(name, "0.5")
    main(["train"])
    assert os.environ[name] == "0.5"


def test_clocks_and_peaks_agree():
    # Multiply-adds a cycle are a whole number of 128 or 256 wide systolic arrays: 4 of 128 on v5e, and so on.
    per_cycle = {name: CHIPS[name].peak_flops / CHIPS[name].clock for name in ("v5e", "v5p", "v6e")}
    assert per_cycle == pytest.approx({"v5e": 131_072, "v5p": 262_144, "v6e": 524_288}, rel=0.01)


def test_compiler_options_are_of_the_chip_and_not_shared():
    options = compiler_options("tuned", "TPU v5 lite")
    assert options["xla_tpu_scoped_vmem_limit_kib"] == "32768" and "xla_enable_async_reduce_scatter_fusion" in options
    options["more"] = "true"
    assert "more" not in compiler_options("tuned", "TPU v5 lite")
    assert compiler_options("tuned", "TPU v5")["xla_tpu_enable_sparse_core_collective_offload_all_reduce"] == "true"
    assert compiler_options("tuned", "NVIDIA H200") == {}
