// The model's thread, seen from the page: requests are promises. When memory runs out the thread begins anew with less open at once.

const MEMORY = /memory|alloc|abort|unreachable|out of bounds|RangeError/i;
const ROOM = 1.2e9; // bytes that all open sessions may take, by a guess of twice their weights each
const SIMD = Uint8Array.of(0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 8, 1, 6, 0, 65, 0, 253, 15, 11);

export class Failure extends Error {}

/** Whether the browser has what the model needs, as a sentence where it has not. */
export function lacking() {
  if (typeof WebAssembly !== "object") return "This browser has no WebAssembly, which the model runs on. A newer one has it.";
  if (!WebAssembly.validate(SIMD)) {
    return "This browser has no WebAssembly SIMD, without which the model cannot run. Chrome and Firefox have it since 2021, Safari since 2023.";
  }
  if (typeof OffscreenCanvas !== "function") return "This browser cannot read photographs in the background (OffscreenCanvas); a newer one can.";
  return null;
}

export class Engine {
  constructor(manifest, told) {
    this.manifest = manifest;
    this.told = told; // of bytes loaded
    this.room = Math.max(1, Math.min(1 + manifest.methods.length, Math.floor(ROOM / (2 * manifest.weights.bytes))));
    this.waiting = new Map();
    this.next = 0;
    this.blob = null;
  }

  async start() {
    try {
      await this.#open();
    } catch (error) {
      if (!MEMORY.test(error.message)) throw error;
      if (this.room === 1) throw new Failure("memory");
      this.worker.terminate();
      this.room = 1;
      await this.start();
    }
  }

  async #open() {
    this.worker = await started();
    this.worker.onmessage = ({ data }) => this.#heard(data);
    this.worker.onerror = (event) => this.#lost(event.message || "the model's thread ended");
    ({ threads: this.threads } = await this.#ask("load", { manifest: this.manifest, room: this.room }));
  }

  /** Decode a photograph: {seen, width, height, shrunk}. */
  async photograph(blob) {
    const read = await this.#request("photograph", { blob });
    this.blob = blob;
    return read;
  }

  run(file) {
    return this.#request("run", { file });
  }

  time(file) {
    return this.#request("time", { file });
  }

  async #request(task, given) {
    try {
      return await this.#ask(task, given);
    } catch (error) {
      if (!MEMORY.test(error.message)) throw error;
      if (this.room === 1) throw new Failure("memory");
    }
    await this.#anew();
    return this.#request(task, given);
  }

  /** Once more with one session at a time; the thread's memory is only given back when it ends. */
  async #anew() {
    this.worker.terminate();
    this.#lost("the model's thread was started anew");
    this.room = 1;
    await this.start();
    if (this.blob) {
      await this.#ask("photograph", { blob: this.blob });
      await this.#ask("run", { file: this.manifest.dense.file });
    }
  }

  #ask(task, given) {
    const id = this.next++;
    return new Promise((resolve, reject) => {
      this.waiting.set(id, { resolve, reject });
      this.worker.postMessage({ id, task, given });
    });
  }

  #heard({ id, done, failed, loaded, of }) {
    if (loaded) return this.told(loaded, of);
    const { resolve, reject } = this.waiting.get(id);
    this.waiting.delete(id);
    if (failed === undefined) resolve(done);
    else reject(new Failure(failed));
  }

  #lost(why) {
    for (const { reject } of this.waiting.values()) reject(new Failure(why));
    this.waiting.clear();
  }
}

/**
 * A thread begun from a blob is bound by the page's content security policy, one begun from a file by that file's headers alone,
 * which a static server does not send. A browser that refuses the first gets the second.
 */
async function started() {
  const url = new URL("worker.js", import.meta.url).href;
  const blob = URL.createObjectURL(new Blob([`import ${JSON.stringify(url)};`], { type: "text/javascript" }));
  try {
    return await ready(new Worker(blob, { type: "module" }));
  } catch {
    return await ready(new Worker(url, { type: "module" }));
  } finally {
    URL.revokeObjectURL(blob);
  }
}

function ready(worker) {
  return new Promise((resolve, reject) => {
    worker.onmessage = () => resolve(worker);
    worker.onerror = (event) => {
      worker.terminate();
      reject(new Failure(event.message || "the model's thread does not start"));
    };
  });
}
