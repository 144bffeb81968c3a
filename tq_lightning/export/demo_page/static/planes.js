// Bit planes of a packed file -> stored codes, in the order in which the planes arrive.

const FIRST_PLANES = 2;

/** Number of planes to load before the first prediction: 2, or those of the narrowest width. */
export function firstPlanes({ stored_bits: stored, widths }) {
  return Math.max(Math.min(FIRST_PLANES, stored), widths[0]);
}

/** Put plane `p` into codes of `stored` bits. A plane has eight codes a byte, the first highest. */
export function addPlane(codes, plane, p, stored) {
  const bit = 1 << (stored - 1 - p);
  for (let i = 0; i < plane.length; i++) {
    const byte = plane[i];
    if (byte === 0) continue;
    for (let j = 0; j < 8; j++) if (byte & (128 >> j)) codes[8 * i + j] |= bit;
  }
}

/**
 * Load planes, the first `firstPlanes` in one request and each further one in its own.
 *
 * A server that does not support range requests answers the first one with the whole file (status
 * 200). It is then read to its end, and no further request is made.
 *
 * `onProgress(bytes of all planes so far)` follows the download, `onPlane(p, bytes)` gets each plane
 * once it is complete and checked. Resolves to true if the server supports ranges.
 */
export async function loadPlanes(facts, firstPlanes, onProgress, onPlane) {
  const { begin, bytes: size, sha256 } = facts.planes, stored = facts.stored_bits;
  const all = new Uint8Array(size * stored);
  let done = 0, ranges = true;
  for (let next = 0; next < stored && ranges; next = done) {
    const until = next === 0 ? Math.min(firstPlanes, stored) : next + 1;
    const from = begin + next * size, to = begin + until * size;
    const answer = await fetch(facts.file, { headers: { Range: `bytes=${from}-${to - 1}` } });
    if (!answer.ok) throw new Error(`the server returned ${answer.status} for ${facts.file}`);
    let at = -begin; // position in `all` of the next byte
    if (answer.status === 206) {
      const start = /^bytes (\d+)-/.exec(answer.headers.get("Content-Range") ?? "")?.[1];
      if (start !== undefined && Number(start) !== from) throw new Error("the server sent another range");
      at = from - begin;
    } else {
      ranges = false;
    }
    for await (const piece of pieces(answer)) {
      const skip = Math.max(0, -at);
      if (piece.length > skip && at < all.length) {
        all.set(piece.subarray(skip, Math.min(piece.length, all.length - at)), at + skip);
      }
      at += piece.length;
      onProgress(Math.min(Math.max(at, 0), all.length));
      while (done < stored && (done + 1) * size <= at) {
        const plane = all.subarray(done * size, (done + 1) * size);
        await check(plane, sha256[done], done);
        onPlane(done++, plane);
      }
    }
    if (done < (ranges ? until : stored)) throw new Error(`${facts.file} is incomplete`);
  }
  return ranges;
}

async function* pieces(answer) {
  const reader = answer.body.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    yield value;
  }
}

/** Compare with the checksum of the file. Browsers offer SHA-256 to secure pages and localhost. */
async function check(plane, expected, p) {
  if (!globalThis.crypto?.subtle) return;
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", plane));
  const hex = Array.from(digest, (byte) => byte.toString(16).padStart(2, "0")).join("");
  if (hex !== expected) throw new Error(`plane ${p} does not match its checksum`);
}
