// What the reader sees and does. Other code on this page's origin uses `window.understudy`.

import { loadModel, ModelError } from './model.js';
import { canvasIsExact, pictureOf, PictureError } from './picture.js';

const MAX_SHOWN = 5;
const byId = (id) => document.getElementById(id);
const [drop, input, result, status] = ['drop', 'file', 'result', 'status'].map(byId);

function setState(state, text) {
  document.documentElement.dataset.state = state;
  status.textContent = text;
  status.hidden = text === '';
  byId('error').hidden = true;
  byId('error').textContent = '';
}

function showError(error) {
  const known = error instanceof ModelError || error instanceof PictureError;
  setState('failed', '');
  result.hidden = true;
  byId('error').textContent = known ? error.message : `This went wrong: ${error.message ?? error}`;
  byId('error').hidden = false;
}

const bytesText = (bytes) =>
  (bytes < 1e6 ? `${(bytes / 1e3).toFixed(1)} kB` : `${(bytes / 1e6).toFixed(1)} MB`);
// Milliseconds with the digits that the browser's clock (0.1 ms at best here) can bear.
const millisecondsText = (ms) => (ms < 0.1 ? 'less than 0.1 ms' : `${ms.toFixed(ms < 10 ? 1 : 0)} ms`);

function percentText(probability) {
  const percent = 100 * probability;
  if (percent > 99.95 && percent < 100) return '> 99.9 %';
  return percent < 0.1 ? '< 0.1 %' : `${percent.toFixed(1)} %`;
}

function element(name, className, text) {
  const made = document.createElement(name);
  if (className) made.className = className;
  if (text !== undefined) made.textContent = text;
  return made;
}

function showFacts({ class_names: names, image_shape: [channels, height, width], model, runtime }) {
  const facts = [
    ['Classes', String(names.length)],
    ['Input', `${width} × ${height}, ${channels === 1 ? 'grey' : 'colour'}`],
    ['Network', `${model.precision}, ${bytesText(model.size_bytes)}`],
    ['Runtime', `${runtime.package} ${runtime.version}`],
    ['SHA-256', model.sha256.slice(0, 12)],
  ];
  byId('facts').replaceChildren(...facts.map(([term, value]) => {
    const fact = element('div');
    fact.append(element('dt', '', term), element('dd', '', value));
    return fact;
  }));
}

function showSeen(pixels, [channels, height, width]) {
  const canvas = byId('seen');
  canvas.width = width;
  canvas.height = height;
  canvas.classList.toggle('crisp', width < 200);
  const image = new ImageData(width, height);
  for (let i = 0; i < width * height; i += 1) {
    for (let c = 0; c < 3; c += 1) {
      image.data[4 * i + c] = pixels[channels === 1 ? i : 3 * i + c];
    }
    image.data[4 * i + 3] = 255;
  }
  canvas.getContext('2d').putImageData(image, 0, 0);
}

function bar(name, probability) {
  const item = element('li');
  const track = element('span', 'track');
  const fill = element('span', 'fill');
  fill.style.width = `${100 * probability}%`;
  track.append(fill);
  item.append(element('span', 'name', name), element('span', 'share', percentText(probability)), track);
  return item;
}

function showAnswer(description, picture, { probabilities, ms }) {
  const names = description.class_names;
  const [, height, width] = description.image_shape;
  const order = [...probabilities.keys()].sort((a, b) => probabilities[b] - probabilities[a]);
  const shown = order.slice(0, MAX_SHOWN);
  byId('top').replaceChildren(
    element('strong', '', names[order[0]]),
    element('span', 'share', percentText(probabilities[order[0]])),
  );
  byId('bars').replaceChildren(...shown.map((k) => bar(names[k], probabilities[k])));
  const how = description.preprocessing.resize === 'stretch' ? 'stretched from' : 'from the middle of';
  byId('seen-note').textContent = picture.width === width && picture.height === height
    ? `${width} × ${height} pixels, unchanged`
    : `${width} × ${height} pixels, ${how} ${picture.width} × ${picture.height}`;
  byId('time').textContent = `Answered in ${millisecondsText(ms)} on this device.`;
  byId('caveat').textContent = 'The network always names one of its '
    + `${names.length} classes, also for a picture that shows none of them.`;
  showSeen(picture.pixels, description.image_shape);
  result.hidden = false;
}

const ready = loadModel((share) => {
  status.textContent = `Loading the network … ${Math.min(100, Math.round(100 * share))} %`;
});

/** Pixels (Uint8Array HWC) of a picture file, as the network is given them. */
async function pixelsOfFile(file) {
  const { description } = await ready;
  return (await pictureOf(file, description)).pixels;
}

let latest = 0;

/** Classify a file and show it; of several at once, the last one is shown. */
async function classifyFile(file) {
  latest += 1;
  const turn = latest;
  try {
    setState('loading', 'Waiting for the network …');
    const model = await ready;
    if (turn === latest) setState('busy', 'Looking at the picture …');
    const picture = await pictureOf(file, model.description);
    const answer = await model.classifyPixels(picture.pixels);
    if (turn === latest) {
      showAnswer(model.description, picture, answer);
      window.understudy.shown = answer;
      setState('done', '');
    }
    return answer;
  } catch (error) {
    if (turn === latest) showError(error);
    return null;
  }
}

function offer(files, emptyText) {
  if (files.length === 0) showError(new PictureError(emptyText));
  else classifyFile(files[0]);
}

input.addEventListener('change', () => {
  const files = [...input.files];
  input.value = ''; // so that choosing the same file again is a change
  if (files.length > 0) offer(files, '');
});

let depth = 0; // entering a child comes before leaving its parent
document.addEventListener('dragenter', (event) => {
  event.preventDefault();
  depth += 1;
  drop.classList.add('over');
});
document.addEventListener('dragleave', () => {
  depth -= 1;
  if (depth <= 0) drop.classList.remove('over');
});
document.addEventListener('dragover', (event) => event.preventDefault());
document.addEventListener('drop', (event) => {
  event.preventDefault();
  depth = 0;
  drop.classList.remove('over');
  offer(
    [...(event.dataTransfer?.files ?? [])],
    'That is not a file. Save the picture first: this page fetches nothing from other places.',
  );
});
document.addEventListener('paste', (event) => {
  offer([...(event.clipboardData?.files ?? [])], 'There is no picture on the clipboard. Copy one first.');
});

window.understudy = {
  ready,
  shown: null, // the answer on the screen: logits, probabilities, ms
  classifyFile,
  classifyPixels: async (pixels) => (await ready).classifyPixels(pixels),
  pixelsOfFile,
};

if (!canvasIsExact()) {
  byId('warning').textContent = 'This browser disturbs pictures that a page reads (a protection '
    + 'against tracking), so answers can be wrong. Allow it to read canvas data on this page.';
  byId('warning').hidden = false;
}
ready.then(
  ({ description }) => {
    showFacts(description);
    if (document.documentElement.dataset.state === 'loading' && latest === 0) setState('ready', 'Ready.');
  },
  showError,
);
