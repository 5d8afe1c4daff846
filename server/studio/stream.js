// @ts-check
/** Server-sent events, and the answers and studies that come in them. */

import { ApiError, GoneError, call, errorIn, line } from "./api.js";

/**
 * The JSON of a stream's events until `[DONE]`.
 * @param {Response} response
 * @param {AbortSignal} signal
 * @returns {AsyncGenerator<any>}
 */
export async function* events(response, signal) {
  const reader = /** @type {ReadableStream} */ (response.body).pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  try {
    for (;;) {
      const { done, value } = await read(reader, signal);
      if (done) throw new ApiError(0, "The answer broke off.");
      const lines = (waiting + value).split("\n");
      waiting = lines.pop() ?? "";
      for (const text of lines) {
        if (!text.startsWith("data:")) continue;
        const data = text.slice(5).trim();
        if (data === "[DONE]") return;
        const content = JSON.parse(data);
        if (content.error) throw errorIn(content, Number(content.error.code) || 400);
        yield content;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** @param {ReadableStreamDefaultReader<string>} reader @param {AbortSignal} signal */
async function read(reader, signal) {
  try {
    return await reader.read();
  } catch (error) {
    if (signal.aborted) throw error;
    line.dispatchEvent(new Event("gone"));
    throw new GoneError();
  }
}

/**
 * @typedef {object} Listener what an answer consists of, as it comes
 * @property {(ids: number[]) => void} prompt the prompt's tokens
 * @property {(text: string, tokens: number) => void} piece text, and of how many tokens it is
 * @property {(tokens: {position: number, text: string, phase: string, features: [number, number][]}[]) => void} read
 * @property {(report: any) => void} report
 * @property {(reason: string, stopped: unknown) => void} finish
 */

/**
 * Ask for one answer and tell of it as it comes.
 * @param {"chat" | "completion"} mode
 * @param {Record<string, unknown>} body
 * @param {AbortSignal} signal
 * @param {Listener} listener
 */
export async function generate(mode, body, signal, listener) {
  const path = mode === "chat" ? "v1/chat/completions" : "v1/completions";
  const response = await call(path, { body: { ...body, stream: true, return_token_ids: true }, signal });
  for await (const chunk of events(response, signal)) {
    const choice = chunk.choices?.[0];
    const prompt = chunk.prompt_token_ids ?? choice?.prompt_token_ids;
    if (prompt) listener.prompt(prompt);
    if (choice) {
      const delta = choice.delta ?? choice;
      const text = delta.content ?? delta.text ?? delta.reasoning ?? delta.reasoning_content ?? "";
      const tokens = choice.token_ids?.length ?? 0;
      if (text || tokens) listener.piece(text, tokens);
    }
    if (chunk.steering?.read) listener.read(chunk.steering.read.tokens);
    if (chunk.steering?.interventions) listener.report(chunk.steering);
    if (choice?.finish_reason) listener.finish(choice.finish_reason, choice.stop_reason);
  }
}

/**
 * Run a study, which tells how far it is.
 * @param {string} path
 * @param {Record<string, unknown>} body
 * @param {AbortSignal} signal
 * @param {(done: number, of: number) => void} progress
 * @returns {Promise<any>} its result
 */
export async function study(path, body, signal, progress) {
  const response = await call(path, { body: { ...body, stream: true }, signal });
  if (!response.headers.get("content-type")?.startsWith("text/event-stream")) return response.json();
  let result = null;
  for await (const event of events(response, signal)) {
    if (event.object === "steering.progress") progress(event.done, event.of);
    else result = event;
  }
  return result;
}
