// @ts-check
/** A column as something to take along: a command line, a script, a preset's file. */

import { address } from "./api.js";
import { plainBody } from "./run.js";
import { steeringOf } from "./spec.js";
import { setup } from "./state.js";

/** @typedef {import("./state.js").Column} Column */

/** @param {Column} column */
const withReport = (column) => ({ ...steeringOf(column), report: true });
const path = () => (setup.mode === "chat" ? "v1/chat/completions" : "v1/completions");

/** The shell puts the key in: a secret is not for a clipboard. @param {Column} column @param {boolean} keyed */
export function curl(column, keyed) {
  const body = JSON.stringify({ ...plainBody(), steering: withReport(column) }, null, 1);
  return [
    `curl ${address(path())} -H 'Content-Type: application/json'`,
    ...(keyed ? [`  -H "Authorization: Bearer $VLLM_API_KEY"`] : []),
    `  -d ${quoted(body)}`,
  ].join(" \\\n");
}

/** In a shell's single quotes. @param {string} text */
const quoted = (text) => `'${text.replaceAll("'", String.raw`'\''`)}'`;

/** @param {Column} column @param {boolean} keyed */
export function python(column, keyed) {
  const { model, messages, prompt, max_tokens, temperature, top_p, seed, ...others } = plainBody();
  const known = Object.entries({ model, messages, prompt, max_tokens, temperature, top_p, seed }).filter(([, value]) => value !== undefined);
  const call = setup.mode === "chat" ? "chat.completions" : "completions";
  const text = setup.mode === "chat" ? "choices[0].message.content" : "choices[0].text";
  return [
    ...(keyed ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${literal(address("v1"))}, api_key=${keyed ? 'os.environ["VLLM_API_KEY"]' : '"none"'})`,
    `answer = client.${call}.create(`,
    ...known.map(([name, value]) => `    ${name}=${literal(value, 1)},`),
    `    extra_body=${literal({ ...others, steering: withReport(column) }, 1)},`,
    ")",
    `print(answer.${text})`,
    "print(answer.steering)",
    "",
  ].join("\n");
}

/** A value as Python writes it. @param {any} value @param {number} [depth] @returns {string} */
function literal(value, depth = 0) {
  if (value === null) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  const items = Array.isArray(value)
    ? value.map((item) => literal(item, depth + 1))
    : Object.entries(value).map(([name, item]) => `${JSON.stringify(name)}: ${literal(item, depth + 1)}`);
  const short = `${open}${items.join(", ")}${close}`;
  if (short.length < 80 && !short.includes("\n")) return short;
  const pad = "    ".repeat(depth + 1);
  return `${open}\n${items.map((item) => `${pad}${item},\n`).join("")}${"    ".repeat(depth)}${close}`;
}

/** @param {Column} column @param {string} description */
export function presetFile(column, description) {
  const content = { steering: steeringOf(column), ...(description ? { description } : {}) };
  return `${JSON.stringify(content, null, 2)}\n`;
}
