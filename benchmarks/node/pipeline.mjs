/**
 * Greedy text and tokens by transformers.js, of a package as it was exported.
 *
 *     { "directory": "…/int8-dynamic", "prompts": ["…", …], "maxNewTokens": 32, "threads": 1 }
 *
 * `texts` come from the pipeline, `tokens` from the model that it holds, all prompts in one batch padded on the left.
 */
import { basename, dirname, resolve } from "node:path";
import { env, pipeline } from "@huggingface/transformers";
import { answer, readOrder } from "./order.mjs";

const order = await readOrder();
const directory = resolve(order.directory);
env.allowRemoteModels = false;
env.localModelPath = dirname(directory);

const generator = await pipeline("text-generation", basename(directory), {
  subfolder: "",
  session_options: { intraOpNumThreads: order.threads ?? 1, logSeverityLevel: 3 },
});
const settings = { max_new_tokens: order.maxNewTokens, do_sample: false };
const written = await generator(order.prompts, { ...settings, return_full_text: false });
const { tokenizer, model } = generator;
tokenizer.padding_side = "left";
const inputs = tokenizer(order.prompts, { padding: true });
const output = (await model.generate({ ...inputs, ...settings })).tolist().map((row) => row.map(Number));
const length = inputs.input_ids.dims[1];
answer({
  texts: written.map(([{ generated_text }]) => generated_text),
  prompts: inputs.input_ids.tolist().map((row) => row.map(Number)),
  tokens: output.map((row) => row.slice(length)),
});
