"""The light runtime: NumPy, onnxruntime and tokenizers, nothing else.

from expe_edge.runtime import Generator
generator = Generator.load("package/int8-dynamic")  # without a path, the reference model
print(generator.generate(["def main("], max_new_tokens=64)[0].text)
"""

from expe_edge.package.reference import reference_package
from expe_edge.runtime.batch import Batch
from expe_edge.runtime.constraint import Constraint
from expe_edge.runtime.context import Context
from expe_edge.runtime.decoding import Completion, Stream
from expe_edge.runtime.generator import Generator
from expe_edge.runtime.logprobs import Alternative, TokenLogprobs
from expe_edge.runtime.prefixes import Prefixes
from expe_edge.runtime.request import Request
from expe_edge.runtime.sampling import Sampling
from expe_edge.runtime.session import PackageSession
from expe_edge.runtime.window import Window

__all__ = [
    "Alternative",
    "Batch",
    "Completion",
    "Constraint",
    "Context",
    "Generator",
    "PackageSession",
    "Prefixes",
    "Request",
    "Sampling",
    "Stream",
    "TokenLogprobs",
    "Window",
    "reference_package",
]
