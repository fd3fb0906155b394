"""The launch scripts: what they would run and what they do run, on every way to start but the TPU VMs' workers.

Google's and Slurm's commands are stand-ins that record their arguments. What dry runs print is held by transcripts,
data/launch/*.txt: `$ command`, then its output.
"""

import mmap
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jax
import kubernetes_validate
import libtpu
import pytest
import yaml

from llava_jax.parallel.chips import TUNED
from tests.launch_stage import DATA, LAUNCH, NASTY, ROOT, V5E, Stage

SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("env/*.sh"), LAUNCH / "slurm.sbatch"])
STARTED = ["laptop.sh", "tpu_vm.sh", "tpu_queued.sh", "gke.sh", "slurm.sh"]
GKE = {"TOPOLOGY": "v5e:8x8", "IMAGE": "registry/image", "CLAIM": "data"}


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


# ---- all scripts ------------------------------------------------------------------------------------------------


def shellcheck(*paths) -> subprocess.CompletedProcess:
    command = [pathlib.Path(sys.executable).parent / "shellcheck", "-x", *paths]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_shellcheck_finds_nothing():
    found = shellcheck(*SCRIPTS)
    assert (found.returncode, found.stdout) == (0, "")


def test_shellcheck_finds_a_defect(tmp_path):
    (tmp_path / "bad.sh").write_text("#!/usr/bin/env bash\nrm $1\n")
    assert "SC2086" in shellcheck(tmp_path / "bad.sh").stdout


@pytest.mark.parametrize("script", [path.name for path in SCRIPTS if os.access(path, os.X_OK)])
def test_a_script_stops_at_the_first_error(script):
    assert "\nset -euo pipefail\n" in (LAUNCH / script).read_text()


@pytest.mark.parametrize("script", STARTED)
@pytest.mark.parametrize("words", [[], ["--help"]], ids=["nothing", "help"])
def test_usage(stage, script, words):
    done = stage.run(f"launch/{script}", *words)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"launch/{script}" in done.stderr and "DRY_RUN=1" in done.stderr and "#" not in done.stderr


@pytest.mark.parametrize(
    "line, more, says",
    [
        ("laptop.sh configs/tiny.py", {}, "WORKDIR"),
        ("slurm.sh configs/tiny.py", {}, "WORKDIR"),
        ("slurm.sh c w", {"NODES": "two"}, "NODES='two'"),
        ("slurm.sbatch", {}, "slurm.sh"),
        ("tpu_vm.sh fly llava", V5E, "'fly'"),
        ("tpu_vm.sh create", V5E, "NAME"),
        ("tpu_vm.sh create Llava_1", V5E, "'Llava_1'"),
        ("tpu_vm.sh create llava", {"TOPOLOGY": "v5e:2x4"}, "ZONE"),
        ("tpu_vm.sh create llava", {"ZONE": "z"}, "TOPOLOGY"),
        ("tpu_vm.sh create llava", V5E | {"TOPOLOGY": "v5e:3x3"}, "v5e:3x3"),
        ("tpu_vm.sh create llava", V5E | {"SLICES": "2"}, "tpu_queued.sh"),
        ("tpu_queued.sh create llava", V5E | {"SLICES": "0"}, "SLICES"),
        ("tpu_queued.sh train llava configs/tiny.py", V5E, "WORKDIR"),
        ("tpu_queued.sh babysit llava c w", V5E | {"RESTARTS": "-1"}, "RESTARTS"),
        ("gke.sh render", GKE, "NAME"),
        ("gke.sh render llava c", GKE, "WORKDIR"),
        ("gke.sh render llava c w", {"TOPOLOGY": "v5e:8x8", "CLAIM": "data"}, "IMAGE"),
        ("gke.sh submit llava c w", GKE | {"CLAIM": ""}, "CLAIM"),
        ("gke.sh xpk llava c w", GKE, "CLUSTER"),
        ("gke.sh render llava c w $'a\\nb'", GKE, "control"),
        ("gke.sh submit llava c w $'a\\nb'", GKE, "control"),
    ],
)
def test_bad_input_is_one_line(stage, line, more, says):
    done = stage.run("bash", "-c", f"launch/{line}", **more)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and says in done.stderr
    assert (done.stdout, stage.calls()) == ("", [])


def transcript(stage: Stage, path: pathlib.Path) -> str:
    """The commands of a transcript with what they print now."""
    text = ""
    for command in re.findall(r"^\$ (.*)", path.read_text(encoding="utf-8"), re.MULTILINE):
        done = stage.run("bash", "-c", command, DRY_RUN="1")
        assert done.returncode == 0, done.stderr
        text += f"$ {command}\n{done.stdout}\n".replace(f"{ROOT}", "/ROOT")
    return text


@pytest.mark.parametrize("path", sorted(DATA.glob("*.txt")), ids=lambda path: path.stem)
def test_dry_run_is_as_held(stage, path):
    assert transcript(stage, path) == path.read_text(encoding="utf-8")
    assert stage.calls() == []


@pytest.mark.parametrize(
    "words, more",
    [
        (["tpu_queued.sh", "train", "llava", "c.py:a=b", "/data/run", *NASTY], V5E | {"SLICES": "2"}),
        (["tpu_vm.sh", "create", "llava"], V5E | {"CREATE_FLAGS": "--network=n --labels=a=b"}),
        (["tpu_vm.sh", "install", "llava"], V5E | {"SETUP": "sudo mount 'a b' /data"}),
        (["tpu_vm.sh", "logs", "llava"], V5E),
        (["gke.sh", "xpk", "llava", "c.py:a=b", "/data/run", *NASTY], GKE | {"CLUSTER": "c", "STORAGE": "s"}),
        (["gke.sh", "status", "llava"], {}),
        (["slurm.sh", "c.py:a=b", "/data/run", *NASTY], {"LOGS": "build/logs"}),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, list) else "",
)
def test_a_dry_run_can_be_pasted(stage, words, more):
    script, *rest = words
    stage.answer({"describe": [["READY", 0]]})
    pasted = stage.run(f"launch/{script}", *rest, DRY_RUN="1", **more).stdout
    assert stage.calls() == []
    assert stage.run("bash", "-euc", pasted, **more).returncode == 0
    calls = stage.calls()
    stage.answer({"describe": [["READY", 0]]})
    assert stage.run(f"launch/{script}", *rest, **more).returncode == 0
    assert calls == stage.calls() != []


def test_laptop_trains(stage):
    (stage.folder / "bin/python").write_text('#!/bin/bash\nprintf "%s\\n" "$JAX_PLATFORMS" "$@"\n')
    (stage.folder / "bin/python").chmod(0o755)
    done = stage.run("launch/laptop.sh", "configs/tiny.py:stage=pretrain", "runs/a b", *NASTY)
    train = ["-m", "llava_jax", "train", "--config=configs/tiny.py:stage=pretrain", "--workdir=runs/a b", *NASTY]
    assert done.stdout.splitlines() == ["cpu", *train]


# ---- GKE --------------------------------------------------------------------------------------------------------

SLICES_OF = {
    "v5e:2x4": ("tpu-v5-lite-podslice", 1, 8),
    "v5e:8x8": ("tpu-v5-lite-podslice", 16, 4),
    "v5e:16x16": ("tpu-v5-lite-podslice", 64, 4),
    "v5p:2x2x1": ("tpu-v5p-slice", 1, 4),
    "v5p:4x4x4": ("tpu-v5p-slice", 16, 4),
    "v5p:8x8x8": ("tpu-v5p-slice", 128, 4),
    "v6e:1x1": ("tpu-v6e-slice", 1, 1),
    "v6e:4x4": ("tpu-v6e-slice", 4, 4),
}


def render(stage: Stage, **more: str) -> dict:
    done = stage.run("launch/gke.sh", "render", "llava", "c.py:a=b", "/data/a b", *NASTY, **GKE | more)
    assert done.returncode == 0, done.stderr
    assert not re.search(r"@[A-Z_]+@", done.stdout)
    return yaml.safe_load(done.stdout)


def as_job(jobset: dict) -> dict:
    """The job of a JobSet, for which there is a schema."""
    [replicated] = jobset["spec"]["replicatedJobs"]
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, **replicated["template"]}


@pytest.mark.parametrize("topology", SLICES_OF)
@pytest.mark.parametrize("spot", ["", "1"], ids=["kept", "spot"])
def test_jobset_has_a_process_per_machine(stage, topology, spot):
    label, machines, chips = SLICES_OF[topology]
    jobset = render(stage, TOPOLOGY=topology, SLICES="2", SPOT=spot, RESTARTS="7", GRACE="600")
    kubernetes_validate.validate(as_job(jobset), "1.31", strict=True)
    assert jobset["apiVersion"] == "jobset.x-k8s.io/v1alpha2" and jobset["metadata"]["name"] == "llava"
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 7
    assert jobset["spec"]["replicatedJobs"][0]["replicas"] == 2
    job = as_job(jobset)["spec"]
    assert (job["parallelism"], job["completions"], job["backoffLimit"]) == (machines, machines, 0)
    pod = job["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == label
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology.partition(":")[2]
    assert ("cloud.google.com/gke-spot" in pod["nodeSelector"]) == bool(spot)
    tolerated = ["google.com/tpu", "cloud.google.com/gke-spot"] if spot else ["google.com/tpu"]
    assert [toleration["key"] for toleration in pod["tolerations"]] == tolerated
    assert (pod["hostNetwork"], pod["dnsPolicy"]) == (True, "ClusterFirstWithHostNet")
    assert pod["terminationGracePeriodSeconds"] == 600 and pod["restartPolicy"] == "Never"
    [container] = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume.pop("name"): volume for volume in pod["volumes"]}
    assert volumes[mounts["/data"]] == {"persistentVolumeClaim": {"claimName": "data"}}


def test_jobset_needs_no_volume_for_a_workdir_in_a_bucket(stage):
    words = ["launch/gke.sh", "render", "llava", "c.py:a=b", "gs://bucket/a b/"]
    done = stage.run(*words, **GKE | {"CLAIM": ""})
    assert done.returncode == 0, done.stderr
    job = as_job(yaml.safe_load(done.stdout))
    kubernetes_validate.validate(job, "1.31", strict=True)
    pod = job["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert "volumes" not in pod and "volumeMounts" not in container and "/data" not in done.stdout
    cache = {"name": "JAX_COMPILATION_CACHE_DIR", "value": "gs://bucket/a b/compilation_cache"}
    assert cache in container["env"] and "--workdir=gs://bucket/a b/" in container["args"]
    assert "claimName: data" in stage.run(*words, **GKE).stdout


def test_jobset_starts_again_after_sigterm_and_not_after_an_error(stage):
    [rule] = as_job(render(stage))["spec"]["podFailurePolicy"]["rules"]
    ends = rule["onExitCodes"]
    assert (rule["action"], ends["containerName"], ends["operator"]) == ("FailJob", "train", "NotIn")
    assert {42, 43, 44, 134, 137, 143} <= set(ends["values"]) and not {1, 2} & set(ends["values"])


@pytest.mark.parametrize("wrong", ["resourcez", "volumeMount"])
def test_schema_finds_a_wrong_word(stage, wrong):
    job = as_job(render(stage))
    job["spec"]["template"]["spec"]["containers"][0][wrong] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(job, "1.31", strict=True)


def test_container_trains(stage):
    [container] = as_job(render(stage, TOPOLOGY="v6e:4x4"))["spec"]["template"]["spec"]["containers"]
    (stage.folder / "bin/python").write_text('#!/bin/bash\nprintf "%s\\n" "$JAX_PLATFORMS" "$@"\n')
    (stage.folder / "bin/python").chmod(0o755)
    words = [*container["command"], *container["args"]]
    # What Kubernetes does to them: $$ is $; $(NAME) is a variable, and there is none left.
    assert not [word for word in words if "$(" in word.replace("$$", "")]
    done = stage.run(*(word.replace("$$", "$") for word in words))
    train = ["-m", "llava_jax", "train", "--config=c.py:a=b", "--workdir=/data/a b", *NASTY]
    assert done.stdout.splitlines() == ["tpu,cpu", *train], done.stderr


def test_submit_gives_kubectl_the_manifest(stage):
    name = f"test-{os.getpid()}"
    assert stage.run("launch/gke.sh", "submit", name, "c.py:a=b", "/data/a b", *NASTY, **GKE).returncode == 0
    manifest = ROOT / f"build/{name}.yaml"
    assert stage.calls() == [["kubectl", "create", "-f", f"build/{name}.yaml"]]
    rendered = render(stage)
    rendered["metadata"]["name"] = name
    assert yaml.safe_load(manifest.read_text()) == rendered
    manifest.unlink()


def test_image_is_made_of_files_that_are_there():
    copied = re.findall(r"^COPY (.*) \S+$", (LAUNCH / "Dockerfile").read_text(), re.MULTILINE)
    assert [path for line in copied for path in line.split() if not (ROOT / path).exists()] == []
    assert {"launch", "llava_jax", "configs"} <= set(copied)


# ---- Slurm ------------------------------------------------------------------------------------------------------


def job(stage: Stage, code: int, **more: str) -> subprocess.CompletedProcess:
    stage.answer({"srun": [["", code]]})
    given = {"SLURM_JOB_ID": "7", "SLURM_CPUS_PER_TASK": "8", "RESTARTS": "3", "LOGS": "logs"}
    return stage.run("launch/slurm.sbatch", str(ROOT), "c.py:a=b", "/data/a b", *NASTY, **given | more)


def test_slurm_job_starts_train_in_every_process(stage):
    assert job(stage, 0).returncode == 0
    [[name, *words]] = stage.calls()
    assert name == "srun" and "--cpus-per-task=8" in words and "--output=logs/%j_%t.log" in words
    train = ["python", "-m", "llava_jax", "train", "--config=c.py:a=b", "--workdir=/data/a b", *NASTY]
    assert words[-len(train) :] == train


@pytest.mark.parametrize(
    "code, count, again",
    [(42, "0", True), (44, "0", True), (134, "0", True), (42, "3", False), (0, "0", False), (1, "0", False)],
)
def test_slurm_job_queues_again_when_train_was_interrupted(stage, code, count, again):
    assert job(stage, code, SLURM_RESTART_COUNT=count).returncode == code
    assert stage.calls()[1:] == ([["scontrol", "requeue", "7"]] if again else [])


WAITS = "while true; do sleep 0.02; done\n"


def test_slurm_job_that_is_cancelled_hands_sigterm_on_and_is_not_queued_again(stage):
    (stage.folder / "bin/srun").write_text(f"#!/bin/bash\ntrap 'exit 42' TERM\ntouch {stage.folder}/up\n{WAITS}")
    given = stage.environment(SLURM_JOB_ID="7", RESTARTS="3", LOGS="logs")
    words = ["launch/slurm.sbatch", str(ROOT), "c.py", "/data"]
    with subprocess.Popen(words, cwd=ROOT, env=given) as process:
        while not (stage.folder / "up").exists():
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 42
    assert stage.calls() == []


# ---- environment of the chips -----------------------------------------------------------------------------------

ENVIRONMENTS = sorted(path.stem for path in LAUNCH.glob("env/*.sh"))


def variables(chip: str) -> dict[str, str]:
    """What launch/env/CHIP.sh sets."""
    words = ["bash", "-euc", f". {LAUNCH}/env/{chip}.sh; env -0"]
    given = {"HOME": "/home", "PATH": os.environ["PATH"]}
    done = subprocess.run(words, env=given, capture_output=True, text=True, check=True)
    pairs = [pair.partition("=") for pair in done.stdout.split("\0") if pair]
    return {name: value for name, _, value in pairs if name not in ("HOME", "PATH", "PWD", "SHLVL", "_", "OLDPWD")}


def test_every_topology_has_its_environment():
    assert sorted({topology.partition(":")[0] for topology in SLICES_OF} | {"gpu"}) == ENVIRONMENTS


@pytest.mark.parametrize("chip", ENVIRONMENTS)
def test_no_compile_option_stands_in_an_environment_as_well(chip):
    flags = " ".join(variables(chip).get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS"))
    given = {flag.removeprefix("--").partition("=")[0] for flag in flags.split()}
    tuned = [TUNED.get(name, {}) for name in (["a100-80g", "h100", "h200"] if chip == "gpu" else [chip])]
    assert bool(given) == (chip == "gpu") and not given & {option for options in tuned for option in options}


@pytest.mark.parametrize("chip", ENVIRONMENTS)
def test_every_variable_says_why(chip):
    blocks = (LAUNCH / f"env/{chip}.sh").read_text().split("\n\n")
    exported = [block for block in blocks if "\nexport " in block]
    assert sum(block.count("\nexport ") for block in exported) == len(variables(chip))
    assert [block for block in exported if not block.startswith(("# ", "flags=("))] == []
    assert "by us" in blocks[0]


def test_jaxlib_knows_the_gpu_flags():
    flags = dict(flag.removeprefix("--").split("=") for flag in variables("gpu")["XLA_FLAGS"].split())
    options = {name: True if value == "true" else value for name, value in flags.items()}
    lowered = jax.jit(lambda x: x + 1).lower(1.0)
    assert lowered.compile(compiler_options=options)(1.0) == 2.0
    with pytest.raises(jax.errors.JaxRuntimeError, match="xla_gpu_not_there"):
        lowered.compile(compiler_options=options | {"xla_gpu_not_there": "1"})


def test_libtpu_knows_its_variables():
    names = {name for chip in ENVIRONMENTS if chip != "gpu" for name in variables(chip) if name.startswith("TPU_")}
    with open(libtpu.get_library_path(), "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as library:
        assert names and [name for name in names if library.find(name.encode()) < 0] == []
        assert library.find(b"TPU_NOT_THERE_AT_ALL") < 0
