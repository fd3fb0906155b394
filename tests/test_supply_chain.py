"""What comes from others is data: no call of the package could run it, and no name in it leads out of its folder."""

import ast
import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import save_file

import llava_jax
from llava_jax.data.chat_template import chat_template
from llava_jax.data.records import load_records
from llava_jax.data.templates import try_jinja
from llava_jax.infer.batch_generate import read_questions
from llava_jax.types import InputError
from llava_jax.weights.tensors import open_folder

PACKAGE = pathlib.Path(llava_jax.__file__).parent
# torch_bin.py reads a pickle's instructions with pickletools, which runs none.
MODULES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
CALLS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "torch.load"}


def faults(source: str) -> list[str]:
    """Name the calls and imports that could run what a file of somebody else holds."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            found += [name for name in names if name and name.partition(".")[0] in MODULES]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        given = {word.arg: ast.unparse(word.value) for word in node.keywords}
        if name in CALLS or given.get("shell", "False") != "False" or given.get("allow_pickle", "False") != "False":
            found.append(name)
        if name.endswith(".from_pretrained") and given.get("trust_remote_code") != "False":
            found.append(name)
        if name.endswith("np.load") and "allow_pickle" not in given:
            found.append(name)
    return found


def test_no_call_runs_what_is_read():
    sources = sorted(PACKAGE.rglob("*.py"))
    assert len(sources) > 100
    assert {str(path): found for path in sources if (found := faults(path.read_text(encoding="utf-8")))} == {}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import load",
        "eval(text)",
        "exec(text)",
        "yaml.load(file)",
        "torch.load(path)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "subprocess.run(line, shell=True)",
        "os.system(line)",
        "AutoTokenizer.from_pretrained(folder)",
        "AutoTokenizer.from_pretrained(folder, trust_remote_code=trust)",
    ],
)
def test_such_calls_are_found(source):
    assert faults(source)


@pytest.mark.parametrize("shard", ["../other/model.safetensors", "/etc/passwd", "sub/model.safetensors", "..", "", 5])
def test_shards_lie_in_the_folder_of_their_index(tmp_path, shard):
    (tmp_path / "other").mkdir()
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "other" / "model.safetensors")
    (tmp_path / "model").mkdir()
    index = {"weight_map": {"a": shard}}
    (tmp_path / "model" / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="a is said to be in .*expected the name of a file in the folder"):
        open_folder(str(tmp_path / "model"))


def test_links_of_the_hubs_cache_are_followed(tmp_path):
    (tmp_path / "blobs").mkdir()
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "blobs" / "5e1f")
    snapshot = tmp_path / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    (snapshot / "model-00001-of-00001.safetensors").symlink_to("../../blobs/5e1f")
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    assert open_folder(str(snapshot)).names() == ["a"]


@pytest.mark.parametrize("image", ["../secret.png", "/etc/passwd", "a/../../b.png", "C:\\x.png", "file:///etc/passwd"])
def test_questions_cannot_leave_their_images(tmp_path, image):
    (tmp_path / "images").mkdir()
    (tmp_path / "secret.png").write_bytes(b"canary")
    path = tmp_path / "questions.jsonl"
    for given in (image, ["../secret.png"]):
        path.write_text(json.dumps({"question_id": 1, "image": given, "text": "What is this?"}))
        with pytest.raises(InputError, match=r"line 1: image: .*(leaves the images folder|is an address)"):
            read_questions(str(path), str(tmp_path / "images"))


@pytest.mark.parametrize(
    "name, content",
    [
        ("state.json", {"_data_files": [{"filename": "../rows.arrow"}]}),
        ("dataset_dict.json", {"splits": ["../data"]}),
        ("dataset_dict.json", {"splits": [".."]}),
        ("dataset_dict.json", {"splits": ["."]}),
    ],
)
def test_saved_data_sets_stay_in_their_folder(tmp_path, name, content):
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(InputError, match="that is not in the folder"):
        load_records(str(tmp_path))


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10 ** 9 }}",
        "{% if not add_generation_prompt %}{{ 'a' * 10 ** 9 }}{% endif %}",
        "{% if messages|length == 1 %}{{ 'a' * 10 ** 9 }}{% endif %}",
        "x" * 2_000_000,
        "{% for a in range(99999) %}" + "x" * 100 + "{% endfor %}",
    ],
    ids=lambda source: source[:30],
)
def test_chat_templates_have_limits(source):
    with pytest.raises(InputError, match="takes more than 2 s of the processor, 512 MiB or 1,048,576 characters"):
        chat_template(source, (), ())


@pytest.mark.parametrize(
    "source",
    [
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ " + "(" * 50_000 + " }}",
        "{% include '/etc/passwd' %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
        "{{ raise_exception('no') }}",
    ],
    ids=lambda source: source[:30],
)
def test_chat_templates_that_cannot_be_rendered_are_refused(source):
    with pytest.raises(InputError, match="the chat template"):
        chat_template(source, (), ())
    assert try_jinja(source, [{"messages": [{"role": "user", "content": "Why?"}]}]) == [None]
