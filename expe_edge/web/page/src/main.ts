import type { Device, Finished, Order, Report } from "./messages.ts";
import type { PackageInfo } from "./model/package.ts";
import type { SelfTestResult } from "./model/self-test.ts";
import { button, element, input, megabytes, numberIn, say } from "./ui/elements.ts";
import { showFinished, showMemory, showPosition, showSpeed } from "./ui/figures.ts";
import { chosenPackage, readSite, showPackages, type Site } from "./ui/packages.ts";

/** What the page is doing; buttons follow from it. */
type State = "empty" | "loading" | "ready" | "writing" | "testing";

const FINISHED: Record<Finished["finish"], string> = {
  end_of_text: "the text has ended",
  length: "as many tokens as were asked for",
  stopped: "stopped",
};

/** More threads than this are no faster for small models, and take memory. */
const MOST_THREADS = 4;

let site: Site;
let worker: Worker | null = null;
let info: PackageInfo;
let state: State = "empty";

function enter(next: State): void {
  state = next;
  const idle = state === "ready";
  button("generate").disabled = !idle;
  button("go-on").disabled = !idle || element("made").textContent === "";
  button("test").disabled = !idle || info.selfTest === null;
  button("stop").disabled = state !== "writing";
  button("load").disabled = state === "loading";
  button("cancel").hidden = state !== "loading";
  element("download").hidden = state !== "loading";
  element("output").classList.toggle("busy", state === "writing");
  element("output").ariaBusy = String(state === "writing");
}

function ask(order: Order): void {
  worker?.postMessage(order);
}

function load(event: Event): void {
  event.preventDefault();
  const threads = numberIn("threads");
  if (threads === null) return;
  worker?.terminate();
  info = chosenPackage(site);
  worker = new Worker(new URL("./worker.ts", import.meta.url), { type: "module", name: "model" });
  worker.onmessage = ({ data }: MessageEvent<Report>) => hear(data);
  worker.onerror = (error) => fail(error.message || "the model's worker could not be started");
  clearText();
  enter("loading");
  say("status", `Loading ${info.name}.`);
  ask({ type: "load", info, device: element<HTMLSelectElement>("device").value as Device, threads });
}

function cancelLoading(): void {
  worker?.terminate();
  worker = null;
  enter("empty");
  say("status", "Loading was cancelled.");
}

function generate(goOn: boolean): void {
  const [maxNewTokens, temperature, topK, topP, seed] = [
    numberIn("max-new-tokens"),
    numberIn("temperature"),
    numberIn("top-k"),
    numberIn("top-p"),
    numberIn("seed"),
  ];
  if (maxNewTokens === null || temperature === null || topK === null || topP === null || seed === null) return;
  const prompt = element<HTMLTextAreaElement>("prompt").value;
  if (!goOn) {
    clearText();
    element("given").textContent = prompt;
  }
  enter("writing");
  say("status", "Reading the prompt.");
  ask({ type: "generate", prompt, goOn, maxNewTokens, sampling: { temperature, topK, topP, seed } });
}

function clearText(): void {
  element("given").textContent = "";
  element("made").textContent = "";
}

function hear(report: Report): void {
  switch (report.type) {
    case "download": {
      const bar = element<HTMLProgressElement>("download");
      bar.max = report.of;
      bar.value = report.bytes;
      bar.textContent = `${megabytes(report.bytes)} of ${megabytes(report.of)}`;
      break;
    }
    case "opening":
      say("status", "Opening the graph.");
      break;
    case "loaded":
      hearLoaded(report);
      break;
    case "tested":
      showTest(report.result);
      enter("ready");
      break;
    case "prompt":
      if (report.of > report.read) say("status", `Reading the prompt: ${report.read} of ${report.of} tokens.`);
      break;
    case "text":
      if (element("made").textContent === "") say("status", "Writing.");
      append(report.piece);
      showSpeed(report.tokens, report.ms);
      showMemory(report.memory);
      showPosition(report.position, info.trainingLength);
      break;
    case "done":
      showFinished(report);
      showPosition(report.position, info.trainingLength);
      enter("ready");
      say("status", `${report.tokens.toLocaleString("en")} tokens; ${FINISHED[report.finish]}.`);
      break;
    case "failed":
      fail(report.message);
  }
}

function hearLoaded({ device, refused, tested, prompt }: Extract<Report, { type: "loaded" }>): void {
  const field = element<HTMLTextAreaElement>("prompt");
  if (field.value === "") field.value = prompt;
  enter("ready");
  showTest(tested);
  const instead = refused === null ? "" : ` WebGPU was not taken: ${refused}.`;
  say("status", `${info.name} is ready, in ${device}.${instead}`);
}

function showTest(result: SelfTestResult | null): void {
  if (result === null) {
    say("test-result", "This package holds no tokens to compare with; export it again.");
    return;
  }
  const figures = `${result.equal} of ${result.of} tokens, logits within ${result.difference.toPrecision(2)}`;
  if (result.agrees) say("test-result", `Yes: ${figures}.`, "good");
  else say("test-result", `No: ${figures}. Text from here is not what the package writes.`, "bad");
}

/** Add a piece of text, and keep its end in view where it was. */
function append(piece: string): void {
  const output = element("output");
  const atEnd = output.scrollTop + output.clientHeight >= output.scrollHeight - 8;
  element("made").append(piece);
  if (atEnd) output.scrollTop = output.scrollHeight;
}

function fail(message: string): void {
  enter(state === "loading" ? "empty" : "ready");
  say("status", message, "bad");
}

function listen(): void {
  element("model-form").addEventListener("submit", load);
  button("cancel").addEventListener("click", cancelLoading);
  element("text-form").addEventListener("submit", (event) => {
    event.preventDefault();
    generate(false);
  });
  button("go-on").addEventListener("click", () => generate(true));
  button("stop").addEventListener("click", () => ask({ type: "stop" }));
  button("test").addEventListener("click", () => {
    enter("testing");
    say("test-result", "Comparing.");
    ask({ type: "self-test" });
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && state === "ready") generate(false);
    if (event.key === "Escape" && state === "writing") ask({ type: "stop" });
  });
}

function prepareThreads(): void {
  const isolated = globalThis.crossOriginIsolated;
  const most = isolated ? navigator.hardwareConcurrency : 1;
  const field = input("threads");
  field.max = String(most);
  const asked = Number(new URLSearchParams(location.search).get("threads"));
  field.value = String(Math.min(most, asked >= 1 ? asked : MOST_THREADS));
  element("threads-field").hidden = !isolated;
  const why = isolated ? "" : " This page is not isolated from others, so it has one thread.";
  element("environment").textContent = `onnxruntime-web ${__ONNXRUNTIME__}.${why}`;
}

async function begin(): Promise<void> {
  void navigator.serviceWorker?.register("sw.js").catch((error) => console.warn("not kept for offline:", error));
  prepareThreads();
  listen();
  site = await readSite();
  document.title = site.title;
  element("title").textContent = site.title;
  showPackages(site);
  element("device-field").hidden = !(site.webgpu && "gpu" in navigator);
}

begin().catch((error) => say("status", String(error), "bad"));
