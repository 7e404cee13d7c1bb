/**
 * How long onnxruntime-node takes for greedy tokens, with a cache that grows, by its own interface.
 *
 *     { "directory": "…", "prompts": [[0, 1, …], …], "maxNewTokens": 32, "threads": 1, "rounds": 1 }
 *
 * The completions of the last round are reported, and the times of all.
 */
import * as ort from "onnxruntime-node";

import { Loop } from "./loop.mjs";
import { answer, readOrder } from "./order.mjs";

const { directory, prompts, maxNewTokens, threads = 1, rounds = 1 } = await readOrder();
const loop = await Loop.open(ort, directory, { threads, lastLogits: true });
const times = [];
let completions = [];
for (let round = 0; round < rounds; round++) {
  completions = [];
  for (const prompt of prompts) {
    const began = performance.now();
    const arrivals = [];
    const [[tokens]] = await loop.generate(prompt, maxNewTokens, () => arrivals.push(performance.now()));
    times.push([arrivals[0] - began, performance.now() - arrivals[0]]);
    completions.push({ tokens });
  }
}
answer({ completions, times });
