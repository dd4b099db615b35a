"""The web page of a gate trace: one template, filled by `gates.to_html`."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{title}}</title>
<style>
{{style}}
.bar { display: flex; flex-wrap: wrap; gap: .75rem 1.75rem; align-items: center; margin: 1.5rem 0 1rem; }
.choice { display: flex; align-items: center; gap: .5rem; color: var(--soft); font-size: .875rem; }
.choice div { display: flex; border: 1px solid var(--line); border-radius: .5rem; overflow: hidden; }
button {
  font: inherit; color: var(--ink); background: var(--card);
  border: 0; padding: .25rem .7rem; cursor: pointer;
}
button + button { border-left: 1px solid var(--line); }
button[aria-pressed="true"] { background: var(--accent); color: var(--on-open); }
button:focus-visible { outline: 2px solid var(--accent); outline-offset: -4px; }
.legend { display: flex; align-items: center; gap: .6rem; font-size: .875rem; color: var(--soft); }
.legend i {
  width: 11rem; height: .8rem; border-radius: .4rem; border: 1px solid var(--line);
  background: linear-gradient(in oklab to right, var(--closed), var(--open));
}
.head { display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; align-items: flex-end; margin-bottom: .9rem; }
.head span, .lists h3, .lists li { font-variant-numeric: tabular-nums; }
.head span { color: var(--soft); font-size: .875rem; }
.head b { color: var(--ink); font-weight: 600; }
.histogram { display: flex; align-items: flex-end; gap: 1px; height: 2rem; margin-left: auto; }
.histogram i { width: .4rem; border-radius: 1px 1px 0 0; min-height: 1px; }
.text, .where, .token { font-family: ui-monospace, "SF Mono", Menlo, "DejaVu Sans Mono", monospace; }
.text { font-size: 15px; line-height: 1.95; }
.token {
  display: inline-block; white-space: pre; line-height: 1.45;
  padding: 0 .14em; margin: 0 .5px; border-radius: .25em; color: var(--ink);
  background: color-mix(in oklab, var(--open) calc(var(--share) * 100%), var(--closed)); cursor: default;
}
.token.dark { color: var(--on-open); }
.token.here { outline: 2px solid var(--ink); outline-offset: 1px; }
.lists { display: grid; grid-template-columns: repeat(auto-fit, minmax(17rem, 1fr)); gap: .5rem 2rem; }
.lists { margin-top: 1.1rem; padding-top: .9rem; border-top: 1px solid var(--line); }
.lists h3 { font-size: .8rem; font-weight: 600; color: var(--soft); margin: 0 0 .3rem; }
.lists ol { list-style: none; margin: 0; padding: 0; }
.lists li { display: flex; gap: .6rem; align-items: baseline; font-size: .875rem; line-height: 1.75; }
.lists b { font-weight: 600; width: 3rem; flex: none; }
.where { color: var(--soft); white-space: pre; overflow: hidden; text-overflow: ellipsis; min-width: 0; }
.lists small { margin-left: auto; color: var(--soft); flex: none; }
section[hidden] { display: none; }
</style>
</head>
<body>
<main>
<h1>{{title}}</h1>
<p id="about"></p>
<div class="bar" id="bar"></div>
<div id="layers"></div>
<noscript><p>This page draws itself with a script, which is switched off here.</p></noscript>
</main>
<div id="tip" hidden></div>
<script type="application/json" id="data">{{data}}</script>
<script>
const data = JSON.parse(document.getElementById("data").textContent);
const [low, high] = data.scale;
const streams = data.gates[0][0].length;
const breaks = new Set(data.breaks);
const mean = values => values.reduce((a, b) => a + b, 0) / values.length;
const share = gate => Math.min(1, Math.max(0, (gate - low) / (high - low)));
const plural = (n, word) => n + " " + word + (n === 1 ? "" : "s");
let stream = -1, layer = -1;  // -1: the mean of all streams, all layers

function make(parent, tag, className, text) {
  const element = parent.appendChild(document.createElement(tag));
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function paint(element, gate) {
  element.style.setProperty("--share", share(gate).toFixed(3));
  element.classList.toggle("dark", share(gate) > .65);
}

function chip(parent, place, gate) {
  // The blank before a word stands before its chip, so that lines break and align as text does.
  const token = data.tokens[place], word = token.replace(/^ /, "");
  if (word !== token) parent.append(" ");
  const element = make(parent, "span", "token", word);
  element.dataset.place = place;
  paint(element, gate);
  return element;
}

function choice(label, names, pick) {
  const holder = make(document.getElementById("bar"), "div", "choice", label);
  const group = make(holder, "div");
  names.forEach(([value, name], i) => {
    const button = make(group, "button", "", name);
    button.setAttribute("aria-pressed", i === 0);
    button.onclick = () => {
      for (const other of group.children) other.setAttribute("aria-pressed", other === button);
      pick(value);
      draw();
    };
  });
}

function extremes(parent, title, places, gates) {
  const holder = make(parent, "div");
  make(holder, "h3", "", title);
  const list = make(holder, "ol");
  for (const place of places) {
    const item = make(list, "li");
    make(item, "b", "", gates[place].toFixed(3));
    const before = data.tokens.slice(Math.max(0, place - 3), place).join("").trimStart();
    const where = make(item, "span", "where", before);
    chip(where, place, gates[place]);
    make(item, "small", "", "position " + place);
  }
}

function draw() {
  const root = document.getElementById("layers");
  root.replaceChildren();
  data.layers.forEach((id, l) => {
    if (layer >= 0 && layer !== l) return;
    const gates = data.gates[l].map(values => stream < 0 ? mean(values) : values[stream]);
    const section = make(root, "section");
    section.dataset.layer = l;
    const head = make(section, "div", "head");
    make(head, "h2", "", "Layer " + id);
    const summary = make(head, "span", "", "mean gate ");
    make(summary, "b", "", mean(gates).toFixed(3));
    summary.append(", from " + Math.min(...gates).toFixed(3) + " to " + Math.max(...gates).toFixed(3));

    const bins = new Array(20).fill(0);
    for (const gate of gates) bins[Math.min(19, Math.floor(share(gate) * 20))] += 1;
    const histogram = make(head, "div", "histogram");
    histogram.title = "how many tokens have which gate, from " + low.toFixed(1) + " to " + high.toFixed(1);
    bins.forEach((count, i) => {
      const bar = make(histogram, "i");
      bar.style.height = 100 * count / Math.max(...bins) + "%";
      bar.style.background =
        "color-mix(in oklab, var(--open) " + (20 + 80 * (i + .5) / 20) + "%, var(--closed))";
    });

    const text = make(section, "div", "text");
    gates.forEach((gate, place) => {
      chip(text, place, gate);
      if (breaks.has(place)) make(text, "br");
    });

    const order = gates.map((_, place) => place).sort((a, b) => gates[b] - gates[a] || a - b);
    const lists = make(section, "div", "lists");
    const many = Math.min(6, Math.ceil(order.length / 2));
    extremes(lists, "Most open", order.slice(0, many), gates);
    extremes(lists, "Least open", order.reverse().slice(0, many), gates);
  });
}

const tip = document.getElementById("tip");
document.addEventListener("mouseover", event => {
  for (const element of document.querySelectorAll(".here")) element.classList.remove("here");
  const target = event.target.closest(".token");
  tip.hidden = !target;
  if (!target) return;
  const place = +target.dataset.place, l = +target.closest("section").dataset.layer;
  for (const element of document.querySelectorAll('.text [data-place="' + place + '"]')) {
    element.classList.add("here");
  }
  const values = data.gates[l][place];
  const token = data.tokens[place].replace(/^ /, "␣");
  const lines = [token + "  position " + place, "gate " + mean(values).toFixed(4)];
  if (streams > 1) {
    lines[1] += " (mean)";
    values.forEach((value, i) => lines.push("stream " + i + "  " + value.toFixed(4)));
  }
  tip.textContent = lines.join("\\n");
  const box = target.getBoundingClientRect(), own = tip.getBoundingClientRect();
  const below = box.bottom + 8 + own.height < innerHeight;
  tip.style.left = Math.max(8, Math.min(box.left, innerWidth - own.width - 8)) + "px";
  tip.style.top = (below ? box.bottom + 8 : box.top - own.height - 8) + "px";
});

document.getElementById("about").textContent =
  plural(data.tokens.length, "token") + ", " + plural(data.layers.length, "memory layer") + ", " +
  plural(streams, "stream") + ". The color of a token is its gate: how much of what the memory looked up " +
  "there enters the model, from 0 (nothing) to 1 (all of it).";
if (data.layers.length > 1) {
  choice("Layer", [[-1, "all"], ...data.layers.map((id, l) => [l, id])], value => { layer = value; });
}
if (streams > 1) {
  const names = Array.from({length: streams}, (_, i) => [i, i]);
  choice("Stream", [[-1, "mean"], ...names], value => { stream = value; });
}
const legend = make(document.getElementById("bar"), "div", "legend");
make(legend, "span", "", "gate " + low.toFixed(1));
make(legend, "i");
make(legend, "span", "", high.toFixed(1));
draw();
</script>
</body>
</html>
"""
