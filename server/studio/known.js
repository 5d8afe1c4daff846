// @ts-check
/** What the server has told of features, so that each is asked for once. */

import { json, part } from "./api.js";

/** @typedef {{feature: number, label: string | null, max_activation: number | null, density: number | null}} Known */

/** @type {Map<string, Known>} */
const told = new Map();
/** @type {Map<string, Promise<Known>>} */
const asked = new Map();

/** @param {string} sae @param {number} feature */
const id = (sae, feature) => `${feature} ${sae}`;

/** @param {string} sae @param {Known[]} features */
export function learn(sae, features) {
  for (const feature of features) told.set(id(sae, feature.feature), feature);
}

/** @param {string} sae @param {number} feature @returns {Known | undefined} if it was told already */
export const recall = (sae, feature) => told.get(id(sae, feature));

/** @param {string} sae @param {number} feature @returns {Promise<Known>} */
export function known(sae, feature) {
  const name = id(sae, feature);
  const already = told.get(name);
  if (already) return Promise.resolve(already);
  let answer = asked.get(name);
  if (!answer) {
    // Without a query the list is in the order of the features, so its first entry is this one.
    answer = json(`v1/saes/${part(sae)}/features?limit=1&offset=${feature}`).then(({ data }) => {
      const found = data[0] ?? { feature, label: null, max_activation: null, density: null };
      learn(sae, [found]);
      return found;
    });
    asked.set(name, answer);
    answer.catch(() => asked.delete(name));
  }
  return answer;
}

/** @param {{label?: string | null, feature: number}} feature */
export const nameOf = (feature) => feature.label || `feature ${feature.feature}`;

/** Put a feature's name into an element, at the latest once it is known. @param {Element} element @param {string} sae @param {number} feature */
export function showName(element, sae, feature) {
  element.textContent = nameOf(recall(sae, feature) ?? { feature });
  known(sae, feature).then((found) => { element.textContent = nameOf(found); }, () => {});
}
