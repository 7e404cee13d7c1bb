"""Does a model use far text? All probes over the same held-out documents, for several models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from expe_edge.errors import ConfigError, CorpusError
from expe_edge.kinds import require_choice
from expe_edge.progress import counted, note
from expe_edge.quality.comparison import long_documents, require_rising, require_same_vocabulary
from expe_edge.quality.context_use import ContextUse, context_use, near_tokens, require_far
from expe_edge.quality.definitions import CODE_DEFINITION, definition_cases
from expe_edge.quality.loss_by_position import PositionLoss, loss_by_position
from expe_edge.quality.losses import Panel, document_losses
from expe_edge.quality.needles import COPIED, CUE, PUZZLES
from expe_edge.quality.recall import DEPTHS, Grid, Recall, needle_cases, recall
from expe_edge.quality.scoring import Ids, Scorer
from expe_edge.results import Result
from expe_edge.text.tokenization import load_tokenizer

CONTEXT_USE = "context-use"
LOSS_BY_POSITION = "loss-by-position"
#: Every probe by its name.
PROBES = (CONTEXT_USE, LOSS_BY_POSITION, *PUZZLES, CODE_DEFINITION)


@dataclass(frozen=True)
class ProbeSettings:
    """What is probed.

    lengths: in units of N, rising. documents: most to read. probes: of `PROBES`. depths: of needles, from 0 to 1.
    cases: for each cell of recall. seed: of numbers, names and samples. near: what context use compares the whole text
    with, the last so many N tokens.

    Raises:
        ConfigError: a value that is out of range, an unknown probe, or none.
    """

    lengths: tuple[int, ...] = (1, 2, 4, 8, 16)
    documents: int = 8
    probes: tuple[str, ...] = PROBES
    depths: tuple[float, ...] = DEPTHS
    cases: int = 4
    seed: int = 0
    near: int = 1

    def __post_init__(self) -> None:
        require_rising(self.lengths)
        for name in ("documents", "cases"):
            if getattr(self, name) < 1:
                raise ConfigError(f"`{name}` is {getattr(self, name)}; at least 1")
        if self.seed < 0:
            raise ConfigError(f"`seed` is {self.seed}; at least 0")
        if not self.probes:
            raise ConfigError(f"no `probe` is chosen; available: {', '.join(PROBES)}")
        for probe in self.probes:
            require_choice("`probe`", probe, PROBES)
        if CONTEXT_USE in self.probes:
            require_far(self.lengths, self.near)
        self.grid(1)

    def grid(self, training_length: int) -> Grid:
        """Return the cells of recall in filler text, their lengths in tokens."""
        probes = tuple(probe for probe in PUZZLES if probe in self.probes)
        return Grid(probes, tuple(n * training_length for n in self.lengths), self.depths, self.cases, self.seed)


@dataclass(frozen=True)
class ProbeReport(Result):
    """Results of every model; what was not chosen is empty."""

    models: tuple[str, ...]
    training_length: int
    lengths: tuple[int, ...]
    seed: int
    context_use: tuple[ContextUse, ...] = ()
    recall: tuple[Recall, ...] = ()
    loss_by_position: tuple[PositionLoss, ...] = ()


def probe(
    scorers: Sequence[Scorer],
    settings: ProbeSettings,
    *,
    sources: Sequence[str] = (),
    text_field: str = "text",
    at_once: int = 1,
) -> ProbeReport:
    """Probe models with a sample of the first one's held-out documents, or of `sources`, with progress bars.

    Args:
        scorers: models of one vocabulary. Lengths are in units of the first one's N.
        sources, text_field: as for `corpus.load_corpus`. at_once: models that are computed side by side.

    Raises:
        ConfigError: a model given twice, models of different tokenizers. CorpusError: text that is too short, or has no
            cases of the only probe.
    """
    panel = Panel(scorers, at_once)
    require_same_vocabulary(scorers)
    longest = settings.lengths[-1] * panel.training_length
    documents, _ = long_documents(scorers[0], sources, text_field, longest + CUE + COPIED, settings.documents)
    use, positions = _from_losses(panel, documents, settings)
    recalled = _recall(panel, documents, settings)
    return ProbeReport(
        tuple(panel.names), panel.training_length, settings.lengths, settings.seed, use, recalled, positions
    )


def _from_losses(
    panel: Panel, documents: Sequence[Ids], settings: ProbeSettings
) -> tuple[tuple[ContextUse, ...], tuple[PositionLoss, ...]]:
    """Measure what is made of the losses of whole documents: context use and loss by position, as chosen."""
    if not {CONTEXT_USE, LOSS_BY_POSITION} & set(settings.probes):
        return (), ()
    longest = settings.lengths[-1] * panel.training_length
    with counted("scoring whole documents", len(documents) * longest) as advance:
        losses = document_losses(panel, documents, longest, advance)
    positions = loss_by_position(panel.names, losses) if LOSS_BY_POSITION in settings.probes else ()
    if CONTEXT_USE not in settings.probes:
        return (), positions
    near = len(documents) * near_tokens(settings.lengths, settings.near, panel.training_length)
    with counted("scoring without far text", near) as advance:
        return context_use(panel, documents, losses, settings.lengths, settings.near, advance), positions


def _recall(panel: Panel, documents: Sequence[Ids], settings: ProbeSettings) -> tuple[Recall, ...]:
    """Put the chosen probes' cases to every model."""
    tokenizer, grid = load_tokenizer(panel.scorers[0].path), settings.grid(panel.training_length)
    results: tuple[Recall, ...] = ()
    if grid.probes:
        with counted("asking for needles", grid.tokens) as advance:
            results = recall(panel, needle_cases(grid, documents, tokenizer, advance), advance)
    if CODE_DEFINITION not in settings.probes:
        return results
    cases = definition_cases(documents, tokenizer, grid.lengths, settings.cases, settings.seed)
    if not cases:
        missing = (
            f"{CODE_DEFINITION}: the text has no name that is defined and referred to within {grid.lengths[-1]} tokens"
        )
        if settings.probes == (CODE_DEFINITION,):
            raise CorpusError(f"{missing}; give Python code with `sources`, or raise `lengths`")
        note(missing)
        return results
    with counted("asking for definitions", sum(2 * len(case.tokens) for case in cases)) as advance:
        return results + recall(panel, cases, advance)
