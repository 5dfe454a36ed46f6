"""What is said of the user's code that raised: its words in one line, and the line of the user's that did it."""

from __future__ import annotations

import json

from compressor.inputs.blame import raised


def test_the_users_line_is_named_below_a_librarys() -> None:
    try:
        json.loads("{")
    except ValueError as error:
        words = raised(error)
    assert words.startswith("JSONDecodeError: Expecting property name")
    assert "test_blame.py:" in words


def test_a_workers_traceback_is_read() -> None:
    text = (
        "Caught KeyError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        '  File "/venv/lib/python3/site-packages/torch/utils/data/fetch.py", line 33, in fetch\n'
        "  File \"/photos/data.py\", line 12, in __getitem__\nKeyError: 'cat'\n"
    )
    assert raised(KeyError(text)).endswith("/photos/data.py:12")
    assert raised(RuntimeError(text)) == "RuntimeError: KeyError: 'cat', at /photos/data.py:12"
    assert raised(RuntimeError("")) == "RuntimeError: no message"
