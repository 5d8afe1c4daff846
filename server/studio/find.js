// @ts-check
/** Finding the features, or a whole spec, that tell two lists of examples apart. */

import { part } from "./api.js";
import { budgetTexts } from "./budget.js";
import { NO_ROOM, openColumn } from "./columns.js";
import { field, figure, h, select } from "./dom.js";
import { resultRow } from "./feature.js";
import { showName } from "./known.js";
import { openFeature, served } from "./state.js";

const ARROW = "=>";
const CONTRAST = "/v1/saes/{sae}/contrast";

/** The two lists are shared by both studies, and survive a change of columns. */
const wanted = h("textarea", { rows: 3, placeholder: `a text, or a prompt ${ARROW} an answer` });
const unwanted = h("textarea", { rows: 3, placeholder: "one a line" });
const wantedField = field("Wanted, one a line", wanted);
const unwantedField = field("Unwanted, one a line", unwanted);

/** @typedef {{prompt: string, completion?: string}} Text */

/** @param {string} list @returns {Text[]} */
export function textsOf(list) {
  return list.split("\n").map((line) => line.trim()).filter(Boolean).map((line) => {
    const at = line.indexOf(ARROW);
    if (at < 0) return { prompt: line };
    return { prompt: line.slice(0, at).trim(), completion: ` ${line.slice(at + ARROW.length).trim()}` };
  });
}

/** @returns {{positive: Text[], negative: Text[]}} */
function examples() {
  const [positive, negative] = [textsOf(wanted.value), textsOf(unwanted.value)];
  if (!positive.length || !negative.length) throw new Error("Both lists need examples.");
  return { positive, negative };
}

/** @param {string} value */
const saeSelect = (value) => select(served.saes.map(({ id }) => [id, id]), value || (served.saes[0]?.id ?? ""));

/** @returns {import("./studies.js").Study} */
export function contrast() {
  const by = select([["auroc", "how well it tells them apart (AUROC)"], ["difference", "difference of means"], ["d", "effect size d"]], "auroc");
  const byField = field("Order by", by);
  let sae = saeSelect("");
  return {
    title: "Features that tell examples apart",
    route: CONTRAST,
    explains: "Reads both lists and ranks the features that are active in one and not in the other.",
    verb: "Compare",
    controls: () => { sae = saeSelect(sae.value); return [wantedField, unwantedField, h("div", { class: "row" }, field("SAE", sae), byField)]; },
    ask: () => ({ path: `v1/saes/${part(sae.value)}/contrast`, body: { model: served.model, ...examples(), by: by.value, top_k: 20 } }),
    show: ({ positive, negative }) => [side("More in the wanted", sae.value, positive, SCORES[by.value]), side("More in the unwanted", sae.value, negative, SCORES[by.value])],
  };
}

/** What the score of a row is, by how rows are ordered. @type {Record<string, string>} */
const SCORES = { auroc: "AUROC", difference: "difference", d: "d" };

/** @param {string} title @param {string} sae @param {any[]} features @param {string | undefined} score */
function side(title, sae, features, score) {
  const rows = features.map((each) => resultRow(sae, each,
    `${each.feature} · ${score} ${figure(each.score)} · ${figure(each.mean_positive)} against ${figure(each.mean_negative)}`));
  return h("section", {}, h("h4", {}, title), rows.length ? h("ul", { class: "plain" }, rows) : h("p", { class: "hint" }, "None."));
}

/** @returns {import("./studies.js").Study} */
export function suggest() {
  const budget = h("input", { type: "number", min: "0", step: "any", value: "0.1" });
  const most = h("input", { type: "number", min: "1", max: "16", step: "1", value: "4" });
  const [budgetField, mostField] = [field("Budget (KL)", budget), field("Most edits", most)];
  const over = budgetTexts("Budget over");
  let sae = saeSelect("");
  return {
    title: "Suggest edits",
    route: "/v1/steering/suggest",
    explains: `Tries edits that make the wanted answers likelier, within a budget. Both lists need two or more lines of “prompt ${ARROW} answer”; half of them are held out.`,
    verb: "Suggest",
    controls: () => {
      sae = saeSelect(sae.value);
      const lists = served.routes.has(CONTRAST) ? [] : [wantedField, unwantedField];
      return [...lists, h("div", { class: "row" }, field("SAE", sae), budgetField, mostField), over.control];
    },
    ask: () => {
      const lists = examples();
      const short = [...lists.positive, ...lists.negative].find(({ completion }) => !completion?.trim());
      if (short) throw new Error(`Every line needs a prompt ${ARROW} an answer: “${short.prompt.slice(0, 40)}” has none.`);
      return { path: "v1/steering/suggest", body: { model: served.model, ...lists, sae: sae.value, budget: { metric: "kl", value: Number(budget.value) }, max_edits: Number(most.value), neutral: over.texts() } };
    },
    show: (result) => [outcome(result), ...(result.steering ? suggestion(result.steering) : [])],
  };
}

/** @param {any} result */
function outcome({ steering, fit, held_out, kl, tried }) {
  if (!steering) return h("p", {}, `Nothing helped on the examples held out; ${tried?.length ?? 0} edits were tried.`);
  return h("p", {}, `On the examples held out, the wanted gain ${figure(held_out.after - held_out.before)} a token over the unwanted (${figure(fit.after - fit.before)} on those fitted), for a KL of ${figure(kl)}.`);
}

/** Its edits, and a way to use them. @param {any} steering */
function suggestion(steering) {
  const edits = steering.interventions.map((/** @type {any} */ { sae, feature, op, value, unit }) => {
    const name = h("button", { type: "button", class: "link name", on: { click: () => openFeature(sae, feature) } });
    showName(name, sae, feature);
    return h("li", {}, name, h("span", { class: "id" }, `${sae} · ${feature}`),
      h("span", { class: "number" }, op === "ablate" ? op : `${op} ${figure(value)}${unit === "max_act" ? " × max" : ""}`));
  });
  const note = h("p", { class: "hint", role: "status" });
  const open = h("button", { type: "button", class: "small", on: { click: () => {
    const column = openColumn(steering);
    note.textContent = column ? `Opened as ${column.name}.` : NO_ROOM;
  } } }, "Open as a column");
  return [h("ul", { class: "moved", "aria-label": "Suggested edits" }, edits), h("div", { class: "row" }, open), note];
}
