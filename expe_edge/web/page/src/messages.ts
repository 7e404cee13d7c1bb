import type { Completion } from "./model/generator.ts";
import type { PackageInfo } from "./model/package.ts";
import type { Sampling } from "./model/sampling.ts";
import type { SelfTestResult } from "./model/self-test.ts";

export type Device = "wasm" | "webgpu";

/** What the page asks of the worker. */
export type Order =
  | { type: "load"; info: PackageInfo; device: Device; threads: number }
  | { type: "generate"; prompt: string; goOn: boolean; maxNewTokens: number; sampling: Sampling }
  | { type: "self-test" }
  | { type: "stop" };

export interface Memory {
  total: number;
  cache: number;
}

export interface Finished {
  finish: Completion["finish"];
  tokens: number;
  firstMs: number;
  decodeMs: number;
  position: number;
  memory: Memory;
}

/** What the worker tells the page. */
export type Report =
  | { type: "download"; bytes: number; of: number }
  | { type: "opening" }
  | { type: "loaded"; device: string; refused: string | null; tested: SelfTestResult | null; prompt: string }
  | { type: "tested"; result: SelfTestResult | null }
  | { type: "prompt"; read: number; of: number }
  | { type: "text"; piece: string; tokens: number; ms: number; position: number; memory: Memory }
  | ({ type: "done" } & Finished)
  | { type: "failed"; message: string };
