// Keeps the page, so that it works without a network, and lets it do no more than fetch its own files. PAGE is written above.

const OURS = `squeezevit ${self.registration.scope} `; // another page on this server has its own
const NAME = OURS + PAGE.version;
const MANIFEST = "model/manifest.json";
const PATIENCE = 1500; // milliseconds for a server that may be there or not
const SHELL = PAGE.files.filter((name) => !/^(model|ort|photographs)\//.test(name) || name === MANIFEST);
const ISOLATED = { "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp" }; // threads need it

self.addEventListener("install", (event) => {
  event.waitUntil(caches.open(NAME).then((cache) => cache.addAll(SHELL.map(asServed))));
});

self.addEventListener("activate", (event) => {
  event.waitUntil(
    caches.keys()
      .then((names) => Promise.all(names.filter((name) => name.startsWith(OURS) && name !== NAME).map((name) => caches.delete(name))))
      .then(() => self.clients.claim()),
  );
});

/** What else the server has below this folder is fetched as if there were no page; but for the page itself, which fetches its own alone. */
self.addEventListener("fetch", (event) => {
  const path = pathOf(event.request.url);
  if (event.request.method === "GET" && PAGE.files.includes(path)) {
    event.respondWith(event.request.mode === "navigate" ? entered(event, path) : answered(event, path));
  } else if (event.request.mode !== "navigate") {
    event.respondWith(fromPage(event).then((own) => (own ? Response.error() : fetch(event.request))));
  }
});

self.addEventListener("message", (event) => {
  if (event.data === "now") self.skipWaiting();
  if (event.data === "version") event.source.postMessage({ version: PAGE.version });
  if (event.data === "keep") event.waitUntil(keepAll().then((whole) => event.source.postMessage({ kept: whole })));
});

/** Of an address its place in this folder; null for any other. */
function pathOf(address) {
  const { scope } = self.registration;
  return address.startsWith(scope) ? address.slice(scope.length).split(/[?#]/)[0] || "index.html" : null;
}

/** A request that the browser's own store of older answers has no say in: it may hold the page's last version. */
function asServed(address) {
  return new Request(address, { cache: "reload" });
}

/** Whether the page asks, or a thread of it, which has a blob's address. */
async function fromPage(event) {
  const client = await self.clients.get(event.clientId);
  return !client || client.url.startsWith("blob:") || PAGE.files.includes(pathOf(client.url));
}

/** Where the server says, and soon, that there is no such page any more, something else is there now: it is left to it. */
async function entered(event, path) {
  const late = new Promise((resolve) => setTimeout(resolve, PATIENCE));
  const found = await Promise.race([fetch(MANIFEST, { method: "HEAD", cache: "no-store" }).catch(() => null), late]);
  if (found?.status !== 404 && found?.status !== 410) return answered(event, path);
  await self.registration.unregister();
  for (const name of await caches.keys()) if (name.startsWith(OURS)) await caches.delete(name);
  const next = await fetch(asServed(event.request.url));
  return next.redirected ? Response.redirect(next.url) : next;
}

async function answered(event, path) {
  const cache = await caches.open(NAME);
  const kept = await cache.match(path);
  if (kept) return isolated(kept);
  const found = await fetch(asServed(path));
  if (found.ok) event.waitUntil(cache.put(path, found.clone()).catch(() => {}));
  return isolated(found);
}

function isolated(response) {
  const headers = new Headers(response.headers);
  for (const [name, value] of Object.entries(ISOLATED)) headers.set(name, value);
  return new Response(response.body, { status: response.status, statusText: response.statusText, headers });
}

async function keepAll() {
  const cache = await caches.open(NAME);
  try {
    for (const name of PAGE.files) if (!(await cache.match(name))) await cache.add(asServed(name));
    return true;
  } catch {
    return false; // no room, or no network
  }
}
