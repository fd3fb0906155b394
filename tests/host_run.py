"""One of the processes of a tiny run on several hosts, with short waits, and updates slow enough to be stopped.

`python -m tests.host_run CONFIG_JSON WORKDIR …` trains one such pair after the other, and then prints a line of JSON:
the rows of a batch of eight that this process reads, for meshes of all devices.
"""

import json
import sys
import time

from llava_jax.parallel import distributed, sharding
from llava_jax.parallel.sharding import make_mesh
from llava_jax.settings import read_settings
from llava_jax.train import loop
from llava_jax.types import MeshSettings

MESHES = {"fsdp": MeshSettings(1, -1, 1), "mixed": MeshSettings(2, -1, 2), "tensor": MeshSettings(1, 1, -1)}


def slow_update(*args, inner=loop.log_update, **how):
    inner(*args, **how)
    time.sleep(0.2)


if __name__ == "__main__":
    distributed.HEARTBEAT_SECONDS, distributed.VISIBLE_SECONDS = 10, 2.0
    loop.log_update = slow_update
    with distributed.connected():
        for config, workdir in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
            loop.train(read_settings(config), workdir)
        rows = {name: sharding.local_rows(make_mesh(mesh), 8) for name, mesh in MESHES.items()}
        print(json.dumps(rows), flush=True)
