"""Cases of recall in real Python code: a name is defined, and referred to for the first time much later."""

from __future__ import annotations

import io
import re
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from expe_edge.quality.needles import Case
from expe_edge.quality.scoring import Ids

CODE_DEFINITION = "code-definition"
#: Definitions at the left margin: functions, classes and constants, of names of three letters or more.
_DEFINITION = re.compile(r"^(?:(?:async +)?def|class) +([A-Za-z_]\w{2,})|^([A-Za-z_]\w{2,}) *=(?!=)", re.MULTILINE)
_WORD = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True, eq=False)
class CodeText:
    """A document as token ids (T,), as text, and the characters [begin, end) of the text that each token is, (T, 2).

    The opening separator is no character of the text: its are [0, 0).
    """

    ids: Ids
    text: str
    offsets: Ids

    def tokens_of(self, begin: int, end: int) -> tuple[int, int]:
        """Return the range of tokens that have any of the characters [begin, end)."""
        (inside,) = np.nonzero((self.offsets[:, 0] < end) & (self.offsets[:, 1] > begin))
        return int(inside[0]), int(inside[-1]) + 1


@dataclass(frozen=True)
class Reference:
    """A name that a document defines at one character and mentions next at another, in code."""

    name: str
    defined: int
    mentioned: int


def read_code(tokenizer: Any, ids: Ids) -> CodeText | None:
    """Return a document (T,) as text; None where its text does not give its ids again."""
    text = tokenizer.decode(ids[1:].tolist(), skip_special_tokens=False)
    encoding = tokenizer.encode(text, add_special_tokens=False)
    if encoding.ids != ids[1:].tolist():
        return None
    return CodeText(ids, text, np.array([(0, 0), *encoding.offsets], dtype=np.int64))


def references(text: str) -> Iterator[Reference]:
    """Yield every name whose first mention is its definition, and whose next one, on a later line, is code.

    So nothing between the two, be it a comment, repeats the name.
    """
    mentions: dict[str, list[int]] = {}
    for match in _WORD.finditer(text):
        mentions.setdefault(match[0], []).append(match.start())
    code = _names_in_code(text)
    for match in _DEFINITION.finditer(text):
        name, begin = match[1] or match[2], match.start(1) if match[1] else match.start(2)
        first, *later = mentions[name]
        if first == begin and later and later[0] in code and "\n" in text[begin : later[0]]:
            yield Reference(name, begin, later[0])


def _names_in_code(text: str) -> set[int]:
    """Return where names stand in the code of a Python text; nowhere where it is not Python."""
    lines = [0, *accumulate(len(line) + 1 for line in text.split("\n"))]
    try:
        tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    except (tokenize.TokenError, SyntaxError):
        return set()
    return {lines[token.start[0] - 1] + token.start[1] for token in tokens if token.type == tokenize.NAME}


def definition_cases(
    documents: Sequence[Ids], tokenizer: Any, lengths: Sequence[int], cases: int, seed: int
) -> list[Case]:
    """Return up to `cases` cases for each of `lengths`, the shortest that their distance does not exceed.

    A case's text ends with the reference and begins with its document, or max(lengths) tokens before its end. Without
    the definition means that another name of as many tokens, which the document does not have, is defined there.

    Args:
        documents: token ids (T,), opened by the separator. lengths: in tokens, rising.
        seed: of the sample, where there are more cases.
    """
    texts = [read_code(tokenizer, ids) for ids in documents]
    candidates = [
        (index, code, reference)
        for index, code in enumerate(texts)
        if code is not None
        for reference in references(code.text)
    ]
    names = sorted({reference.name for _, _, reference in candidates})
    random = np.random.default_rng(seed)
    chosen: dict[int, list[Case]] = {length: [] for length in lengths}
    for candidate in random.permutation(len(candidates)):
        index, code, reference = candidates[candidate]
        case = _case(index, code, reference, lengths)
        if case is None or len(chosen[case.length]) == cases:
            continue
        others = [names[other] for other in random.permutation(len(names))]
        if _rename(case, code, reference, others, tokenizer):
            chosen[case.length].append(case)
    return [case for length in lengths for case in chosen[length]]


def _case(document: int, code: CodeText, reference: Reference, lengths: Sequence[int]) -> Case | None:
    """Return a reference as a case, `without` not yet renamed; None where it is too far from its definition."""
    size = len(reference.name)
    evidence, _ = code.tokens_of(reference.defined, reference.defined + size)
    answer, end = code.tokens_of(reference.mentioned, reference.mentioned + size)
    begin = max(0, end - lengths[-1])
    if evidence <= begin:
        return None
    tokens = code.ids[begin:end].copy()
    tokens[0] = code.ids[0]
    length = next(length for length in lengths if answer - evidence <= length)
    return Case(CODE_DEFINITION, document, length, None, tokens, tokens.copy(), evidence - begin, answer - begin)


def _rename(case: Case, code: CodeText, reference: Reference, others: Sequence[str], tokenizer: Any) -> bool:
    """Define in `case.without` the first of `others` that keeps all other tokens in place; tell whether one does."""
    text, defined = code.text, reference.defined
    line_begin, line_end = text.rfind("\n", 0, defined) + 1, text.find("\n", defined)
    head, tail = text[line_begin:defined], text[defined + len(reference.name) : line_end]
    line = _ids(tokenizer, text[line_begin:line_end])
    line_token, name_token = code.tokens_of(line_begin, line_end)[0], code.tokens_of(defined, defined + 1)[0]
    begin = case.evidence - (name_token - line_token)
    if begin < 1 or case.tokens[begin : begin + len(line)].tolist() != line:
        return False
    for other in others:
        ids = _ids(tokenizer, head + other + tail)
        if len(ids) == len(line) and not re.search(rf"\b{other}\b", text):
            case.without[begin : begin + len(line)] = ids
            return True
    return False


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False).ids)
