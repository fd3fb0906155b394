"""A few of the hostile model folders, images and rows of tests/faults, of which the scripts there try thousands."""

import pytest

from tests.faults.hostile_models import attempt, make_folders
from tests.faults.mutated_rows import images, rows

SAMPLE = [
    *(("config", 159), *(("tokenizer", number) for number in (20, 136, 143, 212)), ("processor", 30)),
    *(("processor", 96), ("template", 4), ("index", 0), ("safetensors", 1), ("pickle", 0), ("pickle", 24)),
    *(("Python code", 1), ("no regular file", 2)),
]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    inputs = tmp_path_factory.mktemp("inputs")
    return inputs, make_folders(inputs)


@pytest.mark.parametrize("kind, number", SAMPLE)
def test_a_hostile_folder_is_refused_in_one_line(inputs, tmp_path, kind, number):
    folder, folders = inputs
    wrong, told, _ = attempt(folders, kind, number, folder / "images" / "0.png", tmp_path)
    assert not wrong and told.startswith("error: ")


@pytest.mark.filterwarnings("ignore")  # Pillow's
def test_harmful_images_and_rows_are_refused_or_trained(tmp_path, capsys):
    assert images(40) + rows(60, tmp_path) == 0, capsys.readouterr().out
