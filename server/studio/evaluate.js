// @ts-check
/** What else an edit moves: the columns' edits against the unsteered model. */

import { markRefusal, viewOf } from "./columns.js";
import { field, figure, h, percent, select } from "./dom.js";
import { nameOf, showName } from "./known.js";
import { textOfRequest } from "./run.js";
import { steeringOf } from "./spec.js";
import { UNSTEERED, colourBy, openFeature, served, setup } from "./state.js";

/** @returns {import("./studies.js").Study} */
export function evaluate() {
  const over = select([["own", "each column’s own greedy answer"], ["given", "the unsteered answer above"]], "own");
  const overField = field("Compare over", over);
  return {
    title: "What else moved",
    route: "/v1/steering/evaluate",
    explains: "How far every column moves the model’s predictions, and which features move that nobody edited.",
    verb: "Evaluate",
    controls: () => [overField],
    ask: () => {
      const columns = setup.columns.filter(({ edits }) => edits.length);
      if (!columns.length) throw new Error("No column has an edit.");
      const completion = over.value === "given" ? viewOf(UNSTEERED).text : "";
      if (over.value === "given" && !completion) throw new Error("Ask first: there is no unsteered answer yet.");
      return {
        path: "v1/steering/evaluate",
        body: {
          model: served.model,
          texts: [{ ...textOfRequest(), ...(completion ? { completion } : {}) }],
          configurations: columns.map((column) => ({ name: column.name, steering: steeringOf(column) })),
          max_tokens: Math.min(setup.sampling.max_tokens, 256),
          features: served.saes.map(({ id }) => ({ sae: id, top_k: 6 })),
        },
      };
    },
    show: ({ noise, configurations }) => [
      table(configurations), h("p", { class: "hint" }, `Two unsteered runs differ by ${figure(noise?.kl)} (KL).`),
      ...configurations.map(moved),
    ],
    refused: (error) => {
      const at = /^configurations\[(\d+)\]\.(.*)/.exec(error.param ?? "");
      const column = at && setup.columns.filter(({ edits }) => edits.length)[Number(at[1])];
      if (column) markRefusal(column.name, { ...error, message: error.message, param: at[2] });
      return [];
    },
  };
}

/** @type {[string, (configuration: any) => string][]} */
const MEASURES = [
  ["KL, mean (largest)", ({ kl }) => `${figure(kl.mean)} (${figure(kl.max)})`],
  ["Same likeliest token", ({ top1_agreement }) => percent(top1_agreement)],
  ["Surprise at the text", ({ nll }) => `${figure(nll.unsteered)} → ${figure(nll.steered)}`],
  ["Change of the stream", ({ share }) => (share ? `${percent(share.mean)}, at most ${percent(share.max)}` : "–")],
  ["Tokens", ({ tokens }) => String(tokens)],
];

/** @param {any[]} configurations */
function table(configurations) {
  return h("div", { class: "scroll", tabindex: "0", role: "group", "aria-label": "Figures of the evaluation" },
    h("table", {},
      h("thead", {}, h("tr", {}, h("td"), configurations.map(({ name }) => h("th", { scope: "col" }, name)))),
      h("tbody", {}, MEASURES.map(([name, of]) =>
        h("tr", {}, h("th", { scope: "row" }, name), configurations.map((each) => h("td", {}, of(each))))))));
}

/** @param {any} configuration */
function moved({ name, features, answers }) {
  const answer = answers?.[0];
  return h("section", {}, h("h4", {}, name),
    answer && h("details", { class: "fine" }, h("summary", {}, "Its answer"), h("p", { class: "past" }, answer)),
    (features ?? []).map((/** @type {any} */ of) => [
      h("p", { class: "hint" }, sentence(of)),
      h("ul", { class: "moved", "aria-label": `Features of ${of.sae} that moved in ${name}` },
        [...of.edited.map((/** @type {any} */ each) => row(of.sae, each, true)), ...of.moved.map((/** @type {any} */ each) => row(of.sae, each, false))]),
    ]).flat());
}

/** @param {any} of */
function sentence({ sae, newly_active, silenced, leak, explained }) {
  const parts = [`${sae}: on an average token ${figure(newly_active)} other features become active and ${figure(silenced)} fall silent`];
  if (leak !== null && leak !== undefined) parts.push(`others moved ${figure(leak, 2)} times as much as was asked for`);
  if (explained !== null && explained !== undefined) parts.push(`the SAE explains ${percent(explained)} of the change`);
  return `${parts.join("; ")}.`;
}

/** @param {string} sae @param {any} each @param {boolean} edited */
function row(sae, each, edited) {
  const name = h("button", { type: "button", class: "link name", on: { click: () => { openFeature(sae, each.feature); colourBy(sae, each.feature); } } });
  if (each.label) name.textContent = nameOf(each);
  else showName(name, sae, each.feature);
  return h("li", {}, name, h("span", { class: "id" }, edited ? "edited" : String(each.feature)),
    h("span", { class: "number" }, `${figure(each.before)} → ${figure(each.after)}`));
}
