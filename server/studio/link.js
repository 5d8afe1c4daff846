// @ts-check
/** A link that holds the whole set-up in its fragment, which browsers send to no server. */

import { replaceSetup, sane, setup } from "./state.js";

const MARK = "#setup=";

/** @returns {string} */
export function linkToSetup() {
  const page = location.href.split("#")[0];
  return `${page}${MARK}${encodeURIComponent(JSON.stringify(setup))}`;
}

/** Take up the set-up of the address, and remove it there: later changes would make it stale. @returns {boolean} whether there was one */
export function takeUpLink() {
  if (!location.hash.startsWith(MARK)) return false;
  let found = null;
  try {
    found = JSON.parse(decodeURIComponent(location.hash.slice(MARK.length)));
  } catch {
    // A link that was cut short holds no set-up.
  }
  history.replaceState(null, "", location.href.split("#")[0]);
  if (found === null) return false;
  replaceSetup(sane(found));
  return true;
}
