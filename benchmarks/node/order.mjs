/** One order in, one answer out: JSON on standard input and output. */
import { text } from "node:stream/consumers";

export const readOrder = async () => JSON.parse(await text(process.stdin));

export const answer = (value) => process.stdout.write(`${JSON.stringify(value)}\n`, () => process.exit(0));
