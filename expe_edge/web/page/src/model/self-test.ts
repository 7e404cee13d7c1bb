import type { Model } from "./model.ts";
import type { SelfTest } from "./package.ts";
import { argmax } from "./sampling.ts";

export interface SelfTestResult {
  agrees: boolean;
  /** Steps at which the model's best token is the exporter's, and all there are. */
  equal: number;
  of: number;
  /** The largest difference of the logits of these tokens. */
  difference: number;
  /** Milliseconds that all steps took together. */
  ms: number;
}

/**
 * Run what the exporter ran, and compare. Every step reads the exporter's token, so that one that differs says nothing
 * of the others. Where two tokens are as likely but for rounding, either may be the best.
 */
export async function selfTest(model: Model, { prompt, tokens, logits, tolerance }: SelfTest): Promise<SelfTestResult> {
  model.reset(prompt.length + tokens.length);
  let [equal, difference, shortfall] = [0, 0, 0];
  let scores = await model.run(prompt);
  const began = performance.now();
  for (const [index, token] of tokens.entries()) {
    const best = argmax(scores);
    if (best === token) equal++;
    difference = Math.max(difference, Math.abs(scores[token]! - logits[index]!));
    shortfall = Math.max(shortfall, scores[best]! - scores[token]!);
    if (index < tokens.length - 1) scores = await model.run([token]);
  }
  const ms = performance.now() - began;
  model.reset(0);
  const agrees = difference <= tolerance && shortfall <= tolerance; // false too where one is NaN
  return { agrees, equal, of: tokens.length, difference, ms };
}
