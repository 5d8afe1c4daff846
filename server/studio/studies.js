// @ts-check
/** What the studies have in common: a form, progress, a way to cancel, a result. */

import { calibrate } from "./calibrate.js";
import { byId, fill, h } from "./dom.js";
import { evaluate } from "./evaluate.js";
import { contrast, suggest } from "./find.js";
import { changes, served } from "./state.js";
import { study } from "./stream.js";

/**
 * @typedef {object} Study
 * @property {string} title
 * @property {string} route as OpenAPI has it; a server without it does not show the study
 * @property {string} explains
 * @property {string} verb on the button
 * @property {() => any[]} controls made anew whenever columns come or go
 * @property {() => {path: string, body: Record<string, unknown>}} ask
 * @property {(result: any) => any[]} show
 * @property {(error: any) => any[]} [refused] what to show of a refusal, beside its message
 */

export function start() {
  const studies = [evaluate(), calibrate(), contrast(), suggest()];
  const draw = () => {
    const there = studies.filter(({ route }) => served.routes.has(route));
    fill(byId("studies"), ...there.map(panel));
    byId("tab-studies").hidden = there.length === 0;
  };
  changes.addEventListener("routes", draw);
  draw();
}

/** @param {Study} of */
function panel(of) {
  /** @type {AbortController | null} */
  let running = null;
  const controls = h("div", { class: "stack" }, of.controls());
  changes.addEventListener("shape", () => fill(controls, ...of.controls()));
  const go = h("button", { class: "primary small" }, of.verb);
  const cancel = h("button", { type: "button", class: "small", hidden: true, on: { click: () => running?.abort() } }, "Cancel");
  const progress = h("progress", { max: 1, value: 0, hidden: true, "aria-label": `Progress of “${of.title}”` });
  const note = h("p", { class: "hint", role: "status" });
  const result = h("div", { class: "stack study-result" });

  /** @param {Event} event */
  async function run(event) {
    event.preventDefault();
    if (running) return;
    running = new AbortController();
    busy(true);
    note.className = "hint";
    note.textContent = "Running …";
    progress.removeAttribute("value");
    try {
      const { path, body } = of.ask();
      const found = await study(path, body, running.signal, (done, all) => {
        progress.max = all;
        progress.value = done;
        note.textContent = `${done} of ${all}`;
      });
      fill(result, ...of.show(found));
      note.textContent = "Done.";
    } catch (error) {
      const cancelled = running.signal.aborted;
      note.textContent = cancelled ? "Cancelled." : /** @type {Error} */ (error).message;
      if (!cancelled) note.className = "error";
      fill(result, ...(cancelled ? [] : of.refused?.(error) ?? []));
    }
    running = null;
    busy(false);
  }

  /** @param {boolean} now */
  function busy(now) {
    go.disabled = now;
    cancel.hidden = !now;
    progress.hidden = !now;
  }

  return h("section", { class: "study", "data-study": of.route },
    h("h3", {}, of.title), h("p", { class: "hint" }, of.explains),
    h("form", { class: "stack", on: { submit: run } }, controls, h("div", { class: "row" }, go, cancel, progress)),
    note, result);
}
