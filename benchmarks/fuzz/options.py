"""Options of `export` and `compare`, given to what parses or checks them."""

from __future__ import annotations

from benchmarks.fuzz.mutations import ODD_NUMBERS, ODD_TEXTS, odd_text
from benchmarks.fuzz.trial import Trial
from expe_edge.calibration.observations import Calibration
from expe_edge.cli.compare import parse_lengths
from expe_edge.cli.recipe import parse_size
from expe_edge.quality.comparison import require_rising
from expe_edge.quant.recipe import Recipe


def options(trial: Trial) -> None:
    """Options that are parsed by functions of ours, and settings of exports."""
    kind = trial.given["kind"] = trial.random.choice(("size", "lengths", "recipe", "calibration"))
    text = trial.given["text"] = trial.random.choice(
        (odd_text(trial.random, "1.5MB 600kB 1,2,4"), f"{trial.random.choice(ODD_NUMBERS)}kB", "9" * 400, "9" * 5000)
    )
    if kind == "size":
        parse_size(text)
    elif kind == "lengths":
        require_rising(parse_lengths(text))
    elif kind == "recipe":
        fields = list(Recipe.__dataclass_fields__)
        values: dict[str, object] = {
            "budget_kl": trial.random.choice(ODD_NUMBERS),
            "max_size": trial.random.choice(ODD_NUMBERS),
        }
        values |= {name: trial.random.choice(ODD_TEXTS) for name in ("precision", "embedding", "cache", "solver")}
        values |= {"block_size": trial.random.choice(ODD_NUMBERS), "portable": True, "smoothing": True}
        chosen = [name for name in fields if name in values and trial.random.random() < 0.4]
        trial.given["recipe"] = {name: values[name] for name in chosen}
        Recipe(**trial.given["recipe"])
    else:
        whole = [number for number in ODD_NUMBERS if isinstance(number, int)]
        Calibration(trial.random.choice(ODD_TEXTS), trial.random.choice(whole), trial.random.choice(whole))
