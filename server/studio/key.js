// @ts-check
/** The API key: asked for when the server refuses, kept in this tab alone. */

import { key, line, setKey } from "./api.js";
import { byId } from "./dom.js";

/** @param {() => void} retry what to do with a new key */
export function start(retry) {
  const dialog = byId("key-dialog");
  const input = byId("key");
  const error = byId("key-error");
  const ask = () => {
    error.hidden = !key();
    input.toggleAttribute("aria-invalid", Boolean(key()));
    input.value = "";
    if (!dialog.open) dialog.showModal();
    input.focus();
  };
  line.addEventListener("locked", ask);
  byId("forget-key").addEventListener("click", () => { setKey(""); ask(); });
  byId("key-form").addEventListener("submit", (/** @type {Event} */ event) => {
    event.preventDefault();
    setKey(input.value.trim());
    dialog.close();
    retry();
  });
  line.addEventListener("here", () => { byId("forget-key").hidden = !key(); });
}
