// The API's page, made from /openapi.json: it cannot fall behind what the server does.

import { el } from "/static/dom.js";

const main = document.getElementById("docs");

function resolve(api, schema) {
  const name = schema?.$ref?.split("/").pop();
  return name ? api.components.schemas[name] : (schema ?? {});
}

/** A type in a few words: "integer, 1 to 100". */
function typeText(api, schema) {
  const named = schema?.$ref?.split("/").pop();
  if (named) return named;
  const { type, anyOf, items, minimum, maximum, minLength, maxLength, additionalProperties } = schema ?? {};
  if (anyOf) return anyOf.map((option) => typeText(api, option)).join(" or ");
  if (type === "array") return `list of ${items ? typeText(api, items) : "values"}`;
  if (type === "object" && additionalProperties) return `object of ${typeText(api, additionalProperties)}`;
  const bounds = [];
  if (minimum !== undefined || maximum !== undefined) bounds.push(`${minimum ?? "…"} to ${maximum ?? "…"}`);
  if (maxLength !== undefined) bounds.push(`${minLength ?? 0} to ${maxLength} characters`);
  return [type ?? "any", ...bounds].join(", ");
}

/** Text where `code` is marked by backticks. */
function prose(text) {
  const parts = (text ?? "").split("`");
  return parts.map((part, i) => (i % 2 ? el("code", {}, part) : part));
}

function fields(rows) {
  if (!rows.length) return null;
  return el(
    "dl",
    { class: "fields" },
    ...rows.flatMap(({ name, type, required, description }) => [
      el("dt", {}, el("code", {}, name), el("span", {}, ` ${type}${required ? ", required" : ""}`)),
      el("dd", {}, ...prose(description)),
    ]),
  );
}

function schemaFields(api, schema) {
  const { properties = {}, required = [] } = resolve(api, schema);
  return Object.entries(properties).map(([name, field]) => ({
    name,
    type: typeText(api, field),
    required: required.includes(name),
    description: field.description,
  }));
}

function example(schema) {
  return schema?.examples?.[0] ?? schema?.default;
}

function curl(api, path, method, operation) {
  const body = operation.requestBody?.content["application/json"].schema;
  if (body) {
    const { properties } = resolve(api, body);
    const sample = Object.fromEntries(Object.entries(properties).map(([n, f]) => [n, example(f)]));
    return `curl -X ${method.toUpperCase()} ${location.origin}${path} \\\n  -H 'Content-Type: application/json' \\\n  -d '${JSON.stringify(sample)}'`;
  }
  const given = new URLSearchParams();
  for (const { name, schema, required } of operation.parameters ?? []) {
    const value = example(schema);
    if (required) given.set(name, value ?? "…");
  }
  return `curl '${location.origin}${path}${given.size ? `?${given}` : ""}'`;
}

function answerRows(operation) {
  return Object.entries(operation.responses).map(([status, { description, content }]) => ({
    name: status,
    type: content?.["application/json"]?.schema?.$ref?.split("/").pop() ?? "JSON",
    required: false,
    description: status === "200" ? "The answer." : description,
  }));
}

function operationSection(api, path, method, operation) {
  const parameters = (operation.parameters ?? []).map(({ name, required, description, schema }) => ({
    name,
    type: typeText(api, schema),
    required,
    description,
  }));
  const body = operation.requestBody?.content["application/json"].schema;
  return el(
    "section",
    {},
    el("h2", {}, el("code", {}, `${method.toUpperCase()} ${path}`)),
    el("p", {}, ...prose(operation.description)),
    fields([...parameters, ...(body ? schemaFields(api, body) : [])]),
    el("pre", { tabindex: "0" }, curl(api, path, method, operation)),
    el("h3", {}, "Answers"),
    fields(answerRows(operation)),
  );
}

function show(api) {
  main.append(el("p", { class: "lead" }, ...prose(api.info.description)));
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, operation] of Object.entries(methods)) {
      main.append(operationSection(api, path, method, operation));
    }
  }
  main.append(el("h2", {}, "Objects"));
  for (const [name, schema] of Object.entries(api.components.schemas)) {
    main.append(
      el("section", {}, el("h3", {}, el("code", {}, name)), el("p", {}, ...prose(schema.description)), fields(schemaFields(api, schema))),
    );
  }
}

try {
  const response = await fetch("/openapi.json");
  show(await response.json());
} catch {
  main.append(el("p", { class: "error" }, "The server does not answer. Is it still running?"));
} finally {
  main.setAttribute("aria-busy", "false");
}
