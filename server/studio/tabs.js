// @ts-check
/** The tabs beside the columns: one tab stop, arrow keys between them. */

import { byId } from "./dom.js";

/** @returns {HTMLElement[]} */
const tabs = () => [...document.querySelectorAll('[role="tab"]')].map((tab) => /** @type {HTMLElement} */ (tab));

export function start() {
  for (const tab of tabs()) {
    tab.addEventListener("click", () => openTab(tab.id.replace("tab-", "")));
    tab.addEventListener("keydown", (event) => {
      const there = tabs().filter(({ hidden }) => !hidden);
      const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!step) return;
      const next = there[(there.indexOf(tab) + step + there.length) % there.length];
      openTab(next.id.replace("tab-", ""));
      next.focus();
    });
  }
}

/** @param {string} name */
export function openTab(name) {
  for (const tab of tabs()) {
    const open = tab.id === `tab-${name}`;
    tab.setAttribute("aria-selected", String(open));
    tab.tabIndex = open ? 0 : -1;
    byId(/** @type {string} */ (tab.getAttribute("aria-controls"))).hidden = !open;
  }
}
