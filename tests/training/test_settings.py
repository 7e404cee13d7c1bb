"""Settings of a run: what wins over what, and what is refused."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from expe_edge.errors import ConfigError
from expe_edge.positions.expe import ExPEParameters
from expe_edge.positions.parameters import encoding_parameters
from expe_edge.training.settings import COUNTS, LARGEST_COUNT, PRESETS, TrainSettings, make_settings, stored_settings
from tests.small import small_settings

KEYS = ", ".join(sorted(field.name for field in dataclasses.fields(TrainSettings)))
ENCODINGS = "alibi, expe, exqpe, none, relative, rotary, sinusoidal"


def yaml_file(folder: Path, text: str) -> Path:
    """Write a config file."""
    path = folder / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(**arguments: Any) -> str:
    """Return the message of the `ConfigError` that `make_settings` raises."""
    with pytest.raises(ConfigError) as caught:
        make_settings(**arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Precedence


def test_defaults_are_the_preset_tiny() -> None:
    assert make_settings() == make_settings("tiny") == TrainSettings()


@pytest.mark.parametrize("preset", PRESETS)
def test_preset_sets_what_it_names_and_leaves_the_rest(preset: str) -> None:
    settings = dataclasses.asdict(make_settings(preset))

    assert settings == {**dataclasses.asdict(TrainSettings()), **PRESETS[preset]}


def test_flag_wins_over_file_and_file_over_preset(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "max_steps: 7\nseed: 3\nhidden_size: 96\n")

    settings = make_settings("small", file, {"seed": 5, "learning_rate": 0.5})

    assert (settings.seed, settings.learning_rate) == (5, 0.5)  # flags
    assert (settings.max_steps, settings.hidden_size) == (7, 96)  # file
    assert (settings.vocab_size, settings.num_hidden_layers) == (4096, 8)  # preset
    assert settings.weight_decay == 0.1  # default


@pytest.mark.parametrize("absent", [None, ()])
def test_flags_not_given_change_nothing(tmp_path: Path, absent: object) -> None:
    file = yaml_file(tmp_path, "seed: 3\ndata: [some.txt]\n")

    settings = make_settings("tiny", file, {"seed": None, "data": absent})

    assert (settings.seed, settings.data) == (3, ("some.txt",))


def test_flag_of_zero_or_false_is_a_flag(tmp_path: Path) -> None:
    file = yaml_file(tmp_path, "position_offset: 8\ntie_word_embeddings: true\n")

    settings = make_settings("tiny", file, {"position_offset": 0, "tie_word_embeddings": False})

    assert settings.position_offset == 0
    assert settings.tie_word_embeddings is False


@pytest.mark.parametrize("text", ["", "# nothing but a remark\n", "{}"])
def test_empty_file_changes_nothing(tmp_path: Path, text: str) -> None:
    assert make_settings(config_file=yaml_file(tmp_path, text)) == TrainSettings()


@pytest.mark.parametrize("text", ["data: corpus/a.txt", "data: [corpus/a.txt]", "data:\n  - corpus/a.txt"])
def test_one_source_in_a_file_needs_no_list(tmp_path: Path, text: str) -> None:
    assert make_settings(config_file=yaml_file(tmp_path, text)).data == ("corpus/a.txt",)


# Resuming


def test_stored_settings_stand_in_for_the_preset(checkpoint: Path, text_folder: Path, tmp_path: Path) -> None:
    stored = stored_settings(checkpoint)
    file = yaml_file(tmp_path, "log_every: 9\n")
    given = ExPEParameters.recipe({}, training_length=32, heads=4)
    explicit = {"positional_parameters": encoding_parameters("expe", given, training_length=32).to_dict()}

    assert make_settings(stored=stored) == small_settings(text_folder, **explicit)
    assert make_settings("base", stored=stored) == small_settings(text_folder, **explicit)
    assert make_settings("tiny", file, {"max_steps": 80}, stored) == small_settings(
        text_folder, max_steps=80, log_every=9, **explicit
    )


@pytest.mark.parametrize("preset", PRESETS)
def test_settings_survive_plain_data(preset: str) -> None:
    settings = make_settings(preset, flags={"positional": "exqpe", "positional_parameters": {"limbs": 2, "dims": 16}})

    assert make_settings(stored=dataclasses.asdict(settings)) == settings


# Refusals


@pytest.mark.parametrize(
    ("preset", "hint"),
    [("tinyy", "did you mean 'tiny'? "), ("smal", "did you mean 'small'? "), ("huge", ""), ("", "")],
)
def test_unknown_preset(preset: str, hint: str) -> None:
    assert refusal(preset=preset) == f"unknown preset {preset!r}; {hint}available: base, small, tiny"


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("max_step", "did you mean 'max_steps'? "),
        ("learning_rat", "did you mean 'learning_rate'? "),
        ("max-steps", "did you mean 'max_steps'? "),
        ("zzz", ""),
    ],
)
def test_unknown_key_in_a_file(tmp_path: Path, key: str, hint: str) -> None:
    file = yaml_file(tmp_path, f"{key}: 1\n")

    assert refusal(config_file=file) == f"unknown config key {key!r}; {hint}available: {KEYS}"


def test_unknown_key_among_stored_settings(checkpoint: Path) -> None:
    stored = {**stored_settings(checkpoint), "sead": 1}

    assert refusal(stored=stored) == f"unknown config key 'sead'; did you mean 'seed'? available: {KEYS}"


@pytest.mark.parametrize(
    ("name", "hint"), [("exp", "did you mean 'expe'? "), ("rotery", "did you mean 'rotary'? "), ("wavelet", "")]
)
def test_unknown_encoding(name: str, hint: str) -> None:
    message = f"unknown positional encoding {name!r}; {hint}available: {ENCODINGS}"

    assert refusal(flags={"positional": name}) == message


def test_unknown_parameter_of_an_encoding() -> None:
    assert refusal(flags={"positional_parameters": {"stepp": 1}}) == (
        "unknown parameter of positional encoding 'expe' 'stepp'; did you mean 'step'? "
        "available: content_heads, dims, how, slopes, softplus, start, step, temperature, where"
    )


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize(
    "name",
    [
        "max_steps",
        "batch_size",
        "learning_rate",
        "save_every",
        "log_every",
        "training_length",
        "hidden_size",
        "num_key_value_heads",
        "intermediate_size",
        "max_position_embeddings",
    ],
)
def test_setting_that_must_be_positive(name: str, value: int) -> None:
    assert refusal(flags={name: value}) == f"{name} is {value}; it must be above 0; change `{name}`"


@pytest.mark.parametrize(
    "name",
    [
        "position_offset",
        "warmup_steps",
        "seed",
        "weight_decay",
        "max_grad_norm",
    ],
)
def test_setting_that_must_not_be_negative(name: str) -> None:
    assert getattr(make_settings(flags={name: 0}), name) == 0
    assert refusal(flags={name: -1}) == f"{name} is -1; it must not be negative; change `{name}`"


def test_unknown_dtype() -> None:
    assert refusal(flags={"dtype": "float23"}) == (
        "unknown dtype 'float23'; did you mean 'float32'? available: auto, bfloat16, float32; change `dtype`"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("max_steps: many", "max_steps is 'many'; it must be a whole number; change `max_steps`"),
        ("max_steps:", "max_steps is None; it must be a whole number; change `max_steps`"),
        ("max_steps: 7.0", "max_steps is 7.0; it must be a whole number; change `max_steps`"),
        ("max_steps: true", "max_steps is True; it must be a whole number; change `max_steps`"),
        ("seed: [1]", "seed is [1]; it must be a whole number; change `seed`"),
        (
            "num_key_value_heads: '2'",
            "num_key_value_heads is '2'; it must be a whole number; change `num_key_value_heads`",
        ),
        ("learning_rate: fast", "learning_rate is 'fast'; it must be a number; change `learning_rate`"),
        ("learning_rate: .nan", "learning_rate is nan; it must be a number; change `learning_rate`"),
        ("weight_decay: .inf", "weight_decay is inf; it must be a number; change `weight_decay`"),
        ("tie_word_embeddings: 7", "tie_word_embeddings is 7; it must be true or false; change `tie_word_embeddings`"),
        ("positional: 5", "positional is 5; it must be text; change `positional`"),
        ("from_checkpoint: 5", "from_checkpoint is 5; it must be text; change `from_checkpoint`"),
        ("data: 2024", "data is 2024; it must be text, or a list of it; change `data`"),
        ("data: [null]", "data is (None,); it must be text, or a list of it; change `data`"),
        (
            "positional_parameters: 5",
            "positional_parameters is 5; it must be a mapping; change `positional_parameters`",
        ),
        ("positional_parameters: {dims: '4'}", "dims is '4'; it must be a whole number"),
    ],
)
def test_value_of_the_wrong_kind(tmp_path: Path, text: str, message: str) -> None:
    assert refusal(config_file=yaml_file(tmp_path, text)) == message


@pytest.mark.parametrize(
    ("positional", "parameters", "message"),
    [
        ("expe", {"dims": 3.5}, "dims is 3.5; it must be a whole number"),
        ("expe", {"dims": True}, "dims is True; it must be a whole number"),
        ("expe", {"dims": None}, "dims is None; it must be a whole number"),
        ("expe", {"step": "abc"}, "step is 'abc'; it must be a number, or a list of numbers"),
        ("expe", {"step": None}, "step is None; it must be a number, or a list of numbers"),
        ("expe", {"step": [0.1, "a"]}, "step is (0.1, 'a'); it must be a number, or a list of numbers"),
        ("expe", {"start": float("nan")}, "start is nan; it must be a number, or a list of numbers"),
        ("expe", {"where": 5}, "where is 5; it must be text"),
        ("exqpe", {"limbs": 0}, "limbs is 0; it must be above 0"),
        ("exqpe", {"limbs": 2.0}, "limbs is 2.0; it must be a whole number"),
        ("exqpe", {"limb_bits": 2.5}, "limb_bits is 2.5; it must be a whole number"),
        ("rotary", {"theta": "wide"}, "theta is 'wide'; it must be a number"),
        ("relative", {"buckets": 1.5}, "buckets is 1.5; it must be a whole number"),
    ],
)
def test_parameter_of_the_wrong_kind(positional: str, parameters: dict[str, Any], message: str) -> None:
    assert refusal(flags={"positional": positional, "positional_parameters": parameters}) == message


@pytest.mark.parametrize(
    "text",
    [
        "seed: 2024-99-99",
        "seed: !!float x",
        "seed: !!int ''",
        "seed: !!bool x",
        "seed: !!timestamp x",
        "seed: " + "9" * 5000,
    ],
)
def test_values_that_their_yaml_tag_does_not_allow(tmp_path: Path, text: str) -> None:
    assert "not readable as YAML (" in refusal(config_file=yaml_file(tmp_path, text))


def test_a_value_of_a_million_parts_is_not_written_out(tmp_path: Path) -> None:
    """Lists of lists by reference: small in the file, endless where they are shown."""
    lists = ", ".join(
        f"&{name} [{', '.join([f'*{before}'] * 10)}]" for before, name in zip("abcdefg", "bcdefgh", strict=True)
    )
    message = refusal(config_file=yaml_file(tmp_path, f"text_field: [&a [x], {lists}]"))

    assert message.startswith("text_field is [['x'], ")
    assert len(message) < 400


@pytest.mark.parametrize("name", COUNTS)
def test_count_beyond_what_is_counted(name: str) -> None:
    assert refusal(flags={name: 10**30}) == f"{name} is {10**30}; at most {LARGEST_COUNT}; change `{name}`"


def test_number_beyond_floats() -> None:
    assert refusal(flags={"learning_rate": 10**400}).endswith("; it must be a number; change `learning_rate`")


def test_seed_beyond_what_generators_take() -> None:
    assert make_settings(flags={"seed": 2**32 - 1}).seed == 2**32 - 1
    assert refusal(flags={"seed": 2**32}) == "seed is 4294967296; at most 4294967295; change `seed`"


@pytest.mark.parametrize("text", ["1e-3", "1E-3", ".1e-2", "+1.e-3", "0.001"])
def test_numbers_with_an_exponent_are_numbers(tmp_path: Path, text: str) -> None:
    file = yaml_file(tmp_path, f"learning_rate: {text}\npositional_parameters: {{step: {text}}}")

    settings = make_settings(config_file=file)

    assert (settings.learning_rate, settings.positional_parameters) == (0.001, {"step": 0.001})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\non: 1", "line 2: the key True is no text; write it in quotes"),
        ("1: 2", "line 1: the key 1 is no text; write it in quotes"),
        ("seed: 1\nmax_steps: 2\nseed: 2", "line 3: seed stands there twice; keep one"),
        ("positional_parameters:\n  dims: 4\n  dims: 8", "line 3: dims stands there twice; keep one"),
        ("data: " + "[" * 5000 + "]" * 5000, "nested too deeply"),
    ],
)
def test_keys_that_cannot_be(tmp_path: Path, text: str, message: str) -> None:
    file = yaml_file(tmp_path, text)

    assert refusal(config_file=file) == f"`config_file` {file}: {message}"


def test_config_file_that_is_missing(tmp_path: Path) -> None:
    message = refusal(config_file=tmp_path / "none.yaml")

    assert message.startswith(f"`config_file` {tmp_path}/none.yaml: not readable as YAML (")


@pytest.mark.parametrize("data", [b"a: [1", b"\xff\xfe", b"a: b: c", b"\x00"])
def test_config_file_that_is_not_yaml(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "c.yaml").write_bytes(data)

    message = refusal(config_file=tmp_path / "c.yaml")

    assert message.startswith(f"`config_file` {tmp_path}/c.yaml: not readable as YAML (")


@pytest.mark.parametrize(("text", "kind"), [("- max_steps", "list"), ("max_steps", "str"), ("7", "int")])
def test_config_file_that_holds_no_mapping(tmp_path: Path, text: str, kind: str) -> None:
    file = yaml_file(tmp_path, text)

    assert refusal(config_file=file) == f"`config_file` {file}: expected a mapping of settings, got {kind}"
