// @ts-check
/** What this tab asks: the prompt, the sampling, and the steered columns. */

/**
 * @typedef {"clamp" | "ablate" | "scale" | "add" | "floor" | "cap"} Op
 * @typedef {{sae: string, feature: number, above?: number, below?: number, unit?: string, scope?: string}} Condition
 * @typedef {{prompt?: boolean, generation?: boolean, special_tokens?: boolean, start?: number, end?: number}} Positions
 * @typedef {object} Edit
 * @property {string | null} sae
 * @property {number} feature
 * @property {Op} op
 * @property {number | null} value
 * @property {"raw" | "max_act"} unit
 * @property {Positions} positions only what differs from the request's
 * @property {any} when one Condition, or whatever else the field takes; null for none
 * @typedef {{name: string, edits: Edit[], more: Record<string, any>}} Column `more` is the rest of the spec
 * @typedef {{max_tokens: number, temperature: number, top_p: number, repetition_penalty: number, seed: number | null}} Sampling
 * @typedef {{sae: string | null, feature: number | null}} Colour
 * @typedef {{mode: "chat" | "completion", system: string, prompt: string, sampling: Sampling, columns: Column[], colour: Colour}} Setup
 */

/** @type {Op[]} */
export const OPS = ["clamp", "ablate", "scale", "add", "floor", "cap"];
export const NAMES = ["A", "B", "C"];
export const UNSTEERED = "Unsteered";
const STORE = "vllm-sae-studio-setup";

/** @type {Setup} */
const FIRST = {
  mode: "chat",
  system: "",
  prompt: "What did you do yesterday?",
  sampling: { max_tokens: 90, temperature: 0, top_p: 1, repetition_penalty: 1.15, seed: null },
  columns: [{ name: "A", edits: [], more: {} }],
  colour: { sae: null, feature: null },
};

/** Changed in place; whoever changes it calls `changed`. @type {Setup} */
export const setup = structuredClone(FIRST);
/** What the server told. @type {{model: string, saes: any[], routes: Set<string>, presets: boolean}} */
export const served = { model: "", saes: [], routes: new Set(), presets: false };

/** `shape`: columns or edits came or went; `value`: something in them changed; `colour`; `served`: the
 * server told its model and SAEs; `routes`: what else it can do. */
export const changes = new EventTarget();

/** @param {"shape" | "value" | "colour" | "served" | "routes"} what */
export function changed(what) {
  if (what !== "served" && what !== "routes") remember();
  changes.dispatchEvent(new Event(what));
}

/** @param {Setup} other */
export function replaceSetup(other) {
  Object.assign(setup, structuredClone(other));
  for (const what of /** @type {const} */ (["shape", "colour"])) changed(what);
}

/** @returns {Column | null} the new one; null if there is room for none */
export function addColumn() {
  const name = NAMES.find((each) => !setup.columns.some((column) => column.name === each));
  if (!name) return null;
  const column = { name, edits: [], more: {} };
  setup.columns.push(column);
  setup.columns.sort((a, b) => a.name.localeCompare(b.name));
  return column;
}

/** @param {string} sae @param {number} feature @param {boolean} scaled whether its maximum is known @returns {Edit} */
export function newEdit(sae, feature, scaled) {
  return { sae, feature, op: "clamp", value: 1, unit: scaled ? "max_act" : "raw", positions: {}, when: null };
}

/** The SAE that an edit means. @param {Edit} edit */
export const saeOf = (edit) => edit.sae ?? served.saes[0]?.id ?? "";

function remember() {
  try {
    sessionStorage.setItem(STORE, JSON.stringify(setup));
  } catch {
    // A full storage costs a reload its set-up, and nothing else.
  }
}

/** The set-up that this tab had before it was loaded again. @returns {Setup | null} */
export function remembered() {
  try {
    const text = sessionStorage.getItem(STORE);
    return text ? sane(JSON.parse(text)) : null;
  } catch {
    return null;
  }
}

/**
 * A set-up out of JSON that anybody may have written: what does not fit is left out.
 * @param {any} raw
 * @returns {Setup}
 */
export function sane(raw) {
  const found = structuredClone(FIRST);
  if (!isObject(raw)) return found;
  if (raw.mode === "completion") found.mode = "completion";
  if (typeof raw.system === "string") found.system = raw.system;
  if (typeof raw.prompt === "string") found.prompt = raw.prompt;
  if (isObject(raw.sampling)) {
    for (const name of /** @type {(keyof Sampling)[]} */ (Object.keys(found.sampling))) {
      if (Number.isFinite(raw.sampling[name])) found.sampling[name] = raw.sampling[name];
    }
  }
  if (Array.isArray(raw.columns)) {
    found.columns = NAMES.flatMap((name) => {
      const column = raw.columns.find((/** @type {any} */ each) => each?.name === name);
      if (!column) return [];
      return [{ name, edits: saneEdits(column.edits), more: isObject(column.more) ? column.more : {} }];
    });
  }
  if (typeof raw.colour?.sae === "string") found.colour.sae = raw.colour.sae;
  if (isIndex(raw.colour?.feature)) found.colour.feature = raw.colour.feature;
  return found;
}

/** @param {any} raw @returns {Edit[]} */
export function saneEdits(raw) {
  if (!Array.isArray(raw)) return [];
  return raw.filter((edit) => isIndex(edit?.feature) && OPS.includes(edit.op)).map((edit) => ({
    sae: typeof edit.sae === "string" ? edit.sae : null,
    feature: edit.feature,
    op: edit.op,
    value: Number.isFinite(edit.value) ? edit.value : null,
    unit: edit.unit === "max_act" ? "max_act" : "raw",
    positions: isObject(edit.positions) ? edit.positions : {},
    when: edit.when ?? null,
  }));
}

/** @param {any} value */
export const isObject = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
/** @param {any} value */
const isIndex = (value) => Number.isInteger(value) && value >= 0;

/** Open a feature on the page. @param {string} sae @param {number} feature */
export function openFeature(sae, feature) {
  changes.dispatchEvent(new CustomEvent("open-feature", { detail: { sae, feature } }));
}

/** Colour all tokens by a feature. @param {string} sae @param {number | null} feature */
export function colourBy(sae, feature) {
  Object.assign(setup.colour, { sae, feature });
  changed("colour");
}
