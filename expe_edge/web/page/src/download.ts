import type { FileInfo, PackageInfo } from "./model/package.ts";

/** The name of the Cache Storage that keeps packages. */
const KEPT = "packages";

export interface Download {
  model: Uint8Array<ArrayBuffer>;
  tokenizer: unknown;
}

/** Fetch a package's files, or take those that this browser has kept. `onBytes` is told how many have come, of all. */
export async function download(
  site: string,
  info: PackageInfo,
  onBytes: (bytes: number, of: number) => void,
): Promise<Download> {
  const total = Object.values(info.files).reduce((sum, file) => sum + file.bytes, 0);
  let before = 0;
  const fetchFile = async (name: keyof PackageInfo["files"]) => {
    const file = info.files[name];
    const url = new URL(`packages/${info.directory}/${name}?v=${file.sha256.slice(0, 16)}`, site);
    const bytes = await fetchBytes(url, file, (come) => onBytes(before + come, total));
    before += file.bytes;
    return bytes;
  };
  const tokenizer = await fetchFile("tokenizer.json");
  const model = await fetchFile("model.onnx");
  return { model, tokenizer: JSON.parse(new TextDecoder().decode(tokenizer)) };
}

async function fetchBytes(
  url: URL,
  file: FileInfo,
  onBytes: (bytes: number) => void,
): Promise<Uint8Array<ArrayBuffer>> {
  const kept = await openKept();
  const found = await kept?.match(url);
  const response = found ?? (await fetch(url));
  if (!response.ok || response.body === null) throw new Error(`${url.pathname}: ${response.status}`);
  const bytes = await readAll(response.body, file.bytes, onBytes);
  if (bytes === null || !(await isWhole(bytes, file))) {
    await kept?.delete(url);
    throw new Error(`${url.pathname} is not the file that the exporter wrote`);
  }
  if (kept && !found) await keep(kept, url, bytes);
  return bytes;
}

/** Read a stream of `length` bytes; null where it has another number. */
async function readAll(
  body: ReadableStream<Uint8Array>,
  length: number,
  onBytes: (bytes: number) => void,
): Promise<Uint8Array<ArrayBuffer> | null> {
  const bytes = new Uint8Array(length);
  let come = 0;
  for (const reader = body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) return come === length ? bytes : null;
    if (come + value.length > length) return null;
    bytes.set(value, come);
    come += value.length;
    onBytes(come);
  }
}

/** Compare bytes with their hash, where the page is in a secure context, which has such functions. */
async function isWhole(bytes: Uint8Array<ArrayBuffer>, { sha256 }: FileInfo): Promise<boolean> {
  if (!globalThis.isSecureContext) return true;
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("") === sha256;
}

/** Cache Storage, where there is one: not outside secure contexts, nor in some private windows. */
async function openKept(): Promise<Cache | null> {
  try {
    return await caches.open(KEPT);
  } catch {
    return null;
  }
}

/** Keep a file in place of its earlier versions; a full disk is no reason to fail. */
async function keep(kept: Cache, url: URL, bytes: Uint8Array<ArrayBuffer>): Promise<void> {
  try {
    for (const earlier of await kept.keys(url, { ignoreSearch: true })) await kept.delete(earlier);
    await kept.put(url, new Response(bytes));
  } catch (error) {
    console.warn("the package is not kept for use offline:", error);
  }
}
