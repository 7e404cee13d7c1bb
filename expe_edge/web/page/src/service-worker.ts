/**
 * Serves the page without a network once it has been seen, and isolates it on hosts that send no headers for it.
 *
 * What the page is made of is kept by its hash; packages are kept by the page itself (`download.ts`).
 */
declare const __SHELL__: { version: string; files: string[] };
declare const self: ServiceWorkerGlobalScope;

const SHELL = `shell-${__SHELL__.version}`;
/** What may change under its name: it comes from the network where there is one. */
const LISTED = /\/(index\.html|packages\/list\.json)?$/;

self.addEventListener("install", (event) => {
  event.waitUntil(keepShell().then(() => self.skipWaiting()));
});

self.addEventListener("activate", (event) => {
  event.waitUntil(dropEarlier().then(() => self.clients.claim()));
});

self.addEventListener("fetch", (event) => {
  const url = new URL(event.request.url);
  if (event.request.method !== "GET" || url.origin !== self.location.origin) return;
  if (url.searchParams.has("v")) return; // a package's file
  event.respondWith(answer(event.request, LISTED.test(url.pathname)).then(isolated));
});

async function keepShell(): Promise<void> {
  const cache = await caches.open(SHELL);
  await cache.addAll([...__SHELL__.files, "./", "packages/list.json"]);
}

async function dropEarlier(): Promise<void> {
  const names = await caches.keys();
  await Promise.all(names.filter((name) => name.startsWith("shell-") && name !== SHELL).map((name) => caches.delete(name)));
}

async function answer(request: Request, listed: boolean): Promise<Response> {
  const cache = await caches.open(SHELL);
  const kept = () => cache.match(request, { ignoreSearch: true });
  if (!listed) return (await kept()) ?? fetch(request);
  try {
    const response = await fetch(request);
    if (response.ok) await cache.put(new URL(request.url).pathname, response.clone());
    return response;
  } catch (error) {
    const found = await kept();
    if (found) return found;
    throw error;
  }
}

/** The headers by which a page may share memory between threads. */
function isolated(response: Response): Response {
  if (response.status === 0 || response.type === "opaque") return response;
  const headers = new Headers(response.headers);
  headers.set("Cross-Origin-Opener-Policy", "same-origin");
  headers.set("Cross-Origin-Embedder-Policy", "require-corp");
  return new Response(response.body, { status: response.status, statusText: response.statusText, headers });
}

export {};
