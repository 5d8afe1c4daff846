// @ts-check
/** What a report says, in words. */

import { figure, h, percent } from "./dom.js";
import { showName } from "./known.js";

/** @type {Record<string, (entry: any) => string>} */
const DID = {
  clamp: (e) => `set to ${figure(e.effective_value)} on`,
  ablate: () => "switched off on",
  scale: (e) => `multiplied by ${figure(e.value)} on`,
  add: (e) => `moved by ${figure(e.effective_value)} on`,
  floor: (e) => `held at ${figure(e.effective_value)} or more on`,
  cap: (e) => `held at ${figure(e.effective_value)} or less on`,
};

/**
 * @param {any} report the `steering` object of an answer
 * @param {number | null} total how many tokens entered the model
 * @returns {HTMLElement[]}
 */
export function inWords(report, total) {
  const lines = report.interventions.map((/** @type {any} */ entry) => sentence(entry, total));
  for (const { hook, mean_share, max_share, tokens_limited } of report.edited ?? []) {
    if (mean_share === null) continue;
    lines.push(h("li", {}, `At ${hook} the stream changed by ${percent(mean_share)} of its norm on average, ${percent(max_share)} at most`,
      tokens_limited ? `, held to the limit on ${tokens_limited} tokens.` : "."));
  }
  if (report.protected) {
    lines.push(h("li", {}, `Protecting features left ${percent(report.protected.norm_kept)} of the edits’ size.`));
  }
  if (report.stopped) lines.push(h("li", {}, `Stopped by feature ${report.stopped.feature} at position ${report.stopped.position}.`));
  if (report.tokens_cached) lines.push(h("li", {}, `${report.tokens_cached} tokens of the prompt came from the cache, already edited.`));
  return lines;
}

/** @param {any} entry @param {number | null} total */
function sentence(entry, total) {
  const name = h("strong");
  showName(name, entry.sae, entry.feature);
  const of = total === null ? "" : ` of ${total}`;
  const parts = [`${DID[entry.op]?.(entry) ?? "edited on"} ${entry.tokens_edited}${of} tokens`];
  if (entry.tokens_edited) {
    parts.push(`it was active on ${entry.tokens_active || "none"}${entry.tokens_active ? ` (up to ${figure(entry.max_activation)})` : ""}`);
  }
  if (entry.tokens_held_back) parts.push(`its condition held back ${entry.tokens_held_back}`);
  if (entry.tokens_skipped) parts.push(`${entry.tokens_skipped} were left out as sinks`);
  return h("li", {}, name, ": ", `${parts.join("; ")}.`);
}
