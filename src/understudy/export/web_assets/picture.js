// A picture file to the uint8 pixels that the network takes.
//
// The rule is stated in model.json under "preprocessing", and Python follows it too
// (understudy.export.web_page.picture_pixels): upright by its Exif entry, colours as stored (no
// profile applied), what is transparent on black, grey by Pillow's weights where the network is
// grey, then all of it ("stretch", where the training pictures were) or the largest centred part
// with the network's proportions, brought to its size with Pillow's bilinear filter, all columns
// first, then all rows. The browser's own scaling is not used: each browser has another.

/** What is wrong with one picture, as a sentence for the reader. */
export class PictureError extends Error {}

const text = (bytes, from, to) => String.fromCharCode(...bytes.subarray(from, to));

function jpegSize(view) {
  let at = 2;
  while (at + 9 <= view.byteLength) {
    const marker = view.getUint8(at + 1);
    if (view.getUint8(at) !== 0xff || marker === 0xff) {
      at += 1;
    } else if (marker === 0x00 || marker === 0x01 || (marker >= 0xd0 && marker <= 0xd9)) {
      at += 2; // these stand alone, without a length
    } else if (marker >= 0xc0 && marker <= 0xcf && ![0xc4, 0xc8, 0xcc].includes(marker)) {
      return { width: view.getUint16(at + 7), height: view.getUint16(at + 5) };
    } else {
      at += 2 + view.getUint16(at + 2);
    }
  }
  return null;
}

function gifSize(view) {
  const screen = { width: view.getUint16(6, true), height: view.getUint16(8, true) };
  const tableBytes = (flags) => (flags & 0x80 ? 3 * 2 ** ((flags & 7) + 1) : 0);
  let at = 13 + tableBytes(view.getUint8(10));
  while (view.getUint8(at) === 0x21) {
    at += 2;
    while (view.getUint8(at) !== 0) at += 1 + view.getUint8(at);
    at += 1;
  }
  if (view.getUint8(at) !== 0x2c) return null;
  // Decoders enlarge the screen to a first frame that is larger.
  return {
    width: Math.max(screen.width, view.getUint16(at + 1, true) + view.getUint16(at + 5, true)),
    height: Math.max(screen.height, view.getUint16(at + 3, true) + view.getUint16(at + 7, true)),
  };
}

function webpSize(view, kind) {
  if (kind === 'VP8X') {
    const size24 = (at) => view.getUint16(at, true) + (view.getUint8(at + 2) << 16) + 1;
    return { width: size24(24), height: size24(27) };
  }
  if (kind === 'VP8L') {
    const bits = view.getUint32(21, true);
    return { width: (bits & 0x3fff) + 1, height: ((bits >>> 14) & 0x3fff) + 1 };
  }
  if (kind !== 'VP8 ') return null;
  return { width: view.getUint16(26, true) & 0x3fff, height: view.getUint16(28, true) & 0x3fff };
}

function bmpSize(view) {
  if (view.getUint32(14, true) === 12) {
    return { width: view.getUint16(18, true), height: view.getUint16(20, true) };
  }
  return { width: view.getInt32(18, true), height: Math.abs(view.getInt32(22, true)) };
}

function formatOf(bytes) {
  const start = text(bytes, 0, 16);
  if (start.startsWith('\x89PNG\r\n\x1a\n')) return 'PNG';
  if (start.startsWith('\xff\xd8\xff')) return 'JPEG';
  if (start.startsWith('GIF87a') || start.startsWith('GIF89a')) return 'GIF';
  if (start.startsWith('RIFF') && start.slice(8, 12) === 'WEBP') return 'WebP';
  return start.startsWith('BM') ? 'BMP' : null;
}

/** Format, width and height by the file's header; null where no header of that kind is found. */
export function readHeader(bytes) {
  const format = formatOf(bytes);
  if (format === null) return null;
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  let size = null;
  try {
    if (format === 'PNG') size = { width: view.getUint32(16), height: view.getUint32(20) };
    else if (format === 'JPEG') size = jpegSize(view);
    else if (format === 'GIF') size = gifSize(view);
    else if (format === 'WebP') size = webpSize(view, text(bytes, 12, 16));
    else size = bmpSize(view);
  } catch (error) {
    if (!(error instanceof RangeError)) throw error; // RangeError: the file ends inside its header
  }
  return { format, ...(size ?? { width: 0, height: 0 }) };
}

const count = (number) => number.toLocaleString('en');
const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;

function checkSize({ width, height }, maxPixels) {
  if (width * height > maxPixels) {
    throw new PictureError(
      `This picture is too large: ${count(width)} × ${count(height)} pixels, more than the `
        + `${count(maxPixels / 1e6)} million allowed. Choose a smaller one.`,
    );
  }
}

/** Bytes of the file, judged by their number and header before anything is decoded. */
async function readPicture(file, limits) {
  if (file.size > limits.max_file_bytes) {
    throw new PictureError(
      `This file is too large: ${megabytes(file.size)}, more than the `
        + `${megabytes(limits.max_file_bytes)} allowed. Choose a smaller picture.`,
    );
  }
  let bytes;
  try {
    bytes = new Uint8Array(await file.arrayBuffer());
  } catch {
    throw new PictureError('This file cannot be read. Choose it again, or another one.');
  }
  if (bytes.length === 0) throw new PictureError('This file is empty. Choose another one.');
  const header = readHeader(bytes);
  if (header === null) {
    throw new PictureError(
      'This is not a picture that the page knows. Choose a PNG, JPEG, GIF, WebP or BMP file.',
    );
  }
  if (header.width < 1 || header.height < 1) throw broken(header);
  checkSize(header, limits.max_pixels);
  return { bytes, header };
}

function broken(header) {
  return new PictureError(
    `This ${header.format} picture is broken and cannot be decoded. Choose another one.`,
  );
}

/** The edges of a whole picture, which is then stretched. */
const whole = (width, height) => ({ left: 0, top: 0, right: width, bottom: height });

/** The largest centred part with the proportions of the output; its edges may be fractions. */
function centredCrop(width, height, outWidth, outHeight) {
  const ratio = outWidth / outHeight;
  let cropWidth = width;
  let cropHeight = height;
  if (width / height > ratio) cropWidth = ratio * height;
  else if (width / height < ratio) cropHeight = width / ratio;
  const left = (width - cropWidth) * 0.5;
  const top = (height - cropHeight) * 0.5;
  // Pillow keeps the edges in 32 bits.
  const edges = [left, top, left + cropWidth, top + cropHeight].map(Math.fround);
  return { left: edges[0], top: edges[1], right: edges[2], bottom: edges[3] };
}

const WEIGHT_BITS = 22;

/** For every output pixel of a row or column: the first input pixel and the fixed-point weights. */
function bilinearWeights(size, from, to, outSize) {
  const scale = Math.fround(to - from) / outSize;
  const support = Math.max(scale, 1); // wider when shrinking, so that no input pixel is skipped
  return Array.from({ length: outSize }, (_, i) => {
    const centre = from + (i + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - support + 0.5));
    const end = Math.min(size, Math.trunc(centre + support + 0.5));
    const weights = Array.from({ length: end - first }, (__, k) =>
      Math.max(0, 1 - Math.abs((first + k - centre + 0.5) * (1 / support))));
    let sum = 0;
    for (const weight of weights) sum += weight;
    const fixed = weights.map((weight) => Math.trunc(0.5 + (weight / sum) * 2 ** WEIGHT_BITS));
    return { first, end, weights: Int32Array.from(fixed) };
  });
}

/** One output value: a weighted sum of every `step`-th value from `at` on, rounded. */
function weigh(values, at, step, weights) {
  let sum = 1 << (WEIGHT_BITS - 1);
  for (let k = 0, from = at; k < weights.length; k += 1, from += step) {
    sum += values[from] * weights[k];
  }
  return sum >> WEIGHT_BITS;
}

/** RGBA of a canvas to the network's channels, without the alpha, which is opaque there. */
function toChannels(rgba, channels) {
  const numPixels = rgba.length / 4;
  const out = new Uint8Array(numPixels * channels);
  for (let i = 0; i < numPixels; i += 1) {
    const r = rgba[4 * i];
    const g = rgba[4 * i + 1];
    const b = rgba[4 * i + 2];
    if (channels === 1) {
      out[i] = (r * 19595 + g * 38470 + b * 7471 + 0x8000) >> 16; // ITU-R 601-2, as Pillow's "L"
    } else {
      out[3 * i] = r;
      out[3 * i + 1] = g;
      out[3 * i + 2] = b;
    }
  }
  return out;
}

function readableCanvas(width, height) {
  const canvas = document.createElement('canvas');
  canvas.width = width;
  canvas.height = height;
  // willReadFrequently keeps it off the graphics card, whose arithmetic differs by machine.
  const context = canvas.getContext('2d', { alpha: false, willReadFrequently: true });
  context.imageSmoothingEnabled = false;
  return context;
}

const STRIP_ROWS = 64; // a whole picture is more than the canvas of a phone may hold
const MAX_BUSY_MS = 50;

/** Crop and resize a bitmap to uint8 pixels HWC: columns first, in strips of rows, then rows. */
async function fit(bitmap, [channels, outHeight, outWidth], resize) {
  const crop = resize === 'stretch'
    ? whole(bitmap.width, bitmap.height)
    : centredCrop(bitmap.width, bitmap.height, outWidth, outHeight);
  const columns = bilinearWeights(bitmap.width, crop.left, crop.right, outWidth);
  const rows = bilinearWeights(bitmap.height, crop.top, crop.bottom, outHeight);
  const [left, right] = [columns[0].first, columns.at(-1).end];
  const [top, bottom] = [rows[0].first, rows.at(-1).end];
  const width = right - left;
  const rowBytes = outWidth * channels;
  const narrow = new Uint8Array((bottom - top) * rowBytes);
  const context = readableCanvas(width, Math.min(STRIP_ROWS, bottom - top));
  let rested = performance.now();
  for (let y = top; y < bottom; y += STRIP_ROWS) {
    const height = Math.min(STRIP_ROWS, bottom - y);
    context.fillRect(0, 0, width, height); // black, under what is transparent
    context.drawImage(bitmap, left, y, width, height, 0, 0, width, height);
    const strip = toChannels(context.getImageData(0, 0, width, height).data, channels);
    for (let row = 0; row < height; row += 1) {
      let to = (y - top + row) * rowBytes;
      for (const { first, weights } of columns) {
        const at = (row * width + first - left) * channels;
        for (let c = 0; c < channels; c += 1, to += 1) {
          narrow[to] = weigh(strip, at + c, channels, weights);
        }
      }
    }
    if (performance.now() - rested > MAX_BUSY_MS) {
      await new Promise((resolve) => { setTimeout(resolve); });
      rested = performance.now();
    }
  }
  const pixels = new Uint8Array(outHeight * rowBytes);
  rows.forEach(({ first, weights }, row) => {
    for (let i = 0; i < rowBytes; i += 1) {
      pixels[row * rowBytes + i] = weigh(narrow, (first - top) * rowBytes + i, rowBytes, weights);
    }
  });
  return pixels;
}

/**
 * Decode a File or Blob to { pixels (Uint8Array HWC), width, height, format }, by the size, the
 * limits and the rule for other sizes of a description (`model.json`).
 * Throws PictureError for whatever is wrong with the file.
 */
export async function pictureOf(file, { image_shape: imageShape, limits, preprocessing }) {
  const { bytes, header } = await readPicture(file, limits);
  let bitmap;
  try {
    bitmap = await createImageBitmap(new Blob([bytes]), {
      colorSpaceConversion: 'none',
      premultiplyAlpha: 'none',
      imageOrientation: 'from-image',
    });
  } catch {
    throw broken(header);
  }
  try {
    checkSize(bitmap, limits.max_pixels);
    const pixels = await fit(bitmap, imageShape, preprocessing.resize);
    return { pixels, width: bitmap.width, height: bitmap.height, format: header.format };
  } finally {
    bitmap.close();
  }
}

/** Whether pixels come out of a canvas as they went in; some privacy settings disturb them. */
export function canvasIsExact() {
  const context = readableCanvas(16, 16);
  const image = context.createImageData(16, 16);
  image.data.forEach((_, i) => { image.data[i] = i % 4 === 3 ? 255 : (i * 37) % 256; });
  context.putImageData(image, 0, 0);
  const read = context.getImageData(0, 0, 16, 16).data;
  return read.every((value, i) => value === image.data[i]);
}
