"""Hostile model folders: what `convert`, a loaded model and its tokenizer make of each of 300.

`python -m tests.faults.hostile_models [COUNT]` prints a line a kind and each case that goes wrong, and exits with 1
where one ran something of the folder, took ten seconds, ended in anything but a model or one line of error, or the
process grew beyond 2 GB.
"""

import collections
import contextlib
import io
import itertools
import json
import os
import pathlib
import random
import shutil
import struct
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator

from llava_jax.api import load
from llava_jax.cli.main import main as command
from llava_jax.data.templates import OWN
from llava_jax.data.tokenize import load_tokenizer
from llava_jax.types import InputError, Turn
from llava_jax.weights.tensors import Piece, open_folder, write_shards
from tests import torch_files
from tests.faults.mutations import MEMORY, VALUES, alarm, limit_memory, mutated, peak_memory
from tests.tiny_run import make_inputs

SECONDS, LINE = 10, 5000
CANARY = "CANARY"  # in the folder above; whatever is run writes it
RUNS = "import os, pathlib\npathlib.Path(os.environ['HOSTILE']).touch()\n"
FORMS = ("hf", "sharded", "bin", "original")


# ---- templates ------------------------------------------------------------------------------------------------------

GROWS = "{% set n = namespace(x='aa', y=[1]) %}{% for i in range(90) %}TURN{% endfor %}{{ n.x }}{{ n.y }}"
TEMPLATES = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "{% for m in messages %}"
    + "x" * 100_000
    + "{% for a in range(99999) %}"
    + "y" * 20_000
    + "{% endfor %}{% endfor %}",
    *("{{ 'a' * 10 ** 9 }}", "{{ 9 ** (9 ** 9) }}", "{{ [messages] * 10 ** 8 }}", "{{ lipsum(100000) }}"),
    *(
        GROWS.replace("TURN", f"{{% set n.x = {text} %}}")
        for text in ("n.x ~ n.x", "n.x + n.x", "n.x|replace('a', n.x)")
    ),
    GROWS.replace("TURN", "{% set n.y = [n.y, n.y] %}"),
    GROWS.replace("TURN", "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}"),
    *("{{ 'a'|center(10 ** 9) }}", "{{ '%1000000000d' % 1 }}", "{{ '{:>1000000000}'.format(1) }}"),
    *("{{ " + "(" * 20_000 + " }}", "{{ " + "not " * 20_000 + "1 }}", "{% if 1 %}" * 3000, "x" * 10**6),
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ cycler.__init__.__globals__.os.system('touch $HOSTILE') }}",
    "{{ messages.append(1) }}{{ self._TemplateReference__context.environment }}",
    *("{% include '/etc/passwd' %}", "{% extends 'x' %}", "{% import 'os' as os %}", "{{ raise_exception('no\nno') }}"),
    *("{{ 1 / 0 }}", "{{ '\\ud800' }}", "{{ strftime_now('%c' * 10000) }}", "", "{{ messages }}", "{% generation %}"),
    "{{ bos_token * 2 }}{{ messages[0].content }}{{ messages[7].content.x }}",
    "{% for m in messages %}{{ m.content[::-1] }}{% endfor %}",
)


# ---- one kind of harm each: change a folder --------------------------------------------------------------------------


def json_file(*names: str) -> Callable[[pathlib.Path, random.Random], str]:
    """Return a harm to one of these files: a value of its JSON, or its bytes."""

    def harm(folder: pathlib.Path, rng: random.Random) -> str:
        path = folder / rng.choice([name for name in names if (folder / name).exists()])
        text = path.read_text()
        how = rng.random()
        if how < 0.75:
            text = json.dumps(mutated(json.loads(text), rng))
        elif how < 0.8:
            text = text[: rng.randrange(len(text))]
        elif how < 0.85:
            text = rng.choice(
                ("", "[]", "null", "{" * 10_000, "[" * 100_000, '{"a":' * 50_000, "1" * 5000, "NaN", "\ufeff{}")
            )
        elif how < 0.9:
            path.unlink()
            rng.choice((lambda: path.mkdir(), lambda: path.symlink_to(path.name), lambda: os.mkfifo(path)))()
            return path.name
        else:
            content = bytearray(text.encode())
            for _ in range(rng.randrange(1, 20)):
                content[rng.randrange(len(content))] = rng.randrange(256)
            path.write_bytes(content)
            return path.name
        path.write_text(text, errors="surrogatepass")
        return path.name

    return harm


def template(folder: pathlib.Path, rng: random.Random, number: int = 0) -> str:
    """Put a hostile template where templates stand; the folder then says no other one."""
    text = TEMPLATES[number % len(TEMPLATES)]
    config = json.loads((folder / "config.json").read_text())
    config.pop("llava_jax", None)
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("chat_template.json", "processor_config.json", "tokenizer_config.json"):
        if (folder / name).exists():
            content = json.loads((folder / name).read_text()) | {"chat_template": text}
            (folder / name).write_text(json.dumps(content))
    (folder / "chat_template.jinja").write_text(text, errors="surrogatepass")
    return text[:60]


def index(folder: pathlib.Path, rng: random.Random) -> str:
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    names = list(content["weight_map"])
    shutil.copyfile(folder / content["weight_map"][names[0]], folder.parent / "outside.safetensors")
    shard = rng.choice(
        ("../outside.safetensors", str(folder.parent / "outside.safetensors"), "/etc/passwd", "", ".", *VALUES)
    )
    for name in rng.sample(names, rng.choice((1, 3, len(names)))):
        content["weight_map"][name] = shard
    path.write_text(json.dumps(content))
    return repr(shard)[:60]


def header(folder: pathlib.Path, rng: random.Random) -> str:
    """Change the header of a safetensors file, or its length."""
    path = rng.choice(sorted(folder.glob("*.safetensors")))
    content = path.read_bytes()
    (size,) = struct.unpack("<Q", content[:8])
    head, data = json.loads(content[8 : 8 + size]), content[8 + size :]
    how = rng.randrange(9)
    name, other = rng.sample([key for key in head if key != "__metadata__"], 2)
    if how == 0:
        head[name]["data_offsets"] = head[other]["data_offsets"]
    elif how == 1:
        head[name]["shape"] = rng.choice(
            ([2**62, 4], [10**9, 10**9], [-1, 4], [0], [], [1.5], "x", [2**64], [1] * 5000)
        )
    elif how == 2:
        head[name]["dtype"] = rng.choice(("F64", "F8_E4M3", "I8", "BOOL", "x", None, 5, "U64"))
    elif how == 3:
        head[name]["data_offsets"] = rng.choice(
            ([0, 2**63], [5, 1], [0], None, [0, 0], [-4, 0], ["a", "b"], [2**70, 2**71])
        )
    elif how == 4:
        head = mutated(head, rng)
    elif how == 5:
        del head[name]
    elif how == 6:
        data = rng.choice((data[:-1], data[: len(data) // 2], b"", data + b"x" * 10))
    elif how == 7:  # NaN, infinite and huge numbers
        data = rng.choice(
            (b"\xff" * len(data), b"\0\0\x80\x7f" * (len(data) // 4), b"\xff\xff\x7f\x7f" * (len(data) // 4))
        )
    else:
        head["__metadata__"] = rng.choice(VALUES)
    text = json.dumps(head).encode()
    if how == 6 and rng.random() < 0.5:
        text = rng.choice((b"{" * 100_000, b"[" * len(text), b'{"a":' * 50_000, b"", b"\xff" * 9))
    length = len(text) if rng.random() < 0.8 else rng.choice((0, 1, 2**40, 2**63, 2**64 - 1, len(text) - 1))
    path.write_bytes(struct.pack("<Q", length) + text + data)
    return f"{how} of {path.name}"


def called(module: str, attribute: str, argument: str) -> bytes:
    return b"\x80\x02c" + f"{module}\n{attribute}\n".encode() + b"(" + torch_files.text(argument) + b"tR."


DEEP = b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."
LAUGHS = (
    b"\x80\x02]q\x00"
    + b"".join(b"(h%bh%bh%be" % ((bytes([n]),) * 3) + b"]q" + bytes([n + 1]) for n in range(90))
    + b"."
)
PICKLES = (
    called("posix", "system", "touch $HOSTILE"),
    called("os", "system", "touch $HOSTILE"),
    called("builtins", "eval", RUNS.replace("\n", ";")),
    called("builtins", "exec", RUNS),
    called("subprocess", "getoutput", "touch $HOSTILE"),
    called("runpy", "run_path", "hostile.py"),
    called("torch", "load", "x"),
    called("collections", "OrderedDict", "x"),
    called("numpy", "load", "../x.npy"),
    b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0etouch $HOSTILE\x85R.",
    b"(S'touch $HOSTILE'\niposix\nsystem\n.",
    b"cposix\nsystem\n(S'touch $HOSTILE'\nob.",
    *(
        DEEP,
        LAUGHS,
        b"",
        b".",
        b"\x80\x02}.",
        b"\x80\x02N.",
        b"\x80\xff",
        b"\x80\x02]q\x00h\x00a.",
        b"\x80\x02}q\x00h\x00h\x00s.",
    ),
    b"\x80\x02\x8d" + struct.pack("<Q", 2**62) + b"x.",
    b"\x80\x02\x8b" + struct.pack("<i", 2**31 - 1) + b"x.",
    b"\x80\x02h\x05.",
    b"\x80\x02" + b"(" * 100_000 + b"t" * 100_000 + b".",
)


def pickle(folder: pathlib.Path, rng: random.Random, number: int = 0) -> str:
    """Write another pickle into a torch file, or break its archive."""
    path = folder / "pytorch_model.bin"
    with zipfile.ZipFile(path) as archive:
        members = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    if number < len(PICKLES):
        torch_files.write_bin(path, {}, pickled=PICKLES[number])
        return f"pickle {number}"
    how = rng.randrange(6)
    content = bytearray(members["data.pkl"])
    if how == 0:  # sizes, offsets, strides
        for _ in range(3):
            at = rng.choice([at for at in range(len(content) - 5) if content[at] == ord("J")])
            content[at + 1 : at + 5] = struct.pack("<i", rng.choice((-1, 0, 2**31 - 1, -(2**31), 7)))
    elif how == 1:
        for _ in range(rng.randrange(1, 9)):
            content[rng.randrange(len(content))] = rng.randrange(256)
    elif how == 2:
        content = content[: rng.randrange(len(content))]
    elif how == 3:
        members[rng.choice([name for name in members if name.startswith("data/")])] = rng.choice((b"", b"x" * 3))
    elif how == 4:  # a zip bomb
        members["data/0"] = bytes(200 << 20)
    else:
        members.pop(rng.choice(list(members)))
    members["data.pkl"] = bytes(content) if "data.pkl" in members else b""
    packed = zipfile.ZIP_DEFLATED if how == 4 else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", packed) as archive:
        for name, member in members.items():
            archive.writestr(f"archive/{name}", member)
    if how == 5 and rng.random() < 0.5:
        whole = path.read_bytes()
        path.write_bytes(whole[: rng.randrange(len(whole))])
    return f"archive {how}"


def code(folder: pathlib.Path, rng: random.Random) -> str:
    """Bring Python along, in each way that transformers would run."""
    (folder / "hostile.py").write_text(RUNS + "class Hostile:\n    pass\n")
    name = rng.choice(("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"))
    if not (folder / name).exists():
        name = "tokenizer_config.json"
    content = json.loads((folder / name).read_text())
    kinds = ("AutoConfig", "AutoModel", "AutoTokenizer", "AutoProcessor", "AutoImageProcessor")
    auto = dict.fromkeys(kinds, "hostile.Hostile") | {"AutoTokenizer": ["hostile.Hostile", "hostile.Hostile"]}
    content["auto_map"] = auto
    if rng.random() < 0.7:
        content |= {"model_type": "hostile"} if name == "config.json" else {"tokenizer_class": "Hostile"}
    if rng.random() < 0.3:
        content["auto_map"] = dict.fromkeys(kinds, "elsewhere/repo--hostile.Hostile")
    (folder / name).write_text(json.dumps(content))
    if rng.random() < 0.3:
        (folder / "tokenizer.json").unlink()
    return name


def odd_file(folder: pathlib.Path, rng: random.Random) -> str:
    """Put something that is no file, or one without an end, in a file's place."""
    path = rng.choice(sorted(path for path in folder.iterdir() if path.is_file()))
    path.unlink()
    how = rng.randrange(6)
    if how == 0:
        os.mkfifo(path)
    elif how == 1:
        path.symlink_to("/dev/zero")
    elif how == 2:
        path.symlink_to(path.name)
    elif how == 3:
        path.mkdir()
    elif how == 4:
        path.touch()
        os.truncate(path, (1 if path.suffix in (".safetensors", ".bin") else 50) << 30)
    else:
        path.write_bytes(random.Random(0).randbytes(100_000))
    return f"{how} for {path.name}"


CONFIGS = ("config.json", "generation_config.json")
TOKENS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "chat_template.json", "tokenizer_config.json")
# kind -> (cases, form of the folder or None for any, what is done to it)
HARMS: dict[str, tuple[int, str | None, Callable[..., str]]] = {
    "config": (80, None, json_file(*CONFIGS)),
    "tokenizer": (45, "hf", json_file(*TOKENS)),
    "processor": (25, "hf", json_file(*PROCESSORS)),
    "template": (len(TEMPLATES), "hf", template),
    "index": (20, "sharded", index),
    "safetensors": (35, "hf", header),
    "pickle": (len(PICKLES) + 16, "bin", pickle),
    "Python code": (12, "hf", code),
    "no regular file": (12, None, odd_file),
}


# ---- what becomes of it ----------------------------------------------------------------------------------------------


def make_folders(inputs: pathlib.Path) -> dict[str, pathlib.Path]:
    """Return a valid folder of each form."""
    make_inputs(inputs)
    found = {form: inputs / form for form in FORMS}
    (inputs / "llava").rename(found["hf"])
    tensors = {name: stored.get() for name, stored in open_folder(str(found["hf"])).stored.items()}
    for form in ("sharded", "bin"):
        shutil.copytree(found["hf"], found[form])
        (found[form] / "model.safetensors").unlink()
    pieces = [Piece(name, x.shape, x.dtype, lambda x=x: x) for name, x in tensors.items()]
    write_shards(str(found["sharded"]), pieces, sum(piece.nbytes for piece in pieces) // 3)
    torch_files.write_bin(found["bin"] / "pytorch_model.bin", tensors)
    with contextlib.redirect_stdout(io.StringIO()):
        assert command(["convert", f"--from=hf:{found['hf']}", f"--to=llava:{found['original']}"]) == 0
    return found


def use(folder: pathlib.Path, image: pathlib.Path) -> str:
    """Return what a user is told of a folder; "" where it can be used. Raises whatever else happens."""
    said, target = io.StringIO(), folder.parent / "converted"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        code = command(["convert", f"--from={folder}", f"--to=hf:{target}"])
        shutil.rmtree(target, ignore_errors=True)
        try:
            model = load(str(folder))
            shown = [{"type": "image", "image": str(image)}, {"type": "text", "text": "What is this?"}]
            model.processor.prompt([{"role": "user", "content": shown}])
            load_tokenizer(str(folder)).template(OWN).write("", [Turn("human", "What?"), Turn("gpt", "A cat.")])
        except InputError as error:
            print(f"error: {error}", file=said)
    told = [line for line in said.getvalue().splitlines() if line.startswith("error: ")]
    if code not in (0, 2) or ((code == 2) != any("error" in line for line in told[:1]) and code == 2):
        raise AssertionError(f"exit code {code} with {said.getvalue()[-300:]!r}")
    if "Traceback" in said.getvalue() or any(len(line) > LINE for line in told):
        raise AssertionError(f"told {said.getvalue()[-300:]!r} in {max(map(len, told))} characters")
    return told[0] if told else ""


def attempt(
    folders: dict[str, pathlib.Path], kind: str, number: int, image: pathlib.Path, workspace: pathlib.Path
) -> tuple[str, str, float]:
    """Return (what is wrong, or "", what the user is told, seconds) of a case."""
    rng = random.Random(f"{kind} {number}")
    _, form, harm = HARMS[kind]
    folder = workspace / f"{kind.replace(' ', '_')}_{number}" / "model"
    shutil.copytree(folders[form or rng.choice(FORMS)], folder)
    os.environ["HOSTILE"] = str(folder.parent / CANARY)
    numbered = kind in ("template", "pickle")
    did = harm(folder, rng, number) if numbered else harm(folder, rng)

    before, told, wrong = time.monotonic(), "", ""
    try:
        with alarm(SECONDS):
            told = use(folder, image)
    except BaseException as error:  # noqa: BLE001, a traceback is what is looked for
        wrong = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    if os.path.exists(os.environ["HOSTILE"]):
        wrong = f"RAN WHAT IS IN THE FOLDER; {wrong}"
    seconds = time.monotonic() - before
    shutil.rmtree(folder.parent)
    return wrong and f"{kind} {number} ({did}): {wrong}", told, seconds


def cases(share: float) -> Iterator[tuple[str, int]]:
    for kind, (count, _, _) in HARMS.items():
        yield from ((kind, number) for number in range(0, count, max(1, round(1 / share))))


def main(share: float) -> int:
    faults = 0
    with tempfile.TemporaryDirectory() as name:
        inputs = pathlib.Path(name)
        folders = make_folders(inputs)
        image = inputs / "images" / "0.png"
        for form in FORMS:
            assert use(folders[form], image) == "", form
        limit_memory()
        for kind, group in itertools.groupby(cases(share), lambda case: case[0]):
            counts, slowest = collections.Counter(), 0.0
            for _, number in group:
                wrong, told, seconds = attempt(folders, kind, number, image, inputs)
                counts["wrong" if wrong else "refused" if told else "used"] += 1
                slowest = max(slowest, seconds)
                if wrong:
                    print(wrong)
            faults += counts["wrong"]
            figures = ", ".join(f"{count} {name}" for name, count in sorted(counts.items()))
            print(f"{kind:<18}{counts.total():>4}: {figures}; slowest {slowest:.1f} s", flush=True)
    print(f"{faults} wrong; {peak_memory() / 2**30:.2f} GiB at most")
    return int(faults > 0 or peak_memory() > MEMORY)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]) / sum(count for count, _, _ in HARMS.values()) if sys.argv[1:] else 1.0))
