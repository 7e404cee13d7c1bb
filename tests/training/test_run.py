"""Training: the same sequences whatever the process count, resuming without a trace, refusing what cannot work."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.utils.data import default_collate
from transformers import AutoTokenizer

from expe_edge.errors import CheckpointError, ConfigError, CorpusError, ExportError
from expe_edge.export.exporter import export
from expe_edge.model.decoder import ExPEForCausalLM
from expe_edge.text.corpus import load_corpus
from expe_edge.text.tokenization import encode_documents, load_tokenizer
from expe_edge.training.checkpoint import load_checkpoint, starting_settings
from expe_edge.training.run import train
from expe_edge.training.settings import make_settings, stored_settings
from expe_edge.training.trainer import WindowDataset
from tests.command_line import on_two_processes
from tests.small import small_settings


def losses(report: dict[str, Any]) -> list[float]:
    return [entry["loss"] for entry in report["history"]]


def test_training_lowers_the_loss(checkpoint: Path) -> None:
    history = json.loads((checkpoint / "training.json").read_text())["history"]
    assert history[-1]["loss"] < history[0]["loss"] - 1.0


def test_the_first_loss_is_the_first_models_over_all_tokens(tmp_path: Path, text_folder: Path) -> None:
    """The first token of a sequence counts too, though nothing predicts it; transformers 5 by itself leaves it out."""
    settings = small_settings(text_folder, max_steps=1, dtype="float32")
    report = train(settings, tmp_path / "run")
    checkpoint = load_checkpoint(tmp_path / "run")
    torch.manual_seed(settings.seed)
    model = ExPEForCausalLM(checkpoint.config).eval()
    stream = np.concatenate(encode_documents(checkpoint.tokenizer, load_corpus([str(text_folder)]).training))
    dataset = WindowDataset(stream, settings)
    batch = default_collate([dataset[index] for index in range(settings.batch_size)])
    with torch.inference_mode():
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    nats = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum")
    assert losses(report)[0] == pytest.approx(nats.item() / batch["labels"].numel(), rel=1e-4)


def test_releases_4_and_5_of_transformers_read_what_a_run_writes(checkpoint: Path) -> None:
    config, wrapper = (json.loads((checkpoint / f"{name}config.json").read_text()) for name in ("", "tokenizer_"))
    assert config["use_cache"] is True
    assert wrapper["tokenizer_class"] == "PreTrainedTokenizerFast"
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    rows = tokenizer(["the old tree", "a"], padding=True)
    assert list(rows) == ["input_ids", "attention_mask"]
    expected = load_tokenizer(checkpoint).encode("the old tree").ids
    assert rows["input_ids"][0] == expected
    assert rows["attention_mask"][1].count(0) == len(expected) - 2
    assert tokenizer.decode(expected, skip_special_tokens=True) == "the old tree"


def test_a_tokenizer_may_be_given(tmp_path: Path, text_folder: Path, checkpoint: Path) -> None:
    """Of whatever size; a resumed run has its own, and fine-tuning the checkpoint's."""
    settings = small_settings(text_folder, max_steps=1, tokenizer=str(checkpoint), vocab_size=257)
    train(settings, tmp_path / "run")
    assert (tmp_path / "run" / "tokenizer.json").read_bytes() == (checkpoint / "tokenizer.json").read_bytes()
    assert load_checkpoint(tmp_path / "run").config.vocab_size == load_checkpoint(checkpoint).config.vocab_size > 257
    shutil.copytree(checkpoint, tmp_path / "moved")
    lost = dataclasses.replace(settings, tokenizer=str(tmp_path / "moved"))
    train(lost, tmp_path / "again")
    shutil.rmtree(tmp_path / "moved")
    train(dataclasses.replace(lost, max_steps=2), tmp_path / "again", resume=True)
    train(make_settings(flags={"max_steps": 1}, stored=starting_settings(tmp_path / "again")), tmp_path / "tuned")


@pytest.mark.parametrize("tokenizer", ["nowhere", "."])
def test_a_tokenizer_that_is_not_there_is_refused(tmp_path: Path, text_folder: Path, tokenizer: str) -> None:
    with pytest.raises(CheckpointError, match=r"`tokenizer` .*no tokenizer\.json in it"):
        train(small_settings(text_folder, tokenizer=str(tmp_path / tokenizer)), tmp_path / "run")
    with pytest.raises(ConfigError, match="drop it"):
        small_settings(text_folder, tokenizer=tokenizer, from_checkpoint=tokenizer)
    assert not (tmp_path / "run").exists()


def test_nothing_but_progress_is_said(tmp_path: Path, text_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    train(small_settings(text_folder, max_steps=2, log_every=1), tmp_path / "run")
    load_checkpoint(tmp_path / "run")
    out, err = capfd.readouterr()
    assert out == ""
    assert [line.partition("  ")[0] for line in err.splitlines()] == ["step 1/2", "step 2/2"]


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path, text_folder: Path) -> None:
    settings = small_settings(text_folder, max_steps=20, save_every=10)
    whole = train(settings, tmp_path / "whole")
    train(settings, tmp_path / "resumed")
    shutil.rmtree(tmp_path / "resumed" / "trainer" / "checkpoint-20")  # as if stopped after the first checkpoint
    (tmp_path / "resumed" / "model.safetensors").unlink()
    resumed = train(settings, tmp_path / "resumed", resume=True)
    assert losses(resumed) == losses(whole)
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("resumed", "whole"))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name], rtol=0, atol=0, msg=name)


def test_two_processes_train_as_one_does(tmp_path: Path, text_folder: Path) -> None:
    """Data-parallel over gloo: the same global batch gives the same losses, within float tolerance."""
    settings = small_settings(text_folder, max_steps=10, log_every=1)
    one = train(settings, tmp_path / "one")
    config = tmp_path / "settings.yaml"
    config.write_text(json.dumps(stored_settings(tmp_path / "one")), encoding="utf-8")
    printed = on_two_processes("train", "--config", config, "--out", tmp_path / "two", "--json", tmp_path / "two.json")
    two = json.loads((tmp_path / "two" / "training.json").read_text())
    assert two["processes"] == 2
    assert json.loads((tmp_path / "two.json").read_text()) == two
    assert printed.count("last loss") == 1
    np.testing.assert_allclose(losses(two), losses(one), rtol=2e-4)


def test_who_may_read_a_checkpoint_is_for_the_umask_to_say(tmp_path: Path, text_folder: Path) -> None:
    before = os.umask(0o077)
    try:
        train(small_settings(text_folder, max_steps=1), tmp_path / "run")
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "run").iterdir() if path.is_file()]
    assert {"config.json", "model.safetensors"} <= {path.name for path in files}
    assert all(path.stat().st_mode & 0o077 == 0 for path in files)


def test_every_sample_is_a_function_of_seed_and_number(text_folder: Path) -> None:
    stream = np.arange(5000, dtype=np.int32)
    first, again = (WindowDataset(stream, small_settings(text_folder)) for _ in range(2))
    other = WindowDataset(stream, small_settings(text_folder, seed=1))
    assert torch.equal(first[7]["position_ids"], again[7]["position_ids"])
    assert not torch.equal(first[7]["input_ids"], other[7]["input_ids"])
    assert torch.equal(first[7]["input_ids"], first[7]["labels"])


def test_offsets_are_uniform_below_the_limit(text_folder: Path) -> None:
    settings = small_settings(text_folder, position_offset=16)
    dataset = WindowDataset(np.arange(5000, dtype=np.int32), settings)
    offsets = np.array([int(dataset[index]["position_ids"][0]) for index in range(480)])
    limit = 16 * settings.training_length
    assert 0 <= offsets.min() < 0.05 * limit
    assert 0.95 * limit < offsets.max() < limit
    assert abs(offsets.mean() / limit - 0.5) < 0.06


def test_offset_zero_is_the_papers_form(text_folder: Path) -> None:
    settings = small_settings(text_folder, position_offset=0)
    dataset = WindowDataset(np.arange(5000, dtype=np.int32), settings)
    assert all(torch.equal(dataset[i]["position_ids"], torch.arange(settings.training_length)) for i in range(20))


def test_refuses_text_shorter_than_a_sequence(text_folder: Path) -> None:
    with pytest.raises(CorpusError, match="the training text has 10 tokens, less than one sequence of 32"):
        WindowDataset(np.arange(10, dtype=np.int32), small_settings(text_folder))


def test_refuses_offsets_beyond_the_encodings_reach(tmp_path: Path, text_folder: Path) -> None:
    settings = small_settings(
        text_folder, positional="exqpe", positional_parameters={"limbs": 2, "dims": 16}, position_offset=100
    )
    with pytest.raises(ConfigError, match="position_offset 100 reaches position 3232, beyond the encoding's 2048"):
        train(settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sizes_that_have_defaults_may_be_given(tmp_path: Path, text_folder: Path) -> None:
    sizes = {"intermediate_size": 40, "max_position_embeddings": 96}
    settings = small_settings(text_folder, position_offset=2, max_steps=1, **sizes)
    train(settings, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {name: config[name] for name in sizes} == sizes
    assert {name: stored_settings(tmp_path / "out")[name] for name in sizes} == sizes
    assert load_file(tmp_path / "out" / "model.safetensors")["blocks.0.feed_forward.down.weight"].shape == (64, 40)
    with pytest.raises(ConfigError, match="max_position_embeddings is 128, but 96 in the run of"):
        train(dataclasses.replace(settings, max_position_embeddings=128), tmp_path / "out", resume=True)


def test_the_way_out_of_inexact_positions_is_one(tmp_path: Path, text_folder: Path) -> None:
    """As the refusal says, before anything is made; a sequence must still fit."""
    paper = {"where": "query_key", "start": 1.0}
    settings = small_settings(text_folder, positional_parameters=paper, position_offset=0, max_steps=1)
    with pytest.raises(ConfigError, match="; lower max_position_embeddings to 16777185, or use") as caught:
        train(settings, tmp_path / "out")
    assert "start=1.0, step=0.03125" in str(caught.value)
    assert not (tmp_path / "out").exists()
    train(dataclasses.replace(settings, max_position_embeddings=16777185), tmp_path / "out")
    train(dataclasses.replace(settings, max_position_embeddings=32), tmp_path / "short")
    with pytest.raises(ConfigError, match="reaches position 32, beyond the encoding's 31; lower `training_length`, or"):
        train(dataclasses.replace(settings, max_position_embeddings=31), tmp_path / "shorter")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hidden_size": 28},
            "head size 7 is not a multiple of 8, which onnxruntime's attention needs; export with `portable`, or train "
            "with another `num_attention_heads` or `hidden_size`",
        ),
        (
            {"positional_parameters": {"where": "embedding"}},
            "positions at the embedding pass through every norm and cannot be folded; export with `positions` inline, "
            "or train with another where",
        ),
    ],
)
def test_what_export_would_refuse_is_said_before_training(
    tmp_path: Path, text_folder: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    train(small_settings(text_folder, max_steps=1, **changes), tmp_path / "out")
    assert message in capsys.readouterr().err.splitlines()
    with pytest.raises(ExportError) as caught:
        export(tmp_path / "out", tmp_path / "package", ["float32"])
    assert str(caught.value) == message
    assert not (tmp_path / "package").exists()


def test_a_vocabulary_smaller_than_asked_for_is_said(
    tmp_path: Path, text_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = small_settings(text_folder, max_steps=1, vocab_size=5000)
    train(settings, tmp_path / "out")
    size = json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"]
    assert 300 < size < 5000
    (line,) = capsys.readouterr().err.splitlines()[:1]
    assert line == (
        f"the text holds {size} tokens to learn, fewer than `vocab_size` 5000; the model's vocabulary is of {size}"
    )


def test_refuses_to_replace_or_resume_what_it_should_not(tmp_path: Path, checkpoint: Path, text_folder: Path) -> None:
    settings = small_settings(text_folder)
    before = (checkpoint / "model.safetensors").read_bytes()
    with pytest.raises(ConfigError, match="exists; use `force` to replace it, `resume` to continue it"):
        train(settings, checkpoint)
    assert (checkpoint / "model.safetensors").read_bytes() == before
    with pytest.raises(CheckpointError, match="no checkpoint to resume from; drop `resume`"):
        train(settings, tmp_path / "none", resume=True)
    assert not (tmp_path / "none").exists()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday").touch()
    with pytest.raises(ConfigError, match="holds something else than a training run; `force` will not delete it"):
        train(settings, tmp_path / "photos", force=True)
    assert (tmp_path / "photos" / "holiday").exists()
