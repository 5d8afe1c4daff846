// @ts-check
/** What a budget is spent on, for the studies that have one. */

import { field, select } from "./dom.js";
import { textOfRequest } from "./run.js";

/**
 * A choice of the texts on which an edit may move the model as far as a budget allows.
 * @param {string} label
 * @returns {{control: any, texts: () => Record<string, unknown>[] | undefined}} no texts: the server's own
 */
export function budgetTexts(label) {
  const over = select([["shipped", "ordinary text, the server’s own"], ["prompt", "the prompt above"]], "shipped");
  return {
    control: field(label, over),
    texts: () => (over.value === "prompt" ? [textOfRequest()] : undefined),
  };
}
