import pytest
from llamapro.storage import new_directory


def test_what_a_killed_process_left_is_removed(tmp_path):
    stale = tmp_path / ".out.partial"
    stale.mkdir()
    (stale / "half").write_text("x")
    with new_directory(tmp_path / "out") as directory:
        (directory / "file").write_text("x")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["file"]


def test_two_processes_do_not_write_one_directory(tmp_path):
    with (
        new_directory(tmp_path / "out") as directory,
        pytest.raises(BlockingIOError, match="another process"),
        new_directory(tmp_path / "out"),
    ):
        pass
    assert directory == tmp_path / ".out.partial" and (tmp_path / "out").exists()
