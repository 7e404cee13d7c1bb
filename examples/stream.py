"""Stream text from a package: `python examples/stream.py demo/package/int8-dynamic 'def read_file(path):'`."""

import sys

from expe_edge.runtime import Generator, Sampling

if len(sys.argv) != 3:
    sys.exit(__doc__)
package, prompt = sys.argv[1:]
generator = Generator.load(package)
stream = generator.stream(prompt, max_new_tokens=200, sampling=Sampling(temperature=0.7, top_p=0.95, seed=0))
for piece in stream:
    print(piece, end="", flush=True)
completion = stream.completion
speed = len(completion.tokens) / max(completion.decode_seconds, 1e-9)
print(f"\n[{completion.finish_reason}, {speed:.0f} tokens/s]", file=sys.stderr)
