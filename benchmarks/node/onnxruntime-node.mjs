import * as ort from "onnxruntime-node";

import { Loop } from "./loop.mjs";
import { answer } from "./protocol.mjs";

await answer((path) => Loop.open(ort, path));
