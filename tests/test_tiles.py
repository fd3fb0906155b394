"""LLaVA-NeXT's images: published token counts, what each image token takes, rows, folders and training on them.

The comparison with transformers is tests/parity/test_anyres.py.
"""

import dataclasses
import json
import shutil
from contextlib import closing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import ExifTags, Image
from safetensors.numpy import load_file, save_file

from llava_jax import api
from llava_jax.aot.compile import batch_shape
from llava_jax.data import validate
from llava_jax.data.images import image_size
from llava_jax.data.packing import plan_batches
from llava_jax.data.pipeline import make_pipeline
from llava_jax.data.records import load_records
from llava_jax.data.tiles import NEWLINE, Tiling, rows_of_tiles, tiling
from llava_jax.data.tokenize import load_tokenizer
from llava_jax.data.validate import check_records, verify
from llava_jax.models.llava import build
from llava_jax.parallel.sharding import make_mesh
from llava_jax.train.loop import train
from llava_jax.train.setup import abstract_batch
from llava_jax.types import ClipConfig, InputError
from llava_jax.weights import convert, hf, name_table
from llava_jax.weights.hf_config import default_pinpoints, llava_config, llava_json
from llava_jax.weights.hf_export import write_llava
from llava_jax.weights.load import load_trained, model_spec, read_files, read_model, read_projector
from llava_jax.weights.processor import LlavaExtras
from tests import tiny_llava, tiny_run

PUBLISHED = Tiling(336, 24, ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)))
CONFIG = dataclasses.replace(
    tiny_llava.config(), pinpoints=default_pinpoints(ClipConfig(16, 32, 2, 2, image_size=16, patch_size=8))
)
SMALL = tiling(CONFIG)  # tiles of 16 pixels and 2 x 2 patches


def draw(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


# ---- tiles and tokens -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size, tokens, tiles",
    [
        ((336, 336), 1176, 3),
        ((640, 480), 2340, 5),
        ((480, 640), 2352, 5),
        ((1000, 300), 2182, 4),
        ((1920, 1080), 1948, 5),
        ((672, 672), 2928, 5),
    ],
)
def test_published_token_counts(size, tokens, tiles):
    assert PUBLISHED.tokens([size]) == [tokens] and PUBLISHED.tiles([size]) == [tiles]
    assert len(PUBLISHED.feature_index([size])) == tokens


def test_what_the_tokens_of_a_image_take():
    """40 x 20 on 2 x 1 tiles of 2 x 2 patches: nothing is padding; lines run through both tiles."""
    base, lines = [0, 1, 2, 3], [[4, 5, 8, 9, NEWLINE], [6, 7, 10, 11, NEWLINE]]
    assert SMALL.feature_index([(40, 20)]).tolist() == base + lines[0] + lines[1]
    later = SMALL.feature_index([(40, 20), (40, 20)], first=2).reshape(2, -1)
    assert later[0, :5].tolist() == [8, 9, 10, 11, 12] and later[1, 0] == (2 + 3) * 4
    assert (later == NEWLINE).sum() == 4


def test_padding_is_left_out():
    """16 x 48 fits 3 x 1 tiles wholly; at 12 x 48 the columns next to it are padding but round to a patch each."""
    assert SMALL.feature_index([(16, 48)])[4:].reshape(6, 3)[:, :2].tolist() == np.arange(4, 16).reshape(6, 2).tolist()
    assert SMALL.tokens([(16, 48), (2, 48)]) == [4 + 6 * 3, 4 + 6 * 1]


def test_tiles_are_the_whole_image_and_the_grid():
    image = draw(32, 16)
    tiles = SMALL.cut(image)
    assert tiles.shape == (3, 16, 16, 3) and tiles.dtype == np.uint8
    np.testing.assert_array_equal(tiles[0], np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC)))
    np.testing.assert_array_equal(np.concatenate(tiles[1:], axis=1), np.asarray(image))
    padded = SMALL.cut(draw(32, 10))  # 3 black lines above and below
    np.testing.assert_array_equal(
        padded[1:, :3], np.broadcast_to(SMALL.cut(Image.new("RGB", (8, 8)))[0, :1], (2, 3, 16, 3))
    )


def test_a_size_is_read_without_decoding(tmp_path):
    draw(30, 20).save(tmp_path / "a.png")
    assert image_size(str(tmp_path / "a.png")) == (30, 20)
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    assert image_size(str(tmp_path / "cut.png")) == (30, 20)
    with pytest.raises(InputError, match="none.png: no such file"):
        image_size(str(tmp_path / "none.png"))
    (tmp_path / "text.png").write_text("x")
    with pytest.raises(InputError, match="text.png: not an image"):
        image_size(str(tmp_path / "text.png"))


# ---- the model --------------------------------------------------------------------------------------------------


def test_features_and_newlines_go_where_the_plan_says():
    model = nnx.merge(build(CONFIG)[0], tiny_llava.sharp_params(CONFIG))
    tokens_BT = np.full((1, 20), 5, np.int32)
    tokens_BT[0, 3:17] = CONFIG.image_token_id
    tiles = SMALL.cut(draw(40, 20))
    pixels, feature_index_BT = rows_of_tiles(tokens_BT, tiles.transpose(0, 3, 1, 2)[None], np.array([[20, 40]]), CONFIG)
    features_BPD = model.image_features(jnp.asarray(pixels))
    x_BTD = np.asarray(model.embed_and_merge(jnp.asarray(tokens_BT), features_BPD, jnp.asarray(feature_index_BT)))
    newline = np.asarray(model.projector.image_newline)
    wanted = [newline if n == NEWLINE else features_BPD[0, n] for n in SMALL.feature_index([(40, 20)])]
    np.testing.assert_array_equal(x_BTD[0, 3:17], wanted)
    np.testing.assert_array_equal(x_BTD[0, [0, 19]], np.asarray(model.llm.embed(jnp.full((1, 2), 5)))[0])


def test_tokens_tiles_and_sizes_have_to_belong_together():
    tokens_BT = np.full((2, 30), 5, np.int32)
    tokens_BT[1, :14] = CONFIG.image_token_id
    pixels = SMALL.cut(draw(40, 20)).transpose(0, 3, 1, 2)[None]
    found, feature_index_BT = rows_of_tiles(tokens_BT, pixels, np.array([[20, 40]]), CONFIG)
    assert found.shape == (2, 3, 16, 16, 3) and not found[0].any() and (feature_index_BT[1] == NEWLINE).sum() == 2
    with pytest.raises(InputError, match=r"image tokens .* \[0, 14\]; expected \[\]"):
        rows_of_tiles(tokens_BT, None, None, CONFIG)
    with pytest.raises(InputError, match=r"expected \[22\] for"):
        rows_of_tiles(tokens_BT, pixels, np.array([[48, 16]]), CONFIG)
    with pytest.raises(InputError, match=r"pixels are \[1, 2, 3, 16, 16\]; expected \[1, 3, 3, 16, 16\]"):
        rows_of_tiles(tokens_BT, pixels[:, :2], np.array([[20, 40]]), CONFIG)


# ---- folders ----------------------------------------------------------------------------------------------------


def test_config_both_ways_and_what_it_refuses():
    given = llava_json(CONFIG, dtype="float32", pad_id=0, bos_id=1, eos_id=2)
    assert given["architectures"] == ["LlavaNextForConditionalGeneration"] and given["model_type"] == "llava_next"
    assert llava_config(given, "c").pinpoints == CONFIG.pinpoints
    vision = ClipConfig(1024, 4096, 24, 16, image_size=336, patch_size=14)
    assert default_pinpoints(vision) == PUBLISHED.pinpoints
    published = dict(model_type="llava_next", text_config=given["text_config"], image_token_index=400)
    assert llava_config(published, "c").pinpoints == PUBLISHED.pinpoints
    for wrong in ([[16, 30]], [], [16, 32], [[0, 16]], "16"):
        with pytest.raises(InputError, match="image_grid_pinpoints .* multiple of the vision tower's 16 pixels"):
            llava_config(given | dict(image_grid_pinpoints=wrong), "c")
    with pytest.raises(InputError, match="use_image_newline_parameter is False"):
        llava_config(given | dict(use_image_newline_parameter=False), "c")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """tiny_run's rows with images of many shapes, one row of two; a LLaVA-1.5 and a LLaVA-NeXT folder."""
    folder = tmp_path_factory.mktemp("anyres")
    tiny_run.make_inputs(folder)
    for i, size in enumerate([(40, 20), (16, 48), (33, 33), (30, 20)]):
        draw(*size).save(folder / "images" / f"{i}.png")
    rows = json.loads((folder / "rows.json").read_text())
    rows[7] |= {"image": ["3.png", "0.png"]}
    rows[7]["conversations"][0]["value"] = "<image>\n<image>\nWhich?"
    (folder / "rows.json").write_text(json.dumps(rows))
    config = hf.read_llava_config(str(folder / "llava"))[0]
    config = dataclasses.replace(config, pinpoints=default_pinpoints(config.vision))
    extras = LlavaExtras(aspect="anyres", tokenizer=str(folder / "llava"), vision=str(folder / "llava"))
    write_llava(str(folder / "next"), config, tiny_run.make_params(config), extras)
    return folder


def settings_of(inputs, model="next", **changes):
    given = dict(init__model=f"hf:{inputs}/{model}", data__aspect="anyres", train__batch_size=8, train__steps=1)
    return tiny_run.make_settings(inputs, "finetune", **given | changes)


def test_a_folder_is_read_as_written(inputs):
    config, params, extras = hf.read_llava(str(inputs / "next"))
    assert len(config.pinpoints) == 5 and extras.aspect == "anyres"
    wanted = name_table.flatten(tiny_run.make_params(config))
    assert set(wanted) == set(name_table.flatten(params)) and "projector/image_newline" in wanted
    for path in ("projector/image_newline", "projector/linear_1/kernel", "vision/position"):
        np.testing.assert_array_equal(name_table.flatten(params)[path], wanted[path])


def test_any_model_becomes_a_next_and_none_ceases_to_be_one(inputs):
    settings = settings_of(inputs, model="llava")
    plan = model_spec(settings)
    assert plan.config.pinpoints == default_pinpoints(plan.config.vision)
    read = read_files(plan, dict.fromkeys(hf.PARTS, "float32"))
    newline = read["projector"]["image_newline"]
    assert newline.shape == (32,) and newline.dtype == np.float32 and 0.5 < newline.std() * 32**0.5 < 1.5
    assert jax.tree.structure(read) == jax.tree.structure(build(plan.config)[1])
    with pytest.raises(InputError, match="data.aspect=pad: init.model=hf:.* is a LLaVA-NeXT.*expected data.aspect=any"):
        model_spec(settings_of(inputs, data__aspect="pad"))


def test_a_projector_file_may_hold_the_newline_or_not(inputs, tmp_path):
    config = model_spec(settings_of(inputs)).config
    weights = load_file(inputs / "next" / "model.safetensors")
    own = {name: x for name, x in weights.items() if name.startswith(name_table.PROJECTOR)}
    for extra in ({}, {"model.image_newline": weights["image_newline"]}):
        save_file(own | extra, tmp_path / "p.safetensors")
        assert ("image_newline" in read_projector(str(tmp_path / "p.safetensors"), config)) == bool(extra)
    with pytest.raises(InputError, match="unexpected model.image_newline"):
        read_projector(str(tmp_path / "p.safetensors"), dataclasses.replace(config, pinpoints=()))


# ---- rows and training ------------------------------------------------------------------------------------------


def batches_of(settings, row_multiple=1, change=lambda records: records):
    """(model config, records, tokenizer, what was checked, first batch); `change` is done to the records first."""
    plan = model_spec(settings)
    config, tokenizer = plan.config, load_tokenizer(plan.tokenizer)
    records = change(load_records(settings.data.annotations))
    sizes = dict(patches=config.vision.patches, tiling=tiling(config))
    checked = check_records(records, settings.data, tokenizer, **sizes)
    counts = dict(batch_size=settings.train.batch_size, row_multiple=row_multiple, steps=1, seed=0)
    batches = plan_batches(records, checked.lengths_A, settings.data, slots_A=checked.slots_A, **counts)
    sizes |= dict(image_size=config.vision.image_size, image_token_id=config.image_token_id)
    stream = make_pipeline(records, settings.data, tokenizer, batches, **sizes)
    with closing(stream):
        return config, records, tokenizer, checked, next(stream)


@pytest.fixture(scope="module", params=[False, True], ids=["rows", "packed"])
def first(inputs, request):
    return batches_of(settings_of(inputs, data__pack=request.param))


def test_rows_hold_their_images_tokens_tiles_and_targets(inputs, first):
    config, records, tokenizer, checked, batch = first
    tiles = tiling(config)
    assert batch.pixels_BNXYC.shape[1] >= 8 and batch.feature_index_BT.dtype == np.int32
    seen = 0
    for b, rows_M in enumerate(batch.rows_BM):
        slot = 0
        for segment, row in enumerate(rows_M[rows_M >= 0], start=1):
            own = batch.segment_ids_BT[b] == segment
            images = [Image.open(inputs / "images" / name) for name in records[row].images]
            sizes = [image.size for image in images]
            is_image = batch.tokens_BT[b, own] == config.image_token_id
            assert is_image.sum() == sum(tiles.tokens(sizes)) and own.sum() == checked.lengths_A[row]
            np.testing.assert_array_equal(batch.feature_index_BT[b, own][is_image], tiles.feature_index(sizes, slot))
            for image in images:
                wanted = tiles.cut(image)
                np.testing.assert_array_equal(batch.pixels_BNXYC[b, slot : slot + len(wanted)], wanted)
                slot += len(wanted)
            targets = batch.targets_BT[b, own]
            assert not targets[is_image].any()
            answer = tokenizer.decode(batch.tokens_BT[b, own][targets])
            assert answer.strip() == records[row].turns[1].text
            seen += 1
        assert not batch.pixels_BNXYC[b, slot:].any()
    assert seen == 8 and checked.slots_A.tolist()[5] == 0 and checked.slots_A.max() == checked.slots_A[7]


def test_images_that_come_with_their_rows_make_the_same_batch(inputs, first):
    def with_bytes(records):
        folder = inputs / "images"
        return [replace(one, images=tuple((folder / name).read_bytes() for name in one.images)) for one in records]

    replace, batch = dataclasses.replace, first[-1]
    packed = bool((batch.segment_ids_BT > 1).any())
    ours = batches_of(settings_of(inputs, data__pack=packed), change=with_bytes)[-1]
    for mine, theirs in zip(ours, batch, strict=True):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("exif", ["apply", "ignore"])
def test_a_sideways_photograph_is_checked_cut_and_counted_as_it_is_shown(inputs, tmp_path, exif):
    """Stored 48 x 16 with EXIF saying that it is to be turned by a quarter: 16 x 48 where EXIF is applied."""
    shutil.copytree(inputs / "images", tmp_path / "images")
    shutil.copyfile(inputs / "rows.json", tmp_path / "rows.json")
    names = {name for record in load_records(str(inputs / "rows.json")) for name in record.images}
    stored, orientation = draw(48, 16), Image.Exif()
    orientation[ExifTags.Base.Orientation] = 6
    shown = stored.transpose(Image.Transpose.ROTATE_270) if exif == "apply" else stored

    def batch_of(image, **how):
        for name in names:
            image.save(tmp_path / "images" / name, **how)
        files = dict(data__annotations=str(tmp_path / "rows.json"), data__images=str(tmp_path / "images"))
        settings = settings_of(inputs, data__exif=exif, **files)
        return settings, batches_of(settings)

    settings, (config, _records, tokenizer, checked, batch) = batch_of(stored, exif=orientation)
    for mine, theirs in zip(batch, batch_of(shown)[1][-1], strict=True):
        np.testing.assert_array_equal(mine, theirs)
    batch_of(stored, exif=orientation)
    _, again = verify(settings.data, tokenizer, patches=4, tiling=tiling(config))
    assert again.kept == 8 and again.figures_A.tolist() == checked.figures_A.tolist()
    model = api.load(str(inputs / "next"))
    asked = dataclasses.replace(model.processor, exif=exif)
    prompts = []
    for image in (tmp_path / "images" / sorted(names)[0], Image.open(tmp_path / "images" / sorted(names)[0]), shown):
        prompts.append(asked.prompt(api.question("What?", image)))
    for prompt in prompts[:2]:
        for mine, theirs in zip(prompt, prompts[2], strict=True):
            np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json"])
def test_grids_are_read_where_the_folder_states_them(inputs, tmp_path, name):
    folder = tmp_path / "next"
    shutil.copytree(inputs / "next", folder)
    for other in ("config.json", "preprocessor_config.json", "processor_config.json"):
        given = json.loads((folder / other).read_text())
        for each in (given, given.get("image_processor", {})):
            each.pop("image_grid_pinpoints", None)
        grids = {"image_grid_pinpoints": [[16, 48]]}
        if other == name:
            given |= grids if name == "preprocessor_config.json" else {"image_processor": grids}
        (folder / other).write_text(json.dumps(given))
    assert hf.read_llava_config(str(folder))[0].pinpoints == ((16, 48),)
    path = folder / name
    path.write_text(path.read_text().replace("48", "47"))
    with pytest.raises(InputError, match=f"{name}: image_grid_pinpoints is .*multiple of the vision tower's 16 pixels"):
        hf.read_llava_config(str(folder))


def test_a_folder_says_whether_exif_is_applied(inputs, tmp_path):
    def said(**ours):
        given = json.loads((inputs / "next" / "config.json").read_text())
        given["llava_jax"] |= ours
        if not ours:
            del given["llava_jax"]
        (folder / "config.json").write_text(json.dumps(given))
        return hf.read_llava_config(str(folder))[1].exif

    folder = shutil.copytree(inputs / "next", tmp_path / "next")
    assert hf.read_llava_config(str(folder))[1].exif == api.load(str(folder)).about["exif"] == "apply"
    assert (said(exif="ignore"), said(exif="apply")) == ("ignore", "apply")
    assert said() == "apply"  # a foreign folder
    with pytest.raises(InputError, match="llava_jax.exif is 'turn'; expected one of apply, ignore"):
        said(exif="turn")
    given = json.loads((inputs / "next" / "config.json").read_text())
    del given["llava_jax"]["exif"]  # ours, of a run that knew no EXIF
    (folder / "config.json").write_text(json.dumps(given))
    assert hf.read_llava_config(str(folder))[1].exif == "ignore"


@pytest.mark.parametrize("form", ["hf", "llava", "orbax"])
def test_an_export_keeps_what_the_run_did_with_exif(inputs, tmp_path, form):
    settings = settings_of(inputs, data__exif="ignore", train__steps=1)
    train(settings, str(tmp_path / "run"))
    assert api.load(str(tmp_path / "run")).about["exif"] == "ignore"
    convert.convert(f"orbax:{tmp_path}/run", f"{form}:{tmp_path}/out")
    found = read_model(
        f"{form}:{tmp_path}/out", "model", vision=str(tmp_path / "out/clip-vision-tower") * (form == "llava")
    )
    assert found[2].exif == "ignore"


def test_the_check_sees_images_of_another_size(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(validate, "KEPT_ROWS", 1)
    monkeypatch.setenv("LLAVA_JAX_CACHE", str(tmp_path / "cache"))
    shutil.copytree(inputs / "images", tmp_path / "images")
    settings = settings_of(inputs, data__images=str(tmp_path / "images"))
    plan = model_spec(settings)
    records, tokenizer = load_records(settings.data.annotations), load_tokenizer(plan.tokenizer)
    row = next(row for row, record in enumerate(records) if len(record.images) == 1)
    slots = []
    for size in ((16, 16), (16, 48)):
        draw(*size).save(tmp_path / "images" / records[row].images[0])
        model = dict(patches=4, tiling=tiling(plan.config))
        checked = validate.check_once(records, settings.data, tokenizer, **model)
        checked.require_clean()
        slots.append((checked.slots_A[row], checked.lengths_A[row]))
    assert slots[0] < slots[1]


def test_too_small_a_bucket_is_named(inputs):
    with pytest.raises(InputError, match="data.pack_images=4: row 7 of .*rows.json has 8 tiles, expected at least"):
        batches_of(settings_of(inputs, data__pack=True, data__pack_images=4))


def test_a_row_whose_images_do_not_fit_is_named(inputs):
    with pytest.raises(InputError, match="beyond max_length 40; raise data.max_length"):
        tiny = settings_of(inputs, data__max_length=40)
        plan = model_spec(tiny)
        sizes = dict(patches=4, tiling=tiling(plan.config))
        tokenizer = load_tokenizer(plan.tokenizer)
        check_records(load_records(tiny.data.annotations), tiny.data, tokenizer, **sizes).require_clean()


def test_verify_counts_what_is_trained(inputs, first):
    config, _records, tokenizer, checked, _ = first
    _, again = verify(settings_of(inputs).data, tokenizer, patches=4, tiling=tiling(config))
    assert again.kept == 8 and again.figures_A.tolist() == checked.figures_A.tolist()


def test_a_run_trains_the_newline_and_answers(inputs, tmp_path):
    settings = settings_of(inputs, model="llava", optim__lr=0.01, train__steps=2, data__pack=True)
    train(settings, str(tmp_path / "run"))
    lines = tiny_run.read_metrics(tmp_path / "run")
    assert len(lines) == 2 and all(np.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in lines)
    plan, params, _ = load_trained(str(tmp_path / "run"))
    before = read_files(plan, dict.fromkeys(hf.PARTS, "float32"))
    assert (params["projector"]["image_newline"] != before["projector"]["image_newline"]).all()
    model = api.load(str(tmp_path / "run"))
    shapes = [draw(40, 20), str(inputs / "images" / "1.png"), None, [draw(33, 33), draw(16, 16)]]
    answers = model.generate(["What?"] * 4, shapes, max_new_tokens=4, batch_size=4)
    assert model.generate(["What?"] * 4, shapes[::-1], max_new_tokens=4, batch_size=4) == answers[::-1]


def test_compile_gives_a_row_room_for_the_most_tiles(inputs):
    settings = settings_of(inputs, data__max_length=64)
    config = model_spec(settings).config
    shape = batch_shape(settings, config, 1, None)
    assert config.tiles == 5 and (shape.images, shape.images_used) == (5, 8 * 5)
    batch = abstract_batch(config, shape, make_mesh(settings.mesh))
    assert batch.feature_index_BT.shape == (8, 64) and batch.pixels_BNXYC.shape == (8, 5, 16, 16, 3)
