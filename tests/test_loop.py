"""A stage from settings to saved weights, in this process: what moves, what is refused, what comes out."""

import contextlib
import dataclasses
import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest

from llava_jax.data import validate
from llava_jax.data.rows import Rejected
from llava_jax.data.tokenize import load_tokenizer
from llava_jax.models.llava import build
from llava_jax.settings import read_settings
from llava_jax.train import loop, profiler
from llava_jax.types import Batch, InputError
from llava_jax.weights import load
from llava_jax.weights import source as checkpoints
from tests.tiny_run import change, make_inputs, make_settings, read_metrics


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


@dataclasses.dataclass
class Ran:
    workdir: pathlib.Path
    settings: object
    steps: list
    jitted: object
    frozen: tuple
    trainable: tuple
    screen: str


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory):
    """Runs of both stages, the second from the first one's projector, with the weights before and after each."""
    made = {}

    def run(stage: str) -> Ran:
        if stage not in made:
            start = str(run("pretrain").workdir) if stage == "finetune" else ""
            settings = make_settings(inputs, stage, init__projector=start, train__checkpoint_every=2)
            made[stage] = record(settings, tmp_path_factory.mktemp(stage))
        return made[stage]

    return run


def record(settings, workdir: pathlib.Path) -> Ran:
    """Trains, with copies of the weights from around the updates."""
    seen = {"steps": []}
    inner, compile_step = loop.run_updates, loop.compile_step

    def compiling(*args):
        made = compile_step(*args)
        seen["steps"].append(made[0])
        return made

    def around(run, state, frozen, data, **how):
        before = jax.tree.map(np.array, (frozen, state.params))
        state = inner(run, state, frozen, data, **how)
        after = jax.tree.map(np.array, (frozen, state.params))
        seen.update(jitted=run.step, frozen=(before[0], after[0]), trainable=(before[1], after[1]))
        return state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "run_updates", around)
        patch.setattr(loop, "compile_step", compiling)
        lines = []
        patch.setattr("builtins.print", lambda *words, **_: lines.append(" ".join(map(str, words))))
        loop.train(settings, str(workdir))
    return Ran(workdir, settings, screen="\n".join(lines), **seen)


@pytest.mark.parametrize("stage, moved", [("pretrain", {"projector"}), ("finetune", {"projector", "llm"})])
def test_trainable_leaves_all_change_and_frozen_ones_not_a_bit(runs, stage, moved):
    ran = runs(stage)
    before, after = ran.trainable
    assert set(before) == moved and set(ran.frozen[0]) == {"vision", "projector", "llm"} - moved
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves(after), strict=True):
        assert x.dtype == np.float32 and not np.array_equal(x, y), path
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x.view(np.uint8), y.view(np.uint8)), *ran.frozen)


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_one_compile_a_stage(runs, stage):
    """The loop calls the program that it compiled ahead, which takes one shape; the jitted step is never called."""
    ran = runs(stage)
    assert len(ran.steps) == 1 and isinstance(ran.steps[0], jax.stages.Compiled)
    assert ran.jitted._cache_size() == 0


def test_the_second_stage_starts_from_the_firsts_projector(runs):
    first, second = runs("pretrain"), runs("finetune")
    jax.tree.map(np.testing.assert_array_equal, first.trainable[1]["projector"], second.trainable[0]["projector"])


def test_workdir_holds_what_the_contract_says(runs):
    ran = runs("finetune")
    assert json.loads((ran.workdir / "config.json").read_text()) == dataclasses.asdict(ran.settings)
    assert [row["step"] for row in read_metrics(ran.workdir)] == [0, 1, 2, 3]
    assert sorted(p.name for p in (ran.workdir / "checkpoints").iterdir()) == ["2", "4"]
    for said in (
        "stage finetune: 4 steps of 4 conversations",
        "batches of 4 x 80 tokens with 1 images a row",
        "trainable",
        "frozen",
        "compiled in",
        "4/4 steps done",
    ):
        assert said in ran.screen


def test_the_trained_model_comes_back_whole(runs):
    ran = runs("finetune")
    plan, params, settings = load.load_trained(str(ran.workdir))
    assert settings == ran.settings and plan.config.image_token_id == 700
    jax.tree.map(np.testing.assert_array_equal, params, {**ran.frozen[0], **ran.trainable[1]})


def test_starting_again_when_done_changes_nothing(runs, capsys):
    ran = runs("pretrain")
    files = {p: p.read_bytes() for p in ran.workdir.rglob("*") if p.is_file() and "events" not in p.name}
    loop.train(ran.settings, str(ran.workdir))
    assert "4/4 steps done" in capsys.readouterr().out
    assert files == {p: p.read_bytes() for p in files}


def test_named_keys_may_change_when_a_run_resumes(runs, tmp_path, capsys):
    """Said, and recorded: the config until there is kept. Clipping off is another tree of the optimizer's state."""
    ran = runs("pretrain")
    shutil.copytree(ran.workdir, tmp_path / "run")
    (tmp_path / "ids.txt").write_text("caption-4\n\ncaption-0\n")
    before = ran.settings.optim
    settings = change(ran.settings, "optim", lr=before.lr / 2, clip_norm=0.0)
    settings = change(settings, "data", exclude=str(tmp_path / "ids.txt"))
    loop.train(settings, str(tmp_path / "run"))
    said = capsys.readouterr().out
    assert f"optim.lr: {before.lr!r} until update 4, {before.lr / 2!r} from there on\n" in said
    assert f"optim.clip_norm: {before.clip_norm!r} until update 4, 0.0 from there on\n" in said
    assert "ids.txt leaves out 2 of 7 rows" in said and "resuming at step 4" in said
    until, now = (read_settings(str(tmp_path / "run" / name)) for name in ("config.until-4.json", "config.json"))
    assert (until, now) == (ran.settings, settings)
    with pytest.raises(InputError, match=r"holds a run of another config \(optim.b1: 0.9 there, 0.5 asked for\)"):
        loop.train(change(settings, "optim", b1=0.5), str(tmp_path / "run"))


def test_a_run_does_not_go_on_with_its_rows_in_another_order(runs, monkeypatch):
    ran = runs("finetune")

    def turned(*args, **how):
        plan = validate.plan_once(*args, **how)
        return dataclasses.replace(plan, order_UC=plan.order_UC[::-1].copy())

    monkeypatch.setattr(loop, "plan_once", turned)
    with pytest.raises(InputError, match="the order of rows in .* is not the one this run was trained with"):
        loop.train(ran.settings, str(ran.workdir))


def test_a_image_that_breaks_during_the_run_loses_no_update(tmp_path):
    """Which images are whole is seen only when they are decoded; fixed, the run continues where it was."""
    make_inputs(tmp_path)
    settings = make_settings(
        tmp_path, "pretrain", data__shuffle=False, train__batch_size=2, train__checkpoint_every=100
    )
    loop.train(settings, str(tmp_path / "whole"))
    image = tmp_path / "images" / "3.png"  # of the second update
    content = image.read_bytes()
    image.write_bytes(content[:-30])
    with pytest.raises(InputError, match=r"row 3 .*3\.png: truncated"):
        loop.train(settings, str(tmp_path / "broken"))
    assert [path.name for path in (tmp_path / "broken" / "checkpoints").iterdir()] == ["1"]
    image.write_bytes(content)
    loop.train(settings, str(tmp_path / "broken"))
    assert read_metrics(tmp_path / "broken") == read_metrics(tmp_path / "whole")


def test_other_frozen_weights_under_a_run_are_refused(runs, inputs, tmp_path):
    ran = runs("pretrain")
    path = inputs / "llava" / "model.safetensors"
    path = path if path.exists() else next((inputs / "llava").glob("*.safetensors"))
    content = path.read_bytes()
    try:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(InputError, match="the frozen .* is not the one this run was trained with"):
            load.load_trained(str(ran.workdir))
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize(
    "name, says, loads",
    [
        ("captions.json", "data.annotations in .*captions.json is not the one", True),
        ("llava/tokenizer_config.json", "the tokenizer in .*llava is not the one", False),
        ("llava/config.json", "the decoder's config.json in .*llava/config.json is not the one", False),
    ],
)
def test_other_inputs_under_a_run_are_refused(runs, inputs, name, says, loads):
    ran = runs("pretrain")
    content = (inputs / name).read_bytes()
    try:
        (inputs / name).write_bytes(content + b"\n")
        with pytest.raises(InputError, match=says):
            loop.train(ran.settings, str(ran.workdir))
        if loads:
            load.load_trained(str(ran.workdir))
        else:
            with pytest.raises(InputError, match=says):
                load.load_trained(str(ran.workdir))
    finally:
        (inputs / name).write_bytes(content)


def test_a_named_size_has_no_fingerprint_and_a_config_file_is_an_input(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny" / "checkpoints").mkdir(parents=True)
    (tmp_path / "tiny" / "config.json").write_text("{}")
    assert load.fingerprint("random:tiny") == "" != load.fingerprint("tiny")
    file = tmp_path / "vision.json"
    file.write_text((inputs / "vision.json").read_text())
    settings = change(make_settings(inputs, "pretrain"), "init", model="")
    settings = change(settings, "model", vision="random:vision.json", llm=f"random:{inputs}/llm/config.json")
    before = load.model_inputs(load.model_spec(settings))
    file.write_text(file.read_text().replace('"num_hidden_layers": 3', '"num_hidden_layers": 4'))
    after = load.model_inputs(load.model_spec(settings))
    assert [name for name in after if after[name] != before[name]] == ["the vision tower's config file"]
    assert after["the decoder's config file"]["source"] == f"{inputs}/llm/config.json"


def test_a_run_reads_another_run(runs, inputs):
    """init.model of a workdir: the run's own parts in the dtype asked for, and its newest checkpoint remembered."""
    ran = runs("finetune")
    settings = change(make_settings(inputs, "pretrain"), "init", model=f"orbax:{ran.workdir}")
    plan = load.model_spec(settings)
    assert load.frozen_sources(settings, plan)["llm"]["fingerprint"] == checkpoints.run_fingerprint(str(ran.workdir))
    read = load.read_files(plan, {"vision": "bfloat16", "llm": "float32"})
    assert set(read) == {"vision", "llm"} and str(read["vision"]["patch"]["kernel"].dtype) == "bfloat16"
    jax.tree.map(np.testing.assert_array_equal, read["llm"], ran.trainable[1]["llm"])


def test_what_init_model_leaves_unread_is_said(runs, inputs):
    settings = change(make_settings(inputs, "finetune"), "model", projector="linear", feature_layer=-3)
    settings = change(settings, "init", projector=str(runs("pretrain").workdir))
    said = load.origins(load.model_spec(settings))
    assert "init.model decides the model" in said and "(init.projector)" in said
    assert "model.projector=linear is not read, it has mlp2x_gelu" in said and "feature_layer=-3 is not read" in said


def test_nothing_is_written_before_all_is_checked(inputs, tmp_path):
    settings = change(make_settings(inputs, "pretrain"), "data", max_length=5)
    with pytest.raises(InputError):
        loop.train(settings, str(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_the_device_never_waits_for_the_host(inputs, tmp_path, monkeypatch):
    """The next batch is fetched and copied, and the last update's metrics are read, while an update runs."""
    told = []
    opened, compiled, reported = loop.open_data, loop.compile_step, loop.log_update

    def open_data(*args):
        data = opened(*args)
        take = type(data).__next__
        follow = lambda self: told.append("batch") or take(self)  # noqa: E731
        data.__class__ = type("Told", (type(data),), {"__next__": follow})
        return data

    def compile_step(*args):
        step, *rest = compiled(*args)
        return (lambda *args: told.append("update") or step(*args)), *rest

    def log_update(n, *args, **how):
        told.append(f"read {n}")
        return reported(n, *args, **how)

    for name, function in (("open_data", open_data), ("compile_step", compile_step), ("log_update", log_update)):
        monkeypatch.setattr(loop, name, function)
    loop.train(make_settings(inputs, "pretrain", data__max_length=32), str(tmp_path))
    first = ["batch", "update", "batch", "update", "read 0", "batch", "update", "read 1"]
    assert told == [*first, "batch", "update", "read 2", "read 3"]


def test_a_profile_is_written_and_changes_no_number(runs, tmp_path, capsys):
    plain = runs("pretrain")
    assert not (plain.workdir / "profile").exists()
    loop.train(change(plain.settings, "train", profile=1), str(tmp_path))
    said = capsys.readouterr().out
    assert f"profile of updates 2 to 2 in {tmp_path}/profile: " in said and "--logdir=" in said
    traces = list((tmp_path / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 1 and traces[0].stat().st_size > 1000
    assert read_metrics(plain.workdir) == read_metrics(tmp_path)


@pytest.mark.parametrize("asked, traced", [(2, [2, 3]), (9, [0, 1, 2, 3, 4, 5]), (5, [1, 2, 3, 4, 5]), (0, [])])
def test_which_updates_are_traced(tmp_path, monkeypatch, asked, traced):
    seen = []
    monkeypatch.setattr(profiler.jax.profiler, "start_trace", lambda folder: seen.append("start"))
    monkeypatch.setattr(profiler.jax.profiler, "stop_trace", lambda: seen.append("stop"))
    with profiler.tracing(str(tmp_path), range(0, 6), asked) as tracer:
        for n in range(6):
            tracer.before(n, None)
            seen.append(n)
            tracer.after(n, None)
    inside = seen[seen.index("start") + 1 : seen.index("stop")] if traced else []
    assert inside == traced and seen.count("start") == seen.count("stop") == bool(traced)


def test_a_run_that_ends_early_still_writes_its_trace(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(profiler.jax.profiler, "start_trace", lambda folder: seen.append("start"))
    monkeypatch.setattr(profiler.jax.profiler, "stop_trace", lambda: seen.append("stop"))
    with pytest.raises(InputError), profiler.tracing(str(tmp_path), range(10, 20), 5) as tracer:
        tracer.before(12, None)
        raise InputError("a batch without targets")
    assert seen == ["start", "stop"]


def test_a_packed_run_in_bfloat16(inputs, tmp_path, capsys):
    """Weights in the dtypes asked for, several conversations in a row, and the shape said before the first update.

    So is a template that the tokenizer's own chat template contradicts.
    """
    dtypes = dict(train__dtype="bfloat16", train__param_dtype="bfloat16", train__frozen_dtype="bfloat16")
    how = dict(data__pack=True, data__template="llava_v1", train__steps=2, **dtypes)
    settings = make_settings(inputs, "finetune", **how)
    loop.train(settings, str(tmp_path))
    said = capsys.readouterr().out
    assert re.search(r"template llava_v1 writes .*human.* chat template of .*llava writes .*data.template=v1", said)
    shape = re.search(r"batches of (\d+) x (\d+) tokens with (\d+) images a row, ([\d.]+)% of the tokens real", said)
    assert shape and int(shape[1]) < 4
    tokens = [row["tokens"] for row in read_metrics(tmp_path)]
    assert float(shape[4]) == pytest.approx(100 * np.mean(tokens) / (int(shape[1]) * int(shape[2])), abs=0.06)
    params = checkpoints.load_params(str(tmp_path))[1]
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"bfloat16"}
    loop.train(settings, str(tmp_path))
    assert "resuming at step 2" in capsys.readouterr().out


def test_a_batch_without_targets_is_skipped(inputs, tmp_path, monkeypatch, capsys):
    """The parameters are those of a run without that batch; the step counts, so that the data's position is its own."""
    open_data = loop.open_data

    def broken(*args):
        """The pipeline with no target in its second batch."""
        data = open_data(*args)
        take = type(data).__next__

        class Spoiled(type(data)):
            def __next__(self) -> Batch:
                batch = take(self)
                if self.get_state()["batches"] != 2:
                    return batch
                return batch._replace(targets_BT=np.zeros_like(batch.targets_BT))

        data.__class__ = Spoiled
        return data

    settings = make_settings(inputs, "pretrain", data__shuffle=False, train__checkpoint_every=1)
    monkeypatch.setattr(loop, "open_data", broken)
    loop.train(change(settings, "train", steps=2), str(tmp_path))
    # Seven captions, four rows a batch: the second batch wraps around.
    rows = "rows 4 (id caption-4), 5 (id caption-6), 6 (id caption-7), 0 (id caption-0)"
    said = f"warning: step 1, {rows}: no token of the batch is supervised; the update was skipped"
    assert said in capsys.readouterr().err
    assert [row["step"] for row in read_metrics(tmp_path)] == [0]
    (_, first, _), (_, second, _) = (checkpoints.load_params(str(tmp_path), step) for step in (1, 2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_a_row_that_cannot_be_read_is_padding_and_named(inputs, tmp_path, capsys):
    """The others are trained as ever; a second one passes the budget."""
    how = dict(data__images=str(tmp_path / "images"), data__max_rejects=1.0, train__epochs=2.0)
    settings = make_settings(inputs, "finetune", data__shuffle=False, train__steps=0, **how)
    shutil.copytree(inputs / "images", tmp_path / "images")
    (tmp_path / "images" / "3.png").write_bytes(b"no image")  # of the rows 3 and 7
    rows = json.loads((inputs / "rows.json").read_text())[:7]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    settings = change(settings, "data", annotations=str(tmp_path / "rows.json"))
    workdir = tmp_path / "run"
    loop.train(settings, str(workdir))
    (found,) = [json.loads(line) for line in (workdir / "rejects.jsonl").read_text().splitlines()]
    assert (found["step"], found["row"], found["id"]) == (0, 3, "row-3") and "3.png" in found["reason"]
    assert capsys.readouterr().err.count("warning: left out row 3 (id 'row-3')") == 1
    tokens = [row["tokens"] for row in read_metrics(workdir)]
    whole = change(settings, "data", images=str(inputs / "images"), max_rejects=0.0)
    loop.train(whole, str(tmp_path / "whole"))
    lost = [a["tokens"] - b for a, b in zip(read_metrics(tmp_path / "whole"), tokens, strict=True)]
    assert lost[0] > 0 and sum(lost) == 2 * lost[0]  # once an epoch
    (tmp_path / "images" / "0.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"row \d \(id 'row-\d'\): .*1 rows before it were unreadable.*max_rejects"):
        loop.train(settings, str(tmp_path / "second"))


def test_processes_can_agree_to_stop_before_the_first_update_is_over(inputs, tmp_path, monkeypatch):
    """jax has them stop at one more than the highest number asked with: unasked, at 1, which a resumed run is past."""
    asked = []
    monkeypatch.setattr(loop, "stop_signal", lambda: contextlib.nullcontext(asked.append))
    loop.train(make_settings(inputs, "pretrain", train__steps=2), str(tmp_path))
    assert asked == [0, 1, 2]


def test_a_missing_image_counts_as_a_row_that_cannot_be_read(inputs, tmp_path, capsys):
    shutil.copytree(inputs / "images", tmp_path / "images")
    (tmp_path / "images" / "3.png").unlink()  # of the rows 3 and 7
    how = dict(data__images=str(tmp_path / "images"), data__shuffle=False, train__steps=2)
    loop.train(make_settings(inputs, "finetune", data__max_rejects=2.0, **how), str(tmp_path / "run"))
    assert "data.max_rejects allows 2 rows without their images: row 3 (id 'row-3')" in capsys.readouterr().out
    found = [json.loads(line) for line in (tmp_path / "run" / "rejects.jsonl").read_text().splitlines()]
    assert [(line["step"], line["id"]) for line in found] == [(0, "row-3"), (1, "row-7")]
    with pytest.raises(InputError, match="2 of 8 rows cannot be trained"):
        loop.train(make_settings(inputs, "finetune", data__max_rejects=1.0, **how), str(tmp_path / "few"))


def test_several_processes_count_their_rejected_rows_together(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.jax, "process_count", lambda: 2)
    monkeypatch.setattr(loop.multihost_utils, "process_allgather", lambda rows: np.stack([rows, [3, 7, -1]]))
    rejects = loop.Rejects(make_settings(inputs, "pretrain", data__max_rejects=2.0).data)
    tell = rejects.among(100)
    rejects.open(str(tmp_path), 0)
    tell(Rejected(3, "a", "gone"), 0)  # the other process reads it, too
    rejects.check_total()
    for row in (4, 5, 6):
        tell(Rejected(row, "b", "gone"), 1)
    with pytest.raises(InputError, match="4 rows or more were unreadable, and data.max_rejects allows 2"):
        rejects.check_total()
    assert (tmp_path / "rejects.jsonl").read_text().count('"reason": "gone"') == 4


def test_rows_that_more_processes_found_unreadable_still_count(inputs, tmp_path):
    """One process resumes at update 4; the other's file was torn by a kill."""
    for name, rows in (("rejects.jsonl", {1: 0}), ("rejects.1.jsonl", {2: 3, 3: 4})):
        (tmp_path / name).write_text("".join(json.dumps(dict(step=rows[row], row=row)) + "\n" for row in rows) + '{"st')
    rejects = loop.Rejects(make_settings(inputs, "pretrain", data__max_rejects=3.0).data)
    tell = rejects.among(100)
    rejects.open(str(tmp_path), 4)
    assert [len((tmp_path / name).read_text().splitlines()) for name in ("rejects.jsonl", "rejects.1.jsonl")] == [1, 1]
    for row in (2, 3):
        tell(Rejected(row, "a", "gone"), 4)
    with pytest.raises(InputError, match="3 rows before it were unreadable"):
        tell(Rejected(4, "b", "gone"), 5)


def test_updates_in_a_row_that_are_not_finite_stop_the_run(inputs, tmp_path, capsys):
    """It resumes as docs/howto/resume.md says: from before the weights were spoilt, at another rate, without a row."""
    how = dict(data__shuffle=False, train__checkpoint_every=1, train__keep=9, train__steps=6, train__max_nonfinite=2)
    settings = make_settings(inputs, "pretrain", optim__lr=1e30, optim__warmup_ratio=0.1, **how)
    run = tmp_path / "run"
    with pytest.raises(InputError, match=r"2 updates in a row are not finite .*step 2, .*caption-\d.*step 3, "):
        loop.train(settings, str(run))
    assert capsys.readouterr().err.count("are not finite; the update was skipped") == 2
    before = read_metrics(run)
    assert [row["step"] for row in before] == [0, 1]
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["1", "2", "3"]
    for spoilt in ("2", "3"):
        (run / "checkpoints" / spoilt).rename(tmp_path / spoilt)
    (tmp_path / "bad.txt").write_text("caption-4\n")
    settings = change(change(settings, "optim", lr=1e-3, clip_norm=0.5), "data", exclude=str(tmp_path / "bad.txt"))
    loop.train(settings, str(run))
    assert "resuming at step 1\n" in capsys.readouterr().out and (run / "config.until-1.json").exists()
    rows = read_metrics(run)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5] and all(row["lr"] < 2e-3 for row in rows)
    assert rows[0] == before[0] and rows[1]["tokens"] < before[1]["tokens"]  # without caption-4


@pytest.mark.parametrize(
    "group, changes, says",
    [
        ("data", dict(template="v9"), "unknown template 'v9'"),
        ("data", dict(annotations=""), "data.annotations is empty"),
        ("data", dict(annotations="none.json"), "none.json"),
        ("data", dict(max_length=5), "rows cannot be trained"),
        ("init", dict(model="hf:/nowhere"), "init.model=hf:/nowhere: no folder '/nowhere'"),
        ("init", dict(model="zip:/tmp"), "form 'zip' is not read"),
        ("init", dict(model=""), "model.vision=random:huge"),
        ("init", dict(projector="/nowhere"), "init.projector=/nowhere: not found"),
        ("mesh", dict(data=3), "mesh"),
        ("train", dict(accumulate=3), "train.batch_size=4 does not divide into 3 device shards times train.accumulate"),
        ("optim", dict(groups="vision=1e-3"), "optim.groups: 'vision'"),
        ("train", dict(compiler_options="xla_nope=1"), "No such compile option: 'xla_nope'"),
    ],
)
def test_bad_input_is_one_line(inputs, tmp_path, group, changes, says):
    settings = change(make_settings(inputs, "pretrain", model__vision="random:huge"), group, **changes)
    with pytest.raises(InputError) as error:
        loop.train(settings, str(tmp_path / "run"))
    assert says in str(error.value) and "\n" not in str(error.value)


def test_a_row_longer_than_the_decoders_positions_is_refused(inputs, tmp_path):
    settings = make_settings(inputs, "pretrain")
    plan = load.model_spec(settings)
    short = dataclasses.replace(plan.config, llm=dataclasses.replace(plan.config.llm, max_positions=8))
    with pytest.raises(InputError, match="the decoder 8 positions"):
        loop.read_records(settings.data, short, load_tokenizer(plan.tokenizer))


def test_random_towers_of_a_config_file(inputs):
    """The specs `random:FILE.json` and `random:NAME`, and the projector drawn as torch.nn.Linear draws it."""
    settings = change(make_settings(inputs, "pretrain"), "init", model="")
    settings = change(settings, "model", vision=f"random:{inputs}/vision.json", llm=f"random:{inputs}/llm/config.json")
    plan = load.model_spec(settings)
    assert plan.config.vision.width == 16 and plan.config.llm.vocab_size == 704 and plan.config.image_token_id == 704
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    wanted = jax.tree.map(lambda x: x.update(sharding=here), build(plan.config)[1]["projector"])
    draw = [load.read_params(plan, {"projector": wanted}) for _ in range(2)]
    jax.tree.map(np.testing.assert_array_equal, *draw)
    for name, fan_in in (("linear_1", 16), ("linear_2", 32)):
        for leaf in draw[0]["projector"][name].values():
            assert 0.8 / fan_in**0.5 < np.abs(leaf).max() <= 1 / fan_in**0.5
    assert load.vision_config("random:clip-l-14-336").patches == 576
    assert load.llm_config("random:vicuna-13b").width == 5120
    with pytest.raises(InputError, match="did you mean vicuna-7b"):
        load.llm_config("random:vicuna-7")
    # Named sizes take the small tokenizer of the package, which fits into the smallest of them.
    assert load_tokenizer(load.tokenizer_folder("random:vicuna-7b")).size <= load.LLAMAS["tiny"].vocab_size


def test_steps_go_before_epochs(inputs):
    settings = make_settings(inputs, "pretrain", train__steps=0, train__epochs=1.5)
    assert loop.total_steps(settings.train, 9) == 5
    assert loop.total_steps(change(settings, "train", steps=7).train, 9) == 7
