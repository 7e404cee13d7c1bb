"""What suits the place that a package is for: the options that `--target` fills in, and why. Given ones win."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from expe_edge.errors import ExportError, unknown_name


class Choice(NamedTuple):
    """A value of an option of `Recipe`, and why it suits the place."""

    value: Any
    reason: str


_PHONE = {
    "precision": Choice(
        "int4-weight", "a step reads all weights, and memory is what phones are slow at; Arm has kernels for it"
    ),
    "block_size": Choice(32, "Arm's fastest 4-bit kernels, KleidiAI's, take multiples of 32"),
    "ort_format": Choice(True, "a runtime with these operators alone takes less of an app, and reads no other format"),
}
#: Options that have a meaning for some precisions alone.
OF_PRECISION = ("block_size", "reduce_range")
#: Places by name.
TARGETS: Mapping[str, Mapping[str, Choice]] = {
    "android": _PHONE,
    "ios": _PHONE,
    "web": {
        "precision": Choice("int8-dynamic", "WebAssembly has fast products of 8 bits, and slow ones of 4"),
        "reduce_range": Choice(True, "weights of 7 bits have the faster kernel there"),
        "cache": Choice("float32", "WebGPU has no buffers of 8 bits for a cache"),
    },
    "server": {
        "precision": Choice("int8-static", "a text's tokens do not depend on the others of its batch"),
        "cache": Choice("int8", "keys and values of many texts take a quarter of the memory"),
    },
    "cuda": {
        "device": Choice("cuda", "attention that onnxruntime's CUDA provider has a kernel for"),
        "precision": Choice("float16", "half the bytes of float32, and a GPU's own products"),
    },
}


def chosen_for(target: str, given: Collection[str]) -> dict[str, Choice]:
    """Return the options that a target chooses, but for those that are `given`.

    Raises:
        ExportError: an unknown target.
    """
    if target not in TARGETS:
        raise ExportError(unknown_name("target", target, TARGETS) + "; change `target`")
    settled = {*given, *(OF_PRECISION if "precision" in given else ())}
    return {name: choice for name, choice in TARGETS[target].items() if name not in settled}
