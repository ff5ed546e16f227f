"""A file is written whole or not at all."""

import pytest

from clip_po.atomic_write import atomic_write


def test_a_file_is_replaced_once_it_is_complete(tmp_path):
    target = tmp_path / "new" / "file.txt"
    for text in ("old", "new"):
        with atomic_write(target) as partial:
            partial.write_text(text)
            assert partial.parent == target.parent
            assert not target.exists() or target.read_text() != text
        assert target.read_text() == text
    assert [file.name for file in target.parent.iterdir()] == ["file.txt"]


def test_a_failed_write_keeps_the_old_content_and_leaves_no_other_file(tmp_path):
    target = tmp_path / "file.txt"
    target.write_text("old")

    def fail():
        with atomic_write(target) as partial:
            partial.write_text("half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]
