// transformers.js, whose loop is its `generate`.

import { dirname, basename } from "node:path";

import { AutoModelForCausalLM, DynamicCache, Tensor, env } from "@huggingface/transformers";

import { answer, padded } from "./protocol.mjs";

env.allowRemoteModels = false;

const tensor = (rows) => new Tensor("int64", BigInt64Array.from(rows.flat(), BigInt), [rows.length, rows[0].length]);

/** A package in transformers.js, greedy. */
class Transformers {
  constructor(model) {
    this.model = model;
  }

  static async open(path) {
    env.localModelPath = dirname(path);
    const model = await AutoModelForCausalLM.from_pretrained(basename(path), {
      local_files_only: true,
      subfolder: "",
      model_file_name: "model",
      dtype: "fp32", // as the file is: no suffix
      session_options: { intraOpNumThreads: 1 },
    });
    return new Transformers(model);
  }

  close() {
    return this.model.dispose();
  }

  /** Complete prompts of any lengths together, padded on the left, as its tokenizer is told to. */
  async complete({ prompts, new: count }) {
    const { ids, mask } = padded(prompts);
    const { sequences } = await this.generate(ids, count, { attention_mask: tensor(mask) });
    return { tokens: sequences.tolist().map((row) => row.slice(ids[0].length).map(Number)) };
  }

  /** Generate behind a prompt, cut the cache, and generate again from it behind all tokens. */
  async go_on({ prompt, new: count, keep, more }) {
    const first = await this.generate([prompt], count);
    const sequence = first.sequences.tolist()[0].map(Number);
    const held = Math.min(keep, sequence.length - 1);
    const past = new DynamicCache();
    for (const [name, value] of Object.entries(first.past_key_values)) {
      past.update({ [name]: value.slice(null, null, [0, held], null) });
    }
    const ids = [...sequence.slice(0, keep), ...more];
    const second = await this.generate([ids], count, { past_key_values: past });
    const behind = (sequences, length) => sequences.tolist()[0].slice(length).map(Number);
    return { tokens: [sequence.slice(prompt.length), behind(second.sequences, ids.length)] };
  }

  generate(ids, count, options = {}) {
    return this.model.generate({
      input_ids: tensor(ids),
      attention_mask: tensor(ids.map((row) => row.map(() => 1))),
      max_new_tokens: count,
      do_sample: false,
      return_dict_in_generate: true,
      ...options,
    });
  }
}

await answer((path) => Transformers.open(path));
