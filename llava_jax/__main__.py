"""`python -m llava_jax COMMAND`: the same as `llava-jax COMMAND`."""

import sys

from llava_jax.cli.main import main

# Processes that check rows are spawned: they import this file again under another name.
if __name__ == "__main__":
    sys.exit(main())
