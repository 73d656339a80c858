"""Reading commands out of Markdown, for the tests of README and of the guide."""

import re
import shlex
from collections.abc import Iterable, Iterator


def words_after(command: str, lines: Iterable[str]) -> Iterator[list[str]]:
    """The words that follow a command in every place where the lines name it."""
    for line in lines:
        for match in re.finditer(rf"(?:^|[\s;&/\\]){re.escape(command)}(\s[^;&|>]*|$)", line):
            words = shlex.split(match.group(1))
            if words:
                yield words
