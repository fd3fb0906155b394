"""Folders of the original LLaVA code, in and out, its LoRA folders, and names that say nothing."""

import dataclasses
import io
import json
import os
import shutil

import ml_dtypes
import numpy as np
import pytest
import sentencepiece
from safetensors.numpy import load_file, save_file
from transformers import AutoConfig, AutoTokenizer

from llava_jax.data.templates import TEMPLATES, render
from llava_jax.data.tokenize import encode, load_tokenizer
from llava_jax.models.llava import build
from llava_jax.types import IMAGE_MARK, ClipConfig, InputError, LlamaConfig, ModelConfig, Turn
from llava_jax.weights import convert, hf, load, name_table
from llava_jax.weights.hf_config import clip_json, llama_json
from llava_jax.weights.load import fingerprint
from llava_jax.weights.original import Companions
from llava_jax.weights.original_export import write_original
from llava_jax.weights.processor import LlavaExtras
from tests.tiny_llava import write_tokenizer
from tests.tiny_run import make_settings
from tests.torch_files import write_bin

CLIP = ClipConfig(width=8, mlp_width=12, layers=3, heads=2, image_size=8, patch_size=4)
LLAMA = LlamaConfig(vocab_size=400, width=8, mlp_width=12, layers=2, heads=4, kv_heads=2, head_dim=6, norm_eps=1e-6)
CONFIG = ModelConfig(vision=CLIP, llm=LLAMA, image_token_id=400)
LORA = dict(peft_type="LORA", r=2, lora_alpha=6, bias="none", base_model_name_or_path="vendor/base")


def drawn(shapes, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def clip_tensors(prefix="vision_model.", dtype=np.float32):
    """A whole tower, its last block and its post-norm included."""
    shapes = {"post_layernorm.weight": (8,), "post_layernorm.bias": (8,)}
    for path, leaf in name_table.flatten(build(CONFIG)[1]["vision"]).items():
        row = name_table.ROWS["vision/" + path]
        shape = name_table.hf_shape(row, leaf.shape[1:] if row.stacked else leaf.shape)
        shapes |= {row.hf.removeprefix(name_table.VISION).format(n): shape for n in range(3 if row.stacked else 1)}
    return drawn({prefix + name: shape for name, shape in shapes.items()}, dtype, seed=1)


def llava_tensors(dtype=np.float32, projector="mlp2x_gelu"):
    """Decoder and projector under the original's names."""
    shapes = {"lm_head.weight": (400, 8)}
    for path, leaf in name_table.flatten(build(CONFIG)[1]["llm"]).items():
        row = name_table.ROWS["llm/" + path]
        if row.hf != name_table.HEAD:
            shape = name_table.hf_shape(row, leaf.shape[1:] if row.stacked else leaf.shape)
            name = row.hf.replace("language_model.", "")
            shapes |= {name.format(n): shape for n in range(2 if row.stacked else 1)}
    if projector == "linear":
        shapes |= {"model.mm_projector.weight": (8, 8), "model.mm_projector.bias": (8,)}
    else:
        shapes |= {
            f"model.mm_projector.{n}.{kind}": s for n in (0, 2) for kind, s in (("weight", (8, 8)), ("bias", (8,)))
        }
    return drawn(shapes, dtype)


def write_config(folder, values):
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump(values, file)


def described(**changes):
    base = llama_json(LLAMA) | dict(architectures=["LlavaLlamaForCausalLM"], model_type="llava")
    base |= dict(mm_vision_tower="vendor/tower", mm_hidden_size=8, mm_projector_type="mlp2x_gelu")
    base |= dict(mm_vision_select_layer=-2, mm_vision_select_feature="patch", image_aspect_ratio="pad")
    base |= dict(torch_dtype="float32", mm_use_im_start_end=False, mm_use_im_patch_token=False)
    return {key: value for key, value in (base | changes).items() if value is not ...}


def write_shards(folder, tensors, parts=2):
    """.bin shards with their index."""
    names = list(tensors)
    files = {f"pytorch_model-0000{n + 1}-of-0000{parts}.bin": names[n::parts] for n in range(parts)}
    for file, held in files.items():
        write_bin(os.path.join(folder, file), {name: tensors[name] for name in held})
    index = {"weight_map": {name: file for file, held in files.items() for name in held}}
    with open(os.path.join(folder, "pytorch_model.bin.index.json"), "w") as file:
        json.dump(index, file)


def write_tower(folder, **options):
    write_config(folder, clip_json(CLIP))
    extra = {"logit_scale": np.ones((), np.float32), "vision_model.embeddings.position_ids": np.arange(5)[None]}
    write_bin(os.path.join(folder, "pytorch_model.bin"), clip_tensors(**options) | extra)
    return str(folder)


@pytest.fixture
def folders(tmp_path):
    """(original folder of .bin shards, CLIP folder of one .bin), both under names that say nothing."""
    folder = tmp_path / "zq"
    write_config(folder, described())
    write_shards(folder, llava_tensors())
    write_tokenizer(str(folder))
    return str(folder), write_tower(tmp_path / "kx")


def flat(params):
    return {path: np.asarray(x) for path, x in name_table.flatten(params).items()}


def expected(tensors, config=CONFIG):
    """Our arrays of tensors under the hub's names, made one by one."""
    made = {}
    for path, leaf in name_table.flatten(build(config)[1]).items():
        row = name_table.ROWS[path]
        shape = leaf.shape[1:] if row.stacked else leaf.shape
        layers = [
            name_table.to_ours(row, tensors[row.hf.format(n)], shape)
            for n in range(leaf.shape[0] if row.stacked else 1)
        ]
        made[path] = np.stack(layers) if row.stacked else layers[0]
    return made


def hub(tensors):
    return {name_table.canonical(name, "original"): tensor for name, tensor in tensors.items()}


def assert_equal(found, wanted):
    assert set(found) == set(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype and found[name].tobytes() == np.ascontiguousarray(array).tobytes(), name


# ---- in ---------------------------------------------------------------------------------------------------------


def test_sharded_bin_and_a_tower_that_is_named(folders):
    folder, tower = folders
    config, params, extras = hf.read_llava(folder, companions=Companions(vision=tower))
    assert config == CONFIG
    assert (extras.aspect, extras.template, extras.template_assumed, extras.vision) == ("pad", "v1", True, tower)
    assert_equal(flat(params), expected(hub(llava_tensors() | clip_tensors())))


@pytest.mark.parametrize("how", ["below", "absolute", "here"])
def test_where_a_tower_may_lie(folders, how, monkeypatch):
    folder, tower = folders
    named = dict(below="eye", absolute=tower, here=os.path.basename(tower))[how]
    if how == "below":
        shutil.move(tower, os.path.join(folder, "eye"))
    monkeypatch.chdir(os.path.dirname(tower))
    write_config(folder, described(mm_vision_tower=named))
    assert hf.read_llava_config(folder)[0] == CONFIG


@pytest.mark.parametrize(
    "prefix", ["model.vision_tower.vision_tower.vision_model.", "model.vision_tower.vision_tower."]
)
def test_a_tower_inside(folders, prefix):
    """As v1.6 and tuned towers are stored; the folder that is named gives its config alone."""
    folder, tower = folders
    os.remove(os.path.join(tower, "pytorch_model.bin"))
    write_shards(folder, llava_tensors() | clip_tensors(prefix))
    _config, params, extras = hf.read_llava(folder, companions=Companions(vision=tower))
    assert extras.vision == folder
    assert_equal(flat(params), expected(hub(llava_tensors() | clip_tensors())))


def test_linear_projector_and_older_keys(folders):
    folder, tower = folders
    gone = ("mm_projector_type", "image_aspect_ratio", "mm_hidden_size", "mm_vision_select_feature")
    write_config(folder, described(**dict.fromkeys(gone, ...)))
    write_shards(folder, llava_tensors(projector="linear"))
    config, params, extras = hf.read_llava(folder, companions=Companions(vision=tower))
    assert (config.projector, extras.aspect) == ("linear", "crop")
    weight = llava_tensors(projector="linear")["model.mm_projector.weight"]
    np.testing.assert_array_equal(params["projector"]["linear_1"]["kernel"], weight.T)


def test_images_between_tokens(tmp_path, folders):
    """mm_use_im_start_end: three rows more, and a template that writes the tokens as tokens, there and back."""
    folder, tower = folders
    with pytest.raises(InputError, match="without <im_start> and <im_end>"):
        write_config(folder, described(mm_use_im_start_end=True))
        hf.read_llava_config(folder, Companions(vision=tower))
    tokenizer = AutoTokenizer.from_pretrained(folder, config=AutoConfig.for_model("llama"))
    tokenizer.add_tokens(["<im_patch>", "<im_start>", "<im_end>"], special_tokens=True)
    tokenizer.save_pretrained(folder)
    write_config(folder, described(mm_use_im_start_end=True, mm_use_im_patch_token=True))
    assert hf.read_llava_config(folder, Companions(vision=tower))[1].template == "v1_im_start_end"
    spans = render([Turn("human", "What?\n<image>")], TEMPLATES["v1_im_start_end"], open_turn=True)
    ids = encode(spans, load_tokenizer(folder)).tokens.tolist()
    at = ids.index(IMAGE_MARK)
    assert [ids[at - 1], ids[at + 1]] == tokenizer.convert_tokens_to_ids(["<im_start>", "<im_end>"])
    convert.convert(folder, f"hf:{tmp_path / 'h'}", vision=tower)
    assert "'<im_start><image><im_end>'" in (tmp_path / "h" / "chat_template.jinja").read_text().replace('"', "'")
    convert.convert(str(tmp_path / "h"), f"llava:{tmp_path / 'o'}")
    assert json.loads((tmp_path / "o" / "config.json").read_text())["mm_use_im_start_end"] is True
    assert hf.read_llava_config(str(tmp_path / "o"))[1].template == "v1_im_start_end"


REFUSED = {
    "mm_projector_type": "identity",
    "mm_vision_select_feature": "cls_patch",
    "mm_resampler_type": "perceiver",
    "image_aspect_ratio": "highres",
    "mm_patch_merge_type": "spatial_unpad",
    "model_type": "llava_mpt",
    "mm_hidden_size": 9,
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_not_supported_is_refused_by_name(folders, key):
    folder, tower = folders
    write_config(folder, described(**{key: REFUSED[key]}))
    with pytest.raises(InputError, match=f"{key} is {REFUSED[key]!r}"):
        hf.read_llava_config(folder, Companions(vision=tower))


def test_errors_name_what_is_missing(folders):
    folder, tower = folders
    with pytest.raises(InputError, match=r"vision tower 'vendor/tower' .* --vision=DIR"):
        hf.read_llava_config(folder)
    with pytest.raises(InputError, match="--vision=.*no config.json"):
        hf.read_llava_config(folder, Companions(vision=os.path.dirname(folder)))
    with pytest.raises(InputError, match="needs no base"):
        hf.read_llava_config(folder, Companions(tower, tower))
    tensors = llava_tensors()
    write_shards(folder, {name: x[:-1] if name[-11:] == "norm.weight" else x for name, x in tensors.items()})
    with pytest.raises(InputError, match=r"model.norm.weight is \[7\], expected \[8\]"):
        hf.read_llava(folder, companions=Companions(vision=tower))
    write_shards(folder, {"model.extra.weight": np.ones(2, np.float32), **tensors})
    with pytest.raises(InputError, match="unexpected model.extra.weight"):
        hf.read_llava(folder, companions=Companions(vision=tower))
    os.remove(os.path.join(folder, "pytorch_model-00002-of-00002.bin"))
    with pytest.raises(InputError, match="absent: pytorch_model-00002-of-00002.bin"):
        hf.read_llava(folder, companions=Companions(vision=tower))


def test_fingerprint_sees_bin_and_the_tower(folders):
    folder, tower = folders
    write_config(folder, described(mm_vision_tower=tower))
    first = fingerprint(folder)
    assert first and fingerprint(tower)
    write_tower(tower, dtype=ml_dtypes.bfloat16)
    second = fingerprint(folder)
    write_shards(folder, llava_tensors(ml_dtypes.bfloat16))
    assert len({first, second, fingerprint(folder)}) == 3


@pytest.mark.parametrize("kind", ["llava", "llava_llama"])
def test_the_tokenizer_is_the_decoders(tmp_path, kind, caplog):
    """transformers takes `llava` for its own model type, and leaves out the space before the first word there."""
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["What is this? It is a cat."] * 20),
        model_writer=written,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    ids = []
    for name, config in (("a", dict(model_type="llama")), ("b", described(model_type=kind))):
        write_config(tmp_path / name, config)
        (tmp_path / name / "tokenizer.model").write_bytes(written.getvalue())
        (tmp_path / name / "tokenizer_config.json").write_text(json.dumps(dict(tokenizer_class="LlamaTokenizer")))
        ids.append(load_tokenizer(str(tmp_path / name)).encode_text("What is this?"))
    assert ids[0] == ids[1] and "llava" not in caplog.text


def test_a_run_starts_from_it(tmp_path, folders):
    """init.model=llava:DIR and a projector file of torch's, read as `train` reads them."""
    folder, tower = folders
    write_config(folder, described(mm_vision_tower=tower))
    projector = {name: x + 1 for name, x in llava_tensors().items() if "mm_projector" in name}
    file = write_bin(tmp_path / "mm_projector.bin", projector)
    settings = make_settings(tmp_path, "finetune", init__model=f"llava:{folder}", init__projector=file)
    plan = load.model_spec(settings)
    assert (plan.vision_folder, plan.tokenizer, plan.config.projector) == (tower, folder, "mlp2x_gelu")
    read = load.read_files(plan, dict.fromkeys(hf.PARTS, "float32"))
    assert_equal(flat(read), expected(hub(llava_tensors() | clip_tensors() | projector)))


# ---- LoRA -------------------------------------------------------------------------------------------------------


def test_a_head_beside_the_projector(tmp_path, folders):
    """non_lora_trainables with `base_model.model.lm_head.weight`, whose prefix is shorter than the others'."""
    folder, tower = folders
    head = llava_tensors()["lm_head.weight"] + 1
    lora, _ = lora_folder(tmp_path, others={"base_model.model.lm_head.weight": head})
    params = hf.read_llava(str(lora), companions=Companions(vision=tower, base=folder))[1]
    np.testing.assert_array_equal(params["llm"]["head"]["kernel"], head.T)


def lora_folder(tmp_path, adapter=None, others=None, **changes):
    folder = tmp_path / "wv"
    write_config(folder, described())
    (folder / "adapter_config.json").write_text(json.dumps(LORA | changes))
    shapes = {"layers.0.self_attn.q_proj": (24, 8), "layers.1.mlp.down_proj": (8, 12)}
    given = {}
    for name, (out, inner) in shapes.items():
        given[f"base_model.model.model.{name}.lora_A.weight"] = (2, inner)
        given[f"base_model.model.model.{name}.lora_B.weight"] = (out, 2)
    tensors = drawn(given, seed=3)
    write_bin(folder / "adapter_model.bin", tensors | (adapter or {}))
    projector = {n: x for n, x in llava_tensors().items() if "mm_projector" in n}
    if others is not False:
        trained = {"base_model.model." + name: x + 1 for name, x in projector.items()}
        write_bin(folder / "non_lora_trainables.bin", trained | (others or {}))
    return folder, tensors


@pytest.mark.parametrize("base", ["llama", "llava"])
def test_lora_is_merged(tmp_path, folders, base):
    """On a plain decoder, as v1.5 trains it, and on a whole model, whose projector is replaced."""
    folder, tower = folders
    tensors = llava_tensors()
    if base == "llama":
        write_config(folder, llama_json(LLAMA))
        write_shards(folder, {name: x for name, x in tensors.items() if "mm_projector" not in name})
    lora, update = lora_folder(tmp_path)
    companions = Companions(vision=tower, base=folder)
    _, params, extras = hf.read_llava(str(lora), companions=companions)
    assert extras.tokenizer == folder
    for name in list(tensors):
        if "mm_projector" in name:
            tensors[name] = tensors[name] + 1
        key = "base_model.model." + name.removesuffix("weight")
        if key + "lora_A.weight" in update:
            tensors[name] = tensors[name] + np.float32(3) * (
                update[key + "lora_B.weight"] @ update[key + "lora_A.weight"]
            )
    assert_equal(flat(params), expected(hub(tensors | clip_tensors())))


def test_lora_refusals(tmp_path, folders):
    folder, tower = folders
    companions = Companions(vision=tower, base=folder)
    lora, _ = lora_folder(tmp_path)
    with pytest.raises(InputError, match="base of its adapter, 'vendor/base', .*--base=DIR"):
        hf.read_llava_config(str(lora), Companions(vision=tower))
    lost = "base_model.model.model.layers.7.mlp.up_proj.lora_A.weight"
    half = "base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"
    wide = {f"base_model.model.lm_head.lora_{x}.weight": np.ones((2, 2), np.float32) for x in "AB"}
    lora_folder(tmp_path, {lost: np.ones((2, 8), np.float32), half: np.ones((2, 8), np.float32)} | wide)
    with pytest.raises(InputError) as error:
        hf.read_llava(str(lora), companions=companions)
    for says in (f"{lost} belongs to no weight", f"{half} has no counterpart", "[2, 2] is not lm_head.weight [400, 8]"):
        assert says in str(error.value)
    lora_folder(tmp_path, others={"base_model.model.model.odd": np.ones(1, np.float32)})
    with pytest.raises(InputError, match="unexpected model.odd"):
        hf.read_llava(str(lora), companions=companions)
    for change in (
        dict(use_dora=True),
        dict(bias="all"),
        dict(peft_type="IA3"),
        dict(r=0),
        dict(init_lora_weights="pissa"),
    ):
        lora_folder(tmp_path, **change)
        with pytest.raises(InputError, match=f"{next(iter(change))} is"):
            hf.read_llava(str(lora), companions=companions)
    write_config(folder, llama_json(LLAMA))
    write_shards(folder, {name: x for name, x in llava_tensors().items() if "mm_projector" not in name})
    shutil.rmtree(lora)
    lora_folder(tmp_path, others=False)
    with pytest.raises(InputError, match=r"no non_lora_trainables.bin.*missing multi_modal_projector"):
        hf.read_llava(str(lora), companions=companions)


# ---- out --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype, rows", [("float32", 357), ("bfloat16", 357), ("bfloat16", 400)])
def test_there_and_back(tmp_path, folders, dtype, rows, capsys):
    """original -> orbax -> hf -> original -> hf: bit-equal tensors, no row of the vocabulary too many or too few."""
    folder, tower = folders
    numpy_dtype = np.dtype(np.float32 if dtype == "float32" else ml_dtypes.bfloat16)
    tensors = {name: x[:rows] for name, x in llava_tensors(numpy_dtype).items()}
    write_config(folder, described(torch_dtype=dtype, vocab_size=rows))
    write_shards(folder, tensors)
    write_tower(tower, dtype=numpy_dtype)
    convert.convert(f"llava:{folder}", f"orbax:{tmp_path / 'w'}", vision=tower)
    convert.convert(f"orbax:{tmp_path / 'w'}", f"hf:{tmp_path / 'h'}")
    convert.convert(str(tmp_path / "h"), f"llava:{tmp_path / 'o'}")
    convert.convert(str(tmp_path / "o"), f"hf:{tmp_path / 'again'}")
    said = capsys.readouterr().out
    assert (rows == 357) == ("357 -> 384 rows" in said) == ("384 -> 357 rows, without" in said)
    assert_equal(load_file(tmp_path / "o" / "model.safetensors"), tensors)
    assert_equal(load_file(tmp_path / "o" / "clip-vision-tower" / "model.safetensors"), clip_tensors(dtype=numpy_dtype))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("h", "again"))
    assert_equal(one, two)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("h", "again")]
    assert configs[0] == configs[1] and configs[0]["llava_jax"]["aspect"] == "pad"


def test_what_the_original_does_not_know_is_not_written(tmp_path, folders):
    folder, tower = folders
    config, params, _extras = hf.read_llava(folder, companions=Companions(vision=tower))
    siglip = dataclasses.replace(config, vision=dataclasses.replace(CLIP, family="siglip"))
    qwen = dataclasses.replace(config, llm=dataclasses.replace(LLAMA, family="qwen3"))
    for given, aspect, says in (
        (siglip, "pad", "not siglip"),
        (config, "squash", "and squash"),
        (qwen, "pad", "qwen3"),
    ):
        with pytest.raises(InputError, match=says + ".*write hf:DIR"):
            write_original(
                str(tmp_path / "o"), given, params, LlavaExtras(aspect=aspect, tokenizer=folder, vision=tower)
            )


def test_what_a_written_folder_says(tmp_path, folders):
    folder, tower_folder = folders
    convert.convert(
        folder, f"llava:{tmp_path / 'o'}", vision=tower_folder, dtype="bfloat16", mm_vision_tower="openai/clip"
    )
    said = json.loads((tmp_path / "o" / "config.json").read_text())
    wanted = described(mm_vision_tower="openai/clip", model_type="llava_llama", torch_dtype="bfloat16", vocab_size=400)
    assert {key: said[key] for key in wanted} == wanted | dict(architectures=["LlavaLlamaForCausalLM"])
    head = load_file(tmp_path / "o" / "model.safetensors")["lm_head.weight"]
    assert_equal({"x": head}, {"x": llava_tensors()["lm_head.weight"].astype(ml_dtypes.bfloat16)})
    tower = json.loads((tmp_path / "o" / "clip-vision-tower" / "config.json").read_text())
    assert tower["vision_feature_layer"] == -2 and tower["projection_dim"] > 0  # llama.cpp's converter reads them there
    assert (tmp_path / "o" / "chat_template.jinja").read_text().startswith("{%")
    convert.convert(folder, f"llava:{tmp_path / 'cut'}", vision=tower_folder, pad_vocab=1)
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["vocab_size"] == load_tokenizer(folder).size < 400


def test_rows_added_by_others_are_taken_off(tmp_path, folders):
    """Without our key the tokenizer tells: `<image>` and `<pad>` after its own last token, rows to a multiple of 64."""
    folder, tower = folders
    write_config(folder, described(vocab_size=357))
    tensors = llava_tensors()
    cut = {name: x[:357] for name, x in tensors.items() if x.shape[0] == 400}
    write_shards(folder, tensors | cut)
    convert.convert(folder, f"hf:{tmp_path / 'h'}", vision=tower)
    config = json.loads((tmp_path / "h" / "config.json").read_text())
    del config["llava_jax"]
    write_config(tmp_path / "h", config)
    convert.convert(str(tmp_path / "h"), f"llava:{tmp_path / 'o'}")
    assert len(load_file(tmp_path / "o" / "model.safetensors")["lm_head.weight"]) == 357


@pytest.mark.parametrize("projector", ["mlp2x_gelu", "linear"])
def test_projector_alone(tmp_path, folders, projector):
    folder, tower = folders
    write_config(folder, described(mm_projector_type=projector))
    tensors = llava_tensors(projector=projector)
    write_shards(folder, tensors)
    path = tmp_path / "p.safetensors"
    convert.convert(folder, f"projector:{path}", vision=tower)
    wanted = {name: x for name, x in tensors.items() if "mm_projector" in name}
    assert_equal(load_file(path), wanted)
    config, params, _ = hf.read_llava(folder, companions=Companions(vision=tower))
    again = write_bin(tmp_path / "mm_projector.bin", wanted)
    for file in (str(path), again):
        assert_equal(flat(hf.read_projector(file, config)), flat(params["projector"]))
    with pytest.raises(InputError, match="already there"):
        convert.convert(folder, f"projector:{path}", vision=tower)
    with pytest.raises(InputError, match="a .safetensors file"):
        convert.convert(folder, f"projector:{tmp_path / 'p.pt'}", vision=tower)


def test_convert_refuses(tmp_path, folders):
    folder, tower = folders
    to = f"hf:{tmp_path / 'h'}"
    for options, says in (
        (dict(dtype="float16"), "--dtype=float16"),
        (dict(mm_vision_tower="x"), "goes with --to=llava"),
        (dict(), "--vision=DIR"),
    ):
        with pytest.raises(InputError, match=says):
            convert.convert(folder, to, **options)
    convert.convert(folder, to, vision=tower)
    with pytest.raises(InputError, match="holds its whole model"):
        convert.convert(to, f"hf:{tmp_path / 'again'}", vision=tower)


def test_bin_stands_wherever_safetensors_do(tmp_path, folders):
    """A LLaMA folder of one .bin, and the same tensors as safetensors next to it, which are then taken."""
    _folder, _ = folders
    tensors = {name: x for name, x in llava_tensors().items() if "mm_projector" not in name}
    write_config(tmp_path / "l", llama_json(LLAMA))
    write_bin(tmp_path / "l" / "pytorch_model.bin", tensors)
    first = flat(hf.read_llama(str(tmp_path / "l"))[1])
    save_file({name: x + 1 for name, x in tensors.items()}, tmp_path / "l" / "model.safetensors")
    second = flat(hf.read_llama(str(tmp_path / "l"))[1])
    for path, array in first.items():
        np.testing.assert_array_equal(array + 1, second[path])


# ---- parts alone, and the base they belong to ---------------------------------------------------------------------


def test_a_projector_of_a_lora_run(tmp_path, folders):
    """non_lora_trainables.bin, with peft's prefix, by itself and by its folder."""
    folder, tower = folders
    lora, _ = lora_folder(tmp_path)
    config, params, _ = hf.read_llava(str(lora), companions=Companions(vision=tower, base=folder))
    assert_equal(flat(hf.read_projector(str(lora / "non_lora_trainables.bin"), config)), flat(params["projector"]))
    assert_equal(flat(load.read_projector(str(lora), config)), flat(params["projector"]))


@pytest.fixture
def stage_1(tmp_path, folders):
    """(what the original's pretrain script leaves, its base, the tower, the tensors of both)."""
    base, tower = folders
    tensors = llava_tensors()
    write_config(base, llama_json(LLAMA))
    write_shards(base, {name: x for name, x in tensors.items() if "mm_projector" not in name})
    write_config(tmp_path / "pt", described())
    write_bin(tmp_path / "pt" / "mm_projector.bin", {n: x for n, x in tensors.items() if "mm_projector" in n})
    return str(tmp_path / "pt"), base, tower, tensors


def test_a_stage_1_folder_with_its_base(tmp_path, stage_1):
    folder, base, tower, tensors = stage_1
    for companions in (Companions(tower, base), Companions(tower)):
        _, params, extras = hf.read_llava(folder, companions=companions)
        assert_equal(flat(params), expected(hub(tensors | clip_tensors())))
        assert extras.tokenizer == base
        write_config(folder, described(_name_or_path=base))
    convert.convert(f"llava:{folder}", f"hf:{tmp_path / 'h'}", vision=tower, base=base)
    assert_equal(flat(load.read_projector(folder, CONFIG)), flat(params["projector"]))


def test_a_stage_1_folder_without_its_base(tmp_path, stage_1):
    folder, _, tower, _ = stage_1
    with pytest.raises(InputError, match=r"projector alone \(mm_projector.bin\); name the decoder .*--base=DIR"):
        hf.read_llava(folder, companions=Companions(tower))
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="holds neither checkpoints nor mm_projector.bin nor non_lora_trainables.bin"):
        load.read_projector(str(tmp_path / "none"), CONFIG)


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards_without_an_index(tmp_path, folders, kind):
    folder, tower = folders
    wanted = flat(hf.read_llava(folder, companions=Companions(vision=tower))[1])
    os.remove(os.path.join(folder, "pytorch_model.bin.index.json"))
    if kind == "safetensors":
        for n, names in enumerate((list(llava_tensors())[::2], list(llava_tensors())[1::2]), 1):
            held = {name: llava_tensors()[name] for name in names}
            save_file(held, os.path.join(folder, f"model-0000{n}-of-00002.safetensors"))
            os.remove(os.path.join(folder, f"pytorch_model-0000{n}-of-00002.bin"))
    assert_equal(flat(hf.read_llava(folder, companions=Companions(vision=tower))[1]), wanted)
    last = f"{'pytorch_' if kind == 'bin' else ''}model-00002-of-00002.{kind}"
    os.remove(os.path.join(folder, last))
    with pytest.raises(InputError, match=f"shards without an index, and of 00002 absent: {last}"):
        hf.read_llava(folder, companions=Companions(vision=tower))
