// @ts-check
/** How strong an edit may be: the dose at which the model moves as far as a budget allows. */

import { budgetTexts } from "./budget.js";
import { curve } from "./charts.js";
import { markRefusal } from "./columns.js";
import { field, figure, h, percent, select } from "./dom.js";
import { columnOf, steeringOf } from "./spec.js";
import { changed, served, setup } from "./state.js";

/** @returns {import("./studies.js").Study} */
export function calibrate() {
  const metric = select([["kl", "KL from the unsteered model"], ["nll", "rise of surprise (nll)"]], "kl");
  const budget = h("input", { type: "number", min: "0", step: "any", value: "0.1" });
  const over = budgetTexts("Over");
  const metricField = field("Budget of", metric);
  const budgetField = field("Budget", budget);
  let name = "";
  const column = () => setup.columns.find((each) => each.name === name) ?? setup.columns[0];
  return {
    title: "Dose curve",
    route: "/v1/steering/calibrate",
    explains: "The strength at which a column’s edits spend a budget.",
    verb: "Calibrate",
    controls: () => {
      name = column()?.name ?? "";
      const which = select(setup.columns.map((each) => [each.name, each.name]), name, { on: { change: () => { name = which.value; } } });
      return [h("div", { class: "row" }, field("Column", which), metricField, budgetField), over.control];
    },
    ask: () => {
      if (!column()?.edits.length) throw new Error("This column has no edit.");
      return {
        path: "v1/steering/calibrate",
        body: { model: served.model, steering: steeringOf(column()), budget: { metric: metric.value, value: Number(budget.value) }, texts: over.texts() },
      };
    },
    show: (result) => [
      h("p", {}, `${figure(result.multiplier)} times as strong as now: ${metric.value} ${figure(result.achieved)}.`),
      ...doses(result.curve, result.multiplier, metric.value, Number(budget.value)),
      apply(name, result.steering),
    ],
    refused: (error) => {
      if (error.param?.startsWith("steering") && column()) markRefusal(column().name, error);
      return error.body?.curve?.length ? doses(error.body.curve, null, metric.value, Number(budget.value)) : [];
    },
  };
}

/** @param {string} name of the column @param {any} steering */
function apply(name, steering) {
  return h("button", { type: "button", class: "small", on: { click: () => {
    const column = setup.columns.find((each) => each.name === name);
    if (!column) return;
    Object.assign(column, columnOf(steering));
    changed("shape");
  } } }, `Use this strength in ${name}`);
}

/** @param {any[]} tried @param {number | null} multiplier @param {string} metric @param {number} budget */
function doses(tried, multiplier, metric, budget) {
  const points = tried.map((each) => ({ x: each.multiplier, y: each[metric] }));
  const chosen = points.find(({ x }) => x === multiplier) ?? null;
  const label = `${metric} against strength, from ${figure(points[0].x)} to ${figure(points[points.length - 1].x)} times`;
  return [
    curve(points, chosen, budget, label),
    h("details", { class: "fine" }, h("summary", {}, "Figures"),
      h("table", {},
        h("thead", {}, h("tr", {}, ["Strength", "KL", "Rise of nll", "Of the stream"].map((text) => h("th", { scope: "col" }, text)))),
        h("tbody", {}, tried.map((each) => h("tr", {}, h("td", {}, `× ${figure(each.multiplier)}`), h("td", {}, figure(each.kl)), h("td", {}, figure(each.nll)), h("td", {}, percent(each.mean_share))))))),
  ];
}
