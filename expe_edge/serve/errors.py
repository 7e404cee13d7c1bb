"""What a request is refused with, in OpenAI's shape."""

from __future__ import annotations

from typing import Any

from expe_edge.errors import NAMED, ExPEEdgeError, one_line

#: Fields by what the library calls them. A schema may come in two.
FIELDS = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_tokens": "stop_token_ids",
    "regex": "guided_regex",
    "grammar": "guided_grammar",
    "choices": "guided_choice",
}


class ApiError(Exception):
    """A refusal, or an end before the end.

    Args:
        status: of HTTP. message: one line. param: the field that it is about, which may be any text of a client's.
        code: what programs look at.
    """

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(one_line(message))
        self.status, self.code = status, code
        self.param = None if param is None else one_line(param)

    @property
    def kind(self) -> str:
        """OpenAI's `type`."""
        if self.status == 401:
            return "authentication_error"
        if self.status == 429:
            return "rate_limit_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"

    @property
    def body(self) -> dict[str, Any]:
        """What is answered, or sent as the last event of a stream."""
        return {"error": {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Headers that go with it."""
        if self.status == 401:
            return {"WWW-Authenticate": "Bearer"}
        return {"Retry-After": "1"} if self.status in (429, 503) else {}


def refusal_of(error: ExPEEdgeError) -> ApiError:
    """Return the refusal of a request that the library refuses, whose fields have OpenAI's names."""
    names = [FIELDS.get(name, name) for name in NAMED.findall(str(error))]
    message = NAMED.sub(lambda found: repr(FIELDS.get(found[1], found[1])), str(error))
    return ApiError(400, message, param=names[0] if names else None, code="invalid_value")
