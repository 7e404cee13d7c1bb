/** Runs one package; the page makes another worker for the next, and all memory goes with the first. */
import { download } from "./download.ts";
import type { Device, Order, Report } from "./messages.ts";
import { Generator } from "./model/generator.ts";
import type { Bytes } from "./model/graph/protobuf.ts";
import type { Model } from "./model/model.ts";
import { Runtime, type Factory } from "./model/onnxruntime.ts";
import type { PackageInfo } from "./model/package.ts";
import { selfTest, type SelfTestResult } from "./model/self-test.ts";
import { Text, TextStream } from "./model/text.ts";
import { WasmModel } from "./model/wasm.ts";
import { WebGpuModel } from "./model/webgpu.ts";

/** Milliseconds between pieces of text, and between looks at what the page asks. */
const TELL_MS = 33;
const LOOK_MS = 8;

/** The site's address; the worker's own file is in `assets/`. */
const SITE = new URL("../", self.location.href).href;

interface Loaded {
  info: PackageInfo;
  text: Text;
  model: Model;
  generator: Generator;
  /** Tokens of the text so far. */
  tokens: number[];
}

let loaded: Loaded | null = null;
let stopping = false;

const tell = (report: Report) => self.postMessage(report);

self.onmessage = async ({ data }: MessageEvent<Order>) => {
  stopping = data.type === "stop";
  try {
    if (data.type === "load") await load(data.info, data.device, data.threads);
    if (data.type === "generate") await generate(data);
    if (data.type === "self-test") tell({ type: "tested", result: await test() });
  } catch (error) {
    tell({ type: "failed", message: reasonOf(error) });
  }
};

async function load(info: PackageInfo, device: Device, threads: number): Promise<void> {
  const { model: bytes, tokenizer } = await download(SITE, info, (come, of) =>
    tell({ type: "download", bytes: come, of }),
  );
  tell({ type: "opening" });
  const text = new Text(tokenizer as ConstructorParameters<typeof Text>[0]);
  const { model, tested, refused } = await openTested(info, bytes, device, threads);
  loaded = { info, text, model, generator: new Generator(model), tokens: [] };
  tell({ type: "loaded", device: model.device, refused, tested, prompt: beginning(text, info) });
}

/** A prompt to begin with: the self-test's, but for what may be half a word. */
function beginning(text: Text, info: PackageInfo): string {
  const prompt = text.decode(info.selfTest?.prompt ?? []);
  return prompt.replace(/\s*\S+\s*$/, "") || prompt;
}

/** Open a graph where it is asked for, or in WebAssembly where its self-test fails there, and say why. */
async function openTested(info: PackageInfo, bytes: Bytes, device: Device, threads: number) {
  let refused: string | null = null;
  if (device === "webgpu") {
    try {
      const model = await openWebGpu(info, bytes);
      const tested = await tryTest(model, info);
      if (tested?.agrees) return { model, tested, refused };
      await model.close();
      refused = tested
        ? `its logits are off by ${tested.difference.toPrecision(2)}`
        : "the package holds nothing to compare with";
    } catch (error) {
      refused = reasonOf(error);
    }
  }
  const model = await WasmModel.open(await wasmRuntime(threads), bytes, info);
  return { model, tested: await tryTest(model, info), refused };
}

async function tryTest(model: Model, info: PackageInfo): Promise<SelfTestResult | null> {
  return info.selfTest && (await selfTest(model, info.selfTest));
}

async function test(): Promise<SelfTestResult | null> {
  const { model, info } = required();
  const result = await tryTest(model, info);
  loaded!.generator = new Generator(model); // the cache is empty now
  return result;
}

async function wasmRuntime(threads: number): Promise<Runtime> {
  const module = await import(/* @vite-ignore */ `${SITE}ort-${__ONNXRUNTIME__}/ort-wasm-simd-threaded.mjs`);
  return Runtime.load(module.default as Factory, threads);
}

async function openWebGpu(info: PackageInfo, bytes: Uint8Array): Promise<WebGpuModel> {
  const folder = `${SITE}ort-webgpu-${__ONNXRUNTIME__}/`;
  const library = await import(/* @vite-ignore */ `${folder}ort.webgpu.min.mjs`);
  library.env.wasm.wasmPaths = folder;
  library.env.wasm.numThreads = 1;
  return WebGpuModel.open(library, bytes, info.contract);
}

async function generate(order: Extract<Order, { type: "generate" }>): Promise<void> {
  const { info, text, model, generator, tokens } = required();
  if (!order.goOn) tokens.splice(0, tokens.length, ...text.encode(order.prompt));
  if (tokens.length === 0) throw new Error("the prompt is empty");
  const maxNewTokens = Math.min(order.maxNewTokens, info.reach - tokens.length);
  if (maxNewTokens < 1) throw new Error(`the text is as long as the encoding reaches, ${info.reach} tokens`);
  const stream = new TextStream(text);
  let [piece, count, first, told, looked] = ["", 0, 0, 0, performance.now()];
  const tellText = (now: number) => {
    const position = tokens.length + count;
    tell({ type: "text", piece, tokens: count, ms: now - first, position, memory: model.memory() });
    [piece, told] = ["", now];
  };
  const completion = await generator.generate({
    prompt: tokens,
    maxNewTokens,
    sampling: order.sampling,
    endOfText: info.endOfText,
    onPrompt: (read, of) => tell({ type: "prompt", read, of }),
    onToken: (token) => {
      const now = performance.now();
      if (count++ === 0) first = now;
      piece += stream.push(token);
      if (now - told >= TELL_MS) tellText(now);
    },
    stopped: async () => {
      if (performance.now() - looked < LOOK_MS) return false;
      await nextTask();
      looked = performance.now();
      return stopping;
    },
  });
  piece += stream.finish();
  tellText(performance.now());
  tokens.push(...completion.tokens);
  const { finish, firstMs, decodeMs } = completion;
  const report = { finish, firstMs, decodeMs, tokens: completion.tokens.length, position: tokens.length };
  tell({ type: "done", ...report, memory: model.memory() });
}

function reasonOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

function required(): Loaded {
  if (loaded === null) throw new Error("no package is loaded");
  return loaded;
}

const { port1, port2 } = new MessageChannel();

/** Let what has been sent to the worker be received; a timer would wait for four milliseconds. */
function nextTask(): Promise<void> {
  return new Promise((resolve) => {
    port1.onmessage = () => resolve();
    port2.postMessage(null);
  });
}
