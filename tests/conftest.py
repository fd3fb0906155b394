"""What is true of every test: none asks the Hub, whose names look like paths of two folders; the longest come first."""

import os

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
# Files with tests of a minute, in processes of their own: a worker that began one last would leave the others idle.
LONG = ("test_sharding.py", "test_distributed.py", "test_tower.py", "test_benchmark.py", "test_resume.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)
