"""The body of a request for completions: JSON to values, every field known and of its kind."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from expe_edge.errors import shown, unknown_name
from expe_edge.kinds import is_number
from expe_edge.runtime.prompts import Prompt
from expe_edge.serve.errors import ApiError

#: Takes a field's name and value, and returns what is made of it.
Reader = Callable[[str, Any], Any]
#: The most choices of one prompt, stop strings, and likeliest tokens that log probabilities are given of.
MOST_CHOICES, MOST_STOPS, MOST_LOGPROBS = 128, 16, 20
#: The most new tokens that anyone may ask for; the context is what holds them.
MOST_TOKENS = 2**31 - 1


def parse_json(body: bytes) -> dict[str, Any]:
    """Return the object that a body is.

    Raises:
        ApiError: anything else.
    """
    try:
        values = json.loads(body.decode("utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8 (byte {error.start})", code="invalid_json") from error
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not JSON ({error})"[:300], code="invalid_json") from error
    if not isinstance(values, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return values


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _refused(name: str, value: object, allowed: str) -> ApiError:
    return ApiError(400, f"{name!r} is {shown(value)}; it must be {allowed}", param=name, code="invalid_type")


def text(name: str, value: Any) -> str:
    """Read text."""
    if not isinstance(value, str):
        raise _refused(name, value, "text")
    return value


def flag(name: str, value: Any) -> bool:
    """Read true or false."""
    if type(value) is not bool:
        raise _refused(name, value, "true or false")
    return value


def number(name: str, value: Any) -> float:
    """Read a number; its range is for the library to say."""
    if not is_number(value):
        raise _refused(name, value, "a number")
    return float(value)


def whole(least: int, most: int) -> Reader:
    """Return a reader of whole numbers from `least` to `most`."""

    def read(name: str, value: Any) -> int:
        if type(value) is not int or not least <= value <= most:
            raise _refused(name, value, f"a whole number from {least} to {most}")
        return value

    return read


def _is_ids(value: Any) -> bool:
    return isinstance(value, list) and all(type(token) is int for token in value)


def prompts(name: str, value: Any) -> list[Prompt]:
    """Read text, texts, token ids, or several of these."""
    if isinstance(value, str) or (value and _is_ids(value)):
        return [value]
    is_list = isinstance(value, list) and bool(value)
    if is_list and (all(isinstance(one, str) for one in value) or all(map(_is_ids, value))):
        return list(value)
    raise _refused(name, value, "text, token ids, or a list of one of these")


def stops(name: str, value: Any) -> tuple[str, ...]:
    """Read texts that end a completion."""
    values = [value] if isinstance(value, str) else value
    held = isinstance(values, list) and len(values) <= MOST_STOPS
    if not held or not all(isinstance(one, str) and one for one in values):
        raise _refused(name, value, f"text of one character or more, or a list of {MOST_STOPS} such at most")
    return tuple(values)


def tokens(name: str, value: Any) -> tuple[int, ...]:
    """Read token ids."""
    if not _is_ids(value):
        raise _refused(name, value, "a list of token ids")
    return tuple(value)


def biases(name: str, value: Any) -> dict[int, float]:
    """Read biases of tokens by their ids, which JSON has as text."""
    allowed = "an object of numbers from -100 to 100 by token ids"
    if not isinstance(value, dict):
        raise _refused(name, value, allowed)
    for token, bias in value.items():
        # `isdecimal` takes other scripts' digits too, which `int` reads; 18 digits are no token's
        if not (token.isdecimal() and len(token) < 18 and is_number(bias) and abs(bias) <= 100):
            raise _refused(name, {token: bias}, allowed)
    return {int(token): float(bias) for token, bias in value.items()}


def texts(name: str, value: Any) -> tuple[str, ...]:
    """Read a list of texts."""
    if not isinstance(value, list) or not value or not all(isinstance(one, str) and one for one in value):
        raise _refused(name, value, "a list of texts of one character or more")
    return tuple(value)


def schema(name: str, value: Any) -> Any:
    """Read a JSON schema."""
    if not isinstance(value, dict | bool | str):
        raise _refused(name, value, "a JSON schema")
    return value


def response_format(name: str, value: Any) -> Any:
    """Read OpenAI's form of a schema; None for free text."""
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    described = value.get("json_schema") if kind == "json_schema" else None
    if isinstance(described, dict) and isinstance(described.get("schema"), dict):
        return described["schema"]
    raise _refused(name, value, "of 'type' text, json_object, or json_schema with a 'json_schema' that has a 'schema'")


def usage_wanted(name: str, value: Any) -> bool:
    """Read `stream_options`: whether a last event tells the usage."""
    if not isinstance(value, dict) or not value.keys() <= {"include_usage"}:
        raise _refused(name, value, "an object with 'include_usage' alone")
    return flag("include_usage", value.get("include_usage", False))


def refused(reason: str) -> Reader:
    """Return a reader of a field that is known and not served."""

    def read(name: str, _: Any) -> None:
        raise ApiError(400, f"{name!r} {reason}", param=name, code="unsupported_parameter")

    return read


#: Settings of `Sampling`, by OpenAI's names or, where it has none, our own.
SAMPLING: Mapping[str, Reader] = {
    "temperature": number,
    "top_p": number,
    "frequency_penalty": number,
    "presence_penalty": number,
    "logit_bias": biases,
    "seed": whole(0, 2**63 - 1),
    "top_k": whole(0, sys.maxsize),
    "min_p": number,
    "typical_p": number,
    "repetition_penalty": number,
    "mirostat_tau": number,
    "mirostat_eta": number,
}
#: Constraints by the names that other servers have for them, and the field of `Constraint`.
CONSTRAINTS: Mapping[str, tuple[str, Reader]] = {
    "response_format": ("json_schema", response_format),
    "guided_json": ("json_schema", schema),
    "guided_regex": ("regex", text),
    "guided_grammar": ("grammar", text),
    "guided_choice": ("choices", texts),
}
FIELDS: Mapping[str, Reader] = {
    "model": text,
    "prompt": prompts,
    "max_tokens": whole(0, MOST_TOKENS),
    "min_tokens": whole(0, MOST_TOKENS),
    "n": whole(1, MOST_CHOICES),
    "best_of": whole(1, MOST_CHOICES),
    "echo": flag,
    "logprobs": whole(0, MOST_LOGPROBS),
    "stop": stops,
    "stop_token_ids": tokens,
    "stream": flag,
    "stream_options": usage_wanted,
    "user": text,
    "suffix": refused("is not served: the models continue text and fill no gaps; leave it out"),
    **SAMPLING,
    **{name: reader for name, (_, reader) in CONSTRAINTS.items()},
}


@dataclass(frozen=True)
class CompletionBody:
    """What is asked for. Fields are OpenAI's; those of `sampling` and `constraint` are of the runtime's classes."""

    prompts: list[Prompt]
    model: str | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    n: int = 1
    echo: bool = False
    logprobs: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    stream: bool = False
    include_usage: bool = False
    sampling: dict[str, Any] = field(default_factory=dict)
    constraint: dict[str, Any] = field(default_factory=dict)


def read_completion(body: bytes) -> CompletionBody:
    """Read the body of a request; fields that are null are as good as absent.

    Raises:
        ApiError: not JSON, an unknown field, one of another kind or out of range, or some at odds with each other.
    """
    given = {name: value for name, value in parse_json(body).items() if value is not None}
    for name in given.keys() - FIELDS.keys():
        raise ApiError(400, unknown_name("field", name, FIELDS), param=name[:100], code="unknown_parameter")
    values = {name: FIELDS[name](name, value) for name, value in given.items()}
    if "prompt" not in values:
        raise ApiError(400, "'prompt' is missing", param="prompt", code="missing_required_parameter")
    if values.pop("best_of", values.get("n", 1)) != values.get("n", 1):
        raise ApiError(400, "'best_of' must be 'n', or be left out", param="best_of", code="unsupported_parameter")
    if "stream_options" in values and not values.get("stream"):
        raise ApiError(400, "'stream_options' need 'stream'", param="stream_options", code="invalid_value")
    values.pop("user", None)
    constraints = {name: values.pop(name) for name in CONSTRAINTS if name in values}
    given_constraints = {name: value for name, value in constraints.items() if value is not None}
    if len(given_constraints) > 1:
        names = " and ".join(map(repr, given_constraints))
        raise ApiError(400, f"{names} are both given; use one", param=next(iter(given_constraints)))
    return CompletionBody(
        prompts=values.pop("prompt"),
        include_usage=values.pop("stream_options", False),
        sampling={name: values.pop(name) for name in SAMPLING if name in values},
        constraint={CONSTRAINTS[name][0]: value for name, value in given_constraints.items()},
        **values,
    )
