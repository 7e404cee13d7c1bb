import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { defineConfig, type Plugin, type UserConfig } from "vite";

const require = createRequire(import.meta.url);
const onnxruntime = dirname(require.resolve("onnxruntime-web/ort-wasm-simd-threaded.wasm"));
const { version } = JSON.parse(readFileSync(join(onnxruntime, "..", "package.json"), "utf-8"));

/** onnxruntime's own files, as they are: the WebAssembly build, and the one with WebGPU, which few sites need. */
const RUNTIME = ["ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"];
const WEBGPU = ["ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm"];

function onnxruntimeFiles(): Plugin {
  return {
    name: "onnxruntime-files",
    generateBundle() {
      for (const [folder, files] of [["ort", RUNTIME], ["ort-webgpu", WEBGPU]] as const) {
        for (const file of files) {
          const source = readFileSync(join(onnxruntime, file));
          this.emitFile({ type: "asset", fileName: `${folder}-${version}/${file}`, source });
        }
      }
    },
  };
}

/** Tells the service worker what the page is made of, and by a hash of it when that has changed. */
function shellList(): Plugin {
  return {
    name: "shell-list",
    enforce: "post",
    generateBundle: {
      order: "post",
      handler(_, bundle) {
        const files = Object.keys(bundle).filter((name) => name !== "sw.js" && !name.startsWith("ort-webgpu"));
        const hash = createHash("sha256");
        for (const name of files.sort()) {
          const file = bundle[name]!;
          hash.update(name).update(file.type === "chunk" ? file.code : file.source);
        }
        const worker = bundle["sw.js"];
        if (worker?.type !== "chunk") throw new Error("no service worker was built");
        const shell = JSON.stringify({ version: hash.digest("hex").slice(0, 12), files });
        worker.code = worker.code.replaceAll("__SHELL__", () => `(${shell})`);
      },
    },
  };
}

const page: UserConfig = {
  base: "./",
  define: { __ONNXRUNTIME__: JSON.stringify(version) },
  build: {
    target: "es2022",
    modulePreload: { polyfill: false },
    assetsInlineLimit: 0,
    rollupOptions: {
      input: { index: "index.html", sw: "src/service-worker.ts" },
      output: { entryFileNames: ({ name }) => (name === "sw" ? "sw.js" : "assets/[name]-[hash].js") },
    },
  },
  worker: { format: "es" },
  plugins: [onnxruntimeFiles(), shellList()],
};

/** `vite build --ssr src/node.ts`: the model alone, for Node.js, with onnxruntime beside it in `dist`. */
const node: UserConfig = {
  define: { __ONNXRUNTIME__: JSON.stringify(version) },
  build: { outDir: "dist-node" },
  ssr: { noExternal: true },
};

export default defineConfig(({ isSsrBuild }) => (isSsrBuild ? node : page));
