"""Both sides of `benchmark` do the same work: it refuses to compare otherwise."""

import json

import pytest

from llava_jax.cli.main import main


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--size=tiny", "--stage=pretrain", "--steps=1"],
        ["train", "--size=tiny", "--stage=finetune", "--steps=1"],
        ["generate", "--size=tiny", "--new_tokens=8"],
        ["data", "--images=8", "--rows=128", "--side=56"],
    ],
    ids=" ".join,
)
def test_sides_agree(words, tmp_path):
    path = tmp_path / "figures.json"
    assert main(["benchmark", *words, "--peer", "--rounds=1", f"--json={path}"]) == 0
    written = json.loads(path.read_text())
    assert written["ratio"] > 0
    (result,) = written.get("stages", {"": written}).values()
    if words[0] == "generate":
        # Greedy ids of random weights: a tie within float32's rounding may fall either way.
        same, of = (int(word) for word in result["same"].split()[:3:2])
        assert of == 32 and same >= 28, result["same"]
    else:
        assert result["same"].startswith(("loss", "bit-equal pixels"))
