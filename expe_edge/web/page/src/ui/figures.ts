import type { Finished, Memory } from "../messages.ts";
import { element, megabytes } from "./elements.ts";

/** Training lengths that the scale ends at. */
const LONGEST = 64;

export function showSpeed(tokens: number, ms: number): void {
  const speed = tokens > 1 && ms > 0 ? ((tokens - 1) / ms) * 1000 : null;
  element("speed").textContent = speed === null ? "–" : speed.toLocaleString("en", { maximumFractionDigits: 0 });
}

export function showMemory({ total, cache }: Memory): void {
  element("memory").textContent = megabytes(total);
  element("cache").textContent = megabytes(cache);
}

export function showFinished({ tokens, firstMs, decodeMs, memory }: Finished): void {
  showSpeed(tokens, decodeMs);
  showMemory(memory);
  element("first").textContent = firstMs > 0 ? `${firstMs.toLocaleString("en", { maximumFractionDigits: 0 })} ms` : "–";
}

/** Show how far the text has come, in training lengths. */
export function showPosition(position: number, trainingLength: number): void {
  const lengths = position / trainingLength;
  const text = `${position.toLocaleString("en")} tokens, ${lengths.toFixed(1)} N; N = ${trainingLength.toLocaleString("en")}`;
  const meter = element("position");
  meter.ariaValueMax = String(LONGEST * trainingLength);
  meter.ariaValueNow = String(Math.min(position, LONGEST * trainingLength));
  meter.ariaValueText = text;
  element("position-bar").style.width = `${Math.min(1, Math.log(1 + lengths) / Math.log(1 + LONGEST)) * 100}%`;
  element("position-text").textContent = text;
}
