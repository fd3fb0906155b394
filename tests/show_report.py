"""The report of two made-up runs of `evaluate suite`, driven in headless Chromium.

`make report` does both:

    python -m tests.show_report write DIR
    python -m tests.show_report drive DIR [--chromium=/usr/bin/chromium]

The first writes the page; the second, which needs playwright alone, adds screenshots (desktop, dark, phone) and fails
where filter, search, moves, radar or the judge's reviews do not do what they should, anything is fetched, or a script
fails.
"""

import argparse
import pathlib
import tempfile

SCORES = {"before": 0.0, "after": 1.0}


def write_runs(folder):
    """Two folders as `evaluate suite` writes them, on small benchmarks."""
    from tests import bench_files

    figures = {
        "vqav2": {"accuracy": 61.0, "types": {"number": 40.0, "other": 55.0, "yes/no": 80.0}},
        "scienceqa": {"columns": {"NAT": 70.0, "SOC": 80.0, "LAN": 60.0, "IMG": 71.0, "Avg": 68.0}},
        "pope": {"random": {"f1": 0.9}, "popular": {"f1": 0.8}, "mean_f1": 0.85},
        "mme": {"perception": 1400.0, "categories": {"color": {"score": 150.0}, "OCR": {"score": 120.0}}},
        "llava_bench": {"overall": {"relative": 63.0}, "categories": {"llava_bench_detail": {"relative": 63.0}}},
    }
    results = {"vqav2": 61.0, "scienceqa": 71.0, "pope": 85.0, "mme": 1400.0, "llava_bench": 63.0}
    image = bench_files.image_file(folder / "images" / "1.png")
    folders = []
    for run, right in SCORES.items():
        for name in results:
            rows = [
                {
                    "question_id": n,
                    "image": image.name,
                    "text": f"What is {name} {n}?",
                    "category": "kind",
                    "answer": "a",
                }
                for n in range(6)
            ]
            said = [
                {"question_id": n, "prompt": row["text"], "text": f"<b>{run}</b> {n}"} for n, row in enumerate(rows)
            ]
            bench_files.dump(folder / run / name / "questions.jsonl", rows)
            bench_files.dump(folder / run / name / "answers.jsonl", said)
            scores = {str(n): right if n % 2 else 1.0 for n in range(6)}
            bench_files.dump(folder / run / name / "figures.json", {**figures[name], "scores": scores})
        review = {"question_id": 0, "repeat": 0, "content": "9 6\nThe first is fuller."}
        bench_files.dump(folder / run / "llava_bench" / "reviews.jsonl", [review])
        shown = {name: value * (0.9 + 0.1 * right) for name, value in results.items()}
        images = dict.fromkeys(results, str(image.parent))
        bench_files.dump(folder / run / "suite.json", {"model": "tiny", "results": shown, "images": images})
        folders.append(str(folder / run))
    return folders


def drive(path, output, chromium):
    """Use the page as a reader does; AssertionError where it does not do what it should."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as found:
        browser = found.chromium.launch(executable_path=chromium)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        errors, fetched = [], []
        page.on("pageerror", lambda error: errors.append(error))
        page.on("request", lambda request: fetched.append(request.url))
        page.goto(path.as_uri())
        position = page.locator("#position")
        assert position.inner_text() == "1 of 30"
        page.get_by_role("button", name="Next").click()
        assert position.inner_text() == "2 of 30"
        page.keyboard.press("ArrowLeft")
        assert position.inner_text() == "1 of 30" and page.get_by_role("button", name="Previous").is_disabled()
        page.select_option("#bench", label="POPE")
        page.select_option("#filter", "wrong")
        assert position.inner_text() == "1 of 3" and "✗ 0.00" in page.locator("#example").inner_text()
        page.select_option("#run", label="tiny (after)")
        assert position.inner_text() == "none"
        page.select_option("#filter", "differ")
        assert position.inner_text() == "1 of 3"
        page.fill("#search", "pope 5")
        assert position.inner_text() == "1 of 1"
        assert "<b>after</b> 5" in page.locator("#example").inner_text()  # an answer is text, not HTML
        page.fill("#search", "")
        page.select_option("#filter", "all")
        page.select_option("#bench", label="LLaVA-W")
        page.locator("summary").first.click()
        assert "The first is fuller." in page.locator("#example").inner_text()
        assert page.locator(".radar polygon").count() == 4
        page.screenshot(path=output / "desktop.png", full_page=True)
        page.emulate_media(color_scheme="dark")
        page.screenshot(path=output / "dark.png", full_page=True)
        page.emulate_media(color_scheme="light")
        page.set_viewport_size({"width": 390, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") == 390
        page.screenshot(path=output / "phone.png", full_page=True)
        browser.close()
        assert not errors and [one for one in fetched if not one.startswith("data:")] == [path.as_uri()], (
            errors,
            fetched,
        )


def write(path):
    """Write the page about the two runs."""
    from llava_jax.evaluate.report import report

    with tempfile.TemporaryDirectory() as temporary:
        path.write_text(report(write_runs(pathlib.Path(temporary)), examples=10), encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("write", "drive"))
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--chromium", default="/usr/bin/chromium", metavar="FILE")
    given = parser.parse_args()
    given.folder.mkdir(parents=True, exist_ok=True)
    page_path = (given.folder / "report.html").resolve()
    write(page_path) if given.what == "write" else drive(page_path, given.folder, given.chromium)
    print(page_path)
