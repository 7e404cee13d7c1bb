import { makeCache, type Cache } from "./cache.ts";
import type { Bytes } from "./graph/protobuf.ts";
import { withFloatWeights } from "./graph/weights.ts";
import type { Model } from "./model.ts";
import { FLOAT32, INT64, type Buffer, type Pointers, type Runtime } from "./onnxruntime.ts";
import type { Contract, PackageInfo } from "./package.ts";

/** Tokens by which room grows. */
const BLOCK = 256;

/** A graph in WebAssembly, on the tensors of its heap. It is there for as long as its worker. */
export class WasmModel implements Model {
  length = 0;
  private capacity = 0;
  private readonly inputNames: Pointers;
  private readonly outputNames: Pointers;
  private readonly inputs: Pointers;
  private readonly outputs: Pointers;
  private readonly last: Buffer;
  private readonly logits: Buffer;
  private readonly fixed: number[];
  private tokens: Buffer | null = null;
  private mask: Buffer | null = null;
  private readonly cache: Cache;

  private constructor(
    private readonly runtime: Runtime,
    private readonly session: number,
    readonly contract: Contract,
    /** How many weights were restored to floats here. */
    readonly restored: number,
  ) {
    const optional = contract.keepsLast ? ["num_logits_to_keep"] : [];
    const windows = contract.windows.map((window) => window.lengths);
    const past = contract.cache.map((tensor) => tensor.past);
    const given = ["input_ids", "attention_mask", "position_ids", ...windows, ...optional, ...past];
    const present = ["logits", ...contract.cache.map((tensor) => tensor.present)];
    this.inputNames = runtime.names(given);
    this.outputNames = runtime.names(present);
    this.inputs = runtime.pointers(given.length);
    this.outputs = runtime.pointers(present.length);
    this.last = runtime.buffer(8);
    this.last.int64[0] = 1n;
    this.logits = runtime.buffer(4 * contract.vocabSize);
    this.cache = makeCache(runtime, contract);
    this.fixed = [...this.cache.lengths];
    if (contract.keepsLast) this.fixed.push(runtime.tensor(INT64, this.last, []));
  }

  static async open(runtime: Runtime, bytes: Bytes, { contract, floatWeights }: PackageInfo): Promise<WasmModel> {
    // In a portable graph onnxruntime itself restores them, unless it takes them for its slow kernel.
    const settings: Record<string, string> = {};
    if (floatWeights && contract.growing) settings["session.disable_quant_qdq"] = "1";
    const { model, files } = floatWeights ? withFloatWeights(bytes) : { model: bytes, files: new Map() };
    return new WasmModel(runtime, await runtime.open(model, files, settings), contract, files.size);
  }

  get device(): string {
    const { threads } = this.runtime;
    return `WebAssembly, ${threads} thread${threads === 1 ? "" : "s"}`;
  }

  memory() {
    return { total: this.runtime.bytes, cache: this.cache.bytes(this.length) };
  }

  reset(capacity: number): void {
    this.length = 0;
    this.cache.reset();
    this.reserve(capacity);
  }

  reserve(capacity: number): void {
    if (capacity <= this.capacity) return;
    const rounded = Math.ceil(capacity / BLOCK) * BLOCK;
    this.cache.reserve(rounded, this.length);
    this.mask?.free();
    this.mask = this.runtime.buffer(8 * rounded);
    this.mask.int64.fill(1n);
    this.capacity = rounded;
  }

  async run(tokens: ArrayLike<number>): Promise<Float32Array> {
    const count = tokens.length;
    const total = this.length + count;
    this.reserve(total);
    const { ids, positions } = this.write(tokens);
    this.cache.prepare(count);
    const mask = this.runtime.tensor(INT64, this.mask!, [1, total]);
    const { vocabSize, keepsLast } = this.contract;
    const rows = keepsLast ? 1 : count;
    const logits = rows === 1 ? this.runtime.tensor(FLOAT32, this.logits, [1, 1, vocabSize]) : 0;
    this.inputs.set([ids, mask, positions, ...this.fixed, ...this.cache.past]);
    this.outputs.set([logits, ...this.cache.present]);
    try {
      await this.runtime.run(this.session, this.inputNames, this.inputs, this.outputNames, this.outputs);
      if (logits === 0) {
        const made = this.outputs.get(0);
        this.logits.float32.set(this.runtime.lastOf(made, vocabSize, rows * vocabSize));
        this.runtime.release(made);
      }
      this.cache.advance(count, this.outputs);
      this.length = total;
    } finally {
      for (const tensor of [ids, mask, positions, ...(logits ? [logits] : [])]) this.runtime.release(tensor);
    }
    return this.logits.float32;
  }

  /** Write ids and positions of a run; return their tensors. */
  private write(tokens: ArrayLike<number>): { ids: number; positions: number } {
    const count = tokens.length;
    if (this.tokens === null || this.tokens.bytes < 16 * count) {
      this.tokens?.free();
      this.tokens = this.runtime.buffer(16 * Math.max(count, BLOCK));
    }
    const numbers = this.tokens.int64;
    for (let index = 0; index < count; index++) {
      numbers[index] = BigInt(tokens[index]!);
      numbers[count + index] = BigInt(this.length + index);
    }
    const dims = [1, count];
    const ids = this.runtime.tensor(INT64, this.tokens, dims);
    return { ids, positions: this.runtime.tensor(INT64, this.tokens, dims, 8 * count) };
  }
}
