"""What a card says of loading a package: what it takes, and the commands for the clients that run such a package."""

from __future__ import annotations

from expe_edge.package.manifest import Manifest

OURS = """This project's generator, which needs no torch:

    pip install expe-edge huggingface-hub
    hf download OWNER/NAME --local-dir model
    expe-edge generate model --prompt 'Once upon a time'"""
ON_GPU = """This project's generator, on a GPU; without `--device` on a CPU:

    pip install expe-edge huggingface-hub 'onnxruntime-gpu[cuda,cudnn]'
    hf download OWNER/NAME --local-dir model
    expe-edge generate model --device cuda --prompt 'Once upon a time'"""
OPTIMUM = """Optimum:

```python
from optimum.onnxruntime import ORTModelForCausalLM
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("model", padding_side="left")
model = ORTModelForCausalLM.from_pretrained("model")
inputs = tokenizer(["Once upon a time"], return_tensors="pt")
print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=32, max_length=None, do_sample=False)))
```"""
GENAI = """onnxruntime-genai, whose tokenizer leaves the opening token to you:

```python
import numpy as np
import onnxruntime_genai as og

model = og.Model("model")
tokenizer = og.Tokenizer(model)
parameters = og.GeneratorParams(model)
parameters.set_search_options(do_sample=False, max_length=64)
generator = og.Generator(model, parameters)
generator.append_tokens(np.array([[tokenizer.bos_token_id, *tokenizer.encode("Once upon a time")]], dtype=np.int32))
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)))
```"""
TRANSFORMERS_JS = """transformers.js:

```js
import { env, pipeline } from "@huggingface/transformers";

env.localModelPath = ".";
env.allowRemoteModels = false;
const generator = await pipeline("text-generation", "model", { subfolder: "" });
const [{ generated_text }] = await generator("Once upon a time", { max_new_tokens: 32, do_sample: false });
console.log(generated_text);
```"""


def usage(manifest: Manifest) -> str:
    """Return the sections on what loading takes and on the clients that run the package."""
    return "\n\n".join(["## What it needs", _needs(manifest), "## Use", *_commands(manifest)])


def _needs(manifest: Manifest) -> str:
    operators = (
        "operators of the ONNX standard alone"
        if manifest.recipe.get("portable")
        else "operators of ONNX and of onnxruntime (`com.microsoft`)"
    )
    return (
        f"No code of this repository is run: `model.onnx` has {operators}, and onnxruntime "
        f"{manifest.requires_onnxruntime} or newer runs it. {_other_clients(manifest)} Every text is opened by the "
        "end-of-text token, as `tokenizer.json` does by itself."
    )


def _other_clients(manifest: Manifest) -> str:
    if manifest.contract.windows:
        return "Its heads keep windows of their keys and values, which the generator of `expe-edge` alone does."
    if manifest.contract.whole_buffer:
        return (
            "Its attention reads all of the buffer that a client keeps its cache in, which Optimum and transformers.js "
            "have not; they refuse it."
        )
    if manifest.contract.cache_dtype == "int8":
        return "Its key/value cache is int8, which Optimum and transformers.js have not; they refuse it."
    return "`config.json` names the type `llama` for the shape of the cache, which Optimum and transformers.js look up."


def _commands(manifest: Manifest) -> list[str]:
    ours = ON_GPU if manifest.contract.whole_buffer else OURS
    if manifest.contract.windows:
        return [ours]
    if manifest.contract.whole_buffer or manifest.contract.cache_dtype == "int8":
        return [ours, GENAI]
    return [ours, OPTIMUM, GENAI, TRANSFORMERS_JS]
