// The page of `python -m gmmamba view`: a list of slides, a deep-zoom picture, overlays. Lengths are level-0 pixels.
"use strict";

const $ = (id) => document.getElementById(id);
const make = (tag, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
};
const SVG = "http://www.w3.org/2000/svg";

let dataset; // dataset.json
let shown = []; // its slides as listed now
let current = null; // slides/ID.json of the open one
let picture = null; // OpenSeadragon's item of the colours over it
let wanted = null; // their URL
const chosen = { colour: null, shapes: new Set(["foci"]) }; // kept from slide to slide
const slideUrl = (id) => `slides/${encodeURIComponent(id)}`;

const viewer = OpenSeadragon({
  element: $("viewer"), drawer: "canvas", showNavigationControl: false, showNavigator: true,
  navigatorPosition: "BOTTOM_RIGHT", navigatorAutoFade: false, navigatorSizeRatio: 0.16, navigatorBackground: "#fff", maxZoomPixelRatio: 4, visibilityRatio: 0.5, animationTime: 0.6,
  gestureSettingsMouse: { clickToZoom: false, dblClickToZoom: true },
});

// The list ------------------------------------------------------------------------------------------------------------

const runsBy = (slide, experiment) => slide.tested.filter((run) => run.experiment === experiment);
const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

// How wrong an experiment is about a slide, 0 to 1: one minus the probability of its true class, mean over runs.
function wrongness(slide, experiment) {
  const runs = runsBy(slide, experiment);
  return runs.length ? 1 - mean(runs.map((run) => run.probabilities[slide.label])) : -1; // untested ones come last
}

function listSlides() {
  const experiment = $("by").value, wanted = $("find").value.trim().toLowerCase();
  shown = dataset.slides
    .filter((slide) => [slide.slide_id, slide.patient_id, slide.label].some((text) => text.toLowerCase().includes(wanted)))
    .sort((a, b) => wrongness(b, experiment) - wrongness(a, experiment) || (a.slide_id < b.slide_id ? -1 : 1));
  $("slides").replaceChildren(...shown.map((slide) => make("li", {}, slideButton(slide, experiment))));
  mark();
  const wrong = shown.filter((slide) => runsBy(slide, experiment).some((run) => run.called !== slide.label)).length;
  $("count").textContent = `${shown.length} of ${dataset.slides.length} slides, ${wrong} called wrong`;
}

function slideButton(slide, experiment) {
  const runs = runsBy(slide, experiment);
  const wrong = runs.some((run) => run.called !== slide.label);
  const button = make("button", { type: "button", className: runs.length ? (wrong ? "wrong" : "right") : "" });
  button.dataset.slide = slide.slide_id;
  button.append(make("b", { textContent: slide.slide_id }));
  let call = slide.status === "ready" ? "not tested" : slide.status;
  if (runs.length) call = `P = ${(1 - wrongness(slide, experiment)).toFixed(2)} ${wrong ? "✗" : "✓"}`;
  button.append(make("span", { className: "call", textContent: call, title: runs.length ? `mean probability of ${slide.label}; ✗: some run calls it otherwise, by its threshold` : "" }));
  const folds = [...new Set(runs.map((run) => run.fold))];
  const facts = [slide.label];
  if (folds.length) facts.push(`fold ${folds.join(", ")}`);
  if (slide.patient_id !== slide.slide_id) facts.push(slide.patient_id);
  button.append(make("span", { className: "more", textContent: facts.join(" · ") }));
  const reason = slide.reason || slide.no_picture;
  if (reason) button.append(make("span", { className: "more", textContent: reason }));
  button.addEventListener("click", () => open(slide.slide_id));
  return button;
}

const buttons = () => [...$("slides").querySelectorAll("button")];

// One button takes part in the tab order, the open slide's or the first; arrows move from it.
function mark() {
  const all = buttons();
  const active = all.find((button) => current && button.dataset.slide === current.slide_id);
  for (const button of all) {
    button.tabIndex = button === (active || all[0]) ? 0 : -1;
    if (button === active) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  }
}

$("slides").addEventListener("keydown", (event) => {
  const all = buttons(), at = all.indexOf(document.activeElement);
  const to = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: all.length - 1 }[event.key];
  if (to === undefined) return;
  event.preventDefault();
  all[Math.max(0, Math.min(all.length - 1, to))].focus();
});

// A slide -------------------------------------------------------------------------------------------------------------

async function open(id) {
  location.hash = id;
  const answer = await fetch(`${slideUrl(id)}.json`);
  const text = await answer.text();
  if (location.hash.slice(1) !== id) return; // another was opened meanwhile
  current = answer.ok ? JSON.parse(text) : { slide_id: id, no_picture: text };
  const slide = dataset.slides.find((each) => each.slide_id === id);
  mark();
  $("title").textContent = `${id}: ${slide.label}`;
  const tested = dataset.experiments.filter((experiment) => runsBy(slide, experiment).length);
  const calls = tested.map((experiment) => `${experiment} P(${slide.label}) = ${(1 - wrongness(slide, experiment)).toFixed(2)}`);
  $("facts").textContent = [slide.reason, current.n_patches ? `${current.n_patches} patches` : "", ...calls].filter(Boolean).join(" · ");
  viewer.clearOverlays();
  viewer.world.removeAll();
  picture = null;
  $("nothing").hidden = !current.no_picture;
  $("nothing").textContent = current.no_picture || "";
  $("controls").hidden = $("bar").hidden = Boolean(current.no_picture);
  if (current.no_picture) return;
  listOverlays(slide);
  viewer.open({
    width: current.width, height: current.height, tileSize: current.tile_px, tileOverlap: current.overlap_px,
    minLevel: Math.min(8, current.max_level), maxLevel: current.max_level, // below, it is a fraction of a tile
    getTileUrl: (level, x, y) => `${slideUrl(id)}_files/${level}/${x}_${y}.jpeg`,
  });
}

viewer.addHandler("open", () => {
  viewer.forceResize(); // the overlays' controls may have taken another line; done in the next frame
  requestAnimationFrame(() => requestAnimationFrame(() => viewer.viewport.goHome(true)));
  colour();
  outline();
  scaleBar();
});

function step(by) {
  const at = shown.findIndex((slide) => current && slide.slide_id === current.slide_id);
  const next = shown[Math.max(0, Math.min(shown.length - 1, at + by))];
  if (!next) return;
  open(next.slide_id);
  buttons()[shown.indexOf(next)].scrollIntoView({ block: "nearest" });
}

// Overlays ------------------------------------------------------------------------------------------------------------

function option(type, name, value, key, text, checked, swatch) {
  const input = make("input", { type, name, value, checked });
  const label = make("label", {}, input);
  if (swatch) label.append(make("span", { className: `line ${swatch}` }));
  label.append(text + " ");
  if (key <= 9) { label.append(make("kbd", { textContent: key })); input.dataset.key = key; }
  return label;
}

function listOverlays(slide) {
  let key = 1;
  const severalRuns = new Set(slide.tested.map((run) => `${run.fold} ${run.seed}`)).size > 1;
  const colours = [["none", "nothing"]];
  for (const { experiment, fold, seed } of current.attention) {
    const run = slide.tested.find((each) => each.experiment === experiment && each.fold === fold && each.seed === seed);
    const which = severalRuns ? `, fold ${fold}, seed ${seed} (P = ${run.probabilities[slide.label].toFixed(2)})` : "";
    colours.push([`attention/${experiment}/${fold}/${seed}`, `attention of ${experiment}${which}`]);
  }
  for (const { grouping } of current.groups) colours.push([`groups/${grouping}`, `groups ${grouping}`]);
  // The same model's map on the next slide, though that one was tested in another fold.
  const kind = (value) => value.split("/").slice(0, 2).join("/");
  const kept = chosen.colour === null ? colours[Math.min(1, colours.length - 1)]
    : colours.find(([value]) => value === chosen.colour) || colours.find(([value]) => kind(value) === kind(chosen.colour)) || colours[0];
  chosen.colour = kept[0];
  $("colours").replaceChildren($("colours").firstElementChild, ...colours.map(([value, text]) =>
    option("radio", "colour", value, key++, text, value === chosen.colour)));
  const shapes = [];
  if (current.outlines.length) shapes.push(["tissue", "tissue"]);
  if (current.foci.length) shapes.push(["foci", `foci (${current.foci.length})`]);
  $("shapes").hidden = !shapes.length;
  $("shapes").replaceChildren($("shapes").firstElementChild, ...shapes.map(([value, text]) =>
    option("checkbox", "shape", value, key++, text, chosen.shapes.has(value), value)));
}

function colour() {
  const [kind, name] = chosen.colour.split("/");
  const overlay = chosen.colour === "none" ? null
    : `${slideUrl(current.slide_id)}/${chosen.colour}${kind === "attention" ? `/${$("scale").value}` : ""}.png`;
  wanted = overlay;
  if (picture) viewer.world.removeItem(picture);
  picture = null;
  for (const number of document.querySelectorAll(".number")) viewer.removeOverlay(number);
  $("scale").disabled = kind !== "attention"; // shown all the same: the slide below stays where it is
  $("legend").style.visibility = kind === "attention" ? "visible" : "hidden";
  if (!overlay) return;
  viewer.addSimpleImage({
    url: overlay, x: 0, y: 0, width: 1, opacity: $("opacity").value / 100,
    success: ({ item }) => {
      if (overlay !== wanted || picture) viewer.world.removeItem(item); // another was chosen meanwhile
      else picture = item;
    },
  });
  if (kind === "groups") {
    for (const { number, x, y } of current.groups.find((each) => each.grouping === name).centres) {
      viewer.addOverlay({
        element: make("span", { className: "number", textContent: number }),
        location: new OpenSeadragon.Point(x / current.width, y / current.width), placement: "CENTER", checkResize: false,
      });
    }
  }
}

function outline() {
  const old = document.querySelector("svg.shapes");
  if (old) viewer.removeOverlay(old);
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("class", "shapes");
  svg.setAttribute("viewBox", `0 0 ${current.width} ${current.height}`);
  svg.setAttribute("preserveAspectRatio", "none");
  const add = (tag, className, attributes) => {
    const shape = document.createElementNS(SVG, tag);
    shape.setAttribute("class", className);
    for (const [name, value] of Object.entries(attributes)) shape.setAttribute(name, value);
    svg.append(shape);
  };
  if (chosen.shapes.has("tissue") && current.outlines.length) {
    const ring = (points) => `M${points.map((point) => point.join(" ")).join("L")}Z`;
    const d = current.outlines.map((polygon) => polygon.map(ring).join("")).join("");
    for (const className of ["halo", "tissue"]) add("path", className, { d });
  }
  if (chosen.shapes.has("foci")) {
    for (const focus of current.foci) {
      const [tag, where] = focus.radius === undefined
        ? ["rect", { x: focus.x, y: focus.y, width: focus.side, height: focus.side }]
        : ["circle", { cx: focus.x, cy: focus.y, r: focus.radius }];
      add(tag, "foci", where);
    }
  }
  if (svg.childElementCount) viewer.addOverlay({ element: svg, location: new OpenSeadragon.Rect(0, 0, 1, current.height / current.width) });
}

$("controls").addEventListener("submit", (event) => event.preventDefault());
$("controls").addEventListener("change", (event) => {
  const { name, value, checked } = event.target;
  if (name === "colour") chosen.colour = value;
  if (name === "shape") chosen.shapes[checked ? "add" : "delete"](value);
  if (name === "shape") outline();
  else if (event.target.id !== "opacity") colour();
});
$("opacity").addEventListener("input", () => {
  $("percent").textContent = `${$("opacity").value} %`;
  if (picture) picture.setOpacity($("opacity").value / 100);
});

// Zoom, scale, keys ---------------------------------------------------------------------------------------------------

for (const button of document.querySelectorAll("[data-zoom]")) {
  button.addEventListener("click", () => {
    if (button.dataset.zoom === "home") viewer.viewport.goHome();
    else viewer.viewport.zoomBy(button.dataset.zoom === "in" ? 2 : 0.5);
    viewer.viewport.applyConstraints();
  });
}

// A bar of 1, 2 or 5 times a power of ten µm, about a tenth of the picture's width.
function scaleBar() {
  $("bar").hidden = !current || !current.mpp;
  if ($("bar").hidden) return;
  const perPixel = current.mpp * current.width / (viewer.viewport.getZoom(true) * viewer.viewport.getContainerSize().x);
  const about = perPixel * 120, power = 10 ** Math.floor(Math.log10(about));
  const length = [5, 2, 1].map((n) => n * power).find((n) => n <= about);
  $("bar").firstElementChild.style.width = `${length / perPixel}px`;
  $("bar").firstElementChild.textContent = length >= 1000 ? `${length / 1000} mm` : `${length} µm`;
}
viewer.addHandler("animation", scaleBar);
viewer.addHandler("resize", scaleBar);

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("select, [type=search]")) return;
  const overlay = $("controls").hidden ? null : $("controls").querySelector(`[data-key="${CSS.escape(event.key)}"]`);
  if (overlay) overlay.click();
  else if (event.key === "n") step(1);
  else if (event.key === "p") step(-1);
  else if (event.key === "[" || event.key === "]") {
    $("opacity").value = Number($("opacity").value) + (event.key === "]" ? 10 : -10);
    $("opacity").dispatchEvent(new Event("input"));
  }
});

// Start ---------------------------------------------------------------------------------------------------------------

async function start() {
  dataset = await (await fetch("dataset.json")).json();
  document.title = $("dataset").textContent = `Slides of ${dataset.dataset}`;
  $("by").append(...dataset.experiments.map((name) => make("option", { value: name, textContent: name })));
  $("by").addEventListener("change", listSlides);
  $("find").addEventListener("input", listSlides);
  listSlides();
  const asked = decodeURIComponent(location.hash.slice(1));
  const first = shown.find((slide) => slide.slide_id === asked) || shown.find((slide) => !slide.no_picture);
  if (first) open(first.slide_id);
}
start();
