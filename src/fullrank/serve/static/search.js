// The search page: what is typed becomes a request, what comes back is shown, and the address of
// the page always says what is on it.

import { duration } from "/static/dom.js";
import { showResults, showTimes } from "/static/results.js";
import { chosenSystem, hasSystem, showSystems, tick } from "/static/systems.js";

const PAUSE = 120; // ms without a key before a search starts
const STEP = 10; // results, and how many more at a time
const RETRIES = 5; // times that a busy server is asked again

const at = (id) => document.getElementById(id);
const box = at("q");
const state = { query: "", system: "", k: STEP };
let defaults = { system: "", maxK: STEP };
let pending = null; // the request under way
let timer = 0;

// -- talking to the server --------------------------------------------------------------------

class Refused extends Error {}

async function get(path, signal) {
  for (let attempt = 0; ; attempt++) {
    const response = await fetch(path, { signal, headers: { accept: "application/json" } });
    if (response.status === 429 && attempt < RETRIES) {
      say("The server is busy, trying again …");
      const seconds = Number(response.headers.get("retry-after")) || 1;
      await new Promise((resolve) => setTimeout(resolve, 1000 * seconds));
      signal?.throwIfAborted();
      continue;
    }
    const answer = await response.json().catch(() => ({}));
    if (!response.ok) throw new Refused(answer.detail ?? `the server answered ${response.status}`);
    return answer;
  }
}

// -- showing ----------------------------------------------------------------------------------

function say(text, isError = false) {
  at("status").textContent = text;
  at("status").classList.toggle("error", isError);
}

function clear() {
  at("results").replaceChildren();
  at("times").hidden = true;
  at("more").hidden = true;
}

function show(answer) {
  const count = answer.results.length;
  showResults(at("results"), answer.results, openDocument);
  showTimes(at("bar"), at("legend"), answer.stages);
  at("times").hidden = false;
  at("more").hidden = count < answer.k || answer.k >= defaults.maxK;
  const results = `${count} ${count === 1 ? "result" : "results"}`;
  if (count) say(`${results} by ${answer.system} in ${duration(answer.milliseconds)}`);
  else say(`Nothing found by ${answer.system}. Try other words, or another system.`);
}

/** Show a document; whether there was an answer. */
async function openDocument(id, panel) {
  panel.textContent = "…";
  try {
    const found = await get(`/document?${new URLSearchParams({ id })}`);
    panel.textContent = found.truncated ? `${found.text}\n… (cut: the document is very long)` : found.text;
    if (!panel.textContent) panel.textContent = "(an empty document)";
    return true;
  } catch (error) {
    panel.textContent = message(error, "Not shown");
    return false;
  }
}

function message(error, what = "Not searched") {
  if (error instanceof Refused) return `${what}: ${error.message}`;
  return "The server does not answer. Is it still running?";
}

// -- searching --------------------------------------------------------------------------------

async function search() {
  clearTimeout(timer);
  pending?.abort();
  pending = null;
  const list = at("results");
  document.title = state.query ? `${state.query} – fullrank search` : "fullrank search";
  at("welcome").hidden = Boolean(state.query);
  if (!state.query) {
    clear();
    list.setAttribute("aria-busy", "false");
    say(defaults.welcome ?? "");
    return;
  }
  const mine = (pending = new AbortController());
  list.setAttribute("aria-busy", "true");
  const wanted = new URLSearchParams({ q: state.query, k: state.k });
  if (state.system) wanted.set("system", state.system);
  try {
    const answer = await get(`/search?${wanted}`, mine.signal);
    if (mine === pending) show(answer);
  } catch (error) {
    if (mine !== pending || error.name === "AbortError") return;
    clear();
    say(message(error), true);
  } finally {
    if (mine === pending) list.setAttribute("aria-busy", "false");
  }
}

/** Write the state into the address: in place while typing, as a new entry on a decision. */
function remember(decided) {
  const wanted = new URLSearchParams();
  if (state.query) wanted.set("q", state.query);
  if (state.system && state.system !== defaults.system) wanted.set("system", state.system);
  const address = wanted.size ? `/?${wanted}` : "/";
  if (decided && address !== location.pathname + location.search) history.pushState(null, "", address);
  else history.replaceState(null, "", address);
}

function recall() {
  const given = new URLSearchParams(location.search);
  state.query = (given.get("q") ?? "").trim();
  state.k = STEP;
  const asked = given.get("system");
  state.system = hasSystem(asked) ? asked : defaults.system;
  tick(state.system);
  box.value = state.query;
}

function typed(decided) {
  const query = box.value.trim();
  const changed = query !== state.query;
  if (changed) Object.assign(state, { query, k: STEP });
  remember(decided);
  clearTimeout(timer);
  if (decided) search();
  else if (changed) timer = setTimeout(search, query ? PAUSE : 0);
}

// -- keys and controls ------------------------------------------------------------------------

function move(step) {
  const titles = [...document.querySelectorAll("#results .title")];
  const here = titles.indexOf(document.activeElement);
  if (here + step < 0) box.focus();
  else titles[Math.min(here + step, titles.length - 1)]?.focus();
}

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.isComposing) return;
  const { target, key } = event;
  const inList = target === box || target.classList?.contains("title");
  if (inList && (key === "ArrowDown" || key === "ArrowUp")) {
    event.preventDefault();
    move(key === "ArrowDown" ? 1 : -1);
  } else if (key === "Escape" && target !== box) {
    box.focus();
  } else if (key === "/" && target !== box) {
    event.preventDefault();
    box.focus();
    box.select();
  }
});

box.addEventListener("input", (event) => event.isComposing || typed(false));
box.addEventListener("compositionend", () => typed(false));
at("form").addEventListener("submit", (event) => {
  event.preventDefault();
  typed(true);
});
at("systems").addEventListener("change", () => {
  state.system = chosenSystem();
  tick(state.system);
  remember(true);
  search();
});
at("more").addEventListener("click", async () => {
  const before = document.querySelectorAll("#results .title").length;
  state.k = Math.min(state.k + STEP, defaults.maxK);
  await search();
  document.querySelectorAll("#results .title")[before]?.focus();
});
addEventListener("popstate", () => {
  recall();
  search();
});

// -- start ------------------------------------------------------------------------------------

async function start() {
  try {
    const facts = await get("/systems");
    const count = facts.documents.toLocaleString("en");
    defaults = {
      system: facts.default,
      maxK: facts.limits.max_k,
      welcome: `${count} ${facts.documents === 1 ? "document" : "documents"} to search.`,
    };
    box.maxLength = facts.limits.max_query;
    showSystems(facts.systems);
    for (const page of ["report", "xray"]) {
      at(`link-${page}`).hidden = !facts.pages.includes(`/${page}`);
    }
  } catch (error) {
    say(message(error), true);
    return;
  }
  const alreadyTyped = box.value.trim();
  recall();
  if (alreadyTyped && !state.query) {
    box.value = alreadyTyped;
    typed(true);
  } else {
    await search();
  }
}

start();
