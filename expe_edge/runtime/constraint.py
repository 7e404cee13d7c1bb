"""Text that must follow a JSON schema, a regular expression, a grammar or a choice, through llguidance.

What the grammar does not let follow is left out before a token is chosen. `pip install 'expe-edge[constrained]'` brings
the library, which is imported when a constraint is first used.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from expe_edge.errors import GenerationError, reason_of
from expe_edge.runtime.prompts import require_text
from expe_edge.runtime.streaming import BYTES

if TYPE_CHECKING:
    from tokenizers import Tokenizer

#: How JSON is written, unless the schema's `x-guidance` says otherwise: as Python writes it. White space that is free
#: could go on for ever.
JSON_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


@dataclass(frozen=True)
class Constraint:
    """What all of the new text must be: exactly one of these is given.

    Attributes:
        json_schema: JSON that is valid by this schema (its text, or its values), written as Python writes JSON.
        regex: a match of this regular expression, in the syntax of Rust's `regex`.
        grammar: a text of this grammar, in llguidance's form of Lark's syntax, from its rule `start`.
        choices: one of these texts.

    Raises:
        GenerationError: none of them or several, a schema that is no JSON, or an empty choice.
    """

    json_schema: str | Mapping[str, Any] | bool | None = None
    regex: str | None = None
    grammar: str | None = None
    choices: Sequence[str] = ()

    def __post_init__(self) -> None:
        given = self._given()
        if len(given) != 1:
            what = " and ".join(f"`{name}`" for name in given) or "nothing"
            raise GenerationError(
                f"a constraint is one of `json_schema`, `regex`, `grammar` and `choices`; given: {what}"
            )
        if isinstance(self.choices, str) or not all(self.choices):
            raise GenerationError("`choices` must be texts of one character or more")
        for text in filter(None, (self.regex, self.grammar, *self.choices)):
            require_text(f"`{given[0]}`", text)
        if given == ["json_schema"]:
            object.__setattr__(self, "json_schema", _schema_text(self.json_schema))

    def _given(self) -> list[str]:
        values = {"json_schema": self.json_schema, "regex": self.regex, "grammar": self.grammar}
        return [name for name, value in values.items() if value is not None] + ["choices"] * bool(self.choices)

    @property
    def name(self) -> str:
        """Which of the attributes is given."""
        return self._given()[0]

    def to_llguidance(self) -> str:
        """Return the grammar as llguidance takes it.

        Raises:
            GenerationError: a schema that it does not read.
        """
        from llguidance import LLMatcher

        if self.regex is not None:
            return str(LLMatcher.grammar_from_regex(self.regex))
        if isinstance(self.json_schema, str):
            try:
                return str(LLMatcher.grammar_from_json_schema(self.json_schema, defaults=JSON_STYLE))
            except ValueError as error:  # what is JSON to Python and not to it, such as numbers of 400 digits
                raise GenerationError(f"`json_schema`: {reason_of(error)}") from error
        if self.grammar is not None:
            return str(LLMatcher.grammar_from_lark(self.grammar))
        return str(LLMatcher.grammar_from_regex("|".join(map(_escaped, self.choices))))


class ByteTokens:
    """A byte-level tokenizer in the form that llguidance takes one: every token's bytes, and text to tokens.

    Text is text, here as for prompts: what spells a control token is not that token.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_of_text: int) -> None:
        self.tokenizer, self.eos_token_id, self.bos_token_id = tokenizer, end_of_text, None
        control = {end_of_text, *tokenizer.get_added_tokens_decoder()}
        names = [tokenizer.id_to_token(token) or "" for token in range(vocab_size)]
        self.special_token_ids = sorted(
            token for token, name in enumerate(names) if token in control or not BYTES.keys() >= set(name)
        )
        special = set(self.special_token_ids)
        self.tokens = [
            name.encode() if token in special else bytes(BYTES[character] for character in name)
            for token, name in enumerate(names)
        ]

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids


class Vocabulary:
    """A tokenizer as llguidance reads it, for all constraints on one model.

    Raises:
        GenerationError: llguidance is not installed, or the model has no end-of-text token.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, end_of_text: int | None) -> None:
        try:
            from llguidance import LLTokenizer, TokenizerWrapper
        except ModuleNotFoundError as error:
            raise GenerationError(
                "a constraint needs llguidance, which is not installed; pip install 'expe-edge[constrained]'"
            ) from error
        if end_of_text is None:
            raise GenerationError("a constraint needs a model with an end-of-text token; this one has none")
        self.size, self.end_of_text = vocab_size, end_of_text
        self.latest: tuple[Constraint, Matcher] | None = None
        self.tokenizer = LLTokenizer(TokenizerWrapper(ByteTokens(tokenizer, vocab_size, end_of_text)))

    def matcher(self, constraint: Constraint) -> Matcher:
        """Return what follows `constraint` from the text's beginning.

        Raises:
            GenerationError: a constraint that does not compile, or that no text can meet.
        """
        from llguidance import LLMatcher

        latest = self.latest  # other threads may replace it
        if latest is None or latest[0] != constraint:  # rows of one call come one after another
            matcher = Matcher(LLMatcher(self.tokenizer, constraint.to_llguidance(), log_level=0), constraint.name, self)
            matcher.allowed()
            latest = self.latest = constraint, matcher
        return latest[1].copy()


class Matcher:
    """Where one text stands in its grammar."""

    def __init__(self, matcher: Any, name: str, vocabulary: Vocabulary) -> None:
        self.matcher, self.name, self.vocabulary = matcher, name, vocabulary
        self.mask = np.zeros((1, -(-vocabulary.size // 32)), dtype=np.int32)
        self.bits = self.mask.view(np.uint8)[0]

    def copy(self) -> Matcher:
        """Return another that stands in the same place."""
        return Matcher(self.matcher.deep_copy(), self.name, self.vocabulary)

    @property
    def complete(self) -> bool:
        """Whether nothing but end-of-text may follow."""
        return bool(self.matcher.is_stopped())

    def allowed(self) -> npt.NDArray[np.int64]:
        """Return the ids of all tokens that may follow, (n,) int64, end-of-text among them where the text may end.

        Raises:
            GenerationError: none may.
        """
        self._require_no_error()
        self.matcher.unsafe_compute_mask_ptr(self.mask.ctypes.data, self.mask.nbytes)
        ids: npt.NDArray[np.int64] = np.unpackbits(self.bits, count=self.vocabulary.size, bitorder="little").nonzero()[
            0
        ]
        if len(ids) <= 1 and not self.matcher.is_accepting() and ids.tolist() in ([], [self.vocabulary.end_of_text]):
            raise GenerationError(f"`{self.name}`: no text of this vocabulary can meet it from here on")
        self._require_no_error()
        return ids

    def accept(self, token: int) -> None:
        """Go on by one of the tokens allowed."""
        self.matcher.consume_token(token)
        self._require_no_error()

    def _require_no_error(self) -> None:
        if self.matcher.is_error():
            reason = next(
                (line.strip() for line in self.matcher.get_error().splitlines() if line.strip()), "no reason given"
            )
            raise GenerationError(f"`{self.name}`: {reason_of(ValueError(reason))}")


def _escaped(text: str) -> str:
    """Return an expression that only `text` matches, whatever is in it."""
    return re.sub(r"[^A-Za-z0-9]", lambda found: f"\\u{{{ord(found[0]):x}}}", text)


def _schema_text(schema: object) -> str:
    try:
        values = json.loads(schema) if isinstance(schema, str) else schema
        text = json.dumps({} if values is True else values, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise GenerationError(f"`json_schema` is no JSON ({reason_of(error)})") from error
    if not isinstance(values, Mapping | bool):
        raise GenerationError("`json_schema` must be an object, true or false")
    return text
