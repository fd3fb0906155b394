"""`python -m llava_jax COMMAND`: the same as `llava-jax COMMAND`."""

import sys

from llava_jax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
