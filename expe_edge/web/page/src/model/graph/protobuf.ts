/** Protocol Buffers' wire format, as far as ONNX files need it: fields are read in place, and written anew. */

export type Bytes = Uint8Array<ArrayBuffer>;

/** One field of a message: its number, its bytes with their tag, and its value. */
export interface Field {
  number: number;
  whole: Bytes;
  /** Of a field with a length: what it holds. */
  bytes: Bytes;
  /** Of a varint: its value, exact below 2^53. */
  integer: number;
}

const VARINT = 0;
const FIXED64 = 1;
const LENGTH = 2;
const FIXED32 = 5;
const NOTHING: Bytes = new Uint8Array();

/** The fields of a message, in order. */
export function* fields(message: Bytes): Generator<Field> {
  let at = 0;
  const varint = () => {
    for (let [value, unit] = [0, 1]; ; unit *= 128) {
      const byte = message[at++];
      if (byte === undefined) throw new Error("the graph ends too early");
      value += (byte & 127) * unit;
      if (byte < 128) return value;
    }
  };
  while (at < message.length) {
    const begin = at;
    const tag = varint();
    const type = tag % 8;
    let [integer, bytes] = [0, NOTHING];
    if (type === VARINT) integer = varint();
    else if (type === FIXED64) at += 8;
    else if (type === FIXED32) at += 4;
    else if (type === LENGTH) {
      const end = varint() + at;
      bytes = message.subarray(at, end);
      at = end;
    } else throw new Error(`the graph has a field of type ${type}`);
    if (at > message.length) throw new Error("the graph ends too early");
    yield { number: Math.floor(tag / 8), whole: message.subarray(begin, at), bytes, integer };
  }
}

/** Text in a field. */
export function textOf(bytes: Bytes): string {
  return new TextDecoder().decode(bytes);
}

/** A field with a whole number that is not negative. */
export function integerField(number: number, value: number): Bytes {
  return Uint8Array.from([...varint(number * 8 + VARINT), ...varint(value)]);
}

/** A field with text, or with the fields of a message. */
export function field(number: number, content: string | readonly Bytes[]): Bytes {
  const bytes = typeof content === "string" ? new TextEncoder().encode(content) : joined(content);
  return joined([Uint8Array.from([...varint(number * 8 + LENGTH), ...varint(bytes.length)]), bytes]);
}

/** Bytes one behind the other. */
export function joined(parts: readonly Bytes[]): Bytes {
  const all = new Uint8Array(parts.reduce((length, part) => length + part.length, 0));
  let at = 0;
  for (const part of parts) {
    all.set(part, at);
    at += part.length;
  }
  return all;
}

function varint(value: number): number[] {
  const bytes = [];
  for (; value > 127; value = Math.floor(value / 128)) bytes.push((value % 128) + 128);
  return [...bytes, value];
}
