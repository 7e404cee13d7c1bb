"""From the body of a request to the rows that answer it."""

from __future__ import annotations

from expe_edge.errors import ExPEEdgeError
from expe_edge.runtime import Constraint, Generator, Request, Sampling
from expe_edge.runtime.prompts import Prompt
from expe_edge.runtime.streaming import TextStream
from expe_edge.serve.answers import Choice
from expe_edge.serve.errors import ApiError, refusal_of
from expe_edge.serve.fields import CompletionBody
from expe_edge.serve.settings import ServerSettings

#: New tokens where nobody says how many, as OpenAI's.
NEW_TOKENS = 16


def longest_token(generator: Generator) -> int:
    """Return how many bytes the vocabulary's longest token stands for."""
    text = TextStream(generator.tokenizer)
    return max(len(text.token_bytes(token)) for token in range(generator.session.contract.vocab_size))


def make_choices(generator: Generator, body: CompletionBody, settings: ServerSettings, longest: int) -> list[Choice]:
    """Return the choices of an answer: `n` of the first prompt, of the second and so on; choice i draws with seed + i.

    longest: bytes of a token at most. Text that must have more tokens than a context holds is not encoded, which would
        take time and memory.

    Raises:
        ApiError: what the library refuses, or a prompt and completion that no context or queue holds.
    """
    count = len(body.prompts) * body.n
    if count > settings.queue:
        raise ApiError(
            400, f"{count} completions are more than the {settings.queue} that may wait; ask for fewer", param="prompt"
        )
    try:
        return [
            choice
            for number, prompt in enumerate(body.prompts)
            for choice in _choices_of(generator, prompt, number * body.n, body, settings.context, longest)
        ]
    except ExPEEdgeError as error:
        raise refusal_of(error) from error


def _choices_of(
    generator: Generator, prompt: Prompt, begin: int, body: CompletionBody, context: int, longest: int
) -> list[Choice]:
    least = len(prompt) // longest if isinstance(prompt, str) else len(prompt)
    if least > context:
        raise _too_long(f"the prompt has {least} or more", context)
    ids = generator.encode(prompt)
    request = _request(body, _new_tokens(len(ids), body.max_tokens, context))
    echo = None
    if body.echo:
        echo = prompt if isinstance(prompt, str) else str(generator.tokenizer.decode(ids.tolist()))
    rows = [generator.row(ids, request, index=index) for index in range(begin, begin + body.n)]
    return [Choice(row, row.index, body, echo) for row in rows]


def _new_tokens(prompt: int, wanted: int | None, context: int) -> int:
    """Return how many tokens may follow a prompt of so many; one at least, which is not shown where none is wanted."""
    new = min(NEW_TOKENS, max(1, context - prompt)) if wanted is None else wanted
    if prompt + new > context:
        raise _too_long(f"the prompt has {prompt} and {new} are to follow", context)
    return max(1, new)


def _too_long(what: str, context: int) -> ApiError:
    message = f"this server's contexts hold {context} tokens, but {what}; shorten the prompt or lower 'max_tokens'"
    return ApiError(400, message, param="prompt", code="context_length_exceeded")


def _request(body: CompletionBody, new_tokens: int) -> Request:
    return Request(
        sampling=Sampling(**{"temperature": 1.0, **body.sampling}),
        max_new_tokens=new_tokens,
        min_new_tokens=body.min_tokens,
        stop=body.stop,
        stop_tokens=body.stop_token_ids,
        constraint=Constraint(**body.constraint) if body.constraint else None,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
    )
