// @ts-check
/** What holds for all edits of a column together. */

import { field, h, select } from "./dom.js";
import { changed, isObject } from "./state.js";

/** Members that have a control of their own; the others are shown as JSON. */
const CONTROLLED = new Set(["match", "max_share", "error_term"]);

/** @param {import("./state.js").Column} column */
export function columnSettings({ more }) {
  const summary = h("summary");
  const update = () => { summary.textContent = inWords(more); changed("value"); };
  const match = select([["delta", "add the difference (delta)"], ["reread", "hold when read again (reread)"]], more.match ?? "delta", {
    "data-field": "match",
    on: { change: () => { put("match", match.value === "delta" ? undefined : match.value); } },
  });
  const share = h("input", {
    type: "number", min: "0", max: "10", step: "0.05", placeholder: "no limit", value: more.max_share ?? "", "data-field": "max_share",
    on: { input: () => { put("max_share", share.value === "" ? undefined : Number(share.value)); } },
  });
  const rest = select([["true", "stays"], ["false", "is dropped"]], String(more.error_term ?? true), {
    "data-field": "error_term",
    on: { change: () => { put("error_term", rest.value === "true" ? undefined : false); } },
  });
  const others = h("textarea", {
    rows: 3, spellcheck: "false", class: "code", placeholder: '{"stop_when": {"feature": 7, "above": 1}}', value: othersOf(more),
    "data-field": "protect stop_when positions when",
    on: { input: () => { others.setAttribute("aria-invalid", String(!putOthers(others.value))); } },
  });
  /** @param {string} name @param {unknown} value */
  function put(name, value) {
    if (value === undefined) delete more[name];
    else more[name] = value;
    update();
  }
  /** @param {string} text @returns {boolean} whether it was understood */
  function putOthers(text) {
    let parsed;
    try {
      parsed = text.trim() ? JSON.parse(text) : {};
    } catch {
      return false;
    }
    if (!isObject(parsed)) return false;
    for (const name of Object.keys(more)) if (!CONTROLLED.has(name)) delete more[name];
    Object.assign(more, parsed);
    update();
    return true;
  }
  summary.textContent = inWords(more);
  return h("details", { class: "fine" }, summary,
    h("div", { class: "stack" },
      h("div", { class: "row" }, field("Solve edits to", match), field("Largest share of the stream", share),
        field("What the SAE does not explain", rest)),
      field("Further fields of the spec (JSON): protect, stop_when, positions, when", others)));
}

/** @param {Record<string, any>} more */
function othersOf(more) {
  const others = Object.fromEntries(Object.entries(more).filter(([name]) => !CONTROLLED.has(name)));
  return Object.keys(others).length ? JSON.stringify(others, null, 1) : "";
}

/** @param {Record<string, any>} more */
function inWords(more) {
  const parts = [];
  if (more.match === "reread") parts.push("held when read again");
  if (more.max_share !== undefined) parts.push(`at most ${more.max_share} of the stream`);
  if (more.error_term === false) parts.push("full reconstruction");
  for (const name of Object.keys(more)) if (!CONTROLLED.has(name)) parts.push(name);
  return parts.length ? `All edits: ${parts.join(", ")}` : "All edits together";
}
