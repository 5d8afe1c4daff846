// @ts-check
/** What was asked in this tab. It stays in the tab's own storage. */

import { byId, fill, h } from "./dom.js";
import { replaceSetup, sane, setup } from "./state.js";

const STORE = "vllm-sae-studio-history";
const KEPT = 20;

/** @typedef {{at: number, setup: import("./state.js").Setup, answers: {name: string, text: string}[]}} Entry */

/** Latest first. @type {Entry[]} */
let entries = [];

export function start() {
  try {
    const stored = JSON.parse(sessionStorage.getItem(STORE) ?? "[]");
    entries = stored.map((/** @type {Entry} */ entry) => ({ ...entry, setup: sane(entry.setup) }));
  } catch {
    entries = [];
  }
  byId("clear-history").addEventListener("click", () => { entries = []; keep(); draw(); });
  draw();
}

/** @param {{name: string, text: string}[]} answers */
export function record(answers) {
  entries = [{ at: Date.now(), setup: structuredClone(setup), answers }, ...entries].slice(0, KEPT);
  keep();
  draw();
}

function keep() {
  try {
    sessionStorage.setItem(STORE, JSON.stringify(entries));
  } catch {
    // A full storage costs the oldest runs their place after a reload, and nothing else.
  }
}

function draw() {
  byId("clear-history").hidden = entries.length === 0;
  fill(byId("history"), ...(entries.length ? entries.map(item) : [h("li", { class: "hint" }, "Nothing was asked yet.")]));
}

/** @param {Entry} entry */
function item(entry) {
  const time = new Date(entry.at);
  const columns = entry.setup.columns.map(({ name, edits }) => `${name}: ${edits.map(({ feature, op, value }) => `${op} ${feature}${value === null ? "" : ` ${value}`}`).join(", ") || "no edits"}`);
  return h("li", { class: "card" },
    h("details", { class: "fine" },
      h("summary", {}, h("time", { datetime: time.toISOString() }, time.toLocaleTimeString()), " ", entry.setup.prompt.slice(0, 80)),
      h("p", { class: "hint" }, columns.join(" · ")),
      entry.answers.map(({ name, text }) => h("p", { class: "past" }, h("strong", {}, `${name}: `), text))),
    h("button", { type: "button", class: "small", on: { click: () => replaceSetup(entry.setup) } }, "Set up like this"));
}
