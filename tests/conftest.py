"""What is true of every test: none asks the Hub, whose names look like paths of two folders; the longest come first;
where few optimisations are asked for (`make test`, not `make parity`), XLA compiles as fast as it can."""

import os

import pytest

from tests import fast_compile

if "JAX_DISABLE_MOST_OPTIMIZATIONS" in os.environ:
    os.environ |= fast_compile.environment()
os.environ["HF_HUB_OFFLINE"] = "1"
# Files with tests of a minute, in processes of their own: a worker that began one last would leave the others idle.
LONG = ("test_sharding.py", "test_distributed.py", "test_tower.py", "test_benchmark.py", "test_resume.py")


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A stand-in of the Hub with no repository, which huggingface_hub asks in this process, with an empty cache."""
    from huggingface_hub import constants  # reads HF_HUB_OFFLINE

    from tests.hub_server import Hub, point, serving

    with serving(Hub()) as served:
        point(monkeypatch, served.endpoint)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield served


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)
