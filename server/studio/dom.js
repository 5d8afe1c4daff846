// @ts-check
/** Elements, made without markup: every text on the page is text. */

const SVG = "http://www.w3.org/2000/svg";

/**
 * @param {string} tag
 * @param {Record<string, any>} [props] attributes; `on` holds listeners, null and false are left out
 * @param {...any} children nodes, texts, numbers and lists of them; null, undefined and false are left out
 * @returns {any} the element
 */
export function h(tag, props = {}, ...children) {
  return filled(document.createElement(tag), props, children);
}

/**
 * The same in a drawing.
 * @param {string} tag
 * @param {Record<string, any>} [props]
 * @param {...any} children
 * @returns {any}
 */
export function svg(tag, props = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), props, children);
}

/** Properties that an attribute of the same name only initializes. */
const LIVE = new Set(["value", "checked", "disabled", "hidden", "selected", "open", "indeterminate"]);

/** @param {any} element @param {Record<string, any>} props @param {any[]} children */
function filled(element, props, children) {
  const { on = {}, ...rest } = props;
  for (const [name, value] of Object.entries(rest)) {
    if (LIVE.has(name)) continue;
    if (value !== null && value !== undefined && value !== false) {
      element.setAttribute(name, value === true ? "" : String(value));
    }
  }
  for (const [event, listener] of Object.entries(on)) element.addEventListener(event, listener);
  put(element, children);
  // After the options of a select, which its value chooses among.
  for (const [name, value] of Object.entries(rest)) {
    if (LIVE.has(name) && value !== undefined) element[name] = value ?? "";
  }
  return element;
}

/** Replace what is in `parent`. @param {Element} parent @param {...any} children */
export function fill(parent, ...children) {
  parent.replaceChildren();
  put(parent, children);
}

/** @param {Element} parent @param {any[]} children */
function put(parent, children) {
  for (const child of children.flat()) {
    if (child !== null && child !== undefined && child !== false) {
      parent.append(child instanceof Node ? child : String(child));
    }
  }
}

/** @param {string} id @returns {any} */
export function byId(id) {
  const found = document.getElementById(id);
  if (!found) throw new Error(`no element ${id}`);
  return found;
}

let named = 0;
/** A label over a control. @param {string} text @param {any} control @param {Record<string, any>} [props] */
export function field(text, control, props = {}) {
  control.id ||= `field-${++named}`;
  return h("div", { class: "field", ...props }, h("label", { for: control.id }, text), control);
}

/** A control before its label. @param {string} text @param {any} control */
export function tick(text, control) {
  return h("label", { class: "tick" }, control, text);
}

/** @param {string[][]} options value and text @param {string} value @param {Record<string, any>} [props] */
export function select(options, value, props = {}) {
  return h("select", { ...props, value }, options.map(([v, text]) => h("option", { value: v }, text)));
}

/** A figure with as many digits as matter. @param {number | null | undefined} value @param {number} [digits] */
export function figure(value, digits = 3) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1000) return Math.round(value).toLocaleString("en");
  if (size < 0.001) return value.toExponential(1);
  return String(Number(value.toPrecision(digits)));
}

/** @param {number | null | undefined} share */
export function percent(share) {
  if (share === null || share === undefined) return "–";
  const hundredths = share * 100;
  if (hundredths > 0 && hundredths < 0.1) return "< 0.1 %";
  return `${Number(hundredths.toFixed(hundredths < 10 ? 1 : 0))} %`;
}

/** A token with its leading space and line ends made visible. @param {string} text */
export const visible = (text) => text.replace(/\n/g, "↵").replace(/^ /, "␣");

/** Say something to those who listen rather than look. @param {string} text */
export function announce(text) {
  byId("spoken").textContent = text;
}

/** Call back once nothing has happened for a while. @param {number} ms @param {(...args: any[]) => void} then */
export function settled(ms, then) {
  /** @type {number | undefined} */
  let timer;
  return (/** @type {any[]} */ ...args) => {
    clearTimeout(timer);
    timer = setTimeout(() => then(...args), ms);
  };
}
