"""What `python -m tests.same_numbers` calls a difference."""

import json

from tests.same_numbers import MAY_CHANGE, MAY_GAIN, MAY_MOVE, difference, read_files, verdict

STEPS = {"step 0": {"loss": 2.0, "grad_norm": 1.0, "tokens": 7}, "step 1": {"loss": 1.0, "grad_norm": 1.0, "tokens": 7}}


def moved(**changes) -> dict:
    return STEPS | {"step 1": STEPS["step 1"] | changes}


def test_the_first_difference_is_named_with_both_values():
    assert difference(STEPS, STEPS) == ""
    assert difference(STEPS, moved(loss=1.25)) == "step 1: loss is 1.25, was 1.0"
    assert difference(STEPS, {"step 0": STEPS["step 0"]}) == "step 1: loss is absent, was 1.0"
    assert difference({"step 0": STEPS["step 0"]}, STEPS) == "step 1: loss is 1.0, was absent"


def test_a_tolerance_is_for_the_losses_of_named_cases_alone():
    near, far, other = moved(loss=1 + 9e-7), moved(loss=1 + 2e-6), moved(tokens=8)
    case = next(iter(MAY_MOVE))
    assert [verdict(case, STEPS, after, 1e-6)[0] for after in (near, far, other)] == [True, False, False]
    assert not verdict(case, STEPS, near, 0.0)[0]
    assert not verdict("another", STEPS, near, 1e-6)[0]


def test_a_command_that_failed_on_both_sides_is_no_agreement():
    failed = {"command": {"failed": "exit code 2: no such file"}}
    assert verdict("hf", failed, failed, 0.0) == (False, "FAILED     hf: before, exit code 2: no such file")


def test_an_exported_config_may_gain_named_keys_and_its_order_is_free(tmp_path):
    def recorded(**values) -> dict:
        (tmp_path / "config.json").write_text(json.dumps(values))
        return read_files(tmp_path)

    before = recorded(dtype="float32", text_config={"layers": 2})
    gained = recorded(text_config={"layers": 2}, dtype="float32", llava_jax={"exif": "apply"})
    assert "llava_jax.exif" in MAY_GAIN and difference(before, gained)
    assert verdict("hf", before, gained, 0.0)[0] and not verdict("hf", gained, before, 0.0)[0]
    (tmp_path / "README.md").write_text("# A model card")
    carded = recorded(dtype="float32", text_config={"layers": 2})
    assert verdict("hf", before, carded, 0.0)[0] and not verdict("hf", carded, before, 0.0)[0]
    (tmp_path / "README.md").unlink()
    for other in (dict(dtype="float32", text_config={"layers": 3}), dict(text_config={"layers": 2})):
        assert not verdict("hf", before, recorded(**other), 0.0)[0]


def test_a_tokenizers_file_may_change_in_named_keys_alone(tmp_path):
    def recorded(**values) -> dict:
        (tmp_path / "tokenizer.json").write_text(json.dumps(values))
        return read_files(tmp_path)

    before, now = (recorded(post_processor=adds, model={"vocab": {"a": 0}}) for adds in ({"type": "Template"}, None))
    assert "post_processor" in MAY_CHANGE and difference(before, now) and verdict("hf", before, now, 0.0)[0]
    assert not verdict("hf", before, recorded(model={"vocab": {"a": 0}}), 0.0)[0]
    assert not verdict("hf", before, recorded(post_processor=None, model={"vocab": {"a": 1}}), 0.0)[0]
