"""The relative form of ExPE and ExQPE: positions in the keys' input alone, slopes that begin as the settings say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx.utils import Extractor

from expe_edge.errors import ConfigError
from expe_edge.graph.build import build_graph, graph_contract
from expe_edge.graph.linears import Float32
from expe_edge.graph.run import graph_feeds
from expe_edge.model.config import ExPEConfig
from expe_edge.model.decoder import ExPEForCausalLM
from expe_edge.positions.expe import alibi_slopes
from expe_edge.training.checkpoint import load_checkpoint
from expe_edge.training.run import train
from expe_edge.training.settings import TRAINING_FILE, stored_settings
from tests import reference
from tests.graphs import open_session, random_weights
from tests.small import small_settings
from tests.strategies import expe_of, expe_parameters_of, random_model, random_tokens, small_config

LENGTH = 24
#: The first of `LENGTH` positions, up to the last that float32 can hold.
OFFSETS = (1, 2**20, 2**24 - LENGTH)
FORMS = {
    "expe": {"positional": "expe"},
    "expe, added": {"positional": "expe", "positional_parameters": {"how": "add"}},
    "expe, odd dims": {"positional": "expe", "positional_parameters": {"dims": 5}},
    "one shared head": {"num_key_value_heads": 1},
    "random slopes": {"positional_parameters": {"start": 0.0, "slopes": "random"}},
}
every_form = pytest.mark.parametrize("changes", FORMS.values(), ids=FORMS)


# Exactly relative.


def placed(tokens: np.ndarray, offset: int) -> dict[str, torch.Tensor]:
    positions = torch.arange(offset, offset + tokens.shape[1])[None]
    return {"input_ids": torch.from_numpy(tokens), "position_ids": positions}


@every_form
@pytest.mark.parametrize("offset", OFFSETS)
def test_predictions_are_bit_for_bit_the_same_at_every_absolute_position(changes: dict[str, Any], offset: int) -> None:
    config = small_config(**changes)
    model, tokens = random_model(config), random_tokens(config, LENGTH)
    here, there = (model(**placed(tokens, begin), use_cache=False).logits for begin in (0, offset))
    assert torch.equal(here, there)


def test_other_forms_depend_on_the_absolute_position() -> None:
    """That the case above is one in which a difference would show."""
    config = small_config(positional_parameters={"where": "query_key"})
    model, tokens = random_model(config), random_tokens(config, LENGTH)
    here, there = (model(**placed(tokens, begin), use_cache=False).logits for begin in (0, 2**10))
    assert (here - there).abs().max() > 1e-3


@every_form
def test_the_graph_knows_positions_by_their_distances_alone(changes: dict[str, Any]) -> None:
    model = build_graph(random_weights(small_config(**changes)), Float32()).model
    tensor, path = "position_ids", []
    while "distances" not in path:
        (reader,) = (node for node in model.graph.node if tensor in node.input)  # one alone, all the way
        path.append(reader.name)
        tensor = reader.output[0]
    assert path == ["run.positions", "queries.positions", "distances"]
    assert not any(tensor.name.endswith(".limbs") for tensor in model.graph.initializer)


@pytest.mark.parametrize("offset", OFFSETS)
def test_the_graph_gives_the_same_bits_for_a_query_and_keys_moved_together(offset: int) -> None:
    """Keys count from 0 in a graph, so here all but the first token stand at `offset`, far beyond the cache's end."""
    config = small_config()
    model = build_graph(random_weights(config), Float32(), portable=True).model
    names = [node.name for node in model.graph.node]
    assert "queries.codes" not in names
    (distance,) = (node for node in model.graph.node if node.name == "distances")
    session = open_session(_only(model, distance.output[0]))
    feeds = graph_feeds(graph_contract(config, portable=True), random_tokens(config, LENGTH))
    feeds["position_ids"] += offset
    found = session.run(None, {name: feeds[name] for name in ("attention_mask", "position_ids")})[0]
    expected = np.arange(LENGTH)[None, :] - np.arange(offset, offset + LENGTH)[:, None]
    np.testing.assert_array_equal(found[0, 0], expected)


def _only(model: onnx.ModelProto, tensor: str) -> onnx.ModelProto:
    return Extractor(onnx.shape_inference.infer_shapes(model)).extract_model(
        ["attention_mask", "position_ids"], [tensor]
    )


# How slopes begin.


def first_slopes(config: ExPEConfig) -> np.ndarray:
    """The slope of every head and limb of a new model's second layer for a query without content, (H, G)."""
    torch.manual_seed(0)
    model = ExPEForCausalLM(config)
    positional = expe_of(model)
    weight = model.blocks[1].attention.qkv.weight.double()
    folded = positional.fold(weight)
    query = folded.alpha[: positional.heads.query_rows].view(positional.heads.queries, 1, positional.heads.size)
    slopes: torch.Tensor = positional.slopes(query, folded.beta)[:, 0] / math.sqrt(positional.heads.size)
    return slopes.detach().numpy()


@pytest.mark.parametrize(
    ("heads", "shared", "slopes", "expected"),
    [
        (4, 4, "alibi", alibi_slopes(4)),
        (8, 2, "alibi", alibi_slopes(8)),
        (6, 3, "alibi", alibi_slopes(6)),
        (6, 1, "alibi", alibi_slopes(6)),
        (4, 2, "zero", [0.0] * 4),
        (4, 2, (0.5, -0.25, 0.0, 0.0), (0.5, -0.25, 0.0, 0.0)),
    ],
)
@pytest.mark.parametrize("where", ["key", "query_key"])
def test_slopes_begin_as_asked(heads: int, shared: int, slopes: Any, expected: Any, where: str) -> None:
    parameters = {"slopes": slopes, "where": where}
    sizes = {"hidden_size": 8 * heads, "num_attention_heads": heads, "num_key_value_heads": shared}
    found = first_slopes(small_config(positional_parameters=parameters, **sizes))
    np.testing.assert_allclose(found[:, 0], expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["expe", "exqpe"])
def test_positions_begin_in_one_dimension_of_each_head(name: str) -> None:
    config = small_config(positional=name, num_key_value_heads=2)
    heads, size = config.num_attention_heads, config.head_dim
    torch.manual_seed(0)
    weight = ExPEForCausalLM(config).blocks[0].attention.qkv.weight[:, : expe_parameters_of(config).dims]
    queries_and_keys = torch.unflatten(weight[: (heads + 2) * size], 0, (-1, size))
    assert queries_and_keys[:, 0].any(dim=-1).all()
    assert not queries_and_keys[:, 1:].any()


@pytest.mark.parametrize("name", ["expe", "exqpe"])
def test_a_new_model_penalizes_distance_as_alibi_does_however_far(name: str) -> None:
    """For ExQPE over the carries of all its limbs too, up to what they reach."""
    config = small_config(positional=name, positional_parameters={"dims": 12})
    slopes, code = first_slopes(config), expe_parameters_of(config).code
    distances = np.array([0, 1, 15, 16, 255, 256, 4095, 4096, 30000])
    bias = slopes @ np.stack(code.split(distances))
    np.testing.assert_allclose(bias, np.outer(alibi_slopes(4), distances), rtol=1e-5)


def test_heads_that_share_keys_begin_with_slopes_near_their_own() -> None:
    """A shallow head beside a steep one too: contents move no slope by more than half of itself, give or take."""
    config = small_config(num_attention_heads=8, num_key_value_heads=2, hidden_size=64)
    model = ExPEForCausalLM(config)
    hidden = torch.nn.functional.rms_norm(torch.randn(1, 500, 64), (64,))
    positions = torch.arange(500)[None]
    projected = model.positional.project(model.blocks[0].attention.qkv.weight, hidden, positions)
    assert projected.slopes is not None
    slopes = projected.slopes[0, :, :, 0] / math.sqrt(model.positional.heads.size)  # (H, T)
    expected = torch.tensor(alibi_slopes(8))
    assert ((slopes.std(dim=1) / expected) < 0.3).all()
    assert ((slopes.std(dim=1) / expected) > 0.05).all()
    assert torch.allclose(slopes.mean(dim=1), expected, rtol=0.1)


def test_the_papers_form_with_alibis_slopes_has_none_that_drift_at_first() -> None:
    config = small_config(positional_parameters={"where": "query_key", "slopes": "alibi"})
    model = random_model(config)
    folded = expe_of(model).fold(model.blocks[0].attention.qkv.weight)
    heads = model.positional.heads
    assert folded.beta[: heads.query_rows].abs().max() < 1e-6
    assert folded.beta[heads.query_rows : heads.query_rows + heads.key_rows].abs().max() > 1e-3


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"slopes": "steep"}, "unknown slopes 'steep'; available: alibi, random, zero"),
        ({"slopes": 0.5}, "slopes is 0.5; give alibi, zero, random, or a list of one number a head"),
        ({"slopes": (1.0, "a", True, None)}, "slopes is .*; give alibi, zero, random, or a list of one number a head"),
        ({"slopes": (1.0, 2.0, 3.0, math.inf)}, "or a list of one number a head"),
        ({"slopes": (1.0, 2.0)}, r"slopes is \(1.0, 2.0\); give alibi, zero, random, or a number for each of 4 heads"),
        (
            {"slopes": "alibi", "where": "embedding"},
            "slopes is 'alibi', which needs where: key or query_key, not embed",
        ),
        ({"dims": 1}, "dims is 1, but half of each limb's dims are constant: raise dims to 2"),
        ({"start": 0.0}, "slopes is 'alibi', but start=0.0 and step=0.0625 cannot be told apart; give one number for"),
        ({"start": (1.0,) * 16, "step": (0.5,) * 16}, "slopes is 'alibi', but .* cannot be told apart"),
    ],
)
def test_slopes_that_cannot_begin(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_config(positional_parameters=parameters)


def test_a_saved_model_keeps_its_slopes(tmp_path: Path) -> None:
    model = random_model(small_config())
    model.blocks[0].attention.qkv.weight += 0.125
    model.save_pretrained(tmp_path)
    loaded = ExPEForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())


# What was made before the relative form.

#: As the config of a checkpoint had it then.
BEFORE = {"dims": 16, "start": 0.0, "step": 0.0625, "where": "query_key", "how": "override"}


#: What came later, as a record that does not speak of it means it.
NOTHING_MORE = {"softplus": False, "content_heads": 0, "temperature": 0.0}


def test_a_config_from_before_stays_as_it_is() -> None:
    assert small_config(positional_parameters=BEFORE).positional_parameters == BEFORE


def test_a_run_recorded_before_goes_on_in_the_papers_form(text_folder: Path, tmp_path: Path) -> None:
    settings = small_settings(text_folder, max_steps=2, save_every=2, positional_parameters={"where": "query_key"})
    train(settings, tmp_path / "run")
    record = json.loads((tmp_path / "run" / TRAINING_FILE).read_text())
    record["settings"]["positional_parameters"] = {}
    (tmp_path / "run" / TRAINING_FILE).write_text(json.dumps(record))

    assert stored_settings(tmp_path / "run")["positional_parameters"] == {"where": "query_key", **NOTHING_MORE}
    longer = small_settings(text_folder, max_steps=3, positional_parameters={"where": "query_key"})
    train(longer, tmp_path / "run", resume=True)
    assert load_checkpoint(tmp_path / "run").config.positional_parameters["where"] == "query_key"
    with pytest.raises(ConfigError, match=r"positional_parameters is .*'where': 'key'.*, but .*'query_key'"):
        train(small_settings(text_folder, max_steps=4), tmp_path / "run", resume=True)


def test_positions_of_the_reference_are_those_of_the_config() -> None:
    """One number is for a half: the constant one for `start`, the one that counts for `step`, limb by limb."""
    config = small_config(positional="exqpe", positional_parameters={"dims": 6, "limbs": 2, "start": 2.0})
    np.testing.assert_array_equal(reference.starts(config), [2, 2, 0, 2, 2, 0])
    np.testing.assert_array_equal(reference.starts(config), expe_parameters_of(config).starts)
    steps = expe_parameters_of(config).limb_steps
    np.testing.assert_array_equal(steps, [[0, 0, 0.125, 0, 0, 0], [0, 0, 0, 0, 0, 0.125]])
