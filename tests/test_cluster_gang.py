"""What the driver makes of ranks that fail while they write; no Ray."""

import errno

import pytest

from cluster.gang import LearnerGang
from cluster.ranks import GangError
from cluster.storage import StorageError


class FailingRanks:
    """Ranks whose every call ends in what one of them raised."""

    actors = ()

    def __init__(self, cause):
        self.cause = cause

    def gather(self, references, *, what, timeout_s):
        raise GangError(f"{what} failed", self.cause)


def test_a_disk_that_refuses_ranks_is_no_failure_of_the_gang():
    full = OSError(errno.ENOSPC, "no space left on device")
    gang = LearnerGang(FailingRanks(full), timeout_s=1.0, ready_timeout_s=1.0)
    for call in (lambda: gang.export("policy"), gang.finish_save):
        with pytest.raises(OSError, match="no space left") as raised:
            call()
        assert raised.value is full
    gang = LearnerGang(FailingRanks(RuntimeError("out of memory")), timeout_s=1.0, ready_timeout_s=1.0)
    with pytest.raises(GangError):
        gang.export("policy")


def test_ranks_that_do_not_see_the_run_directory_are_told_so():
    missing = FileNotFoundError(errno.ENOENT, "No such file or directory", "/run/checkpoints/step-2.1-0.tmp/learner")
    gang = LearnerGang(FailingRanks(missing), timeout_s=1.0, ready_timeout_s=1.0)
    with pytest.raises(
        StorageError, match=r"step-2\.1-0\.tmp.*choose a run\.dir on a file system that all nodes share"
    ):
        gang.finish_save()
