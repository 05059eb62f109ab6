"""Numbers for the lineages of published weights: no two of a run are alike, whatever ended in between."""

from collections.abc import Iterator

from cluster.storage import RunStorage

_FILE = "incarnation"


def durable_incarnations(storage: RunStorage) -> Iterator[int]:
    """Yield numbers that grow from 0, none of which any process of a run has had before."""
    while True:
        number = int(storage.read_text(_FILE)) + 1 if storage.exists(_FILE) else 0
        storage.write_text(str(number), _FILE)
        yield number
