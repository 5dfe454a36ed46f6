"""JSON from elsewhere, field by field: what is let through keeps its value, what is refused is named in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compressor.device import fields

ROOM = 10_000  # bytes, more than any file here has


def written(folder: Path, text: str) -> Path:
    path = folder / "content.json"
    path.write_text(text)
    return path


def test_an_object_is_read_as_json_reads_it(tmp_path: Path) -> None:
    content = {"name": "ä", "sizes": [1, 2.5, None, True], "inner": {"deep": {}}}
    assert fields.read_object(written(tmp_path, json.dumps(content)), ROOM) == content


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "a": 1}', "it holds 'a' twice"),
        ('{"outer": {"b": 1, "b": 2}}', "it holds 'b' twice"),
        ('{"a": NaN}', "it holds NaN, which is no JSON"),
        ('{"a": -Infinity}', "it holds -Infinity, which is no JSON"),
        ("[1, 2]", "it holds a list of 2 entries, expected an object"),
        ("null", "it holds null, expected an object"),
        ("[" * 100_000, "it is longer than 10000 bytes"),
    ],
)
def test_what_is_no_single_meaning_is_refused(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fields.read_object(written(tmp_path, text), ROOM)


def test_nesting_without_end_is_a_value_error_and_no_recursion_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nested too deeply|Expecting"):
        fields.read_object(written(tmp_path, "[" * 100_000), 1 << 20)


def test_a_file_of_exactly_the_limit_is_read_and_one_byte_more_is_not(tmp_path: Path) -> None:
    path = written(tmp_path, '{"a": 1}')
    assert fields.read_object(path, 8) == {"a": 1}
    with pytest.raises(ValueError, match="longer than 7 bytes"):
        fields.read_object(path, 7)


def test_a_link_is_refused_even_to_a_good_file(tmp_path: Path) -> None:
    path = written(tmp_path, "{}")
    (tmp_path / "link.json").symlink_to(path)
    with pytest.raises(ValueError, match="it is a link"):
        fields.read_object(tmp_path / "link.json", ROOM)


def test_a_file_that_is_not_there_is_the_systems_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        fields.read_object(tmp_path / "none.json", ROOM)


Reader = Callable[[dict[str, Any], str], Any]


@pytest.mark.parametrize(
    ("read", "value"),
    [
        (fields.text, "t" * fields.MOST_TEXT),
        (fields.whole, 0),
        (fields.whole, 1 << 62),
        (lambda content, key: fields.whole(content, key, least=-1, most=5), -1),
        (lambda content, key: fields.number(content, key, least=-1.5, most=2), -1.5),
        (lambda content, key: fields.number(content, key, least=-1.5, most=2), 2),
        (fields.flag, False),
        (fields.sha256, "0123456789abcdef" * 4),
        (lambda content, key: fields.entries(content, key, least=2, most=2), [None, {}]),
        (lambda content, key: fields.inner(content, key, most=1), {"a": []}),
    ],
)
def test_a_value_on_the_bound_passes_unchanged(read: Reader, value: Any) -> None:
    assert read({"key": value}, "key") == value


@pytest.mark.parametrize(
    ("read", "value", "words"),
    [
        (fields.text, 3, "'key' is 3, expected a text"),
        (fields.text, "t" * (fields.MOST_TEXT + 1), r"\(10001 characters\), expected a text of at most 10000"),
        (fields.text, "a\ud800", "no text in Unicode"),
        (fields.whole, True, "'key' is true, expected a whole number"),
        (fields.whole, 1.0, "'key' is 1.0, expected a whole number"),
        (fields.whole, -1, "'key' is -1, expected a whole number from 0"),
        (lambda content, key: fields.whole(content, key, most=4), 5, "expected a whole number from 0 to 4"),
        (lambda content, key: fields.number(content, key, least=0, most=1), False, "'key' is false"),
        (lambda content, key: fields.number(content, key, least=0, most=1), float("nan"), "'key' is nan"),
        (lambda content, key: fields.number(content, key, least=0, most=1), "1", "'key' is '1', expected a number"),
        (lambda content, key: fields.number(content, key, least=0, most=1), 1.5, "from 0 to 1"),
        (fields.flag, 1, "'key' is 1, expected true or false"),
        (fields.sha256, "A" * 64, "expected 64 hexadecimal digits"),
        (fields.sha256, "a" * 63, "expected 64 hexadecimal digits"),
        (fields.sha256, "a" * 64 + "\n", "expected 64 hexadecimal digits"),
        (lambda content, key: fields.entries(content, key, least=1, most=2), [], "a list of 1 to 2 entries"),
        (lambda content, key: fields.entries(content, key, most=2), [1, 2, 3], "a list of 3 entries"),
        (fields.entries, "abc", "'key' is 'abc', expected a list"),
        (fields.texts, ["a", 1], "an entry of 'key' is 1, expected a text"),
        (fields.inner, [], "'key' is a list of 0 entries, expected an object"),
        (lambda content, key: fields.inner(content, key, most=1), {"a": 1, "b": 2}, "an object of 2 fields"),
    ],
)
def test_a_value_of_another_kind_or_beyond_a_bound_is_named(read: Reader, value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read({"key": value}, "key")


@pytest.mark.parametrize(
    "read", [fields.field, fields.text, fields.texts, fields.whole, fields.flag, fields.sha256, fields.inner]
)
def test_a_field_that_is_missing_is_named(read: Reader) -> None:
    with pytest.raises(ValueError, match="it has no 'key'"):
        read({"other": 1}, "key")


def test_a_whole_number_becomes_a_float_where_a_number_is_wanted() -> None:
    assert isinstance(fields.number({"key": 1}, "key", least=0, most=1), float)


def test_an_unknown_field_is_refused_by_the_first_of_its_names() -> None:
    fields.only({"a": 1}, ("a", "b"), "a model")
    with pytest.raises(ValueError, match="a model has a field 'c', which this version does not know"):
        fields.only({"a": 1, "d": 1, "c": 2}, ("a", "b"), "a model")


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ({"a": 1}, "an object of 1 fields"),
        ([1, 2], "a list of 2 entries"),
        ("x" * 61, f"'{'x' * 60}'... (61 characters)"),
        ("short", "'short'"),
        (None, "null"),
        (True, "true"),
        (3, "3"),
        (10**200, "1" + "0" * 59 + "..."),
    ],
)
def test_a_value_is_shown_in_one_short_line(value: object, line: str) -> None:
    assert fields.shown(value) == line


def test_a_shown_text_and_a_printed_line_hold_nothing_that_steers_a_terminal() -> None:
    steering = "a\x1b[2Jb\nc\u202ed"
    for line in (fields.shown(steering), fields.printable(steering)):
        assert line.isprintable()
        assert "\\x1b[2J" in line
    assert fields.printable("ant, 東京") == "ant, 東京"
