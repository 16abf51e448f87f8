// The network: fetched from this page's own folder, checked, and run by ONNX Runtime in WebAssembly.

import { sha256 } from './sha256.js';

/** Why the network cannot be used, as a sentence for the reader. */
export class ModelError extends Error {}

const FORMAT = 3;
const AGAIN = 'Export the page again, and copy its whole folder.';
const localUrl = (name) => new URL(name, import.meta.url).href;

async function fetchLocal(name) {
  let response;
  try {
    // no-cache: model.json of this export must not meet the network of an older one.
    response = await fetch(localUrl(name), { cache: 'no-cache' });
  } catch (error) {
    throw new ModelError(`${name} cannot be fetched (${error.message}). Is the server running?`);
  }
  if (!response.ok) {
    throw new ModelError(`${name} cannot be fetched (HTTP ${response.status}). ${AGAIN}`);
  }
  return response;
}

async function fetchBytes(name, numBytes, onProgress) {
  const response = await fetchLocal(name);
  try {
    if (!response.body) return new Uint8Array(await response.arrayBuffer());
    const chunks = [];
    let numRead = 0;
    for (const reader = response.body.getReader(); ;) {
      const { done, value } = await reader.read();
      if (done) break;
      chunks.push(value);
      numRead += value.length;
      onProgress(numRead / numBytes);
    }
    return new Uint8Array(await new Blob(chunks).arrayBuffer());
  } catch (error) {
    throw new ModelError(`${name} broke off while it was fetched (${error.message}). Load the page again.`);
  }
}

/** JSON with sorted keys, no spaces and all in ASCII: the text whose hash model.json holds. */
export function canonicalJson(value) {
  if (Array.isArray(value)) return `[${value.map(canonicalJson).join(',')}]`;
  if (value !== null && typeof value === 'object') {
    const fields = Object.keys(value).sort()
      .map((key) => `${canonicalJson(key)}:${canonicalJson(value[key])}`);
    return `{${fields.join(',')}}`;
  }
  return JSON.stringify(value).replace(
    /[\u007f-\uffff]/g,
    (unit) => `\\u${unit.charCodeAt(0).toString(16).padStart(4, '0')}`,
  );
}

async function fetchDescription() {
  const response = await fetchLocal('model.json');
  let description;
  try {
    description = await response.json();
  } catch {
    throw new ModelError(`model.json is damaged. ${AGAIN}`);
  }
  if (description?.format !== FORMAT) {
    throw new ModelError(`model.json is of another version of this page. ${AGAIN}`);
  }
  const { content_sha256: digest, ...content } = description;
  if (await sha256(new TextEncoder().encode(canonicalJson(content))) !== digest) {
    throw new ModelError(`model.json was changed after it was written. ${AGAIN}`);
  }
  return description;
}

async function loadRuntime(description) {
  try {
    const ort = await import(localUrl(description.runtime.script));
    ort.env.wasm.numThreads = 1; // more would need headers that a plain server does not send
    ort.env.wasm.proxy = false;
    ort.env.wasm.wasmPaths = { wasm: localUrl(description.runtime.wasm) };
    ort.env.logLevel = 'error';
    return ort;
  } catch (error) {
    throw new ModelError(`The runtime cannot be loaded (${error.message}). ${AGAIN}`);
  }
}

export function softmax(logits) {
  const largest = Math.max(...logits);
  const powers = Array.from(logits, (logit) => Math.exp(logit - largest));
  const sum = powers.reduce((total, power) => total + power, 0);
  return powers.map((power) => power / sum);
}

/** Fetch, check and open the network. `onProgress` gets the share of it that has arrived. */
export async function loadModel(onProgress = () => {}) {
  const start = performance.now();
  const description = await fetchDescription();
  const { model } = description;
  const bytes = await fetchBytes(model.file, model.size_bytes, onProgress);
  const digest = await sha256(bytes);
  if (digest !== model.sha256) {
    throw new ModelError(
      `${model.file} is not the network that model.json describes, so it is not run: its SHA-256 `
        + `starts with ${digest.slice(0, 12)}, expected ${model.sha256.slice(0, 12)}. ${AGAIN}`,
    );
  }
  const ort = await loadRuntime(description);
  let session;
  try {
    session = await ort.InferenceSession.create(bytes, { executionProviders: ['wasm'] });
  } catch (error) {
    throw new ModelError(`ONNX Runtime cannot open ${model.file} (${error.message}). ${AGAIN}`);
  }
  const opened = new Model(description, ort, session, performance.now() - start);
  // The first run is far slower than those after it; and a network that cannot run says so now.
  const [channels, height, width] = description.image_shape;
  await opened.classifyPixels(new Uint8Array(channels * height * width));
  return opened;
}

export class Model {
  constructor(description, ort, session, loadMs) {
    this.description = description;
    this.loadMs = loadMs;
    this.ort = ort;
    this.session = session;
    this.lastRun = Promise.resolve(); // a session takes one run at a time
  }

  /** Classify uint8 pixels HWC of the network's size: { logits, probabilities, ms }. */
  classifyPixels(pixels) {
    const run = this.lastRun.then(() => this.runPixels(pixels));
    this.lastRun = run.catch(() => {});
    return run;
  }

  async runPixels(pixels) {
    const { image_shape: [channels, height, width], class_names: names, model } = this.description;
    const numPixels = height * width;
    if (pixels.length !== numPixels * channels) {
      throw new ModelError(
        `${pixels.length} values were given, expected ${height} × ${width} × ${channels} (HWC).`,
      );
    }
    const planes = new Float32Array(pixels.length);
    for (let i = 0; i < numPixels; i += 1) {
      for (let c = 0; c < channels; c += 1) {
        planes[c * numPixels + i] = pixels[i * channels + c] / 255;
      }
    }
    const feeds = { [model.input]: new this.ort.Tensor('float32', planes, [1, channels, height, width]) };
    const start = performance.now();
    let outputs;
    try {
      outputs = await this.session.run(feeds, [model.output]);
    } catch (error) {
      throw new ModelError(`The network failed on this picture (${error.message}).`);
    }
    const ms = performance.now() - start;
    const logits = Array.from(outputs[model.output].data);
    if (logits.length !== names.length || !logits.every(Number.isFinite)) {
      throw new ModelError(`The network did not return ${names.length} finite values. ${AGAIN}`);
    }
    return { logits, probabilities: softmax(logits), ms };
  }
}
