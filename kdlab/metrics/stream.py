"""Reads a large JSON object from a file piece by piece."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import orjson

CHUNK = 1 << 22
"""Bytes that are read at a time, at least."""

_SPACE = re.compile(rb"[ \t\r\n]*")
_STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
_TOKEN = re.compile(_STRING.pattern + rb'|["\[\]{}]', re.DOTALL)
_SCALAR = re.compile(rb"[^ \t\r\n,\]}]*")
_EMPTY_LIST = re.compile(rb"\[[ \t\r\n]*\]")
_LIST_OF_OBJECTS_END = re.compile(rb"\}[ \t\r\n]*\]")


class JsonStream:
    """A JSON file that is read from start to end; accepts what Python's ``json`` accepts, NaN and Infinity too.

    Args:
        file: opened for reading bytes.
        path: its name, for messages.
        chunk: bytes to read at a time, at least.
    """

    def __init__(self, file: BinaryIO, path: Path, chunk: int = CHUNK) -> None:
        self._file, self._path, self._chunk = file, path, chunk
        self._data, self._at, self._before = (
            b"",
            0,
            0,
        )  # The buffer, where reading stands in it, bytes dropped before it.

    def members(self) -> Iterator[str]:
        """Keys of the object that comes next; the caller takes each one's value before it asks for the next key.

        Raises:
            ValueError: there is no JSON object; the message names the byte.
        """
        self._take(b"{", "an object")
        if self.peek() == b"}":
            self._at += 1
            return
        while True:
            if self.peek() != b'"':
                raise self._error("a key in quotes was expected")
            key = self.value()
            self._take(b":", "a colon")
            yield key
            following = self.peek()
            if following not in (b",", b"}"):
                raise self._error("a comma or a closing brace was expected")
            self._at += 1
            if following == b"}":
                return

    def peek(self) -> bytes:
        """The next byte that is no white space; empty at the end of the file."""
        while True:
            self._at = _SPACE.match(self._data, self._at).end()  # type: ignore[union-attr]  # It matches nothing too.
            if self._at < len(self._data) or not self._more():
                return self._data[self._at : self._at + 1]

    def finish(self) -> None:
        """Make sure that nothing follows.

        Raises:
            ValueError: something does.
        """
        if self.peek():
            raise self._error("nothing more was expected")

    def value(self) -> Any:
        """The value that comes next, decoded.

        Where a list of objects ends is guessed from its last bytes, since looking at every bracket takes longer than to
        decode it. A part of a list that lacks its end is never valid JSON, so a wrong guess is noticed.

        Raises:
            ValueError: there is no JSON value; the message names the byte.
        """
        if self.peek() == b"[":
            end = self._list_end()
            try:
                return self._decode(end)
            except json.JSONDecodeError as error:
                # Cut within a string, cut elsewhere, or too long: the list holds something else than objects.
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(error.doc)
                if not cut and error.msg != "Extra data":
                    raise self._error(error.msg, error) from None
        end = self._value_end()
        try:
            return self._decode(end)
        except json.JSONDecodeError as error:
            raise self._error(error.msg, error) from None

    def _decode(self, end: int) -> Any:
        """Decode the bytes up to ``end`` of the buffer and step over them."""
        try:
            value = orjson.loads(memoryview(self._data)[self._at : end])
        except orjson.JSONDecodeError:  # It takes no NaN, no Infinity, no huge integers.
            try:
                value = json.loads(self._data[self._at : end].decode())
            except UnicodeDecodeError as error:
                raise self._error(f"no UTF-8 text ({error.reason})", plus=error.start) from None
            except RecursionError:
                raise self._error("nested too deeply") from None
        self._at = end
        return value

    def _list_end(self) -> int:
        """Where the list of objects that comes next probably ends."""
        while True:
            match = _EMPTY_LIST.match(self._data, self._at) or _LIST_OF_OBJECTS_END.search(self._data, self._at)
            if match:
                return match.end()
            if not self._more():
                return len(self._data)

    def _value_end(self) -> int:
        """Where the value that comes next ends, found by its brackets."""
        while True:
            end = self._closing()
            if end:
                return end
            if not self._more():
                raise self._error("the file ends here, before its data do", plus=len(self._data) - self._at)

    def _closing(self) -> int:
        """Where the value ends in the buffer; 0 where it goes on."""
        first = self._data[self._at : self._at + 1]
        if first == b'"':
            string = _STRING.match(self._data, self._at)
            return string.end() if string else 0
        if first not in (b"[", b"{"):
            end = _SCALAR.match(self._data, self._at).end()  # type: ignore[union-attr]  # It matches nothing too.
            return end if end < len(self._data) else 0
        depth = 0
        for token in _TOKEN.finditer(self._data, self._at):
            kind = token.group()
            if kind in (b"[", b"{"):
                depth += 1
            elif kind in (b"]", b"}"):
                depth -= 1
                if depth == 0:
                    return token.end()
            elif kind == b'"':
                return 0  # A string that goes on.
        return 0

    def _more(self) -> bool:
        """Read on; as much again as is held, so that long values are not searched too often."""
        read = self._file.read(max(self._chunk, len(self._data) - self._at))
        self._before += self._at
        self._data, self._at = self._data[self._at :] + read, 0
        return bool(read)

    def _take(self, byte: bytes, what: str) -> None:
        if self.peek() != byte:
            raise self._error(f"{what} was expected")
        self._at += 1

    def _error(self, what: str, cause: json.JSONDecodeError | None = None, plus: int = 0) -> ValueError:
        if cause is not None:
            plus = len(cause.doc[: cause.pos].encode())
        place = self._before + self._at + plus
        if self._at >= len(self._data):
            what = f"the file is empty; {what}" if place == 0 else f"the file ends here; {what}"
        return ValueError(f"{self._path}: no valid JSON at byte {place}: {what}")
