// @ts-check
/** One edit of a column: which feature, what is done to it, and how strongly. */

import { whereAndWhen } from "./conditions.js";
import { figure, h, percent, select } from "./dom.js";
import { known, recall, showName } from "./known.js";
import { OPS, changed, saeOf } from "./state.js";

/** @typedef {import("./state.js").Edit} Edit */

/** @type {Record<import("./state.js").Op, string>} */
const DOES = {
  clamp: "set to", ablate: "switch off", scale: "multiply by", add: "add", floor: "at least", cap: "at most",
};
/** How far the slider goes: multiples of the maximum, and factors of `scale`. */
const MULTIPLES = 3;
const FACTORS = 10;

/**
 * @param {Edit} edit
 * @param {number} index
 * @param {{remove: () => void, details: () => void}} act
 */
export function editCard(edit, index, act) {
  const sae = saeOf(edit);
  const name = h("button", { type: "button", class: "link name", on: { click: act.details } });
  showName(name, sae, edit.feature);
  const controls = h("div", { class: "dose" });
  const size = h("p", { class: "size", "data-size": true });
  const draw = () => { dose(controls, edit, redraw); say(size, edit); };
  const redraw = () => { draw(); changed("value"); };
  draw();
  known(sae, edit.feature).then(draw, () => {});
  return h("li", { class: "edit", "data-edit": index },
    h("div", { class: "edit-head" },
      h("span", { "data-field": "feature" }, name, h("span", { class: "id" }, ` ${sae} · ${edit.feature}`)),
      h("button", { type: "button", class: "quiet", "aria-label": `Remove feature ${edit.feature}`, on: { click: act.remove } }, "×")),
    controls, size, whereAndWhen(edit));
}

/** The operation, the slider and the number beside it. @param {Element} parent @param {Edit} edit @param {() => void} redraw */
function dose(parent, edit, redraw) {
  const max = recall(saeOf(edit), edit.feature)?.max_activation;
  const op = select(OPS.map((each) => [each, DOES[each]]), edit.op, {
    "aria-label": "Operation", "data-field": "op",
    on: { change: () => { switchTo(edit, op.value); redraw(); focusOn(parent, "op"); } },
  });
  if (edit.op === "ablate") return parent.replaceChildren(op);
  const { least, most, step } = span(edit, max);
  const slider = h("input", {
    type: "range", min: least, max: most, step, value: edit.value ?? 0, "aria-label": "Value, slider",
    on: { input: () => put(Number(slider.value), number) },
  });
  const number = h("input", {
    type: "number", step: "any", value: edit.value ?? "", "aria-label": "Value", "data-field": "value",
    on: { input: () => put(number.value === "" ? null : Number(number.value), slider) },
  });
  /** @param {number | null} value @param {any} other */
  function put(value, other) {
    edit.value = value;
    other.value = value ?? "";
    const size = /** @type {HTMLElement} */ (parent.parentElement).querySelector("[data-size]");
    if (size) say(size, edit);
    changed("value");
  }
  const unit = edit.op === "scale"
    ? h("span", { class: "unit" }, "× itself")
    : select([["max_act", "× max"], ["raw", "raw"]], edit.unit, {
      "aria-label": "Unit", "data-field": "unit",
      on: { change: () => { convert(edit, unit.value, max); redraw(); focusOn(parent, "unit"); } },
    });
  parent.replaceChildren(op, number, unit, slider);
}

/** @param {Edit} edit @param {number | null | undefined} max */
function span(edit, max) {
  if (edit.op === "scale") return { least: 0, most: FACTORS, step: 0.1 };
  const most = edit.unit === "max_act" ? MULTIPLES : MULTIPLES * (max ?? 30);
  return { least: edit.op === "add" ? -most : 0, most, step: edit.unit === "max_act" ? 0.05 : "any" };
}

/** @param {Edit} edit @param {any} op */
function switchTo(edit, op) {
  edit.op = op;
  if (op === "ablate") edit.value = null;
  else edit.value ??= 1;
}

/** The same strength in another unit. @param {Edit} edit @param {any} unit @param {number | null | undefined} max */
function convert(edit, unit, max) {
  if (max && edit.value !== null && unit !== edit.unit) {
    const value = unit === "raw" ? edit.value * max : edit.value / max;
    edit.value = Number(value.toPrecision(4));
  }
  edit.unit = unit;
}

/** What the edit comes to: its raw value and, if known, its size against the stream. @param {Element} element @param {Edit} edit */
export function say(element, edit) {
  const told = recall(saeOf(edit), edit.feature);
  const max = told?.max_activation;
  const parts = [];
  if (edit.op !== "ablate" && edit.op !== "scale" && edit.value !== null) {
    if (edit.unit === "max_act" && max) parts.push(`= ${figure(edit.value * max)}`);
    if (edit.unit === "raw" && max) parts.push(`= ${figure(edit.value / max)} × its maximum`);
  }
  if (max === null) parts.push("its maximum is not recorded, so only raw values");
  else if (max !== undefined) parts.push(`maximum ${figure(max)}`);
  const { forecast, measured } = shares.get(edit) ?? {};
  if (forecast) parts.push(`about ${percent(forecast)} of the stream`);
  else if (measured) parts.push(`${percent(measured)} of the stream in the last run`);
  element.textContent = parts.join(" · ");
}

/** What is known of the sizes of edits, as shares of the stream's norm. @type {WeakMap<Edit, {forecast?: number | null, measured?: number | null}>} */
const shares = new WeakMap();

/** @param {Edit} edit @param {number | null} share of the stream's norm @param {"forecast" | "measured"} how */
export function tellShare(edit, share, how) {
  shares.set(edit, { ...shares.get(edit), [how]: share });
}

/** @param {Element} parent @param {string} field */
function focusOn(parent, field) {
  /** @type {HTMLElement | null} */ (parent.querySelector(`[data-field="${field}"]`))?.focus();
}
