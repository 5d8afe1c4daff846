// @ts-check
/** Calls to the server that this page came from, and to no other. */

const ROOT = new URL("..", import.meta.url);
const KEY = "vllm-sae-studio-key";

/** What the server refused: `param` is the path of the field, `body` the whole error. */
export class ApiError extends Error {
  /** @param {number} status @param {string} message @param {{param?: string | null, code?: any}} [body] */
  constructor(status, message, body = {}) {
    super(message);
    this.name = "ApiError";
    this.status = status;
    this.body = /** @type {Record<string, any>} */ (body);
    this.param = body.param ?? null;
    this.code = body.code ?? null;
  }
}

/** The server does not answer. */
export class GoneError extends Error {
  constructor() {
    super("The server does not answer. It may have stopped, or be starting.");
    this.name = "GoneError";
  }
}

/** Has an event if a key is refused (`locked`), if the server is gone (`gone`), if it answers (`here`). */
export const line = new EventTarget();

// The tab's own storage: another tab asks again, and nothing stays once the tab is closed.
export const key = () => sessionStorage.getItem(KEY) ?? "";
/** @param {string} value */
export function setKey(value) {
  if (value) sessionStorage.setItem(KEY, value);
  else sessionStorage.removeItem(KEY);
}

/** @param {string} path below the server's root, without a slash before it */
export const address = (path) => new URL(path, ROOT).href;

/**
 * @param {string} path
 * @param {{method?: string, body?: unknown, signal?: AbortSignal}} [how] a body makes it a POST
 * @returns {Promise<Response>} of a call that succeeded
 * @throws {ApiError | GoneError | DOMException} the last if it was aborted
 */
export async function call(path, { method, body, signal } = {}) {
  /** @type {Record<string, string>} */
  const headers = {};
  if (key()) headers.Authorization = `Bearer ${key()}`;
  if (body !== undefined) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(address(path), {
      method: method ?? (body === undefined ? "GET" : "POST"),
      headers,
      body: body === undefined ? undefined : JSON.stringify(body),
      signal,
      credentials: "same-origin",
      redirect: "error",
    });
  } catch (error) {
    if (signal?.aborted) throw error;
    line.dispatchEvent(new Event("gone"));
    throw new GoneError();
  }
  line.dispatchEvent(new Event("here"));
  if (response.ok) return response;
  if (response.status === 401) line.dispatchEvent(new Event("locked"));
  throw await refusal(response);
}

/** @param {string} path @param {Parameters<typeof call>[1]} [how] @returns {Promise<any>} */
export async function json(path, how) {
  return (await call(path, how)).json();
}

/** @param {any} content an error's JSON @param {number} status */
export function errorIn(content, status) {
  const error = content?.error ?? content?.detail ?? content;
  if (status === 401) return new ApiError(401, "The server asks for its API key.");
  if (typeof error === "string") return new ApiError(status, error);
  return new ApiError(status, error?.message ?? `The server answered ${status}.`, error ?? {});
}

/** @param {Response} response */
async function refusal(response) {
  const text = await response.text();
  try {
    return errorIn(JSON.parse(text), response.status);
  } catch {
    return new ApiError(response.status, `The server answered ${response.status}.`);
  }
}

/** One part of a path. @param {string} name */
export const part = (name) => encodeURIComponent(name);
