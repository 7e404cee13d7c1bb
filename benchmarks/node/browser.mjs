/**
 * What a person does on the page, in the system's Chromium.
 *
 *     { "scenario": "…", "browser": "/usr/bin/chromium", "url": "http://127.0.0.1:…/", … }
 */
import { createRequire } from "node:module";
import { chromium } from "playwright-core";
import { answer, readOrder } from "./order.mjs";

const SOFTWARE_WEBGPU = ["--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan"];
const READY = () => !document.getElementById("generate").disabled;
const order = await readOrder();

async function open(context, query = "") {
  const page = await context.newPage();
  page.errors = [];
  page.on("pageerror", (error) => page.errors.push(error.message));
  page.on("console", (message) => message.type() === "error" && page.errors.push(message.text()));
  await page.goto(order.url + query);
  await page.waitForSelector(".card");
  return page;
}

const choose = (page, name) => page.locator(".card", { has: page.getByText(name, { exact: true }) }).first().click();

async function load(page, name) {
  if (name) await choose(page, name);
  await page.click("#load");
  await page.waitForFunction(READY, null, { timeout: 120_000 });
}

async function generate(page, { prompt, maxNewTokens }) {
  await page.fill("#prompt", prompt);
  await page.locator("details").evaluate((element) => (element.open = true));
  await page.fill("#max-new-tokens", String(maxNewTokens));
  await page.click("#generate");
  await finished(page);
  return page.textContent("#made");
}

const finished = (page) => page.waitForFunction(READY, null, { timeout: 240_000 });

const figures = (page) =>
  page.evaluate(() => Object.fromEntries([...document.querySelectorAll("[id]")].map((one) => [one.id, one.textContent])));

const scenarios = {
  /** Text of every package, and what the self-test says. */
  async texts(context) {
    const texts = {};
    const page = await open(context);
    for (const name of order.packages) {
      await load(page, name);
      texts[name] = { test: await page.textContent("#test-result"), text: await generate(page, order) };
    }
    return { texts, figures: await figures(page), errors: page.errors };
  },

  /** What is said of every package, which may be refused. */
  async loads(context) {
    const loads = {};
    for (const name of order.packages) {
      const page = await open(context);
      await choose(page, name);
      await page.click("#load");
      await page.waitForFunction(
        () => !document.getElementById("generate").disabled || document.querySelector("#status.bad"),
      );
      loads[name] = { status: await page.textContent("#status"), test: await page.textContent("#test-result") };
      await page.close();
    }
    return { loads };
  },

  /** Stopped by key while it writes, gone on, then the same text again. */
  async stopped(context) {
    const page = await open(context);
    await load(page, order.package);
    const whole = await generate(page, { ...order, maxNewTokens: 64 });
    await page.fill("#max-new-tokens", "100000");
    await page.focus("#prompt");
    await page.keyboard.press("Control+Enter");
    await page.waitForFunction(() => document.getElementById("made").textContent.length > 64);
    await page.keyboard.press("Escape");
    await finished(page);
    const stopped = { status: await page.textContent("#status"), text: await page.textContent("#made") };
    await page.fill("#max-new-tokens", "8");
    await page.click("#go-on");
    await finished(page);
    const goneOn = await page.textContent("#made");
    return { whole, stopped, goneOn, again: await generate(page, { ...order, maxNewTokens: 64 }), errors: page.errors };
  },

  /** Loading is cancelled, and then done. */
  async cancelled(context) {
    const page = await open(context);
    let release;
    const held = new Promise((resolve) => (release = resolve));
    await context.route("**/model.onnx*", async (route) => {
      await held;
      await route.continue().catch(() => undefined); // whoever asked is gone
    });
    await page.click("#load");
    await page.click("#cancel");
    const status = await page.textContent("#status");
    release();
    await load(page);
    return { status, text: await generate(page, order) };
  },

  /** Loaded once, then again without a network. */
  async offline(context) {
    const page = await open(context);
    await page.evaluate(() => navigator.serviceWorker.ready.then(() => undefined));
    await load(page, order.package);
    const before = await generate(page, order);
    await context.setOffline(true);
    await page.reload();
    await page.waitForSelector(".card");
    await load(page, order.package);
    return { before, after: await generate(page, order) };
  },

  /** What axe finds, empty and with text, in both colours and on a phone. */
  async accessible(context) {
    const axe = createRequire(import.meta.url).resolve("axe-core/axe.min.js");
    const found = [];
    const page = await open(context);
    const look = async (where) => {
      const { violations } = await page.evaluate(() => globalThis.axe.run());
      found.push(...violations.map(({ id, impact, nodes }) => ({ where, id, impact, html: nodes[0].html })));
    };
    await page.evaluate((await import("node:fs")).readFileSync(axe, "utf-8"));
    await look("empty");
    await load(page, order.package);
    await generate(page, order);
    for (const colorScheme of ["light", "dark"]) {
      await page.emulateMedia({ colorScheme, reducedMotion: "reduce" });
      for (const width of [1000, 360]) {
        await page.setViewportSize({ width, height: 740 });
        await look(`${colorScheme}, ${width} pixels`);
      }
    }
    const overflow = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
    return { found, overflow };
  },

  /** From the top of the page to a text, by keys alone. */
  async keyboard(context) {
    const page = await open(context);
    const press = async (key, id) => {
      for (let count = 0; count < 30; count++) {
        if (await page.evaluate((wanted) => document.activeElement?.id === wanted, id)) return page.keyboard.press(key);
        await page.keyboard.press("Tab");
      }
      throw new Error(`Tab never reaches ${id}`);
    };
    await press("Enter", "load");
    await page.waitForFunction(READY, null, { timeout: 120_000 });
    await press("Control+A", "prompt");
    await page.keyboard.type(order.prompt);
    await press("Enter", "generate");
    await finished(page);
    const given = await page.textContent("#given");
    await press("Enter", "test");
    await page.waitForFunction(() => /^(Yes|No)/.test(document.getElementById("test-result").textContent));
    return { given, test: await page.textContent("#test-result") };
  },

  /** Asked for WebGPU: where it computes, and what it says. */
  async webgpu(context) {
    const page = await open(context);
    if (!(await page.evaluate(async () => (await navigator.gpu?.requestAdapter()) != null))) return { missing: true };
    const said = {};
    for (const name of order.packages) {
      await page.selectOption("#device", "webgpu");
      await load(page, name);
      const status = await page.textContent("#status");
      said[name] = { status, test: await page.textContent("#test-result"), text: await generate(page, order) };
    }
    return { said };
  },

  /** On a server that sends no headers: the first visit, and the second. */
  async plain(context) {
    const page = await open(context);
    const visit = async () => {
      await load(page, order.package);
      const isolated = await page.evaluate(() => globalThis.crossOriginIsolated);
      return { isolated, status: await page.textContent("#status"), text: await generate(page, order) };
    };
    const first = await visit();
    await page.evaluate(() => navigator.serviceWorker.ready.then(() => undefined));
    await page.reload();
    await page.waitForSelector(".card");
    return { first, second: await visit() };
  },

  /** Milliseconds to the first token and from there to the last, of every package and round. */
  async speed(context) {
    const page = await open(context, `?threads=${order.threads}`);
    const number = async (id) => Number.parseFloat((await page.textContent(id)).replaceAll(",", ""));
    const times = {};
    for (const name of order.packages) {
      await load(page, name);
      times[name] = [];
      for (let round = 0; round < order.rounds; round++) {
        await generate(page, order);
        times[name].push([await number("#first"), (1000 * (order.maxNewTokens - 1)) / (await number("#speed"))]);
      }
    }
    return { times };
  },

  /** A picture of the page with some text. */
  async picture(context) {
    const page = await open(context);
    await page.setViewportSize({ width: 900, height: 700 });
    await load(page, order.package);
    await generate(page, order);
    await page.locator("details").evaluate((element) => (element.open = false));
    await page.screenshot({ path: order.path, fullPage: true });
    return {};
  },
};

const browser = await chromium.launch({
  executablePath: order.browser,
  args: ["--no-sandbox", ...(order.scenario === "webgpu" ? SOFTWARE_WEBGPU : [])],
});
const result = await scenarios[order.scenario](await browser.newContext());
await browser.close();
answer(result);
