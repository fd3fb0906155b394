"""Small folders of the twelve benchmarks in their published formats, with answers and the scores these have by hand."""

import base64
import json

from PIL import Image

HEADER = "index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\tsource\tl2-category\tcomment\tsplit\n"
# Of each benchmark: the answer to a question, by a word of it, and what the suite's table then shows.
ANSWERS = {
    "vqav2": ({"colour": "Red.", "many": "two"}, 65.0),  # all ten people said red, one of ten said 2: 100 and 30
    "gqa": ({"left": "yes", "holding": "A bat"}, 50.0),  # no article is left out
    "vizwiz": ({"can": "Unanswerable"}, 60.0),  # two of ten people
    "scienceqa": ({"magnet": "B", "noun": "A"}, 100.0),  # of those with an image: the first, which is right
    "textvqa": ({"brand": "the Nokia", "year": "1999"}, 95.0),  # three of ten people, and all: 90 and 100
    "pope": ({"cat": "Yes", "dog": "Yes", "car": "No"}, 75.0),  # F1 1, and with one false yes and one false no 1/2
    "mme": ({"red": "Yes", "blue": "No", "sum": "Yes"}, 250.0),  # 100 + 100, and 50 + 0; sums are cognition
    "mmbench": ({"animal": "A", "fruit": "B"}, 50.0),  # animals are right in one order only
    "mmbench_cn": ({"动物": "A"}, 100.0),
    "seed": ({"see": "A", "happens": "B."}, 50.0),  # a letter with a full stop is wrong
    "llava_bench": ({"scene": "A street."}, 50.0),  # the judge says 10 5
    "mmvet": ({"total": "12"}, 50.0),  # and 0.5
}


def dump(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jsonl" or path.name.startswith("coco_pope"):
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in content), encoding="utf-8")
    else:
        text = content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)
        path.write_text(text, encoding="utf-8")


def image_file(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (200, 30, 30)).save(path)
    return path


def people(*counts):
    return [{"answer": text} for text, count in counts for _ in range(count)]


def write_all(root):
    """Write the folders below `root`, under the names of the published evaluation."""
    _short_answers(root)
    _yes_and_no(root)
    _choices(root)
    _open(root)


def _short_answers(root):
    folder = root / "vqav2"
    questions = [
        {"image_id": 7, "question": "What colour?", "question_id": 70},
        {"image_id": 7, "question": "How many?", "question_id": 71},
    ]
    listed = {"data_subtype": "val2014", "questions": questions}
    dump(folder / "v2_OpenEnded_mscoco_val2014_questions.json", listed)
    answers = [people(("red", 10)), people(("2", 1), ("3", 9))]
    entries = [{"question_id": 70 + n, "answer_type": "other", "answers": found} for n, found in enumerate(answers)]
    dump(folder / "v2_mscoco_val2014_annotations.json", {"annotations": entries})
    image_file(folder / "val2014" / "COCO_val2014_000000000007.jpg")

    folder = root / "gqa" / "data"
    entries = {
        "1": {"question": "Is it left?", "imageId": "n7", "answer": "yes", "types": {"structural": "verify"}},
        "2": {"question": "What is he holding?", "imageId": "n7", "answer": "bat", "types": {"structural": "query"}},
    }
    dump(folder / "testdev_balanced_questions.json", entries)
    image_file(folder / "images" / "n7.jpg")

    answers = people(("unanswerable", 2), ("soup", 8))
    entry = {"image": "VizWiz_val_0.jpg", "question": "What can is it?", "answers": answers, "answer_type": "other"}
    dump(root / "vizwiz" / "val.json", [entry])
    image_file(root / "vizwiz" / "val" / "VizWiz_val_0.jpg")

    folder = root / "textvqa"
    data = [
        {"image_id": "a7", "question": "what brand is it?", "answers": ["nokia"] * 3 + ["samsung"] * 7},
        {"image_id": "a7", "question": "which year?", "answers": ["1999"] * 10},
    ]
    dump(folder / "TextVQA_0.5.1_val.json", {"data": data})
    tokens = {"data": [{"image_id": "a7", "ocr_tokens": ["NOKIA", "1999"]}]}
    dump(folder / "TextVQA_Rosetta_OCR_v0.2_val.json", tokens)
    image_file(folder / "train_images" / "a7.jpg")


def _yes_and_no(root):
    for split, labels in {"random": ("yes", "yes", "no"), "popular": ("yes", "no", "yes")}.items():
        rows = [
            {"question_id": n, "image": "COCO_1.jpg", "text": f"Is there a {name} in the image?", "label": label}
            for n, (name, label) in enumerate(zip(("cat", "dog", "car"), labels, strict=True), 1)
        ]
        dump(root / "pope" / "coco" / f"coco_pope_{split}.json", rows)
    image_file(root / "pope" / "val2014" / "COCO_1.jpg")

    folder = root / "MME" / "MME_Benchmark_release_version"
    ending = "Please answer yes or no."
    image_file(folder / "color" / "a.png")
    dump(folder / "color" / "a.txt", f"Is it red? {ending}\tYes\nIs it blue? {ending}\tNo\n")
    image_file(folder / "posters" / "images" / "p.jpg")
    texts = f"Is the poster red? {ending}\tYes\nIs the poster blue? {ending}\tYes\n"
    dump(folder / "posters" / "questions_answers_YN" / "p.txt", texts)
    image_file(folder / "numerical_calculation" / "c.png")
    dump(folder / "numerical_calculation" / "c.txt", f"Is the sum 3? {ending}\tYes\nIs the sum 4? {ending}\tNo\n")


def _choices(root):
    image = base64.b64encode(image_file(root / "image.png").read_bytes()).decode()
    (root / "image.png").unlink()

    def row(index, question, options, answer, image=image):
        cells = [index, question, "", *options, "", "", answer, "kind", image, "web", "group", "", "dev"]
        return "\t".join(map(str, cells)) + "\n"

    rows = row(1, "Which animal?", ["cat", "dog"], "A") + row(1000001, "Which animal?", ["dog", "cat"], "B")
    rows += row(2, "Which fruit?", ["pear", "fig"], "B") + row(1000002, "Which fruit?", ["pear", "fig"], "B", image="2")
    dump(root / "mmbench" / "mmbench_dev_20230712.tsv", HEADER + rows)
    dump(root / "mmbench_cn" / "mmbench_dev_cn_20231003.tsv", HEADER + row(1, "哪种动物?", ["猫", "狗"], "A"))

    choices = {"choice_a": "1", "choice_b": "2", "choice_c": "3", "choice_d": "4"}
    entries = [
        {**choices, "question_id": "5", "question": "What do you see?", "data_type": "image", "data_id": "s.jpg"},
        {**choices, "question_id": "6", "question": "What happens?", "data_type": "video", "data_id": "v.mp4"},
    ]
    entries = [{**one, "question_type_id": n, "answer": "AB"[n - 1]} for n, one in enumerate(entries, 1)]
    dump(root / "seed_bench" / "SEED-Bench.json", {"questions": entries, "question_type": {"Scene": 1, "Action": 2}})
    image_file(root / "seed_bench" / "SEED-Bench-image" / "s.jpg")
    image_file(root / "seed_bench" / "SEED-Bench-video-image" / "2_6.png")

    folder = root / "scienceqa"
    shared = {"choices": ["x", "y"], "hint": "", "lecture": "", "solution": "", "grade": "grade2"}
    problems = {
        "1": {**shared, "question": "Which magnet?", "image": "image.png", "answer": 1, "subject": "natural science"},
        "2": {**shared, "question": "Which noun?", "image": None, "answer": 1, "subject": "language science"},
    }
    dump(folder / "problems.json", problems)
    dump(folder / "pid_splits.json", {"test": ["1", "2"]})
    image_file(folder / "images" / "test" / "1" / "image.png")


def _open(root):
    folder = root / "llava-bench-in-the-wild"
    question = {"question_id": 0, "image": "1.jpg", "text": "Describe the scene.", "category": "detail"}
    dump(folder / "questions.jsonl", [question])
    dump(folder / "context.jsonl", [{"id": 1, "image": "1.jpg", "caption": "A street in the rain."}])
    dump(folder / "answers_gpt4.jsonl", [{"question_id": 0, "text": "A wet street."}])
    dump(folder / "rule.json", {"llava_bench_detail": {"role": "Assistant", "prompt": "Rate."}})
    image_file(folder / "images" / "1.jpg")

    folder = root / "mm-vet"
    entry = {"question": "What is the total?", "answer": "12", "imagename": "v1_0.png", "capability": ["ocr", "math"]}
    dump(folder / "mm-vet.json", {"v1_0": entry})
    dump(folder / "prompt.txt", "Question | Ground truth | Prediction | Correctness")
    image_file(folder / "images" / "v1_0.png")
