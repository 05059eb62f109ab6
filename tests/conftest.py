"""Settings that must be in place before torch is imported: exact bits, one thread, no network.  And who runs what."""

import os

os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["DS_ACCELERATOR"] = "cpu"

import pytest


@pytest.fixture(scope="session")
def ray_cluster():
    """One local Ray cluster for all tests that need real actors: starting it takes seconds."""
    import ray

    ray.init(num_cpus=2, namespace="concord", include_dashboard=False)
    yield ray
    ray.shutdown()


@pytest.hookimpl(tryfirst=True)  # before xdist looks for groups
def pytest_collection_modifyitems(items):
    """Give one process all tests that need real actors, first, and the other whole files: both work to the end.

    The groups hold up to pytest 9.1: see pytest-xdist's issue 1386.
    """
    items.sort(key=lambda item: "ray_cluster" not in item.fixturenames)
    for item in items:
        group = "ray" if "ray_cluster" in item.fixturenames else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))
