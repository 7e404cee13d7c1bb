export interface Sampling {
  /** 0 for the likeliest token, always. */
  temperature: number;
  /** How many of the likeliest tokens are left in; 0 for all. */
  topK: number;
  /** The likeliest tokens are left in whose probabilities reach it; 1 for all. */
  topP: number;
  seed: number;
}

/** Chooses tokens, the same ones for the same seed. */
export class Sampler {
  private readonly random: () => number;

  constructor(private readonly sampling: Sampling) {
    this.random = uniform(sampling.seed);
  }

  choose(logits: Float32Array): number {
    const { temperature, topK, topP } = this.sampling;
    const best = argmax(logits);
    if (temperature === 0 || topK === 1) return best;
    const ids = topK > 0 && topK < logits.length ? likeliest(logits, topK) : null;
    let tokens = ids ?? Uint32Array.from(logits, (_, id) => id);
    let weights = Float64Array.from(tokens, (id) => Math.exp((logits[id]! - logits[best]!) / temperature));
    if (topP < 1) ({ tokens, weights } = nucleus(tokens, weights, topP));
    return tokens[draw(weights, this.random())]!;
  }
}

/** The index of the largest number, the first of equal ones. */
export function argmax(numbers: Float32Array): number {
  let best = 0;
  for (let index = 1; index < numbers.length; index++) if (numbers[index]! > numbers[best]!) best = index;
  return best;
}

/** The `count` tokens of the largest logits, and those that are equal to the last of them. */
function likeliest(logits: Float32Array, count: number): Uint32Array<ArrayBuffer> {
  const sorted = logits.slice().sort();
  const least = sorted[sorted.length - count]!;
  return Uint32Array.from([...logits.keys()].filter((id) => logits[id]! >= least));
}

/** The fewest of the largest weights that make `topP` of all (Holtzman et al., 2020). */
function nucleus(tokens: Uint32Array<ArrayBuffer>, weights: Float64Array<ArrayBuffer>, topP: number) {
  const order = [...weights.keys()].sort((one, other) => weights[other]! - weights[one]!);
  const enough = topP * weights.reduce((sum, weight) => sum + weight, 0);
  let reached = 0;
  let count = 0;
  while (count < order.length && reached < enough) reached += weights[order[count++]!]!;
  const kept = order.slice(0, Math.max(count, 1));
  return {
    tokens: Uint32Array.from(kept, (index) => tokens[index]!),
    weights: Float64Array.from(kept, (index) => weights[index]!),
  };
}

/** The index at which the sum of weights reaches `at`, from 0 to 1, of all. */
function draw(weights: Float64Array, at: number): number {
  let left = at * weights.reduce((sum, weight) => sum + weight, 0);
  for (let index = 0; index < weights.length; index++) {
    left -= weights[index]!;
    if (left < 0) return index;
  }
  return weights.length - 1;
}

/** Numbers from 0 to 1, by the generator sfc32 (Doty-Humphrey, PractRand), from a seed. */
function uniform(seed: number): () => number {
  let [a, b, c, counter] = [seed | 0, Math.floor(seed / 2 ** 32) | 0, 0, 1];
  const next = () => {
    const sum = (((a + b) | 0) + counter) | 0;
    counter = (counter + 1) | 0;
    a = b ^ (b >>> 9);
    b = (c + (c << 3)) | 0;
    c = (c << 21) | (c >>> 11);
    c = (c + sum) | 0;
    return (sum >>> 0) / 2 ** 32;
  };
  for (let round = 0; round < 12; round++) next();
  return next;
}
