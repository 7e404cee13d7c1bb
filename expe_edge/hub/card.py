"""A package's model card, README.md: metadata that the Hub reads, what loading takes, and quality by length.

Format: https://huggingface.co/docs/hub/model-cards. The card is no part of what the manifest hashes, so that it may be
edited; `update_quality` replaces its figures alone and leaves all else as it is.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from expe_edge.errors import ConfigError, ExportError, PackageError, reason_of
from expe_edge.hub.usage import usage
from expe_edge.package.directory import CARD_FILE, Package, why_unwritable
from expe_edge.package.manifest import Manifest

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

#: What the Hub and its users know such packages by.
LIBRARY, TASK = "expe-edge", "text-generation"
TAGS = ("onnx", "onnxruntime", "expe", "length-extrapolation")
#: The names by which the command line asks for the standard library's source as text.
STDLIB = ("python-stdlib", "python-stdlib+tests")
#: A licence by its identifier, as the Hub has them; a model or data set of the Hub.
IDENTIFIER, REPOSITORY = re.compile(r"[a-z0-9][a-z0-9.+-]*"), re.compile(r"[\w.-]+/[\w.-]+")
#: What figures stand between in the card.
BEGIN, END = "<!-- quality -->", "<!-- /quality -->"


@dataclass(frozen=True)
class CardOptions:
    """What only the one who publishes a package can say.

    license: the identifier of the licence of its weights, as the Hub lists them. base_model: the repository of the
    model that it was made from, `OWNER/NAME`. language: of its text, as ISO 639 has them, or `code`.

    Raises:
        ExportError: no such identifier or name.
    """

    license: str | None = None
    base_model: str | None = None
    language: str | None = None

    def __post_init__(self) -> None:
        if self.license is not None and IDENTIFIER.fullmatch(self.license) is None:
            raise ExportError(
                f"`license` is {self.license!r}; expected an identifier in small letters, as apache-2.0, mit or other"
            )
        if self.base_model is not None and REPOSITORY.fullmatch(self.base_model) is None:
            raise ExportError(f"`base_model` is {self.base_model!r}; expected a repository of the Hub, as OWNER/NAME")


@dataclass(frozen=True)
class LengthQuality:
    """Quality on the tokens at positions [start, end) of text.

    kl: divergence to a reference in nats per token; None for the reference itself.
    """

    start: int
    end: int
    perplexity: float
    kl: float | None = None


@dataclass(frozen=True)
class Quality:
    """Quality by length. text: what it was measured on. reference: what the divergence is to, or None."""

    text: str
    reference: str | None
    rows: Sequence[LengthQuality]


def write_card(directory: Path, name: str, manifest: Manifest, quality: Quality, options: CardOptions) -> None:
    """Write the card of a new package. name: of the model, in the metadata."""
    card = _new_card(name, manifest, options)
    _put(card, quality, manifest.training_length)
    (directory / CARD_FILE).write_text(str(card), encoding="utf-8")


def update_quality(package: Package, quality: Quality) -> None:
    """Put new figures into the card of a package, which is made where there is none.

    Raises:
        ConfigError, PackageError: of `require_editable_card`.
    """
    card = _read_card(package.path) or _new_card(package.path.name, package.manifest, CardOptions())
    _put(card, quality, package.manifest.training_length)
    (package.path / CARD_FILE).write_text(str(card), encoding="utf-8")


def require_editable_card(directory: Path) -> None:
    """Raise for a card that `update_quality` could not change.

    Raises:
        ConfigError: it is a link, as in the Hub's cache, or cannot be written. PackageError: its metadata cannot be
            read.
    """
    path = directory / CARD_FILE
    if path.is_symlink():
        raise ConfigError(
            f"{path} is a link into a cache, which must stay as it is; copy the package and give the copy"
        )
    refused = why_unwritable(directory)
    if refused is not None:
        raise ConfigError(f"{refused}; copy the package and give the copy")
    _read_card(directory)


def _read_card(directory: Path) -> ModelCard | None:
    """Return the card of a package, None where there is none."""
    from huggingface_hub import ModelCard

    path = directory / CARD_FILE
    if not path.is_file():
        return None
    try:
        return ModelCard(path.read_text(encoding="utf-8"))
    except Exception as error:  # what YAML raises and what the metadata's checks raise share no narrower base
        raise PackageError(f"{path}: its metadata cannot be read ({reason_of(error)}); mend or remove it") from error


def _new_card(name: str, manifest: Manifest, options: CardOptions) -> ModelCard:
    from huggingface_hub import ModelCard, ModelCardData

    sources = manifest.corpus["sources"]  # none for the standard library's
    data = ModelCardData(
        library_name=LIBRARY,
        pipeline_tag=TASK,
        tags=[*TAGS, manifest.precision],
        license=options.license,
        language=options.language or ("code" if set(sources) <= set(STDLIB) else None),
        datasets=[source for source in sources if _is_data_set(source)] or None,
        base_model=options.base_model,
        model_name=name,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(manifest, options)}")


def _is_data_set(source: str) -> bool:
    """Tell whether text came from a data set of the Hub: paths are absolute where they are recorded, or name a file."""
    name = source.partition(":")[0]
    return REPOSITORY.fullmatch(name) is not None and not Path(name).suffix


def _text(manifest: Manifest, options: CardOptions) -> str:
    model = manifest.model
    licensed = (
        f"Of the weights: `{options.license}`, as whoever exported the package says."
        if options.license
        else "None is stated. Whoever publishes the weights chooses it: add `license` to the metadata above."
    )
    return f"""# A small language model that reads past its training length

{model["num_hidden_layers"]} layers of {model["hidden_size"]}, {model["vocab_size"]} tokens, with positions of the \
kind `{model["positional"]}`; trained on texts of {manifest.training_length} tokens and exact up to \
{model["max_position_embeddings"]:,}. Linears are {manifest.precision}, the key/value cache is \
{manifest.contract.cache_dtype}. `expe_edge.json` says the rest, with the hash of every file but this one.

{usage(manifest)}

## Quality by length

{BEGIN}
{END}

## Licence

{licensed}
"""


def _put(card: ModelCard, quality: Quality, training_length: int) -> None:
    """Replace a card's figures, in its metadata and in its text, which gets a place for them where it has none."""
    data = cast("ModelCardData", card.data)
    data.model_name = data.model_name or "model"
    data.eval_results = _results(quality, training_length)
    figures = f"{BEGIN}\n{_table(quality, training_length)}\n{END}"
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
    text = card.text
    if pattern.search(text) is None:
        card.text = f"{text.rstrip()}\n\n## Quality by length\n\n{figures}\n"
    else:
        card.text = pattern.sub(lambda _: figures, text, count=1)


def _results(quality: Quality, training_length: int) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    def result(row: LengthQuality, metric: str, name: str, value: float) -> Any:
        return EvalResult(
            task_type=TASK,
            dataset_type="text",
            dataset_name=quality.text,
            dataset_config=f"positions {_lengths(row, training_length)}",
            metric_type=metric,
            metric_name=name,
            metric_value=value,
        )

    results = [result(row, "perplexity", "perplexity of a token", round(row.perplexity, 4)) for row in quality.rows]
    results += [
        result(row, "kl_divergence", f"KL divergence to {quality.reference}, nats per token", float(f"{row.kl:.3g}"))
        for row in quality.rows
        if row.kl is not None
    ]
    return results


def _table(quality: Quality, training_length: int) -> str:
    def line(name: str, cells: Sequence[str]) -> str:
        return "| " + " | ".join([name, *cells]) + " |"

    rows = [
        line("position", [_lengths(row, training_length) for row in quality.rows]),
        "|---" * (len(quality.rows) + 1) + "|",
        line("perplexity of a token", [f"{row.perplexity:.2f}" for row in quality.rows]),
    ]
    if quality.reference is not None:
        cells = ["" if row.kl is None else f"{row.kl:.2g}" for row in quality.rows]
        rows.append(line(f"KL divergence to {quality.reference}, nats per token", cells))
    return "\n".join([*rows, "", f"N is {training_length} tokens, the training length. Measured on {quality.text}."])


def _lengths(row: LengthQuality, training_length: int) -> str:
    return f"{row.start / training_length:g}–{row.end / training_length:g} N"
