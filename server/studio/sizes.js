// @ts-check
/** The relative size of edits before they are run, if the server can forecast it. */

import { json } from "./api.js";
import { showShares } from "./columns.js";
import { settled } from "./dom.js";
import { steeringOf } from "./spec.js";
import { changes, served, setup } from "./state.js";

const ROUTE = "/v1/steering/forecast";
const SETTLED_MS = 250;

export function start() {
  const again = settled(SETTLED_MS, () => { void forecast(); });
  for (const what of ["shape", "value", "routes"]) changes.addEventListener(what, again);
}

async function forecast() {
  if (!served.routes.has(ROUTE)) return;
  await Promise.all(setup.columns.filter(({ edits }) => edits.length).map(async (column) => {
    try {
      const { edits } = await json(ROUTE.slice(1), { body: { model: served.model, steering: steeringOf(column) } });
      showShares(column.name, edits.map((/** @type {any} */ { share }) => share), "forecast");
    } catch {
      // What is wrong with an edit is said when it is run; half a number is no mistake yet.
      showShares(column.name, [], "forecast");
    }
  }));
}
