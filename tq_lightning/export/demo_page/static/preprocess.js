// The evaluation transform of timm (resize, crop, normalize), with Pillow's arithmetic: a picture
// gives the same numbers here as in PyTorch. Source of the resampling: Pillow, Resample.c.

const PRECISION = 2 ** 22; // of Pillow's integer coefficients

const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));
// name -> [support, filter]
const FILTERS = {
  box: [0.5, (x) => (x > -0.5 && x <= 0.5 ? 1 : 0)],
  bilinear: [1, (x) => Math.max(0, 1 - Math.abs(x))],
  hamming: [1, (x) => (Math.abs(x) >= 1 ? 0 : sinc(x) * (0.54 + 0.46 * Math.cos(Math.PI * x)))],
  bicubic: [2, (v) => {
    const x = Math.abs(v), a = -0.5;
    if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
    return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
  }],
  lanczos: [3, (x) => (x >= -3 && x < 3 ? sinc(x) * sinc(x / 3) : 0)],
};

// Round half to even, as Python does.
function round(x) {
  const near = Math.round(x);
  return near - x === 0.5 && near % 2 ? near - 1 : near;
}

/** Integer coefficients of each output pixel: [first input pixel, coefficients]. */
function coefficients(input, output, [support, filter]) {
  const scale = input / output, stretch = Math.max(scale, 1), reach = support * stretch;
  return Array.from({ length: output }, (_, i) => {
    const center = (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(center - reach + 0.5));
    const end = Math.min(input, Math.trunc(center + reach + 0.5));
    const weights = [];
    for (let x = first; x < end; x++) weights.push(filter((x - center + 0.5) * (1 / stretch)));
    const sum = weights.reduce((a, b) => a + b, 0);
    return [first, weights.map((w) => {
      const exact = (sum === 0 ? w : w / sum) * PRECISION;
      return Math.trunc(exact < 0 ? exact - 0.5 : exact + 0.5);
    })];
  });
}

/** Resample lines of pixels: `step` and `lineStep` are distances in values, `count` is lines. */
function pass(source, target, table, count, [step, lineStep], [outStep, outLineStep]) {
  for (let line = 0; line < count; line++) {
    for (let i = 0; i < table.length; i++) {
      const [first, weights] = table[i];
      let sum = PRECISION / 2, at = line * lineStep + first * step;
      for (let k = 0; k < weights.length; k++, at += step) sum += source[at] * weights[k];
      target[line * outLineStep + i * outStep] = Math.floor(sum / PRECISION); // clamped to 0..255
    }
  }
}

/** Resize one channel, as Pillow resizes 8-bit images: rows, then columns. */
function resize(channel, width, height, newWidth, newHeight, filter) {
  if (filter === "nearest") {
    const out = new Uint8ClampedArray(newWidth * newHeight);
    for (let y = 0; y < newHeight; y++) {
      const row = Math.floor((y + 0.5) * (height / newHeight)) * width;
      for (let x = 0; x < newWidth; x++) {
        out[y * newWidth + x] = channel[row + Math.floor((x + 0.5) * (width / newWidth))];
      }
    }
    return out;
  }
  const kernel = FILTERS[filter] ?? FILTERS.bilinear;
  let data = channel;
  if (newWidth !== width) {
    const out = new Uint8ClampedArray(newWidth * height);
    pass(data, out, coefficients(width, newWidth, kernel), height, [1, width], [1, newWidth]);
    data = out;
  }
  if (newHeight !== height) {
    const out = new Uint8ClampedArray(newWidth * newHeight);
    const table = coefficients(height, newHeight, kernel);
    pass(data, out, table, newWidth, [newWidth, 1], [newWidth, 1]);
    data = out;
  }
  return data;
}

/** Size of the picture after the resize, before the crop. */
function resizedSize(width, height, options) {
  const [, targetHeight, targetWidth] = options.input_size;
  const part = options.crop_pct || 0.875;
  const h = Math.floor(targetHeight / part), w = Math.floor(targetWidth / part);
  if (options.crop_mode === "squash") return [w, h];
  if (options.crop_mode === "border" || h !== w) {
    const ratios = [height / h, width / w];
    const ratio = options.crop_mode === "border" ? Math.max(...ratios) : Math.min(...ratios);
    return [round(width / ratio), round(height / ratio)];
  }
  const long = Math.trunc((h * Math.max(width, height)) / Math.min(width, height));
  return width <= height ? [h, long] : [long, h];
}

/** Channels of RGBA pixels: red, green and blue, or Pillow's gray. */
function split(pixels, channels) {
  const { data } = pixels, count = pixels.width * pixels.height;
  const out = Array.from({ length: channels }, () => new Uint8ClampedArray(count));
  for (let i = 0; i < count; i++) {
    const [r, g, b] = [data[4 * i], data[4 * i + 1], data[4 * i + 2]];
    if (channels === 1) out[0][i] = (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16;
    else [out[0][i], out[1][i], out[2][i]] = [r, g, b];
  }
  return out;
}

/**
 * Make the input of the network from a picture.
 *
 * `pixels` is an ImageData, `options` the preprocessing of the packed file. Returns a Float32Array
 * (channels, height, width).
 */
export function preprocess(pixels, options) {
  const [channels, height, width] = options.input_size;
  const mean = options.mean ?? [0.485, 0.456, 0.406], std = options.std ?? [0.229, 0.224, 0.225];
  const [w, h] = resizedSize(pixels.width, pixels.height, options);
  const left = w > width ? round((w - width) / 2) : -Math.floor((width - w) / 2);
  const top = h > height ? round((h - height) / 2) : -Math.floor((height - h) / 2);
  const out = new Float32Array(channels * height * width), f = Math.fround;
  split(pixels, channels).forEach((channel, c) => {
    const small = resize(channel, pixels.width, pixels.height, w, h, options.interpolation);
    const m = f(mean[c] ?? mean[0]), s = f(std[c] ?? std[0]);
    const values = Float32Array.from({ length: 256 }, (_, v) => f(f(f(v / 255) - m) / s));
    const fill = options.crop_mode === "border" ? round(255 * (mean[c] ?? mean[0])) : 0;
    for (let y = 0; y < height; y++) {
      for (let x = 0; x < width; x++) {
        const sy = y + top, sx = x + left;
        const inside = sy >= 0 && sy < h && sx >= 0 && sx < w;
        out[(c * height + y) * width + x] = values[inside ? small[sy * w + sx] : fill];
      }
    }
  });
  return out;
}
