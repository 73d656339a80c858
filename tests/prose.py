"""Reading Markdown: commands, what is outside of code, and traces of the machine it was written on."""

import re
import shlex
from collections.abc import Iterable, Iterator

# a folder that only one machine or one user has; one below a folder of the project or below ~ is none
MACHINE_PATH = re.compile(
    r"(?<![\w.~}@-])/(?:home|root|tmp|work|mnt|opt|scratch|var/folders|Users)/[\w.-]+|\b[A-Za-z]:\\+Users(?:\\+\w+)?"
)


def words_after(command: str, lines: Iterable[str]) -> Iterator[list[str]]:
    """The words that follow a command in every place where the lines name it."""
    for line in lines:
        for match in re.finditer(rf"(?:^|[\s;&/\\]){re.escape(command)}(\s[^;&|>]*|$)", line):
            words = shlex.split(match.group(1))
            if words:
                yield words


def outside_blocks(text: str) -> str:
    """Markdown without its fenced blocks, also those indented in a list."""
    return re.sub(r"^ *(```+|~~~+).*?^ *\1 *$", "", text, flags=re.MULTILINE | re.DOTALL)


def outside_code(text: str) -> str:
    """Markdown without its fenced blocks and without what is in backquotes."""
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", outside_blocks(text))
