"""Numbers for the lineages of published weights: no two of a run are alike, whatever ended in between."""

from cluster.storage import RunStorage

_FILE = "incarnation"


class DurableIncarnations:
    """Numbers that grow from 0, none of which any process of a run has had before.

    Not a generator, which would end with the first error of the disk.
    """

    def __init__(self, storage: RunStorage) -> None:
        self._storage = storage

    def __iter__(self) -> "DurableIncarnations":
        return self

    def __next__(self) -> int:
        storage = self._storage
        number = int(storage.read_text(_FILE)) + 1 if storage.exists(_FILE) else 0
        storage.write_text(str(number), _FILE)
        return number
