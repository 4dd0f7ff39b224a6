// How an answer looks: results with the scores of each stage, and where the time went.

import { breakable, duration, el, marked, scoreText } from "/static/dom.js";

const COLOURS = 6;
const colourOf = new Map();

/** A class that gives each stage the same colour wherever it appears. */
function colour(stage) {
  if (stage === "snippets") return "stage-rest";
  if (!colourOf.has(stage)) colourOf.set(stage, colourOf.size % COLOURS);
  return `stage-${colourOf.get(stage)}`;
}

/** The stages' times as one bar and a legend. */
export function showTimes(bar, legend, stages) {
  const total = stages.reduce((sum, stage) => sum + stage.milliseconds, 0) || 1;
  bar.replaceChildren(
    ...stages.map(({ stage, milliseconds }) => {
      const part = el("span", { class: colour(stage) });
      part.style.flexGrow = String(milliseconds / total);
      return part;
    }),
  );
  legend.replaceChildren(
    ...stages.map(({ stage, milliseconds }) =>
      el(
        "li",
        {},
        el("span", { class: `dot ${colour(stage)}`, "aria-hidden": "true" }),
        `${stage} `,
        el("span", { class: "number" }, duration(milliseconds)),
      ),
    ),
  );
}

/** Largest score of each stage among the results, which the bars are drawn against. */
function largest(results) {
  const top = {};
  for (const { scores } of results) {
    for (const [stage, score] of Object.entries(scores)) {
      top[stage] = Math.max(top[stage] ?? 0, score ?? 0);
    }
  }
  return top;
}

function scoreList(scores, top) {
  return el(
    "ul",
    { class: "scores", "aria-label": "Score of each stage" },
    ...Object.entries(scores).map(([stage, score]) => {
      const missing = score === null;
      const fill = el("span", { class: colour(stage) });
      fill.style.width = `${top[stage] > 0 && !missing ? Math.max(0, (100 * score) / top[stage]) : 0}%`;
      return el(
        "li",
        { class: missing ? "missing" : null, title: missing ? "not among this stage's results" : null },
        `${stage} `,
        el("span", { class: "number" }, missing ? "–" : scoreText(score)),
        el("span", { class: "fill", "aria-hidden": "true" }, fill),
      );
    }),
  );
}

/** One result; `open(id, panel)` fills the panel when it is unfolded, until it says that it has. */
function resultItem(result, top, open) {
  const panelId = `document-${result.rank}`;
  const title = el(
    "button",
    { type: "button", class: "title", "aria-expanded": "false", "aria-controls": panelId },
    breakable(result.title || result.id),
  );
  const panel = el("pre", { id: panelId, class: "document", tabindex: "0", hidden: "" });
  const snippet = el("p", { class: "snippet" }, marked(result.snippet.text, result.snippet.highlights));
  let asked = false;
  title.addEventListener("click", async () => {
    const unfold = panel.hidden;
    panel.hidden = !unfold;
    snippet.hidden = unfold;
    title.setAttribute("aria-expanded", String(unfold));
    if (!unfold || asked) return;
    asked = true;
    asked = await open(result.id, panel);
  });
  return el(
    "li",
    {},
    el("span", { class: "rank", "aria-hidden": "true" }, String(result.rank)),
    el(
      "article",
      {},
      el("h2", {}, title),
      result.title && result.title !== result.id ? el("p", { class: "id" }, breakable(result.id)) : null,
      snippet,
      panel,
      scoreList(result.scores, top),
    ),
  );
}

/** Fill the list. */
export function showResults(list, results, open) {
  const top = largest(results);
  list.replaceChildren(...results.map((result) => resultItem(result, top, open)));
}
