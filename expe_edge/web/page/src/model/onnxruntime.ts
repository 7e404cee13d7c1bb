/**
 * onnxruntime's WebAssembly build, by the functions that it exports, which its JavaScript calls too.
 *
 * That JavaScript copies every input into the WebAssembly heap and every output out of it, at every run, the cache
 * among them, and takes no input that a graph may leave away. Here tensors are memory of the heap, made once.
 */

/** Element types, as ONNX numbers them. */
export const FLOAT32 = 1;
export const INT8 = 3;
export const INT64 = 7;
export const FLOAT16 = 10;

const ITEM_BYTES: Record<number, number> = { [FLOAT32]: 4, [INT8]: 1, [INT64]: 8 };
const IN_HEAP = 1;
const ALL_OPTIMIZATIONS = 99;
const ERRORS_ONLY = 3;

type Pointer = number;

interface Exports {
  HEAPU8: Uint8Array<ArrayBuffer>;
  mountExternalData(path: string, bytes: Uint8Array): void;
  unmountExternalData(): void;
  _malloc(bytes: number): Pointer;
  _free(pointer: Pointer): void;
  stackSave(): Pointer;
  stackRestore(stack: Pointer): void;
  stackAlloc(bytes: number): Pointer;
  getValue(pointer: Pointer, type: string): number;
  setValue(pointer: Pointer, value: number, type: string): void;
  lengthBytesUTF8(text: string): number;
  stringToUTF8(text: string, pointer: Pointer, bytes: number): void;
  UTF8ToString(pointer: Pointer): string;
  _OrtInit(threads: number, logging: number): number;
  _OrtGetLastError(code: Pointer, message: Pointer): number;
  _OrtCreateSessionOptions(...values: number[]): Pointer;
  _OrtAddSessionConfigEntry(options: Pointer, name: Pointer, value: Pointer): number;
  _OrtReleaseSessionOptions(options: Pointer): number;
  _OrtCreateSession(model: Pointer, bytes: number, options: Pointer): Pointer | Promise<Pointer>;
  _OrtCreateTensor(
    type: number,
    data: Pointer,
    bytes: number,
    dims: Pointer,
    rank: number,
    location: number,
  ): Pointer;
  _OrtGetTensorData(tensor: Pointer, type: Pointer, data: Pointer, dims: Pointer, rank: Pointer): number;
  _OrtReleaseTensor(tensor: Pointer): number;
  _OrtRun(
    session: Pointer,
    inputNames: Pointer,
    inputs: Pointer,
    inputCount: number,
    outputNames: Pointer,
    outputCount: number,
    outputs: Pointer,
    options: Pointer,
  ): number | Promise<number>;
}

/** What `ort-wasm-simd-threaded.mjs` exports. */
export type Factory = (settings: { numThreads: number }) => Promise<Exports>;

/** Memory of the heap. It moves when the heap grows, so views are made where they are used. */
export class Buffer {
  readonly pointer: Pointer;

  constructor(
    private readonly exports: Exports,
    readonly bytes: number,
  ) {
    this.pointer = exports._malloc(Math.max(bytes, 1));
    if (this.pointer === 0) throw new RangeError(`no memory for ${(bytes / 1e6).toFixed(0)} MB more`);
  }

  get uint8(): Uint8Array<ArrayBuffer> {
    return this.exports.HEAPU8.subarray(this.pointer, this.pointer + this.bytes);
  }

  get int64(): BigInt64Array {
    return new BigInt64Array(this.exports.HEAPU8.buffer, this.pointer, this.bytes / 8);
  }

  get float32(): Float32Array {
    return new Float32Array(this.exports.HEAPU8.buffer, this.pointer, this.bytes / 4);
  }

  free(): void {
    this.exports._free(this.pointer);
  }
}

/** onnxruntime's library, loaded. */
export class Runtime {
  private constructor(
    private readonly exports: Exports,
    readonly threads: number,
  ) {}

  static async load(factory: Factory, threads: number): Promise<Runtime> {
    const exports = await factory({ numThreads: threads });
    const runtime = new Runtime(exports, threads);
    runtime.check(exports._OrtInit(threads, ERRORS_ONLY));
    return runtime;
  }

  /** Bytes of the heap. */
  get bytes(): number {
    return this.exports.HEAPU8.length;
  }

  buffer(bytes: number): Buffer {
    return new Buffer(this.exports, bytes);
  }

  /** Make a tensor over bytes of a buffer, from `offset` on; it is to be released before the buffer is freed. */
  tensor(type: number, buffer: Buffer, dims: readonly number[], offset = 0): Pointer {
    const stack = this.exports.stackSave();
    const shape = this.exports.stackAlloc(4 * Math.max(dims.length, 1));
    dims.forEach((size, axis) => this.exports.setValue(shape + 4 * axis, size, "i32"));
    const bytes = dims.reduce((product, size) => product * size, ITEM_BYTES[type]!);
    const tensor = this.exports._OrtCreateTensor(type, buffer.pointer + offset, bytes, shape, dims.length, IN_HEAP);
    this.exports.stackRestore(stack);
    if (tensor === 0) this.fail();
    return tensor;
  }

  release(tensor: Pointer): void {
    this.check(this.exports._OrtReleaseTensor(tensor));
  }

  /** Copy the last `count` of the `total` numbers of a float32 tensor out of the heap. */
  lastOf(tensor: Pointer, count: number, total: number): Float32Array {
    const stack = this.exports.stackSave();
    const places = this.exports.stackAlloc(16);
    this.check(this.exports._OrtGetTensorData(tensor, places, places + 4, places + 8, places + 12));
    const data = this.exports.getValue(places + 4, "*");
    this.exports.stackRestore(stack);
    return new Float32Array(this.exports.HEAPU8.buffer, data + 4 * (total - count), count).slice();
  }

  /**
   * Open a graph, whose bytes are copied. files: those that its initializers name. settings: of
   * https://github.com/microsoft/onnxruntime/blob/main/include/onnxruntime/core/session/onnxruntime_session_options_config_keys.h
   */
  async open(
    model: Uint8Array,
    files: ReadonlyMap<string, Uint8Array>,
    settings: Readonly<Record<string, string>>,
  ): Promise<Pointer> {
    const bytes = this.buffer(model.length);
    const options = this.exports._OrtCreateSessionOptions(ALL_OPTIMIZATIONS, 1, 1, 0, 0, 0, 0, ERRORS_ONLY, 0, 0);
    if (options === 0) this.fail();
    try {
      bytes.uint8.set(model);
      for (const entry of Object.entries(settings)) {
        const [name, value] = entry.map((text) => this.text(text)) as [Buffer, Buffer];
        this.check(this.exports._OrtAddSessionConfigEntry(options, name.pointer, value.pointer));
        name.free();
        value.free();
      }
      for (const [path, content] of files) this.exports.mountExternalData(path, content);
      const session = await this.exports._OrtCreateSession(bytes.pointer, bytes.bytes, options);
      if (session === 0) this.fail();
      return session;
    } finally {
      this.exports.unmountExternalData();
      this.exports._OrtReleaseSessionOptions(options);
      bytes.free();
    }
  }

  /** Write names into the heap, for good. */
  names(texts: readonly string[]): Pointers {
    const pointers = this.pointers(texts.length);
    pointers.set(texts.map((text) => this.text(text).pointer));
    return pointers;
  }

  private text(content: string): Buffer {
    const bytes = this.exports.lengthBytesUTF8(content) + 1;
    const place = this.buffer(bytes);
    this.exports.stringToUTF8(content, place.pointer, bytes);
    return place;
  }

  pointers(count: number): Pointers {
    return new Pointers(this.buffer(4 * count), count);
  }

  /** Run a graph. An output that is 0 is made by onnxruntime, and is the caller's to release. */
  async run(
    session: Pointer,
    inputNames: Pointers,
    inputs: Pointers,
    outputNames: Pointers,
    outputs: Pointers,
  ): Promise<void> {
    const done = this.exports._OrtRun(
      session,
      inputNames.pointer,
      inputs.pointer,
      inputs.count,
      outputNames.pointer,
      outputs.count,
      outputs.pointer,
      0,
    );
    this.check(typeof done === "number" ? done : await done);
  }

  private check(code: number): void {
    if (code !== 0) this.fail();
  }

  private fail(): never {
    const stack = this.exports.stackSave();
    const places = this.exports.stackAlloc(8);
    this.exports._OrtGetLastError(places, places + 4);
    const message = this.exports.getValue(places + 4, "*");
    const text = message ? this.exports.UTF8ToString(message) : "unknown error";
    this.exports.stackRestore(stack);
    throw new Error(`onnxruntime: ${text}`);
  }
}

/** A list of pointers in the heap. */
export class Pointers {
  constructor(
    private readonly buffer: Buffer,
    readonly count: number,
  ) {}

  get pointer(): Pointer {
    return this.buffer.pointer;
  }

  set(values: readonly Pointer[]): void {
    this.view().set(values);
  }

  get(index: number): Pointer {
    return this.view()[index]!;
  }

  private view(): Uint32Array {
    const bytes = this.buffer.uint8;
    return new Uint32Array(bytes.buffer, bytes.byteOffset, this.count);
  }
}
