"""What makes a checkpoint whole: the names of its directories, and the manifest that fits each of its files.

Nothing here changes a disk; `storage.py` does.  A checkpoint is the directory `step-N` with a manifest, the file that
is written last, of every other file's sha256.  It is whole when the manifest reads as it was written and every file has
its hash.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Mapping

MANIFEST = "manifest.json"
_UNREADABLE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO)


def name_of(step: int) -> str:
    """Return the directory name of a step's checkpoint."""
    return f"step-{step}"


def step_of(name: str) -> int | None:
    """Return the step that a directory name is of, None for what is no checkpoint."""
    match = re.fullmatch(r"step-(0|[1-9]\d*)", name)
    return int(match[1]) if match else None


def files_of(directory: str) -> list[str]:
    """Return the files below a directory, relative to it, in order; the manifest is not one of them."""
    paths = [os.path.join(root, name) for root, _, names in os.walk(directory) for name in names]
    return sorted({os.path.relpath(path, directory) for path in paths} - {MANIFEST})


def manifest_of(directory: str) -> str:
    """Return the manifest that fits what a directory holds."""
    return render_manifest({name: sha256_of(os.path.join(directory, name)) for name in files_of(directory)})


def damage_of(directory: str) -> str | None:
    """Return what is wrong with a checkpoint, None if it is whole.

    Raises:
        OSError: when it cannot be told: the files may be there, but this process may not read them.
    """
    try:
        with open(os.path.join(directory, MANIFEST), encoding="utf-8", newline="") as file:
            hashes = parse_manifest(file.read())
        for name, expected in hashes.items():
            if sha256_of(os.path.join(directory, name)) != expected:
                return f"{name} does not match its recorded hash"
    except OSError as error:
        if error.errno not in _UNREADABLE:
            raise
        return f"{os.path.relpath(error.filename or directory, directory)} cannot be read: {error.strerror}"
    except ValueError as error:
        return f"{MANIFEST} is not as it was written: {error}"
    return None


def parse_manifest(text: str) -> dict[str, str]:
    """Return name -> hash, from a text that is to the byte what is written for them.

    Its own bytes have no hash, so one that reads well but could not have been written counts as damaged, e.g. one with
    a name twice: a flipped bit made one file's name another's.

    Raises:
        ValueError: when it is not.
    """
    hashes = json.loads(text)
    is_table = isinstance(hashes, dict) and all(isinstance(value, str) for value in hashes.values())
    if not is_table or render_manifest(hashes) != text:
        raise ValueError("it reads as something else")
    return hashes


def render_manifest(hashes: Mapping[str, str]) -> str:
    """Return the manifest of files with these hashes."""
    return json.dumps(hashes, indent=1, sort_keys=True) + "\n"


def sha256_of(path: str) -> str:
    """Return a file's hash as a manifest has it."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
