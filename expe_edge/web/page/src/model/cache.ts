/** The tensors of a cache in WebAssembly's heap. */
import { FLOAT32, INT8, INT64, type Buffer, type Pointers, type Runtime } from "./onnxruntime.ts";
import { CHUNK, tokenBytes, type Contract } from "./package.ts";

export interface Cache {
  readonly past: readonly number[];
  /** Outputs; 0 for those that onnxruntime makes. */
  readonly present: readonly number[];
  /** How many tokens each window holds, an input. */
  readonly lengths: readonly number[];
  /** Bytes that it takes for `length` tokens. */
  bytes(length: number): number;
  reset(): void;
  /** Have room for `capacity` tokens, of which `length` are there. */
  reserve(capacity: number, length: number): void;
  /** Have room in windows for a run of `tokens`. */
  prepare(tokens: number): void;
  /** Take what a run of `tokens` has put out. */
  advance(tokens: number, outputs: Pointers): void;
}

export function makeCache(runtime: Runtime, contract: Contract): Cache {
  return contract.growing ? new GrowingCache(runtime, contract) : new SharedCache(runtime, contract);
}

/**
 * Past and present are one buffer, which runs append to; nothing is copied. Heads with a window have room for it and
 * one run; where that is full, what they still see moves to its beginning.
 */
class SharedCache implements Cache {
  past: number[] = [];
  readonly lengths: readonly number[];
  private readonly buffers: Buffer[] = [];
  private readonly type: number;
  /** Bytes of a key or value. */
  private readonly column: number;
  private capacity = 0;
  /** Tokens that each window holds, the last ones; and the same where the graph reads them. */
  private kept: number[];
  private readonly counts: Buffer;

  constructor(
    private readonly runtime: Runtime,
    private readonly contract: Contract,
  ) {
    const { cacheType, headSize, windows } = contract;
    this.type = cacheType === "int8" ? INT8 : FLOAT32;
    this.column = headSize * (cacheType === "int8" ? 1 : 4);
    this.kept = windows.map(() => 0);
    this.counts = runtime.buffer(8 * windows.length);
    this.lengths = windows.map((_, index) => runtime.tensor(INT64, this.counts, [1], 8 * index));
  }

  get present(): readonly number[] {
    return this.past;
  }

  bytes(): number {
    return this.buffers.reduce((sum, { bytes }) => sum + bytes, 0);
  }

  reset(): void {
    this.kept.fill(0);
  }

  reserve(capacity: number, length: number): void {
    const { cache, headSize } = this.contract;
    cache.forEach(({ heads, window }, index) => {
      const [columns, earlier] = [this.room(window, capacity), this.room(window, this.capacity)];
      if (columns === earlier) return;
      const grown = this.runtime.buffer(heads * columns * this.column);
      grown.uint8.fill(0);
      const before = this.buffers[index];
      if (before) {
        const held = window === null ? length : this.kept[window]!;
        for (let head = 0; head < heads; head++) {
          const begin = head * earlier * this.column;
          grown.uint8.set(before.uint8.subarray(begin, begin + held * this.column), head * columns * this.column);
        }
        this.runtime.release(this.past[index]!);
        before.free();
      }
      this.buffers[index] = grown;
      this.past[index] = this.runtime.tensor(this.type, grown, [1, heads, columns, headSize]);
    });
    this.capacity = capacity;
  }

  prepare(tokens: number): void {
    if (tokens > CHUNK) throw new RangeError(`${tokens} tokens are more than the ${CHUNK} of a run`);
    this.kept.forEach((held, window) => {
      if (held + tokens > this.room(window, this.capacity)) this.forget(window);
    });
    this.counts.int64.set(this.kept.map(BigInt));
  }

  advance(tokens: number): void {
    this.kept = this.kept.map((held) => held + tokens);
  }

  /** Columns of the heads with a window, or without, in a cache for `capacity` tokens. */
  private room(window: number | null, capacity: number): number {
    return window === null ? capacity : Math.min(capacity, this.contract.windows[window]!.tokens + CHUNK);
  }

  /** Move what the heads of a window see to the beginning. */
  private forget(window: number): void {
    const held = this.kept[window]!;
    const seen = Math.min(held, this.contract.windows[window]!.tokens);
    const columns = this.room(window, this.capacity);
    this.contract.cache.forEach((tensor, index) => {
      if (tensor.window !== window) return;
      const bytes = this.buffers[index]!.uint8;
      for (let head = 0; head < tensor.heads; head++) {
        const begin = head * columns;
        const end = begin + held;
        bytes.copyWithin(begin * this.column, (end - seen) * this.column, end * this.column);
      }
    });
    this.kept[window] = seen;
  }
}

/** The graph itself makes the present of the past; its tensors are the next run's past. */
class GrowingCache implements Cache {
  past: number[];
  readonly present: readonly number[];
  readonly lengths = [];
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

  prepare(): void {}

  advance(_: number, outputs: Pointers): void {
    this.drop();
    this.past = this.present.map((_, index) => outputs.get(index + 1));
  }

  private drop(): void {
    for (const tensor of this.past) if (!this.empty.includes(tensor)) this.runtime.release(tensor);
  }
}
