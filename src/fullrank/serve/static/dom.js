// Elements are only ever built here, and text only ever enters them as text: no document, query or
// message can become markup.

/** Make an element: `el("p", {class: "x"}, "text", child)`. Absent children are skipped. */
export function el(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) element.setAttribute(name, value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Text with `<mark>` around ranges, which count Unicode code points (not UTF-16 units). */
export function marked(text, ranges) {
  const points = Array.from(text);
  const parts = document.createDocumentFragment();
  let at = 0;
  for (const [start, end] of ranges) {
    parts.append(points.slice(at, start).join(""));
    parts.append(el("mark", {}, points.slice(start, end).join("")));
    at = end;
  }
  parts.append(points.slice(at).join(""));
  return parts;
}

/** A long name that may be broken after its dots, slashes and underscores. */
export function breakable(name) {
  const parts = document.createDocumentFragment();
  for (const part of name.split(/(?<=[._/:-])/)) parts.append(part, document.createElement("wbr"));
  return parts;
}

/** A duration for people: "0.4 ms", "12 ms", "1.3 s". */
export function duration(milliseconds) {
  if (milliseconds >= 1000) return `${(milliseconds / 1000).toFixed(1)} s`;
  return `${milliseconds.toFixed(milliseconds < 10 ? 1 : 0)} ms`;
}

/** A score in four significant digits, without an exponent where that can be avoided. */
export function scoreText(score) {
  const size = Math.abs(score);
  if (size !== 0 && (size < 1e-4 || size >= 1e6)) return score.toExponential(2);
  return size >= 1000 ? score.toFixed(0) : String(Number(score.toPrecision(4)));
}
