"""The files by which other clients know a package: transformers / Optimum, and onnxruntime-genai."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from expe_edge.model.config import ExPEConfig
from expe_edge.package.contract import CUDA_OPTIONS, GraphContract
from expe_edge.package.directory import MODEL_FILE, TOKENIZER_CONFIG_FILE
from expe_edge.package.manifest import MANIFEST_FILE

#: Optimum reads the shape of the cache from the config, and honours grouped key/value heads only for model types it
#: knows. The cache has llama's shape; the weights are in the graph alone, so nothing else of that type is used.
CLIENT_MODEL_TYPE = "llama"
#: Optimum starts with a float cache whatever the graph asks for. A type it does not know makes it say so at once, and
#: this one says why.
INT8_CACHE_MODEL_TYPE = "expe-with-int8-cache-for-expe-edge-or-onnxruntime-genai"
#: Optimum's cache grows with every run, and has no room for what is new.
BUFFER_MODEL_TYPE = "expe-with-one-buffer-for-expe-edge-or-onnxruntime-genai"
#: transformers.js looks for a file whose name says its format, by default `model_quantized.onnx` in browsers; `fp32`
#: is its word for a name that says none.
TRANSFORMERS_JS = {"transformers.js_config": {"dtype": "fp32"}}
#: Its pipeline opens no text with the end-of-text token unless it is told, whatever `tokenizer.json` says.
OPENED = {"add_bos_token": True}
#: No other client keeps windows.
WINDOWED_MODEL_TYPE = "expe-with-windows-for-expe-edge-alone"


def write_client_files(directory: Path, config: ExPEConfig, contract: GraphContract, context_length: int) -> None:
    """Write `config.json`, `generation_config.json` and `genai_config.json`.

    Where a client cannot run the graph, its file names a type of model that it does not know, and that says why. The
    tokenizer's files are there already; what transformers.js asks of them is added.
    """
    files = {
        "config.json": _transformers_config(config, context_length) | {"model_type": _model_type(contract)},
        "generation_config.json": _tokens(config) | {"max_length": context_length, "do_sample": False},
        "genai_config.json": _genai_config(config, contract, context_length),
    }
    for name, content in files.items():
        _write(directory / name, content)
    tokenizer = directory / TOKENIZER_CONFIG_FILE
    if tokenizer.is_file():
        _write(tokenizer, json.loads(tokenizer.read_text(encoding="utf-8")) | OPENED)


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _model_type(contract: GraphContract) -> str:
    if contract.windows:
        return WINDOWED_MODEL_TYPE
    if contract.whole_buffer:
        return BUFFER_MODEL_TYPE
    return INT8_CACHE_MODEL_TYPE if contract.cache_dtype == "int8" else CLIENT_MODEL_TYPE


def _tokens(config: ExPEConfig) -> dict[str, Any]:
    ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return {name: token for name, token in ids.items() if token is not None}  # onnxruntime-genai refuses null


def _transformers_config(config: ExPEConfig, context_length: int) -> dict[str, Any]:
    return {
        "architectures": ["ORTModelForCausalLM"],
        "expe_edge_manifest": MANIFEST_FILE,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": context_length,
        "use_cache": True,
        **_tokens(config),
        **TRANSFORMERS_JS,
    }


def _genai_config(config: ExPEConfig, contract: GraphContract, context_length: int) -> dict[str, Any]:
    """https://onnxruntime.ai/docs/genai/reference/config.html; unknown keys are refused there."""
    decoder = {
        "session_options": {
            "log_id": "onnxruntime-genai",
            "provider_options": [{"cuda": CUDA_OPTIONS}] if contract.whole_buffer else [],
        },
        "filename": MODEL_FILE,
        "head_size": config.head_dim,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
    }
    return {
        "model": {
            **_tokens(config),
            "type": WINDOWED_MODEL_TYPE if contract.windows else "decoder",
            "context_length": context_length,
            "vocab_size": config.vocab_size,
            "decoder": decoder,
        },
        "search": {
            "do_sample": False,
            "max_length": context_length,
            "past_present_share_buffer": not contract.growing_cache,
        },
    }
