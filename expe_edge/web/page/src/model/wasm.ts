import type { Bytes } from "./graph/protobuf.ts";
import { withFloatWeights } from "./graph/weights.ts";
import type { Model } from "./model.ts";
import { FLOAT32, INT8, INT64, type Buffer, type Pointers, type Runtime } from "./onnxruntime.ts";
import { tokenBytes, type Contract, type PackageInfo } from "./package.ts";

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
  private readonly fixed: number[] = [];
  private readonly lengths: Buffer;
  private tokens: Buffer | null = null;
  private mask: Buffer | null = null;
  private cache: Cache;

  private constructor(
    private readonly runtime: Runtime,
    private readonly session: number,
    readonly contract: Contract,
    /** How many weights were restored to floats here. */
    readonly restored: number,
  ) {
    const optional = contract.keepsLast ? ["num_logits_to_keep"] : [];
    const past = contract.cache.map((tensor) => tensor.past);
    const given = ["input_ids", "attention_mask", "position_ids", ...contract.windowLengths, ...optional, ...past];
    const present = ["logits", ...contract.cache.map((tensor) => tensor.present)];
    this.inputNames = runtime.names(given);
    this.outputNames = runtime.names(present);
    this.inputs = runtime.pointers(given.length);
    this.outputs = runtime.pointers(present.length);
    this.lengths = runtime.buffer(8);
    this.last = runtime.buffer(8);
    this.last.int64[0] = 1n;
    this.logits = runtime.buffer(4 * contract.vocabSize);
    this.fixed = contract.windowLengths.map(() => runtime.tensor(INT64, this.lengths, [1]));
    if (contract.keepsLast) this.fixed.push(runtime.tensor(INT64, this.last, []));
    this.cache = contract.growing ? new GrowingCache(runtime, contract) : new SharedCache(runtime, contract);
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
    this.lengths.int64[0] = BigInt(this.length);
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
      this.cache.advance(this.outputs);
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

/** The tensors of a cache. */
interface Cache {
  readonly past: readonly number[];
  /** Outputs; 0 for those that onnxruntime makes. */
  readonly present: readonly number[];
  /** How many it takes for `length` tokens. */
  bytes(length: number): number;
  reset(): void;
  /** Have room for `capacity` tokens, of which `length` are there. */
  reserve(capacity: number, length: number): void;
  /** Take what a run has put out. */
  advance(outputs: Pointers): void;
}

/** Past and present are one buffer, which runs append to; nothing is copied. */
class SharedCache implements Cache {
  past: number[] = [];
  private buffers: Buffer[] = [];
  private capacity = 0;

  constructor(
    private readonly runtime: Runtime,
    private readonly contract: Contract,
  ) {}

  get present(): readonly number[] {
    return this.past;
  }

  bytes(): number {
    return this.capacity * tokenBytes(this.contract);
  }

  reset(): void {}

  reserve(capacity: number, length: number): void {
    const { cache, headSize, cacheType } = this.contract;
    const type = cacheType === "int8" ? INT8 : FLOAT32;
    const column = headSize * (type === INT8 ? 1 : 4);
    cache.forEach(({ heads }, index) => {
      const grown = this.runtime.buffer(heads * capacity * column);
      grown.uint8.fill(0);
      const before = this.buffers[index];
      for (let head = 0; before && head < heads; head++) {
        const begin = head * this.capacity * column;
        grown.uint8.set(before.uint8.subarray(begin, begin + length * column), head * capacity * column);
      }
      if (before) {
        this.runtime.release(this.past[index]!);
        before.free();
      }
      this.buffers[index] = grown;
      this.past[index] = this.runtime.tensor(type, grown, [1, heads, capacity, headSize]);
    });
    this.capacity = capacity;
  }

  advance(): void {}
}

/** The graph itself makes the present of the past; its tensors are the next run's past. */
class GrowingCache implements Cache {
  past: number[];
  readonly present: readonly number[];
  private readonly empty: readonly number[];

  constructor(
    private readonly runtime: Runtime,
    private readonly contract: Contract,
  ) {
    const { cache, headSize, cacheType } = contract;
    const type = cacheType === "int8" ? INT8 : FLOAT32;
    const nothing = runtime.buffer(1);
    this.empty = cache.map(({ heads }) => runtime.tensor(type, nothing, [1, heads, 0, headSize]));
    this.past = [...this.empty];
    this.present = cache.map(() => 0);
  }

  bytes(length: number): number {
    return length * tokenBytes(this.contract);
  }

  reset(): void {
    this.drop();
    this.past = [...this.empty];
  }

  reserve(): void {}

  advance(outputs: Pointers): void {
    this.drop();
    this.past = this.present.map((_, index) => outputs.get(index + 1));
  }

  private drop(): void {
    for (const tensor of this.past) if (!this.empty.includes(tensor)) this.runtime.release(tensor);
  }
}
