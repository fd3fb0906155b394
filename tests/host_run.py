"""One of the processes of a tiny run on several hosts, with short waits, and updates slow enough to be stopped.

`python -m tests.host_run CONFIG_JSON WORKDIR …` trains one such pair after the other, and then prints a line of JSON:
the rows of a batch of eight that this process reads, for meshes of all devices.
"""

import json
import sys
import time

from llava_jax.settings import read_settings
from llava_jax.sharding import make_mesh
from llava_jax.train import hosts, loop
from llava_jax.types import MeshSettings

MESHES = {"fsdp": MeshSettings(1, -1, 1), "mixed": MeshSettings(2, -1, 2), "tensor": MeshSettings(1, 1, -1)}


def slow_report(*args, inner=loop.report, **how):
    inner(*args, **how)
    time.sleep(0.2)


if __name__ == "__main__":
    hosts.HEARTBEAT_SECONDS, hosts.VISIBLE_SECONDS = 10, 2.0
    loop.report = slow_report
    with hosts.connected():
        for config, workdir in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
            loop.train(read_settings(config), workdir)
        rows = {name: hosts.local_rows(make_mesh(mesh), 8) for name, mesh in MESHES.items()}
        print(json.dumps(rows), flush=True)
