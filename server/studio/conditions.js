// @ts-check
/** Where and when an edit is made: its positions and its condition. */

import { field, h, select, tick } from "./dom.js";
import { changed, isObject, saeOf, served } from "./state.js";

/** @typedef {import("./state.js").Edit} Edit */

const PHASES = /** @type {const} */ ([
  ["prompt", "prompt", true],
  ["generation", "answer", true],
  ["special_tokens", "special tokens", false],
]);

/** @param {Edit} edit */
export function whereAndWhen(edit) {
  const summary = h("summary", {}, inWords(edit));
  const content = h("div", { class: "stack" });
  const details = h("details", { class: "fine" }, summary, content);
  const update = () => { summary.textContent = inWords(edit); changed("value"); };
  const rebuild = () => { content.replaceChildren(positions(edit, update), when(edit, update, rebuild)); update(); };
  content.append(positions(edit, update), when(edit, update, rebuild));
  return details;
}

/** @param {Edit} edit */
function inWords(edit) {
  const on = PHASES.filter(([name, , usual]) => edit.positions[name] ?? usual).map(([, text]) => text);
  const { start, end } = edit.positions;
  const slice = start === undefined && end === undefined ? "" : ` [${start ?? ""}, ${end ?? ""})`;
  const where = `On ${on.length ? on.join(", ") : "nothing"}${slice}`;
  if (edit.when === null) return where;
  if (!isSimple(edit.when)) return `${where}, under conditions`;
  const { feature, above, below } = edit.when;
  const own = feature === edit.feature && above === 0;
  if (own) return `${where}, where it fires`;
  return `${where}, if ${feature} is ${above === undefined ? `≤ ${below}` : `> ${above}`}`;
}

/** @param {Edit} edit @param {() => void} update */
function positions(edit, update) {
  const phases = PHASES.map(([name, text, usual]) => {
    const box = h("input", {
      type: "checkbox",
      checked: edit.positions[name] ?? usual,
      on: { change: () => { set(edit.positions, name, box.checked === usual ? undefined : box.checked); update(); } },
    });
    return tick(text, box);
  });
  const ends = /** @type {const} */ (["start", "end"]).map((name) => {
    const input = h("input", {
      type: "number", step: "1", value: edit.positions[name] ?? "",
      on: { input: () => { set(edit.positions, name, whole(input.value)); update(); } },
    });
    return field(name === "start" ? "From position" : "Before", input);
  });
  return h("fieldset", { "data-field": "positions" }, h("legend", {}, "Tokens"),
    h("div", { class: "row" }, phases), h("div", { class: "row" }, ends),
    h("p", { class: "hint" }, "Counted from the prompt’s start; negative ones from its end."));
}

/** @param {Edit} edit @param {() => void} update @param {() => void} rebuild */
function when(edit, update, rebuild) {
  const kinds = [["", "always"], ["own", "only where it fires itself"], ["other", "only if a feature …"]];
  if (edit.when !== null && !isSimple(edit.when)) kinds.push(["kept", "as in the preset"]);
  const kind = kindOf(edit);
  const choice = select(kinds, kind, {
    on: { change: () => { edit.when = conditionOf(edit, choice.value); rebuild(); } },
  });
  const parts = [field("Condition", choice)];
  if (kind === "other") parts.push(comparison(edit, update));
  if (kind === "kept") parts.push(h("pre", { class: "code", tabindex: "0" }, JSON.stringify(edit.when, null, 1)));
  return h("fieldset", { "data-field": "when" }, h("legend", {}, "When"), parts);
}

/** @param {Edit} edit */
function kindOf(edit) {
  if (edit.when === null) return "";
  if (!isSimple(edit.when)) return "kept";
  const { sae, feature, above, scope } = edit.when;
  const own = feature === edit.feature && (sae ?? saeOf(edit)) === saeOf(edit);
  return own && above === 0 && (scope ?? "token") === "token" ? "own" : "other";
}

/** @param {Edit} edit @param {string} kind */
function conditionOf(edit, kind) {
  if (kind === "") return null;
  if (kind === "kept") return edit.when;
  const of = { sae: saeOf(edit), feature: edit.feature };
  return kind === "own" ? { ...of, above: 0 } : { ...of, above: 0.2, unit: "max_act", scope: "so_far" };
}

/** @param {Edit} edit @param {() => void} update */
function comparison(edit, update) {
  const condition = edit.when;
  const sae = select(served.saes.map(({ id }) => [id, id]), condition.sae ?? saeOf(edit), {
    on: { change: () => { condition.sae = sae.value; update(); } },
  });
  const feature = h("input", {
    type: "number", min: "0", step: "1", value: condition.feature,
    on: { input: () => { condition.feature = whole(feature.value) ?? 0; update(); } },
  });
  const side = select([["above", "above"], ["below", "at most"]], "above" in condition ? "above" : "below", {
    on: { change: compare },
  });
  const value = h("input", {
    type: "number", min: "0", step: "any", value: condition.above ?? condition.below, on: { input: compare },
  });
  function compare() {
    delete condition.above;
    delete condition.below;
    condition[side.value] = Number(value.value);
    update();
  }
  const unit = select([["max_act", "× maximum"], ["raw", "raw"]], condition.unit ?? "raw", {
    on: { change: () => { condition.unit = unit.value; update(); } },
  });
  const scopes = [["token", "at the token"], ["so_far", "so far"], ["prompt", "anywhere in the prompt"]];
  const scope = select(scopes, condition.scope ?? "token", {
    on: { change: () => { condition.scope = scope.value; update(); } },
  });
  return h("div", { class: "row" }, served.saes.length > 1 && field("SAE", sae), field("Feature", feature),
    field("is", side), field("Value", value), field("Unit", unit), field("Where", scope));
}

/** One comparison, which the controls can show. @param {any} when */
const isSimple = (when) => isObject(when) && Number.isInteger(when.feature);

/** @param {string} text */
function whole(text) {
  const number = Number.parseInt(text, 10);
  return Number.isNaN(number) ? undefined : number;
}

/** @param {Record<string, any>} object @param {string} name @param {unknown} value */
function set(object, name, value) {
  if (value === undefined) delete object[name];
  else object[name] = value;
}
