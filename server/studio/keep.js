// @ts-check
/** Keeping a column: as a preset of the server, a file, a command line, a link. */

import { json, key, call, part } from "./api.js";
import { NO_ROOM, openColumn } from "./columns.js";
import { announce, byId, fill, h } from "./dom.js";
import { linkToSetup } from "./link.js";
import { steeringOf } from "./spec.js";
import { changes, served, setup } from "./state.js";
import { curl, presetFile, python } from "./snippets.js";

export function start() {
  changes.addEventListener("shape", columns);
  changes.addEventListener("routes", () => { void list(); });
  byId("save-form").addEventListener("submit", (/** @type {Event} */ event) => { event.preventDefault(); void save(); });
  for (const kind of ["curl", "python", "file", "link"]) {
    byId(`copy-${kind}`).addEventListener("click", () => { void copy(kind); });
  }
  byId("download-preset").addEventListener("click", download);
  columns();
}

function columns() {
  const before = byId("keep-column").value;
  const names = setup.columns.map(({ name }) => name);
  fill(byId("keep-column"), ...names.map((name) => h("option", { value: name, selected: name === before }, name)));
}

const chosen = () => setup.columns.find(({ name }) => name === byId("keep-column").value) ?? setup.columns[0];

/** @param {string} text @param {boolean} [wrong] */
function say(text, wrong = false) {
  byId("kept").textContent = text;
  byId("kept").classList.toggle("error", wrong);
}

async function save() {
  const name = byId("preset-name").value.trim();
  const column = chosen();
  if (!column) return say("There is no column to save.", true);
  byId("preset-name").removeAttribute("aria-invalid");
  try {
    const description = byId("preset-description").value.trim();
    const body = { steering: steeringOf(column), ...(description ? { description } : {}) };
    const response = await call(`v1/steering/presets/${part(name)}`, { method: "PUT", body });
    say(`${response.status === 201 ? "Saved" : "Replaced"}: requests may now name “${name}” as their model.`);
    await list();
  } catch (error) {
    const refused = /** @type {import("./api.js").ApiError} */ (error);
    if (refused.param === "name") byId("preset-name").setAttribute("aria-invalid", "true");
    say(refused.message, true);
  }
}

async function list() {
  byId("presets-part").hidden = !served.presets;
  if (!served.presets) return;
  try {
    const { data } = await json("v1/steering/presets");
    fill(byId("presets"), ...(data.length ? data.map(preset) : [h("li", { class: "hint" }, "No presets yet.")]));
  } catch (error) {
    fill(byId("presets"), h("li", { class: "error" }, /** @type {Error} */ (error).message));
  }
}

/** @param {any} entry */
function preset({ name, description, steering }) {
  const open = h("button", { type: "button", class: "small", "aria-label": `Open ${name} as a column`, on: { click: () => {
    const column = openColumn(steering);
    if (!column) return say(NO_ROOM, true);
    announce(`${name} opened as ${column.name}`);
  } } }, "Open");
  const drop = h("button", { type: "button", class: "small", "aria-label": `Delete ${name}`, on: { click: async () => {
    try {
      await call(`v1/steering/presets/${part(name)}`, { method: "DELETE" });
      say(`Deleted “${name}”.`);
    } catch (error) {
      say(/** @type {Error} */ (error).message, true);
    }
    await list();
  } } }, "Delete");
  return h("li", { class: "card" }, h("strong", {}, name), description && h("span", { class: "hint" }, description), h("span", { class: "row" }, open, drop));
}

/** @param {string} kind @returns {string | null} */
function textOf(kind) {
  if (kind === "link") return linkToSetup();
  const column = chosen();
  if (!column) return null;
  const keyed = Boolean(key());
  if (kind === "curl") return curl(column, keyed);
  if (kind === "python") return python(column, keyed);
  return presetFile(column, byId("preset-description").value.trim());
}

/** @param {string} kind */
async function copy(kind) {
  const text = textOf(kind);
  if (text === null) return say("There is no column to copy.", true);
  byId("copied").textContent = text;
  byId("copied").hidden = false;
  try {
    await navigator.clipboard.writeText(text);
    say("Copied.");
  } catch {
    // Browsers give the clipboard to secure pages only.
    getSelection()?.selectAllChildren(byId("copied"));
    say("Selected below: copy it with the keyboard.");
  }
}

function download() {
  const text = textOf("file");
  if (text === null) return;
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  h("a", { href: url, download: `${byId("preset-name").value.trim() || "preset"}.json` }).click();
  URL.revokeObjectURL(url);
}
