"""What `compile` says of its figures: the report, what to change, hours, and the sweep's table."""

from llava_jax.aot import report

GIB = 2**30

FIGURES = {
    "chips": 64,
    "topology": "v5e:8x8",
    "slices": 1,
    "stage": "finetune",
    "mesh": {"data": 2, "fsdp": 32, "tensor": 1},
    "batch_size": 128,
    "accumulate": 1,
    "rows": 128,
    "length": 2048,
    "filled": None,
    "pack": False,
    "remat": "none",
    "dtypes": {"param_dtype": "float32", "moment_dtype": "float32", "frozen_dtype": "bfloat16"},
    "compiler_options": "tuned",
    "parameters": 7_000_000_000,
    "parameters_by_part": {"llm": 6_600_000_000, "projector": 20_000_000, "vision": 380_000_000},
    "trainable": 6_400_000_000,
    "state_bytes": 3 * GIB,
    "frozen_bytes": GIB // 2,
    "argument_bytes": 4 * GIB,
    "temporary_bytes": 2 * GIB,
    "peak_bytes": 6 * GIB,
    "hbm_bytes": 16 * GIB,
    "over_bytes": 0,
    "fits": True,
    "model_flops": 100e12,
    "flops": 130e12,
    "step_seconds": 2.0,
    "mfu": 0.5,
    "tokens_per_second_per_chip": 2048.0,
    "breakdown": dict.fromkeys(report.PARTS, 2.0 / 6),
    "communication_seconds": 1.0,
    "network_bytes": 0,
    "absent_gpu": False,
    "unknown": {},
}
LARGE = {**FIGURES, "fits": False, "peak_bytes": 20 * GIB, "over_bytes": 4 * GIB}


def test_the_report_has_every_figure_and_its_error():
    hours = report.data_set(FIGURES, rows=665_298, epochs=1.0, steps=0)
    text = report.report(FIGURES | hours)
    for said in (
        "7,000,000,000",
        "6.00 GiB: fits, 10.00 GiB left",
        "2,000.0 ms",
        "50.0 %",
        "±8 %",
        "n = 3",
        "5,198 steps",
    ):
        assert said in text
    assert "81 % of their tokens" in report.report(FIGURES | hours | {"filled": 0.81})
    assert "173 minutes" in text and "not confirmed on hardware" in text
    assert text.count("333.3 ms") == 6


def test_steps_of_a_data_set():
    assert report.data_set(FIGURES, 558_128, 2.0, 0)["steps"] == 8722
    assert report.data_set(FIGURES, 558_128, 1.0, 10) == {"data_rows": 558_128, "steps": 10, "hours": 20 / 3600}
    assert report.data_set({**FIGURES, "step_seconds": None}, 128, 1.0, 0)["hours"] is None


def test_what_does_not_fit_says_by_how_much_and_what_to_change():
    text = report.report(LARGE)
    assert "does not fit, 4.00 GiB too much" in text
    advice = report.advice(LARGE)
    assert [line.split()[0] for line in advice[:5]] == [
        "--config.train.remat=dots",
        "--config.train.accumulate=2:",
        "--config.mesh.data=1",
        "--config.train.moment_dtype=bfloat16:",
        "--config.train.param_dtype=bfloat16:",
    ]
    assert "-1.75 GiB" in advice[2] and f"-{4 * 6.4e9 / 32 / GIB:.2f} GiB" in advice[3]
    assert "remat=full " in report.advice({**LARGE, "remat": "q+k"})[0]
    weights = report.advice({**LARGE, "remat": "minimal+q_weight+down_weight"})
    assert "remat=minimal gathers weights again" in weights[0] and "remat=full keeps less" in weights[1]
    assert "remat=full gathers weights again" in report.advice({**LARGE, "remat": "down_weight"})[0]
    summed = report.advice({**LARGE, "accumulate": 2})[1]
    assert summed.startswith("--config.train.accumulate=1 --config.train.batch_size=64: ") and "0.75 GiB" in summed
    least = {**LARGE, "remat": "full", "rows": 64, "mesh": {"data": 1, "fsdp": 64, "tensor": 1}}
    least["dtypes"] = dict.fromkeys(("param_dtype", "moment_dtype", "frozen_dtype"), "bfloat16")
    assert report.advice(least) == [advice[-1]]


def test_slices_say_what_goes_over_the_network():
    text = report.report({**FIGURES, "slices": 2, "network_bytes": 50e6})
    assert "50.0 MB per chip and step over the network" in text and "16.0 ms" in text


def test_the_best_plan_fits_and_is_the_fastest():
    fast, slow = {**FIGURES, "tokens_per_second_per_chip": 9000.0}, FIGURES
    large = {**LARGE, "tokens_per_second_per_chip": 99_999.0}
    unfinished = {**FIGURES, "step_seconds": None, "tokens_per_second_per_chip": None}
    assert report.best([slow, fast, large, unfinished]) is fast
    assert report.best([large]) is None
    assert "does not fit" in report.sweep_line(large)
    assert " minimal+q_weight+down_weight " in report.sweep_line({**FIGURES, "remat": "minimal+q_weight+down_weight"})
    end = report.sweep_end([slow, fast], fast)
    assert "--config.train.batch_size=128 --config.train.remat=none --config.mesh.data=2" in end and "±8 %" in end
    assert "accumulate=1" in end and "pack_length" not in end and "data set" not in end
    hours = report.data_set(fast, rows=665_298, epochs=1.0, steps=0)
    end = report.sweep_end([fast], fast | hours | {"pack": True})
    assert "--config.data.pack_length=2048" in end and "173 minutes" in end


def test_a_sweep_without_times_says_how_many_fit():
    untimed = [{**FIGURES, "step_seconds": None, "fits": fits} for fits in (True, False, True)]
    assert report.sweep_end(untimed, None) == "2 of 3 fit; no time is known here, so none is called the best"
    assert report.sweep_end(untimed[1:2], None) == "none fits"
