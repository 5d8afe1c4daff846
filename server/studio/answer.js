// @ts-check
/** One answer: its tokens, coloured by a feature, and what was reported of it. */

import { GoneError } from "./api.js";
import { announce, fill, h } from "./dom.js";
import { recall } from "./known.js";
import { inWords } from "./report.js";
import { setup } from "./state.js";
import { explain } from "./tokens.js";

/** @typedef {import("./tokens.js").Token} Token */

/** What has come of an answer: nothing yet. */
const nothing = () => ({
  prompt: /** @type {Token[]} */ ([]),
  tokens: /** @type {Token[]} */ ([]),
  byPosition: /** @type {Map<number, Token>} */ (new Map()),
  report: /** @type {any} */ (null),
  promptLength: 0,
  generated: 0,
  finished: "",
  /** The largest activation of the feature that colours it. */
  strongest: 0,
});

export class AnswerView {
  /** @param {string} name of the column @param {Omit<import("./tokens.js").Acts, "sae">} acts */
  constructor(name, acts) {
    this.name = name;
    /** The SAE at which this answer was read. */
    this.sae = "";
    this.body = h("div", { class: "answer", tabindex: "0", role: "group", "aria-label": `Answer of ${name}. The arrow keys go through its tokens.` });
    this.promptTokens = h("div", { class: "answer prompt-tokens", tabindex: "0", role: "group", "aria-label": `Prompt as ${name} read it. The arrow keys go through its tokens.` });
    this.promptDetails = h("details", { class: "fine", hidden: true }, h("summary", {}, "The prompt’s tokens"), this.promptTokens);
    this.status = h("p", { class: "status" });
    this.error = h("p", { class: "error", role: "alert", hidden: true });
    this.words = h("ul", { class: "report", "aria-label": `What was done in ${name}` });
    this.root = h("div", { class: "result" }, this.promptDetails, this.body, this.error, this.status, this.words);
    explain(this.body, () => this.received.tokens, { ...acts, sae: () => this.sae });
    explain(this.promptTokens, () => this.received.prompt, { ...acts, sae: () => this.sae });
    this.received = nothing();
    this.reset();
  }

  reset() {
    this.received = nothing();
    fill(this.body, h("span", { class: "hint" }, "No answer yet."));
    fill(this.promptTokens);
    fill(this.words);
    this.promptDetails.hidden = true;
    this.error.hidden = true;
    this.status.textContent = "";
  }

  /** Make ready for an answer. @param {string} sae at which it is read */
  begin(sae) {
    this.reset();
    this.sae = sae;
    fill(this.body);
    this.root.setAttribute("aria-busy", "true");
    this.status.textContent = "Waiting …";
  }

  /** How many tokens have come. */
  get generated() {
    return this.received.generated;
  }

  get text() {
    return this.received.tokens.map(({ text }) => text).join("");
  }

  /** Tokens that entered the model: all but the last that was sampled. */
  get entered() {
    return this.generated ? this.received.promptLength + this.generated - 1 : null;
  }

  /** @param {number[]} ids */
  setPrompt(ids) {
    this.received.promptLength = ids.length;
  }

  /** @param {string} text @param {number} count of its tokens */
  addPiece(text, count) {
    const position = this.received.promptLength + this.generated;
    const { space, span } = spanOf(text);
    /** @type {Token} */
    const token = { span, text, position, features: null };
    this.received.tokens.push(token);
    for (let i = 0; i < Math.max(count, 1); i++) this.received.byPosition.set(position + i, token);
    this.received.generated += count;
    this.body.append(space, span);
    this.status.textContent = counted(this.generated);
  }

  /** @param {{position: number, text: string, phase: string, features: [number, number][]}[]} read */
  addRead(read) {
    for (const { position, text, phase, features } of read) {
      const token = phase === "prompt" ? this.addPromptToken(position, text) : this.received.byPosition.get(position);
      if (!token) continue;
      token.features = merged(token.features, features);
      this.colourOne(token);
    }
  }

  /** @param {number} position @param {string} text @returns {Token} */
  addPromptToken(position, text) {
    const before = this.received.prompt.at(-1)?.position ?? -1;
    if (position > before + 1) this.promptTokens.append(h("span", { class: "gap", title: "special tokens are not read" }, "⋯"));
    const { space, span } = spanOf(text);
    const token = { span, text, position, features: null };
    this.received.prompt.push(token);
    this.promptTokens.append(space, span);
    this.promptDetails.hidden = false;
    return token;
  }

  /** @param {any} report */
  setReport(report) {
    this.received.report = report;
    this.showReport();
  }

  showReport() {
    if (this.received.report) fill(this.words, ...inWords(this.received.report, this.entered));
  }

  /** @param {string} reason @param {unknown} stopped */
  finish(reason, stopped) {
    const why = stopped === "steering" ? "stopped by a feature" : { length: "as many as allowed", stop: "ended by itself" }[reason] ?? reason;
    this.received.finished = why;
  }

  /** Show that nothing more will come. */
  end() {
    this.root.removeAttribute("aria-busy");
    this.status.textContent = `${counted(this.generated)}, ${this.received.finished || "stopped by you"}`;
    this.showReport();
    announce(`${this.name}: ${this.status.textContent}`);
  }

  /** @param {Error} error */
  fail(error) {
    this.root.removeAttribute("aria-busy");
    this.status.textContent = this.generated ? `${counted(this.generated)}, then it broke off` : "";
    this.error.textContent = error instanceof GoneError ? error.message : `Refused: ${error.message}`;
    this.error.hidden = false;
  }

  /** Colour every token by the feature that is chosen now. */
  colour() {
    this.received.strongest = 0;
    for (const token of [...this.received.prompt, ...this.received.tokens]) this.colourOne(token);
  }

  /** @param {Token} token */
  colourOne(token) {
    const { sae, feature } = setup.colour;
    const found = sae === this.sae ? token.features?.find(([each]) => each === feature) : undefined;
    const activation = found?.[1] ?? 0;
    this.received.strongest = Math.max(this.received.strongest, activation);
    const most = (sae !== null && feature !== null && recall(sae, feature)?.max_activation) || this.received.strongest || 1;
    token.span.classList.toggle("active", activation > 0);
    token.span.style.setProperty("--heat", activation > 0 ? String(Math.min(1, 0.12 + 0.88 * activation / most)) : "0");
  }
}

/** @param {number} tokens */
const counted = (tokens) => `${tokens} ${tokens === 1 ? "token" : "tokens"}`;

/** A token's own colour begins after its leading space. @param {string} text */
function spanOf(text) {
  const space = /^ +(?=\S)/.exec(text)?.[0] ?? "";
  return { space, span: h("span", { class: "token" }, text.slice(space.length)) };
}

/** The features of a piece of several tokens. @param {[number, number][] | null} before @param {[number, number][]} more */
function merged(before, more) {
  if (!before) return more;
  const largest = new Map(before);
  for (const [feature, activation] of more) largest.set(feature, Math.max(activation, largest.get(feature) ?? 0));
  return [...largest].sort((a, b) => b[1] - a[1]);
}
