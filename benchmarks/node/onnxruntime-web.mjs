// WebAssembly in node, which is what a browser without WebGPU runs.

import * as ort from "onnxruntime-web";

import { Loop } from "./loop.mjs";
import { answer } from "./protocol.mjs";

ort.env.wasm.numThreads = 1;
await answer((path) => Loop.open(ort, path));
