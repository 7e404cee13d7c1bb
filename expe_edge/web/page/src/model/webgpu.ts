import type { InferenceSession, Tensor } from "onnxruntime-web";
import type { Model } from "./model.ts";
import { tokenBytes, type Contract } from "./package.ts";

type Library = typeof import("onnxruntime-web");

/** A graph on the GPU, by onnxruntime's public interface; the cache stays in the GPU's memory. */
export class WebGpuModel implements Model {
  readonly device = "WebGPU";
  length = 0;
  private cache: Record<string, Tensor> = {};
  private logits = new Float32Array();

  private constructor(
    private readonly library: Library,
    private readonly session: InferenceSession,
    readonly contract: Contract,
    private readonly weights: number,
  ) {
    this.reset();
  }

  static async open(library: Library, bytes: Uint8Array, contract: Contract): Promise<WebGpuModel> {
    const present = contract.cache.map((tensor) => [tensor.present, "gpu-buffer"] as const);
    const session = await library.InferenceSession.create(bytes, {
      executionProviders: ["webgpu"],
      preferredOutputLocation: Object.fromEntries(present),
      logSeverityLevel: 3,
    });
    return new WebGpuModel(library, session, contract, bytes.length);
  }

  memory() {
    const cache = this.length * tokenBytes(this.contract);
    return { total: this.weights + cache, cache };
  }

  reset(): void {
    const { cache, headSize, cacheType } = this.contract;
    this.drop();
    this.length = 0;
    for (const { past, heads } of cache) {
      const nothing = cacheType === "int8" ? new Int8Array() : new Float32Array();
      this.cache[past] = new this.library.Tensor(cacheType, nothing, [1, heads, 0, headSize]);
    }
  }

  reserve(): void {}

  async run(tokens: ArrayLike<number>): Promise<Float32Array> {
    const count = tokens.length;
    const total = this.length + count;
    const { vocabSize, windows, cache } = this.contract;
    const lengths = windows.map((window) => [window.lengths, this.int64([this.length], [1])] as const);
    const outputs = await this.session.run({
      input_ids: this.int64(tokens, [1, count]),
      attention_mask: this.int64(new Array(total).fill(1), [1, total]),
      position_ids: this.int64(Array.from({ length: count }, (_, index) => this.length + index), [1, count]),
      ...Object.fromEntries(lengths),
      ...this.cache,
    });
    this.drop();
    for (const { past, present } of cache) this.cache[past] = outputs[present]!;
    this.length = total;
    this.logits = (outputs["logits"]!.data as Float32Array<ArrayBuffer>).slice(-vocabSize);
    return this.logits;
  }

  async close(): Promise<void> {
    this.drop();
    await this.session.release();
  }

  private int64(numbers: ArrayLike<number>, dims: number[]): Tensor {
    return new this.library.Tensor("int64", BigInt64Array.from(Array.from(numbers), BigInt), dims);
  }

  private drop(): void {
    for (const tensor of Object.values(this.cache)) if (tensor.location === "gpu-buffer") tensor.dispose();
    this.cache = {};
  }
}
