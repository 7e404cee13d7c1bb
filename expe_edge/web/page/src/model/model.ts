import type { Contract } from "./package.ts";

/** A graph that has read some tokens. One text at a time. */
export interface Model {
  readonly contract: Contract;
  /** Where it computes, for people. */
  readonly device: string;
  /** Tokens that have been read. */
  readonly length: number;
  /** Bytes of memory: all there is, and the cache's. */
  memory(): { total: number; cache: number };
  /** Forget what has been read, and have room for `capacity` tokens. */
  reset(capacity: number): void;
  /** Have room for `capacity` tokens in all. */
  reserve(capacity: number): void;
  /** Read tokens; return the logits (V) of the last, which hold until the next run. */
  run(tokens: ArrayLike<number>): Promise<Float32Array>;
}
