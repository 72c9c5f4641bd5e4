// Draws beside the page, so that the page answers while a picture is made.

const parts = {};
let ort, info, encoded;

async function load(backend, given) {
  info = given;
  ort = await import(backend === "webgpu" ? "./runtime/ort.webgpu.min.mjs" : "./runtime/ort.wasm.min.mjs");
  ort.env.wasm.wasmPaths = new URL("./runtime/", import.meta.url).href;
  // Threads need a server that isolates its pages; a plain one does not.
  ort.env.wasm.numThreads = self.crossOriginIsolated ? Math.min(4, navigator.hardwareConcurrency) : 1;
  for (const name of info.parts) {
    const place = new URL(`./${name}.onnx`, import.meta.url).href;
    parts[name] = await ort.InferenceSession.create(place, { executionProviders: [backend] });
  }
}

const whole = (numbers, shape) => new ort.Tensor("int64", BigInt64Array.from(numbers, BigInt), shape);
const run = async (name, given) => Object.values(await parts[name].run(given))[0];

/** Pictures [N, C, H, W] of noise for N rows, and of N labels, or of one row of token ids. */
async function draw({ noise, num, labels, ids }) {
  const start = performance.now();
  const given = { noise: new ort.Tensor("float32", noise, [num, ...info.sample_shape]) };
  if (info.text) {
    const key = `${ids} ${num}`;
    if (encoded?.key !== key) {
      const tokens = whole(Array(num).fill(ids).flat(), [num, ids.length]);
      encoded = { key, rows: await run("text_encoder", { token_ids: tokens }) };
    }
    given[info.condition] = encoded.rows;
  } else if (info.labels) {
    given[info.condition] = whole(labels, [num]);
  }
  let found = await run("student", given);
  if (info.text) found = await run("decoder", { latents: found });
  const pixels = new Float32Array(await found.getData());
  return { pixels, shape: found.dims, ms: performance.now() - start };
}

// One after the other: a session runs once at a time, and nothing is drawn before all is loaded.
let last = Promise.resolve();
self.onmessage = ({ data }) => (last = last.then(() => answer(data)));

async function answer({ id, load: what, ...asked }) {
  try {
    const found = what ? await load(what.backend, what.info) : await draw(asked);
    self.postMessage({ id, found });
  } catch (error) {
    self.postMessage({ id, error: String(error?.message ?? error) });
  }
}
