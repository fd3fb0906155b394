"""Every form a model comes in and goes out: under names that say nothing, through orbax, and broken."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from etils import epath
from safetensors.numpy import load_file, save_file

import llava_jax
from llava_jax.cli.main import main
from llava_jax.models.llava import for_answers
from llava_jax.settings import write_settings
from llava_jax.train.loop import train
from llava_jax.types import InputError
from llava_jax.weights import convert, hf, load, name_table, orbax_model
from llava_jax.weights.hf_config import clip_json, default_pinpoints, llama_json
from llava_jax.weights.hf_export import write_llava
from llava_jax.weights.load import fingerprint, model_spec, read_files, read_model
from llava_jax.weights.processor import LlavaExtras
from llava_jax.weights.source import parse
from tests import test_original as original
from tests.test_convert import CLIP, CONFIG, LLAMA, edit, hub_tensors, part, random_params, write_folder
from tests.tiny_llava import write_tokenizer
from tests.tiny_run import make_inputs, make_settings
from tests.torch_files import write_bin

NONSENSE = ("zzz", "mpt-lora-projector.v0")
NEXT = dataclasses.replace(CONFIG, pinpoints=default_pinpoints(CLIP))


def flat(params):
    return {path: np.asarray(x) for path, x in name_table.flatten(params).items()}


def assert_equal(found, wanted):
    assert set(found) == set(wanted)
    for path, array in wanted.items():
        assert found[path].dtype == array.dtype and found[path].tobytes() == array.tobytes(), path


def assert_same_files(one, other):
    """Two folders with the same files in them, byte by byte."""
    names = sorted(os.listdir(one))
    assert names == sorted(os.listdir(other))
    for name in names:
        with open(os.path.join(one, name), "rb") as first, open(os.path.join(other, name), "rb") as second:
            assert first.read() == second.read(), name


# ---- one folder of each kind --------------------------------------------------------------------------------------


def parts(base):
    """A CLIP folder and a decoder's folder."""
    tensors = hub_tensors(CONFIG, random_params(CONFIG))
    clip = write_folder(base / "clip", clip_json(CLIP), part(tensors, "vision_tower.", ""))
    llm = write_folder(base / "llm", llama_json(LLAMA), part(tensors, "language_model.", ""))
    return clip, write_tokenizer(llm)


def hf4(base, config=CONFIG, **options):
    clip, llm = parts(base)
    extras = LlavaExtras(aspect="anyres" if config.pinpoints else "pad", tokenizer=llm, vision=clip)
    write_llava(str(base / "m"), config, random_params(config), extras, **options)
    return base / "m"


def hf5(base):
    """The same as transformers 5 holds and saves it: its names, its config, image settings in the processor's."""
    folder = hf4(base)
    tensors = load_file(folder / "model.safetensors")
    renamed = part(tensors, "vision_tower.vision_model.", "model.vision_tower.")
    renamed |= part(tensors, "language_model.model.", "model.language_model.")
    renamed |= part(tensors, "language_model.lm_head", "lm_head") | part(tensors, "multi_modal", "model.multi_modal")
    assert len(renamed) == len(tensors)
    save_file(renamed, folder / "model.safetensors")
    images = json.loads((folder / "preprocessor_config.json").read_text())
    os.remove(folder / "preprocessor_config.json")
    os.remove(folder / "chat_template.json")
    edit(folder / "processor_config.json", lambda value: value.update(image_processor=images))

    def config(value):
        for key in ("vocab_size", "torch_dtype", "ignore_index"):
            del value[key]
        for key in ("rope_theta", "rope_scaling", "torch_dtype"):
            del value["text_config"][key]

    edit(folder / "config.json", config)
    return folder


def hf_bin(base):
    folder = hf4(base)
    write_bin(folder / "pytorch_model.bin", load_file(folder / "model.safetensors"))
    os.remove(folder / "model.safetensors")
    return folder


def orbax(base):
    convert.convert(str(hf4(base)), f"orbax:{base / 'o'}")
    return base / "o"


def original_whole(base):
    folder, tower = base / "zq", original.write_tower(base / "kx")
    original.write_config(folder, original.described(mm_vision_tower=tower))
    original.write_shards(folder, original.llava_tensors())
    write_tokenizer(str(folder))
    return folder


def original_lora(base):
    whole = original_whole(base)
    folder, _ = original.lora_folder(base, base_model_name_or_path=str(whole))
    original.write_config(folder, json.loads((whole / "config.json").read_text()))
    return folder


def original_next(base):
    convert.convert(str(hf4(base, NEXT)), f"llava:{base / 'v1.6'}")
    return base / "v1.6"


WHOLE = {
    "hf 4": (hf4, "hf"),
    "hf 5": (hf5, "hf"),
    "hf .bin": (hf_bin, "hf"),
    "LLaVA-NeXT": (lambda base: hf4(base, NEXT), "hf"),
    "orbax": (orbax, "orbax"),
    "original": (original_whole, "llava"),
    "original LoRA": (original_lora, "llava"),
    "original v1.6": (original_next, "llava"),
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_whole_model_under_any_name(tmp_path, kind):
    """What it is decide the files in it; only another form than its own is refused."""
    make, form = WHOLE[kind]
    folder = make(tmp_path)
    config, params, extras = read_model(str(folder), "model")
    params = flat(params)
    for name in NONSENSE:
        renamed = folder.rename(tmp_path / name)
        found = read_model(str(renamed), "model")
        said = [(x.template, x.aspect, x.image_position, x.template_assumed) for x in (found[2], extras)]
        assert found[0] == config and said[0] == said[1]
        assert_equal(flat(found[1]), params)
        assert parse(f"{form}:{renamed}") == (form, str(renamed))
        for other in {"hf", "llava", "orbax"} - {form}:
            with pytest.raises(InputError, match=f"model={other}:.*the folder holds"):
                llava_jax.load(f"{other}:{renamed}")
        folder = renamed
    model = llava_jax.load(str(folder))
    assert model.name == name and model.about["template"] == extras.template
    assert_equal(flat(model.params), flat(for_answers(found[1])))


def test_the_generations_of_hugging_face_say_the_same(tmp_path):
    four, five = (read_model(str(make(tmp_path / make.__name__)), "model") for make in (hf4, hf5))
    assert four[0] == five[0] and four[2].aspect == five[2].aspect == "pad"
    assert_equal(flat(five[1]), flat(four[1]))


def test_parts_under_any_name(tmp_path):
    """A tower, a decoder and a projector file, as `train` reads them."""
    clip, llm = parts(tmp_path)
    tensors = part(hub_tensors(CONFIG, random_params(CONFIG)), name_table.PROJECTOR, "model.mm_projector.")
    tensors = {name.replace("linear_1", "0").replace("linear_2", "2"): x for name, x in tensors.items()}
    write_bin(tmp_path / "p.bin", tensors)
    save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, tmp_path / "p.safetensors")
    for name in NONSENSE:
        for old, new in ((clip, name), (llm, name + "2")):
            os.rename(old, tmp_path / new)
        clip, llm = str(tmp_path / name), str(tmp_path / (name + "2"))
        for ending in ("bin", "safetensors"):
            projector = shutil.copy(tmp_path / f"p.{ending}", tmp_path / f"{name}.{ending}")
            given = dict(model__vision=clip, model__llm=llm, init__model="", init__projector=str(projector))
            settings = make_settings(tmp_path, "finetune", **given)
            read = read_files(model_spec(settings), dict.fromkeys(hf.PARTS, "float32"))
            assert_equal(flat(read), flat(random_params(CONFIG)))


# ---- orbax --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, dtype",
    [({}, "bfloat16"), (dict(projector="linear"), "float32"), (dict(pinpoints=NEXT.pinpoints), "float32")],
    ids=["mlp", "linear", "next"],
)
def test_through_orbax_and_back_is_byte_for_byte(tmp_path, change, dtype):
    """Weights, those that LLaVA does not run included, tokenizer, settings: every file as it was, and a card."""
    folder = hf4(tmp_path, dataclasses.replace(CONFIG, **change), dtype=dtype)
    convert.convert(str(folder), f"orbax:{tmp_path / 'o'}")
    convert.convert(f"orbax:{tmp_path / 'o'}", f"hf:{tmp_path / 'again'}")
    os.unlink(tmp_path / "again" / "README.md")
    assert_same_files(folder, tmp_path / "again")


def test_a_run_may_start_from_orbax(tmp_path):
    folder = orbax(tmp_path)
    settings = make_settings(tmp_path, "pretrain", init__model=f"orbax:{folder}")
    plan = model_spec(settings)
    assert (plan.vision_folder, plan.tokenizer) == (str(folder), str(folder))
    read = read_files(plan, dict.fromkeys(hf.PARTS, "float32"))
    assert_equal(flat(read), flat(hf.read_llava(str(tmp_path / "m"))[1]))
    before = fingerprint(f"orbax:{folder}")
    assert before
    shutil.rmtree(tmp_path / "o")
    convert.convert(str(tmp_path / "m"), f"orbax:{tmp_path / 'o'}", dtype="bfloat16")
    assert fingerprint(f"orbax:{folder}") != before


def test_a_large_layer_is_read_by_itself(tmp_path):
    """Of a stack of large layers orbax stores each as a piece, and only that one is read."""
    kernel = np.random.default_rng(0).normal(size=(3, 512, 1024)).astype(np.float32)
    orbax_model.save(str(tmp_path), {"llm": {"layers": {"mlp": {"up": {"kernel": kernel}}}}}, {})
    data = orbax_model.files(str(tmp_path))
    assert sum(os.path.getsize(path) for path in data) > 5e6
    tree = ocp.PyTreeCheckpointHandler().metadata(epath.Path(tmp_path / "weights")).tree
    (about,) = jax.tree.leaves(tree)
    assert about.storage.chunk_shape == (1, 512, 1024)
    stored = orbax_model.open_tensors(str(tmp_path))
    np.testing.assert_array_equal(stored[name_table.LAYER.format(2) + "mlp.up_proj.weight"].get(), kernel[2].T)


def test_damaged_orbax_is_named(tmp_path, capfd):
    folder = orbax(tmp_path)
    for lost in ("d", "manifest.ocdbt"):
        shutil.move(folder / "weights" / lost, tmp_path / "lost")
        with pytest.raises(InputError, match="weights: cannot be read .*convert the model again"):
            llava_jax.load(str(folder))
        shutil.move(tmp_path / "lost", folder / "weights" / lost)
    assert "Traceback" not in capfd.readouterr().err
    (folder / "weights" / "_METADATA").write_text("{}")
    with pytest.raises(InputError, match="cannot be read|missing "):
        convert.convert(str(folder), f"hf:{tmp_path / 'out'}")


# ---- what is broken -------------------------------------------------------------------------------------------------


def both_refuse(folder, out, says):
    """One line from `load` and from `convert`, and nothing written."""
    for does in (lambda: llava_jax.load(str(folder)), lambda: convert.convert(str(folder), f"hf:{out}")):
        with pytest.raises(InputError, match=says) as error:
            does()
        assert "\n" not in str(error.value) and str(folder) in str(error.value)
    assert not out.exists()


def test_a_shard_missing(tmp_path):
    folder = hf4(tmp_path, shard_bytes=14_000)
    shard = sorted(folder.glob("*.safetensors"))[1]
    os.remove(shard)
    both_refuse(folder, tmp_path / "out", f"lists shards that are absent: {shard.name}; download them")


@pytest.mark.parametrize(
    "change, says",
    [
        (
            lambda t: t | {"language_model.model.layers.0.extra": np.ones(2)},
            "unexpected language_model.model.layers.0.ex",
        ),
        (lambda t: t | {"lm_head.bias": np.ones(2)}, "unexpected lm_head.bias"),
        (lambda t: t | {"multi_modal_projector.linear_1.bias": np.ones(3)}, r"linear_1.bias is \[3\], expected \[8\]"),
        (
            lambda t: {k: x for k, x in t.items() if "linear_2.bias" not in k},
            "missing multi_modal_projector.linear_2.bias",
        ),
    ],
    ids=["key extra", "another extra", "shape wrong", "key missing"],
)
def test_tensors_that_do_not_fit(tmp_path, change, says):
    folder = hf4(tmp_path)
    save_file(
        {k: np.float32(x) for k, x in change(load_file(folder / "model.safetensors")).items()},
        folder / "model.safetensors",
    )
    both_refuse(folder, tmp_path / "out", says)


def other_tokenizer(folder, tokens=(), image=True):
    """The folder's tokenizer with more tokens, or without `<image>`."""
    content = json.loads((folder / "tokenizer.json").read_text())
    added = [token for token in content["added_tokens"] if image or token["content"] != "<image>"]
    last = max([*content["model"]["vocab"].values(), *(token["id"] for token in added)])
    extra = [added[-1] | dict(id=last + 1 + n, content=text) for n, text in enumerate(tokens)]
    (folder / "tokenizer.json").write_text(json.dumps(content | dict(added_tokens=added + extra)))


def test_a_tokenizer_with_ids_beyond_the_rows(tmp_path):
    folder = hf4(tmp_path)
    other_tokenizer(folder, [f"<x{n}>" for n in range(60)])
    both_refuse(
        folder, tmp_path / "out", "has ids up to 418 and the decoder's embedding 400 rows: .*; copy the tokenizer"
    )


def test_a_tokenizer_with_another_image_token(tmp_path):
    folder = hf4(tmp_path)
    edit(folder / "config.json", lambda value: value.update(image_token_id=356))
    both_refuse(folder, tmp_path / "out", "<image> is 357 in the tokenizer and 356 in the model .*; copy the tokenizer")
    other_tokenizer(folder, image=False)
    both_refuse(
        folder, tmp_path / "out", "image token 356 .* is the text '.*' in the tokenizer: expected one with <image>"
    )


def test_rows_beyond_the_tokenizer_are_legal(tmp_path):
    """A padded vocabulary (400 rows, 358 ids), as Qwen's; an image id that neither tokenizer nor embedding has."""
    folder = hf4(tmp_path)
    other_tokenizer(folder, image=False)
    edit(folder / "config.json", lambda value: value.update(image_token_id=400))
    assert llava_jax.load(str(folder)).config.image_token_id == 400


def test_an_original_with_the_tokenizer_of_another_decoder(tmp_path):
    folder = original_whole(tmp_path)
    other_tokenizer(folder, [f"<x{n}>" for n in range(60)])
    both_refuse(folder, tmp_path / "out", "has ids up to 416 and the decoder's embedding 400 rows")


@pytest.mark.parametrize("weights", ["safetensors", "orbax"])
def test_a_write_that_comes_back_otherwise_is_caught(tmp_path, monkeypatch, weights):
    """The disk changes a byte of a tensor after it was written: no folder is left under the name."""
    from llava_jax.weights import hf_export

    module, name = (orbax_model, "save") if weights == "orbax" else (hf_export, "write_shards")
    written = getattr(module, name)

    def fails(folder, *args):
        written(folder, *args)
        if weights == "orbax":
            paths = sorted((tmp_path / folder / "weights" / "d").iterdir(), key=os.path.getsize)
            paths = paths or orbax_model.files(folder)
        else:
            paths = [os.path.join(folder, "model.safetensors")]
        with open(paths[-1], "r+b") as file:
            file.seek(os.path.getsize(paths[-1]) // 2)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 1]))

    monkeypatch.setattr(module, name, fails)
    with pytest.raises((OSError, InputError), match="read back differs|cannot be read"):
        hf4(tmp_path, weights=weights)
    assert sorted(os.listdir(tmp_path)) == ["clip", "llm"]


def test_a_projector_that_comes_back_otherwise_is_caught(tmp_path, monkeypatch):
    from llava_jax.weights import tensors

    folder = hf4(tmp_path)
    save = tensors.save_tensors
    monkeypatch.setattr(
        tensors,
        "save_tensors",
        lambda path, tensors: save(path, {k: x + 1 for k, x in tensors.items()}),
    )
    with pytest.raises(OSError, match="read back differs"):
        convert.convert(str(folder), f"projector:{tmp_path / 'p.safetensors'}")
    assert not list(tmp_path.glob("p.*"))


# ---- original v1.6 --------------------------------------------------------------------------------------------------


def test_the_original_of_a_next(tmp_path):
    """As v1.6 is published: grids as [width, height], image_newline, the tower inside; there and back bit-equal."""
    folder = original_next(tmp_path)
    said = json.loads((folder / "config.json").read_text())
    assert said["image_aspect_ratio"] == "anyres" and said["mm_patch_merge_type"] == "spatial_unpad"
    assert said["image_grid_pinpoints"] == [[16, 8], [8, 16], [16, 16], [8, 24], [24, 8]]
    tensors = load_file(folder / "model.safetensors")
    assert tensors["model.image_newline"].shape == (8,)
    tower = part(load_file(folder / "clip-vision-tower" / "model.safetensors"), "", "model.vision_tower.vision_tower.")
    save_file(tensors | tower, folder / "model.safetensors")
    os.remove(folder / "clip-vision-tower" / "model.safetensors")
    config, _params, extras = hf.read_llava(str(folder))
    assert config.pinpoints == NEXT.pinpoints and (extras.aspect, extras.vision) == ("anyres", str(folder))
    convert.convert(str(folder), f"hf:{tmp_path / 'back'}")
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("m", "back"))
    assert_equal(other, one)


OTHER_TILES = {
    "mm_patch_merge_type is 'flat'.* expected 'spatial_unpad'": dict(mm_patch_merge_type="flat"),
    "image_aspect_ratio is 'anyres_max_9'": dict(image_aspect_ratio="anyres_max_9"),
    "image_grid_pinpoints is .*expected a list": dict(image_grid_pinpoints="(1x1),...,(6x6)"),
    "image_grid_pinpoints is None": dict(image_grid_pinpoints=None),
    "s2 is True": dict(s2=True),
}


def test_other_ways_of_tiles_are_refused_by_name(tmp_path):
    folder = original_next(tmp_path)
    given = (folder / "config.json").read_text()
    for says, change in OTHER_TILES.items():
        (folder / "config.json").write_text(json.dumps(json.loads(given) | change))
        with pytest.raises(InputError, match=says):
            hf.read_llava_config(str(folder))


def test_a_template_given_for_a_folder_that_names_none(tmp_path, capsys):
    folder = original_whole(tmp_path)
    convert.convert(str(folder), f"hf:{tmp_path / 'a'}")
    assert re.search(r"v1 is assumed \(--template=NAME says another\)", capsys.readouterr().out)
    convert.convert(str(folder), f"hf:{tmp_path / 'b'}", template="mistral_instruct")
    assert "assumed" not in capsys.readouterr().out
    assert llava_jax.load(str(tmp_path / "b")).about["template"] == "mistral_instruct"
    with pytest.raises(InputError, match="unknown template 'v9'"):
        convert.convert(str(folder), f"hf:{tmp_path / 'c'}", template="v9")


# ---- a run's checkpoints --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder of inputs, workdir of a run with checkpoints 2 and 4)."""
    inputs, workdir = tmp_path_factory.mktemp("inputs"), tmp_path_factory.mktemp("run")
    make_inputs(inputs)
    train(make_settings(inputs, "pretrain", train__checkpoint_every=2), str(workdir))
    return inputs, workdir


def test_an_older_checkpoint_is_taken_only_when_it_is_named(trained, tmp_path, capsys):
    """convert, Python and the next stage; a damaged newest one is never replaced in silence."""
    workdir = shutil.copytree(trained[1], tmp_path / "run")
    for path in (workdir / "checkpoints" / "4" / "state").rglob("*"):
        if path.is_file():
            path.write_bytes(b"")
    for ask in (
        lambda: llava_jax.load(str(workdir)),
        lambda: convert.convert(str(workdir), f"projector:{tmp_path / 'p.safetensors'}"),
        lambda: load.read_projector(str(workdir), load.load_trained(str(workdir), step=2)[0].config),
    ):
        with pytest.raises(InputError, match=r"checkpoints/4: .*checkpoints/2 is whole: take that one with --step=2"):
            ask()
    ask = ["convert", f"--from={workdir}", f"--to=projector:{tmp_path / 'p.safetensors'}"]
    assert main([*ask, "--step=2"]) == 0 and main([*ask, "--step=3"]) == 2
    assert "no checkpoint of step 3, it holds [2, 4]" in capsys.readouterr().err
    assert llava_jax.load(str(workdir), step=2).params["projector"]
    with pytest.raises(InputError, match="--step=2: .* is no workdir of train"):
        llava_jax.load(f"hf:{trained[0]}/llava", step=2)


# ---- a full disk ----------------------------------------------------------------------------------------------------

# Files of at most so many kilobytes: the same error as a full disk, without filling one.
LIMITED = """
import resource, sys
from llava_jax.cli.main import main
size = int(sys.argv[1]) * 1024
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize("kind", ["hf", "llava", "orbax", "projector"])
def test_a_full_disk_is_one_line(trained, tmp_path, kind):
    target = tmp_path / "out" / ("p.safetensors" if kind == "projector" else "m")
    target.parent.mkdir()
    limit = "1" if kind == "projector" else "100"
    words = [sys.executable, "-c", LIMITED, limit, "convert", f"--from=hf:{trained[0]}/llava", f"--to={kind}:{target}"]
    ran = subprocess.run(words, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr.count("error")) == (2, 1), ran.stderr
    assert f"error: {target}: cannot be written (File too large); make room, run again" in ran.stderr
    # A thread of orbax may still report that its event loop is closed.
    assert ("Traceback" not in ran.stderr or kind == "orbax") and os.listdir(target.parent) == []


def test_a_save_on_a_full_disk_is_one_line(trained, tmp_path):
    """The run before it stays as it was; with room the same command resumes."""
    settings = make_settings(trained[0], "pretrain", train__checkpoint_every=2)
    write_settings(str(tmp_path / "config.json"), settings)
    words = ["train", f"--config={tmp_path}/config.json", f"--workdir={tmp_path}/run"]
    ran = subprocess.run([sys.executable, "-c", LIMITED, "8", *words], capture_output=True, text=True)
    assert ran.returncode == 2, ran.stderr
    assert f"error: {tmp_path}/run/checkpoints: cannot be written (File too large); make room" in ran.stderr
    assert main(words) == 0 and sorted(os.listdir(tmp_path / "run" / "checkpoints")) == ["2", "4"]
