"""The published steps on 64 v5e chips do not grow: hashed here, compiled only when they changed."""

import subprocess
import sys

from tests.plan_baseline import CHECKED, ROOT


def test_the_published_steps_have_not_grown():
    argv = [sys.executable, "-m", "tests.plan_baseline", "--check"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert all(name in done.stdout for name in CHECKED)
