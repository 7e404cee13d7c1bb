/**
 * Greedy tokens by onnxruntime-node's own interface, with a cache that grows, and how long they took.
 *
 *     { "directory": "…", "prompts": [[0, 1, …], …], "maxNewTokens": 32, "threads": 1, "rounds": 1 }
 *
 * The completions of the last round are reported, and the times of all.
 */
import { readFileSync } from "node:fs";
import ort from "onnxruntime-node";
import { answer, readOrder } from "./order.mjs";

const order = await readOrder();
const manifest = JSON.parse(readFileSync(`${order.directory}/expe_edge.json`, "utf-8"));
const { layers, key_value_heads: heads, head_size: size, vocab_size: vocabulary, cache_dtype: type } = manifest.contract;
/** null: texts end at no token. */
const endOfText = "endOfText" in order ? order.endOfText : manifest.model.eos_token_id;
const session = await ort.InferenceSession.create(`${order.directory}/model.onnx`, {
  intraOpNumThreads: order.threads ?? 1,
  logSeverityLevel: 3,
});
const names = Array.from({ length: layers }, (_, layer) => [`${layer}.key`, `${layer}.value`]).flat();

const int64 = (numbers, dims) => new ort.Tensor("int64", BigInt64Array.from(numbers, BigInt), dims);
const nothing = () => new ort.Tensor(type, type === "int8" ? new Int8Array() : new Float32Array(), [1, heads, 0, size]);

function best(scores) {
  let index = 0;
  for (let other = 1; other < scores.length; other++) if (scores[other] > scores[index]) index = other;
  return index;
}

const times = [];

async function generate(prompt) {
  const began = performance.now();
  let [past, run, first] = [0, prompt, 0];
  let cache = Object.fromEntries(names.map((name) => [`past_key_values.${name}`, nothing()]));
  const tokens = [];
  while (tokens.length < order.maxNewTokens) {
    const outputs = await session.run({
      input_ids: int64(run, [1, run.length]),
      attention_mask: int64(new Array(past + run.length).fill(1), [1, past + run.length]),
      position_ids: int64(Array.from(run, (_, index) => past + index), [1, run.length]),
      num_logits_to_keep: int64([1], []),
      ...cache,
    });
    past += run.length;
    cache = Object.fromEntries(names.map((name) => [`past_key_values.${name}`, outputs[`present.${name}`]]));
    run = [best(outputs.logits.data.subarray(-vocabulary))];
    if (tokens.length === 0) first = performance.now();
    tokens.push(run[0]);
    if (run[0] === endOfText) break;
  }
  times.push([first - began, performance.now() - first]);
  return { tokens };
}

let completions = [];
for (let round = 0; round < (order.rounds ?? 1); round++) {
  completions = [];
  for (const prompt of order.prompts) completions.push(await generate(prompt));
}
answer({ completions, times });
