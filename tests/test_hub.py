"""Models by their name, from a stand-in of the Hub: what is fetched, what is recorded, what is refused."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
from huggingface_hub import constants

from llava_jax.aot.compile import plan_config
from llava_jax.cli.main import main
from llava_jax.settings import read_settings
from llava_jax.train.loop import train
from llava_jax.types import InputError
from llava_jax.weights import hf
from llava_jax.weights.hf_export import parameter_pieces
from llava_jax.weights.original_export import TOWER, write_original
from llava_jax.weights.source import absolute_folder, is_name, local_folder
from llava_jax.weights.tensors import save_tensors
from tests.hub_server import point
from tests.tiny_run import change, make_inputs, make_settings

CONFIG, WEIGHTS = {"config.json", "tokenizer.json"}, {"model.safetensors"}
# What repositories hold next to what we read.
OTHERS = {"flax_model.msgpack", "tf_model.h5", "training_args.bin", "consolidated.safetensors", "modeling.py"}
SHARDS = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"}
TORCH = {"pytorch_model-00001-of-00001.bin", "pytorch_model.bin.index.json"}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> pathlib.Path:
    """The inputs of `tiny_run`, and the parts of its model as folders: `tower` and `decoder`."""
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    config, params, extras = hf.read_llava(str(folder / "llava"))
    write_original(str(folder / "original"), config, params, extras)
    os.rename(folder / "original" / TOWER, folder / "tower")
    os.rename(folder / "llm", folder / "decoder")
    pieces = parameter_pieces({"llm": params["llm"]}, "float32")
    tensors = {piece.name.removeprefix("language_model."): piece.array() for piece in pieces}
    rows = json.loads((folder / "decoder" / "config.json").read_text())["vocab_size"]
    tensors = {name: array[:rows] if "embed" in name or "head" in name else array for name, array in tensors.items()}
    save_tensors(str(folder / "decoder" / "model.safetensors"), tensors)
    return folder


def answer(model: str) -> list[str]:
    return ["generate", f"--model={model}", "--prompt=What is this?", "--max_new_tokens=2"]


# ---- what is fetched --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "held, need, fetched",
    [
        (CONFIG | WEIGHTS | TORCH | OTHERS, "config", CONFIG),
        (CONFIG | WEIGHTS | TORCH | OTHERS, "weights", CONFIG | WEIGHTS),
        (CONFIG | SHARDS | {"model.fp16.safetensors", "sub/model.safetensors"}, "weights", CONFIG | SHARDS),
        (CONFIG | TORCH | OTHERS, "weights", CONFIG | TORCH),
        (CONFIG | TORCH | {"mm_projector.bin"}, "weights", CONFIG | TORCH),
        (CONFIG | TORCH | {"mm_projector.bin"}, "projector", CONFIG | {"mm_projector.bin"}),
        (CONFIG | {"mm_projector.bin"}, "weights", CONFIG | {"mm_projector.bin"}),
        (
            {"adapter_config.json", "adapter_model.bin", "non_lora_trainables.bin"},
            "weights",
            {"adapter_config.json", "adapter_model.bin", "non_lora_trainables.bin"},
        ),
        (
            CONFIG | WEIGHTS | {f"{TOWER}/config.json", f"{TOWER}/model.safetensors", f"{TOWER}/tf_model.h5"},
            "weights",
            CONFIG | WEIGHTS | {f"{TOWER}/config.json", f"{TOWER}/model.safetensors"},
        ),
        (CONFIG | {"weights/_METADATA", "weights/d/1"}, "weights", CONFIG | {"weights/_METADATA", "weights/d/1"}),
        (CONFIG | WEIGHTS | {"weights/best.pt"}, "weights", CONFIG | WEIGHTS),
    ],
)
def test_the_files_that_are_read_are_fetched_and_no_others(server, held, need, fetched):
    commit = server.push("a/m", {name: name.encode() for name in held})
    folder = pathlib.Path(local_folder("a/m", "--model", need))
    assert folder.name == commit and set(server.fetched("a/m")) == fetched
    assert all((folder / name).read_bytes() == name.encode() for name in fetched)


def test_a_file_or_folder_of_that_name_wins(server, tmp_path, monkeypatch):
    server.push("a/m", {"config.json": b"{}"})
    monkeypatch.chdir(tmp_path)
    os.makedirs("a/m@v1")
    assert local_folder("a/m", "--model") != "a/m"
    assert local_folder("a/m@v1", "--model") == "a/m@v1"
    os.mkdir("a/m")
    asked = len(server.requests)
    for path in ("a/m", "hf:a/m"):
        assert local_folder(path, "--model") == "a/m" and absolute_folder(path, "--model") == str(tmp_path / "a/m")
    for path in ("a/b/c", "./a", "/a/b", "../a/b", "m", "", "random:a/b.json", "a/projector.safetensors"):
        assert local_folder(path, "--model") == path
    assert not is_name("gs://a/b")
    assert len(server.requests) == asked


def test_two_processes_of_a_host_fetch_each_file_once(server, tmp_path):
    server.push("a/m", {name: os.urandom(2**20) for name in SHARDS | CONFIG})
    told = {"HF_ENDPOINT": server.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0"}
    code = "from llava_jax.weights.source import local_folder; print(local_folder('a/m', '--model', 'weights'))"
    command = [sys.executable, "-c", code]
    started = [subprocess.Popen(command, env=os.environ | told, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    folders = {process.communicate(timeout=120)[0].strip() for process in started}
    assert len(folders) == 1 and folders.pop().startswith(str(tmp_path / "home"))
    assert sorted(server.fetched("a/m")) == sorted(SHARDS | CONFIG)


# ---- commands by name -------------------------------------------------------------------------------------------


def test_a_run_records_the_commit_and_resumes_from_it(server, inputs, tmp_path, capsys):
    tower, decoder = server.push("a/tower", inputs / "tower"), server.push("a/decoder", inputs / "decoder")
    settings = make_settings(
        inputs, "finetune", init__model="", model__vision="a/tower", model__llm="hf:a/decoder@main"
    )
    workdir = tmp_path / "run"
    train(settings, str(workdir))
    wanted = (f"a/tower@{tower}", f"a/decoder@{decoder}")
    recorded = read_settings(str(workdir / "config.json"))
    assert (recorded.model.vision, recorded.model.llm) == wanted
    assert f"vision {wanted[0]}, decoder {wanted[1]}" in capsys.readouterr().out

    server.push("a/tower", {"config.json": b"another"})
    asked = len(server.requests)
    train(change(settings, "model", vision="a/tower", llm=wanted[1]), str(workdir))
    train(recorded, str(workdir))
    assert capsys.readouterr().out.count("resuming at step 4") == 2 and len(server.requests) == asked
    with pytest.raises(InputError, match=f"model.vision: '{wanted[0]}' there, 'a/tower@[0-9a-f]+' asked for"):
        train(change(settings, "model", vision="a/tower@main"), str(workdir))

    asked = len(server.requests)
    assert main([*answer(str(workdir))]) == 0
    assert len(server.requests) == asked


def test_a_whole_model_by_name_trains_answers_and_is_converted(server, inputs, tmp_path, capsys):
    commit = server.push("a/llava", inputs / "llava")
    settings = make_settings(inputs, "finetune", init__model="hf:a/llava", train__steps=1)
    train(settings, str(tmp_path / "run"))
    assert read_settings(str(tmp_path / "run" / "config.json")).init.model == f"hf:a/llava@{commit}"
    capsys.readouterr()
    assert main(answer("a/llava")) == 0
    by_name = capsys.readouterr().out
    assert f"a/llava: commit {commit} of the Hub" in by_name and "model llava\n" in by_name
    assert main(answer(str(inputs / "llava"))) == 0
    assert by_name.splitlines()[-1] == capsys.readouterr().out.splitlines()[-1]
    assert main(["convert", f"--from=hf:a/llava@{commit}", f"--to=orbax:{tmp_path}/orbax"]) == 0
    server.push("a/orbax", tmp_path / "orbax")
    assert main(answer("orbax:a/orbax")) == 0


def test_an_original_folder_takes_tower_and_base_by_name(server, inputs, tmp_path, capsys):
    server.push("a/tower", inputs / "tower")
    server.push("a/original", inputs / "original")
    assert main(["convert", "--from=a/original", "--vision=a/tower", f"--to=hf:{tmp_path}/out"]) == 0
    config, params, _ = hf.read_llava(str(inputs / "llava"))
    again = hf.read_llava(str(tmp_path / "out"))
    assert again[0].vision == config.vision
    assert (again[1]["projector"]["linear_1"]["kernel"] == params["projector"]["linear_1"]["kernel"]).all()


def test_checks_and_plans_fetch_no_weights(server, inputs, tmp_path):
    server.push("a/tower", inputs / "tower")
    server.push("a/decoder", inputs / "decoder")
    rows = [f"--annotations={inputs}/rows.json", f"--images={inputs}/images", "--template=v1"]
    assert main(["prepare", "verify", *rows, "--tokenizer=a/decoder", "--vision=a/tower"]) == 0
    settings = make_settings(inputs, "finetune", init__model="", model__vision="a/tower", model__llm="a/decoder")
    assert plan_config(settings).vision.image_size == 16
    config = tmp_path / "config.json"
    config.write_text("".join(json.dumps(settings, default=vars)))
    assert main(["prepare", "verify", f"--config={config}"]) == 0
    names = {name for repo in ("a/tower", "a/decoder") for name in server.fetched(repo)}
    assert "tokenizer.json" in names and not any("safetensors" in name for name in names)


# ---- what is refused --------------------------------------------------------------------------------------------


def refused(capsys, *argv: str) -> str:
    """The one line on stderr of a command that ends with exit code 2."""
    capsys.readouterr()
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize(
    "name, words",
    [
        ("weights/vicuna", ["there is no folder of that name", "has no model weights/vicuna", "HF_TOKEN"]),
        ("a/private", ["has no model a/private that it shows to you"]),
        ("a/gated", ["a/gated on the Hub is gated: accept its terms at http://", "/a/gated"]),
        ("a/llava@v9", ["a/llava on the Hub has no revision 'v9'"]),
        ("hf:a/card", ["a/card on the Hub (commit ", "has no config.json"]),
        ("a/config", ["a/config on the Hub (commit ", "has no model.safetensors or pytorch_model.bin"]),
        ("a--b/c", ["a--b/c is no name of a model on the Hub"]),
    ],
)
def test_what_the_hub_refuses_is_one_line(server, inputs, capsys, name, words):
    server.push("a/llava", inputs / "llava")
    server.push("a/gated", inputs / "llava")
    server.push("a/private", inputs / "llava")
    server.push("a/card", {"README.md": b"no model"})
    server.push("a/config", {"config.json": (inputs / "llava" / "config.json").read_bytes()})
    server.gated.add("a/gated")
    server.private.add("a/private")
    line = refused(capsys, *answer(name))
    assert line.startswith(f"error: model={name.removeprefix('hf:')}: ") and all(word in line for word in words)


def test_a_token_opens_what_is_gated(server, inputs, monkeypatch):
    server.push("a/gated", inputs / "llava")
    server.gated.add("a/gated")
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    assert main(answer("a/gated")) == 0


def test_without_network_the_cache_is_read_and_its_lack_is_one_line(server, inputs, monkeypatch, capsys):
    server.push("a/llava", inputs / "llava")
    server.push("a/half", inputs / "llava")
    assert main(answer("a/llava")) == 0
    local_folder("a/half", "--model", "config")
    for offline, words in ((True, "HF_HUB_OFFLINE is set"), (False, "cannot be reached for")):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        point(monkeypatch, "http://127.0.0.1:9")  # where no one listens
        assert main(answer("a/llava")) == 0
        line = refused(capsys, *answer("a/other"))
        assert words in line and "is not in the cache" in line
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "what is needed of it is not in the cache" in refused(capsys, *answer("a/half"))


def test_every_argument_that_takes_a_model_names_itself(server, inputs, tmp_path, capsys):
    rows = [f"--annotations={inputs}/rows.json", f"--images={inputs}/images", "--template=v1"]
    run = ["train", "--config=configs/tiny.py", f"--workdir={tmp_path}/run"]
    whole = f"--from={inputs}/original"
    for argv, name in (
        ([*run, "--config.model.llm=a/no"], "model.llm"),
        ([*run, "--config.model.vision=a/no"], "model.vision"),
        ([*run, "--config.init.model=hf:a/no"], "init.model"),
        ([*run, "--config.init.projector=a/no"], "init.projector"),
        (["convert", "--from=a/no", f"--to=hf:{tmp_path}/out"], "--from"),
        (["convert", whole, "--vision=a/no", f"--to=hf:{tmp_path}/out"], "--vision"),
        (["convert", whole, "--base=a/no", f"--to=hf:{tmp_path}/out"], "--base"),
        (["prepare", "verify", *rows, "--tokenizer=a/no"], "--tokenizer"),
        (["prepare", "verify", *rows, "--tokenizer=x", "--vision=a/no"], "--vision"),
        (["compile", "--config=configs/tiny.py", "--config.model.llm=a/no"], "model.llm"),
    ):
        line = refused(capsys, *argv)
        assert line.startswith(f"error: {name}=") and "has no model a/no that it shows to you" in line
    assert "compile needs its sizes only: give --config.model.llm=random:" in line


# ---- upload -----------------------------------------------------------------------------------------------------


def test_a_pushed_export_is_private_has_its_card_and_loads_by_name(server, inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    commit = server.push("a/llava", inputs / "llava")
    push = ["convert", "--from=a/llava", f"--to=hf:{tmp_path}/out", "--push=reader/mine"]
    assert main(push) == 0
    assert f"pushed to {server.endpoint}/reader/mine/commit/" in capsys.readouterr().out
    files = server.files("reader/mine")
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert files == written | {".gitattributes": files[".gitattributes"]} and "reader/mine" in server.private
    card = files["README.md"].decode()
    assert "base_model:\n- a/llava\n" in card and f"[a/llava](https://huggingface.co/a/llava) at `{commit}`" in card
    assert 'from_pretrained("reader/mine")' in card
    assert main(answer("reader/mine")) == 0
    (tmp_path / "out").rename(tmp_path / "before")
    assert "already holds files (README.md, " in refused(capsys, *push)
    assert server.files("reader/mine") == files and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name, token, words",
    [
        ("reader/mine", "", ["answers 401", "hf auth login"]),
        ("other/mine", "hf_reader", ["answers 403", "don't have the rights", "hf auth login"]),
        ("mine", "hf_reader", ["expected USER/NAME"]),
    ],
)
def test_a_push_that_cannot_be_is_refused_before_anything_is_written(
    server, inputs, tmp_path, monkeypatch, capsys, name, token, words
):
    monkeypatch.setenv("HF_TOKEN", token)
    argv = ["convert", f"--from={inputs}/llava", f"--to=hf:{tmp_path}/out", f"--push={name}"]
    line = refused(capsys, *argv)
    assert line.startswith(f"error: --push={name}: ") and all(word in line for word in words)
    assert not (tmp_path / "out").exists()


def test_an_export_whose_upload_fails_stays_and_says_how_to_upload_it(server, inputs, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", "hf_reader")
    server.push("other/mine", {})
    argv = ["convert", f"--from={inputs}/llava", f"--to=hf:{tmp_path}/out", "--push=other/mine"]
    line = refused(capsys, *argv)
    assert f"{tmp_path}/out is written: `hf upload other/mine {tmp_path}/out` uploads it" in line
    assert (tmp_path / "out" / "model.safetensors").exists()
