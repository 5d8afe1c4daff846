// @ts-check
/** The strongest features of a token, shown where the pointer or the arrow keys are. */

import { announce, byId, figure, fill, h, visible } from "./dom.js";
import { known, nameOf, showName } from "./known.js";

const SHOWN = 8;
const LINGER_MS = 250;

/**
 * @typedef {object} Token
 * @property {HTMLElement} span
 * @property {string} text
 * @property {number} position
 * @property {[number, number][] | null} features strongest first; null if nothing was read
 */
/**
 * @typedef {object} Acts
 * @property {() => string} sae at which the tokens were read
 * @property {(sae: string, feature: number) => void} steer
 * @property {(sae: string, feature: number) => void} colour
 */

/** @type {number | undefined} */
let leaving;
/** @type {HTMLElement | null} */
let shownAt = null;

/**
 * Show the features of tokens inside `container` on hover, click and arrow keys.
 * @param {HTMLElement} container
 * @param {() => Token[]} tokens
 * @param {Acts} acts
 */
export function explain(container, tokens, acts) {
  /** @param {EventTarget | null} target */
  const at = (target) => tokens().find(({ span }) => span === target);
  container.addEventListener("pointerover", (event) => {
    const token = at(event.target);
    if (token && event.pointerType !== "touch") show(token, acts);
  });
  container.addEventListener("pointerleave", leave);
  container.addEventListener("click", (event) => {
    const token = at(event.target);
    if (token) show(token, acts);
  });
  container.addEventListener("keydown", (event) => {
    const all = tokens();
    const current = all.findIndex(({ span }) => span.classList.contains("current"));
    const steps = /** @type {Record<string, number>} */ ({ ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 });
    if (event.key in steps && all.length) {
      event.preventDefault();
      const next = current < 0 ? 0 : Math.min(Math.max(current + steps[event.key], 0), all.length - 1);
      all[current]?.span.classList.remove("current");
      all[next].span.classList.add("current");
      show(all[next], acts);
      tell(all[next], acts.sae());
    } else if (event.key === "Enter" && shownAt) {
      event.preventDefault();
      panel().querySelector("button")?.focus();
    }
  });
  container.addEventListener("blur", () => {
    for (const { span } of tokens()) span.classList.remove("current");
  });
}

/** Keep the panel while the pointer is on it; Escape, or a press elsewhere, closes it. */
export function listen() {
  const element = panel();
  element.addEventListener("pointerenter", () => clearTimeout(leaving));
  element.addEventListener("pointerleave", leave);
  element.addEventListener("keydown", (/** @type {KeyboardEvent} */ event) => {
    if (event.key === "Escape") {
      const back = /** @type {HTMLElement | null} */ (shownAt?.closest("[tabindex]") ?? null);
      hide();
      back?.focus();
    }
  });
  document.addEventListener("pointerdown", ({ target }) => {
    if (!element.contains(/** @type {Node} */ (target)) && target !== shownAt) hide();
  });
  document.addEventListener("keydown", ({ key }) => { if (key === "Escape") hide(); });
  document.addEventListener("scroll", () => { if (shownAt) place(element, shownAt); }, true);
}

/** @returns {any} */
const panel = () => byId("token-panel");

export function hide() {
  clearTimeout(leaving);
  shownAt = null;
  if (panel().matches(":popover-open")) panel().hidePopover();
}

function leave() {
  clearTimeout(leaving);
  leaving = setTimeout(() => { if (!panel().contains(document.activeElement)) hide(); }, LINGER_MS);
}

/** @param {Token} token @param {Acts} acts */
function show(token, acts) {
  clearTimeout(leaving);
  const sae = acts.sae();
  const head = h("p", { class: "token-head" }, h("q", {}, shown(token)), h("span", { class: "id" }, `position ${token.position}`));
  const strongest = token.features?.[0]?.[1] ?? 1;
  const rows = (token.features ?? []).slice(0, SHOWN).map(([feature, activation]) => {
    const name = h("button", { type: "button", class: "link", title: "Colour the tokens by it", on: { click: () => { hide(); acts.colour(sae, feature); } } });
    showName(name, sae, feature);
    const steer = h("button", { type: "button", class: "small", "aria-label": `Steer feature ${feature}`, on: { click: () => { hide(); acts.steer(sae, feature); } } }, "Steer");
    return h("li", {}, h("meter", { min: 0, max: strongest, value: activation, "aria-hidden": "true" }), name,
      h("span", { class: "id" }, `${feature}`), h("span", { class: "number" }, figure(activation)), steer);
  });
  const none = token.features === null ? "Nothing was read here: a special token, or the last one." : "No feature is active here.";
  fill(panel(), head, rows.length ? h("ul", { class: "strongest" }, rows) : h("p", { class: "hint" }, none),
    rows.length > 0 && h("p", { class: "hint" }, "Before the edits at this SAE."));
  if (!panel().matches(":popover-open")) panel().showPopover();
  shownAt = token.span;
  place(panel(), token.span);
}

/** Below the token, or above if there is no room. @param {HTMLElement} element @param {HTMLElement} span */
function place(element, span) {
  const box = span.getClientRects()[0];
  if (!box) return;
  const { offsetWidth: width, offsetHeight: height } = element;
  const left = Math.max(8, Math.min(box.left, innerWidth - width - 8));
  const below = box.bottom + 6;
  const top = below + height < innerHeight ? below : Math.max(8, box.top - height - 6);
  element.style.left = `${left}px`;
  element.style.top = `${top}px`;
}

/** A token’s text; a token may have none. @param {Token} token */
const shown = ({ text }) => visible(text) || "∅";

/** Say a token and its strongest features. @param {Token} token @param {string} sae */
async function tell(token, sae) {
  const features = (token.features ?? []).slice(0, 3);
  const named = await Promise.all(features.map(async ([feature, activation]) =>
    `${nameOf(await known(sae, feature).catch(() => ({ feature })))} ${figure(activation)}`));
  announce(`${shown(token)}: ${named.join(", ") || "no features read"}`);
}
