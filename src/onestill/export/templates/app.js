import { between, gaussian } from "./noise.js";
import { Tokenizer } from "./tokenizer.js";

const $ = (id) => document.getElementById(id);
const pad = document.querySelector(".pad");
const corners = [...document.querySelectorAll(".corner")];
const MOST_BUTTONS = 24;
const NAMES = { wasm: "WASM", webgpu: "WebGPU" };

let asked = 0;
let info, tokenizer, worker, noises, seeds, label, timer, walking = false;
let place = { x: 0.5, y: 0.5 };
const waiting = new Map();
const times = [];

// The worker answers each question in turn. While one picture is made, only the last wish for another is kept.

function ask(what, transfer = []) {
  const id = ++asked;
  return new Promise((resolve, reject) => {
    waiting.set(id, { resolve, reject });
    worker.postMessage({ id, ...what }, transfer);
  });
}

function answered({ data: { id, found, error } }) {
  const { resolve, reject } = waiting.get(id);
  waiting.delete(id);
  if (error) reject(new Error(error));
  else resolve(found);
}

async function start(backend) {
  worker?.terminate();
  waiting.clear();
  isDrawing = false; // what was asked of the worker before is not answered any more
  times.length = 0;
  $("where").textContent = NAMES[backend];
  $("ms").textContent = "–";
  say(`Loading the student (${info.megabytes[backend]} MB) …`);
  worker = new Worker(new URL("./worker.js", import.meta.url), { type: "module" });
  worker.onmessage = answered;
  await ask({ load: { backend, info } });
  say("");
  document.querySelector("main").hidden = false;
  await all();
}

/** Return pictures of rows of noise: of their labels, or all of the prompt. */
async function draw(rows, labels, prompt) {
  const noise = new Float32Array(rows.length * rows[0].length);
  rows.forEach((row, i) => noise.set(row, i * row.length));
  const ids = info.text ? tokenizer.encode(prompt ?? $("prompt").value) : null;
  return ask({ noise, num: rows.length, labels: info.labels ? labels : null, ids }, [noise.buffer]);
}

function show(canvas, { pixels, shape: [, channels, height, width] }, row) {
  [canvas.width, canvas.height] = [width, height];
  const size = height * width, from = row * channels * size;
  const image = new ImageData(width, height);
  for (let i = 0; i < size; i++) {
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = Math.round((pixels[from + (channels === 3 ? c * size : 0) + i] + 1) * 127.5);
    image.data[4 * i + 3] = 255;
  }
  canvas.getContext("2d").putImageData(image, 0, 0);
}

let isDrawing = false, isAsked = false;

async function picture() {
  isAsked = true;
  if (isDrawing) return;
  isDrawing = true;
  try {
    while (isAsked) {
      isAsked = false;
      const found = await draw([between(noises, place.x, place.y)], [label]);
      show($("picture"), found, 0);
      tell(found.ms);
    }
  } finally {
    isDrawing = false;
  }
}

/** Say how long a picture takes: the middle of the last ones. */
function tell(ms) {
  times.push(ms);
  const last = times.slice(-9).sort((a, b) => a - b);
  const middle = last[last.length >> 1];
  $("ms").textContent = middle < 10 ? middle.toFixed(1) : Math.round(middle);
}

/** Draw what changes with the noises or the condition: the corners and the picture, then the classes. */
async function all() {
  const drawn = await draw(noises, noises.map(() => label));
  corners.forEach((corner, i) => show(corner, drawn, i));
  await picture();
  await classes();
}

/** Draw every class from the noise of the picture, on the buttons. */
async function classes() {
  const canvases = [...document.querySelectorAll("#classes canvas")];
  if (!canvases.length || walking) return;
  const row = between(noises, place.x, place.y);
  const drawn = await draw(info.labels.map(() => row), info.labels);
  canvases.forEach((canvas, i) => show(canvas, drawn, i));
}

function mark(x, y) {
  place = { x: Math.min(1, Math.max(0, x)), y: Math.min(1, Math.max(0, y)) };
  $("dot").style.left = `${100 * place.x}%`;
  $("dot").style.top = `${100 * place.y}%`;
  pad.setAttribute("aria-valuenow", Math.round(100 * place.x));
  pad.setAttribute("aria-valuetext", `${Math.round(100 * place.x)} % across, ${Math.round(100 * place.y)} % down`);
}

function move(x, y) {
  mark(x, y);
  guarded(picture)();
  clearTimeout(timer);
  timer = setTimeout(guarded(classes), 160);
}

function renew(first) {
  seeds = [0, 1, 2, 3].map((i) => first + i);
  const length = info.sample_shape.reduce((a, b) => a * b);
  noises = seeds.map((seed) => gaussian(seed, length));
  $("seeds").textContent = `Seeds ${seeds.join(", ")} at the corners.`;
}

function choose(value) {
  label = value;
  for (const button of document.querySelectorAll("#classes button")) button.setAttribute("aria-pressed", Number(button.value) === value);
  guarded(all)();
}

function walk(time) {
  if (!walking) return;
  move(0.5 + 0.42 * Math.sin(time / 1900), 0.5 + 0.42 * Math.sin(time / 2700 + 1));
  requestAnimationFrame(walk);
}

function say(text) {
  $("status").textContent = text;
  $("status").hidden = !text;
}

const guarded = (work) => () => Promise.resolve(work()).catch((error) => say(`This did not work: ${error.message}`));

function addClasses() {
  $("labels").hidden = false;
  if (info.labels.length > MOST_BUTTONS) {
    const select = document.createElement("select");
    for (const value of info.labels) select.append(new Option(value, value));
    select.setAttribute("aria-label", "Class");
    select.onchange = () => choose(Number(select.value));
    return $("classes").append(select);
  }
  for (const value of info.labels) {
    const button = document.createElement("button");
    Object.assign(button, { type: "button", value });
    button.append(document.createElement("canvas"), String(value));
    button.setAttribute("aria-pressed", value === label);
    button.onclick = () => choose(value);
    $("classes").append(button);
  }
}

function addPrompt() {
  $("prompting").hidden = false;
  $("prompt").value = info.prompt;
  let typing;
  $("prompt").oninput = () => {
    clearTimeout(typing);
    typing = setTimeout(guarded(all), 250);
  };
  $("prompting").onsubmit = (event) => {
    event.preventDefault();
    guarded(all)();
  };
}

function listen() {
  const follow = (event) => {
    const box = pad.getBoundingClientRect();
    stop();
    move((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
  };
  const stop = () => {
    walking = false;
    $("walk").setAttribute("aria-pressed", "false");
  };
  pad.onpointerdown = (event) => {
    pad.setPointerCapture(event.pointerId);
    follow(event);
  };
  pad.onpointermove = (event) => event.buttons && follow(event);
  pad.onkeydown = (event) => {
    const step = { ArrowLeft: [-0.05, 0], ArrowRight: [0.05, 0], ArrowUp: [0, -0.05], ArrowDown: [0, 0.05] }[event.key];
    if (!step) return;
    event.preventDefault();
    move(place.x + step[0], place.y + step[1]);
  };
  $("new").onclick = () => {
    renew(seeds[0] + 4);
    guarded(all)();
  };
  $("walk").onclick = () => {
    walking = !walking;
    $("walk").setAttribute("aria-pressed", walking);
    requestAnimationFrame(walk);
  };
}

async function addBackends() {
  const gpu = info.backends.includes("webgpu") && navigator.gpu && (await navigator.gpu.requestAdapter().catch(() => null));
  if (!gpu) return;
  for (const name of info.backends) $("backend").append(new Option(NAMES[name], name));
  $("backend").hidden = false;
  $("backend").onchange = () => guarded(() => start($("backend").value))();
}

async function main() {
  say("Loading …");
  info = await (await fetch("student.json")).json();
  document.title = $("title").textContent = info.title;
  $("evaluations").textContent = info.evaluations;
  $("made").textContent = info.made_with;
  document.body.classList.toggle("smooth", info.picture_shape[1] > 64);
  label = info.labels?.[0];
  if (info.labels) addClasses();
  if (info.text) {
    tokenizer = new Tokenizer(await (await fetch("tokenizer.json")).json());
    addPrompt();
  }
  renew(0);
  listen();
  mark(0.5, 0.5);
}

/** For scripts: load the student anew, draw rows of noise, encode a prompt, make noise. */
globalThis.onestill = { start, draw, gaussian, between, encode: (prompt) => tokenizer.encode(prompt), times };

guarded(async () => {
  await main();
  await addBackends();
  await start("wasm");
  document.body.dataset.ready = "yes";
})();
