"""A tiny run in a bucket for tests that kill it: slow updates, frequent uploads, a lock that expires soon.

`python -m tests.bucket_run CONFIG_JSON WORKDIR`
"""

import sys
import time

from llava_jax import buckets
from llava_jax.parallel.distributed import connected
from llava_jax.settings import read_settings
from llava_jax.train import loop


def quicken() -> None:
    buckets.RENEWED, buckets.EXPIRED, buckets.UPLOADED = 0.3, 2.0, 0.05


def slow_update(*args, inner=loop.log_update, **how):
    inner(*args, **how)
    time.sleep(0.1)


if __name__ == "__main__":
    quicken()
    loop.log_update = slow_update
    with connected():
        loop.train(read_settings(sys.argv[1]), sys.argv[2])
