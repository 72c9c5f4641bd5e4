// Standard normal noise of whole-number seeds, and ways between them. A seed here is not the same noise as in torch or numpy.

/** A generator of whole numbers below 2^32: xoshiro128**, its state filled by splitmix32. */
function generator(seed) {
  let state = seed >>> 0;
  const split = () => {
    state = (state + 0x9e3779b9) >>> 0;
    let z = state;
    z = Math.imul(z ^ (z >>> 16), 0x85ebca6b);
    z = Math.imul(z ^ (z >>> 13), 0xc2b2ae35);
    return (z ^ (z >>> 16)) >>> 0;
  };
  const turn = (x, k) => ((x << k) | (x >>> (32 - k))) >>> 0;
  const s = [split(), split(), split(), split()];
  return () => {
    const found = Math.imul(turn(Math.imul(s[1], 5) >>> 0, 7), 9) >>> 0;
    const t = (s[1] << 9) >>> 0;
    s[2] ^= s[0];
    s[3] ^= s[1];
    s[1] ^= s[2];
    s[0] ^= s[3];
    s[2] ^= t;
    s[3] = turn(s[3] >>> 0, 11);
    return found;
  };
}

/** Return `length` standard normal numbers of a seed, by Box and Muller's transform. */
export function gaussian(seed, length) {
  const next = generator(seed);
  const found = new Float32Array(length);
  for (let i = 0; i < length; i += 2) {
    const radius = Math.sqrt(-2 * Math.log((next() + 1) / 4294967296));
    const angle = (2 * Math.PI * next()) / 4294967296;
    found[i] = radius * Math.cos(angle);
    if (i + 1 < length) found[i + 1] = radius * Math.sin(angle);
  }
  return found;
}

/** Return the point at t of the great circle from a to b: halfway between two noises lies a noise, not a blur. */
export function slerp(a, b, t) {
  let dot = 0, aa = 0, bb = 0;
  for (let i = 0; i < a.length; i++) {
    dot += a[i] * b[i];
    aa += a[i] * a[i];
    bb += b[i] * b[i];
  }
  const angle = Math.acos(Math.min(1, Math.max(-1, dot / Math.sqrt(aa * bb))));
  const sine = Math.sin(angle);
  const [p, q] = sine < 1e-4 ? [1 - t, t] : [Math.sin((1 - t) * angle) / sine, Math.sin(t * angle) / sine];
  return a.map((value, i) => p * value + q * b[i]);
}

/** Return the noise at (x, y), each from 0 to 1, of a square with noises at its corners, row by row. */
export function between([topLeft, topRight, bottomLeft, bottomRight], x, y) {
  return slerp(slerp(topLeft, topRight, x), slerp(bottomLeft, bottomRight, x), y);
}
