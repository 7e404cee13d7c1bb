// A loop over onnxruntime's JavaScript API that hands the present on as the past; its two packages have the same one.

import { padded } from "./protocol.mjs";

/** A package and a loop of one's own, greedy. ort: onnxruntime-node or onnxruntime-web. */
export class Loop {
  /** lastLogits: ask for the last token's alone, by an input that clients may leave away. */
  constructor(ort, session, lastLogits) {
    this.ort = ort;
    this.session = session;
    this.kept = lastLogits ? { num_logits_to_keep: new ort.Tensor("int64", BigInt64Array.of(1n), []) } : {};
    this.pasts = session.inputMetadata.filter(({ name }) => name.startsWith("past_key_values"));
  }

  static async open(ort, path, { threads = 1, lastLogits = false } = {}) {
    const options = { intraOpNumThreads: threads, logSeverityLevel: 3 };
    return new Loop(ort, await ort.InferenceSession.create(`${path}/model.onnx`, options), lastLogits);
  }

  close() {
    return this.session.release();
  }

  /** Complete prompts of any lengths together, padded on the left. */
  async complete({ prompts, new: count }) {
    const { ids, mask } = padded(prompts);
    return { tokens: (await this.decode(this.empty(prompts.length), mask, ids, count))[0] };
  }

  /** Generate behind a prompt, keep the first tokens of it all, read more and generate again. */
  async go_on({ prompt, new: count, keep, more }) {
    const [[first], cache] = await this.generate(prompt, count);
    const held = Math.min(keep, prompt.length + count - 1); // the last token is in no cache yet
    const unread = [...[...prompt, ...first].slice(held, keep), ...more];
    const cut = cache.map((past) => this.cut(past, held));
    const [[second]] = await this.decode(cut, ones(keep + more.length), [unread], count);
    return { tokens: [first, second] };
  }

  /** Generate behind one prompt; returns as `decode` does. */
  generate(prompt, count, onStep) {
    return this.decode(this.empty(1), ones(prompt.length), [prompt], count, onStep);
  }

  empty(rows) {
    return this.pasts.map(({ type, shape }) => {
      const values = type === "int8" ? new Int8Array(0) : new Float32Array(0);
      return new this.ort.Tensor(type, values, [rows, shape[1], 0, shape[3]]);
    });
  }

  /** The first tokens of a cache of one row, (1, heads, tokens, size). */
  cut({ type, data, dims }, tokens) {
    const [, heads, held, size] = dims;
    const kept = new data.constructor(heads * tokens * size);
    for (let head = 0; head < heads; head++) {
      const begin = head * held * size;
      kept.set(data.subarray(begin, begin + tokens * size), head * tokens * size);
    }
    return new this.ort.Tensor(type, kept, [1, heads, tokens, size]);
  }

  /** Read ids behind a cache, and generate; mask: of all tokens. Returns tokens by rows, and the cache. */
  async decode(cache, mask, ids, count, onStep = () => {}) {
    const chosen = ids.map(() => []);
    const seen = mask.map((row) => [...row]);
    let places = mask.map((row) => positions(row).slice(-ids[0].length));
    for (let step = 0; step < count; step++) {
      const feeds = {
        ...this.kept,
        input_ids: this.integers(ids),
        attention_mask: this.integers(seen),
        position_ids: this.integers(places),
      };
      this.pasts.forEach(({ name }, index) => (feeds[name] = cache[index]));
      const { logits, ...presents } = await this.session.run(feeds);
      cache = this.pasts.map(({ name }) => presents[name.replace("past_key_values", "present")]);
      ids = likeliest(logits).map((token) => [token]);
      ids.forEach(([token], row) => chosen[row].push(token));
      seen.forEach((row) => row.push(1));
      places = places.map((row) => [row.at(-1) + 1]);
      onStep();
    }
    return [chosen, cache];
  }

  integers(rows) {
    const values = BigInt64Array.from(rows.length === 1 ? rows[0] : rows.flat(), BigInt);
    return new this.ort.Tensor("int64", values, [rows.length, rows[0].length]);
  }
}

/** The mask of one row. */
const ones = (length) => [Array(length).fill(1)];

/** The number of tokens before each place of a row. */
function positions(mask) {
  let tokens = 0;
  return mask.map((seen) => Math.max((tokens += seen) - 1, 0));
}

/** The likeliest token behind every row of logits (rows, tokens, vocabulary). */
function likeliest({ data, dims: [rows, tokens, vocabulary] }) {
  return Array.from({ length: rows }, (_, row) => {
    const end = (row + 1) * tokens * vocabulary;
    let best = end - vocabulary;
    for (let at = best; at < end; at++) if (data[at] > data[best]) best = at;
    return best - (end - vocabulary);
  });
}
