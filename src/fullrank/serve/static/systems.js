// The switch between systems: how to rank, and, where there are several, with which encoder.

import { el } from "/static/dom.js";

const at = (id) => document.getElementById(id);
let systems = [];

function choices(name, values) {
  return values.map((value) =>
    el("label", {}, el("input", { type: "radio", name, value }), el("span", {}, value)),
  );
}

/** Fill the switch and say what each kind of system ranks by. */
export function showSystems(given) {
  systems = given;
  const kinds = new Map(systems.map(({ kind, description }) => [kind, description]));
  const encoders = [...new Set(systems.map(({ encoder }) => encoder))].filter((name) => name !== null);
  at("kinds").append(...choices("kind", [...kinds.keys()]));
  at("encoders").append(...choices("encoder", encoders));
  at("kinds").hidden = kinds.size < 2;
  at("encoders").hidden = encoders.length < 2;
  at("about").append(
    ...[...kinds].flatMap(([kind, description]) => [el("dt", {}, kind), el("dd", {}, description)]),
  );
  if (encoders.length) at("encoders").querySelector("input").checked = true;
}

export const hasSystem = (name) => systems.some((system) => system.name === name);

/** Make the switch show a system; one that uses no encoder leaves that choice for later. */
export function tick(name) {
  const { kind, encoder } = systems.find((system) => system.name === name);
  for (const input of at("kinds").querySelectorAll("input")) input.checked = input.value === kind;
  at("encoders").disabled = encoder === null;
  if (encoder === null) return;
  for (const input of at("encoders").querySelectorAll("input")) input.checked = input.value === encoder;
}

/** Name of the system that the switch shows. */
export function chosenSystem() {
  const kind = at("kinds").querySelector("input:checked").value;
  const encoder = at("encoders").querySelector("input:checked")?.value ?? null;
  const same = systems.filter((system) => system.kind === kind);
  return (same.find((system) => system.encoder === encoder) ?? same[0]).name;
}
