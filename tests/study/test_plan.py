"""Study files: what variants and runs they mean, and what is refused."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from expe_edge.errors import ConfigError
from expe_edge.model.config import ExPEConfig
from expe_edge.study.plan import Study, directory_of, read_study
from expe_edge.training.record import MODEL_SETTINGS, explicit

STUDIES = sorted((Path(__file__).parents[2] / "studies").glob("*.yaml"))
TWO = {"expe": {"positional": "expe"}, "alibi": {"positional": "alibi"}}


def study(**changes: Any) -> Study:
    return Study(**{"variants": TWO, "against": "alibi", **changes})


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.name)
def test_every_run_of_the_studies_here_is_of_a_model_that_can_be(path: Path) -> None:
    for run in read_study(path).runs:
        settings = explicit(run.settings)
        ExPEConfig(**{name: getattr(settings, name) for name in MODEL_SETTINGS})


def test_runs_are_variants_by_seeds_one_seed_after_the_other() -> None:
    runs = study(seeds=[3, 5], preset="small", settings={"max_steps": 7}).runs
    assert [run.name for run in runs] == ["expe-seed3", "alibi-seed3", "expe-seed5", "alibi-seed5"]
    assert [run.settings.seed for run in runs] == [3, 3, 5, 5]
    assert {(run.settings.max_steps, run.settings.hidden_size) for run in runs} == {(7, 384)}


def test_names_on_disk_are_those_of_earlier_releases() -> None:
    assert directory_of("expe, paper, alibi slopes, offsets") == "expe-paper-alibi-slopes-offsets"
    assert directory_of("expe, start=-0.5") == "expe-start=-0.5"
    assert "/" not in directory_of("../a/b")


def test_a_grid_is_every_combination_beside_what_the_base_has() -> None:
    base = {"positional": "expe", "positional_parameters": {"start": 2.0}, "learning_rate": 0.5}
    made = study(
        variants={"e": base, "alibi": {"positional": "alibi"}},
        ablations={"e": {"positional_parameters": {"dims": [2, 4], "step": [0.5]}, "max_steps": [7, 9]}},
    ).all_variants[2:]
    assert [variant.name for variant in made] == [
        f"e, dims={dims}, step=0.5, max_steps={steps}" for dims in (2, 4) for steps in (7, 9)
    ]
    assert made[1].settings == {
        "positional": "expe",
        "positional_parameters": {"start": 2.0, "dims": 2, "step": 0.5},
        "learning_rate": 0.5,
        "max_steps": 9,
    }
    assert {variant.base for variant in made} == {"e"}


def test_a_grid_changes_nothing_else_of_what_all_variants_have() -> None:
    shared = {"positional_parameters": {"where": "query_key"}}
    variants = {"expe": {}, "alibi": {"positional": "alibi", "positional_parameters": {}}}
    made = study(variants=variants, settings=shared, ablations={"expe": {"positional_parameters": {"dims": [8, 16]}}})
    smaller, same = made.all_variants[2:]
    assert made.settings_of(smaller, 0).positional_parameters == {"where": "query_key", "dims": 8}
    assert same.directory == "expe"


def test_an_ablation_that_equals_its_base_shares_its_runs() -> None:
    made = study(ablations={"expe": [{"positional_parameters": {"dims": [16, 8]}}, {"seed": [1]}][:1]}, seeds=0)
    assert [variant.directory for variant in made.all_variants] == ["expe", "alibi", "expe", "expe-dims=8"]
    assert [run.name for run in made.runs] == ["expe-seed0", "alibi-seed0", "expe-dims=8-seed0"]


def test_an_ablation_of_what_a_new_run_has_by_itself_has_runs_of_its_own() -> None:
    """That `tiny` has one content head of four and a softplus unless told otherwise is not in the study."""
    made = study(ablations={"expe": [{"positional_parameters": {"content_heads": [0, 1]}}, {"output_gate": [False]}]})
    assert [variant.directory for variant in made.all_variants] == [
        *("expe", "alibi", "expe-content_heads=0", "expe", "expe-output_gate=False")
    ]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"titel": "x"}, "unknown key of a study 'titel'; did you mean 'title'?"),
    ({"against": "alib"}, "unknown variant in against 'alib'; did you mean 'alibi'?"),
    ({"ablations": {"exp": {}}}, "unknown variant in ablations 'exp'; did you mean 'expe'?"),
    ({"ablations": {"expe": {"max_steps": 3}}}, "ablations of 'expe': max_steps is 3; give a list of values"),
    ({"ablations": {"expe": [3]}}, "ablations of 'expe' is 3; it must be a mapping"),
    (
        {"ablations": {"expe": {"positional_parameters": {"dim": [3]}}}},
        "variant 'expe, dim=3': unknown parameter of positional encoding 'expe' 'dim'; did you mean 'dims'?",
    ),
    ({"variants": {**TWO, "x": {"positonal": "expe"}}}, "variant 'x': unknown config key 'positonal'; did you mean"),
    ({"variants": {**TWO, "x": 3}}, "variant 'x' is 3; it must be a mapping"),
    ({"variants": {**TWO, "alibi, ": {}}}, "variants 'alibi' and 'alibi, ' would both be kept as alibi; rename one"),
    ({"settings": {"seed": 1}}, "variant 'expe': seed is no setting of a study; give seeds"),
    ({"preset": "tinny"}, "variant 'expe': unknown preset 'tinny'; did you mean 'tiny'?"),
    ({"seeds": [1, 1]}, "seeds is [1, 1]; expected different whole numbers"),
    ({"seeds": [-1]}, "seeds is [-1]; expected"),
    ({"seeds": ["a"]}, "seeds is ('a',); it must be a whole number, or a list of them; change seeds in the study"),
    ({"lengths": [2, 1]}, "lengths is [2, 1]; expected rising positive integers"),
    ({"documents": 0}, "documents is 0; at least 1"),
    ({"documents": True}, "documents is True; it must be a whole number"),
    ({"cost": 1}, "cost is 1; it must be true or false"),
    ({"probes": {"name": ["passkey"]}}, "unknown key of probes 'name'; did you mean 'names'?"),
    ({"probes": {"names": ["paskey"]}}, "unknown `probe` 'paskey'; did you mean 'passkey'?"),
    ({"probes": {"cases": "two"}}, "cases of probes is 'two'; it must be a whole number"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=lambda value: value[:30] if isinstance(value, str) else "")
def test_what_a_study_file_cannot_say(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump({"variants": TWO, "against": "alibi", **change}, sort_keys=False), encoding="utf-8")
    with pytest.raises(ConfigError) as error:
        read_study(file)
    assert str(error.value).startswith(message)


def test_a_study_needs_variants_and_one_to_compare_with(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text("variants: {expe: {}}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^study .*study.yaml: against is missing$"):
        read_study(file)
    file.write_text("variants: {\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"^study .*study.yaml: not readable as YAML"):
        read_study(file)


def test_the_study_file_of_the_documentation_is_valid(tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "reproduce.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```yaml\n(.*?)```", page, flags=re.DOTALL)
    (tmp_path / "study.yaml").write_text(example, encoding="utf-8")
    documented = read_study(tmp_path / "study.yaml")
    assert set(yaml.safe_load(example)) == {field.name for field in dataclasses.fields(Study)}
    assert len(documented.runs) == 3 * (2 + 6)
