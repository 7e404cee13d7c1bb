/**
 * Weights of few bits in blocks, restored to floats once, when a graph is opened.
 *
 * WebAssembly has no kernel for MatMulNBits: it restores the whole matrix at every run. Restored beforehand, a product
 * is a MatMul of floats, of the same numbers.
 */
import { FLOAT16, FLOAT32 } from "../onnxruntime.ts";
import { externalField, GRAPH, INITIALIZER, NODE, nodeField, readNode, readTensor } from "./onnx.ts";
import type { Node, Tensor } from "./onnx.ts";
import { field, fields, joined, type Bytes } from "./protobuf.ts";

/** Operators that change how stored codes and scales are laid out or padded, not what they hold. */
const LAYOUT = ["Cast", "Identity", "Pad", "Reshape"];
/** Inputs of MatMulNBits: rows, codes, scales, zero points, the order of groups, what is added. */
const [ROWS, CODES, SCALES, ZERO_POINTS, GROUPS, ADDED] = [0, 1, 2, 3, 4, 5];

/** A graph, and files that its initializers name. */
export interface Restored {
  model: Bytes;
  files: Map<string, Bytes>;
}

/** Return the graph with a MatMul of floats in place of every MatMulNBits whose weights it holds. */
export function withFloatWeights(model: Bytes): Restored {
  const files = new Map<string, Bytes>();
  const parts = Array.from(fields(model), ({ number, whole, bytes }) =>
    number === GRAPH ? field(GRAPH, restoredGraph(bytes, files)) : whole,
  );
  return files.size > 0 ? { model: joined(parts), files } : { model, files };
}

function restoredGraph(graph: Bytes, files: Map<string, Bytes>): Bytes[] {
  const stored = new Stored(graph);
  return Array.from(fields(graph), ({ number, whole, bytes }) => {
    if (number !== NODE) return whole;
    const node = readNode(bytes);
    const floats = node.type === "MatMulNBits" ? restoredWeight(node, stored) : null;
    if (floats === null) return whole;
    const file = `${node.name || node.outputs[0]}.floats`;
    files.set(file, new Uint8Array(floats.buffer));
    return joined(productOf(node, file));
  });
}

/** What a graph stores, by the names of the tensors. */
class Stored {
  private readonly tensors = new Map<string, Tensor>();
  private readonly sources = new Map<string, string>();

  constructor(graph: Bytes) {
    for (const { number, bytes } of fields(graph)) {
      if (number === INITIALIZER) {
        const { name, tensor } = readTensor(bytes);
        this.tensors.set(name, tensor);
      }
      if (number !== NODE) continue;
      const { type, inputs, outputs } = readNode(bytes);
      if (LAYOUT.includes(type)) this.sources.set(outputs[0]!, inputs[0]!);
    }
  }

  /** The tensor that `name` is laid out of; undefined where it is computed. */
  find(name: string): Tensor | undefined {
    const source = this.sources.get(name);
    return source === undefined ? this.tensors.get(name) : this.find(source);
  }
}

/** The weight (K, N) of a node; null for one of another kind than the exporter writes. */
function restoredWeight({ inputs, integers }: Node, stored: Stored): Float32Array<ArrayBuffer> | null {
  const sizes = ["K", "N", "bits", "block_size"].map((name) => integers.get(name) ?? 0);
  const [rows, columns, bits, blockSize] = sizes as [number, number, number, number];
  const codes = stored.find(inputs[CODES]!);
  const scales = floatsOf(stored.find(inputs[SCALES]!));
  if (inputs[ZERO_POINTS] || inputs[GROUPS] || (bits !== 4 && bits !== 8) || !codes || !scales) return null;
  const [stride, blocks] = [codes.data.length / columns, Math.ceil(rows / blockSize)];
  if (codes.dims[0] !== columns || stride < (rows * bits) / 8 || scales.length !== columns * blocks) return null;
  const floats = new Float32Array(rows * columns);
  for (let column = 0; column < columns; column++) {
    for (let row = 0; row < rows; row++) {
      const byte = codes.data[column * stride + (bits === 8 ? row : row >> 1)]!;
      const level = bits === 8 ? byte - 128 : ((byte >> (4 * (row & 1))) & 15) - 8;
      floats[row * columns + column] = level * scales[column * blocks + Math.floor(row / blockSize)]!;
    }
  }
  return floats;
}

/** A node's product with the weight of a file, and what is added to it. */
function productOf({ name, inputs, outputs, integers }: Node, file: string): Bytes[] {
  const [rows, output, added] = [inputs[ROWS]!, outputs[0]!, inputs[ADDED]];
  const product = added ? `${file}.product` : output;
  const weight = externalField(file, FLOAT32, [integers.get("K")!, integers.get("N")!], file);
  const parts = [weight, nodeField("MatMul", name, [rows, file], product)];
  return added ? [...parts, nodeField("Add", `${name}.biased`, [product, added], output)] : parts;
}

/** The numbers of a tensor of floats; null for one of another type. */
function floatsOf(tensor: Tensor | undefined): Float32Array | null {
  if (tensor === undefined) return null;
  const { data, type } = tensor;
  const view = new DataView(data.buffer, data.byteOffset, data.length);
  if (type === FLOAT32) return Float32Array.from({ length: data.length / 4 }, (_, at) => view.getFloat32(4 * at, true));
  if (type !== FLOAT16) return null;
  return Float32Array.from({ length: data.length / 2 }, (_, at) => halfOf(view.getUint16(2 * at, true)));
}

/** The number that 16 bits stand for. */
function halfOf(bits: number): number {
  const [sign, exponent, fraction] = [bits >> 15 ? -1 : 1, (bits >> 10) & 31, bits & 1023];
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? (1 + fraction / 1024) * 2 ** (exponent - 15) : (fraction / 1024) * 2 ** -14);
}
