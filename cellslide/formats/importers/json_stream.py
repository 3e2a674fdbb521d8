"""JSON of any size read value by value: elements of long arrays come one at a time, whatever stands around them.

The values themselves are decoded by the standard library, whose decoder is quick and takes NaN, which other tools
write. Memory is a window of the text and one value. A single object longer than the window can be walked key by key.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterator
from json.scanner import make_scanner
from typing import Any, TextIO

from cellslide.errors import UsageError

WINDOW_CHARS = 4 << 20
# Room for an outline of a million vertices; beyond, one value would take the memory that many cells need.
MOST_CHARS = 128 << 20
# A text that breaks off is noticed at its end; what fails this far before the end is wrong, not cut.
_CUT_CHARS = 1024
_SPACE = re.compile(r"[ \t\n\r]*")


class Long:
    """Stands for an object that does not fit the window and was not read."""


LONG = Long()


class JsonText:
    """A cursor over a JSON text; every method raises UsageError naming file and character where the text is no JSON."""

    def __init__(self, stream: TextIO, name: str) -> None:
        self.stream, self.name = stream, name
        self.text, self.at, self.before, self.ended = "", 0, 0, False
        self.decode: Callable[[str, int], tuple[Any, int]] = make_scanner(json.JSONDecoder())  # type: ignore[arg-type]

    def peek(self) -> str:
        """Return the next character that is no space, "" at the end of the text."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more(WINDOW_CHARS):
                return ""

    def take(self, char: str) -> bool:
        """Step over `char` if it is next; return whether it was."""
        found = self.peek() == char
        self.at += found
        return found

    def elements(self) -> Iterator[Any]:
        """Yield the elements of the array that is next; LONG for an object that must be walked by `members`."""
        self._expect("[")
        while not self.take("]"):
            yield self.value(WINDOW_CHARS)
            self._separate("]")

    def members(self) -> Iterator[str]:
        """Yield the keys of the object that is next; whoever iterates reads the value after each."""
        self._expect("{")
        while not self.take("}"):
            key = self.value()
            if not isinstance(key, str):
                raise self._broken("a key that is no text")
            self._expect(":")
            yield key
            self._separate("}")

    def value(self, most_chars: int | None = None) -> Any:
        """Return the value that is next; LONG, and nothing read, for an object longer than `most_chars`."""
        is_object = self.peek() == "{"
        while True:
            try:
                value, end = self.decode(self.text, self.at)
                cut = end == len(self.text)  # a number may go on behind the window
            except (json.JSONDecodeError, StopIteration) as error:
                self._check_cut(error)
                value, end, cut = None, 0, True
            except RecursionError as error:
                raise self._broken("nested too deeply") from error
            except ValueError as error:
                raise self._broken("a number of too many digits") from error
            if not cut or (not self._more(max(WINDOW_CHARS, len(self.text) - self.at)) and end):
                self.at = end
                return value
            if self.ended and not end:
                raise self._broken("the text breaks off")
            if is_object and most_chars is not None and not end and len(self.text) - self.at > most_chars:
                return LONG
            if len(self.text) - self.at > MOST_CHARS:
                raise self._broken(f"one value of more than {MOST_CHARS:,} characters")

    def _check_cut(self, error: json.JSONDecodeError | StopIteration) -> None:
        place = error.pos if isinstance(error, json.JSONDecodeError) else int(error.value)
        unclosed = isinstance(error, json.JSONDecodeError) and error.msg.startswith("Unterminated string")
        if self.ended or (place < len(self.text) - _CUT_CHARS and not unclosed):
            self.at = place
            raise self._broken("cut short" if place >= len(self.text) else "unexpected text")

    def _expect(self, char: str) -> None:
        if not self.take(char):
            raise self._broken(f"no {char}")

    def _separate(self, closing: str) -> None:
        if not self.take(",") and self.peek() != closing:
            raise self._broken(f"neither , nor {closing}")

    def _more(self, chars: int) -> bool:
        if self.ended:
            return False
        try:
            chunk = self.stream.read(chars)
        except (OSError, EOFError, ValueError, RuntimeError, zlib.error) as error:
            # What the packed forms raise: damaged, a wrong password, a method that is not known.
            raise UsageError(f"{self.name}: cannot be read as text ({error}); is the file complete?") from error
        if not chunk:
            self.ended = True
            return False
        self.before += self.at
        self.text, self.at = self.text[self.at :] + chunk, 0
        return True

    def _broken(self, what: str) -> UsageError:
        near = self.text[self.at : self.at + 20]
        return UsageError(f"{self.name}: not valid JSON at character {self.before + self.at}: {what}, near {near!r}")
