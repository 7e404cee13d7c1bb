"""What a study is asked to do: from its YAML file to variants, and from these to runs.

Imports neither torch nor transformers, so that the workers of a study begin at once.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expe_edge.errors import ConfigError
from expe_edge.kinds import require_choice, require_kind, require_kinds
from expe_edge.training.settings import LARGEST_SEED, TrainSettings, make_settings, read_yaml

if TYPE_CHECKING:
    from expe_edge.quality.probing import ProbeSettings

PARAMETERS = "positional_parameters"
#: Keys of `probes`, which mean what the options of `expe-edge probe` do, and the kinds of their values.
PROBE_KEYS = {
    "names": "tuple[str, ...]",
    "near": "int",
    "lengths": "tuple[int, ...]",
    "depths": "tuple[int, ...]",
    "documents": "int",
    "cases": "int",
    "seed": "int",
}


@dataclass(frozen=True)
class Variant:
    """A way to train: settings that differ from the study's.

    directory: name of its runs on disk, without their seeds. base: what it is derived from, if by an ablation.
    """

    name: str
    settings: Mapping[str, Any]
    directory: str
    base: str | None = None


@dataclass(frozen=True)
class Run:
    """A variant with a seed: the name of its directory, and its settings."""

    name: str
    settings: TrainSettings


@dataclass(frozen=True)
class Study:
    """The content of a study file, checked; docs/reproduce.md says what each key means.

    Raises:
        ConfigError: a value of another kind or out of range, an unknown name, a variant that cannot be.
    """

    variants: Mapping[str, Any]
    against: str
    title: str = "A study"
    about: str = ""
    preset: str = "tiny"
    settings: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    lengths: tuple[int, ...] = (1, 2, 4, 8, 16)
    documents: int = 12
    data: tuple[str, ...] = ()
    ablations: Mapping[str, Any] = field(default_factory=dict)
    probes: Mapping[str, Any] | None = None
    cost: bool = False

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            object.__setattr__(self, each.name, _as_tuple(getattr(self, each.name), str(each.type)))
        require_kinds(self, "; change {name} in the study")
        if self.documents < 1:
            raise ConfigError(f"documents is {self.documents}; at least 1")
        if not self.lengths or any(b <= a for a, b in itertools.pairwise((0, *self.lengths))):
            raise ConfigError(f"lengths is {list(self.lengths)}; expected rising positive integers, as [1, 2, 4]")
        if len({seed for seed in self.seeds if 0 <= seed <= LARGEST_SEED}) < max(len(self.seeds), 1):
            raise ConfigError(f"seeds is {list(self.seeds)}; expected different whole numbers from 0 to {LARGEST_SEED}")
        require_known("variant in against", [self.against], self.variants)
        require_known("variant in ablations", self.ablations, self.variants)
        for key, value in (self.probes or {}).items():
            require_known("key of probes", [key], PROBE_KEYS)
            require_kind(f"{key} of probes", _as_tuple(value, PROBE_KEYS[key]), PROBE_KEYS[key])
        own = [variant for variant in self.all_variants if variant.directory == directory_of(variant.name)]
        for first, second in itertools.combinations(own, 2):
            if first.directory == second.directory:
                raise ConfigError(
                    f"variants {first.name!r} and {second.name!r} would both be kept as {first.directory}; rename one"
                )

    @cached_property
    def named_variants(self) -> tuple[Variant, ...]:
        """Those that the file names."""
        return tuple(
            Variant(name, _mapping(f"variant {name!r}", values), directory_of(name))
            for name, values in self.variants.items()
        )

    @cached_property
    def all_variants(self) -> tuple[Variant, ...]:
        """The named variants, then those of the ablations; one that equals its base shares the base's runs."""
        derived = (variant for base in self.named_variants for variant in self._derived(base))
        return (*self.named_variants, *derived)

    def _derived(self, base: Variant) -> Iterator[Variant]:
        """Yield the variants of a base's ablations: every combination of the values of each grid."""
        grids = self.ablations.get(base.name, ())
        for grid in grids if isinstance(grids, list | tuple) else [grids]:
            axes = list(_axes(f"ablations of {base.name!r}", grid))
            for values in itertools.product(*(choices for _, choices in axes)):
                named = [(key, value) for (key, _), value in zip(axes, values, strict=True)]
                name = ", ".join((base.name, *(f"{key[-1]}={value}" for key, value in named)))
                changed = {key[0]: value for key, value in named if len(key) == 1}
                parameters = {key[1]: value for key, value in named if len(key) > 1}
                if parameters:
                    given = {**self.settings, **base.settings}.get(PARAMETERS)
                    changed[PARAMETERS] = {**_mapping(PARAMETERS, given), **parameters}
                variant = Variant(name, {**base.settings, **changed}, directory_of(name), base.name)
                same = _meaning(self.settings_of(variant, 0)) == _meaning(self.settings_of(base, 0))
                yield dataclasses.replace(variant, directory=base.directory) if same else variant

    @property
    def training_length(self) -> int:
        """N of the variant that differences are taken to, in which lengths are given."""
        (variant,) = (variant for variant in self.named_variants if variant.name == self.against)
        return self.settings_of(variant, 0).training_length

    def settings_of(self, variant: Variant, seed: int) -> TrainSettings:
        """Return the settings of a variant's run, from the preset on.

        Raises:
            ConfigError: an unknown setting or a bad value, after the name of the variant.
        """
        try:
            merged = {**self.settings, **variant.settings}
            if "seed" in merged:
                raise ConfigError("seed is no setting of a study; give seeds")
            return make_settings(self.preset, flags={**merged, "seed": seed})
        except ConfigError as error:
            raise ConfigError(f"variant {variant.name!r}: {error}") from error

    def run(self, variant: Variant, seed: int) -> Run:
        """Return the run of a variant with a seed."""
        return Run(f"{variant.directory}-seed{seed}", self.settings_of(variant, seed))

    @cached_property
    def runs(self) -> tuple[Run, ...]:
        """All runs, each once, the first seed of every variant before the second of any."""
        runs = (self.run(variant, seed) for seed in self.seeds for variant in self.all_variants)
        return tuple({run.name: run for run in runs}.values())

    @cached_property
    def probe_settings(self) -> ProbeSettings | None:
        """What is probed of every run, if anything.

        Raises:
            ConfigError: as `ProbeSettings`.
        """
        if self.probes is None:
            return None
        from expe_edge.quality.probing import ProbeSettings

        values = {key: _as_tuple(value, PROBE_KEYS[key]) for key, value in self.probes.items()}
        if "names" in values:
            values["probes"] = values.pop("names")
        if "depths" in values:
            values["depths"] = tuple(percent / 100 for percent in values["depths"])
        return ProbeSettings(**values)


def read_study(path: Path) -> Study:
    """Read and check a study file.

    Raises:
        ConfigError: it is not YAML, has an unknown key (the nearest is named) or lacks one, or `Study` refuses it.
    """
    values = read_yaml(path, "study")
    require_known("key of a study", values, [each.name for each in dataclasses.fields(Study)])
    missing = [name for name in ("variants", "against") if name not in values]
    if missing:
        raise ConfigError(f"study {path}: {missing[0]} is missing")
    study = Study(**values)
    _ = study.runs, study.probe_settings  # made here so that what they refuse is refused before any work
    return study


def require_known(kind: str, names: Iterable[str], known: Collection[str]) -> None:
    """Raise `ConfigError` at the first of `names` that is not known; the nearest is named."""
    for name in names:
        require_choice(kind, name, tuple(known))


def directory_of(variant: str) -> str:
    """Return what the runs of a variant are called on disk: those of `expe, paper` are expe-paper."""
    return re.sub(r"[^\w.=+]+", "-", variant).strip("-")


def _axes(place: str, grid: object) -> Iterator[tuple[tuple[str, ...], list[Any]]]:
    """Yield the settings that a grid varies, a parameter of the encoding after its own name, and their values."""
    for key, values in _mapping(place, grid).items():
        if key == PARAMETERS:
            yield from (((key, *inner), choices) for inner, choices in _axes(f"{place}: {key}", values))
        elif not isinstance(values, list) or not values:
            raise ConfigError(f"{place}: {key} is {values!r}; give a list of values")
        else:
            yield (key,), values


def _meaning(settings: TrainSettings) -> TrainSettings:
    """Return settings with every parameter of the encoding spelled out."""
    return dataclasses.replace(settings, positional_parameters=settings.encoding_parameters.to_dict())


def _mapping(name: str, value: object) -> Mapping[str, Any]:
    """Return a mapping, an empty one for nothing."""
    values = {} if value is None else value
    require_kind(name, values, "Mapping[str, Any]")
    assert isinstance(values, Mapping)
    return values


def _as_tuple(value: Any, annotation: str) -> Any:
    """Return a list as a tuple, and one value as a tuple of it where a tuple is wanted."""
    if isinstance(value, list):
        return tuple(value)
    return (value,) if annotation.startswith("tuple") and not isinstance(value, tuple) else value
