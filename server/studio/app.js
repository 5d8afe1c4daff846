// @ts-check
/** The studio: what is on the page, and the server behind it. */

import { ApiError, json, line } from "./api.js";
import * as colour from "./colour.js";
import * as columns from "./columns.js";
import { byId } from "./dom.js";
import * as features from "./features.js";
import * as history from "./history.js";
import * as keep from "./keep.js";
import * as key from "./key.js";
import { takeUpLink } from "./link.js";
import * as run from "./run.js";
import * as sizes from "./sizes.js";
import { changed, changes, remembered, replaceSetup, served, setup } from "./state.js";
import * as studies from "./studies.js";
import * as tabs from "./tabs.js";
import * as theme from "./theme.js";
import * as tokens from "./tokens.js";

const RETRY_MS = 3000;

/** @typedef {HTMLInputElement | HTMLTextAreaElement | HTMLSelectElement} Control */

/** The controls of what is asked show the set-up, and the set-up follows them. */
function bindPrompt() {
  for (const name of /** @type {const} */ (["mode", "system", "prompt"])) {
    byId(name).addEventListener("input", () => {
      setup[name] = byId(name).value;
      if (name === "mode") modeChanged();
      changed("value");
    });
  }
  for (const control of samplingControls()) {
    control.addEventListener("input", () => {
      const name = /** @type {keyof import("./state.js").Sampling} */ (control.dataset.param);
      const value = control.value === "" ? null : Number(control.value);
      if (value !== null || name === "seed") Object.assign(setup.sampling, { [name]: value });
      changed("value");
    });
  }
  changes.addEventListener("shape", showPrompt);
  showPrompt();
}

/** @returns {HTMLInputElement[]} */
const samplingControls = () => [...document.querySelectorAll("input[data-param]")].map((each) => /** @type {HTMLInputElement} */ (each));

function showPrompt() {
  for (const name of /** @type {const} */ (["mode", "system", "prompt"])) {
    if (byId(name).value !== setup[name]) byId(name).value = setup[name];
  }
  for (const control of samplingControls()) {
    const value = setup.sampling[/** @type {keyof import("./state.js").Sampling} */ (control.dataset.param)];
    if (document.activeElement !== control) control.value = value === null ? "" : String(value);
  }
  modeChanged();
}

function modeChanged() {
  byId("system-field").hidden = setup.mode !== "chat";
}

/** Learn what is served; refusals of the key are the dialog's to answer. */
async function connect() {
  try {
    const [models, saes] = await Promise.all([json("v1/models"), json("v1/saes")]);
    // Presets and adapters name their base; the base names nobody.
    const base = models.data.find((/** @type {any} */ { parent }) => !parent) ?? models.data[0];
    served.model = base?.id ?? "";
    served.saes = saes.data;
    byId("model").textContent = served.model;
    problem("");
    changed("served");
  } catch (error) {
    if (!(error instanceof ApiError && error.status === 401)) problem(/** @type {Error} */ (error).message);
    return;
  }
  try {
    const { paths } = await json("openapi.json");
    served.routes = new Set(Object.keys(paths));
  } catch {
    // With --disable-fastapi-docs nobody can say which studies there are, and none is shown.
    served.routes = new Set();
  }
  served.presets = served.saes.length > 0 && (served.routes.size === 0 || served.routes.has("/v1/steering/presets"));
  changed("routes");
}

/** @param {string} text what is wrong with the server; empty for nothing */
function problem(text) {
  byId("problem").hidden = !text;
  byId("problem-text").textContent = text;
}

/** A server that is gone is asked again until it is back. */
function watchServer() {
  /** @type {number | undefined} */
  let waiting;
  const again = () => {
    clearTimeout(waiting);
    waiting = undefined;
    if (served.model) json("v1/models").then(() => problem(""), () => {});
    else void connect();
  };
  line.addEventListener("gone", () => {
    problem("The server does not answer. It may have stopped, or be starting.");
    waiting ??= setTimeout(again, RETRY_MS);
  });
  line.addEventListener("here", () => { if (served.model) problem(""); });
  byId("retry").addEventListener("click", again);
}

theme.start();
tabs.start();
tokens.listen();
const before = remembered();
if (before) replaceSetup(before);
takeUpLink();
addEventListener("hashchange", takeUpLink);
bindPrompt();
watchServer();
key.start(() => { void connect(); });
for (const part of [columns, colour, features, sizes, studies, history, keep, run]) part.start();
void connect();
