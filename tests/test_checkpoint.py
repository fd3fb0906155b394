"""Checkpoints: exact, strict about shapes and dtypes, and able to step over a damaged one."""

import errno
import hashlib
import os
import pathlib
import shutil
from unittest import mock

import absl.logging
import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from llava_jax.settings import read_settings, write_settings
from llava_jax.train import checkpoint as C
from llava_jax.types import InputError, Settings
from llava_jax.weights.source import earlier_configs, load_params, run_fingerprint
from tests.faults.corruptions import DAMAGES, STEPS, State, attempt, like, make_state, numbers, same, write
from tests.tiny_run import change, make_settings


def read(workdir: pathlib.Path, wanted: State | None = None):
    data = numbers()
    with C.open_manager(str(workdir), 5) as manager:
        found = C.restore(str(workdir), manager, wanted or like(make_state(0)), data)
        return found, next(data), manager.latest_step()


def test_state_data_and_meta_come_back(tmp_path):
    write(tmp_path, [2, 3])
    (state, meta), element, _ = read(tmp_path)
    assert (
        same(state, make_state(3)) and isinstance(state, State) and meta == {"stage": "pretrain", "frozen": {"llm": 3}}
    )
    expected = numbers()
    assert element == [next(expected) for _ in range(4)][3]


def test_nothing_there_is_none_and_old_ones_go(tmp_path):
    assert read(tmp_path)[0] is None
    write(tmp_path, [1, 2, 3], keep=2)
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["2", "3"]


@pytest.mark.parametrize(
    "wanted, says",
    [
        (lambda s: s._replace(params={"projector": {"linear_1": {"bias": s.step}}}), "absent"),
        (lambda s: s._replace(step=jax.ShapeDtypeStruct((2,), np.int32)), "step: ((), 'int32') there"),
        (lambda s: s._replace(step=jax.ShapeDtypeStruct((), np.float32)), "((), 'float32') expected"),
        (lambda s: s._replace(opt_state=()), "opt_state/0/"),
    ],
)
def test_another_tree_shape_or_dtype_is_refused(tmp_path, wanted, says):
    write(tmp_path, [2])
    with pytest.raises(InputError) as error:
        read(tmp_path, wanted(like(make_state(0))))
    assert says in str(error.value)
    assert os.listdir(tmp_path / "checkpoints") == ["2"]  # what does not fit is not damaged


def test_clipping_may_be_turned_on_after_a_save(tmp_path):
    """It is a part of the optimizer that holds nothing; tests/test_loop.py turns it off."""
    write(tmp_path, [2])
    wanted = like(make_state(0))
    (state, _), _, _ = read(tmp_path, wanted._replace(opt_state=(optax.EmptyState(), *wanted.opt_state)))
    saved = make_state(2)
    assert same(state, saved._replace(opt_state=(optax.EmptyState(), *saved.opt_state)))
    assert isinstance(state.opt_state[1], optax.ScaleByAdamState)


def damaged_files(step: pathlib.Path) -> list[pathlib.Path]:
    """The files without which a checkpoint cannot be right."""
    data = max((p for p in (step / "state").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    return [data, step / "state" / "_METADATA", step / "meta" / "metadata", step / "data" / "metadata"]


@pytest.mark.parametrize(
    "which, damage",
    [(0, "truncated"), (3, "gone")],
)
def test_a_damaged_checkpoint_is_reported_and_stepped_over(tmp_path, capsys, which, damage):
    write(tmp_path, [2, 3])
    path = damaged_files(tmp_path / "checkpoints" / "3")[which]
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (state, _), element, latest = read(tmp_path)
    assert same(state, make_state(2)) and latest == 2
    expected = numbers()
    assert element == [next(expected) for _ in range(3)][2]
    said = capsys.readouterr().out
    assert f"{tmp_path}/checkpoints/3 is damaged (" in said and f"to {tmp_path}/damaged/3" in said
    write(tmp_path, [4])  # and the run can save again
    assert int(read(tmp_path)[0][0].step) == 4


def test_stray_folders_are_stepped_over(tmp_path):
    write(tmp_path, [2])
    (tmp_path / "checkpoints" / "9").mkdir()
    assert int(read(tmp_path)[0][0].step) == 2


def test_nothing_readable_is_an_error_not_a_new_start(tmp_path):
    write(tmp_path, [2])
    damaged_files(tmp_path / "checkpoints" / "2")[0].unlink()
    with pytest.raises(InputError, match=r"all of the checkpoints \[2\] are damaged"):
        read(tmp_path)
    assert os.listdir(tmp_path / "checkpoints") == ["2"]


def test_load_params_for_inference(tmp_path):
    write(tmp_path, [2, 3])
    step, params, meta = load_params(str(tmp_path))
    assert step == 3 and same(params, make_state(3).params) and meta["frozen"] == {"llm": 3}
    assert load_params(str(tmp_path), 2)[0] == 2
    with pytest.raises(InputError, match="no checkpoint of step 7"):
        load_params(str(tmp_path), 7)
    damaged_files(tmp_path / "checkpoints" / "3")[0].unlink()
    with pytest.raises(
        InputError, match=r"checkpoints/3: the checkpoint is damaged .*checkpoints/2 is whole: .*--step=2"
    ):
        load_params(str(tmp_path))
    assert load_params(str(tmp_path), 2)[0] == 2
    damaged_files(tmp_path / "checkpoints" / "2")[0].unlink()
    with pytest.raises(InputError, match=r"checkpoints/3: the checkpoint is damaged \(.*\), nor one before it"):
        load_params(str(tmp_path))
    with pytest.raises(InputError, match="no checkpoint, expected"):
        load_params(str(tmp_path / "elsewhere"))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("run")
    write(workdir, STEPS)
    return workdir


@pytest.mark.parametrize("kind", DAMAGES)
def test_no_damage_is_restored(run, kind):
    """`python -m tests.faults.corruptions` tries 200."""
    assert attempt(run, kind, 0) == ""


def test_a_disk_that_fails_is_no_damage(tmp_path, monkeypatch):
    """Of each step with hashes and of each without, nothing is set aside; the message says that it may be whole."""
    write(tmp_path, [2])
    monkeypatch.setattr(hashlib, "file_digest", mock.Mock(side_effect=OSError(errno.EIO, os.strerror(errno.EIO))))
    for _ in range(2):
        for reader in (read, lambda workdir: load_params(str(workdir))):
            with pytest.raises(InputError, match="which does not mean that it is damaged"):
                reader(tmp_path)
        shutil.rmtree(tmp_path / "checkpoints" / "2" / "manifest", ignore_errors=True)
        monkeypatch.undo()
        monkeypatch.setattr(
            ocp.PyTreeCheckpointHandler, "restore", mock.Mock(side_effect=ValueError("Stale file handle"))
        )
    assert os.listdir(tmp_path) == ["checkpoints"]


def test_a_checkpoint_of_an_earlier_version_is_read(tmp_path, capsys):
    write(tmp_path, [2])
    shutil.rmtree(tmp_path / "checkpoints" / "2" / "manifest")
    assert same(load_params(str(tmp_path))[1], make_state(2).params)
    assert int(read(tmp_path)[0][0].step) == 2
    said = capsys.readouterr()
    assert said.err.count("without hashes") == said.out.count("without hashes") == 1


def test_what_is_not_finite_is_not_saved(tmp_path):
    state = make_state(2)
    slots = jax.tree.map(lambda x: x * np.nan if x.ndim else x, state.opt_state)
    for bad in (
        state._replace(params=jax.tree.map(lambda x: x * np.inf, state.params)),
        state._replace(opt_state=slots),
    ):
        with (
            pytest.raises(InputError, match="the state after step 2 is not finite and was not saved"),
            C.open_manager(str(tmp_path), 5) as manager,
        ):
            C.save(manager, bad, numbers(2), {})
    assert not os.listdir(tmp_path / "checkpoints")


def test_a_save_needs_room_before_it_begins(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: mock.Mock(free=17_000))  # three arrays of 4.8 kB
    with pytest.raises(InputError, match=r"0.00 GB are free, a checkpoint takes 0.00; make room"):
        write(tmp_path, [2])
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: mock.Mock(free=18_000))
    write(tmp_path, [2])


def test_state_and_data_are_of_one_step(tmp_path):
    with C.open_manager(str(tmp_path), 5) as manager, pytest.raises(RuntimeError, match="does not belong"):
        C.save(manager, make_state(2), numbers(3), {})


def test_saving_the_same_step_again_is_no_error(tmp_path):
    write(tmp_path, [2])
    write(tmp_path, [2])
    assert int(read(tmp_path)[0][0].step) == 2


def test_a_save_that_orbax_refuses_is_an_error(tmp_path):
    write(tmp_path, [3])
    with C.open_manager(str(tmp_path), 5) as manager, pytest.raises(RuntimeError, match="step 2"):
        C.save(manager, make_state(2), numbers(2), {})


def test_only_a_save_is_blamed_for_a_full_disk(tmp_path):
    """The metrics are written while the manager is open; and the log of the run stays what it was."""
    verbosity = absl.logging.get_verbosity()
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left") as error, C.open_manager(str(tmp_path), 5) as manager:
        assert absl.logging.get_verbosity() == verbosity
        with (
            pytest.raises(InputError, match=f"{tmp_path}/checkpoints: cannot be written"),
            pytest.MonkeyPatch.context() as p,
        ):
            p.setattr(manager, "save", mock.Mock(side_effect=full))
            C.save(manager, make_state(2), numbers(2), {})
        raise full
    assert error.value is full


def start(workdir: pathlib.Path, settings: Settings) -> None:
    """What a run does around its updates."""
    with C.hold_workdir(str(workdir), settings):
        write_settings(str(workdir / "config.json"), settings)


def test_workdir_of_another_config_is_refused(tmp_path):
    settings = make_settings(tmp_path, "pretrain")
    start(tmp_path / "run", settings)
    start(tmp_path / "run", change(settings, "optim", b1=0.5))  # nothing trained yet
    write(tmp_path / "run", [2])
    with pytest.raises(InputError) as error:
        start(tmp_path / "run", change(settings, "train", steps=9))
    assert "optim.b1: 0.5 there, 0.9 asked for; train.steps: 4 there, 9 asked for" in str(error.value)
    free = change(change(settings, "train", log_every=7, checkpoint_every=1, keep=9, profile=2), "data", workers=2)
    start(tmp_path / "run", change(free, "optim", b1=0.5))


@pytest.mark.parametrize("changes", [dict(accumulate=2), dict(fsdp=1)], ids=str)
def test_how_a_batch_is_split_is_free_where_no_number_depends_on_it(tmp_path, changes):
    """The dropout of adapters draws by a token's place in the microbatch."""
    for stage, dropout, free in (("finetune", 0.1, True), ("lora", 0.0, True), ("lora", 0.1, False)):
        settings = make_settings(tmp_path, stage, lora__dropout=dropout)
        workdir = tmp_path / f"{stage}-{dropout}"
        start(workdir, settings)
        write(workdir, [2])
        other = change(settings, "train" if "accumulate" in changes else "mesh", **changes)
        if free:
            C.check_workdir(str(workdir), other)
            continue
        with pytest.raises(InputError, match=f"{next(iter(changes))}: .* there, {next(iter(changes.values()))} asked"):
            C.check_workdir(str(workdir), other)


def test_a_relative_path_is_the_same_config(tmp_path, monkeypatch):
    settings = make_settings(tmp_path, "pretrain")
    start(tmp_path / "run", settings)
    write(tmp_path / "run", [2])
    monkeypatch.chdir(tmp_path)
    relative = change(settings, "data", annotations="captions.json", images="images/")
    relative = change(relative, "init", model="hf:llava")
    C.check_workdir(str(tmp_path / "run"), relative)
    monkeypatch.chdir("/")
    with pytest.raises(InputError, match="data.annotations"):
        C.check_workdir(str(tmp_path / "run"), relative)


@pytest.mark.parametrize("text", ['{"model_type": "llava"}', "{}", "no json"])
def test_a_config_json_that_is_no_runs_is_left_alone(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InputError, match="config.json is not that of a run"):
        start(tmp_path, make_settings(tmp_path, "pretrain"))
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("config.json", text)]


def test_one_trainer_a_workdir(tmp_path):
    settings = make_settings(tmp_path, "pretrain")
    with C.hold_workdir(str(tmp_path / "run"), settings):
        with pytest.raises(InputError, match="another train is running in it"):
            start(tmp_path / "run", settings)
    start(tmp_path / "run", settings)


def test_fingerprint_is_of_the_newest_checkpoint(tmp_path):
    write(tmp_path, [2])
    first = run_fingerprint(str(tmp_path))
    assert run_fingerprint(str(tmp_path)) == first
    write(tmp_path, [3])
    second = run_fingerprint(str(tmp_path))
    (tmp_path / "checkpoints" / "3" / "meta" / "metadata").write_text("{}")
    assert len({first, second, run_fingerprint(str(tmp_path))}) == 3


def test_workdir_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(InputError, match="is a file"):
        start(tmp_path / "run", make_settings(tmp_path, "pretrain"))


def test_changed_keys_are_kept_for_the_updates_that_they_made(tmp_path):
    first = make_settings(tmp_path, "finetune")
    slow, clipped = (change(first, "optim", **values) for values in (dict(lr=1e-5), dict(clip_norm=0.5)))

    def kept() -> dict[int, Settings]:
        return {
            step: read_settings(str(tmp_path / f"config.until-{step}.json")) for step in earlier_configs(str(tmp_path))
        }

    first = C.absolute_paths(first)
    for settings, step, expected in (
        (first, 0, {}),
        (slow, 40, {40: first}),
        (slow, 40, {40: first}),  # killed before the next checkpoint
        (clipped, 30, {30: first}),  # the checkpoint at 40 was moved away: what was slow is gone with it
        (slow, 60, {30: first, 60: C.absolute_paths(clipped)}),
        (first, 20, {}),
    ):
        C.write_config(str(tmp_path), C.absolute_paths(settings), step)
        assert kept() == expected
        assert read_settings(str(tmp_path / "config.json")) == C.absolute_paths(settings)
