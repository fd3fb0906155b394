"""The step's program: the options it is compiled with, and the folder it is kept in."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from llava_jax.parallel import chips
from llava_jax.settings import write_settings
from llava_jax.train import setup as C
from llava_jax.types import InputError
from tests.tiny_run import make_inputs, make_settings, read_metrics

ROOT = pathlib.Path(__file__).parent.parent
FLAG = "xla_cpu_enable_fast_math"


@pytest.mark.parametrize(
    "spec, kind, wanted",
    [
        ("none", "TPU v5", {}),
        ("tuned", "cpu", {}),
        ("tuned", "TPU v5 lite", chips.TUNED["v5e"]),
        ("a=1, b=True,c=x", "cpu", {"a": "1", "b": True, "c": "x"}),
    ],
)
def test_options(spec, kind, wanted):
    assert C.compiler_options(spec, kind) == wanted


@pytest.mark.parametrize("spec", ["tunde", "a=1,b", "=1", "a=", "a=1,"])
def test_what_is_no_option_is_refused(spec):
    with pytest.raises(InputError, match=f"^train.compiler_options={spec}: .*option=value"):
        C.compiler_options(spec, "cpu")


def lowered() -> jax.stages.Lowered:
    return jax.jit(lambda x: x + 1).lower(jnp.ones(3))


@pytest.mark.parametrize(
    "spec, says",
    [("xla_nope=1", "No such compile option: 'xla_nope'"), (f"{FLAG}=perhaps", "'perhaps' is not a valid bool")],
)
def test_what_the_compiler_refuses_is_one_line(spec, says):
    with pytest.raises(InputError) as error:
        C.compile_lowered(lowered(), spec, "cpu")
    assert says in str(error.value) and "train.compiler_options" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("backend, given, kept", [("tpu", None, True), ("cpu", None, False), ("tpu", "/given", False)])
def test_where_programs_are_kept(monkeypatch, backend, given, kept):
    monkeypatch.setattr(C.jax, "default_backend", lambda: backend)
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", given)
        folder = C.keep_compiled()
        assert folder == (os.path.expanduser("~/.cache/llava_jax/compiled") if kept else given or "")
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_the_second_run_takes_its_step_from_the_folder(tmp_path):
    make_inputs(tmp_path)
    settings = make_settings(tmp_path, "pretrain", train__steps=3, data__max_length=32)
    write_settings(str(tmp_path / "settings.json"), settings)
    cache = tmp_path / "cache"
    seen = []
    for name in ("first", "second"):
        environment = dict(JAX_PLATFORMS="cpu", JAX_COMPILATION_CACHE_DIR=str(cache))
        environment["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        words = [sys.executable, "-m", "tests.tiny_run", tmp_path / "settings.json", tmp_path / name]
        subprocess.run(words, cwd=ROOT, env=os.environ | environment, check=True, capture_output=True)
        seen.append({path.name for path in cache.iterdir() if path.name.endswith("-cache")})
    assert any("train_step" in name for name in seen[0])
    assert seen[0] == seen[1]  # nothing was compiled anew
    assert read_metrics(tmp_path / "first") == read_metrics(tmp_path / "second")
    took = [json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0]) for name in ("first", "second")]
    assert all(line["compile_seconds"] > 0 for line in took)
