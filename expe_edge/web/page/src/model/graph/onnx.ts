/** Nodes and tensors of an ONNX graph, by the numbers that onnx.proto gives its fields. */
import { field, fields, integerField, textOf, type Bytes } from "./protobuf.ts";

/** ModelProto's graph, and GraphProto's nodes and initializers. */
export const GRAPH = 7;
export const NODE = 1;
export const INITIALIZER = 5;

const EXTERNAL = 1;

export interface Node {
  type: string;
  name: string;
  inputs: string[];
  outputs: string[];
  /** Attributes that are integers. */
  integers: Map<string, number>;
}

export interface Tensor {
  type: number;
  dims: number[];
  /** As in the file: little-endian. */
  data: Bytes;
}

export function readNode(message: Bytes): Node {
  const node: Node = { type: "", name: "", inputs: [], outputs: [], integers: new Map() };
  for (const { number, bytes } of fields(message)) {
    if (number === 1) node.inputs.push(textOf(bytes));
    if (number === 2) node.outputs.push(textOf(bytes));
    if (number === 3) node.name = textOf(bytes);
    if (number === 4) node.type = textOf(bytes);
    if (number === 5) node.integers.set(...readInteger(bytes));
  }
  return node;
}

/** The name of an attribute, and its value where that is an integer. */
function readInteger(message: Bytes): [string, number] {
  let [name, value] = ["", 0];
  for (const { number, bytes, integer } of fields(message)) {
    if (number === 1) name = textOf(bytes);
    if (number === 3) value = integer;
  }
  return [name, value];
}

/** A node of a standard operator without attributes. */
export function nodeField(type: string, name: string, inputs: readonly string[], output: string): Bytes {
  const parts = [...inputs.map((input) => field(1, input)), field(2, output), field(3, name), field(4, type)];
  return field(NODE, parts);
}

export function readTensor(message: Bytes): { name: string; tensor: Tensor } {
  const tensor: Tensor = { type: 0, dims: [], data: new Uint8Array() };
  let name = "";
  for (const { number, bytes, integer } of fields(message)) {
    if (number === 1) tensor.dims.push(integer);
    if (number === 2) tensor.type = integer;
    if (number === 8) name = textOf(bytes);
    if (number === 9) tensor.data = bytes;
  }
  return { name, tensor };
}

/** An initializer whose bytes are a file of its own. */
export function externalField(name: string, type: number, dims: readonly number[], file: string): Bytes {
  const location = field(13, [field(1, "location"), field(2, file)]);
  const shape = dims.map((size) => integerField(1, size));
  return field(INITIALIZER, [...shape, integerField(2, type), field(8, name), location, integerField(14, EXTERNAL)]);
}
