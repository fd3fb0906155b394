"""The twelve benchmarks of LLaVA-1.5 and its published figures (CVPR version), in the order of its table."""

from collections.abc import Mapping
from typing import Any

# Name of the command, heading, and where the figure of the table stands in that command's figures.
BENCHMARKS = {
    "vqav2": ("VQAv2", ("accuracy",)),
    "gqa": ("GQA", ("accuracy",)),
    "vizwiz": ("VizWiz", ("accuracy",)),
    "scienceqa": ("SQA-I", ("columns", "IMG")),
    "textvqa": ("TextVQA", ("accuracy",)),
    "pope": ("POPE", ("mean_f1",)),
    "mme": ("MME", ("perception",)),
    "mmbench": ("MMB", ("accuracy",)),
    "mmbench_cn": ("MMB-CN", ("accuracy",)),
    "seed": ("SEED", ("all",)),
    "llava_bench": ("LLaVA-W", ("overall", "relative")),
    "mmvet": ("MM-Vet", ("score",)),
}
ROWS = {
    "LLaVA-1.5 7B": (78.5, 62.0, 50.0, 66.8, 58.2, 85.9, 1510.7, 64.3, 58.3, 58.6, 65.4, 31.1),
    "LLaVA-1.5 13B": (80.0, 63.3, 53.6, 71.6, 61.3, 85.9, 1531.3, 67.7, 63.6, 61.6, 72.5, 36.1),
}
HIGHEST = {"mme": 2000.0}  # of the figures that are no percentages


def headline(name: str, figures: Mapping[str, Any] | None) -> float | None:
    """Return the figure of a benchmark's table, None where there is none; POPE's in percent, as published."""
    value: Any = figures
    for part in BENCHMARKS[name][1]:
        value = (value or {}).get(part)
    return 100 * value if name == "pope" and value is not None else value
