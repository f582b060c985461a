"""What is kept between starts: whole entries or none, other entries for other facts, and no harm where it fails."""

import logging
from pathlib import Path

import pytest

from jaxembed import cache
from jaxembed.cache import Cache, current, switch


def test_what_is_written_is_read(tmp_path: Path) -> None:
    kept = Cache(tmp_path / "new" / "folder")
    assert kept.read("things", "a") is None
    kept.write("things", "a", b"first")
    kept.write("things", "b", b"")
    kept.write("others", "a", b"other")
    kept.write("things", "a", b"second")
    assert [kept.read(*entry) for entry in (("things", "a"), ("things", "b"), ("others", "a"))] == [
        b"second",
        b"",
        b"other",
    ]
    # Nothing half-written stays.
    assert len([file for file in (tmp_path / "new" / "folder").rglob("*") if file.is_file()]) == 3


@pytest.mark.parametrize("spoil", [lambda whole: whole[:-1], lambda whole: whole[:5], lambda whole: whole + b"x"])
def test_an_entry_that_is_not_whole_is_none(spoil: object, tmp_path: Path) -> None:
    """A disk that was full, a process that was killed, another program's file."""
    kept = Cache(tmp_path)
    kept.write("things", "a", b"content")
    (file,) = (tmp_path / "things").iterdir()
    file.write_bytes(spoil(file.read_bytes()))
    assert kept.read("things", "a") is None


def test_a_folder_that_cannot_be_written_to_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    kept = Cache(tmp_path / "file" / "folder")
    with caplog.at_level(logging.WARNING):
        kept.write("things", "a", b"content")
    assert "nothing can be kept in the cache folder" in caplog.text
    assert kept.read("things", "a") is None


def test_keys_tell_facts_versions_and_code_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Cache(tmp_path)
    facts = [(), (1,), ("1",), (1, 2), ({"a": 1},), ({"a": 2},), (Path("a"),), ([1, 2],)]
    keys = [kept.key(*one) for one in facts]
    assert len(set(keys)) == len(facts)
    assert keys == [kept.key(*one) for one in facts]
    monkeypatch.setattr(cache, "versions", lambda: {"jax": "0.0.1"})
    others = [kept.key(*one) for one in facts]
    monkeypatch.setattr(cache, "code_digest", lambda: "another")
    again = [kept.key(*one) for one in facts]
    assert not set(keys) & set(others)
    assert not set(others) & set(again)


def test_it_is_off_until_it_is_switched_on(tmp_path: Path) -> None:
    """A library that is imported writes nothing."""
    assert current() is None
    switch(tmp_path)
    try:
        assert current().folder == tmp_path
    finally:
        switch(None)
    assert current() is None
