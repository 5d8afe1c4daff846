// @ts-check
/** Between a column and the `steering` field of a request. */

import { isObject, saneEdits, saeOf } from "./state.js";

/** @typedef {import("./state.js").Column} Column */

/** Members of the field that a column does not keep: each request has its own. */
const OF_THE_REQUEST = new Set(["interventions", "report", "read"]);

/** @param {Column} column @returns {Record<string, any>} what a preset of this column holds */
export function steeringOf(column) {
  const interventions = column.edits.map((edit) => ({
    sae: saeOf(edit),
    feature: edit.feature,
    op: edit.op,
    ...(edit.op === "ablate" ? {} : { value: edit.value, unit: edit.op === "scale" ? "raw" : edit.unit }),
    ...(Object.keys(edit.positions).length ? { positions: edit.positions } : {}),
    ...(edit.when === null ? {} : { when: edit.when }),
  }));
  return { ...column.more, interventions };
}

/** @param {any} steering of a preset or an answer @returns {Pick<Column, "edits" | "more">} */
export function columnOf(steering) {
  const known = isObject(steering) ? steering : {};
  const more = Object.fromEntries(
    Object.entries(known).filter(([name, value]) => !OF_THE_REQUEST.has(name) && value !== null),
  );
  return { edits: saneEdits(known.interventions), more };
}

/**
 * Where the path of a refusal points: `steering.interventions[1].when.feature` is the field `when`
 * of the second edit.
 * @param {string | null} param
 * @returns {{edit: number | null, field: string | null}}
 */
export function placeOf(param) {
  const edit = /^steering\.interventions\[(\d+)\](?:\.(\w+))?/.exec(param ?? "");
  if (edit) return { edit: Number(edit[1]), field: edit[2] ?? null };
  const field = /^(?:steering\.)?(\w+)/.exec(param ?? "");
  return { edit: null, field: field ? field[1] : null };
}
