// SHA-256 (FIPS 180-4). Browsers offer their own only on https and localhost; a page served over
// plain http in a local network checks its model all the same.

const PRIMES = [];
for (let n = 2; PRIMES.length < 64; n += 1) {
  if (PRIMES.every((prime) => n % prime !== 0)) PRIMES.push(n);
}
const fraction32 = (value) => ((value - Math.floor(value)) * 2 ** 32) | 0;
const ROUND_WORDS = Int32Array.from(PRIMES, (prime) => fraction32(Math.cbrt(prime)));
const FIRST_STATE = Int32Array.from(PRIMES.slice(0, 8), (prime) => fraction32(Math.sqrt(prime)));

const turn = (word, bits) => (word >>> bits) | (word << (32 - bits));

function addBlock(state, view, offset, words) {
  for (let t = 0; t < 16; t += 1) words[t] = view.getInt32(offset + 4 * t);
  for (let t = 16; t < 64; t += 1) {
    const before = words[t - 15];
    const last = words[t - 2];
    const s0 = turn(before, 7) ^ turn(before, 18) ^ (before >>> 3);
    const s1 = turn(last, 17) ^ turn(last, 19) ^ (last >>> 10);
    words[t] = (words[t - 16] + s0 + words[t - 7] + s1) | 0;
  }
  let [a, b, c, d, e, f, g, h] = state;
  for (let t = 0; t < 64; t += 1) {
    const s1 = turn(e, 6) ^ turn(e, 11) ^ turn(e, 25);
    const chosen = (e & f) ^ (~e & g);
    const t1 = (h + s1 + chosen + ROUND_WORDS[t] + words[t]) | 0;
    const s0 = turn(a, 2) ^ turn(a, 13) ^ turn(a, 22);
    const majority = (a & b) ^ (a & c) ^ (b & c);
    h = g; g = f; f = e; e = (d + t1) | 0;
    d = c; c = b; b = a; a = (t1 + s0 + majority) | 0;
  }
  [a, b, c, d, e, f, g, h].forEach((word, i) => { state[i] += word; });
}

/** The digest (hex) of a Uint8Array, computed here. */
export function ownSha256(bytes) {
  const numWhole = bytes.length - (bytes.length % 64);
  const rest = bytes.length - numWhole;
  const tail = new Uint8Array(rest < 56 ? 64 : 128);
  tail.set(bytes.subarray(numWhole));
  tail[rest] = 0x80;
  const tailView = new DataView(tail.buffer);
  tailView.setUint32(tail.length - 8, Math.floor(bytes.length / 2 ** 29));
  tailView.setUint32(tail.length - 4, (bytes.length * 8) >>> 0);

  const state = Int32Array.from(FIRST_STATE);
  const words = new Int32Array(64);
  const view = new DataView(bytes.buffer, bytes.byteOffset, numWhole);
  for (let offset = 0; offset < numWhole; offset += 64) addBlock(state, view, offset, words);
  for (let offset = 0; offset < tail.length; offset += 64) addBlock(state, tailView, offset, words);
  return Array.from(state, (word) => (word >>> 0).toString(16).padStart(8, '0')).join('');
}

/** The digest (hex) of a Uint8Array, by the browser where it can. */
export async function sha256(bytes) {
  if (!globalThis.crypto?.subtle) return ownSha256(bytes);
  const digest = new Uint8Array(await crypto.subtle.digest('SHA-256', bytes));
  return Array.from(digest, (byte) => byte.toString(16).padStart(2, '0')).join('');
}
