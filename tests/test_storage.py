import os
import shutil

import pytest
from llamapro import storage
from llamapro.storage import byte_count, new_directory, one_line, shown, write_text


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


@pytest.mark.parametrize(
    "count, said",
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (4_000, "4.00 kB"),
        (12_300_000, "12.30 MB"),
        (1_500_000_000, "1.50 GB"),
    ],
)
def test_byte_counts_for_people(count, said):
    assert byte_count(count) == said


def test_a_disk_too_small_is_named_in_units_that_show_it(tmp_path, monkeypatch):
    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with (
        pytest.raises(OSError, match=r"out needs 2\.00 MB, free are 1\.00 kB"),
        new_directory(tmp_path / "out", needs=2_000_000),
    ):
        pass


def test_a_write_that_fails_names_the_file(tmp_path, small_files):
    with pytest.raises(OSError) as caught, new_directory(tmp_path / "out") as directory:
        (directory / "file").write_bytes(b"x" * 2000)
    assert caught.value.filename == str(tmp_path / "out")
    with pytest.raises(OSError) as caught:
        write_text(tmp_path / "text", "x" * 2000)
    assert caught.value.filename == str(tmp_path / "text")


def test_a_replaced_file_is_on_disk_with_its_name(tmp_path, monkeypatch):
    """The directory is synced last: it holds the name."""
    synced = []
    monkeypatch.setattr(storage, "sync", lambda path: synced.append((path, *os.listdir(tmp_path))))
    write_text(tmp_path / "text", "é")
    assert (tmp_path / "text").read_bytes() == "é".encode()
    assert synced[-1] == (tmp_path, "text")


def test_what_is_shown_of_a_value_is_one_short_line():
    for value in ("a\nb" * 1000, [["x"] * 100] * 100, {"a": "\n"}, 10**400, None):
        assert len(shown(value)) < 1000 and "\n" not in shown(value)
    assert shown("full_attention") == "'full_attention'"


def test_what_others_say_is_one_line():
    assert one_line("a\n\tb\n") == "a b" and len(one_line("x" * 5000)) < 1010
