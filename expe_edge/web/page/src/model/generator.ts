import type { Model } from "./model.ts";
import { chunkAt } from "./package.ts";
import { Sampler, type Sampling } from "./sampling.ts";

export interface Request {
  prompt: readonly number[];
  maxNewTokens: number;
  sampling: Sampling;
  endOfText: number | null;
  /** Called before every run; what is true ends the text. */
  stopped: () => boolean | Promise<boolean>;
  /** Called when a chunk of the prompt has been read. */
  onPrompt?: (read: number, of: number) => void;
  onToken?: (token: number) => void;
}

export interface Completion {
  /** End-of-text too, where it was chosen. */
  tokens: number[];
  finish: "end_of_text" | "length" | "stopped";
  /** Milliseconds until the first token was there, and from there to the last. */
  firstMs: number;
  decodeMs: number;
}

/** Continues texts with a model, whose cache is kept for the text that goes on with the last. */
export class Generator {
  /** What the model has read. */
  private read: number[] = [];

  constructor(readonly model: Model) {}

  /** Continue a prompt, token by token. */
  async generate(request: Request): Promise<Completion> {
    const { prompt, maxNewTokens } = request;
    const began = performance.now();
    this.prepare(prompt, maxNewTokens);
    let logits = await this.readPrompt(request);
    const sampler = new Sampler(request.sampling);
    const tokens: number[] = [];
    let first = began;
    const done = (finish: Completion["finish"]): Completion => ({
      tokens,
      finish,
      firstMs: first - began,
      decodeMs: tokens.length > 1 ? performance.now() - first : 0,
    });
    while (logits !== null) {
      const token = sampler.choose(logits);
      if (tokens.length === 0) first = performance.now();
      tokens.push(token);
      if (token === request.endOfText) return done("end_of_text");
      request.onToken?.(token);
      if (tokens.length === maxNewTokens) return done("length");
      logits = (await request.stopped()) ? null : await this.step([token]);
    }
    return done("stopped");
  }

  /** Have room, and an empty cache unless it is of the prompt's beginning. */
  private prepare(prompt: readonly number[], maxNewTokens: number): void {
    const capacity = prompt.length + maxNewTokens;
    const goesOn = this.read.length < prompt.length && this.read.every((token, index) => token === prompt[index]);
    if (goesOn && this.read.length > 0) {
      this.model.reserve(capacity);
    } else {
      this.read = [];
      this.model.reset(capacity);
    }
  }

  /** Read what is not in the cache, in chunks; null where it is stopped. */
  private async readPrompt({ prompt, stopped, onPrompt }: Request): Promise<Float32Array | null> {
    let logits: Float32Array | null = null;
    while (this.read.length < prompt.length) {
      if (await stopped()) return null;
      const begin = this.read.length;
      logits = await this.step(prompt.slice(begin, begin + chunkAt(begin, this.model.contract.heads)));
      onPrompt?.(this.read.length, prompt.length);
    }
    return logits;
  }

  private async step(tokens: readonly number[]): Promise<Float32Array> {
    const logits = await this.model.run(tokens);
    this.read.push(...tokens);
    return logits;
  }
}
