"""The prompt of `generate`: where it comes from, and how far it has been read."""

from __future__ import annotations

import sys
from pathlib import Path
from types import TracebackType
from typing import Any

from expe_edge.errors import GenerationError
from expe_edge.kinds import is_unicode
from expe_edge.text.documents import decoded

#: Tokens still to be read from which on a bar shows how many have been.
LONG_PROMPT = 4096


def read_prompt(prompt: str | None, prompt_file: Path | None) -> str:
    """Return the prompt from the option, the file or standard input."""
    if prompt is not None and prompt_file is not None:
        raise GenerationError("both --prompt and --prompt-file are given; use one")
    if prompt is not None:
        if not is_unicode(prompt):  # how Python hands on bytes that are no text
            raise GenerationError("--prompt: not UTF-8 text")
        return prompt
    if prompt_file is None or str(prompt_file) == "-":
        nothing = sys.stdin is None or sys.stdin.isatty()  # None where it was closed
        return "" if nothing else decoded("standard input", sys.stdin.buffer.read())
    return text_of("--prompt-file", prompt_file)


def text_of(flag: str, path: Path) -> str:
    """Return the text of a file that an option names.

    Raises:
        GenerationError: it cannot be read. CorpusError: it holds no text.
    """
    try:
        return decoded(f"{flag} {path}", path.read_bytes())
    except OSError as error:
        raise GenerationError(f"{flag} {path}: {error.strerror}") from error


class PromptBar:
    """A bar on standard error while a long prompt is read, to be called as `on_prefill` within its context."""

    def __init__(self) -> None:
        self.progress: Any = None

    def __call__(self, done: int, total: int) -> None:
        """Note that `done` of `total` tokens have been read."""
        if self.progress is None and total - done < LONG_PROMPT:
            return
        if self.progress is None:
            from expe_edge.progress import progress_bar

            self.progress = progress_bar()
            self.progress.start()
            self.task = self.progress.add_task("reading the prompt", total=total)
        self.progress.update(self.task, completed=done)
        if done == total:
            self.progress.stop()

    def __enter__(self) -> PromptBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self.progress is not None:
            self.progress.stop()
