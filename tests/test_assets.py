import hashlib
import zipfile

import pytest
from llamapro import assets
from llamapro.assets import Asset, AssetError, fetch


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
    return Asset("tiny-asset==1.0", name, digest, "tiny_asset/data.txt", 1)


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
    with pytest.raises(AssetError, match=f"sha256 {wheel.sha256} expected, got"):
        fetch(wheel)
