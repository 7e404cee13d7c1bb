"""The options of `generate` that say how tokens are chosen and what the text must be."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from expe_edge.cli.output import PATH, Command
from expe_edge.cli.prompt import text_of
from expe_edge.errors import GenerationError

if TYPE_CHECKING:
    from expe_edge.runtime import Constraint

SAMPLING = (
    click.option("--temperature", default=0.0, show_default=True, help="0 is greedy."),
    click.option("--top-k", default=0, show_default=True, help="Keep the k best tokens; 0 for all."),
    click.option("--top-p", default=1.0, show_default=True, help="Keep the fewest tokens that reach this probability."),
    click.option(
        "--min-p", default=0.0, show_default=True, help="Keep tokens at least this times as likely as the best."
    ),
    click.option(
        "--typical-p",
        default=1.0,
        show_default=True,
        help="Keep the fewest tokens, nearest to the entropy, that reach this probability.",
    ),
    click.option(
        "--mirostat-tau",
        default=0.0,
        show_default=True,
        help="Hold this surprise, in bits a token, by Mirostat 2 in place of the four filters; 0 for none.",
    ),
    click.option("--mirostat-eta", default=0.1, show_default=True, help="How fast Mirostat follows."),
    click.option("--repetition-penalty", default=1.0, show_default=True, help="1 is none."),
    click.option(
        "--frequency-penalty",
        default=0.0,
        show_default=True,
        help="Take this from a token's score for each time that it has been generated.",
    ),
    click.option(
        "--presence-penalty",
        default=0.0,
        show_default=True,
        help="Take this once from the score of every token that has been generated.",
    ),
    click.option("--logit-bias", multiple=True, metavar="ID=BIAS", help="Add this to a token's logit; repeatable."),
    click.option("--seed", type=int, help="Makes sampling repeatable."),
)
CONSTRAINT = (
    click.option("--json-schema", metavar="FILE|TEXT", help="Write JSON that is valid by this schema."),
    click.option("--regex", metavar="EXPRESSION", help="Write a match of this expression."),
    click.option("--grammar", type=PATH, metavar="FILE", help="Write a text of this grammar, in Lark's syntax."),
    click.option(
        "--choice", "choices", multiple=True, metavar="TEXT", help="Write one of the texts so given; repeatable."
    ),
)


def sampling_options(command: Command) -> Command:
    """Give a command all of these options."""
    for option in reversed((*SAMPLING, *CONSTRAINT)):
        command = option(command)
    return command


def biases(given: tuple[str, ...]) -> dict[int, float]:
    """Return what `--logit-bias` says, by token id.

    Raises:
        GenerationError: a text that is no id and number.
    """
    found: dict[int, float] = {}
    for text in given:
        token, _, bias = text.partition("=")
        try:
            found[int(token)] = float(bias)
        except ValueError as error:
            raise GenerationError(f"--logit-bias {text!r}: expected ID=BIAS, as 42=-100") from error
    return found


def constraint_of(
    json_schema: str | None, regex: str | None, grammar: Path | None, choices: tuple[str, ...]
) -> Constraint | None:
    """Return what the text must be; None where it may be any.

    Raises:
        GenerationError: several of them, or one that is none.
    """
    from expe_edge.runtime import Constraint

    if json_schema is None and regex is None and grammar is None and not choices:
        return None
    if json_schema is not None and not json_schema.lstrip().startswith("{") and json_schema not in ("true", "false"):
        json_schema = text_of("--json-schema", Path(json_schema))
    rules = None if grammar is None else text_of("--grammar", grammar)
    return Constraint(json_schema=json_schema, regex=regex, grammar=rules, choices=choices)
