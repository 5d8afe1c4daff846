// @ts-check
/** Asking all columns at once. */

import { ApiError } from "./api.js";
import { clearMarks, columnNames, markRefusal, showShares, viewOf } from "./columns.js";
import { announce, byId } from "./dom.js";
import { record } from "./history.js";
import { steeringOf } from "./spec.js";
import { colourBy, saeOf, served, setup } from "./state.js";
import { generate } from "./stream.js";

/** As many features as may be read of one token: in most SAEs fewer are active. */
const TOP_K = 64;

/** @type {AbortController | null} */
let running = null;

export function start() {
  byId("ask").addEventListener("submit", (/** @type {Event} */ event) => { event.preventDefault(); void run(); });
  byId("stop").addEventListener("click", () => running?.abort());
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); void run(); }
    if (event.key === "." && (event.ctrlKey || event.metaKey)) running?.abort();
  });
}

/** The prompt as a request has it. @returns {Record<string, unknown>} */
export function textOfRequest() {
  if (setup.mode === "completion") return { prompt: setup.prompt };
  const system = setup.system.trim() ? [{ role: "system", content: setup.system }] : [];
  return { messages: [...system, { role: "user", content: setup.prompt }] };
}

/** A request without its steering. @returns {Record<string, unknown>} */
export function plainBody() {
  const { seed, ...sampling } = setup.sampling;
  return { model: served.model, ...textOfRequest(), ...sampling, ...(seed === null ? {} : { seed }) };
}

/** The SAE at which answers are read: the one of the feature that colours them. */
const readAt = () => setup.colour.sae ?? served.saes[0]?.id ?? "";

/** @param {string} name of a column @returns {Record<string, unknown>} */
function bodyOf(name) {
  if (!served.saes.length) return plainBody();
  const column = setup.columns.find((each) => each.name === name);
  // Without edits of its own a request would be steered by the server's default preset.
  const steering = column ? steeringOf(column) : { interventions: [] };
  const read = { sae: readAt(), top_k: TOP_K, stream: true };
  return { ...plainBody(), steering: { ...steering, report: true, read } };
}

async function run() {
  if (running || !served.model) return;
  if (!setup.prompt.trim()) {
    askForPrompt();
    return;
  }
  clearMarks();
  chooseColour();
  running = new AbortController();
  show(true);
  const { signal } = running;
  const names = columnNames();
  announce(`Asking ${names.length} columns`);
  for (const name of names) viewOf(name).begin(readAt());
  await Promise.all(names.map((name) => ask(name, signal)));
  running = null;
  show(false);
  if (names.some((name) => viewOf(name).generated)) {
    record(names.map((name) => ({ name, text: viewOf(name).text })));
  }
}

function askForPrompt() {
  const prompt = byId("prompt");
  announce("Write a prompt first.");
  prompt.placeholder = "Write a prompt first.";
  prompt.setAttribute("data-refused", "");
  prompt.addEventListener("input", () => prompt.removeAttribute("data-refused"), { once: true });
  prompt.focus();
}

/** @param {string} name @param {AbortSignal} signal */
async function ask(name, signal) {
  const view = viewOf(name);
  try {
    await generate(setup.mode, bodyOf(name), signal, {
      prompt: (ids) => view.setPrompt(ids),
      piece: (text, tokens) => view.addPiece(text, tokens),
      read: (tokens) => view.addRead(tokens),
      report: (report) => { view.setReport(report); measured(name, report); },
      finish: (reason, stopped) => view.finish(reason, stopped),
    });
    view.end();
    view.colour();
  } catch (error) {
    if (signal.aborted) return view.end();
    view.fail(/** @type {Error} */ (error));
    if (error instanceof ApiError && error.param) {
      markRefusal(name, error);
      view.error.hidden = true;
    }
  }
}

/** Tokens are coloured by the first edit unless something else was chosen. */
function chooseColour() {
  const first = setup.columns.flatMap(({ edits }) => edits)[0];
  if (setup.colour.feature === null && first) colourBy(saeOf(first), first.feature);
}

/** The report has the stream's change at each hook point; if an edit is alone there, that is its size. @param {string} name @param {any} report */
function measured(name, report) {
  const hookOf = (/** @type {string} */ sae) => served.saes.find(({ id }) => id === sae)?.hook;
  const hooks = report.interventions.map((/** @type {any} */ entry) => hookOf(entry.sae));
  const shares = report.interventions.map((/** @type {any} */ _, /** @type {number} */ i) => {
    const alone = hooks.filter((/** @type {string} */ hook) => hook === hooks[i]).length === 1;
    return alone ? report.edited?.find((/** @type {any} */ place) => place.hook === hooks[i])?.mean_share ?? null : null;
  });
  showShares(name, shares, "measured");
}

/** @param {boolean} busy */
function show(busy) {
  byId("run").disabled = busy;
  byId("stop").disabled = !busy;
}
