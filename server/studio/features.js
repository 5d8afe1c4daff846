// @ts-check
/** Finding features: by their labels, in order, or in the prompt. */

import { GoneError, json, part } from "./api.js";
import { aimAt, aimedAt } from "./columns.js";
import { announce, byId, figure, fill, h, settled } from "./dom.js";
import { resultRow, showFeature } from "./feature.js";
import { learn } from "./known.js";
import { textOfRequest } from "./run.js";
import { changes, served, setup } from "./state.js";
import { openTab } from "./tabs.js";

const PAGE = 30;
const TYPING_MS = 150;

/** @type {AbortController | null} */
let searching = null;
let shown = 0;

export function start() {
  const again = settled(TYPING_MS, () => search(0));
  byId("query").addEventListener("input", again);
  byId("feature-sae").addEventListener("change", () => search(0));
  byId("feature-order").addEventListener("change", () => search(0));
  byId("more-features").addEventListener("click", () => search(shown));
  byId("in-prompt").addEventListener("click", inPrompt);
  byId("add-to").addEventListener("change", () => aimAt(byId("add-to").value));
  byId("back").addEventListener("click", () => { showList(); byId("query").focus(); });
  changes.addEventListener("open-feature", (event) => {
    const { sae, feature } = /** @type {CustomEvent} */ (event).detail;
    openTab("features");
    byId("feature-list").hidden = true;
    byId("feature-one").hidden = false;
    void showFeature(sae, feature);
  });
  changes.addEventListener("find-feature", () => {
    openTab("features");
    showList();
    targets();
    byId("query").focus();
  });
  changes.addEventListener("shape", targets);
  changes.addEventListener("served", () => { saes(); targets(); void search(0); });
  document.addEventListener("keydown", (event) => {
    const typing = /** @type {HTMLElement} */ (event.target).matches("input, textarea, select");
    if (event.key === "/" && !typing) {
      event.preventDefault();
      changes.dispatchEvent(new Event("find-feature"));
    }
  });
}

function showList() {
  byId("feature-list").hidden = false;
  byId("feature-one").hidden = true;
}

function saes() {
  const select = byId("feature-sae");
  const before = select.value;
  fill(select, ...served.saes.map(({ id, hook }) => h("option", { value: id }, `${id} (${hook})`)));
  if (served.saes.some(({ id }) => id === before)) select.value = before;
  byId("feature-sae-field").hidden = served.saes.length < 2;
}

function targets() {
  const names = setup.columns.length ? setup.columns.map(({ name }) => name) : ["A"];
  fill(byId("add-to"), ...names.map((name) => h("option", { value: name, selected: name === aimedAt() }, name)));
}

/** @param {number} offset 0 for a new list */
async function search(offset) {
  const sae = byId("feature-sae").value;
  if (!sae) return note("This server has no SAE: start it with --sae NAME=SOURCE.");
  searching?.abort();
  searching = new AbortController();
  const query = byId("query").value.trim();
  const order = query ? "" : byId("feature-order").value;
  const asked = new URLSearchParams({ limit: String(PAGE), offset: String(offset) });
  if (query) asked.set("query", query);
  if (order) asked.set("order", order);
  byId("feature-order").disabled = Boolean(query);
  try {
    const { data, total, has_more } = await json(`v1/saes/${part(sae)}/features?${asked}`, { signal: searching.signal });
    learn(sae, data);
    if (!offset) byId("results").replaceChildren();
    byId("results").append(...data.map((/** @type {any} */ feature) => row(sae, feature)));
    shown = offset + data.length;
    byId("more-features").hidden = !has_more;
    const found = query ? `${total} found` : `${total.toLocaleString("en")} features`;
    note(total ? found : `No label has “${query}”. Only labelled features can be found by words.`);
    if (query) announce(found);
  } catch (error) {
    if (/** @type {Error} */ (error).name !== "AbortError") note(/** @type {Error} */ (error).message);
  }
}

/** @param {string} text */
function note(text) {
  byId("found").textContent = text;
}

/** @param {string} sae @param {any} feature @param {string} [figureText] */
function row(sae, feature, figureText) {
  const told = figureText ?? (feature.density === null || feature.density === undefined ? "" : `${figure(feature.density * 100, 2)} % of tokens`);
  return resultRow(sae, feature, feature.label ? `${feature.feature} · ${told}` : told);
}

/** The strongest features of the prompt. */
async function inPrompt() {
  const sae = byId("feature-sae").value;
  if (!sae || !setup.prompt.trim()) return note("Write a prompt first.");
  byId("in-prompt").disabled = true;
  try {
    const { features } = await json(`v1/saes/${part(sae)}/inspect`, { body: { ...textOfRequest(), top_k: PAGE } });
    byId("query").value = "";
    byId("more-features").hidden = true;
    fill(byId("results"), ...features.map((/** @type {any} */ feature) => row(sae, feature, `${figure(feature.score)} in the prompt`)));
    note("Strongest in the prompt");
    announce(`${features.length} features of the prompt`);
  } catch (error) {
    note(error instanceof GoneError ? error.message : `Cannot read the prompt: ${/** @type {Error} */ (error).message}`);
  } finally {
    byId("in-prompt").disabled = false;
  }
}
