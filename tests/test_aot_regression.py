"""What the stored plans of the published steps are compared by."""

import copy

import pytest

from tests import plan_baseline
from tests.plan_baseline import CHECKED, ENTRIES, grown

FIGURES = {
    "peak_bytes": 1000,
    "step_seconds": 2.0,
    "wire_bytes": 500,
    "score_buffers": [],
    "logit_buffers": [],
    "float32_collectives": [],
    "donated_whole": True,
    "donated_bytes": 10,
    "state_bytes": 10,
    "unknown_loops": 0,
    "fits": True,
}


def test_what_stays_or_shrinks_passes():
    assert grown(FIGURES, FIGURES) == []
    assert grown({**FIGURES, "peak_bytes": 1010, "step_seconds": 1.0, "wire_bytes": 0}, FIGURES) == []


@pytest.mark.parametrize(
    "change, says",
    [
        ({"peak_bytes": 1011}, "peak_bytes"),
        ({"step_seconds": 2.05}, "step_seconds"),
        ({"step_seconds": None}, "step_seconds"),
        ({"wire_bytes": 506}, "wire_bytes"),
        ({"score_buffers": ["fusion.1 bf16[4,32,2048,2048]"]}, "score_buffers"),
        ({"logit_buffers": ["fusion.2 f32[4,2048,32000]"]}, "fusion.2"),
        ({"float32_collectives": ["all-reduce.1 f32[4096,32000]"]}, "all-reduce.1"),
        ({"donated_whole": False, "donated_bytes": 4}, "donated 4 bytes of a state of 10"),
        ({"unknown_loops": 1}, "unknown length"),
        ({"fits": False}, "does not fit"),
    ],
)
def test_growth_fails(change, says):
    found = grown({**copy.deepcopy(FIGURES), **change}, FIGURES)
    assert len(found) == 1 and says in found[0]


def test_every_entry_is_a_command_line_and_names_its_own_file():
    assert set(CHECKED) <= set(ENTRIES)
    assert {path.stem for path in plan_baseline.STORED.glob("*-v[56]*.json")} <= set(ENTRIES)
    assert len({entry.argv for entry in ENTRIES.values()}) == len(ENTRIES)


def test_a_stored_plan_is_of_its_command():
    asked = {name: dict(flag.partition("=")[::2] for flag in entry.argv) for name, entry in ENTRIES.items()}
    remats = {name: flags.get("--config.train.remat", "full") for name, flags in asked.items()}
    assert remats == {name: plan_baseline.stored(name)["remat"] for name in ENTRIES}


def test_the_table_has_a_line_for_each_stored_plan():
    lines = plan_baseline.table().splitlines()
    assert len(lines) == 2 + sum(plan_baseline.stored(name) is not None for name in ENTRIES)
    assert len({line.count("|") for line in lines}) == 1


def test_the_page_shows_what_is_stored():
    shown = plan_baseline.PAGE.read_text(encoding="utf-8").split(plan_baseline.MARKERS[0])[1]
    assert shown.split(plan_baseline.MARKERS[1])[0].strip() == plan_baseline.table()
    assert all(plan_baseline.stored(name) for name in ENTRIES)
