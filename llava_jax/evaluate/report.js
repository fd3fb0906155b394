"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const element = (id) => document.getElementById(id);
let at = 0;

function add(parent, tag, text, kind) {
  const child = document.createElement(tag);
  if (text !== undefined) child.textContent = text;
  if (kind) child.className = kind;
  parent.append(child);
  return child;
}

function option(select, value, text) {
  add(select, "option", text).value = value;
}

// Half of a soft score counts as right.
const right = (answer) => answer.score !== null && answer.score >= 0.5;
const known = (answer) => answer.score !== null;

function chosen() {
  const bench = element("bench").value, filter = element("filter").value, run = Number(element("run").value);
  const words = element("search").value.toLowerCase();
  return data.examples.filter((one) => {
    if (bench && one.bench !== bench) return false;
    const answer = one.answers[run];
    if (filter === "right" && !right(answer)) return false;
    if (filter === "wrong" && (!known(answer) || right(answer))) return false;
    if (filter === "differ" && new Set(one.answers.map(right)).size < 2) return false;
    const texts = [one.question, one.id, one.category, ...one.answers.map((other) => other.text)];
    return !words || texts.some((text) => (text || "").toLowerCase().includes(words));
  });
}

function show() {
  const found = chosen(), place = element("example");
  at = Math.max(0, Math.min(at, found.length - 1));
  element("position").textContent = found.length ? `${at + 1} of ${found.length}` : "none";
  element("previous").disabled = at === 0;
  element("next").disabled = at >= found.length - 1;
  place.replaceChildren();
  const one = found[at];
  if (!one) {
    add(place, "p", "No question fits.");
    return;
  }
  const left = add(place, "div"), side = add(place, "div");
  if (one.image) {
    const image = add(left, "img");
    image.src = one.image;
    image.alt = `image of question ${one.id}`;
  } else {
    add(left, "p", one.problem);
  }
  const heading = [data.headings[one.bench], one.id, one.category].filter(Boolean).join(" · ");
  add(side, "h3", heading);
  add(side, "pre", one.question);
  if (one.expected) add(side, "p", `Right: ${one.expected}`);
  one.answers.forEach((answer, run) => {
    const said = add(side, "div", undefined, `said run-${run}`);
    add(said, "small", data.runs[run]);
    add(said, "pre", answer.text === null ? "not asked" : answer.text || "(empty)");
    if (known(answer)) {
      const mark = right(answer) ? "✓" : "✗";
      add(said, "span", `${mark} ${answer.score.toFixed(2)}`, `verdict ${right(answer) ? "good" : "bad"}`);
    }
    if (answer.review) {
      const details = add(said, "details");
      add(details, "summary", "The judge's review");
      add(details, "pre", answer.review);
    }
  });
}

function move(step) {
  at += step;
  show();
}

option(element("bench"), "", "all");
for (const [name, heading] of Object.entries(data.headings)) option(element("bench"), name, heading);
data.runs.forEach((name, run) => option(element("run"), run, name));
for (const id of ["bench", "run", "filter", "search"]) {
  element(id).addEventListener("input", () => {
    at = 0;
    show();
  });
}
element("controls").addEventListener("submit", (event) => event.preventDefault());
element("previous").addEventListener("click", () => move(-1));
element("next").addEventListener("click", () => move(1));
document.addEventListener("keydown", (event) => {
  if (["INPUT", "SELECT"].includes(event.target.tagName)) return;
  if (event.key === "ArrowLeft") move(-1);
  if (event.key === "ArrowRight") move(1);
});
show();
