"""The web page of a segment trace: one template, filled by `segments.to_html`."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{title}}</title>
<style>
{{style}}
.bar { display: flex; flex-wrap: wrap; gap: .75rem 1.75rem; align-items: center; margin: 1.5rem 0 1rem; }
.bar label { display: flex; align-items: center; gap: .6rem; color: var(--soft); font-size: .875rem; }
.bar input { width: 14rem; accent-color: var(--accent); }
.bar b, .bar output { font-variant-numeric: tabular-nums; color: var(--ink); }
.bar output { width: 3rem; }
.text { font: 15px/2.15 ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; }
.segment {
  padding: .12em .2em; margin: 0 1px; border-radius: .35em; background: var(--closed);
  box-decoration-break: clone; -webkit-box-decoration-break: clone;
}
.segment.odd { background: color-mix(in oklab, var(--open) 22%, var(--closed)); }
.segment.waiting { outline: 1px dashed var(--soft); }
.token { white-space: pre-wrap; padding: .1em 0; cursor: default; border-bottom: 3px solid transparent; }
.token { border-bottom-color: color-mix(in oklab, var(--open) calc(var(--p) * 100%), transparent); }
.token.boundary { font-weight: 700; }
svg { display: block; width: 100%; height: 7rem; margin-top: .4rem; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); }
</style>
</head>
<body>
<main>
<h1>{{title}}</h1>
<p id="about"></p>
<div class="bar">
<label>threshold <input id="threshold" type="range" min="0.01" max="0.99" step="0.01">
<output id="value"></output></label>
<span><b id="facts"></b></span>
</div>
<section><div class="text" id="text"></div></section>
<section><h2>How many tokens have which probability</h2><svg id="histogram" role="img"></svg></section>
<noscript><p>This page draws itself with a script, which is switched off here.</p></noscript>
</main>
<div id="tip" hidden></div>
<script type="application/json" id="data">{{data}}</script>
<script>
const data = JSON.parse(document.getElementById("data").textContent);
const breaks = new Set(data.breaks);
const slider = document.getElementById("threshold");

function make(parent, tag, className, text) {
  const element = parent.appendChild(document.createElement(tag));
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function draw() {
  const threshold = +slider.value, root = document.getElementById("text");
  document.getElementById("value").textContent = threshold.toFixed(2);
  root.replaceChildren();
  let segment = null, concepts = 0, number = 0;
  data.tokens.forEach((token, place) => {
    const boundary = data.p[place] >= threshold;
    if (boundary) concepts += 1;
    if (data.opens && boundary) segment = null;
    if (!segment) segment = make(root, "span", "segment" + (number++ % 2 ? " odd" : ""));
    const element = make(segment, "span", "token" + (boundary ? " boundary" : ""), token);
    element.dataset.place = place;
    element.style.setProperty("--p", data.p[place].toFixed(3));
    if (breaks.has(place)) make(segment, "br");
    if (!data.opens && boundary) segment = null;
  });
  if (segment) segment.classList.add("waiting");
  document.getElementById("facts").textContent =
    data.tokens.length + " tokens, " + concepts + " concepts, " +
    (concepts ? (data.tokens.length / concepts).toFixed(2) : "no") + " tokens a concept";
  histogram(threshold);
}

function histogram(threshold) {
  const bins = new Array(40).fill(0), svg = document.getElementById("histogram");
  for (const p of data.p) bins[Math.min(39, Math.floor(p * 40))] += 1;
  const most = Math.max(...bins), name = "http://www.w3.org/2000/svg";
  svg.setAttribute("viewBox", "0 0 800 110");
  svg.setAttribute("preserveAspectRatio", "none");
  svg.replaceChildren();
  const add = (tag, attributes, text) => {
    const element = svg.appendChild(document.createElementNS(name, tag));
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    if (text) element.textContent = text;
  };
  bins.forEach((count, i) => add("rect", {
    x: 20 * i + 1, width: 18, y: 90 - 84 * count / most, height: 84 * count / most,
    fill: (i + .5) / 40 >= threshold ? "var(--open)" : "var(--line)",
  }));
  add("line", {x1: 800 * threshold, x2: 800 * threshold, y1: 0, y2: 92, stroke: "var(--ink)"});
  add("text", {x: 0, y: 106}, "0");
  add("text", {x: 790, y: 106}, "1");
}

const tip = document.getElementById("tip");
document.addEventListener("mouseover", event => {
  const target = event.target.closest(".token");
  tip.hidden = !target;
  if (!target) return;
  const place = +target.dataset.place;
  tip.textContent = data.tokens[place] + "  position " + place + "\\np " + data.p[place].toFixed(4);
  const box = target.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const below = box.bottom + 8 + own.height < innerHeight;
  tip.style.left = Math.max(8, Math.min(box.left, innerWidth - own.width - 8)) + "px";
  tip.style.top = (below ? box.bottom + 8 : box.top - own.height - 8) + "px";
});

document.getElementById("about").textContent =
  "Each shade is one segment, pooled into one concept; a bold token is a boundary and " +
  (data.opens ? "begins" : "ends") + " a segment, and the line under a token is how probable that was. " +
  "The last segment, dashed, waits for its boundary. Boundaries depend on the encoder alone, so that the slider " +
  "shows what the model would do at another threshold; it was " + data.threshold + ".";
slider.value = data.threshold;
slider.oninput = draw;
draw();
</script>
</body>
</html>
"""
