// How a client's program is told what to do, and answers: see protocol.py, which this repeats.
//
//     node PROGRAM JOB ANSWERS

import { appendFileSync, readFileSync } from "node:fs";

/** Answer the cases of the command line. opened: from the path of a package to an object that has the calls. */
export async function answer(opened) {
  const [job, answers] = process.argv.slice(2);
  const say = (values) => appendFileSync(answers, JSON.stringify(values) + "\n");
  let client = null;
  let current = null;
  for (const { id, package: path, call, arguments: given } of JSON.parse(readFileSync(job, "utf-8"))) {
    say({ id, began: true });
    try {
      if (path !== current) {
        await client?.close();
        client = current = null;
        client = await opened(path);
        current = path;
      }
      say({ id, ...(await client[call](given)) });
    } catch (error) {
      say({ id, refused: `${error.name}: ${error.message}` });
    }
  }
}

/** Pad prompts on the left to the longest: ids and mask, by rows. */
export function padded(prompts) {
  const longest = Math.max(...prompts.map((prompt) => prompt.length));
  const before = (prompt) => Array(longest - prompt.length).fill(0);
  return {
    ids: prompts.map((prompt) => [...before(prompt), ...prompt]),
    mask: prompts.map((prompt) => [...before(prompt), ...prompt.map(() => 1)]),
  };
}
