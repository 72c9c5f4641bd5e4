() => {
  "use strict";
  const PAUSE = 150, SMALL = 96, NUM_GALLERY = 12;
  const part = (id) => document.getElementById(id);
  let asked = null, drawing = false, timer = 0, drawn = "", fast = 0, beside = "", turn = 0;

  const say = (words, wrong = false) => {
    const message = part("message");
    message.textContent = words;
    message.classList.toggle("wrong", wrong);
  };
  const request = async (body) => {
    let answer;
    try {
      answer = await fetch("draw", { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) });
    } catch {
      throw new Error("the server does not answer; was it stopped?");
    }
    const found = await answer.json();
    if (!answer.ok) throw new Error(found.error);
    return found;
  };
  // What the controls say, in the fields of a request: a seed with a fraction is a place between two.
  const body = (values) => {
    const { seed, ...rest } = values, whole = Math.floor(seed + 1e-9), made = { ...rest, seed: whole };
    if (seed - whole > 1e-6) made.between = Math.round((seed - whole) * 1e6) / 1e6;
    if (made.num_inference_steps > 1 || !made.target_time) delete made.target_time;
    if (made.class_label === null) delete made.class_label;
    return made;
  };
  const teachers = (values) => {
    const { num_inference_steps, target_time, ...rest } = body(values);
    return { ...rest, by_teacher: true };
  };
  const isEmpty = (values) => values.prompt !== undefined && !(values.prompt || "").trim();
  const address = (picture) => "data:image/png;base64," + picture.png;
  const fit = (image, frame) => {
    image.classList.toggle("small", Math.max(image.naturalWidth, image.naturalHeight) <= SMALL);
    if (frame) frame.style.setProperty("--ratio", image.naturalWidth + " / " + image.naturalHeight);
  };
  const show = (figure, found, how) => {
    const image = figure.querySelector("img"), save = figure.querySelector(".save"), picture = found.pictures[0];
    image.onload = () => fit(image, figure.querySelector(".frame"));
    image.src = address(picture);
    figure.querySelector(".how").textContent = how;
    const ms = found.milliseconds;
    figure.querySelector(".time").textContent = (ms < 100 ? ms.toFixed(1) : Math.round(ms)) + " ms";
    save.href = image.src;
    save.download = "seed-" + picture.seed + (figure.id === "of-teacher" ? "-teacher" : "") + ".png";
    save.hidden = false;
    figure.hidden = false;
    figure.classList.remove("stale");
  };
  const steps = (num) => num + (num === 1 ? " step" : " steps");

  // One request at a time, and always one for what was said last.
  const next = async () => {
    if (drawing || !asked) return;
    const values = asked, wanted = body(values), key = JSON.stringify(wanted);
    if (key === drawn) return;
    if (isEmpty(values)) { drawn = key; return say("Say what to draw."); }
    drawing = true;
    part("of-student").classList.add("busy");
    try {
      const found = await request(wanted);
      show(part("of-student"), found, steps(found.num_steps));
      fast = found.milliseconds;
      say(found.warnings.join(" "));
    } catch (error) {
      part("of-student").classList.add("stale");
      say(error.message, true);
    }
    drawn = key;
    drawing = false;
    part("of-student").classList.remove("busy");
    next();
  };
  const draw = (values) => {
    const typed = asked && asked.prompt !== values.prompt;
    asked = values;
    part("target_time")?.classList.toggle("off", values.num_inference_steps > 1);
    if (beside && beside !== JSON.stringify(teachers(values))) part("of-teacher").classList.add("stale");
    if (part("gallery").dataset.of !== of(values)) part("gallery").classList.add("stale");
    clearTimeout(timer);
    timer = setTimeout(next, typed ? PAUSE : 0);
  };

  const teacher = async (values) => {
    if (isEmpty(values)) return say("Say what to draw.");
    const figure = part("of-teacher"), wanted = teachers(values), own = ++turn;
    figure.hidden = false;
    figure.classList.add("busy");
    try {
      const found = await request(wanted);
      if (own !== turn) return;
      const ratio = found.milliseconds / fast;
      const times = fast ? " · " + (ratio < 10 ? ratio.toFixed(1) : Math.round(ratio)) + " × the student" : "";
      show(figure, found, steps(found.num_steps));
      figure.querySelector(".time").textContent += times;
      beside = JSON.stringify(wanted);
      if (beside !== JSON.stringify(teachers(asked))) figure.classList.add("stale");
    } catch (error) {
      if (own === turn) { figure.hidden = !beside; say(error.message, true); }
    } finally {
      if (own === turn) figure.classList.remove("busy");
    }
  };

  // All that a gallery shows but for the seed.
  const of = (values) => JSON.stringify({ ...body(values), seed: 0, between: 0 });
  const choose = (seed) => {
    const field = document.querySelector("#seed input[type=number]");
    Object.getOwnPropertyDescriptor(HTMLInputElement.prototype, "value").set.call(field, seed);
    field.dispatchEvent(new Event("input", { bubbles: true }));
    part("stage").scrollIntoView({ block: "nearest", behavior: "smooth" });
  };
  const gallery = async (values) => {
    if (isEmpty(values)) return say("Say what to draw.");
    try {
      // Each of them is on the slider, where a click puts it.
      const last = Number(document.querySelector("#seed input[type=range]").max), first = last - NUM_GALLERY + 1;
      const found = await request({ ...body({ ...values, seed: Math.min(values.seed, first) }), num_images: NUM_GALLERY });
      part("gallery").dataset.of = of(values);
      part("gallery").classList.toggle("stale", of(asked) !== of(values));
      part("gallery").replaceChildren(...found.pictures.map((picture) => {
        const button = document.createElement("button"), image = document.createElement("img"), words = document.createElement("span");
        image.onload = () => fit(image);
        image.src = address(picture);
        image.alt = "seed " + picture.seed;
        words.textContent = picture.seed;
        button.type = "button";
        button.append(image, words);
        button.addEventListener("click", () => choose(picture.seed));
        return button;
      }));
    } catch (error) {
      say(error.message, true);
    }
  };

  window.onestill = { draw, teacher, gallery };
  if (window.onestillAsked) draw(window.onestillAsked);
}
