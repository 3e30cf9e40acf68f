// Keeps the page, so that it works without a network, and lets it do no more than fetch its own files. PAGE is written above.

const OURS = `squeezevit ${self.registration.scope} `; // another page on this server has its own
const NAME = OURS + PAGE.version;
const SHELL = PAGE.files.filter((name) => !/^(model|ort|photographs)\//.test(name) || name === "model/manifest.json");
const ISOLATED = { "Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp" }; // threads need it

self.addEventListener("install", (event) => {
  event.waitUntil(caches.open(NAME).then((cache) => cache.addAll(SHELL)).then(() => self.skipWaiting()));
});

self.addEventListener("activate", (event) => {
  event.waitUntil(
    caches.keys()
      .then((names) => Promise.all(names.filter((name) => name.startsWith(OURS) && name !== NAME).map((name) => caches.delete(name))))
      .then(() => self.clients.claim()),
  );
});

self.addEventListener("fetch", (event) => {
  const url = new URL(event.request.url);
  const inside = url.origin === self.location.origin && url.href.startsWith(self.registration.scope);
  event.respondWith(event.request.method === "GET" && inside ? answered(event, url) : Response.error());
});

self.addEventListener("message", (event) => {
  if (event.data === "keep") event.waitUntil(keepAll().then((whole) => event.source.postMessage({ kept: whole })));
});

async function answered(event, url) {
  const path = url.href.slice(self.registration.scope.length).split(/[?#]/)[0] || "index.html";
  const cache = await caches.open(NAME);
  const kept = await cache.match(path);
  if (kept) return isolated(kept);
  const found = await fetch(event.request);
  if (found.ok && PAGE.files.includes(path)) event.waitUntil(cache.put(path, found.clone()).catch(() => {}));
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
    for (const name of PAGE.files) if (!(await cache.match(name))) await cache.add(name);
    return true;
  } catch {
    return false; // no room, or no network
  }
}
