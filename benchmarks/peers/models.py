"""Models of one shape in every runtime's own format. Weights are random; ours have learned for one step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.untrained import make_checkpoint, make_packages
from expe_edge.runtime.kernels import Kernels

if TYPE_CHECKING:  # transformers takes seconds to import, and not every runtime needs it
    from expe_edge.model.config import ExPEConfig

#: Precision and block size, None for the precision's own, by what is said of weights.
WEIGHTS: dict[str, tuple[str, int | None]] = {
    "int8-dynamic": ("int8-dynamic", None),
    "int8-weight": ("int8-weight", None),
    "int8-weight, blocks of 256": ("int8-weight", 256),
    "int4-weight": ("int4-weight", None),
    "int4-weight, blocks of 256": ("int4-weight", 256),
}
#: What packages keep of a text, as the ends of their names have it: in float32 or int8, windows of N tokens for heads
#: with slopes.
KEEPS = ("", "-int8-cache", "-windowed", "-int8-cache-windowed")
#: Options of `train` by the name of a size.
SIZES = {
    "tiny": ("--preset", "tiny", "--data", "python-stdlib"),
    "small": ("--preset", "small", "--data", "python-stdlib"),
    "large": (
        *("--preset", "base", "--num-key-value-heads", "12", "--no-tie-word-embeddings", "--vocab-size", "32000"),
        *("--data", "python-stdlib", "--training-length", "512"),
    ),
}
#: Positions that a peer's model says it has; more than are measured.
POSITIONS = 131_072
#: Standard deviation of random weights.
DEVIATION = 0.02


@dataclass(frozen=True)
class Models:
    """Models of one shape, made in `folder` when first asked for."""

    folder: Path
    size: str

    @property
    def checkpoint(self) -> Path:
        """A checkpoint of ours."""
        return make_checkpoint(self.folder / self.size / "checkpoint", SIZES[self.size])

    @property
    def config(self) -> ExPEConfig:
        """Its sizes."""
        from expe_edge.model.config import ExPEConfig

        config: ExPEConfig = ExPEConfig.from_pretrained(self.checkpoint)
        return config

    def package(self, weights: str, keeps: str) -> Path:
        """A package of ours. weights: one of `WEIGHTS`. keeps: one of `KEEPS`."""
        precision, block_size = WEIGHTS[weights]
        packages = self.folder / self.size / ("packages" if block_size is None else f"packages-{block_size}")
        wanted = packages / f"{precision}{keeps}"
        if not wanted.is_dir():
            # Together: windows are measured once.
            alike = [precision for precision, size in WEIGHTS.values() if size == block_size]
            missing = [each for each in alike if not (packages / f"{each}{keeps}").is_dir()]
            options = [] if block_size is None else ["--block-size", str(block_size)]
            options += ["--cache", "int8"] if "int8-cache" in keeps else []
            if "windowed" in keeps:  # one step teaches a model too little for windows to be judged by their cost
                options += ["--head-window", str(self.config.training_length), "--head-window-cost", "inf"]
            make_packages(self.checkpoint, packages, missing, options)
        return wanted

    @property
    def kernels(self) -> Path:
        """The directory of kernels of our own, compiled here. Raises `ConfigError` where they cannot be."""
        directory = self.folder / "kernels"
        Kernels(directory).build()
        return directory

    def gguf(self, weights: str) -> Path:
        """A llama for llama.cpp. weights: `Q8_0` or `Q4_0`, of every matrix."""
        path = self.folder / self.size / f"{weights}.gguf"
        if not path.is_file():
            write_gguf(path, self.config, weights)
        return path

    def llama(self) -> Path:
        """A llama for transformers, in float32."""
        path = self.folder / self.size / "llama"
        if not (path / "tokenizer.json").is_file():
            write_llama(path, self.config)
        return path

    def ctranslate2(self) -> Path:
        """The same converted by CTranslate2's own converter, weights in int8."""
        from ctranslate2.converters import TransformersConverter

        path = self.folder / self.size / "ctranslate2"
        if not (path / "model.bin").is_file():
            TransformersConverter(str(self.llama())).convert(str(path), quantization="int8", force=True)
        return path


def write_gguf(path: Path, config: ExPEConfig, weights: str) -> None:
    """Write a llama of random weights: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md."""
    import gguf

    kinds, random = gguf.GGMLQuantizationType, np.random.default_rng(0)
    width, inner, kv_width = config.hidden_size, config.intermediate_size, config.head_dim * config.num_key_value_heads
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(POSITIONS)
    writer.add_embedding_length(width)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")

    def matrix(name: str, rows: int, columns: int) -> None:
        values = (random.standard_normal((rows, columns)) * DEVIATION).astype(np.float32)
        # What does not divide into blocks is stored in half precision, as llama.cpp's own quantizer does it.
        kind = kinds[weights] if columns % gguf.GGML_QUANT_SIZES[kinds[weights]][0] == 0 else kinds.F16
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(width, dtype=np.float32))

    matrix("token_embd", config.vocab_size, width)
    matrix("output", config.vocab_size, width)
    norm("output_norm")
    for layer in range(config.num_hidden_layers):
        block = f"blk.{layer}"
        norm(f"{block}.attn_norm")
        norm(f"{block}.ffn_norm")
        for part, rows in (("q", width), ("k", kv_width), ("v", kv_width), ("output", width)):
            matrix(f"{block}.attn_{part}", rows, width)
        for part in ("gate", "up"):
            matrix(f"{block}.ffn_{part}", inner, width)
        matrix(f"{block}.ffn_down", width, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_config(config: ExPEConfig) -> Any:
    """Return transformers' configuration of a llama of our model's shape."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        max_position_embeddings=POSITIONS,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        tie_word_embeddings=False,
    )


def write_llama(path: Path, config: ExPEConfig) -> None:
    """Write a llama of random weights, with a tokenizer of numbered words."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    LlamaForCausalLM(llama_config(config)).save_pretrained(path)
    words = {word_of(token): token for token in range(config.vocab_size)}
    tokenizer = Tokenizer(WordLevel(words, unk_token=word_of(0)))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token=word_of(0), bos_token=word_of(0), eos_token=word_of(1)
    ).save_pretrained(path)


def word_of(token: int) -> str:
    """Return how the llama's tokenizer spells a token."""
    return f"t{token}" if token else "<unk>"
