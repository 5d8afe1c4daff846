// @ts-check
/** One feature: what it fires on, what it writes, and what it is near to. */

import { json, part } from "./api.js";
import { addFeature } from "./columns.js";
import { byId, figure, fill, h, visible } from "./dom.js";
import { learn, nameOf, showName } from "./known.js";
import { colourBy, openFeature } from "./state.js";

let latest = 0;

/** @param {string} sae @param {number} feature */
export async function showFeature(sae, feature) {
  const mine = ++latest;
  const parent = byId("feature-detail");
  const title = h("h3", { tabindex: "-1" });
  showName(title, sae, feature);
  const head = [title, h("p", { class: "id" }, `${sae} · ${feature}`),
    h("p", { class: "row" },
      h("button", { type: "button", class: "primary small", on: { click: () => { void addFeature(sae, feature); } } }, "Add to column"),
      h("button", { type: "button", class: "small", on: { click: () => colourBy(sae, feature) } }, "Colour tokens by it"))];
  fill(parent, ...head, h("p", { class: "hint" }, "Loading …"));
  title.focus({ preventScroll: true });
  try {
    const detail = await json(`v1/saes/${part(sae)}/features/${feature}`);
    if (mine !== latest) return;
    learn(sae, [detail]);
    title.textContent = nameOf(detail);
    fill(parent, ...head, figures(detail), examples(detail), tokens("Makes likelier", detail.promoted),
      tokens("Makes less likely", detail.suppressed), others("Points the same way", sae, detail.nearest, "cosine"),
      others("Moves most when added", sae, detail.interferers ?? [], "per unit"));
    title.focus({ preventScroll: true });
  } catch (error) {
    if (mine === latest) fill(parent, ...head, h("p", { class: "error", role: "alert" }, /** @type {Error} */ (error).message));
  }
}

/** One of a list of features, to be looked at or added. @param {string} sae @param {any} feature @param {string} told what is said of it */
export function resultRow(sae, feature, told) {
  const name = nameOf(feature);
  return h("li", { class: "result-row" },
    h("button", { type: "button", class: feature.label ? "link name" : "link name nameless", on: { click: () => openFeature(sae, feature.feature) } }, name),
    h("span", { class: "id" }, told),
    h("button", { type: "button", class: "small", "aria-label": `Add ${name}`, on: { click: () => { void addFeature(sae, feature.feature); } } }, "Add"));
}

/** @param {any} detail */
function figures(detail) {
  const facts = [
    ["Largest activation recorded", figure(detail.max_activation)],
    ["Fires on", detail.density === null ? "–" : `${figure(detail.density * 100, 2)} % of tokens`],
    ["Reads itself when written (self gain)", figure(detail.self_gain)],
  ];
  if (detail.output_score !== null) facts.push(["Output score", figure(detail.output_score)]);
  return h("dl", { class: "facts" }, facts.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}

/** @param {any} detail */
function examples({ examples: found }) {
  const rows = found.map((/** @type {any} */ { text, activation }) =>
    h("li", {}, h("span", { class: "example" }, text), activation !== null && h("span", { class: "number" }, figure(activation))));
  return h("section", {}, h("h4", {}, "Fires on"),
    rows.length ? h("ul", { class: "examples" }, rows) : h("p", { class: "hint" }, "No examples come with this SAE."));
}

/** @param {string} title @param {[string, number][]} scored */
function tokens(title, scored) {
  if (!scored.length) return null;
  return h("section", {}, h("h4", {}, title),
    h("ul", { class: "chips" }, scored.map(([text, score]) =>
      h("li", { title: figure(score) }, visible(text)))));
}

/** @param {string} title @param {string} sae @param {[number, number][]} scored @param {string} unit */
function others(title, sae, scored, unit) {
  if (!scored.length) return null;
  const rows = scored.map(([feature, score]) => {
    const name = h("button", { type: "button", class: "link name", on: { click: () => openFeature(sae, feature) } });
    showName(name, sae, feature);
    return h("li", {}, name, h("span", { class: "id" }, String(feature)), h("span", { class: "number" }, figure(score, 2)));
  });
  return h("section", {}, h("h4", {}, title, h("span", { class: "id" }, ` (${unit})`)), h("ul", { class: "others" }, rows));
}
