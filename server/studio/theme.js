// @ts-check
/** Light, dark, or as the system is. */

import { byId } from "./dom.js";

const STORE = "vllm-sae-studio-theme";
const NEXT = /** @type {Record<string, string>} */ ({ auto: "light", light: "dark", dark: "auto" });

export function start() {
  /** @param {string} theme */
  const use = (theme) => {
    document.documentElement.dataset.theme = theme;
    byId("theme").textContent = `Theme: ${theme}`;
  };
  use(sessionStorage.getItem(STORE) ?? "auto");
  byId("theme").addEventListener("click", () => {
    const theme = NEXT[document.documentElement.dataset.theme ?? "auto"] ?? "auto";
    sessionStorage.setItem(STORE, theme);
    use(theme);
  });
}
