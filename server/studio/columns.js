// @ts-check
/** The columns side by side: the model as it is, and up to three ways of steering it. */

import { AnswerView } from "./answer.js";
import { byId, fill, h } from "./dom.js";
import { editCard, say, tellShare } from "./edits.js";
import { known } from "./known.js";
import { columnSettings } from "./settings.js";
import { columnOf, placeOf } from "./spec.js";
import { NAMES, UNSTEERED, addColumn, changed, changes, colourBy, newEdit, openFeature, saeOf, served, setup } from "./state.js";

/** @type {Map<string, AnswerView>} */
const views = new Map();

export function start() {
  changes.addEventListener("shape", draw);
  changes.addEventListener("served", draw);
  changes.addEventListener("colour", () => { for (const view of views.values()) view.colour(); });
  byId("add-column").addEventListener("click", () => {
    const column = addColumn();
    if (!column) return;
    changed("shape");
    byId(`column-${column.name}`).focus();
  });
  draw();
}

/** @param {string} name of a column @returns {AnswerView} */
export function viewOf(name) {
  let view = views.get(name);
  if (!view) {
    view = new AnswerView(name, {
      steer: (sae, feature) => {
        // A feature of a column's own answer is for that column.
        if (name !== UNSTEERED) aimAt(name);
        void addFeature(sae, feature);
      },
      colour: colourBy,
    });
    views.set(name, view);
  }
  return view;
}

/** Every column that is there, the unsteered one first. @returns {string[]} */
export const columnNames = () => [UNSTEERED, ...setup.columns.map(({ name }) => name)];

/** The column that features are added to. @type {string | null} */
let target = null;
/** @param {string} name */
export function aimAt(name) {
  target = name;
}
/** @returns {string} */
export const aimedAt = () => setup.columns.find(({ name }) => name === target)?.name ?? setup.columns[0]?.name ?? NAMES[0];

/** Add an edit of a feature to the column that is aimed at, and show it. @param {string} sae @param {number} feature */
export async function addFeature(sae, feature) {
  const column = setup.columns.find(({ name }) => name === aimedAt()) ?? addColumn();
  if (!column) return;
  const there = column.edits.findIndex((edit) => saeOf(edit) === sae && edit.feature === feature);
  if (there < 0) {
    const told = await known(sae, feature).catch(() => null);
    column.edits.push(newEdit(sae, feature, Boolean(told?.max_activation)));
    changed("shape");
  }
  const card = sectionOf(column.name)?.querySelector(`[data-edit="${there < 0 ? column.edits.length - 1 : there}"]`);
  card?.scrollIntoView({ block: "nearest" });
  card?.classList.add("fresh");
}

export const NO_ROOM = "There can be no more than three columns: remove one first.";

/** Open a spec as a column of its own. @param {any} steering @returns {import("./state.js").Column | null} null if there is no room */
export function openColumn(steering) {
  const column = addColumn();
  if (!column) return null;
  Object.assign(column, columnOf(steering));
  changed("shape");
  return column;
}

function draw() {
  const sections = columnNames().map((name) => section(name));
  fill(byId("columns"), ...sections);
  byId("columns").dataset.count = String(sections.length);
  byId("add-column").disabled = setup.columns.length === NAMES.length;
}

/** @param {string} name */
function section(name) {
  const column = setup.columns.find((each) => each.name === name);
  const head = h("header", {}, h("h2", { id: `column-${name}`, tabindex: "-1" }, name), column && actions(column));
  return h("section", { class: "column", "data-column": name, "aria-labelledby": `column-${name}` },
    head,
    column ? edits(column) : h("p", { class: "hint" }, "The model as it is."),
    h("p", { class: "error column-error", hidden: true, role: "alert" }),
    viewOf(name).root);
}

/** @param {import("./state.js").Column} column */
function actions(column) {
  const copy = h("button", {
    type: "button", class: "quiet small", disabled: setup.columns.length === NAMES.length, "aria-label": `Duplicate ${column.name}`,
    on: { click: () => {
      const other = addColumn();
      if (other) Object.assign(other, structuredClone({ edits: column.edits, more: column.more }));
      changed("shape");
    } },
  }, "Duplicate");
  const remove = h("button", {
    type: "button", class: "quiet", "aria-label": `Remove ${column.name}`, title: "Remove",
    on: { click: () => {
      setup.columns.splice(setup.columns.indexOf(column), 1);
      views.delete(column.name);
      changed("shape");
      byId("add-column").focus();
    } },
  }, "×");
  return h("span", { class: "actions" }, copy, remove);
}

/** @param {import("./state.js").Column} column */
function edits(column) {
  if (!served.saes.length) return h("p", { class: "hint" }, "This server has no SAE, so nothing can be steered.");
  const cards = column.edits.map((edit, index) => editCard(edit, index, {
    remove: () => {
      column.edits.splice(index, 1);
      changed("shape");
      byId(`column-${column.name}`).focus();
    },
    details: () => openFeature(saeOf(edit), edit.feature),
  }));
  const find = h("button", { type: "button", class: "link", on: { click: () => {
    aimAt(column.name);
    changes.dispatchEvent(new Event("find-feature"));
  } } }, cards.length ? "Add another feature" : "Find a feature to steer");
  return h("div", { class: "stack" },
    cards.length > 0 && h("ul", { class: "edits", "aria-label": `Edits of ${column.name}` }, cards),
    h("p", { class: "find" }, find), cards.length > 0 && columnSettings(column));
}

/** @param {string} name @returns {HTMLElement | null} */
const sectionOf = (name) => document.querySelector(`[data-column="${name}"]`);

/** Show the sizes of a column's edits, as far as they are known. @param {string} name @param {(number | null)[]} found @param {"forecast" | "measured"} how */
export function showShares(name, found, how) {
  const column = setup.columns.find((each) => each.name === name);
  column?.edits.forEach((edit, i) => {
    tellShare(edit, found[i] ?? null, how);
    const size = sectionOf(name)?.querySelector(`[data-edit="${i}"] [data-size]`);
    if (size) say(size, edit);
  });
}

/** Take every mark of a refusal away. */
export function clearMarks() {
  for (const marked of document.querySelectorAll("[data-refused]")) {
    marked.removeAttribute("data-refused");
    marked.removeAttribute("aria-invalid");
    marked.removeAttribute("aria-describedby");
  }
  for (const error of document.querySelectorAll(".column-error")) /** @type {HTMLElement} */ (error).hidden = true;
}

/**
 * Mark the field that a refusal names, and say why.
 * @param {string} name of the column
 * @param {import("./api.js").ApiError} error
 */
export function markRefusal(name, error) {
  const place = placeOf(error.param);
  const section = sectionOf(name);
  const within = place.edit === null ? section : section?.querySelector(`[data-edit="${place.edit}"]`);
  const marked = (place.field && (within?.querySelector(`[data-field~="${place.field}"]`)
    ?? document.querySelector(`[data-param="${place.field}"]`))) || (place.edit === null ? null : within);
  const message = /** @type {HTMLElement} */ (section?.querySelector(".column-error"));
  message.textContent = error.message;
  message.id = `refused-${name}`;
  message.hidden = false;
  if (!marked) return;
  for (let at = marked.closest("details"); at; at = at.parentElement?.closest("details") ?? null) at.open = true;
  marked.setAttribute("data-refused", "");
  marked.setAttribute("aria-describedby", message.id);
  if (marked.matches("input, select, textarea")) marked.setAttribute("aria-invalid", "true");
}
