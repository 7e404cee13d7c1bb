/** A package as the site lists it: what of its manifest the page needs. `expe_edge/web/site.py` writes it. */
export interface PackageInfo {
  name: string;
  directory: string;
  precision: string;
  /** What a person should know to choose it. */
  note: string;
  /** N, tokens. */
  trainingLength: number;
  /** Positions that the encoding has. */
  reach: number;
  endOfText: number | null;
  contract: Contract;
  /** Whether weights in blocks are restored when WebAssembly opens the graph. */
  floatWeights: boolean;
  files: Record<"model.onnx" | "tokenizer.json", FileInfo>;
  selfTest: SelfTest | null;
}

/** The graph's inputs and outputs, by `expe_edge/package/contract.py`. */
export interface Contract {
  vocabSize: number;
  headSize: number;
  cacheType: "float32" | "int8";
  /** Whether present is past with the new keys appended, and not one buffer with it. */
  growing: boolean;
  /** Tensors of the cache, in order; window: which, of heads that have one. */
  cache: { past: string; present: string; heads: number; window: number | null }[];
  /** How many tokens heads see and keep, and the input that says how many they hold. */
  windows: { tokens: number; lengths: string }[];
  /** Whether the graph can be asked for the last token's logits alone. */
  keepsLast: boolean;
  /** Query heads whose scores a run holds at once. */
  heads: number;
}

export interface FileInfo {
  bytes: number;
  sha256: string;
}

/** What the exporter computed: greedy tokens that follow a prompt, and their logits. */
export interface SelfTest {
  prompt: number[];
  tokens: number[];
  logits: number[];
  /** By how much logits may differ. */
  tolerance: number;
}

/** Tokens read at once, and bounds of their scores: those of `expe_edge/runtime/memory.py`, so that results are too. */
export const CHUNK = 256;
const LEAST_CHUNK = 64;
const MOST_SCORES = 2 ** 24;

/** How many tokens to read at once behind `depth` others. */
export function chunkAt(depth: number, heads: number): number {
  const most = Math.floor(MOST_SCORES / (heads * (depth + CHUNK)) / LEAST_CHUNK) * LEAST_CHUNK;
  return Math.min(CHUNK, Math.max(LEAST_CHUNK, most));
}

/** Bytes that a token takes in the cache. */
export function tokenBytes(contract: Contract): number {
  const item = contract.cacheType === "int8" ? 1 : 4;
  return contract.cache.reduce((sum, { heads }) => sum + heads, 0) * contract.headSize * item;
}
