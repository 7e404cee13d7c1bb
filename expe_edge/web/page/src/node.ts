/**
 * The page's model in Node.js: reads one JSON object from standard input, writes one to standard output.
 *
 *     { "directory": "…", "info": {…}, "threads": 1, "prompts": [[0, 1, …], …] or texts, "maxNewTokens": 32 }
 *
 * `info` is what `python -m expe_edge.web.listing PACKAGE` prints.
 */
import { readFileSync } from "node:fs";
import { text as readAll } from "node:stream/consumers";
import { Generator } from "./model/generator.ts";
import { Runtime, type Factory } from "./model/onnxruntime.ts";
import type { PackageInfo } from "./model/package.ts";
import { selfTest } from "./model/self-test.ts";
import { Text } from "./model/text.ts";
import { WasmModel } from "./model/wasm.ts";

interface Order {
  directory: string;
  info: PackageInfo;
  threads?: number;
  prompts: (string | number[])[];
  maxNewTokens: number;
  /** How often all is done; the last completions are reported, and the times of all. */
  rounds?: number;
}

const order = JSON.parse(await readAll(process.stdin)) as Order;
const { directory, info } = order;
const text = new Text(JSON.parse(readFileSync(`${directory}/tokenizer.json`, "utf-8")));
const library = new URL(`../dist/ort-${__ONNXRUNTIME__}/ort-wasm-simd-threaded.mjs`, import.meta.url);
const { default: factory } = (await import(/* @vite-ignore */ library.href)) as { default: Factory };
const runtime = await Runtime.load(factory, order.threads ?? 1);
const model = await WasmModel.open(runtime, new Uint8Array(readFileSync(`${directory}/model.onnx`)), info);
const result = info.selfTest && (await selfTest(model, info.selfTest));
const generator = new Generator(model);
const completions = [];
const times = [];
for (let round = 0; round < (order.rounds ?? 1); round++) {
  completions.length = 0;
  for (const prompt of order.prompts) {
    const ids = typeof prompt === "string" ? text.encode(prompt) : prompt;
    const completion = await generator.generate({
      prompt: ids,
      maxNewTokens: order.maxNewTokens,
      sampling: { temperature: 0, topK: 0, topP: 1, seed: 0 },
      endOfText: info.endOfText,
      stopped: () => false,
    });
    times.push([completion.firstMs, completion.decodeMs]);
    completions.push({ prompt: ids, ...completion, text: text.decode(completion.tokens) });
  }
}
const { restored } = model;
const answer = { completions, times, selfTest: result, memory: model.memory(), restored };
process.stdout.write(JSON.stringify(answer), () => process.exit(0));
